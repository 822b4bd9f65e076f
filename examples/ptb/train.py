# SPDX-License-Identifier: Apache-2.0
"""The language model of the paper's table 1 and its training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import iss_kernels as iss
from examples.command_line import run_options
from examples.ptb.recipes import Recipe, Schedule
from examples.training import (
    DataError,
    Sparsity,
    Trainer,
    expect_divisible,
    fit,
    is_first,
    part,
    write_result,
)
from iss_kernels.demo.model import LanguageModel, detach, strips, windows
from iss_kernels.demo.text import Text

EVALUATION_BATCH = 20
PREPARED = ("bfloat16", "int8")  # formats of the weights in which the test is repeated


class Model(LanguageModel):
    """The language model, with DropConnect on the recurrent weights (Merity et al. 2018)."""

    weight_drop = 0.0  # share of weight_hh that is zero for a batch in training

    def recur(self, x: Tensor, state: Any) -> Any:
        """As LanguageModel."""
        if not (self.training and self.weight_drop):
            return super().recur(x, state)
        dropped = {
            name: drop(weight, self.weight_drop)
            for name, weight in self.lstm.named_parameters()
            if "weight_hh" in name
        }
        return functional_call(self.lstm, dropped, (x, state))


def drop(weight: Tensor, share: float) -> Tensor:
    """As torch's dropout, which takes three times as long on a CPU to draw its mask."""
    return weight * (torch.rand_like(weight) >= share) / (1 - share)


def build(recipe: Recipe, vocabulary: int) -> Model:
    """The model with the weights of the start, which the random state decides.

    Biases start at zero, and `bias_hh` stays there: the two biases of nn.LSTM together would learn
    twice as fast as the one bias of the paper's cell.
    """
    layers = len(recipe.hidden)
    model = Model(vocabulary, recipe.embedding, recipe.hidden, layers, 1 - recipe.keep, recipe.tied)
    model.weight_drop = recipe.weight_drop
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("lstm.bias"):
                parameter.zero_()
                parameter.requires_grad_("bias_ih" in name)
            else:
                parameter.uniform_(-recipe.init, recipe.init)
    return model


def find(recipe: Recipe, model: Model) -> iss.Groups:
    """The groups of the model."""
    model.eval()  # where nothing is dropped
    example = torch.arange(6).view(3, 2) % model.decoder.out_features
    return iss.find_groups(model, example, embedding="embedding" in recipe.groups)


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, recipe.rate, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(trained, recipe.rate)


class TextTrainer(Trainer):
    """Training over windows of text; the state goes on from one window to the next.

    model: tokens [T, B] and a state -> logits [T, B, V] and the next state; recurrent: the name of
    its recurrent module.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Schedule,
        text: Text,
        groups: iss.Groups,
        sparsity: Sparsity,
        recurrent: str,
    ) -> None:
        self.text, self.recipe, self.recurrent = text, recipe, recurrent
        self.state: Any = None
        expect_divisible(recipe.batch)
        _expect_long(text, recipe.batch, recipe.steps)
        self.data = share(strips(text.train, recipe.batch))  # [L, B]
        super().__init__(
            model,
            optimizer,
            groups,
            sparsity,
            recipe.learning_rate,
            batches_per_epoch=(len(self.data) - 1) // recipe.steps,
            epochs=recipe.epochs,
            clip=recipe.clip,
            decay=recipe.average,
        )

    def loss(self, index: int) -> Tensor:
        """Sum over the steps, mean over the rows."""
        steps = self.recipe.steps
        window = self.data[index * steps : (index + 1) * steps + 1]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            logits, state = self.parallel(window[:-1], None if index == 0 else self.state)
            loss = cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        self.state = detach(state)
        return loss * steps

    def evaluate(self) -> dict[str, float]:
        """Perplexities of the training windows, with dropout, and of the validation text."""
        train = _exp(self.total / self.batches_per_epoch / self.recipe.steps)
        return {"train": train, "valid": perplexity(self.average, self.text.valid)}

    def shrunk(self, report: iss.ShrinkReport) -> None:
        """Cut the state."""
        if self.state is not None and self.recurrent in report.stayed:
            self.state = report.cut_state(self.state, self.recurrent)

    def own_state(self) -> dict[str, Any]:
        """The state of the recurrent module."""
        return {"state": self.state}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with `own_state`."""
        self.state = state["state"]


def _expect_long(text: Text, batch: int, steps: int) -> None:
    """Raises DataError for a text without one window of a batch."""
    if len(text.train) // batch <= steps:
        raise DataError(
            f"expected --batch and --steps of less than the text, got {batch} strips of more than "
            f"{steps} words from {len(text.train)}"
        )
    for name in ("valid", "test"):
        words = len(getattr(text, name))
        if words < 2 * EVALUATION_BATCH:
            raise DataError(f"expected a {name} text of {2 * EVALUATION_BATCH} words, got {words}")


class LanguageTrainer(TextTrainer):
    """Training of the paper's language model."""

    def __init__(self, model: Model, recipe: Recipe, text: Text) -> None:
        groups = find(recipe, model)
        trained = optimizer(recipe, model)
        super().__init__(model, trained, recipe, text, groups, Sparsity.of(recipe), "lstm")


def run(
    example: str, args: argparse.Namespace, trainer: TextTrainer, measure: Callable[[], Any]
) -> None:
    """Train to the end and write result.json, with what `measure` returns.

    args: of the command line, with those that examples.command_line adds.
    """
    options = {
        "example": example,
        "text": trainer.text.fingerprint,
        "config": args.config,
        "method": args.method,
        **run_options(args),
        **asdict(trainer.recipe),
    }
    fit(trainer, args.output, options, resume=args.resume)
    text = trainer.text.test
    test = perplexity(trainer.average, text)
    prepared = {name: perplexity(iss.prepare(trainer.average, name), text) for name in PREPARED}
    if is_first():
        measured: dict[str, Any] = {"config": args.config, "valid": trainer.history[-1]["valid"]}
        measured |= {"test": test, "test_prepared": prepared}
        write_result(args.output, options, trainer, measured | measure())


def share(data: Tensor) -> Tensor:
    """The columns of [L, B] that are this process' own."""
    return data[:, part()].contiguous()


@torch.no_grad()
def perplexity(model: nn.Module, words: Tensor, batch: int = EVALUATION_BATCH) -> float:
    """exp of the mean loss per word over words [N] in `batch` strips, in evaluation mode."""
    model.eval()
    data = share(strips(words, batch))
    total, state = torch.zeros(2, dtype=torch.float64), None
    for tokens, targets in windows(data, 35):
        logits, state = model(tokens, state)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total += torch.tensor([loss.item(), targets.numel()], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return _exp((total[0] / total[1]).item())


def _exp(value: float) -> float:
    """inf where it is larger than any float."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
