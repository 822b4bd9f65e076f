# SPDX-License-Identifier: Apache-2.0
"""Training of BiDAF: the recipe's numbers, and what is this task's own beside examples/training.py.

An "epoch" of the trainer is the time between two evaluations, `evaluate_every` batches. Weights
are averaged over steps (EMA), and the average is what answers: units leave it together with the
model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import iss_kernels as iss
from examples.squad.answers import score
from examples.squad.data import Encoder, Question, Vocabulary, batches
from examples.squad.model import FAMILIES, BiDAF, example, parameters
from examples.training import Sparsity, Trainer, expect_divisible, part


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text} (default: {default})"})


@dataclass(frozen=True)
class Recipe:
    """Every number of a run; the defaults are those of the paper's code."""

    hidden_size: int = _option(100, "units of an LSTM in each direction")
    letter_size: int = _option(8, "width of a letter's vector")
    channels: int = _option(100, "channels of the convolution over letters")
    width: int = _option(5, "letters that the convolution sees at once")
    vector_size: int = _option(100, "width of the vectors of words")
    letters: int = _option(16, "letters of a token that are read")
    least_word: int = _option(10, "a word without a vector learns its own if it is so frequent")
    least_letter: int = _option(50, "a letter has a vector if it is so frequent")
    context_tokens: int = _option(400, "training leaves longer texts out")
    question_tokens: int = _option(30, "training leaves longer questions out")
    longest: int = _option(30, "tokens of an answer")
    batch: int = _option(60, "questions of a step")
    steps: int = _option(10_000, "steps")
    rate: float = _option(1e-3, "learning rate of Adam")
    keep: float = _option(0.8, "share that dropout keeps; 0.9 with ISS")
    ema: float = _option(0.999, "decay of the average of the weights")
    strength: float = _option(0.0, "of the group lasso; 0.001 with ISS")
    phrase_strength: float = _option(-1.0, "of the phrase layer, 0 to keep it whole; -1: as all")
    proximal: bool = _option(False, "shrink the norms after each step instead of the gradient")
    threshold: float = _option(4e-4, "elements of the groups below it become zero")
    after: int = _option(2000, "steps before which dead units may come back, as the paper's may")
    until: int = _option(0, "evaluations after which the lasso is `relax` of itself; 0: never")
    relax: float = _option(0.0, "share of the lasso that stays after `until`")
    every: int = _option(100, "steps between two looks for units that are dead")
    remove: bool = _option(True, "take dead units out during training")
    evaluate_every: int = _option(500, "steps between two evaluations and checkpoints")
    dev_questions: int = _option(1000, "dev questions of these evaluations; at the end all")


PLAIN, ISS = Recipe(), replace(Recipe(), keep=0.9, strength=1e-3)
METHODS = {"baseline": PLAIN, "iss": ISS, "iss-finetune": ISS}


class Reader(Trainer):
    """Training of one model on questions; `average` answers."""

    def __init__(
        self,
        model: BiDAF,
        recipe: Recipe,
        encoder: Encoder,
        training: Sequence[Question],
        dev: Sequence[Question],
        seed: int,
    ) -> None:
        expect_divisible(recipe.batch)
        self.recipe, self.encoder, self.dev = recipe, encoder, dev
        self.questions, self.seed = training, seed
        self.epoch, self.ordered = -1, [[*training]]  # the batches of a pass over the questions
        groups = iss.find_groups(model, example())
        super().__init__(
            model,
            torch.optim.Adam([p for p in model.parameters() if p.requires_grad], recipe.rate),
            groups,
            Sparsity.of(recipe, everywhere=False),
            lambda epoch: recipe.rate,
            batches_per_epoch=recipe.evaluate_every,
            epochs=recipe.steps // recipe.evaluate_every,
            clip=torch.inf,
            decay=recipe.ema,
        )
        strengths = dict.fromkeys(FAMILIES.values(), recipe.strength)
        if recipe.phrase_strength >= 0:
            strengths |= {n: recipe.phrase_strength for n in strengths if n.startswith("phrase")}
        # The recurrent elements of a unit that lie in a row and a column count twice there.
        self.lasso = iss.GroupLasso(groups, strengths, paper_overlap=True)

    def loss(self, index: int) -> Tensor:
        """The mean over the batch of both pointers' cross entropies, as in the paper's code."""
        count = len(self.questions) // self.recipe.batch
        epoch, place = divmod(self.done, count)
        if epoch != self.epoch:
            order = torch.Generator().manual_seed(self.seed + epoch)
            self.epoch = epoch
            self.ordered = batches(self.questions, self.recipe.batch, order)
        batch = self.ordered[place][part()]
        scores = self.parallel(*self.encoder.inputs(batch))
        first, last = self.encoder.targets(batch)
        return cross_entropy(scores[0], first) + cross_entropy(scores[1], last)

    def small(self) -> nn.Module:
        """The average without its dead units, its small elements set to zero as in training."""
        average = deepcopy(self.average)
        groups = replace(self.groups, model=average)
        if self.sparsity.share(len(self.history)) > 0:
            iss.GroupLasso(groups).threshold_(self.recipe.threshold)
        return iss.shrink(average, groups)[0]

    def evaluate(self) -> dict[str, float]:
        """Exact match and F1 of the average on some of the dev questions."""
        every = max(1, len(self.dev) // self.recipe.dev_questions)
        return self.score(self.small(), self.dev[::every])

    def score(self, model: nn.Module, questions: Sequence[Question]) -> dict[str, float]:
        """Exact match and F1 in percent."""
        return score(model, self.encoder, questions, self.recipe.batch, self.recipe.longest)


def new_model(recipe: Recipe, vocabulary: Vocabulary, vectors: Tensor) -> BiDAF:
    """The model before training; vectors: [known words, vector_size]."""
    return BiDAF(
        vectors,
        len(vocabulary.own),
        len(vocabulary.letters),
        recipe.hidden_size,
        recipe.letter_size,
        recipe.channels,
        recipe.width,
        1 - recipe.keep,
    )


def sizes(model: nn.Module) -> dict[str, int]:
    """{column of the paper's tables: units}, the phrase layer's after them, and the parameters."""
    found = {}
    for column, family in FAMILIES.items():
        layer, _, name = family.partition(".")
        found[column] = model.get_submodule(layer).get_parameter(f"weight_hh_{name}").size(1)
    return found | {"parameters": parameters(model)}
