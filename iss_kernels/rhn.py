# SPDX-License-Identifier: Apache-2.0
"""ISSRHN: a recurrent highway network, several micro-steps of a highway layer in each time step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from iss_kernels.recurrent import MODULES, Recurrent, Sizes

_MODES = {"coupled": "RHN", "separate": "RHN_CARRY"}
_DROPOUTS = ("dropout_input", "dropout_state", "dropout_gate")


class ISSRHN(Recurrent):
    """One layer of a recurrent highway network (Zilly et al. 2017), of one width H at all depths.

    A time step starts from s = h and takes `depth` micro-steps, d = 1 ... depth, each with matrices
    of its own; the input enters the first::

        candidate = tanh([d == 1] W_h x + R_hd s + b_hd)
        transform = sigmoid([d == 1] W_t x + R_td s + b_td)
        s = s + transform * (candidate - s)

    and ends with h = s. With carry="separate" there is a third gate, carry, of the form of
    transform, and s = transform * candidate + carry * s.

    Inputs and outputs are those of an nn.GRU of one layer: input [T, B, I], [B, T, I] with
    batch_first, [T, I] unbatched, or a PackedSequence; hx and the final state one tensor [1, B, H];
    `lengths` and `resets` as in `Recurrent`. Parameters, gates in the order candidate, transform,
    carry, with G = 2 or 3 of them: weight_ih_l0 [G H, I], weight_hh_l0 [depth G H, H] and
    bias_hh_l0 [depth G H], the micro-steps one below the other; there is no bias_ih.

    While training, masks are drawn once for a whole sequence, each row of the batch with its own:
    dropout_input is the probability that an element of the input is zeroed, dropout_state that of
    the state before each product (the two of Gal and Ghahramani 2016 and of the RHN paper), and
    dropout_gate that of a candidate (Semeniuta et al. 2016: what the carry keeps is not dropped).
    What is left is scaled by 1 / (1 - p).

    All parameters begin in U(-0.04, 0.04) and the bias of the transform gate as -2, which lets
    states pass at first, as in the paper's code; that of a separate carry gate as 2, the same
    again.

    For the gradient it saves ((G + 1) depth - 1) H elements per step and row (4 bytes each, 8 in
    float64), with recompute=True none.

    Raises TypeError or ValueError for an argument that does not fit, and in `forward` what nn.GRU
    raises for the same mistakes.

    >>> rhn = ISSRHN(3, 4, depth=5)
    >>> y, h = rhn(torch.zeros(7, 1, 3))
    >>> y.shape, h.shape
    (torch.Size([7, 1, 4]), torch.Size([1, 1, 4]))
    """

    dropout_input: float
    dropout_state: float
    dropout_gate: float

    def __init__(
        self,
        input_size: int,
        hidden_size: Sizes,
        depth: int = 10,
        carry: str = "coupled",
        batch_first: bool = False,
        dropout_input: float = 0.0,
        dropout_state: float = 0.0,
        dropout_gate: float = 0.0,
        bias: bool = True,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = hidden_size
        while isinstance(width, (list, tuple)) and len(width) == 1:  # one layer, one direction
            width = width[0]
        if isinstance(width, (list, tuple)):
            raise ValueError(
                "ISSRHN: expected hidden_size to be one int, the width of all micro-steps, "
                f"got {hidden_size}"
            )
        if not isinstance(depth, int) or isinstance(depth, bool):
            raise TypeError(f"depth should be of type int, got: {type(depth).__name__}")
        if depth <= 0:
            raise ValueError("depth must be greater than zero")
        if carry not in _MODES:
            raise ValueError(f"ISSRHN: expected carry to be 'coupled' or 'separate', got {carry!r}")
        for name, p in zip(_DROPOUTS, (dropout_input, dropout_state, dropout_gate), strict=True):
            if isinstance(p, bool) or not 0 <= float(p) <= 1:
                raise ValueError(
                    f"{name} should be a number in range [0, 1] representing the probability of "
                    f"an element being zeroed, got {p}"
                )
            setattr(self, name, float(p))
        self.depth = depth
        self.carry = carry
        self.mode = _MODES[carry]
        super().__init__(
            input_size, width, 1, bias, batch_first, device=device, dtype=dtype, recompute=recompute
        )

    def _shapes(
        self, layer_input: int, h: int, p: int, projects: bool
    ) -> dict[str, tuple[int, ...]]:
        rows = self.cell.gates * h
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, layer_input), "weight_hh": (self.depth * rows, h),
        }  # fmt: skip
        return shapes | ({"bias_hh": (self.depth * rows,)} if self.bias else {})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters from U(-0.04, 0.04); gates let states pass at first."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -0.04, 0.04)
        if self.bias:
            bias = self._parameter("bias_hh_l0").view(self.depth, self.cell.gates, -1)
            for gate, value in zip(range(1, self.cell.gates), (-2.0, 2.0), strict=False):
                bias[:, gate] = value

    @classmethod
    def options_of(cls, module: Any) -> dict[str, Any]:
        """As `Recurrent.options_of`, with the dropouts."""
        names = ("input_size", "hidden_size", "depth", "carry", "batch_first", *_DROPOUTS, "bias")
        return {name: getattr(module, name) for name in names}

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        text = f"{self.input_size}, {self.hidden_size}, depth={self.depth}"
        defaults = dict.fromkeys(_DROPOUTS, 0.0) | {
            "carry": "coupled", "batch_first": False, "bias": True, "recompute": False,
        }  # fmt: skip
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def _dropped(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            return x, None
        batch = len(states[0][0])
        if self.dropout_input > 0:
            mask = dropout(x.new_ones(batch, x.shape[-1]), self.dropout_input)
            x = x * (mask if batch_sizes is None else mask[_rows_of_batch(batch_sizes, x)])
        if self.dropout_state == self.dropout_gate == 0:
            return x, None
        ones = x.new_ones(batch, self.hidden_size)
        masks = [dropout(ones, p) for p in (self.dropout_state, self.dropout_gate)]
        return x, torch.stack(masks)


def _rows_of_batch(batch_sizes: Tensor, x: Tensor) -> Tensor:
    """[N], for each row of a packed sequence x the row of the batch that it is a step of."""
    first = batch_sizes.cumsum(0) - batch_sizes
    first = first.repeat_interleave(batch_sizes, output_size=len(x))
    return (torch.arange(len(x), device="cpu") - first).to(x.device)


MODULES[ISSRHN] = ISSRHN
