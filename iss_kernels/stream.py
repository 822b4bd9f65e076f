# SPDX-License-Identifier: Apache-2.0
"""Stream: a model that takes one time step per call and keeps its state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from iss_kernels import backend
from iss_kernels.lstm import ISSLSTM
from iss_kernels.prepare import PreparedLSTM, prepare

# Functions and modules that a stream computes itself: name, and the parameter of leaky_relu.
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu", F.relu: "relu", torch.relu: "relu", torch.tanh: "tanh",
    F.tanh: "tanh", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.silu: "silu",
    "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid",
}  # fmt: skip
_LSTMS = (nn.LSTM, ISSLSTM)


class _Tracer(fx.Tracer):
    """Looks into everything but the modules that a stream knows."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LSTMS) or super().is_leaf_module(m, module_qualified_name)


def _chain(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that is a plain chain, in order."""
    if isinstance(model, _LSTMS):
        return [model]

    def refuse(what: str) -> ValueError:
        return ValueError(
            "Stream: expected a plain chain of LSTM, Linear, LayerNorm and activations, got "
            f"{type(model).__name__} with {what}"
        )

    try:
        parameters = list(inspect.signature(model.forward).parameters)
        graph = _Tracer().trace(model, dict.fromkeys(parameters[1:]))  # no state is passed in
    except Exception as error:  # whatever a forward method does with a proxy
        raise refuse(f"a forward method that cannot be traced ({error})") from error
    modules = dict(model.named_modules())
    layers: list[nn.Module] = []
    # The nodes that are the value flowing along the chain, and those that are an LSTM's result.
    value: fx.Node | None = None
    results: set[fx.Node] = set()
    states: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node if value is None else value
            continue
        if node.op == "output":
            out = node.args[0]
            first, *rest = out if isinstance(out, (tuple, list)) else (out,)
            if first is not value or any(r not in states for r in rest):
                raise refuse("an output that is not the end of the chain")
            continue
        if node.target is fx._symbolic_trace._assert_is_none:
            continue
        source = node.args[0] if node.args else None
        if node.op == "call_function" and node.target.__name__ == "getitem" and source in results:
            if node.args[1] == 0:
                value = node
            else:
                states.add(node)
            continue
        layer = _layer_of(node, modules)
        if layer is None:
            raise refuse(f"the operation {node.target}")
        if source is not value or any(
            isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())
        ):
            raise refuse(f"{node.target} off the chain")
        if isinstance(layer, _LSTMS):
            results.add(node)
        else:
            value = node
        if not isinstance(layer, (nn.Dropout, nn.Identity)):
            layers.append(layer)
    return layers


def _layer_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls, or that stands for its function; None for what is unknown."""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        known = (*_LSTMS, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)
        return layer if isinstance(layer, known) or type(layer) in _ACTIVATIONS else None
    name = _ACTIVATIONS.get(node.target)
    by_name = {n: m for m, n in _ACTIVATIONS.items() if isinstance(m, type)}
    if name is None or len(node.args) + len(node.kwargs) != 1:
        return None
    return by_name[name]()  # type: ignore[no-any-return]


def _check(layers: Sequence[nn.Module]) -> None:
    """Raise ValueError for what cannot go step by step."""
    if not any(isinstance(layer, _LSTMS) for layer in layers):
        raise ValueError("Stream: expected a model with an LSTM, got one without")
    for layer in layers:
        if isinstance(layer, _LSTMS) and layer.bidirectional:
            raise ValueError(
                "Stream: expected LSTMs in one direction, got a bidirectional one: its backward "
                "half begins at the last step, which a stream has not seen yet"
            )
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
            raise ValueError(
                "Stream: expected LayerNorm over the last dimension, got normalized_shape="
                f"{tuple(layer.normalized_shape)}"
            )
        if isinstance(layer, nn.GELU) and layer.approximate != "none":
            raise ValueError(
                f"Stream: expected GELU in its exact form, got approximate={layer.approximate!r}"
            )


class Stream:
    """Runs a model one time step per call, with the state inside.

    model: an nn.LSTM, ISSLSTM or prepared LSTM, or a module that is a plain chain of those with
    Linear, LayerNorm and activations (Dropout is left out); one direction only. Weights are a
    snapshot in the format of the model (float32 unless `prepare` chose another). Nothing is
    allocated per call.

        step = iss.Stream(model, batch_size=1)
        y = step(x)                    # x [B, I] -> y [B, O], tensors or NumPy arrays, float32

    y is the stream's own memory, overwritten by the next call; pass out=, of shape [B, O], to have
    it written elsewhere. Equivalent to model(x[None], state) with the state fed back. Not
    differentiable. Two threads may use two streams of one model, each its own.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Stream: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream: expected batch_size to be an int from 1, got {batch_size!r}")
        layers = _chain(model)
        _check(layers)
        self.batch_size = batch_size
        self._layers = [
            layer
            if isinstance(layer, PreparedLSTM) or not isinstance(layer, _LSTMS)
            else prepare(layer)
            for layer in layers
        ]
        self._lstms = [layer for layer in self._layers if isinstance(layer, PreparedLSTM)]
        native = backend.backend() != "reference"
        self._engine: Any = (_compiled if native else _Reference)(self._layers, batch_size)
        self._step = self._engine.step

    def __call__(self, x: Any, out: Any = None) -> Any:
        """One step: x [B, I] -> y [B, O], of the kind that x is.

        Raises ValueError for another shape or dtype, TypeError for what is no tensor or array.
        """
        return self._step(x, out)

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
        pairs = [value] if len(self._lstms) == 1 else list(value)
        if len(pairs) != len(self._lstms):
            raise ValueError(
                f"Stream: expected state with one (h, c) for each of {len(self._lstms)} LSTMs, "
                f"got {len(pairs)}"
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


def _compiled(layers: Sequence[nn.Module], batch: int) -> Any:
    """The native session of a chain."""
    engine: Any = None

    def begin(width: int) -> Any:
        return engine or backend.native().Stream(batch, torch.float32, width)

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().float().contiguous().clone()

    for layer in layers:
        if isinstance(layer, PreparedLSTM):
            engine = begin(layer.input_size)
            engine.add_lstm(layer.native())
        elif isinstance(layer, nn.Linear):
            engine = begin(layer.in_features)
            engine.add_linear(own(layer.weight), own(layer.bias))
        elif isinstance(layer, nn.LayerNorm):
            engine = begin(layer.normalized_shape[0])
            engine.add_layer_norm(own(layer.weight), own(layer.bias), layer.eps)
        elif engine is None:
            raise ValueError(
                "Stream: expected the chain to begin with a layer that has a size, got "
                f"{type(layer).__name__}"
            )
        else:
            slope = getattr(layer, "negative_slope", 0.0)
            engine.add_activation(_ACTIVATIONS[type(layer)], slope)
    return engine


class _Reference:
    """The native session in plain torch."""

    def __init__(self, layers: Sequence[nn.Module], batch: int) -> None:
        self._layers = layers
        self._batch = batch
        lstms = [layer for layer in layers if isinstance(layer, PreparedLSTM)]
        self._states = [
            (torch.zeros(batch, p), torch.zeros(batch, h))
            for lstm in lstms
            for ((h, p),) in lstm.sizes
        ]

    def step(self, x: Any, out: Any = None) -> Any:
        """As the native step."""
        value = torch.as_tensor(x)
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
        torch.as_tensor(out).copy_(value)
        return out

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """By layer: h [B, P], c [B, H]."""
        return self._states

    def reset(self) -> None:
        """Zero the state."""
        self._states = [(torch.zeros_like(h), torch.zeros_like(c)) for h, c in self._states]
