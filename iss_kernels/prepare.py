# SPDX-License-Identifier: Apache-2.0
"""prepare: a copy of a model for inference, whose LSTM weights are packed once.

ISSLSTM looks at all its weights in each call, in case they have changed; a prepared one need not,
takes a whole stack in one call, and may keep its weights in 16 or 8 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import backend
from iss_kernels.lstm import ISSLSTM, State

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_Stored: TypeAlias = tuple[Tensor, Tensor | None]  # the weight, and for int8 its scales by row


def _store(name: str, value: Tensor, weights: str) -> _Stored:
    """One parameter in the format asked for; biases in float32."""
    if not value.isfinite().all():
        raise ValueError(f"prepare: expected finite weights, got inf or nan in {name}")
    held = "float32" if name.startswith("bias") or weights == "int8" else weights
    stored = value.to(_DTYPES[held]).contiguous()
    if not stored.isfinite().all():
        range_ = torch.finfo(_DTYPES[held]).max
        raise ValueError(
            f"prepare: expected weights within {held}'s range of {range_:g}, "
            f"got {value.abs().max().item():g} in {name}"
        )
    if name.startswith("bias") or weights != "int8":
        return stored.clone() if stored is value else stored, None
    scale = stored.abs().amax(1) / 127
    steps = (stored / scale.where(scale > 0, 1)[:, None]).round()
    return steps.to(torch.int8), scale


class PreparedLSTM(ISSLSTM):
    """An ISSLSTM for inference alone, from a snapshot of another's weights; see `prepare`.

    Called like nn.LSTM, in any forward form of ISSLSTM. Weights are buffers in the format chosen,
    under nn.LSTM's names (int8 adds "<name>_scale", float32, one per row); biases stay float32.
    Activations and sums are float32, and an input of another floating dtype is converted, as is
    what comes back; autocast changes nothing. With int8, each row of x and h is quantised on the
    fly, to 8 bits (7 on AVX2). On a CUDA device activations have the 16 bits of the weights, with
    sums and c in float32, and int8 weights are widened to float32, once. There is no dropout.
    Raises RuntimeError where a gradient is asked for.
    """

    def __init__(self, lstm: ISSLSTM, weights: str) -> None:
        super().__init__(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            0.0,
            lstm.bidirectional,
            lstm.proj_size,
            device="meta",
        )
        self.weights = weights
        self._native: Any = None
        self._converted: dict[str, Tensor] = {}  # weights in the dtype that is computed in
        with torch.no_grad():
            for name in sum(self._all_weights, []):
                stored, scale = _store(name, getattr(lstm, name).detach(), weights)
                delattr(self, name)
                self.register_buffer(name, stored)
                if scale is not None:
                    self.register_buffer(name + "_scale", scale)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(self, hooks).update(getattr(lstm, hooks))
        self.register_load_state_dict_pre_hook(PreparedLSTM._replace)  # type: ignore[no-untyped-call]
        self.eval()

    def _replace(self, *_: Any) -> None:
        """Load into memory of its own: a Stream may still use what is here."""
        for name, value in self._buffers.items():
            self._buffers[name] = None if value is None else value.clone()
        self._native, self._converted = None, {}

    def _apply(self, fn: Any, recurse: bool = True) -> PreparedLSTM:
        """Move to a device; a change of dtype leaves the weights as they are."""

        def moved(t: Tensor) -> Any:
            like = fn(t.new_empty(0))
            return fn(t) if like.dtype == t.dtype else t.to(like.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._native, self._converted = None, {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_converted": {}}

    def extra_repr(self) -> str:
        """nn.LSTM's line, and the format."""
        return f"{super().extra_repr()}, weights={self.weights!r}"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[State, State] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[State, State]]:
        """As ISSLSTM.forward."""
        if hx is None and lengths is None and self._uniform:
            native = self.native()
            plain = None if native is None else native.run_plain(input, self.batch_first)
            if plain is not None:
                return plain  # type: ignore[no-any-return]
        tensor = input.data if isinstance(input, PackedSequence) else input
        if torch.is_grad_enabled() and _asks_for_gradient((tensor, hx)):
            raise RuntimeError(
                "PreparedLSTM: expected an input that asks for no gradient (a prepared model only "
                "infers; use torch.no_grad()), got one with requires_grad=True"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return self._in_float32(input, hx, lengths)  # type: ignore[no-any-return]
        return super().forward(input, hx, lengths)

    def _in_float32(self, input: Any, hx: Any, lengths: Any) -> Any:
        """Convert on the way in and out."""
        dtype = input.data.dtype if isinstance(input, PackedSequence) else input.dtype
        y, state = super().forward(_to(input, torch.float32), _to(hx, torch.float32), lengths)
        return _to(y, dtype), _to(state, dtype)

    def native(self) -> Any:
        """The compiled network; None where the ops or the reference run instead."""
        if backend.backend() == "reference":
            return None
        if self._native is None:
            device = self._buffers["weight_ih_l0"].device  # type: ignore[union-attr]
            if device.type != "cpu" or backend.on_cuda(device):
                return None
            directions = len(self.sizes[0])
            cells = []
            for index, names in enumerate(self._all_weights):
                value = {name.partition("_l")[0]: getattr(self, name) for name in names}
                scale = {
                    name.partition("_l")[0]: getattr(self, name + "_scale", None) for name in names
                }
                bias = value["bias_ih"] + value["bias_hh"] if self.bias else None
                cells.append(
                    (value["weight_ih"], value["weight_hh"], bias, value.get("weight_hr"),
                     scale["weight_ih"], scale["weight_hh"], scale.get("weight_hr"),
                     index % directions == 1)
                )  # fmt: skip
            layers = [cells[i : i + directions] for i in range(0, len(cells), directions)]
            self._native = backend.native().Network(layers)
        return self._native

    def _run(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        native = self.native()
        if native is None or x.device.type != "cpu":
            return self._run_by_ops(x, batch_sizes, states)
        # Copies: the kernels turn h_0 and c_0 into h_n and c_n.
        final = [(_copy(h), _copy(c)) for h, c in states]
        sizes = None if batch_sizes is None else batch_sizes.tolist()
        hs, cs = zip(*final, strict=True)
        return native.run(x, sizes, list(hs), list(cs)), final

    @property
    def held(self) -> torch.dtype:
        """What CUDA kernels take the weights in."""
        return torch.float32 if self.weights == "int8" else _DTYPES[self.weights]

    def _run_by_ops(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The CUDA kernels, in the dtype of the weights, or the reference, in float32."""
        by_kernels = backend.on_cuda(x.device) and backend.backend() == "extension"
        dtype = self.held if by_kernels else torch.float32
        states = [(h.to(dtype), c.to(dtype)) for h, c in states]
        with torch.autocast(x.device.type, enabled=False):
            y, final = super()._run(x.to(dtype), batch_sizes, states)
        return y.float(), [(h.float(), c.float()) for h, c in final]

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """In the dtype that is computed in, converted once."""
        found = self._converted.get(name)
        if found is None or found.dtype != dtype:
            weight: Tensor = getattr(self, name)
            scale: Tensor | None = getattr(self, name + "_scale", None)
            found = (weight if scale is None else weight.float() * scale[:, None]).to(dtype)
            self._converted[name] = found
        return found

    def _dtype(self) -> torch.dtype:
        return torch.float32


def _copy(t: Tensor) -> Tensor:
    return t.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _asks_for_gradient(value: Any) -> bool:
    """Whether any tensor in nested tuples or lists does."""
    if isinstance(value, (tuple, list)):
        return any(_asks_for_gradient(part) for part in value)
    return isinstance(value, Tensor) and value.requires_grad


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Tensors in nested tuples, converted."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(dtype)
    return value if value is None else tuple(_to(part, dtype) for part in value)


def prepare(model: nn.Module, weights: str = "float32") -> nn.Module:
    """A copy of `model` for inference: every nn.LSTM and ISSLSTM in it as a `PreparedLSTM`.

    weights: how LSTM weights are stored, "float32", "float16", "bfloat16" or "int8" (each row with
    its own scale). The copy is in eval mode; changing the model's weights later does not change
    it. Raises ValueError for another format, for a model without an LSTM, and for weights that the
    format cannot hold.
    """
    if not isinstance(weights, str) or weights not in _DTYPES:
        raise ValueError(
            f"prepare: expected weights to be one of {tuple(_DTYPES)}, got {weights!r}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: expected a torch.nn.Module, got {type(model).__name__}")
    found = {m for m in model.modules() if type(m) in (nn.LSTM, ISSLSTM, PreparedLSTM)}
    if not found:
        raise ValueError(
            f"prepare: expected a model with an nn.LSTM or ISSLSTM, got {type(model).__name__} "
            "without one"
        )
    if any(type(m) is PreparedLSTM for m in found):
        raise ValueError("prepare: expected a model that is not prepared yet, got a PreparedLSTM")
    memo: dict[int, Any] = {}
    for module in found:
        lstm = ISSLSTM.from_torch(module) if isinstance(module, nn.LSTM) else module
        memo[id(module)] = PreparedLSTM(lstm, weights)  # type: ignore[arg-type]
    return copy.deepcopy(model, memo).eval()
