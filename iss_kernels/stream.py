# SPDX-License-Identifier: Apache-2.0
"""Stream: a model that takes one time step per call and keeps its state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iss_kernels import backend, ops
from iss_kernels.lstm import ISSLSTM
from iss_kernels.prepare import PreparedLSTM, prepare

_LSTMS = (nn.LSTM, ISSLSTM)
_ACTIVATIONS = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}  # fmt: skip
# Functions, and methods of a tensor by name, that stand for a module.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.silu: nn.SiLU,
    torch.tanh: nn.Tanh, "tanh": nn.Tanh, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
}  # fmt: skip
_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv matmul pow neg getitem eq lt gt le ge bool"
)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Refused(Exception):
    """Why a model is not a plain chain."""


class _Value:
    """Stands for the tensor that flows along a chain while a model's forward is listened to."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._used = False

    def through(self, layer: nn.Module, name: str) -> _Value:
        """What a layer makes of it."""
        if self._used:
            raise _Refused(f"{name} off the chain")
        self._used = True
        if not isinstance(layer, (nn.Dropout, nn.Identity)):
            self._layers.append(layer)
        return _Value(self._layers)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _FUNCTIONS.get(func)
        if made is None or len(args) != 1 or not (kwargs or {}).keys() <= {"inplace"}:
            raise _Refused(f"the operation {func.__name__}")
        return args[0].through(made(), func.__name__)

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise _Refused(f"the operation {name}")
        return lambda: self.through(_FUNCTIONS[name](), name)


class _State:
    """Stands for an LSTM's state, which may be taken apart and returned."""

    def __iter__(self) -> Iterator[_State]:
        return iter((_State(), _State()))

    def __getitem__(self, index: Any) -> _State:
        return _State()


def _refusing(name: str) -> Any:
    def operator(self: object, *_: object) -> Any:
        raise _Refused(f"the operation {name}")

    return operator


for _name in _OPERATORS.split():
    setattr(_Value, f"__{_name}__", _refusing(_name))
_Value.__hash__ = object.__hash__  # type: ignore[method-assign]


def _listening(layer: nn.Module, name: str) -> nn.Module:
    """A copy of a layer that notes in its input's chain that it was called."""

    def forward(x: Any, *rest: Any, **named: Any) -> Any:
        if not isinstance(x, _Value) or any(a is not None for a in (*rest, *named.values())):
            raise _Refused(f"{name} off the chain")
        y = x.through(layer, name)
        return (y, _State()) if isinstance(layer, _LSTMS) else y

    double = copy.copy(layer)
    double.forward = forward
    return double


def _chain(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that is a plain chain, in order.

    Found by calling the forward method of a copy with a stand-in for the tensor. (torch.fx would
    do, but while it traces it replaces methods of nn.Module for all threads.)
    """
    if isinstance(model, _LSTMS):
        return [model]
    known = (*_LSTMS, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)
    leaves = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, known) or type(module) in _ACTIVATIONS
    }
    if not any(isinstance(module, _LSTMS) for module in leaves.values()):
        raise ValueError("Stream: expected a model with an LSTM, got one without")
    memo: dict[int, Any] = {id(leaf): _listening(leaf, name) for name, leaf in leaves.items()}
    layers: list[nn.Module] = []
    try:
        double = copy.deepcopy(model, memo)
        parameters = list(inspect.signature(double.forward).parameters.values())
        needed = [p for p in parameters[1:] if p.default is p.empty and p.kind in _POSITIONAL]
        result = double.forward(_Value(layers), *(None for _ in needed))  # no state is passed in
        y, *rest = result if isinstance(result, (tuple, list)) else (result,)
        if not isinstance(y, _Value) or y._used or not _only_states(rest):
            raise _Refused("an output that is not the end of the chain")
    except Exception as error:  # whatever a forward method does with a stand-in
        why = error if isinstance(error, _Refused) else f"a forward method that fails: {error}"
        raise ValueError(
            "Stream: expected a plain chain of LSTM, Linear, LayerNorm and activations, got "
            f"{type(model).__name__} with {why}"
        ) from error
    return layers


def _only_states(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_only_states(part) for part in value)
    return isinstance(value, _State)


def _sizes(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """Raise ValueError for what cannot go step by step; return the sizes of input and output."""
    begin = width = 0
    for layer in layers:
        if isinstance(layer, PreparedLSTM):
            if layer.bidirectional:
                raise ValueError(
                    "Stream: expected LSTMs in one direction, got a bidirectional one: its "
                    "backward half begins at the last step, which a stream has not seen yet"
                )
            needs, gives = layer.input_size, layer.sizes[-1][0][1]
        elif isinstance(layer, nn.Linear):
            needs, gives = layer.in_features, layer.out_features
        elif isinstance(layer, nn.LayerNorm):
            if len(layer.normalized_shape) != 1:
                raise ValueError(
                    "Stream: expected LayerNorm over the last dimension, got normalized_shape="
                    f"{tuple(layer.normalized_shape)}"
                )
            needs = gives = layer.normalized_shape[0]
        else:
            if width == 0:
                raise ValueError(
                    "Stream: expected the chain to begin with a layer that has a size, got "
                    f"{type(layer).__name__}"
                )
            if isinstance(layer, nn.GELU) and layer.approximate != "none":
                raise ValueError(
                    "Stream: expected GELU in its exact form, got "
                    f"approximate={layer.approximate!r}"
                )
            continue
        if width not in (0, needs):
            raise ValueError(
                f"Stream: expected layers whose sizes fit, got {type(layer).__name__} for {needs} "
                f"features after {width}"
            )
        begin, width = begin or needs, gives
    return begin, width


def _device(layers: Sequence[nn.Module]) -> torch.device:
    """Where the weights of all layers are."""
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    devices = list(dict.fromkeys(t.device for t in tensors))
    if len(devices) > 1:
        got = ", ".join(map(str, devices))
        raise ValueError(f"Stream: expected a model on one device, got {got}")
    return devices[0]


class Stream:
    """Runs a model one time step per call, with the state inside.

    model: an nn.LSTM, ISSLSTM or prepared LSTM, or a module that is a plain chain of those with
    Linear, LayerNorm and activations (Dropout is left out); one direction only. Weights are a
    snapshot in the format of the model (float32 unless `prepare` chose another). Nothing is
    allocated per call.

    On a CUDA device x, y and out are tensors there; a step is one launch per LSTM layer, torch's
    operations for the rest, and one to take over the states. int8 weights are widened to float32.
    It can be captured in a CUDA graph, whose replays go on from the state.

        step = iss.Stream(model, batch_size=1)
        y = step(x)                    # x [B, I] -> y [B, O], tensors or NumPy arrays, float32

    y is the stream's own memory, overwritten by the next call; pass out=, of shape [B, O], to have
    it written elsewhere. Equivalent to model(x[None], state) with the state fed back. Not
    differentiable. Two threads may use two streams of one model, each its own.
    """

    # A slot, so that a call goes to the engine's own function at once: a method here would take
    # 0.1 us to get there, where a small step takes 1.5.
    __slots__ = {
        "__call__": """One step: x [B, I] -> y [B, O], of the kind that x is.

        Raises ValueError for another shape or dtype, TypeError for what is no tensor or array.
        """,
        "__weakref__": None,
        "_engine": None,
        "_lstms": None,
        "batch_size": "B",
    }
    __call__: Callable[..., Any]

    def __init__(self, model: nn.Module, batch_size: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Stream: expected a torch.nn.Module, got {type(model).__name__}")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"Stream: expected batch_size to be an int from 1, got {batch_size!r}")
        layers = [
            layer
            if isinstance(layer, PreparedLSTM) or not isinstance(layer, _LSTMS)
            else prepare(layer)
            for layer in _chain(model)
        ]
        sizes = _sizes(layers)
        self.batch_size = batch_size
        self._lstms = [layer for layer in layers if isinstance(layer, PreparedLSTM)]
        device = _device(layers)
        engine: Any = _compiled
        if backend.backend() == "reference":
            engine = _Reference
        elif backend.on_cuda(device):
            engine = _OnCuda
        self._engine: Any = engine(layers, batch_size, sizes)
        self.__call__ = self._engine.step

    def reset(self) -> None:
        """Begin again from the zero state."""
        self._engine.reset()

    @property
    def state(self) -> Any:
        """A copy of the state: (h, c) in the form of nn.LSTM's hx; one per LSTM if several."""
        flat = [(h.clone(), c.clone()) for h, c in self._engine.states()]
        pairs = []
        for lstm in self._lstms:
            pairs.append(lstm._final(flat[: lstm.num_layers], None, batched=True))
            flat = flat[lstm.num_layers :]
        return pairs[0] if len(pairs) == 1 else tuple(pairs)

    @state.setter
    def state(self, value: Any) -> None:
        pairs = [value] if len(self._lstms) == 1 else value
        if not isinstance(pairs, (tuple, list)) or len(pairs) != len(self._lstms):
            got = len(pairs) if isinstance(pairs, (tuple, list)) else type(pairs).__name__
            raise ValueError(
                f"Stream: expected state with one (h, c) for each of {len(self._lstms)} LSTMs, "
                f"got {got}"
            )
        x = torch.empty(0)
        flat = [
            state
            for lstm, pair in zip(self._lstms, pairs, strict=True)
            for state in lstm._initial(pair, self.batch_size, x, None, batched=True)
        ]
        with torch.no_grad():
            for (h, c), (new_h, new_c) in zip(self._engine.states(), flat, strict=True):
                h.copy_(new_h)
                c.copy_(new_c)


def _compiled(layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> Any:
    """The native session of a chain."""
    engine = backend.native().Stream(batch, sizes[0])

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().float().contiguous().clone()

    for layer in layers:
        if isinstance(layer, PreparedLSTM):
            engine.add_lstm(layer.native())
        elif isinstance(layer, nn.Linear):
            engine.add_linear(own(layer.weight), own(layer.bias))
        elif isinstance(layer, nn.LayerNorm):
            engine.add_layer_norm(own(layer.weight), own(layer.bias), layer.eps)
        else:
            slope = getattr(layer, "negative_slope", 0.0)
            engine.add_activation(_ACTIVATIONS[type(layer)], slope)
    return engine


class _OnCuda:
    """A chain on a CUDA device.

    States and what LSTM layers put out are buffers, at the same place in every step, so that a
    captured one can be replayed. New states are taken over at the end of a step, all at once: the
    blocks of a launch read the old h as long as it runs.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> None:
        self._device = _device(layers)
        self._shapes = {"x": (batch, sizes[0]), "out": (batch, sizes[1])}
        self._layers = [
            [_Cell(layer, index, batch) for index in range(layer.num_layers)]
            if isinstance(layer, PreparedLSTM)
            else copy.deepcopy(layer).float()
            for layer in layers
        ]
        self._cells = [cell for layer in self._layers if isinstance(layer, list) for cell in layer]

    @torch.no_grad()
    def step(self, x: Any, out: Any = None) -> Any:
        """As the native step."""
        value = self._checked(x, "x")
        if out is not None and not self._checked(out, "out").is_contiguous():
            raise ValueError("Stream: expected out to be contiguous and writeable")
        with torch.autocast(self._device.type, enabled=False):
            for layer in self._layers:
                if isinstance(layer, list):
                    for cell in layer:
                        value = cell.step(value)
                else:
                    value = layer(value)
        torch._foreach_copy_([c.h_rows for c in self._cells], [c.y_rows for c in self._cells])
        return value if out is None else out.copy_(value)

    def _checked(self, value: Any, name: str) -> Tensor:
        wanted = (
            f"{name} of shape [B, {'I' if name == 'x' else 'O'}] = {list(self._shapes[name])} and "
            f"dtype float32 on {self._device}"
        )
        if not isinstance(value, Tensor):
            raise TypeError(f"Stream: expected {wanted}, got {type(value).__name__}")
        shape, dtype, device = value.shape, value.dtype, value.device
        if (shape, dtype, device) != (self._shapes[name], torch.float32, self._device):
            got = f"{list(shape)} and {str(dtype).removeprefix('torch.')} on {device}"
            raise ValueError(f"Stream: expected {wanted}, got {got}")
        return value

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """By layer: h [B, P], c [B, H]."""
        return [(cell.h, cell.c) for cell in self._cells]

    @torch.no_grad()
    def reset(self) -> None:
        """Zero the state."""
        for cell in self._cells:
            cell.h.zero_()
            cell.c.zero_()


class _Cell:
    """One layer of an LSTM in an `_OnCuda`: h [B, P] and c [B, H], and y [B, P], the next h."""

    def __init__(self, lstm: PreparedLSTM, index: int, batch: int) -> None:
        w_ih, w_hh, b_ih, b_hh, w_hr = lstm._parameters_of(index, lstm.held)
        ((hidden, output),) = lstm.sizes[index]
        columns = w_ih.shape[1]
        self._w_ih, self._w_hh = _aligned(w_ih)[:, :columns], _aligned(w_hh)[:, :output]
        self._bias = None if b_ih is None or b_hh is None else b_ih.float() + b_hh.float()
        self._w_hr = None if w_hr is None else w_hr.float().t()
        self.c = torch.zeros(batch, hidden, device=w_ih.device)
        self.h_rows, self.y_rows = (_aligned(self.c.new_zeros(batch, output)) for _ in range(2))
        self.h, self.y = self.h_rows[:, :output], self.y_rows[:, :output]
        self._cell = self.y if w_hr is None else torch.empty_like(self.c)

    def step(self, x: Tensor) -> Tensor:
        """Put the next h into y."""
        ops.lstm_step_(x, self.h, self.c, self._w_ih, self._w_hh, self._bias, self._cell)
        if self._w_hr is not None:
            torch.mm(self._cell, self._w_hr, out=self.y)
        return self.y


def _aligned(t: Tensor) -> Tensor:
    """A copy of a matrix with zero columns at the end that make rows multiples of 16 bytes."""
    return F.pad(t, (0, -t.shape[1] % (16 // t.element_size())))


class _Reference:
    """The native session in plain torch."""

    def __init__(self, layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> None:
        self._layers = [copy.deepcopy(layer).float() for layer in layers]
        self._batch = batch
        self._sizes = sizes
        self._states = [
            (torch.zeros(batch, p), torch.zeros(batch, h))
            for lstm in layers
            if isinstance(lstm, PreparedLSTM)
            for ((h, p),) in lstm.sizes
        ]

    def step(self, x: Any, out: Any = None) -> Any:
        """As the native step."""
        value = torch.from_numpy(self._checked(x, "x", "I", self._sizes[0]).copy())
        if out is not None:
            array = self._checked(out, "out", "O", self._sizes[1])
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError("Stream: expected out to be contiguous and writeable")
        at = 0
        with torch.no_grad(), backend.use_backend("reference"):
            for layer in self._layers:
                if isinstance(layer, PreparedLSTM):
                    states = self._states[at : at + layer.num_layers]
                    y, final = layer._run(value.unsqueeze(0), None, states)
                    self._states[at : at + layer.num_layers] = final
                    at += layer.num_layers
                    value = y.squeeze(0)
                else:
                    value = layer(value)
        if out is None:
            return value if isinstance(x, Tensor) else value.numpy()
        array[...] = value.numpy()
        return out

    def _checked(self, value: Any, name: str, letter: str, width: int) -> Any:
        """A tensor or array of shape [B, width] as an array over the same memory."""
        shape = (self._batch, width)
        wanted = f"{name} of shape [B, {letter}] = {list(shape)} and dtype float32"
        if isinstance(value, Tensor):
            if value.shape != shape or value.dtype != torch.float32 or not value.is_cpu:
                dtype = str(value.dtype).removeprefix("torch.")
                got = f"{list(value.shape)} and {dtype} on {value.device}"
                raise ValueError(f"Stream: expected {wanted}, got {got}")
            return value.detach().numpy()
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"Stream: expected {name} to be a torch tensor or a NumPy array, "
                f"got {type(value).__name__}"
            )
        if value.shape != shape or value.dtype != np.float32:
            got = f"{list(value.shape)} and {value.dtype}"
            raise ValueError(f"Stream: expected {wanted}, got {got}")
        return value

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """By layer: h [B, P], c [B, H]."""
        return self._states

    def reset(self) -> None:
        """Zero the state."""
        self._states = [(torch.zeros_like(h), torch.zeros_like(c)) for h, c in self._states]
