# SPDX-License-Identifier: Apache-2.0
"""Whether a model can be streamed: compares its steps with whole sequences.

No look at a model's code can tell that every part of it treats each step alone. So the steps of an
engine (steps.py) run beside whole sequences: the example, random continuations of its first half,
and rows that begin anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iss_kernels.arguments import (
    Arguments,
    Path,
    as_tensor,
    brief,
    cloned,
    leaves,
    mapped,
    named,
    tensors,
)
from iss_kernels.carry import Loop, Memory, Variables, loops_in, memories_of, recurrent_in
from iss_kernels.chain import BOTH_WAYS, device_of
from iss_kernels.copying import copied
from iss_kernels.steps import Steps, widened
from iss_kernels.stored import Snapshot


class _Refused(Exception):
    """Why a model cannot be streamed."""


class _Alike(ValueError):
    """An example verifies nothing."""


class _Output(NamedTuple):
    """Where an output of a whole sequence has the steps.

    kind: "steps", in a dimension of their own; "rows", in one dimension with the batch, step by
    step; "columns", the same, row by row; "last": nowhere, it is that of the last step; "count": it
    is their number.
    """

    kind: str
    dim: int = 0

    def at(self, whole: Tensor, step: int, steps: int) -> Tensor:
        """The output of one step, of what a sequence of `steps` has put out."""
        if self.kind == "steps":
            return whole.select(self.dim, step)
        begin, end = whole.shape[: self.dim], whole.shape[self.dim + 1 :]
        if self.kind == "rows":
            return whole.reshape(*begin, steps, -1, *end).select(self.dim, step)
        return whole.reshape(*begin, -1, steps, *end).select(self.dim + 1, step)


class _Way(NamedTuple):
    """How a model may be streamed.

    streamed: paths of arguments. feeds: states that the model takes and returns. keeping: modules
    that keep their state between steps. variables: those of the model's own loop.
    """

    streamed: list[Path]
    feeds: dict[Path, Path]
    keeping: set[str]
    variables: Variables | None


class _Verifier:
    """Compares steps of a model with whole sequences."""

    def __init__(self, model: nn.Module, arguments: Arguments, batch: int) -> None:
        self.model, self.arguments, self.batch = model, arguments, batch
        # Outputs for the example, and for the example without its last step.
        self.long: dict[Path, Any] = {}
        self.short: dict[Path, Any] = {}
        self.eps = torch.finfo(torch.float32).eps
        for t in (*model.parameters(), *model.buffers(), *tensors(arguments.values)):
            if t.is_floating_point():
                self.eps = max(self.eps, torch.finfo(t.dtype).eps)
            if t.is_cuda:
                self.eps = max(self.eps, 2**-10)  # TF32
        if not _is_float32_exact():
            self.eps = max(self.eps, 2**-8)

    def whole(self, values: dict[str, Any], inside: bool = False) -> dict[Path, Any]:
        """What the model, or each module inside, puts out for a whole sequence.

        It is run by a copy that no other call has changed. Sets `called`: the recurrent modules, in
        the order of their first calls.
        """
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters()}
        model = copied(self.model, memo)
        self.called: list[Memory] = []
        memories_of(model, self.called)
        with self.random(), _listening(model, inside) as found:
            output = self.arguments.call(model, mapped(values, cloned))
        return found if inside else leaves(output)

    def prefix(self, values: dict[str, Any], count: int, inside: bool = False) -> dict[Path, Any]:
        """The same for the first `count` steps."""
        return self.whole(self.arguments.part(0, count, values), inside)

    def steps(self, engine: Steps, values: dict[str, Any], start: int, stop: int) -> list[Any]:
        """What the engine puts out for these steps, one by one."""
        return [self.step(engine, self.arguments.at(step, values)) for step in range(start, stop)]

    def step(self, engine: Steps, values: dict[str, Any]) -> dict[Path, Any]:
        """What the engine puts out for one step."""
        with self.random():
            return dict(mapped(leaves(engine.take(values)), cloned))

    def random(self) -> AbstractContextManager[None]:
        """The same random numbers for each call, as an initial state may be made of."""
        used = {p.device for p in self.model.parameters() if p.is_cuda}
        return torch.random.fork_rng(used)

    def time_dims(self) -> list[tuple[int, int]]:
        """Dimensions of arguments that have as many steps as a recurrent module takes, and these.

        The likeliest first. Empty for a model that takes one step per call.
        """
        found = self.arguments.candidates()
        if not found:
            raise ValueError("Stream: expected an example with a tensor to stream, got none")
        if all(memory.steps == 1 for memory in self.called):
            return []
        dims = []
        most = max(leaf.dim() for leaf in found.values())
        for memory in self.called:
            # The batch comes first in most models whose loops call cells.
            turned = getattr(memory.module, "batch_first", True)
            order = [1, 0, *range(2, most)] if turned and most > 1 else range(most)
            for dim in order:
                for steps in (memory.first, memory.steps):
                    fits = [t.dim() > dim and t.size(dim) == steps for t in found.values()]
                    dims += [(dim, steps)] * (steps > 1 and any(fits))
        if not dims:
            took = " and ".join(f"{memory.steps} of {memory.name}" for memory in self.called)
            shapes = ", ".join(f"{named(path)} {list(t.shape)}" for path, t in found.items())
            raise ValueError(
                "Stream: expected an example in which some dimension has the steps that a "
                f"recurrent module takes ({took or 'none is called'}), got {shapes}"
            )
        return list(dict.fromkeys(dims))

    def streams(self, time_dim: int | None) -> Iterator[list[Path]]:
        """Choices of the arguments that are streamed, the likeliest first."""
        arguments = self.arguments
        dims = self.time_dims() if time_dim is None else [(time_dim, None)]
        for dim, steps in dims:
            arguments.stream(dim, steps)
            together = arguments.streamed
            yield together
            if arguments.fill():
                yield together
                arguments.stream(dim, steps)
            if len(together) > 1:
                yield from ([path] for path in together)
        if not dims:
            yield [next(iter(arguments.candidates()))]

    def ways(self, streamed: list[Path], output: dict[Path, Any]) -> Iterator[_Way]:
        """Ways to stream a model. output: what it puts out for the example."""
        arguments = self.arguments
        arguments.streamed = streamed
        if arguments.length is None:
            self.expect_rows(self.called[0].rows if self.called else self.batch)
            yield _Way(streamed, self.feeds_of_one_step(output), set(), None)
            return
        count = arguments.length
        if count < 3:
            raise ValueError(f"Stream: expected an example of at least 3 steps, got {count}")
        values = leaves(arguments.values)
        if not any(_varies(values[path], arguments.dim) for path in streamed):
            raise ValueError(
                "Stream: expected an example whose steps differ, by which the model could be "
                f"verified, got {count} equal ones"
            )
        try:
            self.long = self.prefix(arguments.values, count)
            taken = {memory.name: memory.steps for memory in self.called}
            self.short = self.prefix(arguments.values, count - 1)
        except Exception as error:
            raise ValueError(
                "Stream: expected a model that takes any number of steps, got one that fails on "
                f"fewer than {count} with {brief(error)}"
            ) from error
        keeping = [memory for memory in self.called if taken.get(memory.name) != memory.steps]
        both_ways = [m.name for m in keeping if getattr(m.module, "bidirectional", False)]
        if both_ways:
            raise ValueError(BOTH_WAYS.format(f"{both_ways[0]}, a bidirectional one"))
        self.expect_rows(keeping[0].rows if keeping else (*arguments.shape(), 1)[0])
        names = {memory.name for memory in keeping}
        if keeping:
            yield _Way(streamed, {}, names, None)
        same = {
            path: leaf
            for path, leaf in self.long.items()
            if isinstance(leaf, Tensor) and leaf.shape == getattr(self.short.get(path), "shape", 0)
        }
        if feeds := self.feeds(same):
            yield _Way(streamed, feeds, names, None)
        for variables in self.loops()[:6]:  # where it begins in the calls may be unclear
            yield _Way(streamed, {}, names, variables)

    def expect_rows(self, rows: int) -> None:
        """Take over the example's rows where no batch_size says how many; ValueError for others."""
        batch, shape = self.batch, self.arguments.shape()
        if rows == batch or (rows % batch == 0 and batch in shape):  # one may hold many sequences
            return
        if batch > 1:
            raise ValueError(
                f"Stream: expected an example with batch_size = {batch} rows, got {rows}"
            )
        self.batch = rows

    def loops(self) -> list[Variables]:
        """What may be the variables of a loop over the steps in the model's code."""
        records = []
        for count in (1, 2):
            model = copied(self.model, {id(p): p for p in self.model.parameters()})
            record, values = Loop(), self.arguments.part(0, count)
            record.watch(model, memories_of(model))
            try:
                with self.random(), record:
                    self.arguments.call(model, values)
            except Exception:  # as the steps themselves have done
                return []
            records.append(record)
        return loops_in(*records)

    def feeds_of_one_step(self, output: dict[Path, Any]) -> dict[Path, Path]:
        """`feeds` for a model that takes one step per call, and its state.

        The states of recurrent modules are known by what the modules take and return, others by
        their shapes, in order. The first output is no state, unless no other can be one.
        """
        returned = {path: leaf for path, leaf in output.items() if isinstance(leaf, Tensor)}
        kinds = dict.fromkeys(map(_kind, returned.values()))
        given = {
            path: leaf
            for path, leaf in leaves(self.arguments.values).items()
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and _kind(leaf) in kinds
            if path not in self.arguments.streamed and path[0] not in self.arguments.fixed
        }
        begins = self.begins(given)
        feeds = self.feeds_of_modules(given, returned, begins)
        answer, unclear = next(iter(returned), None), []
        for kind in kinds:
            paths = [path for path in given if _kind(given[path]) == kind and path not in feeds]
            sources = [
                path
                for path, leaf in returned.items()
                if _kind(leaf) == kind and path not in feeds.values()
            ]
            if len(paths) == len(sources) and answer not in sources:
                feeds |= zip(paths, sources, strict=True)
            elif paths and sources:
                unclear.append((paths, sources))
        if not feeds and len(unclear) == 1 and len(unclear[0][0]) == len(unclear[0][1]):
            feeds = dict(zip(*unclear.pop(), strict=True))
        if unclear or not any(begins[path] for path in feeds):
            got = "none of these"
            if unclear:
                paths, sources = unclear[0]
                shape = list(given[paths[0]].shape)
                got = f"{len(paths)} arguments and {len(sources)} outputs of shape {shape}"
            raise ValueError(
                "Stream: expected an example of at least 3 steps, or of one step and the state "
                "before it, of which the model returns the next after its answer, and fixed= for "
                f"what is no state, got {got}"
            )
        return {path: feeds[path] for path in given if path in feeds}

    def begins(self, given: dict[Path, Tensor]) -> dict[Path, set[tuple[str, int]]]:
        """The states that recurrent modules begin with which change with an argument."""

        def begun(values: dict[str, Any]) -> dict[tuple[str, int], Tensor]:
            self.whole(values)
            return _numbered([(memory.name, memory.given) for memory in self.called])

        values, found = self.arguments.values, {}
        before = begun(values)
        for path in given:
            after = begun(mapped(values, partial(_raised, path, 1)))
            same = before.keys() & after.keys()
            found[path] = {state for state in same if not before[state].equal(after[state])}
        return found

    def feeds_of_modules(
        self,
        given: dict[Path, Tensor],
        returned: dict[Path, Tensor],
        begins: dict[Path, set[tuple[str, int]]],
    ) -> dict[Path, Path]:
        """Of arguments that recurrent modules begin with: the outputs that are what they return."""
        self.whole(self.arguments.values)
        after = _numbered([(memory.name, memory.returned) for memory in self.called])
        choices = {
            path: [
                source
                for source, leaf in returned.items()
                if _kind(leaf) == _kind(given[path])
                and any(_is_same(leaf, after[state]) for state in states & after.keys())
            ]
            for path, states in begins.items()
        }
        feeds: dict[Path, Path] = {}
        while True:
            count = Counter(found[0] for found in choices.values() if len(found) == 1)
            new = {
                path: found[0]
                for path, found in choices.items()
                if len(found) == 1 and count[found[0]] == 1
            }
            if not new:
                return feeds
            feeds |= new
            choices = {
                path: [source for source in found if source not in new.values()]
                for path, found in choices.items()
                if path not in new
            }

    def feeds(self, outputs: dict[Path, Any]) -> dict[Path, Path]:
        """Arguments that may be states, each with the output that may be the next; in order."""
        found: dict[Path, Path] = {}
        rest = [(path, leaf) for path, leaf in outputs.items() if isinstance(leaf, Tensor)]
        for path, given in self.arguments.candidates().items():
            if path in self.arguments.streamed or not given.is_floating_point():
                continue
            for index, (source, leaf) in enumerate(rest):
                if (leaf.shape, leaf.dtype) == (given.shape, given.dtype):
                    found[path] = source
                    rest = rest[index + 1 :]
                    break
        return found

    def verify_one_step(self, engine: Steps) -> None:
        """As `verify`, with the model itself in a loop."""
        arguments = self.arguments
        fed = {path: leaves(arguments.values)[path] for path in engine.feeds}
        for seed in range(4):
            values = arguments.continued(0, seed)
            whole = self.whole(mapped(values, partial(_exchanged, fed)))
            given = self.step(engine, arguments.at(0, values))
            for path, leaf in whole.items():
                self.equal(leaf, given[path], leaf, path, seed)
            fed = {path: whole[source] for path, source in engine.feeds.items()}
        values = arguments.continued(0, 4)
        late, early = self.whole(mapped(values, partial(_exchanged, fed))), self.whole(values)

        def begin() -> None:
            for seed in range(4):
                self.step(engine, arguments.at(0, arguments.continued(0, seed)))

        def check(rows: Tensor) -> bool:
            given = self.step(engine, arguments.at(0, values))
            return any([
                self.equal_rows(
                    rows, early[path], late[path], given[path], path, 4,
                    path not in engine.feeds.values(),
                )
                for path in late
            ])  # fmt: skip

        self.try_rows(engine, begin, check)

    def verify(self, engine: Steps) -> None:
        """Raise _Refused for an engine whose steps are not the model's; leave it at the start."""
        arguments, count = self.arguments, self.arguments.length
        if count is None:
            return self.verify_one_step(engine)
        example = arguments.values
        given = self.steps(engine, example, 0, count)
        outputs = self.outputs(self.long, self.short, given)
        engine.dropped = {
            path: output.dim
            for path, output in outputs.items()
            if output.kind == "steps" and given[0][path].dim() == self.long[path].dim()
        }
        wholes = {count: self.long, count - 1: self.short}
        if any(output.kind == "last" for output in outputs.values()):
            wholes |= {n: self.prefix(example, n) for n in {2, count // 2} if 0 < n < count - 1}
        given = []
        for seed in (None, 1, 2):
            if seed is not None:
                example = arguments.continued(count // 2, seed)
                wholes = {count: self.whole(example)}
            engine.reset(None)
            steps = self.steps(engine, example, 0, count)
            self.compare(outputs, steps, wholes)
            given += steps
        if not any(_differ([step[path] for step in given]) for path in outputs):
            raise _Alike(
                "Stream: expected an example on which the answers differ, by which the model could "
                f"be verified, got {count} equal ones"
            )
        self.verify_rows(engine, outputs, example, wholes[count])
        return None

    def verify_rows(
        self, engine: Steps, outputs: dict[Path, _Output], values: Any, whole: dict[Path, Any]
    ) -> None:
        """Compare rows that are reset with a sequence that begins there, others with `whole`."""
        count, half = self.arguments.length or 0, (self.arguments.length or 0) // 2
        anew: dict[Path, Any] = {}

        def check(rows: Tensor) -> bool:
            given = self.steps(engine, values, half, count)
            anew.update(anew or self.whole(self.arguments.part(half, count - half, values)))
            checked = False
            for path, output in outputs.items():
                for step, out in enumerate(given, start=half):
                    if output.kind in ("steps", "rows", "columns"):
                        late = output.at(whole[path], step, count)
                        early = output.at(anew[path], step - half, count - half)
                        checked |= self.equal_rows(rows, early, late, out[path], path, step)
                if output.kind == "last":
                    checked |= self.equal_rows(
                        rows, anew[path], whole[path], given[-1][path], path, count - 1, False
                    )
            return checked

        self.try_rows(engine, lambda: self.steps(engine, values, 0, half), check)

    def try_rows(
        self, engine: Steps, begin: Callable[[], Any], check: Callable[[Tensor], bool]
    ) -> None:
        """Find where the states have their rows; if nowhere, the engine knows why.

        begin: runs the first steps. check: runs more after some rows, bool [B], have been reset,
        and says whether their outputs show rows.
        """
        rows, refusal = torch.arange(self.batch, device="cpu") % 2 == 0, ""
        engine.reset(None)
        begin()
        for number, choice in enumerate([*engine.choices_of_rows()]):
            engine.dims.clear()
            engine.dims.update(choice)
            if number > 0:
                engine.reset(None)
                begin()
            try:
                engine.reset(rows.to(engine.device))
                if check(rows):
                    refusal = ""
                    break
                refusal = refusal or "no output shows its rows"
            except (_Refused, RuntimeError, ValueError, KeyError) as error:
                refusal = refusal or brief(error)
        engine.no_rows = refusal
        engine.reset(None)

    def equal_rows(
        self,
        rows: Tensor,
        early: Any,
        late: Any,
        given: Any,
        path: Path,
        step: int,
        leads: bool = True,
    ) -> bool:
        """Raise _Refused where an output is not `early` in these rows, `late` in others.

        leads: rows come first where several dimensions have B elements. False where it is unclear
        which are the rows, or none.
        """
        late = as_tensor(late)
        dims = [dim for dim in range(late.dim()) if late.size(dim) == self.batch]
        if not dims or (len(dims) > 1 and (dims[0] > 0 or not (leads or late.dim() < 3))):
            return False
        mask = rows.view(-1, *[1] * (late.dim() - 1 - dims[0])).to(late.device)
        self.equal(torch.where(mask, as_tensor(early), late), given, late, path, step)
        return True

    def outputs(
        self, long: dict[Path, Any], short: dict[Path, Any], given: list[dict[Path, Any]]
    ) -> dict[Path, _Output]:
        """Where each output has the steps."""
        if not long.keys() == short.keys() == given[0].keys():
            raise _Refused("which returns other things for one step than for several")
        found = {path: self._output(path, long, short, given) for path in long}
        if not any(as_tensor(leaf).isfinite().any() for leaf in long.values()):
            raise _Refused("which returns no finite number, by which it could be verified")
        return found

    def _output(self, path: Path, long: Any, short: Any, given: Any) -> _Output:
        count = self.arguments.length or 0
        whole, less, one = (as_tensor(part[path]) for part in (long, short, given[0]))
        name = _output_name(path)
        if whole.dim() != less.dim():
            raise _Refused(f"whose {name} has another number of dimensions for fewer steps")
        changed = [dim for dim in range(whole.dim()) if whole.size(dim) != less.size(dim)]
        if not changed:
            counted = ((whole, count), (less, count - 1), (one, 1))
            whole_numbers = not (whole.is_floating_point() or whole.is_complex())
            if whole_numbers and all((t == number).all() for t, number in counted):
                return _Output("count")
            return _Output("last")
        dim = changed[0]
        sizes = whole.size(dim), less.size(dim)
        if len(changed) > 1 or sizes[0] * (count - 1) != sizes[1] * count:
            raise _Refused(
                f"whose {name} of shape {list(whole.shape)} becomes {list(less.shape)} with one "
                f"step less than {count}"
            )
        if sizes[0] == count:
            # A batch of one row may have gone into the dimension of the steps.
            alone = self.batch == 1 and self.arguments.is_batch(self.batch)
            if alone and one.dim() == whole.dim() and whole.select(dim, 0).shape[:1] != (1,):
                return _Output("rows", dim)
            return _Output("steps", dim)
        rows = _Output("rows", dim)
        try:
            self.compare({path: rows}, given, {count: long})
        except _Refused:
            return _Output("columns", dim)
        return rows

    def compare(
        self, outputs: dict[Path, _Output], given: list[dict[Path, Any]], wholes: dict[int, Any]
    ) -> None:
        """Raise _Refused where the outputs of steps are not those of whole sequences.

        wholes: outputs by the number of steps.
        """
        count = max(wholes)
        for path, output in outputs.items():
            whole, spread = wholes[count][path], _spread([out[path] for out in given])
            for step, out in enumerate(given):
                if output.kind == "last" and step + 1 in wholes:
                    expected = wholes[step + 1][path]
                elif output.kind in ("steps", "rows", "columns"):
                    expected = output.at(whole, step, count)
                else:
                    continue
                self.equal(expected, out[path], whole, path, step, spread)

    def equal(
        self, expected: Any, given: Any, whole: Any, path: Path, step: int, spread: float = 0.0
    ) -> None:
        """Raise _Refused for another output. spread: how far it is from its mean over the steps."""
        expected, given, whole = map(as_tensor, (expected, given, whole))
        which = f"whose {_output_name(path)} at step {step + 1}"
        if (expected.shape, expected.dtype) != (given.shape, given.dtype):
            shapes = [f"{list(t.shape)} of {t.dtype}" for t in (given, expected)]
            raise _Refused(f"{which} is {shapes[0]}, that of the whole sequence {shapes[1]}")
        if not (whole.is_floating_point() or whole.is_complex()):
            if not torch.equal(expected, given):
                raise _Refused(f"{which} differs from that of the whole sequence")
            return
        largest = _largest(whole)
        # Rounding grows on its way to the output, yet stays far below what another step makes: 7e-5
        # in float32. A constant in the output is rounded once, and says nothing of the steps.
        coarse = self.eps**0.6
        fine = min(64 * self.eps, coarse)
        atol = max(min(spread or largest, largest) * coarse, largest * fine)
        close = expected.isclose(given, rtol=0, atol=atol, equal_nan=True)
        if not (close.all() or (close | expected.isclose(given, rtol=fine, atol=0)).all()):
            by = (expected - given).abs().double().nan_to_num(float("inf")).max().item()
            raise _Refused(f"{which} differs by {by:.2g} from that of the whole sequence")

    def culprit(self, engine: Steps) -> str:
        """The first module whose own output shows the difference, in words."""
        count = self.arguments.length
        if count is None:
            return ""
        long, short = (
            self.prefix(self.arguments.values, n, inside=True) for n in (count, count - 1)
        )
        engine.reset(None)
        given = []
        for step in range(count):
            with _listening(engine.model) as inside:
                engine.take(self.arguments.at(step, self.arguments.values))
            given.append(inside)
        modules = dict(self.model.named_modules())
        for path in long:
            if path in short and all(path in inside for inside in given):
                try:
                    output = self._output(path, long, short, given)
                    shown = [
                        {path: inside[path].squeeze(output.dim)}
                        if output.kind == "steps" and inside[path].dim() == long[path].dim()
                        else inside
                        for inside in given
                    ]
                    self.compare({path: output}, shown, {count: long, count - 1: short})
                except _Refused:
                    return f", first in {path[0]} ({type(modules[path[0]]).__name__})"
        return ""


def _is_float32_exact() -> bool:
    """Whether products of float32 are computed as such; unknown where it is set by backend."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False


def _largest(t: Tensor) -> float:
    """The largest magnitude, but for one that comes again far above all else, as of a mask."""
    values = t.where(t.isfinite(), 0).abs()
    largest = float(values.max()) if values.numel() > 0 else 0.0
    while True:
        same = values == largest
        values = values.where(~same, 0)
        rest = float(values.max()) if values.numel() > 0 else 0.0
        if rest == 0 or rest > largest / 100 or int(same.sum()) == 1:
            return largest
        largest = rest


def _differ(steps: list[Any]) -> bool:
    """Whether an output is not the same in all steps."""
    first, *rest = map(as_tensor, steps)
    return not all(first.equal(other) for other in rest)


def _spread(steps: list[Any]) -> float:
    """How far an output, of the same shape in all steps, is from its mean; 0 where unknown."""
    values = [as_tensor(leaf) for leaf in steps]
    if len({value.shape for value in values}) > 1 or not values[0].is_floating_point():
        return 0.0
    stacked = torch.stack(values).double()
    far = (stacked - stacked.mean(0)).abs()
    return float(far.where(far.isfinite(), 0).max()) if far.numel() > 0 else 0.0


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype]:
    return t.shape, t.dtype


def _numbered(states: list[tuple[str, Any]]) -> dict[tuple[str, int], Tensor]:
    """The tensors of the states of modules, by name and number."""
    return {(name, i): t for name, state in states for i, t in enumerate(tensors(state))}


def _is_same(output: Tensor, state: Tensor) -> bool:
    """Whether an output is a state, but for its form."""
    return output.dtype == state.dtype and output.flatten().equal(state.flatten())


def _varies(t: Tensor, dim: int) -> bool:
    """Whether steps can be drawn that differ; real numbers are drawn in any case."""
    return t.is_floating_point() or not torch.equal(t, t.narrow(dim, 0, 1).expand_as(t))


def _raised(which: Path, by: int, path: Path, leaf: Any) -> Any:
    return leaf + by if path == which else leaf


def _exchanged(new: dict[Path, Any], path: Path, leaf: Any) -> Any:
    return new.get(path, leaf)


def _output_name(path: Path) -> str:
    return "output" + "".join(f"[{key!r}]" for key in path)


@contextmanager
def _listening(model: nn.Module, listens: bool = True) -> Iterator[dict[Path, Any]]:
    """The tensors that each module puts out, by name; of those that are called once."""
    found: dict[Path, Any] = {}
    calls: Counter[str] = Counter()

    def listen(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] += 1
        found.update({
            (name, *path): leaf.detach().clone()
            for path, leaf in leaves(output).items()
            if isinstance(leaf, Tensor)
        })  # fmt: skip

    handles = [
        module.register_forward_hook(partial(listen, name))
        for name, module in model.named_modules()
        if name and listens
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for path in [path for path in found if calls[path[0]] > 1]:
            del found[path]


# -- making an engine ------------------------------------------------------------------------------


def steps_of(model: nn.Module, batch: int, example: Any, time_dim: int | None, fixed: Any) -> Steps:
    """The engine of a stream for a model that is called as `example` is. Raises ValueError."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if "forward" in vars(module):  # a copy of it may lead to the original's weights
            raise ValueError(
                "Stream: expected a model with the forward methods of its classes, got one set on "
                f"the instance of {path or 'the model'}"
            )
    device_of([model])
    try:
        plain = widened(model)
    except Exception as error:
        raise ValueError(
            f"Stream: expected a model that can be copied, got {name} with {brief(error)}"
        ) from error
    if not recurrent_in(model) and time_dim is None:
        kin = (nn.RNNBase, nn.RNNCellBase)
        others = [path or name for path, m in model.named_modules() if isinstance(m, kin)]
        raise ValueError(
            "Stream: expected a model with a recurrent layer, got one without"
            + f" but {', '.join(others)}, of a subclass" * bool(others)
        )
    arguments = Arguments(model, example, fixed)
    verifier = _Verifier(plain, arguments, batch)
    try:
        output = verifier.whole(arguments.values)
    except Exception as error:
        raise ValueError(
            "Stream: expected a model that takes the example in eval mode, got "
            f"{name} with {brief(error)}{_dtypes(model, arguments)}"
        ) from error
    refusal = None
    for streamed in verifier.streams(time_dim):
        try:
            engine = _first_right(model, verifier, verifier.ways(streamed, output))
        except ValueError as error:
            refusal = refusal or error
        else:
            arguments.example = arguments.values = {}  # let their memory go
            return engine
    assert refusal is not None
    raise refusal


def _dtypes(model: nn.Module, arguments: Arguments) -> str:
    """The dtypes of a model and its example where these are others, in words."""
    weights, example = (
        {str(t.dtype).removeprefix("torch.") for t in found if t.is_floating_point()}
        for found in ((*model.parameters(), *model.buffers()), tensors(arguments.values))
    )
    if not weights or len(weights | example) == 1:
        return ""
    own, given = (" and ".join(sorted(dtypes)) for dtypes in (weights, example))
    return f" (weights of {own}, an example of {given})" if given else ""


def _first_right(model: nn.Module, verifier: _Verifier, ways: Iterator[_Way]) -> Steps:
    """The engine of the first way that stands the verification."""
    arguments = verifier.arguments
    refusal: tuple[_Refused, Steps, list[Path]] | None = None
    for way in ways:
        arguments.streamed = way.streamed
        for fast in (True, False):
            engine = Steps(verifier.model, arguments, verifier.batch, *way[1:], fast)
            try:
                verifier.verify(engine)
            except _Refused as refused:
                refusal = refusal or (refused, engine, way.streamed)
                break
            except _Alike:
                raise
            except Exception as error:  # the code may look for something in its own modules
                failed = _Refused(f"which fails on a sequence or a step of one: {brief(error)}")
                refusal = refusal or (failed, engine, way.streamed)
                continue
            prepared = [module for module in model.modules() if isinstance(module, Snapshot)]
            coarse = any(module.weights != "float32" for module in prepared)
            return engine.of(model) if coarse else engine
    if refusal is None:
        raise ValueError(
            "Stream: expected a recurrent module, or a loop in the model's code, that runs over "
            "the steps of the example, got none"
        )
    why, engine, arguments.streamed = refusal
    where = ""
    with suppress(Exception):  # it may fail half way, as the verification may have
        where = verifier.culprit(engine)
    raise ValueError(
        "Stream: expected a causal model, whose memory is the state of its recurrent modules or "
        f"the variables of a loop over the steps, got {type(model).__name__}, {why}{where}"
    ) from why
