# SPDX-License-Identifier: Apache-2.0
"""The table of the runs, and pictures of one.

    python -m examples.ptb.report examples/ptb/results/*.json
    python -m examples.ptb.report --pictures runs/iss

The first prints a table in Markdown: means over seeds, shares of the config's baseline. The second
draws a run's course and its weight matrices, with what left in white, as the paper's figure 4 does.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from examples import command_line
from examples.ptb.recipes import CONFIGS, Recipe
from examples.ptb.train import PREPARED, build, find
from examples.training import CHECKPOINT, LOG, RESULT
from iss_kernels import shrink_
from iss_kernels.demo.checkpoint import load
from iss_kernels.demo.figures import weight_pictures
from iss_kernels.demo.model import enlarge_

HEADINGS = (
    "config", "method", "embedding, units", "valid", "test", "in bfloat16; int8", "parameters",
    "multiply-adds of the LSTM; of all", "minutes",
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for all runs that differ in their seed alone."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        # An option that an earlier run did not have was as it is by default.
        recipe = json.dumps(asdict(Recipe()) | result["options"] | {"seed": 0}, sort_keys=True)
        rows.setdefault((result["config"], result["label"], recipe), []).append(result)
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for (config, label, _), runs in rows.items():
        sizes = asdict(CONFIGS[config])
        baselines = (rows[key][0]["options"] for key in rows if key[:2] == (config, "baseline"))
        sizes |= next(baselines, {})
        whole = (sizes["embedding"], *sizes["hidden"])
        lines.append(
            (
                config,
                label + f", {len(runs)} seeds" * (len(runs) > 1),
                "; ".join(", ".join(map(str, run["sizes"])) for run in runs),
                _mean(runs, "valid"),
                _mean(runs, "test"),
                "; ".join(_in_format(runs, name) for name in PREPARED),
                f"{statistics.mean(run['parameters'] for run in runs) / 1e6:.2f} M",
                f"{_share(runs, whole, softmax=False)}; {_share(runs, whole, softmax=True)}",
                f"{statistics.mean(run['cpu_seconds'] for run in runs) / 60:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(runs: Sequence[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _in_format(runs: Sequence[dict[str, Any]], weights: str) -> str:
    """Test perplexity of the prepared models, which older runs did not measure."""
    values = [run["test_prepared"][weights] for run in runs if "test_prepared" in run]
    return f"{statistics.mean(values):.1f}" if values else "-"


def _share(runs: Sequence[dict[str, Any]], whole: Sequence[int], softmax: bool) -> str:
    """Multiply-adds of a time step, as a share of those of these sizes, the embedding's first."""
    all_of_them = sum(4 * h * (i + h) for i, h in pairwise(whole))
    if softmax:
        vocabulary = runs[0]["softmax_multiply_adds"] // runs[0]["sizes"][-1]
        all_of_them += vocabulary * whole[-1]
    counts = [run["lstm_multiply_adds"] + softmax * run["softmax_multiply_adds"] for run in runs]
    return f"{statistics.mean(counts) / all_of_them:.0%}"


def pictures(folder: Path) -> None:
    """Write curves.svg and weights.png into a run's folder."""
    content = load(folder / CHECKPOINT)
    options, state = content["options"], content["trainer"]
    recipe = Recipe(**{field.name: options[field.name] for field in fields(Recipe)})
    vocabulary = len(state["model"]["decoder.bias"])
    big, small = build(recipe, vocabulary), build(recipe, vocabulary)
    shrink_(small, find(recipe, small), keep=state["kept"])
    small.load_state_dict(state["model"])
    groups = find(recipe, big)
    enlarge_(big, groups, small, state["kept"])
    _curves(state["history"]).savefig(folder / "curves.svg")
    _weights(weight_pictures(groups)).savefig(folder / "weights.png", dpi=90)


def _curves(history: Sequence[dict[str, Any]]) -> Figure:
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


def _weights(drawn: Sequence[Any]) -> Figure:
    """The share of non-zeros in each block of each matrix, dark where all are."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, picture in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        axis.imshow(picture.density, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        rows, columns = picture.shape
        axis.set(title=picture.name.replace(".", "\n", 1), xlabel=f"{rows} x {columns}")
        axis.set(xticks=[], yticks=[])
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_line.parser("examples.ptb.report", __doc__)
    parser.add_argument("results", nargs="*", type=Path, help=f"copies of {RESULT}")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=f"a run: {CHECKPOINT}, {LOG}")
    args = parser.parse_args(argv)
    if args.pictures:
        pictures(args.pictures)
    if args.results:
        print(table([json.loads(path.read_text()) for path in args.results]))
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
