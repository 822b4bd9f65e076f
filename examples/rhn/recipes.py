# SPDX-License-Identifier: Apache-2.0
"""The recipes: the paper's own, and one that trains on a processor within the hour.

The loss is the sum over the time steps of a batch, its mean over the rows, as in the paper's code;
see examples/ptb/recipes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from examples.ptb.recipes import Schedule, option

METHODS = ("baseline", "iss")
DROPS = ("drop_word", "drop_input", "drop_state", "drop_output")


@dataclass(frozen=True)
class Recipe(Schedule):
    """Every number of a run; the defaults are the paper's baseline."""

    width: int = option("units, and size of the word vectors", 830)
    depth: int = option("micro-steps of a time step", 10)
    bias: float = option("of the transform gates at the start", -2.0)
    drop_word: float = option("probability that a word of a window is dropped", 0.25)
    drop_input: float = option("the same of an element of the network's input", 0.75)
    drop_state: float = option("the same of an element of the state", 0.25)
    drop_output: float = option("the same of an element of the output", 0.75)
    l2: float = option("weight decay", 1e-7)
    epochs: int = option("passes over the text", 500)
    rate: float = option("learning rate of SGD at the start", 0.2)
    decay: float = option("factor on the learning rate", 1 / 1.02)
    hold: int = option("epochs before the first decay", 20)
    threshold: float = option("smaller elements of the groups become zero", 4e-4)


PAPER = Recipe()
CONFIGS = {
    "paper": PAPER,
    "small": replace(
        PAPER, width=256, epochs=10, rate=0.5, decay=0.4, hold=6,
        drop_word=0.05, drop_input=0.15, drop_state=0.05, drop_output=0.15,
    ),
}  # fmt: skip


# What the method "iss" changes. The paper drops 0.6 times as much. The lasso of `small` is a
# proximal step for five epochs and a tenth of it after them; what is left has six epochs more.
CHANGES: dict[str, dict[str, Any]] = {
    "paper": {
        "strength": 0.005,
        "drop_word": 0.15, "drop_input": 0.45, "drop_state": 0.15, "drop_output": 0.45,
    },
    "small": {
        "strength": 0.005, "proximal": True, "until": 5, "relax": 0.1, "epochs": 16, "hold": 11,
    },
}  # fmt: skip


def recipe(config: str, method: str) -> Recipe:
    """The recipe of a method."""
    return replace(CONFIGS[config], **(CHANGES[config] if method == "iss" else {}))
