# SPDX-License-Identifier: Apache-2.0
"""A model as a plain chain of layers, found by calling a copy of it with a stand-in for the tensor.

(torch.fx would do, but while it traces it replaces methods of nn.Module for all threads.)
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iss_kernels import backend
from iss_kernels.copying import copied
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import Prepared, prepare, recurrent_types
from iss_kernels.stored import Snapshot

BOTH_WAYS = (
    "Stream: expected recurrent layers in one direction, got {}: its backward half begins at the "
    "last step, which a stream has not seen yet"
)

_SIMPLE = (nn.Linear, PreparedLinear, nn.LayerNorm, nn.Dropout, nn.Identity)
ACTIVATIONS = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}  # fmt: skip
# Functions, and methods of a tensor by name, that stand for a module.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.silu: nn.SiLU,
    torch.tanh: nn.Tanh, "tanh": nn.Tanh, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
}  # fmt: skip
_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv matmul pow neg getitem eq lt gt le ge bool"
)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Refused(BaseException):
    """Why a model is not a plain chain; no Exception, lest a forward method should handle it."""


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
        made = FUNCTIONS.get(func)
        if made is None or len(args) != 1 or not (kwargs or {}).keys() <= {"inplace"}:
            raise _Refused(f"the operation {func.__name__}")
        return args[0].through(made(), func.__name__)

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise _Refused(f"the operation {name}")
        return lambda: self.through(FUNCTIONS[name](), name)


class _State:
    """Stands for a recurrent layer's state, which may be taken apart and returned."""

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


def _own_ways(module: nn.Module) -> str | None:
    """What makes a module compute something else than its class, if anything does."""
    kinds = [kind for kind in (*recurrent_types(), *_SIMPLE) if isinstance(module, kind)]
    if kinds and type(module) not in kinds:
        return f"{{}}, of {type(module).__name__}, a subclass of {kinds[0].__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook on {}"
    if "forward" in vars(module):
        return "a forward set on the instance of {}"
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, nn.Linear):
        rows, columns = module.out_features, module.in_features
        shapes = {"weight": (rows, columns), "bias": (rows,)}
    elif isinstance(module, nn.LayerNorm):
        shapes = dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    for name, shape in shapes.items():
        if name not in module._parameters:
            return f"{{}}, whose {name} is no parameter"
        value = module._parameters[name]
        if value is not None and tuple(value.shape) != shape:
            return f"{{}}, whose {name} is of shape {list(value.shape)} and not {list(shape)}"
    return None


def _snapshot(layer: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    """A copy of a layer for inference in float32, the weights of a prepared one in its format."""
    if layer not in made:
        for parameter in layer.parameters():
            if not parameter.is_floating_point():
                got = f"{str(parameter.dtype).removeprefix('torch.')} in {type(layer).__name__}"
                raise ValueError(f"Stream: expected floating-point weights, got {got}")
        if isinstance(layer, Snapshot):
            made[layer] = layer
        elif isinstance(layer, recurrent_types()):
            made[layer] = prepare(layer, "float32")
        elif isinstance(layer, nn.Linear):
            made[layer] = PreparedLinear(copy.deepcopy(layer), "float32")
        else:
            double: Any = copy.deepcopy(layer).float().eval()
            if hasattr(double, "inplace"):
                double.inplace = False  # its input may be a layer's state
            made[layer] = double
    return made[layer]


class Chain:
    """The layers of a model, in float32, and its copy, which calls them when given a tensor.

    Raises ValueError for a model that is no plain chain.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._snapshots: dict[nn.Module, nn.Module] = {}
        self.layers: list[nn.Module] = []  # in the order of the chain
        if not any(isinstance(module, recurrent_types()) for module in model.modules()):
            for name, module in model.named_modules():
                if isinstance(module, nn.RNNCellBase):
                    self._refuse(f"a cell, {name or 'itself'}")
            raise ValueError("Stream: expected a model with a recurrent layer, got one without")
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            self._refuse("a forward hook on all modules")
        ways = _own_ways(model)
        if ways is not None:
            self._refuse(ways.format("the model"))
        memo: dict[int, Any] = {
            id(module): _listening(module, name, self._snapshots)
            for name, module in model.named_modules()
            if type(module) in (*recurrent_types(), *_SIMPLE, *ACTIVATIONS)
            or _own_ways(module) is not None
        }
        try:
            self._copy = copied(model, memo).eval()
        except Exception as error:
            self._refuse(f"a part that cannot be copied: {error}", error)
        y, rest = self._call(_Value(self.layers))
        if not isinstance(y, _Value) or y._used or not _only_states(rest):
            self._refuse("an output that is not the end of the chain")
        self.returns_states = bool(rest)

    def snapshots(self) -> list[Any]:
        """The layers in float32."""
        try:
            return [_snapshot(layer, self._snapshots) for layer in self.layers]
        except ValueError:
            raise
        except Exception as error:
            self._refuse(f"a layer that cannot be copied: {error}", error)

    def compare(self, step: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Raise ValueError where the model's answer to x [T, B, I] is not that of its layers."""
        layers = self.snapshots()
        recurrent = [layer for layer in layers if isinstance(layer, Prepared)]
        turned = recurrent[0].batch_first
        in_a_row = given = x.transpose(0, 1) if turned else x
        y, _ = self._call(given)
        for layer in layers:
            in_a_row = layer(in_a_row)
            if isinstance(layer, Prepared):
                in_a_row = in_a_row[0]
        self._expect_equal(y, in_a_row, 1e-5)
        # Kernels of a sequence round 16 and 8 bits, and those of CUDA, elsewhere than a step's.
        coarse = x.is_cuda or any(
            layer.weights != "float32" for layer in layers if isinstance(layer, Snapshot)
        )
        steps = torch.stack([step(x_t).clone() for x_t in x])
        self._expect_equal(y, steps.transpose(0, 1) if turned else steps, 1e-1 if coarse else 1e-3)

    def _expect_equal(self, y: Any, expected: Tensor, rounding: float) -> None:
        """Refuse a model whose answer is another where both are finite numbers."""
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            self._refuse(
                f"an answer of shape {got}, where that of its layers in a row is "
                f"{list(expected.shape)}"
            )
        finite = y.isfinite()
        y, expected = y.where(finite, 0), expected.where(finite, 0)
        difference = (y - expected).abs().max().item()
        if not difference <= rounding * y.abs().max().item() + 1e-5:
            self._refuse(
                f"an answer that differs from that of its layers in a row by {difference:.2g}"
            )

    def _call(self, x: Any) -> tuple[Any, list[Any]]:
        """The output of the copy, and what it returns beside; no state is passed in."""
        parameters = list(inspect.signature(self._copy.forward).parameters.values())
        needed = [p for p in parameters[1:] if p.default is p.empty and p.kind in _POSITIONAL]
        try:
            result = self._copy(x, *(None for _ in needed))
        except _Refused as refused:
            self._refuse(str(refused), refused)
        except Exception as error:  # whatever a forward method does with a stand-in
            self._refuse(f"a forward method that fails: {error}", error)
        y, *rest = result if isinstance(result, (tuple, list)) else (result,)
        return y, rest

    def _refuse(self, why: str, error: BaseException | None = None) -> NoReturn:
        raise ValueError(
            "Stream: expected a plain chain of recurrent layers, Linear, LayerNorm and "
            f"activations, or an example of another model's input, got {self._name} with {why}"
        ) from error


def _listening(layer: nn.Module, name: str, snapshots: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a layer that notes in its input's chain that it was called."""
    ways = _own_ways(layer)

    def forward(input: Any, *rest: Any, **named: Any) -> Any:
        if ways is not None:
            raise _Refused(ways.format(name))
        if any(a is not None for a in (*rest, *named.values())):
            raise _Refused(f"{name} off the chain")
        if isinstance(input, Tensor):
            return _snapshot(layer, snapshots)(input)
        if not isinstance(input, _Value):
            raise _Refused(f"{name} off the chain")
        y = input.through(layer, name)
        return (y, _State()) if isinstance(layer, recurrent_types()) else y

    double = layer.__new__(type(layer))  # copy.copy fails where there are parametrisations
    vars(double).update(vars(layer), forward=forward, _compiled_call_impl=None)
    double._forward_hooks, double._forward_pre_hooks = OrderedDict(), OrderedDict()
    return double


def _only_states(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_only_states(part) for part in value)
    return isinstance(value, _State)


def _kind(layer: nn.Module) -> str:
    """What the model calls the layer of a snapshot."""
    return type(layer).__name__.removeprefix("Prepared")


def sizes_of(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """Raise ValueError for what cannot go step by step; return the sizes of input and output."""
    begin = width = 0
    for layer in layers:
        if isinstance(layer, Prepared):
            if layer.bidirectional:
                raise ValueError(BOTH_WAYS.format("a bidirectional one"))
            if layer.full_width:
                raise ValueError(
                    "Stream: expected an example of the input of a model whose layers keep their "
                    "full_width, got none"
                )
            needs, gives = layer.input_size, layer.sizes[-1][0][1]
        elif isinstance(layer, PreparedLinear):
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
        if gives == 0:
            raise ValueError(
                f"Stream: expected layers that put out features, got {_kind(layer)} for 0"
            )
        if width not in (0, needs):
            raise ValueError(
                f"Stream: expected layers whose sizes fit, got {_kind(layer)} for {needs} "
                f"features after {width}"
            )
        begin, width = begin or needs, gives
    return begin, width


def device_of(layers: Sequence[nn.Module]) -> torch.device:
    """Where the weights of all layers are; ValueError where no stream runs on them."""
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    devices = list(dict.fromkeys(t.device for t in tensors))
    if len(devices) > 1:
        got = ", ".join(map(str, devices))
        raise ValueError(f"Stream: expected a model on one device, got {got}")
    if devices[0].type != "cpu" and not backend.on_cuda(devices[0]):
        raise ValueError(f"Stream: expected a model on the CPU or a CUDA device, got {devices[0]}")
    return devices[0]
