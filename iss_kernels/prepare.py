# SPDX-License-Identifier: Apache-2.0
"""prepare: a copy of a model for inference, whose recurrent weights are packed once.

ISSLSTM and its kin look at all their weights in each call, in case they have changed; a prepared
module need not, takes a whole stack in one call, and may keep its weights in 16 or 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import backend
from iss_kernels.accelerate import HOOK_TABLES, added, check_plain
from iss_kernels.arguments import Model, check_module
from iss_kernels.copying import copied
from iss_kernels.linear import PreparedLinear, is_plain_linear
from iss_kernels.recurrent import CELL_MODULES, MODULES, Recurrent, class_of
from iss_kernels.recurrent_cell import PARAMETERS, RecurrentCell, options_of_cell
from iss_kernels.states import States
from iss_kernels.stored import FORMATS, NO_GRADIENT, Snapshot, dtype_name
from iss_kernels.type_checks import warn_of_type_checks


class Prepared(Snapshot, Recurrent):
    """A recurrent module for inference alone, from a snapshot of another's weights; see `prepare`.

    PreparedLSTM, PreparedGRU and so on are this over ISSLSTM, ISSGRU, ...: called like torch's
    module, in any forward form of ours. Weights are held as `Snapshot` says. Activations and sums
    are float32, and an input of another floating dtype is converted, as is what comes back; states
    may have any floating dtype; autocast changes nothing. With int8, rows are quantised on the fly,
    each to the range of its largest element: h to 8 bits (7 on AVX2), x to two such terms where its
    elements differ widely in size, some 15 bits (13 on AVX2). An infinite element of x saturates
    the gates. On a CUDA device activations have the 16 bits of the weights, with sums and an LSTM's
    c in float32, and int8 weights are widened to float32, once. There is no dropout.

    Buffers that are replaced or changed in place are packed again by the next call (a change
    through .data or a NumPy view goes unnoticed). load_state_dict takes the state_dict of a
    prepared module of the same class and format, or one in floating dtypes where the format is not
    int8, and checks it as `prepare` does: after an error the weights are what they were.
    torch.jit.trace, make_fx, torch.export and torch.func see the ops of the module, with the
    weights widened to float32 and activations that are not quantised; torch.compile does, or breaks
    its graph.

    Raises RuntimeError where a gradient is asked for.
    """

    def __init__(self, module: Any, weights: str) -> None:
        super().__init__(**self.options_of(module), device="meta")
        self.kept = getattr(module, "kept", None)  # torch's have none
        self.full_width = getattr(module, "full_width", False)
        self._adopt(module, sum(self._all_weights, []), weights)

    def reset_parameters(self) -> None:
        """Raise RuntimeError: there is nothing to train."""
        if hasattr(self, "_expected"):  # not in Recurrent's constructor
            raise RuntimeError(
                f"{type(self).__name__}: expected no reset_parameters, it has none to draw"
            )
        super().reset_parameters()

    def to_torch(self) -> NoReturn:
        """Raise TypeError: what was prepared is not turned back."""
        raise TypeError(
            f"to_torch: expected a module with parameters, got a {type(self).__name__}, which only "
            "infers"
        )

    @classmethod
    def from_torch(cls, module: nn.RNNBase) -> NoReturn:
        """Raise TypeError: `prepare` makes one."""
        raise TypeError(f"{cls.__name__}: expected to be made by prepare, got a call of from_torch")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """As Recurrent.forward."""
        if backend.exporting_onnx():
            given = input.data if isinstance(input, PackedSequence) else input
            x, states = _to((input, hx), torch.float32)
            y, state = super().forward(x, states, lengths, resets, mask)
            return _to(y, given.dtype), _to(state, given.dtype)
        native = self._native
        if (
            native is not None
            and hx is None
            and lengths is None
            and resets is None
            and mask is None
            and not self.full_width
            and backend.backend() == "extension"
        ):
            plain = native.run_plain(input, self.batch_first, self._buffers)
            if plain is not None:
                return plain  # type: ignore[no-any-return]
        if isinstance(input, PackedSequence):
            self._check_packed(input)
        tensor = input.data if isinstance(input, PackedSequence) else input
        if torch.is_grad_enabled() and _asks_for_gradient((tensor, hx)):
            raise RuntimeError(NO_GRADIENT.format(type(self).__name__))
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            y, state = super().forward(_to(input, torch.float32), hx, lengths, resets, mask)
            return _to(y, tensor.dtype), _to(state, tensor.dtype)
        return super().forward(input, hx, lengths, resets, mask)

    def _compiled(self, value: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
        directions = len(self.sizes[0])
        cells = []
        for index, names in enumerate(self._all_weights):
            of = {name.partition("_l")[0]: name for name in names}
            w = [of.get(kind, "") for kind in ("weight_ih", "weight_hh", "weight_hr")]
            cells.append(
                (*map(value.get, w), *(value.get(f"{name}_scale") for name in w),
                 value.get(of.get("bias_ih", "")), value.get(of.get("bias_hh", "")),
                 index % directions == 1)
            )  # fmt: skip
        layers = [cells[i : i + directions] for i in range(0, len(cells), directions)]
        return backend.native().Network(self.cell.name, layers, self._uniform, buffers)

    def _run(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        states: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        flat = [part for state in states for part in state]
        _check_devices(x, "parameter", [self._buffer("weight_ih_l0")])
        _check_devices(x, "hidden", flat)
        for part in flat:
            if not part.is_floating_point():
                raise RuntimeError(
                    f"{type(self).__name__}: expected hx of a floating dtype, "
                    f"got {dtype_name(part)}"
                )
        native = self.native()
        if native is not None and type(x) in (Tensor, nn.Parameter):
            done = native.run(x, batch_sizes, resets, flat)
            if done is not None:
                return done  # type: ignore[no-any-return]
        return self._run_by_ops(x, batch_sizes, resets, states)

    def _run_by_ops(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        states: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The CUDA kernels, in the dtype of the weights, or the reference, in float32."""
        _check_devices(x, "parameter", list(map(self._buffer, self._expected)))
        dtype = self._dtype_on(x.device)
        with backend.no_autocast(x.device):
            y, final = super()._run(x.to(dtype), batch_sizes, resets, _to(states, dtype))
        return y.float(), _to(final, torch.float32)

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def _dropped(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        return x, None

    def _check_packed(self, packed: PackedSequence) -> None:
        """Raise RuntimeError for what cannot be indexed with; the rest is checked later."""
        sizes = packed.batch_sizes
        if sizes.dim() != 1 or sizes.numel() == 0:
            raise RuntimeError(
                f"{type(self).__name__}: expected batch_sizes of shape [T] with T from 1, "
                f"got {list(sizes.shape)}"
            )
        for name in ("sorted_indices", "unsorted_indices"):
            indices = getattr(packed, name)
            if indices is not None and indices.shape != (int(sizes[0]),):
                raise RuntimeError(
                    f"{type(self).__name__}: expected {name} of shape [B] = [{int(sizes[0])}], "
                    f"got {list(indices.shape)}"
                )


class PreparedCell(Snapshot, RecurrentCell):
    """A recurrent cell for inference alone, from a snapshot of another's weights; see `prepare`.

    PreparedLSTMCell, PreparedGRUCell and PreparedRNNCell are this over ISSLSTMCell, ISSGRUCell and
    ISSRNNCell, called like torch's cell. Weights, activations, conversions and what follows a call
    are as in `Prepared`. Raises RuntimeError where a gradient is asked for.
    """

    def __init__(self, module: Any, weights: str) -> None:
        super().__init__(**options_of_cell(module), device="meta")  # type: ignore[call-arg]
        self.kept = getattr(module, "kept", None)  # torch's have none
        self.full_width = getattr(module, "full_width", False)
        self._adopt(
            module, [name for name, p in self._parameters.items() if p is not None], weights
        )

    def _fast(self, input: Tensor, hx: Any) -> Any:
        native = self._native
        if native is None or self.full_width or torch.compiler.is_compiling():
            return None
        return native.step(input, hx, self._buffers) if backend.backend() == "extension" else None

    def _forward(self, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and _asks_for_gradient((input, hx)):
            raise RuntimeError(NO_GRADIENT.format(type(self).__name__))
        dtype = input.dtype
        if not input.is_floating_point():
            return super()._forward(input, hx)
        for state in () if hx is None else (hx,) if isinstance(hx, Tensor) else hx:
            if isinstance(state, Tensor) and not state.is_floating_point():
                raise RuntimeError(
                    f"{type(self).__name__}: expected hx of a floating dtype, "
                    f"got {dtype_name(state)}"
                )
        exporting = backend.exporting_onnx()
        with contextlib.nullcontext() if exporting else backend.no_autocast(input.device):
            after = super()._forward(*_to((input, hx), torch.float32))
        return tuple(state.to(dtype) for state in after)

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def _run(self, x: Tensor, states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        _check_devices(x, "parameter", [self._buffer("weight_ih")])
        _check_devices(x, "hidden", states)
        native = None if backend.exporting_onnx() else self.native()
        if native is not None and all(type(t) in (Tensor, nn.Parameter) for t in (x, *states)):
            done = native.run(x[None], None, None, list(states))
            if done is not None:
                return done[1][0]  # type: ignore[no-any-return]
        dtype = self._dtype_on(x.device)
        after = super()._run(x.to(dtype), _to(states, dtype), dtype)
        return _to(after, torch.float32)  # type: ignore[no-any-return]

    def _weights(self, dtype: torch.dtype) -> list[Any]:
        return [
            self._weight(name, dtype) if name in self._expected else None for name in PARAMETERS
        ]

    def _compiled(self, value: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
        names = ("weight_ih_scale", "weight_hh_scale", "none", "bias_ih", "bias_hh")
        cell = (value["weight_ih"], value["weight_hh"], None, *map(value.get, names), False)
        return backend.native().Network(self.cell.name, [[cell]], True, buffers)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _name_over(cls: type[nn.Module]) -> str:
    return "Prepared" + cls.__name__.removeprefix("ISS")


def prepared_type(cls: type[nn.Module]) -> type[Any]:
    """What `prepare` makes of one of our classes, PreparedLSTM of ISSLSTM; an attribute here."""
    name = _name_over(cls)
    if name not in globals():
        base = PreparedCell if issubclass(cls, RecurrentCell) else Prepared
        doc = (
            f"An {cls.__name__} for inference alone, as `prepare` makes it; see `{base.__name__}`."
        )
        made = type(name, (base, cls), {"__module__": __name__, "__doc__": doc})
        globals().setdefault(name, made)  # another thread may have made it
    return cast(type[Any], globals()[name])


def __getattr__(name: str) -> Any:
    """The classes of `prepared_type`, which pickle finds by name."""
    for cls in (*MODULES.values(), *CELL_MODULES.values()):
        if name == _name_over(cls):
            return prepared_type(cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def recurrent_types() -> tuple[type[nn.Module], ...]:
    """All recurrent modules: torch's, ours, and prepared ones."""
    return (*MODULES, *MODULES.values(), *map(prepared_type, MODULES.values()))


def _check_devices(x: Tensor, kind: str, tensors: Sequence[Tensor]) -> None:
    """Raise what the modules of torch raise."""
    for t in tensors:
        if t.device != x.device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at "
                f"{x.device} and {kind} tensor at {t.device}"
            )


def _asks_for_gradient(value: Any) -> bool:
    """Whether any tensor in nested tuples or lists does."""
    if isinstance(value, (tuple, list)):
        return any(_asks_for_gradient(part) for part in value)
    return isinstance(value, Tensor) and value.requires_grad


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Tensors in nested tuples and lists, converted."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(dtype)
    if isinstance(value, (tuple, list)):
        parts = [_to(part, dtype) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def _check(module: Any, name: str) -> None:
    """Raise ValueError for what of a recurrent module cannot come along."""
    check_plain(module, "prepare", name)
    cell = isinstance(module, nn.RNNCellBase)
    names: Sequence[str] = PARAMETERS if cell else sum(module._all_weights, [])
    extra = [
        *(f"parameter {key}" for key in module._parameters if key not in names),
        *(f"buffer {key}" for key in module._buffers),
        *(f"module {key}" for key in module._modules),
        *(f"attribute {key}" for key in added(module) if _is_taken(key)),
    ]
    if extra:
        raise ValueError(
            f"prepare: expected {name} as its class makes it, got one with a further {extra[0]}"
        )


def _is_taken(name: str) -> bool:
    """Whether a prepared module has another use for an attribute."""
    return hasattr(Snapshot, name) or name in Snapshot.__annotations__


def _carry(module: nn.Module, prepared: Snapshot, memo: dict[int, Any]) -> None:
    """Copy the hooks of a module that an inference runs, and attributes that a user gave it."""
    tables = [name for name in HOOK_TABLES if "backward" not in name]
    for name in (*tables, *added(module)):
        setattr(prepared, name, copy.deepcopy(vars(module)[name], memo))


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The Linear layers that a `PreparedLinear` may stand for.

    Not those of torch's own modules, such as a TransformerEncoderLayer, which hand the weights to
    functions instead of calling the layers.
    """
    inside = {
        child
        for parent in model.modules()
        if type(parent).__module__.startswith("torch.nn.") and type(parent) not in _CONTAINERS
        for child in parent.children()
    }
    return [cast(nn.Linear, m) for m in model.modules() if is_plain_linear(m) and m not in inside]


def _own_format(module: nn.Module) -> str:
    """The format that holds a module's weights as they are; "float32" for float64."""
    weight = next(iter(module._parameters.values()))
    name = dtype_name(weight) if isinstance(weight, Tensor) else "float32"
    return name if name in FORMATS else "float32"


def prepare(model: Model, weights: str | None = None) -> Model:
    """A copy of `model` for inference: each recurrent and Linear layer in it with packed weights.

    Recurrent are nn.LSTM, nn.GRU and nn.RNN, ISSLSTM, ISSGRU, ISSRNN and their kin, which become a
    `Prepared`, and the cells of these, which become a `PreparedCell`; an nn.Linear becomes a
    `PreparedLinear`. weights: how their weights are stored, "float32", "float16", "bfloat16" or
    "int8" (each row with its own scale); by default each module's in its own dtype, and float64 as
    float32. The copy is in eval mode, and its parameters, those of embeddings for example, ask for
    no gradient; changing the model's weights later does not change it. Hooks come along, but for
    those of a backward pass, as do attributes of a module. Copied as they are: subclasses, a Linear
    whose weight is computed or that has a forward of its own, and what torch's own modules hold.

    Returns the copy, of the model's class; a recurrent module by itself gives a `Prepared` or a
    `PreparedCell`, which is called as the module is.

        fast = iss.prepare(model, weights="int8")

    Raises ValueError for another format, for a model without a recurrent module, for a recurrent
    one that is pruned, reparametrised or has a forward of its own, and for weights that the format
    cannot hold: not finite, too large, or a row too small to keep 3 bits.
    """
    if weights is not None and (not isinstance(weights, str) or weights not in FORMATS):
        raise ValueError(
            f"prepare: expected weights to be one of {tuple(FORMATS)}, got {weights!r}"
        )
    check_module("prepare", model)
    cells = (*CELL_MODULES, *CELL_MODULES.values())
    known = (*MODULES, *MODULES.values(), *cells, Snapshot)
    kin = [m for m in model.modules() if isinstance(m, known)]
    for module in kin:
        if isinstance(module, Snapshot):
            raise ValueError(
                "prepare: expected a model that is not prepared yet, got one with a "
                f"{type(module).__name__}"
            )
    names = {m: name for name, m in model.named_modules()}
    found = [m for m in kin if type(m) in (*recurrent_types(), *cells) or is_parametrized(m)]
    if not found:
        but = f" but {type(kin[0]).__name__}, a subclass of one" if kin else ""
        raise ValueError(
            "prepare: expected a model with a recurrent module of torch.nn or of this package, got "
            f"{type(model).__name__} without one{but}"
        )
    memo: dict[int, Any] = {}
    new: dict[nn.Module, Snapshot] = {}
    for module in found:
        _check(module, names[module] or "the module")
        ours: Any = CELL_MODULES.get(type(module), class_of(module) or type(module))
        kind = prepared_type(ours)
        new[module] = memo[id(module)] = kind(module, weights or _own_format(module))
    for linear in plain_linears(model):
        form = weights or _own_format(linear)
        new[linear] = memo[id(linear)] = PreparedLinear(linear, form)
    warn_of_type_checks("prepare", model, new)

    def carry() -> Iterable[nn.Module]:
        for module, prepared in new.items():
            _carry(module, prepared, memo)
        return new.values()

    result = copied(model, memo, carry)
    for parameter in result.parameters():
        if not nn.parameter.is_lazy(parameter):
            parameter.requires_grad_(False)
    return result.eval()
