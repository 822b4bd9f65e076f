# SPDX-License-Identifier: Apache-2.0
"""prepare: a copy of a model for inference, whose recurrent weights are packed once.

ISSLSTM and its kin look at all their weights in each call, in case they have changed; a prepared
module need not, takes a whole stack in one call, and may keep its weights in 16 or 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import backend
from iss_kernels.accelerate import HOOK_TABLES, added, check_plain
from iss_kernels.copying import copied
from iss_kernels.recurrent import MODULES, Recurrent, class_of
from iss_kernels.states import States

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_Stored: TypeAlias = tuple[Tensor, Tensor | None]  # the weight, and for int8 its scales by row


def _store(function: str, name: str, value: Tensor, weights: str) -> _Stored:
    """One parameter in the format asked for; biases in float32. Raises ValueError."""
    value = value.detach()
    is_bias = name.rpartition(".")[2].startswith("bias")
    held = _DTYPES["float32" if is_bias or weights == "int8" else weights]
    if type(value) is not Tensor or value.is_meta or value.layout != torch.strided:
        got = type(value).__name__ if type(value) is not Tensor else f"a {value.layout} one"
        got = "one on the meta device" if value.is_meta else got
        raise ValueError(f"{function}: expected {name} to be a dense tensor with values, got {got}")
    if not value.is_floating_point():
        raise ValueError(
            f"{function}: expected {name} of a floating dtype, got {_dtype_name(value)}"
        )
    if not value.isfinite().all():
        raise ValueError(f"{function}: expected finite weights, got inf or nan in {name}")
    stored = value.to(held, copy=True, memory_format=torch.contiguous_format)
    if not stored.isfinite().all():
        raise ValueError(
            f"{function}: expected weights within {str(held).removeprefix('torch.')}'s range of "
            f"{torch.finfo(held).max:g}, got {value.abs().max().item():g} in {name}"
        )
    if is_bias:
        return stored, None
    scale = None
    if weights == "int8":
        scale = stored.abs().amax(1) / 127
        steps = (stored / scale.where(scale > 0, 1)[:, None]).round().clamp(-127, 127)
        stored = steps.to(torch.int8)
    # The smallest numbers have few bits left, and below those is 0.
    largest = value.double().abs().amax(1)
    lost = (_widened(stored, scale).double() - value.double()).abs().amax(1) > largest / 8
    if lost.any():
        row = int(lost.nonzero()[0])
        raise ValueError(
            f"{function}: expected rows of weights that {weights} holds to 3 bits, got one with "
            f"no larger element than {largest[row].item():g} in {name}[{row}]"
        )
    return stored, scale


def _widened(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The values that a stored weight stands for."""
    return stored if scale is None else stored.float() * scale[:, None]


def _dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


class Prepared(Recurrent):
    """A recurrent module for inference alone, from a snapshot of another's weights; see `prepare`.

    PreparedLSTM, PreparedGRU and so on are this over ISSLSTM, ISSGRU, ...: called like torch's
    module, in any forward form of ours. Weights are buffers in the format chosen, under torch's
    names (int8 adds "<name>_scale", float32, one per row); biases stay float32. Activations and
    sums are float32, and an input of another floating dtype is converted, as is what comes back;
    states may have any floating dtype; autocast changes nothing. The only parameter, `like`, has no
    elements: it tells code that asks for one the device and dtype. With int8, rows are quantised on
    the fly, each to the range of its largest element: h to 8 bits (7 on AVX2), x to two such terms,
    some 15 bits (13 on AVX2), since features may differ widely. An infinite element of x saturates
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
        self.weights = weights
        self.kept = getattr(module, "kept", None)  # torch's have none
        self.full_width = getattr(module, "full_width", False)
        self._native: Any = None
        # Weights as CUDA kernels take them: made of what versions, of which buffers (kept, so that
        # no other has their id), and the result.
        self._converted: dict[str, tuple[Any, list[Tensor], Tensor]] = {}
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}  # of each buffer
        device = module._parameters["weight_ih_l0"].device
        # Inference tensors could change without notice: they have no version.
        with torch.inference_mode(False), torch.no_grad():
            for name in sum(self._all_weights, []):
                value: Tensor = module._parameters[name]
                shape = self._parameters[name].shape  # type: ignore[union-attr]
                if value.shape != shape or value.device != device:
                    raise ValueError(
                        f"prepare: expected {name} of shape {list(shape)} on {device}, "
                        f"got {list(value.shape)} on {value.device}"
                    )
                stored, scale = _store("prepare", name, value, weights)
                delattr(self, name)
                self._add(name, stored)
                if scale is not None:
                    self._add(name + "_scale", scale)
            self._set_like(device)
        self.eval()

    def _add(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)
        self._expected[name] = value.shape, value.dtype

    def _set_like(self, device: torch.device) -> None:
        """Hold a parameter for code that asks next(model.parameters()) for a device and dtype."""
        empty = torch.empty(0, dtype=torch.float32, device=device)
        self.like = nn.Parameter(empty, requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "like", None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all weights, checked, or none."""
        before, errors = dict(self._buffers), len(error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        loaded = False
        try:
            with torch.inference_mode(False), torch.no_grad():
                # Into memory of its own: a Stream may still use what is here.
                for name in self._expected:
                    value, given = self._buffer(name), state_dict.get(prefix + name)
                    moves = assign and isinstance(given, Tensor) and given.device != value.device
                    self._buffers[name] = (
                        torch.empty_like(value, device=given.device) if moves else value.clone()
                    )
            super()._load_from_state_dict(
                state_dict,
                prefix,
                {**local_metadata, "assign_to_params_buffers": False},
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            with contextlib.suppress(ValueError):
                missing_keys.remove(prefix + "like")
            if len(error_msgs) == errors:
                error_msgs += self._wrong_in(state_dict, prefix)
            loaded = len(error_msgs) == errors
            if loaded:
                self._set_like(self._buffer("weight_ih_l0").device)
        finally:
            if not loaded:
                self._buffers.update(before)

    def _wrong_in(self, state_dict: Any, prefix: str) -> list[str]:
        """What cannot be loaded of a state_dict, in a sentence each."""
        wrong = []
        for name, (_, dtype) in self._expected.items():
            key = prefix + name
            value = state_dict.get(key)
            if dtype == torch.int8:
                scale = state_dict.get(key + "_scale")
                if value is None and scale is None:
                    continue
                if value is None or scale is None or value.dtype != dtype or value.is_meta:
                    wrong.append(
                        f"load_state_dict: expected {key} of dtype int8 and {key}_scale, as a "
                        "prepared model has them; load other weights into the model before prepare"
                    )
                elif scale.is_meta or not (scale.isfinite() & (scale >= 0)).all():
                    wrong.append(f"load_state_dict: expected {key}_scale to be finite")
            elif value is not None and not name.endswith("_scale"):
                try:
                    _store("load_state_dict", key, value, self.weights)
                except ValueError as error:
                    wrong.append(str(error))
        return wrong

    def _apply(self, fn: Any, recurse: bool = True) -> Prepared:
        """Move to a device; a change of dtype leaves the weights as they are."""

        def moved(t: Tensor) -> Any:
            like = fn(t.new_empty(0))
            return fn(t) if like.dtype == t.dtype else t.to(like.device)

        with torch.inference_mode(False):
            super()._apply(moved, recurse)
        self._native, self._converted = None, {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_converted": {}}

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

    def extra_repr(self) -> str:
        """torch's line, and the format."""
        return f"{super().extra_repr()}, weights={self.weights!r}"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """As Recurrent.forward."""
        if backend.exporting_onnx():
            return super().forward(input, hx, lengths, resets)
        native = self._native
        if (
            native is not None
            and hx is None
            and lengths is None
            and resets is None
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
            raise RuntimeError(
                f"{type(self).__name__}: expected an input that asks for no gradient (a prepared "
                "model only infers; use torch.no_grad()), got one with requires_grad=True"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            y, state = super().forward(_to(input, torch.float32), hx, lengths, resets)
            return _to(y, tensor.dtype), _to(state, tensor.dtype)
        return super().forward(input, hx, lengths, resets)

    def native(self) -> Any:
        """The compiled network of the weights; None where the ops or the reference run instead."""
        if torch.compiler.is_compiling() or backend.backend() == "reference":
            return None
        if not backend.native().nobody_watches():
            return None
        native = self._native
        if native is None or not native.is_current(self._buffers):
            native = self._packed()
            if native is not None:
                self._native = native
        return native

    def _packed(self) -> Any:
        buffers = {name: self._buffer(name) for name in self._expected}
        device = buffers["weight_ih_l0"].device
        if device.type != "cpu" or backend.on_cuda(device):
            return None
        # Inference tensors could change without notice: they have no version.
        if any(t.is_inference() for t in buffers.values()):
            return None
        value = {name: t.resolve_neg() for name, t in buffers.items()}
        if not all(map(backend.native().is_plain, value.values())):
            return None
        value = {name: t.contiguous() for name, t in value.items()}
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

    def _buffer(self, name: str) -> Tensor:
        """A buffer, checked: another may have been put in its place."""
        value = self._buffers.get(name)
        shape, dtype = self._expected[name]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = "none"
            if isinstance(value, Tensor):
                got = f"{list(value.shape)} and {_dtype_name(value)}"
            raise RuntimeError(
                f"{type(self).__name__}: expected a buffer {name} of shape {list(shape)} and dtype "
                f"{str(dtype).removeprefix('torch.')}, got {got}"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: expected weights that ask for no gradient (a prepared "
                f"model only infers; use torch.no_grad()), got {name} with requires_grad=True"
            )
        return value

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
                    f"got {_dtype_name(part)}"
                )
        native = self.native()
        if native is not None and type(x) in (Tensor, nn.Parameter):
            done = native.run(x, batch_sizes, resets, flat)
            if done is not None:
                return done  # type: ignore[no-any-return]
        return self._run_by_ops(x, batch_sizes, resets, states)

    @property
    def held(self) -> torch.dtype:
        """What CUDA kernels take the weights in."""
        return torch.float32 if self.weights == "int8" else _DTYPES[self.weights]

    def _run_by_ops(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        states: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The CUDA kernels, in the dtype of the weights, or the reference, in float32."""
        _check_devices(x, "parameter", list(map(self._buffer, self._expected)))
        by_kernels = backend.on_cuda(x.device) and backend.backend() == "extension"
        dtype = self.held if by_kernels else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            y, final = super()._run(x.to(dtype), batch_sizes, resets, _to(states, dtype))
        return y.float(), _to(final, torch.float32)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """In the dtype that is computed in; converted once for the CUDA kernels."""
        weight = self._buffer(name)
        if weight.dtype == dtype:
            return weight
        scale = self._buffer(name + "_scale") if weight.dtype == torch.int8 else None
        sources = [weight] if scale is None else [weight, scale]
        keep = backend.on_cuda(weight.device) and backend.backend() == "extension"
        if not keep or torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return _widened(weight, scale).to(dtype)
        stamp = (dtype, *((id(t), t._version) for t in sources))
        found = self._converted.get(name)
        if found is None or found[0] != stamp:
            found = stamp, sources, _widened(weight, scale).to(dtype)
            self._converted[name] = found
        return found[2]

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


def _name_over(cls: type[Recurrent]) -> str:
    return "Prepared" + cls.__name__.removeprefix("ISS")


def prepared_type(cls: type[Recurrent]) -> type[Prepared]:
    """`Prepared` over one of our modules, PreparedLSTM over ISSLSTM; an attribute of this file."""
    name = _name_over(cls)
    if name not in globals():
        doc = f"An {cls.__name__} for inference alone, as `prepare` makes it; see `Prepared`."
        made = type(name, (Prepared, cls), {"__module__": __name__, "__doc__": doc})
        globals().setdefault(name, made)  # another thread may have made it
    return cast(type[Prepared], globals()[name])


def __getattr__(name: str) -> Any:
    """The classes of `prepared_type`, which pickle finds by name."""
    for cls in MODULES.values():
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
    return value if value is None else type(value)(_to(part, dtype) for part in value)


def _check(module: Any, name: str) -> None:
    """Raise ValueError for what of a recurrent module cannot come along."""
    check_plain(module, "prepare", name)
    names: list[str] = sum(module._all_weights, [])
    extra = [
        *(f"parameter {key}" for key in module._parameters if key not in names),
        *(f"buffer {key}" for key in module._buffers),
        *(f"module {key}" for key in module._modules),
    ]
    if extra:
        raise ValueError(
            f"prepare: expected {name} as its class makes it, got one with a further {extra[0]}"
        )


def _carry(module: nn.Module, prepared: Prepared, memo: dict[int, Any]) -> None:
    """Copy the hooks of a module that an inference runs, and attributes that a user gave it."""
    tables = [name for name in HOOK_TABLES if "backward" not in name]
    for name in (*tables, *added(module)):
        setattr(prepared, name, copy.deepcopy(vars(module)[name], memo))


def prepare(model: nn.Module, weights: str = "float32") -> nn.Module:
    """A copy of `model` for inference: every recurrent module in it as a `Prepared` one.

    Those are nn.LSTM, nn.GRU and nn.RNN, and ISSLSTM, ISSGRU, ISSRNN and their kin. weights: how
    their weights are stored, "float32", "float16", "bfloat16" or "int8" (each row with its own
    scale). The copy is in eval mode; changing the model's weights later does not change it. Hooks
    come along, but for those of a backward pass, as do attributes of a module. Subclasses are
    copied as they are.

        fast = iss.prepare(model, weights="int8")

    Raises ValueError for another format, for a model without a recurrent module, for one that is
    pruned, reparametrised or has a forward of its own, and for weights that the format cannot hold:
    not finite, too large, or a row too small to keep 3 bits.
    """
    if not isinstance(weights, str) or weights not in _DTYPES:
        raise ValueError(
            f"prepare: expected weights to be one of {tuple(_DTYPES)}, got {weights!r}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: expected a torch.nn.Module, got {type(model).__name__}")
    known = (*MODULES, *MODULES.values(), Prepared)
    kin = [m for m in model.modules() if isinstance(m, known)]
    names = {m: name for name, m in model.named_modules()}
    found = [m for m in kin if type(m) in recurrent_types() or is_parametrized(m)]
    if not found:
        but = f" but {type(kin[0]).__name__}, a subclass of one" if kin else ""
        raise ValueError(
            "prepare: expected a model with a recurrent module of torch.nn or of this package, got "
            f"{type(model).__name__} without one{but}"
        )
    for module in found:
        if isinstance(module, Prepared):
            raise ValueError(
                "prepare: expected a model that is not prepared yet, got one with a "
                f"{type(module).__name__}"
            )
    memo: dict[int, Any] = {}
    new: dict[nn.Module, Prepared] = {}
    for module in found:
        _check(module, names[module] or "the module")
        kind = prepared_type(cast(type[Recurrent], class_of(module)))
        new[module] = memo[id(module)] = kind(module, weights)
    result = copied(model, memo)
    for module, prepared in new.items():
        _carry(module, prepared, memo)
    return result.eval()
