# SPDX-License-Identifier: Apache-2.0
"""The phases of the demo: baseline, ISS with shrinking, check, fine-tuning, timing, report.

The two models start from the same weights and see the same text for the same number of epochs,
fine-tuning included; only the second is told to do without the units it does not need, and loses
them after each epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iss_kernels import (
    GroupLasso,
    Groups,
    ShrinkReport,
    build_info,
    find_groups,
    prepare,
    shrink_,
)
from iss_kernels.demo import checkpoint, figures, report, timing
from iss_kernels.demo.check import compare
from iss_kernels.demo.checkpoint import ResumeError, write
from iss_kernels.demo.model import LanguageModel, enlarge_, perplexity, strips
from iss_kernels.demo.text import PARTS, Text
from iss_kernels.demo.training import Recipe, Trainer, Watcher, train

CHECKPOINT, RESULT, REPORT = "checkpoint.pt", "result.json", "report.html"
STAGES = ("baseline", "iss", "tune")


class Demo:
    """One run of the demo; `run` does everything."""

    def __init__(
        self, recipe: Recipe, text: Text, seed: int, output: Path, watcher: Watcher
    ) -> None:
        self.recipe, self.text, self.seed, self.output, self.watcher = (
            recipe, text, seed, output, watcher,
        )  # fmt: skip
        self.checkpoint = output / CHECKPOINT
        self.options = {
            "text": text.fingerprint,  # wherever it lies
            "seed": seed,
            "recipe": dataclasses.asdict(recipe),
        }
        self.finished: dict[str, dict[str, Any]] = {}  # stage -> "model", "history", ...
        self.interrupted: dict[str, Any] = {}  # what the checkpoint holds of the stage in work
        self.saved = False  # whether the checkpoint is one of this run

    def run(self) -> dict[str, Any]:
        """All phases; returns what result.json holds.

        Raises KeyboardInterrupt after Ctrl-C, CheckError where big and small model differ.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        baseline, small = self._model(), self._model()
        start = _norms(small)
        self._learn("baseline", baseline)
        self._learn("iss", small)

        left = self.finished["iss"]["kept"]
        kept = list(left.values())
        big, shrink_report = self._enlarged(small, left)
        difference = max(
            self.finished["iss"]["difference"], compare(big, small, kept, self.text.test)
        )
        self.watcher.note(f"{sum(map(len, kept))} units are left; the rest is out, same answers")
        timings = timing.compare(big.lstm, small.lstm, kept[-1], self._example_vectors(small))
        sparse = perplexity(big, self.text.test)

        self._learn("tune", small)
        result = {
            "hidden_before": [self.recipe.hidden] * self.recipe.layers,
            "hidden_after": [len(units) for units in kept],
            "params_before": _count(big.lstm),
            "params_after": _count(small.lstm),
            "model_params_before": _count(big),
            "model_params_after": _count(small),
            "perplexity_before": perplexity(baseline, self.text.test),
            "perplexity_iss": sparse,  # of the sparse model, before fine-tuning
            "perplexity_after": perplexity(small, self.text.test),
            "perplexity_int8": perplexity(prepare(small, "int8"), self.text.test),
            "max_abs_diff": difference,
            **timings,
            **self._circumstances(),
        }
        groups = self._groups(big)
        pictures = report.Pictures(
            start, _norms(baseline), _norms(big), figures.weight_pictures(groups)
        )
        page = report.html(result, pictures, str(shrink_report))
        write(self.output / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        write(self.output / REPORT, page.encode())
        return result

    def _circumstances(self) -> dict[str, Any]:
        """What was run, on what."""
        parts = {part: len(getattr(self.text, part)) for part in PARTS}
        seconds = dict.fromkeys(STAGES, 0.0)  # of training
        for row in self.history():
            seconds[row["stage"]] += row["seconds"]
        return {
            "text": self.text.description,
            "words": {"vocabulary": len(self.text.vocabulary), **parts},
            "seconds": round(sum(seconds.values()), 1),
            "seconds_before": round(seconds["baseline"], 1),
            "seconds_after": round(seconds["iss"] + seconds["tune"], 1),  # of as many epochs
            "seed": self.seed,
            "recipe": dataclasses.asdict(self.recipe),
            "history": self.history(),
            "machine": {**build_info(), "python": platform.python_version()},
        }

    def history(self) -> list[dict[str, Any]]:
        """Every epoch so far, with its stage."""
        return [
            {"stage": stage, **row}
            for stage in STAGES
            for row in self.finished.get(stage, {}).get("history", [])
        ]

    # -- learning

    def _model(self) -> LanguageModel:
        """The model before any training: the same one whenever it is asked for."""
        torch.manual_seed(self.seed)
        r = self.recipe
        return LanguageModel(len(self.text.vocabulary), r.embedding, r.hidden, r.layers, 0.0)

    def _groups(self, model: LanguageModel) -> Groups:
        return find_groups(model, self.text.test[:2, None])

    def _learn(self, name: str, model: LanguageModel) -> None:
        """Train a stage, or take over what a checkpoint holds of it."""
        if name in self.finished:
            shrink_(model, self._groups(model), keep=self.finished[name]["kept"])
            model.load_state_dict(self.finished[name]["model"])
            return
        stage = getattr(self.recipe, name)
        trainer = Trainer(model, self._groups(model), self.recipe, stage, self.text)
        torch.manual_seed(self.seed + 1)
        if self.interrupted:
            trainer.load_state_dict(self.interrupted)
            self.interrupted = {}
        self.watcher.stage(name, trainer)
        train(trainer, self.watcher, partial(self._save, trainer))
        self.finished[name] = {
            "model": copy.deepcopy(model.state_dict()),  # the small model learns on
            "history": trainer.history,
            "kept": trainer.kept,
            "difference": trainer.difference,
        }

    def _enlarged(
        self, small: LanguageModel, kept: dict[str, Tensor]
    ) -> tuple[LanguageModel, ShrinkReport]:
        """The small model in the first size, with zeros where units left; and what that cuts out.

        kept: {family name: the units that are left}.
        """
        big = self._model()
        return big, enlarge_(big, self._groups(big), small, kept)

    def _example_vectors(self, model: LanguageModel) -> Tensor:
        """Embedded words of the test text, [L, B, E]: what the LSTMs are timed on."""
        with torch.no_grad():
            tokens = strips(self.text.test, max(timing.BATCHES))[: timing.STEPS]
            vectors: Tensor = model.embedding(tokens)
        return vectors

    # -- checkpoints

    def _save(self, trainer: Trainer) -> None:
        """Keep what is finished and the stage in work; the file is whole at any moment."""
        content = {
            "options": self.options,
            "description": self.text.description,
            "finished": self.finished,
            "trainer": trainer.state_dict(),
        }
        checkpoint.save(self.checkpoint, content)
        self.saved = True

    def expect_no_run(self) -> None:
        """Raises ResumeError where the output directory already holds a run."""
        names = CHECKPOINT, RESULT, REPORT
        checkpoint.expect_no_run(self.output, names, ", or --resume or --fresh")

    def resume(self) -> None:
        """Take over the checkpoint; `run` goes on from there. Raises ResumeError."""
        content = checkpoint.load(self.checkpoint)
        for option, here in self.options.items():
            there = content["options"][option]
            if there != here:
                if option == "text":
                    there = f"{content['description']} ({there})"
                    here = f"{self.text.description} ({here})"
                if option == "recipe":
                    there, here = there["name"], self.recipe.name
                    if there == here:
                        there, here = "another version's", "this one's"
                raise ResumeError(
                    f"{self.checkpoint} was made with other options ({option}: {there}; "
                    f"now {here}): resume with the same ones, or start anew with --fresh"
                )
        self.finished, self.interrupted = content["finished"], content["trainer"]
        self.saved = True


@torch.no_grad()
def _norms(model: LanguageModel) -> list[list[float]]:
    """Group norms by layer, in the order of the units."""
    groups = find_groups(model, torch.zeros(2, 1, dtype=torch.long))
    return [norms.tolist() for norms in GroupLasso(groups, 0.0).norms().values()]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
