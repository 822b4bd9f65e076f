# SPDX-License-Identifier: Apache-2.0
"""The recipes: TensorFlow's tutorial for `small` and `medium`, the paper's own for `large`.

The loss is the sum over the time steps of a batch, its mean over the rows, as in the paper's code;
strengths, learning rates and clipping belong to that scale. For a mean over steps too, divide the
strength by the steps (0.00245 / 35 = 7.0e-5) and multiply the learning rate by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

METHODS = ("baseline", "iss", "iss-finetune", "l1", "direct")
FROM_BASELINE = ("iss-finetune", "l1")  # start from a baseline's weights


def option(text: str, default: Any) -> Any:
    """A field with the text of its option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Schedule:
    """The numbers of training over windows of text, with a group lasso; the paper's for LSTMs."""

    epochs: int = option("passes over the text", 55)
    batch: int = option("rows of a batch, each a strip of the text", 20)
    steps: int = option("words of a row", 35)
    init: float = option("weights start uniform in [-init, init]", 0.04)
    clip: float = option("largest norm of the gradient", 10.0)
    rate: float = option("learning rate at the start", 1.0)
    decay: float = option("factor on the learning rate; 0: half a cosine down to zero", 1 / 1.15)
    hold: int = option("epochs before the first decay", 14)
    stride: int = option("epochs between two decays", 1)
    strength: float = option("lambda of the group lasso", 0.0)
    factors: tuple[tuple[str, float], ...] = option("on lambda, e.g. lstm.l1=1.5", ())
    proximal: bool = option("the lasso shrinks norms after the step (else: its gradient)", False)
    warmup: int = option("batches in which lambda rises from 0", 0)
    threshold: float = option("smaller elements become zero after each step", 1e-4)
    every: int = option("batches between two looks for dead units", 100)
    after: int = option("batches before which dead units may come back", 0)
    until: int = option("epochs after which the penalties are `relax` of themselves; 0: never", 0)
    relax: float = option("share of the penalties that stays after `until`", 0.0)
    target: float = option("share of the units that the lasso leaves; 0: `strength` decides", 0.0)
    horizon: int = option("batches until the target is reached, about", 2600)
    average: float = option("decay of the weights' average, which is measured; 0: none", 0.0)
    autocast: bool = option("train under autocast to bfloat16; perplexities stay float32", False)
    remove: bool = option("dead units leave during training (else they stay, at zero)", True)

    def learning_rate(self, epoch: int) -> float:
        """Of an epoch, counted from 0."""
        if self.decay == 0:
            return self.rate * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.rate * self.decay ** (max(0, epoch + 1 - self.hold) // self.stride)


@dataclass(frozen=True)
class Recipe(Schedule):
    """Every number of a run; the defaults are the paper's `large` baseline."""

    hidden: tuple[int, ...] = option("units of each layer", (1500, 1500))
    embedding: int = option("size of the word vectors", 1500)
    tied: bool = option("the softmax shares the embedding's weight", False)
    keep: float = option("share of the activations that dropout keeps", 0.35)
    optimizer: str = option("sgd or adamw", "sgd")
    weight_decay: float = option("of AdamW", 0.0)
    weight_drop: float = option("share of the recurrent weights dropped for a batch", 0.0)
    l1: float = option("lambda of the L1 penalty", 0.0)
    groups: str = option("whose dimensions may leave: lstm or lstm+embedding", "lstm")


LARGE = Recipe()
MEDIUM = replace(
    LARGE, hidden=(650, 650), embedding=650, epochs=39, keep=0.5, init=0.05, clip=5.0,
    decay=0.8, hold=6,
)  # fmt: skip
SMALL = replace(
    LARGE, hidden=(200, 200), embedding=200, epochs=13, steps=20, keep=1.0, init=0.1, clip=5.0,
    decay=0.5, hold=4,
)  # fmt: skip
# A recipe of today: AdamW, half a cosine, dropped recurrent weights (Merity et al. 2018), a tied
# softmax (Press & Wolf 2017).
MODERN = replace(
    MEDIUM, tied=True, epochs=20, keep=0.5, clip=8.75, optimizer="adamw", rate=2e-3, decay=0.0,
    weight_drop=0.3,
)  # fmt: skip
CONFIGS = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "modern": MODERN}

# What a method changes of a config. The paper's learning rate falls to a tenth after each third of
# an ISS run: `lr_decay ** (epoch // (55 // 3))`.
_THIRDS = {"decay": 0.1, "hold": 1}
_IN_STEPS: dict[str, Any] = {"proximal": True, "until": 6, "relax": 0.1}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "large": {
        "iss": {"keep": 0.6, "strength": 0.00245, "stride": 18, **_THIRDS},
        "iss-finetune": {"keep": 0.6, "strength": 0.00245, "stride": 18, **_THIRDS},
        "l1": {"keep": 0.6, "l1": 1e-4, "threshold": 2e-4, "stride": 18, **_THIRDS},
        "direct": {"keep": 0.55, "hidden": (373, 315)},
    },
    "medium": {
        "iss": {"keep": 0.6, "strength": 0.00245, "stride": 13, **_THIRDS},
        "iss-finetune": {"keep": 0.6, "strength": 0.00245, "stride": 13, **_THIRDS},
        "l1": {"keep": 0.6, "l1": 1e-4, "threshold": 2e-4, "stride": 13, **_THIRDS},
        "direct": {"keep": 0.6},
    },
    "modern": {
        "iss": {"strength": 0.004, **_IN_STEPS, "warmup": 600},
        "iss-finetune": {"strength": 0.004, **_IN_STEPS},
        "l1": {"l1": 1e-4, "threshold": 2e-4},
        "direct": {},
    },
    "small": {
        "iss": {"strength": 0.002, "stride": 4, **_THIRDS},
        "iss-finetune": {"strength": 0.002, "stride": 4, **_THIRDS},
        "l1": {"l1": 1e-4, "threshold": 2e-4, "stride": 4, **_THIRDS},
        "direct": {},
    },
}


def recipe(config: str, method: str) -> Recipe:
    """The recipe of a method."""
    return replace(CONFIGS[config], **CHANGES[config].get(method, {}))
