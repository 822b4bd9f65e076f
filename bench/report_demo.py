# SPDX-License-Identifier: Apache-2.0
"""What the demo measured: the picture docs/demo.svg and the table in README.md.

python bench/report_demo.py [JSON] [--plot SVG] [--docs PATH]

The JSON is the demo's result.json. A number that it does not hold is a dash in the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from harness import RESULTS
from report import replace_block, wrapped

OLD, NEW, INK = "#c2610c", "#1f6fd6", "#333333"
Result = dict[str, Any]


# -- table


def markdown(result: Result, name: str) -> str:
    """Big nn.LSTM against the small model: by nn.LSTM, by ISSLSTM, with int8 weights."""
    sizes = [" + ".join(map(str, result[f"hidden_{when}"])) for when in ("before", "after")]
    counts = [f"{result[f'params_{when}']:,}" for when in ("before", "after")]
    names = ("perplexity_before", "perplexity_after", "perplexity_after", "perplexity_int8")
    perplexities = [f"{result[name]:.2f}" if name in result else "-" for name in names]
    rows = [
        ["LSTM units", sizes[0], *[sizes[1]] * 3],
        ["LSTM parameters", counts[0], *[counts[1]] * 3],
        ["test perplexity", *perplexities],
    ]
    for batch in result["torch_ms"]:
        rows.append([f"30 steps, batch {batch}", *times(result, batch)])
    table = [
        "| | big nn.LSTM | small nn.LSTM | small ISSLSTM | small, int8 |",
        "|:--|--:|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    machine = result["machine"]
    text = (
        f"{epochs(result)} epochs each, from the same weights, on {result['text']} (seed "
        f"{result['seed']}). {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}. The small nn.LSTM is one nn.LSTM per layer. `make demo` "
        f"measures; `python bench/report_demo.py --docs README.md` writes this table from "
        f"[bench/results/{name}](bench/results/{name})."
    )
    return "\n".join([*table, "", wrapped(text)])


def times(result: Result, batch: str) -> list[str]:
    """Milliseconds by column, and how many times as fast as the big nn.LSTM that is."""
    big = result["torch_ms"][batch]
    cells = [f"{big:.2f} ms"]
    for name in ("small_torch_ms", "iss_ms", "int8_ms"):
        ms = result.get(name, {}).get(batch)
        cells.append("-" if ms is None else f"{ms:.2f} ms ({big / ms:.1f}x)")
    return cells


def epochs(result: Result) -> int:
    """How long each of the two models trained."""
    return sum(row["stage"] == "baseline" for row in result["history"])


# -- picture


def draw(result: Result) -> Any:
    """Units against perplexity, epoch by epoch, and against the time of a call."""
    import matplotlib

    matplotlib.use("svg")
    style: dict[Any, Any] = {
        "svg.hashsalt": "iss_kernels",  # ids that do not change from run to run
        "svg.fonttype": "none",  # text stays text
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    matplotlib.rcParams.update(style)
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    figure.set_facecolor("white")
    for axis in (left, right):
        axis.set_xlabel("LSTM units left")
        axis.set_xlim(0, 1.2 * sum(result["hidden_before"]))
        axis.grid(alpha=0.25)
    draw_perplexity(left, result)
    draw_times(right, result)
    return figure


def draw_perplexity(axis: Any, result: Result) -> None:
    """A path for each model: where it stands after every epoch."""
    paths: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    for row in result["history"]:
        paths[row["stage"] == "baseline"].append((sum(row["alive"]), row["valid"]))
    for is_baseline, path in paths.items():
        colour = OLD if is_baseline else NEW
        axis.plot(*zip(*path, strict=True), "-o", color=colour, markersize=3.5, linewidth=1.5)
        units, perplexity = path[-1]
        name = "nn.LSTM" if is_baseline else "with group lasso"
        text = f"{name}\n{units} units\nperplexity {perplexity:.1f}"
        mark(axis, path[-1], text, colour, below=True)
    axis.set_ylim(bottom=0)
    axis.set_title("perplexity while training, a dot per epoch", fontsize=10)
    axis.set_ylabel("perplexity of the validation text")


def draw_times(axis: Any, result: Result) -> None:
    """A dot for each way to run the model: the first batch size, 30 steps."""
    batch = next(iter(result["torch_ms"]))
    big, small = sum(result["hidden_before"]), sum(result["hidden_after"])
    points = [
        (units, result[key][batch], name, colour)
        for units, key, name, colour in (
            (big, "torch_ms", "nn.LSTM", OLD),
            (small, "small_torch_ms", "nn.LSTM", OLD),
            (small, "iss_ms", "ISSLSTM", NEW),
        )
        if key in result
    ]
    for units, ms, name, colour in points:
        mark(axis, (units, ms), f"{name}\n{ms:.2f} ms", colour, below=False)
    arrow = {"arrowstyle": "->", "color": INK, "shrinkA": 7, "shrinkB": 7}
    for start, end in itertools.pairwise(points):
        axis.annotate("", end[:2], xytext=start[:2], arrowprops=arrow)
    axis.set_ylim(0, 1.25 * points[0][1])
    speed_up = points[0][1] / points[-1][1]
    axis.set_title(f"time of a call: {speed_up:.1f} times as fast", fontsize=10)
    axis.set_ylabel(f"ms for 30 steps, batch {batch}")


def mark(axis: Any, at: tuple[float, float], text: str, colour: str, below: bool) -> None:
    """A large dot with a label below it or on its left."""
    axis.plot(*at, "o", color=colour, markersize=9)
    axis.annotate(
        text,
        at,
        xytext=(0, -9) if below else (-11, 0),
        textcoords="offset points",
        color=colour,
        ha="center" if below else "right",
        va="top" if below else "center",
        fontweight="bold",
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "demo.json")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the picture there")
    parser.add_argument("--docs", type=Path, metavar="PATH", help="between its demo markers")
    options = parser.parse_args()
    result = json.loads(options.json.read_text())
    block = markdown(result, options.json.name)
    print(block)
    if options.plot:
        draw(result).savefig(options.plot, metadata={"Date": None})
    if options.docs:
        try:
            replace_block(options.docs, "demo", block)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
