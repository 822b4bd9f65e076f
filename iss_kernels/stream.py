# SPDX-License-Identifier: Apache-2.0
"""Stream: a model that takes one time step per call and keeps its state."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iss_kernels import backend, ops
from iss_kernels.arguments import check_module, named
from iss_kernels.causal import steps_of
from iss_kernels.chain import ACTIVATIONS, Chain, device_of, sizes_of
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import Prepared


class Stream:
    """Runs a model one time step per call, with the state inside.

    model: a recurrent layer (of torch.nn, of this package, or prepared), a plain chain of those
    with Linear, LayerNorm and activations (Dropout is left out), or, with an `example`, any causal
    model; one direction only. Weights are a snapshot in the format of the model (float32 unless
    `prepare` chose another).

        step = iss.Stream(model, batch_size=1)
        y = step(x)                    # x [B, I] -> y [B, O], tensors or NumPy arrays, float32

    A step of a chain is one call that allocates nothing. y is the stream's own memory, overwritten
    by the next call; pass out=, of shape [B, O], to have it written elsewhere. Equivalent to
    model.eval()(x[None], state) with the state fed back.

    example: what any other model is called with, for at least 3 steps: a tensor, a tuple of
    arguments or a dict of keyword arguments. batch_size is then that of the example, where it is
    left out. Such a model runs its own forward, a step at a time, while each recurrent module and
    cell in it keeps its state, or the variables of a loop over the steps in its code are carried
    on. A step is called as the model is, and returns what the model returns, both without the
    dimension of time:

        step = iss.Stream(model, 2, example=tokens)                 # tokens [T, B]
        logits, state = step(tokens[0])
        step = iss.Stream(decoder, 2, example=(tokens, memory), fixed="memory")
        logits = step(word, memory)

    Equivalent to step t of the model's answer to the sequence so far; an output without time is the
    answer to that sequence. The stream owns the states: what is passed as an initial state (hx, or
    made by the model's own code) counts for rows that begin, and a state that the model returns is
    the present one. Arguments that are left out are the example's. time_dim: the dimension of time,
    by default the one with as many steps as a recurrent module takes. Every tensor with as many is
    streamed but for those that `fixed` names, by name or position; integers that are the number
    of steps (lengths) become 1. A model that takes one step per call, and its state, and returns
    the next, is streamed as it is; `fixed` then names arguments that are no state, but have the
    shape of an output.

    The stream compares its steps with whole sequences when it is made: the example, and two random
    continuations of its first half. That takes some ten forward passes. What the example does not
    exercise is not seen; one on which the answers do not differ is an error.

    On a CUDA device x, y and out are tensors there; a step of a chain is one launch per recurrent
    layer (of an ISSRHN several per micro-step), torch's operations for the rest, and one to take
    over the states. int8 weights are widened to float32. It can be captured in a CUDA graph, whose
    replays go on from the state.

    Not differentiable; where autograd has saved y or out, the next step makes its backward raise.
    Two threads take turns at one stream; a copy is another Stream of the model, given the state.

    Raises ValueError for a model that is neither: without an example, for one with a hook, a
    forward set on an instance, a subclass of a layer or a parametrisation, or whose answers to
    random steps are not those of its layers in a row; with an example, for one whose steps are not
    those of whole sequences, naming the first step and the module that differ.
    """

    # A slot, so that a call goes to the engine's own function at once: a method here would take
    # 0.1 us to get there, where a small step takes 1.5.
    __slots__ = {
        "__call__": """One step: x [B, I] -> y [B, O], of the kind that x is; or as the model takes.

        Raises ValueError for another shape or dtype, TypeError for what is no tensor or array.
        """,
        "__weakref__": None,
        "_device": None,
        "_engine": None,
        "_recurrent": None,
        "batch_size": "B",
    }
    __call__: Callable[..., Any]
    _recurrent: list[Any] | None

    def __init__(
        self,
        model: nn.Module,
        batch_size: int = 1,
        example: Any = None,
        time_dim: int | None = None,
        fixed: Any = (),
    ) -> None:
        check_module("Stream", model)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"Stream: expected batch_size to be an int from 1, got {batch_size!r}")
        used = {p.device for p in model.parameters() if p.is_cuda}
        with (
            torch.random.fork_rng(used),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            self.batch_size = batch_size
            self._engine: Any = None
            with contextlib.suppress(*[ValueError] * (example is not None)):
                self._run_chain(model, example, time_dim)
            if self._engine is None:
                self._recurrent = None
                with torch.autocast("cuda" if used else "cpu", enabled=False):
                    self._engine = steps_of(model, batch_size, example, time_dim, fixed)
                self._device, self.batch_size = self._engine.device, self._engine.batch
                # Here, not as a decorator: it would bring torch._dynamo to every import.
                self.__call__ = torch.compiler.disable(self._engine.step)  # type: ignore[no-untyped-call]
            else:
                self.__call__ = self._engine.step

    def _run_chain(self, model: nn.Module, example: Any, time_dim: int | None) -> None:
        """Make the engine of a plain chain; ValueError for another model, or another example."""
        chain = Chain(model)
        self._device = device_of(chain.layers)
        layers = chain.snapshots()
        sizes = sizes_of(layers)
        self._recurrent = [layer for layer in layers if isinstance(layer, Prepared)]
        shape = self.batch_size, sizes[0]
        if example is not None:
            dim = int(self._recurrent[0].batch_first)
            returns_alone = not chain.returns_states and time_dim in (None, dim)
            if not returns_alone or not _is_sequence(example, shape, dim):
                raise ValueError("Stream: expected an example of a chain's input and output alone")
        kind: Any = _compiled
        if backend.backend() == "reference":
            kind = _Reference
        elif backend.on_cuda(self._device):
            kind = _OnCuda
        engine = kind(layers, self.batch_size, sizes)
        x = torch.randn(
            3, *shape, dtype=torch.float32, device="cpu",
            generator=torch.Generator("cpu").manual_seed(0),
        ).to(self._device)  # fmt: skip
        with torch.autocast(self._device.type, enabled=False):
            chain.compare(engine.step, x)
        engine.reset(None)
        self._engine = engine

    def __repr__(self) -> str:
        """With the arguments that are streamed, of a model that needs an example."""
        text = f"Stream(batch_size={self.batch_size}"
        if self._recurrent is None:
            arguments = self._engine.arguments
            text += f", streamed={', '.join(map(named, arguments.streamed))}"
            text += f", time_dim={arguments.dim}" * (arguments.length is not None)
        return text + ")"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise TypeError: a copy would share the state."""
        raise TypeError(
            "Stream: expected to be neither copied nor pickled; make another Stream of the model "
            "and set its state"
        )

    def reset(self, rows: Any = None) -> None:
        """Begin again from the initial state: all rows, or those where `rows` is True.

        That is zero, or what the model's own code makes. rows: bool [B], a tensor, a NumPy array or
        a list; the other rows keep their state. Raises ValueError for another shape or dtype, or a
        model whose rows do not begin alone, TypeError for something else.

            step.reset(rows=done)      # the sequences that have ended begin anew
        """
        with torch.inference_mode(False), torch.no_grad():
            self._engine.reset(None if rows is None else self._mask(rows))

    def _mask(self, rows: Any) -> Tensor:
        """rows as a tensor on the device of the states."""
        wanted = f"Stream: expected rows of shape [B] = [{self.batch_size}] and dtype bool, got "
        value = rows
        if isinstance(rows, list):
            kinds = {type(row) for row in rows}
            if not kinds <= {bool, np.bool_}:
                names = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise ValueError(f"{wanted}a list of {names}")
            value = np.array(rows, dtype=np.bool_)
        if type(value) is np.ndarray and value.dtype == np.bool_:
            value = torch.from_numpy(np.array(value, order="C"))
        if not isinstance(value, Tensor) and type(value) is not np.ndarray:
            raise TypeError(f"{wanted}a {type(value).__name__}")
        dtype = str(value.dtype).removeprefix("torch.")
        if not isinstance(value, Tensor) or (dtype, value.shape) != ("bool", (self.batch_size,)):
            raise ValueError(f"{wanted}{list(value.shape)} and {dtype}")
        if not _is_dense(value):
            raise ValueError(f"{wanted}{_described(value)}")
        return value.to(self._device).contiguous()

    @property
    def state(self) -> Any:
        """A copy of the state, in the form of the layer's hx; a tuple of those where several.

        First come states that the model takes and returns itself. A row that has been reset has the
        initial state that the model last made.
        """
        with torch.inference_mode(False), torch.no_grad():
            parts = self._engine.states()
            if self._recurrent is not None:
                parts, flat = [], [tuple(state) for state in parts]
                for layer in self._recurrent:
                    parts.append(layer._final(flat[: layer.num_layers], None, batched=True))
                    flat = flat[layer.num_layers :]
        return parts[0] if len(parts) == 1 else tuple(parts)

    @state.setter
    def state(self, value: Any) -> None:
        count = len(self._recurrent or self._engine.states())
        parts = [value] if count == 1 else value
        if not isinstance(parts, (tuple, list)) or len(parts) != count:
            got = len(parts) if isinstance(parts, (tuple, list)) else type(parts).__name__
            raise ValueError(
                f"Stream: expected state with one part for each of {count} recurrent layers, "
                f"got {got}"
            )
        with torch.inference_mode(False), torch.no_grad():
            if self._recurrent is None:
                self._engine.set_states(parts)
                return
            for layer, hx in zip(self._recurrent, parts, strict=True):
                _expect_state(hx, layer.cell.states)
            like = torch.empty(0, dtype=torch.float32, device=self._device)
            self._engine.set_states(
                [
                    tuple(like.new_empty(part.shape).copy_(part) for part in state)
                    for layer, hx in zip(self._recurrent, parts, strict=True)
                    for state in layer._initial(hx, self.batch_size, like, None, batched=True)
                ]
            )


def _is_sequence(example: Any, shape: tuple[int, int], dim: int) -> bool:
    """Whether it is one of steps of this shape, as the engine of a chain takes them."""
    if not isinstance(example, Tensor) or (example.dim(), example.dtype) != (3, torch.float32):
        return False
    return example.select(dim, 0).shape == shape


def _expect_state(hx: Any, names: Sequence[str]) -> None:
    """Raise ValueError for what is not a cell's states, of these names, with real values."""
    several = len(names) > 1
    if several and (not isinstance(hx, (tuple, list)) or len(hx) != len(names)):
        got = f"{len(hx)} parts" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise ValueError(f"Stream: expected state to be ({', '.join(names)}), got {got}")
    parts = list(hx) if several else [hx]
    while parts:
        part = parts.pop()
        if isinstance(part, (tuple, list)):
            parts += part
        elif not isinstance(part, Tensor):
            raise TypeError(f"Stream: expected state to be tensors, got {type(part).__name__}")
        elif not (_is_dense(part) and part.is_floating_point()):
            raise ValueError(
                f"Stream: expected state to be dense floating-point tensors, got {_described(part)}"
            )


def _is_dense(t: Tensor) -> bool:
    """Whether its memory holds its values: not so in sparse, meta or fake tensors."""
    own_dispatch = type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return t.layout == torch.strided and not (t.is_nested or t.is_meta or own_dispatch)


def _described(t: Tensor) -> str:
    dtype, layout = (str(part).removeprefix("torch.") for part in (t.dtype, t.layout))
    return f"a {layout} {type(t).__name__} of {dtype} on {t.device}"


def _expect_writeable(out: Any) -> None:
    """Raise ValueError where a step may not write to `out`."""
    if isinstance(out, Tensor):
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "Stream: expected out to ask for no gradient (a stream is not differentiable), got "
                "one with requires_grad=True"
            )
        right = out.is_contiguous() and not out.is_neg()
    else:
        right = out.flags.c_contiguous and out.flags.aligned and out.flags.writeable
    if not right:
        raise ValueError("Stream: expected out to be contiguous and writeable")


def _compiled(layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> Any:
    """The native session of a chain."""
    engine = backend.native().Stream(batch, sizes[0])

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().contiguous()

    def packed(layer: Prepared | PreparedLinear) -> Any:
        native = layer.native()
        if native is None:
            raise RuntimeError(
                "Stream: expected to be made outside of torch's modes, transforms and tracers, got "
                "one inside"
            )
        return native

    for layer in layers:
        if isinstance(layer, Prepared):
            engine.add_recurrent(packed(layer))
        elif isinstance(layer, PreparedLinear):
            engine.add_linear(packed(layer))
        elif isinstance(layer, nn.LayerNorm):
            engine.add_layer_norm(own(layer.weight), own(layer.bias), layer.eps)
        else:
            slope = getattr(layer, "negative_slope", 0.0)
            engine.add_activation(ACTIVATIONS[type(layer)], slope)
    return engine


class _OnCuda:
    """A chain on a CUDA device.

    States and what recurrent layers put out are buffers, at the same place in every step, so that a
    captured one can be replayed. New states are taken over at the end of a step, all at once: the
    blocks of a launch read the old h as long as it runs.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> None:
        self._device = device_of(layers)
        self._shapes = {"x": (batch, sizes[0]), "out": (batch, sizes[1])}
        self._layers = [
            [_Cell(layer, index, batch) for index in range(layer.num_layers)]
            if isinstance(layer, Prepared)
            else layer
            for layer in layers
        ]
        self._cells = [cell for layer in self._layers if isinstance(layer, list) for cell in layer]
        self._lock = threading.Lock()

    def step(self, x: Any, out: Any = None) -> Any:
        """As the native step."""
        value = self._checked(x, "x")
        if out is not None:
            _expect_writeable(self._checked(out, "out"))
        with self._lock, torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            if value.untyped_storage().data_ptr() == self._cells[0].y_memory:
                value = value.clone()  # the first launch writes what it reads
            for layer in self._layers:
                if isinstance(layer, list):
                    for cell in layer:
                        value = cell.step(value)
                else:
                    value = layer(value)
            torch._foreach_copy_([c.h_rows for c in self._cells], [c.y_rows for c in self._cells])
            if value is self._cells[-1].y:
                torch.autograd.graph.increment_version(value)
            return value if out is None else _written(out, value)

    def _checked(self, value: Any, name: str) -> Tensor:
        wanted = (
            f"{name} of shape [B, {'I' if name == 'x' else 'O'}] = {list(self._shapes[name])} and "
            f"dtype float32 on {self._device}"
        )
        if not isinstance(value, Tensor):
            raise TypeError(f"Stream: expected {wanted}, got {type(value).__name__}")
        if not _is_dense(value):
            raise ValueError(f"Stream: expected {wanted}, got {_described(value)}")
        shape, dtype, device = value.shape, value.dtype, value.device
        if (shape, dtype, device) != (self._shapes[name], torch.float32, self._device):
            got = f"{list(shape)} and {str(dtype).removeprefix('torch.')} on {device}"
            raise ValueError(f"Stream: expected {wanted}, got {got}")
        return value

    def states(self) -> list[tuple[Tensor, ...]]:
        """Copies, by layer: h [B, P], and c [B, H] of a cell that has it."""
        with self._lock:
            return [tuple(state.clone() for state in cell.states) for cell in self._cells]

    def set_states(self, states: Sequence[tuple[Tensor, ...]]) -> None:
        """Take over what `states` returned."""
        with self._lock:
            for cell, new in zip(self._cells, states, strict=True):
                for state, value in zip(cell.states, new, strict=True):
                    state.copy_(value)

    def reset(self, rows: Tensor | None) -> None:
        """Zero the state, or that of some rows: bool [B]."""
        with self._lock:
            for cell in self._cells:
                for state in cell.states:
                    state.zero_() if rows is None else state.masked_fill_(rows[:, None], 0)


class _Cell:
    """One layer in an `_OnCuda`: its states, h [B, P] first, and y [B, P], the next h."""

    def __init__(self, layer: Prepared, index: int, batch: int) -> None:
        w_ih, w_hh, b_ih, b_hh, w_hr = layer._parameters_of(index, layer.held)
        ((hidden, output),) = layer.sizes[index]
        columns = w_ih.shape[1]
        self._w_ih, self._w_hh = _aligned(w_ih)[:, :columns], _aligned(w_hh)[:, :output]
        self._b_ih, self._b_hh = (None if b is None else b.float() for b in (b_ih, b_hh))
        if not layer.cell.bias_parts and self._b_ih is not None and self._b_hh is not None:
            self._b_ih, self._b_hh = self._b_ih + self._b_hh, None
        self._w_hr = None if w_hr is None else w_hr.float().t()
        zeros = torch.zeros(batch, hidden, dtype=torch.float32, device=w_ih.device)
        self.h_rows, self.y_rows = (_aligned(zeros.new_zeros(batch, output)) for _ in range(2))
        self.h, self.y = self.h_rows[:, :output], self.y_rows[:, :output]
        self.y_memory = self.y_rows.untyped_storage().data_ptr()
        self._name = layer.cell.name
        # Several micro-steps take a launch each, those of a sequence.
        self._deep = layer._parameters_of(index, layer.held) if layer.cell.deep else None
        self.c = zeros if "c" in layer.cell.states else None
        self.states = (self.h,) if self.c is None else (self.h, self.c)
        self._out = self.y if w_hr is None else torch.empty_like(zeros)  # [B, H]

    def step(self, x: Tensor) -> Tensor:
        """Put the next h into y."""
        if self._deep is not None:
            dtype = self._deep[0].dtype
            y, _, _ = ops.recurrent(
                self._name, x.to(dtype)[None], None, None, self.h.to(dtype), None, *self._deep,
                None, False,
            )  # fmt: skip
            return self.y.copy_(y[0])
        ops.recurrent_step_(
            self._name, x, self.h, self.c, self._w_ih, self._w_hh, self._b_ih, self._b_hh,
            self._out,
        )  # fmt: skip
        if self._w_hr is not None:
            torch.mm(self._out, self._w_hr, out=self.y)
        return self.y


def _aligned(t: Tensor) -> Tensor:
    """A copy of a matrix with zero columns at the end that make rows multiples of 16 bytes."""
    return F.pad(t, (0, -t.shape[1] % (16 // t.element_size())))


def _written(out: Tensor, value: Tensor) -> Tensor:
    """out with the values of `value`, also where it was made in inference mode."""
    with torch.inference_mode(out.is_inference()), torch.no_grad():
        return out.copy_(value)


class _Reference:
    """The native session in plain torch."""

    def __init__(self, layers: Sequence[nn.Module], batch: int, sizes: tuple[int, int]) -> None:
        self._device = device_of(layers)
        self._layers = [copy.deepcopy(layer) for layer in layers]
        self._batch = batch
        self._sizes = sizes
        self._lock = threading.Lock()
        like = torch.empty(0, dtype=torch.float32, device=self._device)
        self._states = [
            state
            for layer in layers
            if isinstance(layer, Prepared)
            for state in layer._initial(None, batch, like, None, batched=True)
        ]

    def step(self, x: Any, out: Any = None) -> Any:
        """As the native step."""
        value = self._checked(x, "x", "I", self._sizes[0])
        if out is not None:
            self._checked(out, "out", "O", self._sizes[1])
            _expect_writeable(out)
        states: list[tuple[Tensor, ...]] = []
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self._device.type, enabled=False),
        ):
            for layer in self._layers:
                if isinstance(layer, Prepared):
                    before = self._states[len(states) : len(states) + layer.num_layers]
                    y, final = layer._run(value.unsqueeze(0), None, None, before)
                    states += final
                    value = y.squeeze(0)
                else:
                    value = layer(value)
            self._states = states
            if isinstance(out, Tensor):
                return _written(out, value)
        if out is None:
            return value if isinstance(x, Tensor) else value.numpy()
        out[...] = value.numpy()
        return out

    def _checked(self, value: Any, name: str, letter: str, width: int) -> Tensor:
        """The values of a tensor or array of shape [B, width]."""
        shape = (self._batch, width)
        wanted = f"{name} of shape [B, {letter}] = {list(shape)} and dtype float32"
        if isinstance(value, Tensor):
            if not _is_dense(value) and not value.is_meta:
                raise ValueError(f"Stream: expected {wanted}, got {_described(value)}")
            if (value.shape, value.dtype, value.device) != (shape, torch.float32, self._device):
                dtype = str(value.dtype).removeprefix("torch.")
                got = f"{list(value.shape)} and {dtype} on {value.device}"
                raise ValueError(f"Stream: expected {wanted}, got {got}")
            return value.detach()
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"Stream: expected {name} to be a torch tensor or a NumPy array, "
                f"got {type(value).__name__}"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise ValueError(f"Stream: expected {wanted}, got a {type(value).__name__}")
        if value.shape != shape or value.dtype != np.float32:
            got = f"{list(value.shape)} and {value.dtype}"
            raise ValueError(f"Stream: expected {wanted}, got {got}")
        return torch.from_numpy(np.array(value, order="C"))

    def states(self) -> list[tuple[Tensor, ...]]:
        """Copies, by layer: h [B, P], and c [B, H] of a cell that has it."""
        with self._lock:
            return [tuple(part.clone() for part in state) for state in self._states]

    def set_states(self, states: Sequence[tuple[Tensor, ...]]) -> None:
        """Take over what `states` returned."""
        with self._lock:
            self._states = list(states)

    def reset(self, rows: Tensor | None) -> None:
        """Zero the state, or that of some rows: bool [B]."""
        among = torch.tensor(True, device=self._device) if rows is None else rows[:, None]
        with self._lock:
            self._states = [
                tuple(part.masked_fill(among, 0) for part in state) for state in self._states
            ]
