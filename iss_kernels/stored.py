# SPDX-License-Identifier: Apache-2.0
"""Snapshot: what modules for inference have in common, weights in a format that stay as they are.

`prepare` makes them: PreparedLSTM, PreparedLSTMCell and their kin (prepare.py), PreparedLinear
(linear.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from iss_kernels import backend

FORMATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
NO_GRADIENT = (
    "{}: expected an input that asks for no gradient (a prepared model only infers; use "
    "torch.no_grad()), got one with requires_grad=True"
)
_WIDEST = 2**17  # 127 * 127 * 2^17 is less than 2^31
_Stored: TypeAlias = tuple[Tensor, Tensor | None]  # the weight, and for int8 its scales by row


def _store(function: str, name: str, value: Tensor, weights: str) -> _Stored:
    """One parameter in the format asked for; biases in float32. Raises ValueError."""
    value = value.detach()
    is_bias = name.rpartition(".")[2].startswith("bias")
    held = FORMATS["float32" if is_bias or weights == "int8" else weights]
    if type(value) is not Tensor or value.is_meta or value.layout != torch.strided:
        got = type(value).__name__ if type(value) is not Tensor else f"a {value.layout} one"
        got = "one on the meta device" if value.is_meta else got
        raise ValueError(f"{function}: expected {name} to be a dense tensor with values, got {got}")
    if not value.is_floating_point():
        raise ValueError(
            f"{function}: expected {name} of a floating dtype, got {dtype_name(value)}"
        )
    # The bias of a Linear may be infinite, where an answer is never to be given.
    if name.rpartition(".")[2] != "bias" and not value.isfinite().all():
        raise ValueError(f"{function}: expected finite weights, got inf or nan in {name}")
    stored = value.to(held, copy=True, memory_format=torch.contiguous_format)
    if not (stored.isfinite() == value.isfinite()).all():
        raise ValueError(
            f"{function}: expected weights within {str(held).removeprefix('torch.')}'s range of "
            f"{torch.finfo(held).max:g}, got {value.abs().max().item():g} in {name}"
        )
    if is_bias:
        return stored, None
    if value.shape[1] == 0:
        raise ValueError(f"{function}: expected a {name} with columns, got {list(value.shape)}")
    if weights == "int8" and value.shape[1] > _WIDEST:
        raise ValueError(
            f"{function}: expected rows of at most {_WIDEST} weights for int8, whose sums have 32 "
            f"bits, got {value.shape[1]} in {name}"
        )
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


def dtype_name(t: Tensor) -> str:
    """torch's name of it, without "torch."."""
    return str(t.dtype).removeprefix("torch.")


class Snapshot(nn.Module):
    """A module for inference alone, whose weights were copied from another's.

    Weights are buffers in the format chosen, under the names they had; biases are float32. int8
    adds "<name>_scale", float32, one per row, and the attribute of a weight is a tensor of the
    values that it stands for (named_buffers and the state_dict have what is held). The only
    parameter, `like`, has no elements: it tells code that asks for one the device, and the dtype
    that the module had before or was moved to since.
    load_state_dict checks as `prepare` does, and takes all or nothing.
    """

    weights: str  # the format
    like: nn.Parameter
    _native: Any  # what the kernels run, packed from the buffers; None until it is first needed
    # Weights as CUDA kernels take them: made of what versions, of which buffers (kept, so that no
    # other has their id), and the result.
    _converted: dict[str, tuple[Any, list[Tensor], Tensor]]
    _expected: dict[str, tuple[torch.Size, torch.dtype]]  # of each buffer

    def _take(self, module: nn.Module, names: Sequence[str], weights: str) -> None:
        """Hold the parameters of a module that have these names."""
        self.weights = weights
        self._native, self._converted, self._expected = None, {}, {}
        # Inference tensors could change without notice: they have no version.
        with torch.inference_mode(False), torch.no_grad():
            for name in names:
                stored, scale = _store("prepare", name, module.get_parameter(name), weights)
                self._add(name, stored)
                if scale is not None:
                    self._add(name + "_scale", scale)
            self._set_like(self._device(), module.get_parameter(names[0]).dtype)
        self.eval()

    def _adopt(self, module: Any, names: Sequence[str], weights: str) -> None:
        """As `_take`, in the place of parameters of its own, which say what shapes there are."""
        device = module._parameters[names[0]].device
        for name in names:
            value: Tensor = module._parameters[name]
            shape = self._parameters[name].shape  # type: ignore[union-attr]
            if value.shape != shape or value.device != device:
                raise ValueError(
                    f"prepare: expected {name} of shape {list(shape)} on {device}, "
                    f"got {list(value.shape)} on {value.device}"
                )
            delattr(self, name)
        self._take(module, names, weights)

    def _device(self) -> torch.device:
        """Of the weights."""
        return self._buffer(next(iter(self._expected))).device

    def __getattr__(self, name: str) -> Any:
        """As nn.Module's; of an int8 weight, the values that it stands for."""
        value = super().__getattr__(name)
        if isinstance(value, Tensor) and value.dtype == torch.int8 and name in self._expected:
            return self._weight(name, self.like.dtype)
        return value

    def _add(self, name: str, value: Tensor) -> None:
        self._buffers[name] = value  # register_buffer refuses the name of a property
        self._expected[name] = value.shape, value.dtype

    def _set_like(self, device: torch.device, dtype: torch.dtype) -> None:
        """Hold a parameter for code that asks next(model.parameters()) for a device and dtype."""
        empty = torch.empty(0, dtype=dtype, device=device)
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
                self._set_like(self._device(), self.like.dtype)
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

    def _apply(self, fn: Any, recurse: bool = True) -> Snapshot:
        """Move to a device; a change of dtype leaves the weights as they are."""

        def moved(t: Tensor) -> Any:
            like = fn(t.new_empty(0))
            return fn(t) if like.dtype == t.dtype else t.to(like.device)

        with torch.inference_mode(False):
            dtype = fn(self.like).dtype
            super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
            self._set_like(self.like.device, dtype)
        self._native, self._converted = None, {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_native": None, "_converted": {}}

    def native(self) -> Any:
        """What is compiled of the weights; None where the ops or the reference run instead."""
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
        device = self._device()
        if device.type != "cpu" or backend.on_cuda(device):
            return None
        # Inference tensors could change without notice: they have no version.
        if any(t.is_inference() for t in buffers.values()):
            return None
        value = {name: t.resolve_neg() for name, t in buffers.items()}
        if not all(map(backend.native().is_plain, value.values())):
            return None
        return self._compiled({name: t.contiguous() for name, t in value.items()}, buffers)

    def _compiled(self, value: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
        """What runs weights of these values, which were read from these buffers."""
        raise NotImplementedError

    def _buffer(self, name: str) -> Tensor:
        """A buffer, checked: another may have been put in its place."""
        value = self._buffers.get(name)
        shape, dtype = self._expected[name]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = "none"
            if isinstance(value, Tensor):
                got = f"{list(value.shape)} and {dtype_name(value)}"
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

    @property
    def held(self) -> torch.dtype:
        """What CUDA kernels take the weights in."""
        return torch.float32 if self.weights == "int8" else FORMATS[self.weights]

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        """What ops compute in: that of the weights in CUDA kernels, else float32."""
        kernels = backend.on_cuda(device) and backend.backend() == "extension"
        return self.held if kernels else torch.float32

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

    def widen(self) -> None:
        """Hold the values that the weights stand for in float32."""
        names = [name for name in self._expected if not name.endswith("_scale")]
        values = {name: self._weight(name, torch.float32).clone() for name in names}
        for name in self._expected:
            del self._buffers[name]
        self._buffers.update(values)
        self._expected = {name: (t.shape, t.dtype) for name, t in values.items()}
        self._native, self.weights = None, "float32"

    def extra_repr(self) -> str:
        """The line of the module, and the format."""
        line = super().extra_repr()
        return f"{line}{line and ', '}weights={self.weights!r}"
