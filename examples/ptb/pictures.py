# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: its course, and what is left of its matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from iss_kernels import Groups
from iss_kernels.demo.figures import weight_pictures


def curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Perplexities and units by epoch."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name in ("train", "valid"):
        left.plot(epochs, [row[name] for row in history], label=name)
    left.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    for family in history[0]["units"]:
        right.plot(epochs, [row["units"][family] for row in history], label=family)
    right.set(xlabel="epoch", ylabel="units", ylim=(0, None))
    left.legend()
    right.legend()
    return figure


def weights(groups: Groups) -> Figure:
    """The share of non-zeros in each block of each matrix, dark where all are."""
    drawn = weight_pictures(groups)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, picture in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        axis.imshow(picture.density, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        rows, columns = picture.shape
        axis.set(title=picture.name.replace(".", "\n", 1), xlabel=f"{rows} x {columns}")
        axis.set(xticks=[], yticks=[])
    return figure
