# SPDX-License-Identifier: Apache-2.0
"""The report's pictures as inline SVG, in colours that work on light and dark backgrounds.

Text and axes take the page's own colour (`currentColor`); backgrounds are transparent. No state of
pyplot is touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from iss_kernels import Groups
from iss_kernels.demo.timing import ENGINES

OLD, NEW, TUNED, FAINT = "#e0861a", "#2f7fe6", "#1fa37a", "#8b93a1"
_GATES = "ifgo"  # of the LSTM, from its first rows on
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class WeightPicture:
    """One weight matrix, shrunk to a picture: the share of non-zeros in each of its blocks."""

    name: str
    shape: tuple[int, int]
    gates: bool  # whether its rows are the gates of an LSTM
    density: numpy.ndarray[Any, numpy.dtype[numpy.float64]]


def weight_pictures(groups: Groups, pixels: int = 300) -> list[WeightPicture]:
    """A picture of at most pixels x pixels of every weight in `groups`."""
    pictures = []
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        alive = (parameter.detach() != 0).double()[None]
        rows, columns = parameter.shape
        density = torch.nn.functional.adaptive_avg_pool2d(
            alive, (min(pixels, rows), min(pixels, columns))
        )[0]
        gates = bool((weight.row_units >= 0).any())
        pictures.append(WeightPicture(weight.name, (rows, columns), gates, density.numpy()))
    return pictures


def norms(start: list[list[float]], baseline: list[list[float]], iss: list[list[float]]) -> str:
    """Group norms of each layer, largest first: at the start, of the baseline, after ISS."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(start), sharey=True, squeeze=False)[0]
        for layer, axis in enumerate(axes):
            for values, label, colour, line in (
                (start, "before training", FAINT, "--"),
                (baseline, "baseline, trained", OLD, "-"),
                (iss, "after ISS", NEW, "-"),
            ):
                axis.plot(sorted(values[layer], reverse=True), line, color=colour, label=label)
            axis.set(title=f"layer {layer + 1}", xlabel="unit, by its norm")
            axis.margins(x=0.02)
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("norm of the unit's group")
        axes[-1].legend()

    return _svg("norms", (8.6, 3.1), draw)


def weights(pictures: list[WeightPicture]) -> str:
    """Every weight matrix: coloured where weights are, empty where whole rows or columns left."""

    def draw(figure: Figure) -> None:
        # A square root keeps the tall ones from making the others invisible.
        widths = [picture.shape[1] ** 0.5 for picture in pictures]
        grid = figure.add_gridspec(1, len(pictures), width_ratios=widths)
        for index, picture in enumerate(pictures):
            axis = figure.add_subplot(grid[index])
            rows, columns = picture.shape
            colour = numpy.array([int(NEW[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            pixels = numpy.empty((*picture.density.shape, 4))
            pixels[..., :3], pixels[..., 3] = colour, picture.density
            axis.imshow(pixels, aspect="auto", interpolation="none", extent=(0, columns, rows, 0))
            axis.set_title(picture.name.replace(".", "\n", 1), fontsize=9)
            axis.set_xlabel(f"{rows} x {columns}", fontsize=9)
            axis.grid(False)
            axis.set_xticks([])
            axis.spines[["top", "right"]].set_visible(True)
            if picture.gates:
                height = rows / len(_GATES)
                axis.set_yticks([height * (i + 0.5) for i in range(len(_GATES))], list(_GATES))
                axis.tick_params(length=0)
                for i in range(1, len(_GATES)):
                    axis.axhline(height * i, color=_INK, linewidth=0.5)
            else:
                axis.set_yticks([])

    return _svg("weights", (8.6, 4.2), draw)


def learning(history: list[dict[str, Any]]) -> str:
    """Validation perplexity and units alive, epoch by epoch."""
    stages = {
        stage: [row for row in history if row["stage"] == stage]
        for stage in ("baseline", "iss", "tune")
    }
    offset = len(stages["iss"])
    # The small model goes on where ISS ended: its line starts at that point.
    tuned = stages["iss"][-1:] + [row | {"epoch": row["epoch"] + offset} for row in stages["tune"]]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for rows, label, colour in (
            (stages["baseline"], "baseline", OLD),
            (stages["iss"], "ISS", NEW),
            (tuned if len(tuned) > 1 else [], "small model, fine-tuned", TUNED),
        ):
            if rows:
                epochs, values = zip(*((row["epoch"], row["valid"]) for row in rows), strict=True)
                left.plot(epochs, values, "o-", markersize=3.5, color=colour, label=label)
        left.set(title="perplexity on the validation text", xlabel="epoch", yscale="log")
        left.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        left.yaxis.set_minor_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        left.legend()
        for layer in range(len(stages["iss"][0]["alive"])):
            right.plot(
                [row["epoch"] for row in stages["iss"]],
                [row["alive"][layer] for row in stages["iss"]],
                "o-",
                markersize=3.5,
                color=(NEW, TUNED, OLD, FAINT)[layer % 4],
                label=f"layer {layer + 1}",
            )
        right.set(title="units alive under ISS", xlabel="epoch")
        right.set_ylim(0, right.get_ylim()[1] * 1.05)
        right.legend()
        for axis in (left, right):
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))

    return _svg("learning", (8.6, 3.1), draw)


def timings(result: dict[str, Any]) -> str:
    """Milliseconds per call of each engine, by batch size."""
    batches = list(result["speedup"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for batch, axis in zip(batches, axes, strict=True):
            values = [result[engine][batch] for engine in ENGINES]
            bars = axis.barh(list(ENGINES.values()), values, color=[OLD, FAINT, NEW, TUNED])
            axis.bar_label(bars, [f"{value:.2f} ms" for value in values], padding=5)
            axis.set_title(f"batch {batch}: {result['speedup'][batch]:.1f}x as fast")
            axis.margins(x=0.25)
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
            axis.grid(False)
            axis.tick_params(length=0)
        axes[0].invert_yaxis()  # of both, as they share it

    return _svg("timings", (8.6, 2.2), draw)


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw a figure and return its <svg> element for use inside HTML."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # HTML knows what <svg> is without the namespaces, and ids must differ between figures.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # The page decides how wide a figure is.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )
