# SPDX-License-Identifier: Apache-2.0
"""ISSLSTMCell, ISSGRUCell, ISSRNNCell: torch.nn's cells, one step a call, over this package's ops.

A plain call goes to the compiled extension at once (`ops.cell_step`); any other takes the longer
way through `ops.recurrent`, which says what is wrong with it.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from iss_kernels import backend, ops
from iss_kernels.cells import CELLS, Cell
from iss_kernels.recurrent import CELL_MODULES
from iss_kernels.states import Shrinkable

# h, or (h, c) of an LSTM.
State: TypeAlias = Tensor | tuple[Tensor, Tensor]

_Module = TypeVar("_Module", bound="RecurrentCell")

PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # the first two without a bias
_RNN_STEPS = {"tanh": "rnn_tanh", "relu": "rnn_relu"}  # by nonlinearity


class RecurrentCell(Shrinkable, nn.RNNCellBase):
    """Base of ISSLSTMCell, ISSGRUCell and ISSRNNCell: torch's cell over this package's kernels.

    Arguments, parameters (`weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`; gates in torch's order),
    initialisation, input and output shapes and errors are those of torch's cell, and a state_dict
    loads either way. Weights are float32, float64, or bfloat16 (on a CUDA device also float16),
    which is summed in float32. Under autocast the state comes in the dtype that torch's cell
    returns; on the CPU it is computed in that of the weights.

    On the CPU each call reads the weights where they are, so a weight that anything has written to
    counts in the next call.

    Where units have left (`shrink`), hx of the width before is cut to those that stayed; with
    full_width the states that it returns have that width too (see `Recurrent`).

    It is an nn.RNNCellBase but none of torch's classes, as the layers are (`Recurrent`).
    """

    torch_class: ClassVar[type[nn.RNNCellBase]]
    _step: str  # the cell's name in the registry

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept, self.full_width = None, False

    def _state_sizes(self) -> list[tuple[int, ...]]:
        return [(self.hidden_size,) * len(self.cell.states)]

    @property
    def cell(self) -> Cell:
        """The row of the registry."""
        return CELLS[self._step]

    @classmethod
    def from_torch(cls: type[_Module], cell: nn.RNNCellBase) -> _Module:
        """One with the very parameters of torch's `cell` (shared, not copied), hooks and mode."""
        from iss_kernels.accelerate import converted

        if not isinstance(cell, cls.torch_class):
            raise TypeError(
                f"from_torch: expected a torch.nn.{cls.torch_class.__name__}, "
                f"got {type(cell).__name__}"
            )
        return cast(_Module, converted("from_torch", cell, cls, **options_of_cell(cell)))

    def to_torch(self) -> nn.RNNCellBase:
        """torch's cell with the same parameters (shared, not copied), hooks and mode.

        It has no `kept`: it takes hx of its present width alone.
        """
        from iss_kernels.accelerate import converted

        if self.full_width:
            raise ValueError(
                f"to_torch: expected an {type(self).__name__} whose outputs have the width of its "
                "units, got one with full_width"
            )
        new = converted("to_torch", self, self.torch_class, **options_of_cell(self))
        return cast(nn.RNNCellBase, new)

    def __prepare_scriptable__(self) -> NoReturn:
        backend.refuse_script(self)

    def _fast(self, input: Tensor, hx: Any) -> Any:
        """The states after a plain call; None for others."""
        if self.full_width:
            return None
        return ops.cell_step(self._step, self._parameters, input, hx)

    def _forward(self, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
        """Any call: input, and h or (h, c) before the step -> the same after it."""
        kind = self._kind
        if input.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        states = None if hx is None else self._states(hx)
        if input.dim() == 1:
            given = None if states is None else tuple(s.unsqueeze(0) for s in states)
            after = tuple(s.squeeze(0) for s in self._batched(input.unsqueeze(0), given))
        else:
            after = self._batched(input, states)
        return tuple(self._widened(state, 0, which) for which, state in enumerate(after))

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        """hx taken apart: (h,) or (h, c), each 1-D or 2-D."""
        if "c" in self.cell.states:
            if isinstance(hx, Tensor):
                raise TypeError("LSTMCell: expected hx to be a tuple (h_0, c_0), got a Tensor")
            if not hasattr(hx, "__len__") or len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            states, names = tuple(hx), ["hx[0]", "hx[1]"]
        else:
            states, names = (hx,), ["hidden"]
        for state, name in zip(states, names, strict=True):
            if not isinstance(state, Tensor):
                expected = "hx to be a tensor h_0" if len(states) == 1 else f"{name} to be a tensor"
                raise TypeError(f"{self._kind}: expected {expected}, got a {type(state).__name__}")
            if state.dim() not in (1, 2):
                raise ValueError(
                    f"{self._kind}: Expected {name} to be 1D or 2D, got {state.dim()}D instead"
                )
        return tuple(self._cut(state, 0, which) for which, state in enumerate(states))

    def _batched(self, x: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """x: [B, I], states: h or (h, c), each [B, H] -> the states after the step."""
        if x.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}"
            )
        if states is None:
            zeros = x.new_zeros(x.size(0), self.hidden_size)
            states = (zeros,) * len(self.cell.states)
        for which, state in enumerate(states):
            if state.size(0) != x.size(0):
                raise RuntimeError(
                    f"Input batch size {x.size(0)} doesn't match hidden{which} batch size "
                    f"{state.size(0)}"
                )
            if state.shape != (x.size(0), self.hidden_size):
                got = state.size(1) if state.dim() > 1 else "none"
                before = ""
                if self.kept is not None:
                    before = f", or, from before shrinking, {self.kept[0][which].before}"
                raise RuntimeError(
                    f"hidden{which} has inconsistent hidden_size: got {got}, "
                    f"expected {self.hidden_size}{before}"
                )
        kind, dtype = x.device.type, self._dtype()
        if kind != "meta" and torch.is_autocast_enabled(kind):
            cast_to = torch.get_autocast_dtype(kind)
            if backend.on_cuda(x.device):
                dtype = cast_to if dtype == torch.float32 else dtype
            elif self.cell.carries or dtype == torch.float64:  # as torch's cells do
                cast_to = torch.promote_types(cast_to, states[-1].dtype)
            with torch.autocast(kind, enabled=False):
                after = self._run(x.to(dtype), tuple(s.to(dtype) for s in states), dtype)
            return tuple(s.to(cast_to) for s in after)
        for name, t in zip(("input", "h_0", "c_0"), (x, *states), strict=False):
            if t.dtype != dtype:
                raise RuntimeError(
                    f"{self._kind}: expected {name} of dtype {dtype}, that of the weights, "
                    f"got {t.dtype}"
                )
        return self._run(x, states, dtype)

    def _run(self, x: Tensor, states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The step in `dtype`."""
        if backend.exporting_onnx():
            from iss_kernels import onnx_nodes

            return onnx_nodes.cell_forward(self, x, states)
        w_ih, w_hh, b_ih, b_hh = self._weights(dtype)
        c0 = states[1] if len(states) == 2 else None
        h, _, c = ops.recurrent(
            self._step, x, None, None, states[0], c0, w_ih, w_hh, b_ih, b_hh, None, None, False
        )
        return (h,) if c is None else (h, c)

    def _dtype(self) -> torch.dtype:
        """What a step is computed in, without autocast."""
        return self.weight_ih.dtype

    def _weights(self, dtype: torch.dtype) -> list[Any]:
        """w_ih, w_hh, b_ih and b_hh in `dtype`."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [None if w is None else w.to(dtype) for w in weights]

    @property
    def _kind(self) -> str:
        """What torch calls the cell in errors."""
        return self.torch_class.__name__


def options_of_cell(cell: Any) -> dict[str, Any]:
    """Arguments by which torch's class, or ours, makes a cell like this one of either."""
    names = ("input_size", "hidden_size", "bias", "nonlinearity")
    return {name: getattr(cell, name) for name in names if hasattr(cell, name)}


class ISSLSTMCell(RecurrentCell):
    """Drop-in for torch.nn.LSTMCell: see `RecurrentCell`. Gates in the order i, f, g, o.

    For the gradient a call saves 5 H elements for each row (gates and cell; 4 bytes each, 8 in
    float64) beside its inputs and h'.

    >>> cell = ISSLSTMCell(3, 4)
    >>> h, c = cell(torch.zeros(2, 3))
    >>> h, c = cell(torch.zeros(2, 3), (h, c))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    torch_class = nn.LSTMCell
    _step = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step; shapes as torch.nn.LSTMCell.forward.

        input: [B, I], or [I] unbatched; hx: (h_0, c_0), each [B, H] or [H], zeros by default.
        Returns (h', c') in the form of hx.
        """
        fast = self._fast(input, hx)
        if fast is not None:
            return fast  # type: ignore[no-any-return]
        h, c = self._forward(input, hx)
        return h, c


class _OneStateCell(RecurrentCell):
    """A cell whose state is h alone."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; shapes as torch's forward.

        input: [B, I], or [I] unbatched; hx: h_0 [B, H] or [H], zeros by default. Returns h' in the
        form of hx.
        """
        fast = self._fast(input, hx)
        return self._forward(input, hx)[0] if fast is None else fast


class ISSGRUCell(_OneStateCell):
    """Drop-in for torch.nn.GRUCell: see `RecurrentCell`. Gates in the order r, z, n.

    For the gradient a call saves 4 H elements for each row (gates, and the recurrent part of n;
    4 bytes each, 8 in float64) beside its inputs and h'.

    >>> cell = ISSGRUCell(3, 4)
    >>> cell(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """

    torch_class = nn.GRUCell
    _step = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)


class ISSRNNCell(_OneStateCell):
    """Drop-in for torch.nn.RNNCell: see `RecurrentCell`; nonlinearity: "tanh" or "relu".

    For the gradient a call saves nothing beside its inputs and h'.

    >>> cell = ISSRNNCell(3, 4, nonlinearity="relu")
    >>> cell(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """

    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    @property
    def _step(self) -> str:  # type: ignore[override]
        step = _RNN_STEPS.get(self.nonlinearity)
        if step is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return step


CELL_MODULES.update({nn.LSTMCell: ISSLSTMCell, nn.GRUCell: ISSGRUCell, nn.RNNCell: ISSRNNCell})
