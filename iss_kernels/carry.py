# SPDX-License-Identifier: Apache-2.0
"""What a stream of any model carries from step to step.

A `Memory` keeps the state of a recurrent module in the place of the initial one that the model's
code makes. A `Loop` does the same for all variables of a loop over the steps, where the code does
more with a state than to hand it to the module.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from iss_kernels.arguments import Path, leaves, mapped, tensors
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import recurrent_types
from iss_kernels.recurrent import CELL_MODULES, Recurrent
from iss_kernels.recurrent_cell import RecurrentCell

Dims: TypeAlias = dict[torch.Size, int]  # of the rows of states, by their shape


class Slot:
    """The state of one call of a module in each step, in the form of its hx."""

    def __init__(self) -> None:
        self.kept: Any = None  # after the last step
        self.next: Any = None  # after the present step, until that is done
        self.initial: Any = None  # what the model's own code hands over; None for zeros


class Memory:
    """Stands before the forward of a recurrent module in a copy of a model.

    It counts the steps that the module takes. Where it `keeps`, it hands the module the state after
    the last step, in the place of the one that the model's code made to begin with.
    """

    def __init__(self, module: Any, name: str, called: list[Memory] | None) -> None:
        self.module, self.name, self._called = module, name, called
        self.keeps = False
        self.trusts = False  # a state that the model's code passes is the present one
        self.loop: Loop | None = None
        self.slots: list[Slot] = []
        self._forward = module.forward
        module.forward = self.forward
        self.begin(True)

    def begin(self, fresh: Any) -> None:
        """Begin a call of the model. fresh: rows that begin anew; all, none (None) or bool [B]."""
        self.calls = self.steps = 0
        self.fresh = fresh

    def end(self, memories: set[int]) -> None:
        """Take over the states after the step; memories: those that belong to the caller."""
        for slot in self.slots[: self.calls]:
            slot.kept, slot.initial = slot.next, apart(slot.initial, memories)

    def forward(self, input: Any, hx: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The module's, with the state that it has now."""
        if self.loop is None:
            return self._run(input, hx, *args, **kwargs)
        return self.loop.whole(self.name, self._run, input, hx, *args, **kwargs)

    def _run(self, input: Any, hx: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps == 0:
            if self._called is not None:
                self._called.append(self)
            self.given = hx
            self.first, self.rows = self._sizes(input)
            self.batched = isinstance(input, PackedSequence) or input.dim() == 3
        self.steps += self._sizes(input)[0]
        if not self.keeps or (self.trusts and hx is not None):
            result = self._forward(input, hx, *args, **kwargs)
            self.returned = self._after(result)
            return result
        slot = self._next_slot()
        result = self._forward(input, self._state(slot, hx), *args, **kwargs)
        slot.next = self._after(result)
        return result

    def _after(self, result: Any) -> Any:
        """The state in what the module returns."""
        return result if isinstance(self.module, nn.RNNCellBase) else result[1]

    def _next_slot(self) -> Slot:
        if self.calls == len(self.slots):
            self.slots.append(Slot())
        self.calls += 1
        return self.slots[self.calls - 1]

    def _state(self, slot: Slot, hx: Any) -> Any:
        """What the module begins with, where the model's code hands over hx."""
        if not _is_same_memory(hx, slot.kept):
            slot.initial = hx
        if self.fresh is True or slot.kept is None:
            return slot.initial
        if self.fresh is None:
            return slot.kept
        return merged(self.fresh, self.own_form(slot.initial), slot.kept)

    def own_form(self, hx: Any) -> Any:
        """hx as the module returns a state: of the width that it has now, if units have left."""
        module = self.module
        if hx is not None and isinstance(module, Recurrent):
            rows = module._initial(hx, self.rows, tensors(hx)[0], None, self.batched)
            return module._final(rows, None, self.batched)
        if hx is not None and isinstance(module, RecurrentCell):
            parts = enumerate(module._states(hx))
            states = tuple(module._widened(state, 0, which) for which, state in parts)
            return states if len(states) > 1 else states[0]
        return hx

    def _sizes(self, input: Any) -> tuple[int, int]:
        """The steps and the rows of an input."""
        if isinstance(self.module, nn.RNNCellBase):
            return 1, int(input.size(0)) if input.dim() == 2 else 1
        if isinstance(input, PackedSequence):
            return len(input.batch_sizes), int(input.batch_sizes[0])
        if input.dim() == 2:
            return int(input.size(0)), 1
        rows, steps = input.shape[:2] if self.module.batch_first else input.shape[1::-1]
        return int(steps), int(rows)


class Variables(NamedTuple):
    """The variables of a loop in a model's code, by number.

    names: of the calls of torch functions and recurrent modules for one step, in order. uses: where
    the loop reads a variable that was made before it, by the number of the call and by where it is
    in the arguments. makes: where the next value is, in the result of a call.
    """

    names: list[str]
    uses: dict[int, dict[Path, int]]
    makes: dict[int, dict[Path, int]]


class Loop(TorchFunctionMode):
    """Carries the variables of a loop in a model's code from one step of a stream to the next.

    Code may look at a state before the recurrent module does, as attention that asks with h, mask
    it, or have further states. In a step of the stream the loop runs once: what it has at its end
    takes the place of what it begins with in the next step. Without `variables`, it records.
    """

    def __init__(self, variables: Variables | None = None) -> None:
        super().__init__()
        self.records = variables is None
        self.variables = variables or Variables([], {}, {})
        self.dims: Dims = {}
        self.kept: dict[int, Tensor] = {}
        self.initial: dict[int, Tensor] = {}  # as the model's code last made it
        # The name, and the tensors given and made, of each call; holding them keeps ids apart.
        self.calls: list[tuple[str, dict[Path, Tensor], dict[Path, Tensor]]] = []
        self.begin(True)

    def begin(self, fresh: Any) -> None:
        """Begin a step. fresh: as in `Memory`."""
        self.fresh, self.count = fresh, 0
        self.next: dict[int, Tensor] = {}

    def end(self, memories: set[int]) -> None:
        """Take over the values after the step; memories: those that belong to the caller."""
        self._expect(self.count, "the end")
        self.kept, self.initial = apart(self.next, memories), apart(self.initial, memories)

    def _expect(self, index: int, name: str) -> None:
        """Raise RuntimeError where the code takes another way than for the example."""
        names = [*self.variables.names[index : index + 1], "the end"]
        if not self.records and name != names[0]:
            raise RuntimeError(
                f"Stream: expected the model's code to call {names[0]} here, as for the example, "
                f"got {name}"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function."""
        return self.call(getattr(func, "__name__", str(func)), func, args, kwargs or {})

    def watch(self, model: nn.Module, memories: Iterable[Memory]) -> None:
        """See the calls of a model's recurrent and Linear layers, by kernels too, as one call each.

        memories: those of the model.
        """
        for memory in memories:
            memory.loop = self
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, PreparedLinear):
                module.forward = partial(self.whole, name, module.forward)

    def whole(self, name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a layer; what happens inside of it is one call."""
        with _pop_mode_temporarily():
            return self.call(name, forward, args, kwargs)

    def call(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, with the present variables among its arguments."""
        index, self.count = self.count, self.count + 1
        self._expect(index, name)
        if index in self.variables.uses:
            present = partial(self._present, self.variables.uses[index])
            args, kwargs = mapped((args, kwargs), present)
        result = function(*args, **kwargs)
        if self.records:
            given, made = (
                {path: t for path, t in leaves(tree).items() if isinstance(t, Tensor)}
                for tree in ((args, kwargs), result)
            )
            self.calls.append((name, given, made))
        if index in self.variables.makes:
            made, makes = leaves(result), self.variables.makes[index]
            self.next |= {which: made[path] for path, which in makes.items()}
        return result

    def _present(self, uses: dict[Path, int], path: Path, leaf: Any) -> Any:
        which = uses.get(path)
        if which is None:
            return leaf
        self.initial[which] = leaf
        if self.fresh is True or which not in self.kept:
            return leaf
        return merged(self.fresh, leaf, self.kept[which], self.dims)


def loops_in(one: Loop, two: Loop) -> list[Variables]:
    """What may be the variables of a loop over the steps.

    one, two: records of the same code for one step and for two.
    """
    names, twice = ([name for name, _, _ in loop.calls] for loop in (one, two))
    length = len(twice) - len(names)  # calls of an iteration
    made: dict[int, tuple[int, Path]] = {}
    for index, (_, _, results) in enumerate(two.calls):
        for path, leaf in results.items():
            made.setdefault(id(leaf), (index, path))
    found: list[Variables] = []
    for begin in range(len(names) - length, -1, -1) if length > 0 else ():
        end = begin + length
        if twice[:begin] + twice[end:] != names or twice[begin:end] != twice[end : end + length]:
            continue
        choice = Variables(names, {}, {})
        numbers: dict[tuple[int, Path], int] = {}
        for index in range(begin, end):
            first, second = two.calls[index][1], two.calls[index + length][1]
            for path in first.keys() & second.keys():
                before, after = (made.get(id(t[path]), (-1, ())) for t in (first, second))
                # Made before the loop, and in the second iteration by the first.
                if before[0] < begin <= after[0] < end:
                    which = numbers.setdefault(after, len(numbers))
                    choice.uses.setdefault(index, {})[path] = which
                    choice.makes.setdefault(after[0], {})[after[1]] = which
        if numbers and choice not in found:
            found.append(choice)
    return found


def _is_same_memory(hx: Any, kept: Any) -> bool:
    """Whether a model's code hands over the very state that the module returned."""
    if hx is None or kept is None:
        return False
    given, own = tensors(hx), tensors(kept)
    return [memory_of(t) for t in given] == [memory_of(t) for t in own]


def memory_of(t: Tensor) -> int:
    """Where the memory of a tensor begins, which its views share; 0 of a sparse one."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else 0


def apart(state: Any, memories: set[int]) -> Any:
    """A state with copies of the tensors that lie in one of these memories."""

    def own(_: Path, leaf: Any) -> Any:
        shared = isinstance(leaf, Tensor) and memory_of(leaf) in memories
        return leaf.clone() if shared else leaf

    return mapped(state, own)


def merged(fresh: Any, initial: Any, kept: Any, dims: Dims | None = None) -> Any:
    """States in the form of `kept`, with B rows: those of `initial` (zeros for None) where fresh.

    fresh: all rows (True), none (None), or bool [B]. dims: as in `rows_dim`.
    """
    if fresh is None:
        return kept
    begin = None if initial is None else leaves(initial)

    def choose(path: Path, state: Tensor) -> Tensor:
        first = torch.zeros_like(state) if begin is None else begin[path].to(state)
        if fresh is True:
            return first.expand_as(state)
        mask = fresh.view(-1, *[1] * (state.dim() - 1 - rows_dim(state, len(fresh), dims)))
        return torch.where(mask, first, state)

    return mapped(kept, choose)


def rows_dim(state: Tensor, batch: int, dims: Dims | None) -> int:
    """The dimension of a state's rows; ValueError where none may be. dims: by shape, where known.

    Without dims, the state is a recurrent module's.
    """
    found = rows_dims(state, batch)
    if dims is None:
        found = [dim for dim in found if dim == state.dim() - 2]
    elif state.shape in dims:
        found = [dims[state.shape]]
    if not found:
        raise ValueError(
            f"Stream: expected states with B = {batch} rows, got one of shape {list(state.shape)}"
        )
    return found[0]


def rows_dims(state: Tensor, batch: int) -> list[int]:
    """The dimensions that may be a state's rows, the likeliest first: [..., B, H], [B, ...]."""
    order = dict.fromkeys((state.dim() - 2, *range(state.dim())))
    return [dim for dim in order if dim >= 0 and state.size(dim) == batch]


def recurrent_in(model: nn.Module) -> dict[str, nn.Module]:
    """The recurrent modules and cells, by name, with torch's forward or ours."""
    known = {kind.forward for kind in (*recurrent_types(), *CELL_MODULES, *CELL_MODULES.values())}
    return {
        name or "the layer": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and type(module).forward in known
    }


def memories_of(model: nn.Module, called: list[Memory] | None = None) -> list[Memory]:
    """One for each recurrent module; in `called` are noted those that are, in that order."""
    return [Memory(module, name, called) for name, module in recurrent_in(model).items()]
