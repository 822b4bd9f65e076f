# SPDX-License-Identifier: Apache-2.0
"""The table of the runs, and pictures of one.

    python -m examples.ptb.report examples/ptb/results/*.json
    python -m examples.ptb.report --pictures runs/iss

The first prints a table in Markdown: means over seeds, shares of the config's baseline. The second
draws a run's course and its weight matrices, with what left in white, as the paper's figure 4 does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from examples import command_line
from examples.ptb.recipes import CONFIGS, Recipe
from examples.ptb.train import PREPARED, build, find
from examples.training import CHECKPOINT, LOG, RESULT, DataError, of_run
from iss_kernels import shrink_
from iss_kernels.demo.model import enlarge_

# Options in which the runs of a row may differ.
ALIKE = ("seed", "config", "threads", "matmul_precision")
HEADINGS = (
    "config", "method", "embedding, units", "valid", "test", "in bfloat16; int8", "parameters",
    "multiply-adds of the LSTM; of all", "minutes",
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for all runs that differ in their seed alone."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        # An option that an earlier run did not have was as it is by default.
        options = asdict(Recipe()) | result["options"]
        recipe = json.dumps({k: v for k, v in options.items() if k not in ALIKE}, sort_keys=True)
        runs = rows.setdefault((result["config"], result["label"], recipe), [])
        if any(run["options"]["seed"] == options["seed"] for run in runs):
            raise DataError(
                "expected runs that differ in more than their file, got two of "
                f"{result['config']}, {result['label']} with seed {options['seed']}"
            )
        runs.append(result)
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
    from examples.ptb.pictures import curves, weights  # which need matplotlib

    options, state = of_run(folder, "--pictures")
    if options.get("example") != "ptb":
        raise DataError(f"expected --pictures of a run of examples.ptb, got {folder}, of another")
    recipe = Recipe(**{field.name: options[field.name] for field in fields(Recipe)})
    vocabulary = len(state["model"]["decoder.bias"])
    big, small = build(recipe, vocabulary), build(recipe, vocabulary)
    shrink_(small, find(recipe, small), keep=state["kept"])
    small.load_state_dict(state["model"])
    groups = find(recipe, big)
    enlarge_(big, groups, small, state["kept"])
    curves(state["history"]).savefig(folder / "curves.svg")
    weights(groups).savefig(folder / "weights.png", dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_line.parser("examples.ptb.report", __doc__)
    parser.add_argument("results", nargs="*", type=Path, help=f"copies of {RESULT}")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=f"a run: {CHECKPOINT}, {LOG}")
    args = parser.parse_args(argv)
    return command_line.main("examples.ptb.report", lambda: run(args), args)


def run(args: argparse.Namespace) -> None:
    """The pictures, the table, or both."""
    if not (args.pictures or args.results):
        raise DataError(f"expected copies of {RESULT}, or --pictures, got neither")
    if args.pictures:
        pictures(args.pictures)
    if args.results:
        results = command_line.results(args.results, "ptb")
        for path, result in zip(args.results, results, strict=True):
            if result.get("config") not in CONFIGS:
                expected = ", ".join(CONFIGS)
                raise DataError(
                    f"expected a config of {expected} in {path}, got {result.get('config')}"
                )
        print(table(results))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
