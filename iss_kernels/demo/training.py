# SPDX-License-Identifier: Apache-2.0
"""The recipe of the demo, and a training loop that can stop after any batch and go on exactly.

Units that die leave the model after each epoch, so the next one is faster. Everything that the next
batch depends on is in `Trainer.state_dict`, the random state and the position in the text included;
so Ctrl-C means: finish this batch, save, stop.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from iss_kernels import GroupLasso, Groups, shrink_
from iss_kernels.demo.check import compare
from iss_kernels.demo.checkpoint import interrupts
from iss_kernels.demo.model import LanguageModel, detach, perplexity, strips
from iss_kernels.demo.text import Text


@dataclass(frozen=True)
class Stage:
    """One training run: what differs between baseline, ISS and fine-tuning."""

    epochs: int
    learning_rate: float
    dropout: float
    strength: float = 0.0  # of the group lasso, per mean loss over words; 0: none


@dataclass(frozen=True)
class Recipe:
    """Every hyperparameter of the demo."""

    name: str
    embedding: int
    hidden: int
    layers: int
    baseline: Stage  # as many epochs as the other two together
    iss: Stage
    tune: Stage
    # Share of the ISS run during which the strength grows from 0: units first learn, then compete.
    ramp: float
    # "gradient" adds the lasso's gradient to the loss's, as the paper does; "proximal" shrinks
    # the norms after each step instead.
    method: str
    # A unit whose norm is below this at the end of an epoch is zeroed and leaves: Adam's steps are
    # too long to come to rest at zero by themselves.
    unit_threshold: float
    batch: int = 10  # strips of text: half the paper's, so that a small text makes enough steps
    steps: int = 35  # per batch: the paper's, section 4.1
    clip: float = 0.25  # norm of the gradient, the lasso's included: the paper's 10 over 35 steps
    warm_up: float = 0.05  # share of the run in which the learning rate grows; Adam needs a start
    second_moment: float = 0.99  # Adam's beta2: its 0.999 would average over more than an epoch


FULL = Recipe(
    name="full",
    embedding=128,  # words are few (1.6k), so their vectors need not be as wide as the LSTM
    hidden=384,  # wide enough that a good part of it turns out not to be needed
    layers=2,  # the paper's stack
    # Dropout by validation perplexity: 0.2: 45.4, 0.3: 45.9, 0.4: 46.8, 0.5: 48.8 (10 epochs).
    baseline=Stage(epochs=12, learning_rate=4e-3, dropout=0.2),
    # The strength trades units for perplexity: 1.3e-3 leaves 144 + 203 units, 2.2e-3 91 + 135.
    iss=Stage(epochs=7, learning_rate=4e-3, dropout=0.2, strength=1.5e-3),
    tune=Stage(epochs=5, learning_rate=4e-3, dropout=0.2),  # heals what the lasso shrank
    ramp=0.3,
    method="gradient",
    unit_threshold=0.4,  # above the noise that Adam's steps keep in a fading unit (0.1 to 0.4)
)
# The same in 2 minutes on two cores, for CI: fewer units and epochs, so a worse model.
QUICK = replace(
    FULL,
    name="quick",
    hidden=192,
    baseline=replace(FULL.baseline, epochs=5),
    iss=replace(FULL.iss, epochs=3),
    tune=replace(FULL.tune, epochs=2),
)


class Watcher(Protocol):
    """Whoever shows the progress."""

    def stage(self, name: str, trainer: Trainer) -> None:
        """A stage begins, or goes on after an interruption."""

    def batch(self, trainer: Trainer) -> None:
        """One more batch is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; row: what `Trainer.end_epoch` returned."""

    def note(self, text: str) -> None:
        """Something else is done."""


class Trainer:
    """One stage of training a model, batch by batch."""

    def __init__(
        self, model: LanguageModel, groups: Groups, recipe: Recipe, stage: Stage, text: Text
    ) -> None:
        self.model, self.groups, self.recipe, self.stage, self.text = (
            model, groups, recipe, stage, text,
        )  # fmt: skip
        model.set_dropout(stage.dropout)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, recipe.second_moment), weight_decay=0.0
        )
        self.data = strips(text.train, recipe.batch)  # [L, B]
        self.batches_per_epoch = math.ceil((len(self.data) - 1) / recipe.steps)
        self.batches = self.batches_per_epoch * stage.epochs
        self.done = 0  # batches
        self.state: Any = None  # of the LSTM, carried over
        self.loss = 0.0  # sum over the words of this epoch
        self.words = 0
        self.seconds = 0.0  # of this epoch
        self.history: list[dict[str, Any]] = []
        # The units of each family that are left, counted in the model as it came, and those of them
        # that are held at zero: only the last unit of a family, which cannot leave.
        self.kept = {family.name: torch.arange(family.size) for family in groups.families}
        self.zeroed: dict[str, Tensor] = {}
        self.difference = 0.0  # largest one between answers before and after units left

    def batch(self) -> None:
        """Train on the next batch."""
        begin = time.perf_counter()
        recipe, model = self.recipe, self.model
        model.train()
        start = self.done % self.batches_per_epoch * recipe.steps
        if start == 0:
            self.state, self.loss, self.words, self.seconds = None, 0.0, 0, 0.0
        window = self.data[start : start + recipe.steps + 1]
        logits, state = model(window[:-1], self.state)
        loss = cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learning_rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._step(learning_rate)
        self.state = detach(state)
        self.loss += loss.item() * window[1:].numel()
        self.words += window[1:].numel()
        self.done += 1
        self.seconds += time.perf_counter() - begin

    def _learning_rate(self) -> float:
        """A short linear start, then half a cosine down to 0."""
        progress = self.done / self.batches
        start = min(1.0, (self.done + 1) / (self.recipe.warm_up * self.batches + 1))
        return self.stage.learning_rate * start * 0.5 * (1 + math.cos(math.pi * progress))

    def _step(self, learning_rate: float) -> None:
        recipe, lasso = self.recipe, None
        if self.stage.strength:
            ramp = min(1.0, self.done / self.batches / recipe.ramp) if recipe.ramp else 1.0
            lasso = GroupLasso(self.groups, self.stage.strength * ramp)
        if lasso is not None and recipe.method == "gradient":
            lasso.add_gradients_()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        if lasso is not None and recipe.method == "proximal":
            lasso.proximal_(learning_rate)
        if self.zeroed:
            self.groups.zero_units_(self.zeroed)

    def end_epoch(self) -> dict[str, Any]:
        """Take out the units that have become small, measure, and add a row to the history.

        Raises CheckError where the model's answers on the validation text change with that.
        """
        begin = time.perf_counter()
        sparse, left = None, None
        if self.stage.strength:
            norms = GroupLasso(self.groups).norms()
            threshold = self.recipe.unit_threshold
            self.groups.zero_units_({name: its < threshold for name, its in norms.items()})
            if any(dead.any() for dead in self.groups.dead().values()):
                sparse = copy.deepcopy(self.model)
                left = self._shrink()
        row = {
            "epoch": len(self.history) + 1,
            "train": math.exp(self.loss / self.words),
            "valid": perplexity(self.model, self.text.valid),
            "alive": [int((~dead).sum()) for dead in self.groups.dead().values()],
        }
        self.seconds += time.perf_counter() - begin
        self.history.append(row | {"seconds": round(self.seconds, 2)})
        if sparse is not None and left is not None:
            difference = compare(sparse, self.model, list(left.values()), self.text.valid)
            self.difference = max(self.difference, difference)
        return self.history[-1]

    def _shrink(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Take out the dead units, or all but some; {family name: those that stay}."""
        report, self.groups = shrink_(self.model, self.groups, optimizer=self.optimizer, keep=keep)
        self.kept = {name: units[report.kept[name]] for name, units in self.kept.items()}
        self.zeroed = {name: dead for name, dead in self.groups.dead().items() if dead.any()}
        return report.kept

    _KEPT = (
        "done", "state", "loss", "words", "seconds", "history", "kept", "zeroed", "difference",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly here."""
        return {name: getattr(self, name) for name in self._KEPT} | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the model as it was at the start."""
        self._shrink(state["kept"])
        for name in self._KEPT:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def train(trainer: Trainer, watcher: Watcher, save: Callable[[], None]) -> None:
    """Run a stage to its end, saving after each epoch.

    Raises KeyboardInterrupt after Ctrl-C, when the batch in work is done and saved; a second Ctrl-C
    does not wait for that.
    """
    with interrupts() as interrupted:
        while trainer.done < trainer.batches:
            trainer.batch()
            watcher.batch(trainer)
            if trainer.done % trainer.batches_per_epoch == 0:
                watcher.epoch(trainer.end_epoch())
                save()
            if interrupted:
                save()
                raise KeyboardInterrupt
