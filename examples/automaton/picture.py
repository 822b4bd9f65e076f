# SPDX-License-Identifier: Apache-2.0
"""The picture of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Units left against units needed, a dot for each run."""
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    most = max(run["bits"] for run in runs)
    axis.plot([0, most + 0.5], [0, most + 0.5], color="#8b93a1", label="units needed")
    cells = list(dict.fromkeys(run["cell"] for run in runs))
    for place, (cell, colour) in enumerate(zip(cells, ("#2f7fe6", "#e0861a"), strict=False)):
        own = [run for run in runs if run["cell"] == cell]
        for solved, face in ((True, colour), (False, "none")):
            its = [run for run in own if (run["wrong"] == 0) == solved]
            # Dots of the same place stand side by side: by cell, then by seed.
            seeds = sorted({run["seed"] for run in own})
            shift = [0.24 * place - 0.12 + 0.06 * seeds.index(r["seed"]) - 0.06 for r in its]
            if its:
                axis.scatter(
                    [r["bits"] + s for r, s in zip(its, shift, strict=True)],
                    [r["units"] for r in its], 22, color=colour, facecolor=face,
                    label=f"ISS{cell.upper()}" + ("" if solved else ", with wrong answers"),
                )  # fmt: skip
    axis.set(xlabel="bits to remember", ylabel="units left", xlim=(0.5, most + 0.5))
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(1, most + 1))
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
