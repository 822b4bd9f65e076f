# SPDX-License-Identifier: Apache-2.0
"""Steps: a model's own forward, one time step per call, for the models that are no plain chain.

It runs on a copy of the model in which states are carried on (carry.py). Whether the steps are then
those of a whole sequence is for causal.py to find out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iss_kernels.accelerate import added
from iss_kernels.arguments import Arguments, Path, cloned, leaves, mapped, named, tensors
from iss_kernels.carry import (
    Dims,
    Loop,
    Memory,
    Slot,
    Variables,
    apart,
    memories_of,
    memory_of,
    merged,
    rows_dim,
    rows_dims,
)
from iss_kernels.copying import copied
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import plain_linears, prepare
from iss_kernels.recurrent import CELL_MODULES, MODULES
from iss_kernels.stored import Snapshot


class Steps:
    """A copy of a model that takes one step per call.

    feeds: {path of an argument: path of an output}, of the states that the model takes and returns.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        batch: int,
        feeds: Mapping[Path, Path],
        keeping: set[str],
        variables: Variables | None,
        fast: bool,
    ) -> None:
        self.arguments, self.batch, self.feeds = arguments, batch, feeds
        self.keeping, self.fast = keeping, fast
        self.variables = variables
        self.loop = None if variables is None else Loop(variables)
        self.model = _fast(model) if fast else copied(model).eval()
        self.memories = memories_of(self.model)
        for memory in self.memories:
            memory.keeps = memory.name in keeping
            memory.trusts = bool(feeds) or variables is not None
        self.dropped: dict[Path, int] = {}  # the dimension of time in an output
        self.dims: Dims = {}  # of rows, where several have B elements
        self.no_rows = ""  # why rows cannot be reset alone
        if self.loop is not None:
            self.loop.dims = self.dims
            self.loop.watch(self.model, self.memories)
        self._example = arguments.part(0, 1)
        step = leaves(arguments.at(0, arguments.values))
        self._expected = {
            path: (step[path].shape, step[path].dtype, step[path].device)
            for path in arguments.streamed
        }
        needed = {path[0] for path in arguments.streamed}
        self._given = {name: part for name, part in self._example.items() if name not in needed}
        # What the caller may not be given to write to.
        self._memories = _memories_in(
            [*self._given.values(), *self.model.parameters(), *self.model.buffers()]
        )
        self._initial: dict[Path, Any] = {}  # of the states that are fed back
        self._fed: dict[Path, Any] = {}
        self._fresh: Any = True
        self._lock = threading.Lock()
        self.device = next(iter((*model.parameters(), *model.buffers()))).device

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the model."""
        given = self.arguments.by_name(args, kwargs)
        arrays = any(isinstance(part, np.ndarray) for part in given.values())
        output = self.take({name: _as_tensor(part) for name, part in given.items()})
        if arrays:
            return mapped(output, lambda _, y: y.numpy() if isinstance(y, Tensor) else y)
        return output

    def take(self, values: dict[str, Any]) -> Any:
        """The model's answer to these arguments of a step, by name."""
        kind = self.device.type
        watched = torch.is_autocast_enabled(kind)
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(kind, enabled=False) if watched else nullcontext(),
        ):
            output = self._run(self._with_time(values), _memories_in([*values.values()]))
            kept = self._memories | _memories_in([*self._kept(), *self._begun()])

            def finish(path: Path, leaf: Any) -> Any:
                if isinstance(leaf, Tensor):
                    leaf = leaf.detach()
                    if memory_of(leaf) in kept:
                        leaf = leaf.clone()  # its owner may write to it
                    if path in self.dropped:
                        leaf = leaf.squeeze(self.dropped[path])
                return leaf

            return mapped(output, finish)

    def _with_time(self, values: dict[str, Any]) -> dict[str, Any]:
        """A step's arguments as the model takes them; those left out are the example's."""
        values = {name: part for name, part in values.items() if part is not None}
        plain = all(isinstance(part, Tensor) for part in values.values())
        found = {(name,): part for name, part in values.items()} if plain else leaves(values)
        for path, (shape, dtype, device) in self._expected.items():
            x = found.get(path)
            if not isinstance(x, Tensor):
                got = type(values.get(path[0]) if len(path) == 1 else x).__name__
            elif (x.shape, x.dtype, x.device) != (shape, dtype, device):
                got = f"{list(x.shape)} and {_name(x.dtype)} on {x.device}"
            else:
                continue
            raise (ValueError if isinstance(x, Tensor) else TypeError)(
                f"Stream: expected {named(path)} of shape {list(shape)} and dtype {_name(dtype)} "
                f"on {device}, as a step of the example, got {got}"
            )
        arguments = self.arguments
        if arguments.length is not None:
            timed = {path: found[path].unsqueeze(arguments.dim) for path in self._expected}
            if plain:
                values |= {path[0]: x for path, x in timed.items()}
            else:
                values = mapped(values, lambda path, leaf: timed.get(path, leaf))
        return self._given | values

    def _run(self, values: dict[str, Any], memories: set[int]) -> Any:
        """The model's answer to one step, after which the states are the next.

        memories: of the arguments, which the caller may write to after the step.
        """
        for memory in self.memories:
            memory.begin(self._fresh)
        if self.feeds:
            given = leaves(values)
            initial = {path: given[path].clone() for path in self.feeds}
            now = merged(self._fresh, initial, self._fed or initial, self.dims)
            if self._fresh is True:
                now = mapped(now, cloned)  # the model may write to it
            values = mapped(values, lambda path, leaf: now.get(path, leaf))
        if self.loop is not None:
            self.loop.begin(self._fresh)
        with self.loop or nullcontext():
            output = self.arguments.call(self.model, values)
        if self.feeds:
            after = leaves(output)
            fed = {path: after[source].detach() for path, source in self.feeds.items()}
            self._fed, self._initial = apart(fed, memories), initial
        for memory in self.memories:
            memory.end(memories)
        if self.loop is not None:
            self.loop.end(memories)
        self._fresh = None
        return output

    def of(self, model: nn.Module) -> Steps:
        """The same for a model whose weights are in other formats."""
        new = Steps(
            model,
            self.arguments,
            self.batch,
            self.feeds,
            self.keeping,
            self.variables,
            self.fast,
        )
        new.dropped, new.no_rows = self.dropped, self.no_rows
        new.dims.update(self.dims)
        new.take(self.arguments.at(0, self.arguments.values))  # its states are known from now on
        new.reset(None)
        return new

    # -- states

    def _slots(self) -> list[tuple[Memory, Slot]]:
        return [
            (memory, slot)
            for memory in self.memories
            for slot in memory.slots
            if slot.kept is not None and memory.keeps
        ]

    def _kept(self) -> list[Any]:
        """The states after the last step."""
        return [*self._carried(), *(slot.kept for _, slot in self._slots())]

    def _carried(self) -> list[Any]:
        """Those that are no module's own."""
        variables = [] if self.loop is None else [*self.loop.kept.values()]
        return [*self._fed.values(), *variables]

    def choices_of_rows(self) -> Iterator[Dims]:
        """What may be the dimensions of rows in the states after the last step."""
        found = {t.shape: rows_dims(t, self.batch) for t in tensors(self._carried())}
        several = {shape: dims for shape, dims in found.items() if len(dims) > 1}
        for choice in islice(product(*several.values()), 16):  # most states have one choice
            yield dict(zip(several, choice, strict=True))

    def _begun(self) -> list[Any]:
        """The states that the rows begun in the last step began with."""
        carried = [] if self.loop is None else [*self.loop.initial.values()]
        return [*carried, *(slot.initial for _, slot in self._slots())]

    def _states(self, fresh: Any) -> list[Any]:
        """What is fed back, by argument, the variables of a loop, and the states of modules."""
        fed = merged(fresh, self._initial, self._fed, self.dims)
        parts = [
            mapped(self._example[name], lambda path, leaf: fed.get(path, leaf), (name,))
            for name in dict.fromkeys(path[0] for path in self.feeds)
        ]
        if self.loop is not None:
            begun, kept = self.loop.initial, self.loop.kept
            parts += [merged(fresh, begun[which], kept[which], self.dims) for which in sorted(kept)]
        for memory, slot in self._slots():
            initial = None if fresh is None else memory.own_form(slot.initial)
            parts.append(merged(fresh, initial, slot.kept))
        return parts

    def states(self) -> list[Any]:
        """Copies, in the form that the model's own code has them in."""
        with self._lock:
            return [mapped(part, cloned) for part in self._states(self._fresh)]

    def set_states(self, parts: Sequence[Any]) -> None:
        """Take over what `states` returned. Raises ValueError for another form or shape."""
        with self._lock:
            names, slots = list(dict.fromkeys(path[0] for path in self.feeds)), self._slots()
            which = [] if self.loop is None else sorted(self.loop.kept)
            forms = [lambda hx: hx] * (len(names) + len(which))
            forms += [memory.own_form for memory, _ in slots]
            new = [
                _like(own, given, form)
                for own, given, form in zip(self._states(None), parts, forms, strict=True)
            ]
            fed = leaves(dict(zip(names, new, strict=False)))
            self._fed = {path: fed[path] for path in self.feeds}
            if self.loop is not None:
                self.loop.kept = dict(zip(which, new[len(names) :], strict=False))
            for (_, slot), state in zip(slots, new[len(names) + len(which) :], strict=True):
                slot.kept = state
            self._fresh = None

    def reset(self, rows: Tensor | None) -> None:
        """Begin anew: all rows, or some: bool [B]."""
        with self._lock:
            if rows is None or bool(rows.all()):
                self._fresh = True
            elif bool(rows.any()) and self._fresh is not True:
                if self.no_rows:
                    raise ValueError(
                        "Stream: expected all rows to be reset, since this model's rows do not "
                        f"begin anew one by one ({self.no_rows}), got some"
                    )
                for state in tensors(self._carried()):
                    rows_dim(state, self.batch, self.dims)
                for state in tensors([slot.kept for _, slot in self._slots()]):
                    rows_dim(state, self.batch, None)
                self._fresh = rows if self._fresh is None else self._fresh | rows


def _memories_in(tree: Any) -> set[int]:
    """Where the memories of nested containers' tensors begin."""
    return {memory_of(t) for t in tensors(tree)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_tensor(value: Any) -> Any:
    if type(value) is np.ndarray:
        return torch.from_numpy(np.array(value, order="C"))
    return value


def _like(own: Any, given: Any, form: Callable[[Any], Any]) -> Any:
    """A copy of a given state in the form, the dtype and on the device of the stream's own."""
    found, owns = leaves(given), leaves(own)
    if found and all(isinstance(t, Tensor) and not t.is_complex() for t in found.values()):
        found = leaves(form(given))
    wanted = {path: (list(t.shape), t.is_floating_point()) for path, t in owns.items()}
    fits = all(isinstance(t, Tensor) for t in found.values())
    if not fits or wanted != {
        path: (list(t.shape), t.is_floating_point()) for path, t in found.items()
    }:
        raise ValueError(
            "Stream: expected state to hold tensors of shape "
            f"{', '.join(str(shape) for shape, _ in wanted.values())}, got "
            f"{', '.join(map(_described, found.values())) or type(given).__name__}"
        )

    def copied_to(path: Path, state: Tensor) -> Tensor:
        new = torch.empty_like(state, memory_format=torch.contiguous_format)
        return new.copy_(found[path])

    return mapped(own, copied_to)


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _fast(model: nn.Module) -> nn.Module:
    """A copy for inference whose recurrent and Linear layers run our kernels where they can."""
    memo: dict[int, Any] = {}
    linears = {linear for linear in plain_linears(model) if linear.weight.dtype == torch.float32}
    recurrent = (*MODULES, *MODULES.values(), *CELL_MODULES, *CELL_MODULES.values())
    for module in model.modules():
        kind: Any = CELL_MODULES.get(type(module))
        try:
            if type(module) in recurrent and not _is_double(module):
                memo[id(module)] = prepare(module, "float32")
            elif kind is not None:
                memo[id(module)] = copied(kind.from_torch(module))
            elif module in linears and not added(module) and not _has_hook(module):
                memo[id(module)] = PreparedLinear(module, "float32")
        except ValueError:
            pass  # pruned, parametrised or changed: it stays as it is
    return copied(model, memo).eval()


def _has_hook(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_double(module: nn.Module) -> bool:
    """Whether prepared weights would have less precision."""
    return any(p.dtype == torch.float64 for p in module.parameters())


def widened(model: nn.Module) -> nn.Module:
    """A copy without 16 or 8 bits in weights, whose rounding would hide differences."""
    result = copied(model).eval()
    for module in result.modules():
        if isinstance(module, Snapshot) and module.weights != "float32":
            module.widen()
    return result
