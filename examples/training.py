# SPDX-License-Identifier: Apache-2.0
"""The training loop of the examples: units that die leave during training, and it can be resumed.

A `Trainer` knows one batch and one epoch; everything that the next batch depends on is in its
`state_dict`, so that a resumed run has the same bits. `fit` runs it to the end in a folder, with
checkpoints, logs and a progress bar.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import iss_kernels as iss
from iss_kernels.demo.checkpoint import (
    ResumeError,
    expect_no_run,
    interrupts,
    load,
    save,
    write,
)


class DataError(ValueError):
    """What was given cannot be used; the message is one sentence for the person who gave it."""


def diverged(found: str, batch: int, rate: float, clip: float) -> DataError:
    """What stops a training that can only give NaN; found: "a finite loss, got nan"."""
    clipped = "" if clip == math.inf else f" and a gradient of at most {clip:g}"
    return DataError(
        f"expected {found} in batch {batch} with a learning rate of {rate:g}{clipped}: "
        "give a lower --rate"
    )


def expect_finite(model: nn.Module, batch: int, rate: float, clip: float) -> None:
    """Raises DataError where a weight of the model is not, after a batch."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise diverged("finite weights, got others", batch, rate, clip)


@dataclass(frozen=True)
class Sparsity:
    """What makes units fade, and when they leave.

    strength: of the group lasso, 0 for none. factors: (family name, factor on the strength), for
    families that have another one. proximal: the lasso shrinks the norms after each step, in the
    optimiser's metric; otherwise its gradient is added, as in the paper. warmup: batches in which
    the strength rises from 0. l1: of an L1 penalty on every parameter. threshold: elements smaller
    than this become zero after each step (Wen et al. 2018, section 3.2; their code takes max(1e-4,
    2 * l1)), everywhere or in the groups alone. every: batches between two looks for dead units.
    after: batches before which dead units may still come back. until: epochs after which the
    penalties are `relax` times what they were, so that what is left trains with less of their bias
    (the relaxed lasso, Meinshausen 2007, whose phi `relax` is); 0: never. target: share of the
    units that is to be left; the lasso adapts its strength so that some `horizon` batches reach it,
    and ends there. 0: the strength stays as it is. remove: dead units leave the model and the
    optimiser's state; otherwise they are held at zero, which gives the same model and takes longer.
    """

    strength: float = 0.0
    factors: tuple[tuple[str, float], ...] = ()
    proximal: bool = False
    warmup: int = 0
    l1: float = 0.0
    threshold: float = 1e-4
    everywhere: bool = True
    every: int = 100
    after: int = 0
    until: int = 0
    relax: float = 0.0
    target: float = 0.0
    horizon: int = 0
    remove: bool = True

    @classmethod
    def of(cls, recipe: Any, **changes: Any) -> Sparsity:
        """What a recipe says of these, by the same names."""
        named = {f.name: getattr(recipe, f.name) for f in fields(cls) if hasattr(recipe, f.name)}
        return cls(**named | changes)

    def share(self, epoch: int) -> float:
        """What of the penalties counts in an epoch, counted from 0."""
        if self.strength == self.l1 == 0:
            return 0.0
        return self.relax if 0 < self.until <= epoch else 1.0

    def strengths(self, groups: iss.Groups) -> dict[str, float]:
        """{family name: strength}. Raises DataError for a factor of a family that is not there."""
        names, factors = [family.name for family in groups.families], dict(self.factors)
        if unknown := factors.keys() - names:
            raise DataError(
                f"expected --factors of the families {', '.join(names)}, got {', '.join(unknown)}"
            )
        return {name: self.strength * factors.get(name, 1.0) for name in names}


class Trainer(ABC):
    """Training of one model, batch by batch.

    groups: as find_groups gives them. rate: {number of the epoch from 0: learning rate}, as a
    function. decay: of a moving average of the weights, which is what is measured then; 0: none.
    With torch.distributed initialised, each process gives its share of a batch to `loss`, and
    gradients are averaged by DistributedDataParallel; all processes see the same groups.

    average: the model to measure, the moving average or the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: iss.Groups,
        sparsity: Sparsity,
        rate: Callable[[int], float],
        *,
        batches_per_epoch: int,
        epochs: int,
        clip: float,
        decay: float = 0.0,
    ) -> None:
        self.model, self.optimizer, self.groups, self.sparsity = model, optimizer, groups, sparsity
        self.rate, self.clip, self.decay = rate, clip, decay
        self.average = deepcopy(model) if decay else model
        self.batches_per_epoch, self.epochs = batches_per_epoch, epochs
        self.done = 0  # batches
        self.total = 0.0  # loss of this epoch
        self.seconds = [0.0, 0.0]  # of this epoch: on the clock, and of this process' processor
        self.history: list[dict[str, Any]] = []
        self.held: dict[str, Tensor] = {}  # units that are dead and still there
        self.lasso: iss.GroupLasso | None = None
        self.share = 1.0  # of the penalties, that the strengths of the lasso have
        if groups.families:
            # The paper's code counts the elements twice that lie in a row and a column of a unit.
            overlap = not sparsity.proximal
            self.lasso = iss.GroupLasso(
                groups,
                sparsity.strengths(groups),
                paper_overlap=overlap,
                warmup=sparsity.warmup,
                target=sparsity.target or None,
                horizon=sparsity.horizon if sparsity.target else None,
            )
        self._wrap()

    # -- what a task says

    @abstractmethod
    def loss(self, index: int) -> Tensor:
        """The loss of a batch of the epoch, by its number; through `self.parallel`."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What an epoch is judged by."""

    def shrunk(self, report: iss.ShrinkReport) -> None:  # noqa: B027
        """Units have left: for states that are carried from batch to batch."""

    def own_state(self) -> dict[str, Any]:
        """What else the next batch depends on."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on with what `own_state` gave."""

    # -- training

    @property
    def batches(self) -> int:
        """Of the whole run."""
        return self.batches_per_epoch * self.epochs

    def batch(self) -> None:
        """Train on the next batch."""
        begin = _clocks()
        index = self.done % self.batches_per_epoch
        if index == 0:
            self.total, self.seconds = 0.0, [0.0, 0.0]
        self.model.train()
        epoch = self.done // self.batches_per_epoch
        active, learning_rate = self._set_share(epoch), self.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.loss(index)
        value = _mean(loss.item())
        if not math.isfinite(value):
            raise diverged(f"a finite loss, got {value}", self.done + 1, learning_rate, self.clip)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if active:
            self._regularise()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if active:
            self._threshold()
        if self.held:
            self.groups.zero_units_(self.held)
        if self.decay:
            self._average()
        self.total += value
        self.done += 1
        if active and self.done % self.sparsity.every == 0:
            self._bury(at_least=0.01)
        self._count(begin)

    def _set_share(self, epoch: int) -> bool:
        """Give the lasso the strengths of an epoch; whether anything is penalised in it."""
        share = self.sparsity.share(epoch)
        if share not in (0, self.share):
            if self.lasso is not None:
                self.lasso = iss.GroupLasso(
                    self.groups,
                    {name: s * share / self.share for name, s in self.lasso.strength.items()},
                    paper_overlap=self.lasso.paper_overlap,
                )
            self.share = share
        return share > 0

    @torch.no_grad()
    def _regularise(self) -> None:
        """The penalties' gradients, which the clipping counts as well."""
        if self.lasso is not None and self.sparsity.strength and not self.sparsity.proximal:
            self.lasso.add_gradients_()
        if self.sparsity.l1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.sign(), alpha=self.sparsity.l1 * self.share)

    @torch.no_grad()
    def _threshold(self) -> None:
        if self.lasso is not None and self.sparsity.proximal:
            self.lasso.proximal_(self.optimizer)
        elif self.sparsity.everywhere:
            for parameter in self.model.parameters():
                torch.hardshrink(parameter, self.sparsity.threshold, out=parameter)
        elif self.lasso is not None:
            self.lasso.threshold_(self.sparsity.threshold)

    @torch.no_grad()
    def _average(self) -> None:
        """Average the weights; the first ones count less, as in TensorFlow's average."""
        decay = min(self.decay, (1 + self.done) / (10 + self.done))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        averages, weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if self.held:  # as if they had left
            replace(self.groups, model=self.average).zero_units_(self.held)

    def _bury(self, at_least: float = 0.0) -> None:
        """Hold the units that are dead now at zero, or let them leave, where their share suffices.

        A unit that is dead stays dead either way, so that the model is the same.
        """
        if self.done < self.sparsity.after:
            return
        self.held = self._dead()
        number = sum(int(its.sum()) for its in self.held.values())
        if self.sparsity.remove and number > at_least * self.groups.units:
            # A family cannot be empty: its first unit stays, at zero.
            self._remove(
                {name: torch.tensor([0]) if its.all() else ~its for name, its in self.held.items()}
            )
            self.held = self._dead()
        self.groups.zero_units_(self.held)

    def _dead(self) -> dict[str, Tensor]:
        return {name: its for name, its in self.groups.dead().items() if its.any()}

    def _remove(self, keep: Mapping[str, Tensor]) -> None:
        former = self.groups
        report, self.groups = iss.shrink_(
            self.model, former, optimizer=self.optimizer, lasso=self.lasso, keep=keep
        )
        if self.decay:
            iss.shrink_(self.average, replace(former, model=self.average), keep=report.kept)
        self.shrunk(report)
        self._wrap()

    def _wrap(self) -> None:
        """`parallel` is the model, whose gradients are averaged over all processes."""
        several = dist.is_initialized()
        self.parallel = DistributedDataParallel(self.model) if several else self.model

    def _count(self, begin: tuple[float, float]) -> None:
        self.seconds = [s + b - a for s, a, b in zip(self.seconds, begin, _clocks(), strict=True)]

    def units(self) -> dict[str, int]:
        """{family name: units that are not dead}."""
        return {name: int((~dead).sum()) for name, dead in self.groups.dead().items()}

    def end_epoch(self) -> dict[str, Any]:
        """Measure, and add a row to the history."""
        begin = _clocks()
        epoch = len(self.history)
        expect_finite(self.model, self.done, self.rate(epoch), self.clip)
        if self.sparsity.share(epoch) > 0:
            self._bury()
        row: dict[str, Any] = {"epoch": epoch + 1, "rate": self.rate(epoch)}
        row |= {"loss": self.total / self.batches_per_epoch} | self.evaluate()
        row |= {"units": self.units(), "parameters": count(self.model)}
        self._count(begin)
        row |= {"seconds": round(self.seconds[0], 2), "cpu_seconds": round(self.seconds[1], 2)}
        self.history.append(row)
        return row

    # -- checkpoints

    _KEPT = ("done", "total", "seconds", "history", "held")

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly here."""
        return {name: getattr(self, name) for name in self._KEPT} | {
            "kept": self.groups.kept,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.decay else None,
            "lasso": self.lasso.state_dict() if self.lasso else None,
            "random": torch.get_rng_state(),
            "own": self.own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the model in the sizes of the start."""
        self._remove(state["kept"])
        for name in self._KEPT:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        if self.decay:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lasso is not None:
            self.lasso.load_state_dict(state["lasso"])
        torch.set_rng_state(state["random"])
        self.load_own_state(state["own"])


def _mean(value: float) -> float:
    """Of the processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _any(value: bool) -> bool:
    """Whether it is true in one of the processes."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(int(value))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool(most)


def part() -> slice:
    """The rows of a batch that are this process' own."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def expect_divisible(batch: int) -> None:
    """Raises DataError for a batch whose parts, one for each process, would be unequal."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if batch % processes:
        raise DataError(f"expected --batch of a multiple of the {processes} processes, got {batch}")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


# -- a run in a folder


CHECKPOINT, LOG, RESULT = "checkpoint.pt", "log.csv", "result.json"
MODEL, VOCABULARY = "model.safetensors", "vocabulary.json"
FILES = (CHECKPOINT, LOG, RESULT, MODEL, VOCABULARY)  # of which a folder with a run has one


def fit(
    trainer: Trainer, folder: Path, options: Mapping[str, Any], *, resume: bool = False
) -> None:
    """Train to the end, with a checkpoint after each epoch, `log.csv` and TensorBoard's events.

    options: what a checkpoint must have been made with to be resumed, the seed among them. With
    several processes the first one writes, and a signal to one stops all of them. Raises
    ResumeError where the folder already holds a run that is not to be resumed, or none that could
    be; KeyboardInterrupt after Ctrl-C, once the batch in work is done and saved.
    """
    checkpoint = folder / CHECKPOINT
    if dist.is_initialized():  # each process drops activations of its own
        torch.manual_seed(options["seed"] + dist.get_rank())
    if resume:
        state = _checked(checkpoint, options)
        try:
            trainer.load_state_dict(state)
        # What is whole and does not fit was written by another version.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise ResumeError(f"{checkpoint} is of another version of this example") from None
    else:
        expect_no_run(folder, FILES, ", or --resume")
    first = is_first()
    make_folder(folder)

    def keep() -> None:
        # The state of every process is gathered: each has random numbers and strips of its own.
        state: Any = {"options": dict(options), "trainer": trainer.state_dict()}
        if dist.is_initialized():
            state = _gathered(state)
        if first:
            save(checkpoint, state)
            write(folder / LOG, _table(trainer.history))

    with (
        _progress(trainer, first) as bar,
        _events(folder, first) as events,
        interrupts(patient=dist.is_initialized()) as interrupted,
    ):
        while trainer.done < trainer.batches:
            trainer.batch()
            bar.batch()
            if trainer.done % trainer.batches_per_epoch == 0:
                row = trainer.end_epoch()
                bar.epoch(row)
                _log(events, row)
                keep()
            if _any(bool(interrupted)):
                keep()
                raise KeyboardInterrupt


def make_folder(folder: Path) -> None:
    """Make a folder, and see that a file can be written there. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The first process' state with the own parts of all."""
    own = {name: state["trainer"].pop(name) for name in ("random", "own")}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    state["trainer"]["parts"] = parts
    return state


def opened(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and the trainer's state of a checkpoint of an example. Raises ResumeError."""
    content = load(checkpoint)
    options, state = (
        (content.get("options"), content.get("trainer")) if isinstance(content, dict) else (0, 0)
    )
    if not isinstance(options, dict) or not isinstance(state, dict):
        raise ResumeError(f"{checkpoint} is not a checkpoint of an example")
    return options, state


def of_run(folder: Path, option: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `opened`, of the run in a folder that an option names. Raises DataError."""
    if not (folder / CHECKPOINT).exists():
        raise DataError(f"expected {option} of a run's folder, got {folder} without {CHECKPOINT}")
    return opened(folder / CHECKPOINT)


# What is told first where a checkpoint is another run's: the others follow from these.
FIRST = ("example", "method", "config", "data", "text", "questions", "seed")


def _checked(checkpoint: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's state in a checkpoint of a run with these options."""
    found, state = opened(checkpoint)
    names = dict.fromkeys((*FIRST, *sorted(options), *sorted(found)))
    for name in (name for name in names if name in options or name in found):
        if name not in options or name not in found:
            raise ResumeError(
                f"{checkpoint} is of another version of this example: "
                f"only one of the two knows the option {name}"
            )
        here, there = options[name], found[name]
        if here != there:
            raise ResumeError(
                f"expected {checkpoint} of a run with {name} {here}, got one with {there}: "
                "resume with the same options, or give another --output"
            )
    processes = len(state.get("parts", [None]))
    here = dist.get_world_size() if dist.is_initialized() else 1
    if processes != here:
        raise ResumeError(
            f"expected {checkpoint} of a run with {here} processes, got one with {processes}"
        )
    if "parts" in state:
        state |= state.pop("parts")[dist.get_rank()]
    return state


def _table(history: list[dict[str, Any]]) -> bytes:
    """The history as CSV."""
    rows = [_flat(row) for row in history]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """{"units": {"l0": 3}} -> {"units/l0": 3}."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= (
            {f"{name}/{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def _log(events: Any, row: Mapping[str, Any]) -> None:
    for name, value in _flat(row).items():
        if events is not None:
            events.add_scalar(name, value, row["epoch"])


def _events(folder: Path, first: bool) -> AbstractContextManager[Any]:
    """TensorBoard's writer, where the package is there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return nullcontext()
    return SummaryWriter(str(folder)) if first else nullcontext()


def _progress(trainer: Trainer, first: bool) -> Any:
    from examples.progress import progress  # which needs rich: a run does, --help does not

    return progress(trainer, first)


def circumstances() -> dict[str, Any]:
    """What ran, on what: for result.json."""
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module else sys.argv[0]
    # A path is cut to its file's name: the folders of one machine say nothing.
    arguments = [Path(one).name if os.sep in one else one for one in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", name, *arguments]),
        "machine": {
            **iss.build_info(),
            "python": platform.python_version(),
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
        },
    }


def write_result(
    folder: Path, options: Mapping[str, Any], trainer: Trainer, measured: Mapping[str, Any]
) -> None:
    """Write result.json: what ran, what came out, and every epoch."""
    seconds = {
        name: round(sum(row[name] for row in trainer.history), 1)
        for name in ("seconds", "cpu_seconds")
    }
    result = circumstances() | {"options": dict(options), **measured, **seconds}
    result |= {"parameters": count(trainer.model), "units": trainer.units()}
    result["epochs"] = trainer.history
    write(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if "RANK" not in os.environ:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
