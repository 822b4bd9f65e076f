# SPDX-License-Identifier: Apache-2.0
"""What bench_training.py, bench_resets.py and bench_lasso.py measured: tables of docs/training.md.

python bench/report_training.py [--docs PATH]

A cell, or the resets, without a CSV of record is left out.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

from harness import RESULTS, record
from report import MODULES, digits, replace_block, wrapped

HIDDEN = (64, 256, 650)
Rows = list[dict[str, str]]
SpeedUps = dict[tuple[str, str, str], list[float]]  # by module, kind of problem and threads


def load(path: Path) -> Rows:
    """The rows of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def about(row: dict[str, str]) -> str:
    """The machine, as a row has it."""
    return f"{row['device']}, {row['isa']}; torch {row['torch']}"


def training(rows: Rows, module: str, speed_ups: SpeedUps) -> Iterable[str]:
    """One layer, forward and backward; adds what every problem gained to speed_ups."""
    ours_name = module.replace("nn.", "ISS")
    points: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("threads", "packed", "features", "H", "B"))
        points.setdefault(key, {})[row["provider"]] = row
    columns = ("H", "B", module, ours_name, "recompute", "speed-up")
    yield f"| {' | '.join(columns)} | {module} of roof | {ours_name} of roof |"
    yield "|--:" * 8 + "|"
    for (threads, packed, features, h, b), by_name in points.items():
        torchs = min(
            (row for name, row in by_name.items() if name.startswith("nn.")),
            key=lambda row: float(row["ms_p50"]),
        )
        ours = by_name[ours_name]
        over = float(torchs["ms_p50"]) / float(ours["ms_p50"])
        kind = "packed" if packed == "1" else "features" if features == "1" else "padded"
        speed_ups.setdefault((module, kind, threads), []).append(over)
        if threads != "1" or features == "1" or int(h) not in HIDDEN:
            continue
        times = [digits(float(row["ms_p50"])) for row in (torchs, ours)]
        again = digits(float(by_name[f"{ours_name} recompute"]["ms_p50"]))
        roofs = [f"{float(r['roofline']):.2f}" if r["roofline"] else "-" for r in (torchs, ours)]
        rows_of = f"{b}, 1 to 64 steps" if packed == "1" else b
        yield f"| {h} | {rows_of} | {' | '.join([*times, again, f'{over:.2f}', *roofs])} |"
    onednn = " nn.LSTM runs with or without oneDNN, whichever is faster." * (module == "nn.LSTM")
    yield ""
    yield wrapped(
        f"Milliseconds of a forward and a backward pass, I = H, 35 steps, float32, 1 thread "
        f"({about(rows[-1])}).{onednn}"
    )
    yield ""


def means(speed_ups: SpeedUps) -> Iterable[str]:
    """What all problems gained."""
    yield "| module | problems | threads | speed-up | least |"
    yield "|:--|:--|--:|--:|--:|"
    for key, values in speed_ups.items():
        yield f"| {' | '.join(key)} | {geometric_mean(values):.2f} | {min(values):.2f} |"
    yield ""
    yield wrapped(
        "Speed-up over all sizes: geometric mean and least. Features: the padded problems over an "
        "input that needs no gradient."
    )
    yield ""


def resets(rows: Rows) -> Iterable[str]:
    """What resets cost us, and what they cost torch's modules."""
    yield "| module | H | T | B | ours | with resets | cost | torch, split |"
    yield "|:--|--:|--:|--:|--:|--:|--:|--:|"
    points: dict[tuple[str, ...], dict[tuple[bool, bool], float]] = {}
    costs = []
    for row in rows:
        name = row["provider"].replace("nn.", "ISS")
        key = (name, *(row[column] for column in ("H", "T", "B", "training", "threads")))
        which = row["provider"] == name, float(row["resets"]) > 0
        points.setdefault(key, {})[which] = float(row["ms_p50"])
    for (name, h, t, b, train, threads), ms in points.items():
        costs.append(ms[True, True] / ms[True, False])
        if train == "1" and threads == "1":
            times = [digits(ms[key]) for key in ((True, False), (True, True))]
            cost = f"{costs[-1] - 1:+.1%}"
            yield f"| {' | '.join([name, h, t, b, *times, cost, digits(ms[False, True])])} |"
    yield ""
    yield wrapped(
        "Milliseconds of a forward and a backward pass where 3 % of the mask is True, 1 thread "
        f"({about(rows[-1])}). Split: torch's module over the segments between resets, padded and "
        f"packed. Over all {len(costs)} points, forward alone and more threads included, "
        f"resets cost {geometric_mean(costs) - 1:.1%} (geometric mean)."
    )
    yield ""


def lasso(rows: Rows) -> Iterable[str]:
    """The regulariser over the largest model."""
    yield "| operation | threads | ms | GB/s | compared with | speed-up |"
    yield "|:--|--:|--:|--:|:--|--:|"
    points: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["dtype"] == "float32":
            key = (row["kernel"], row["layers"], row["H"], row["threads"])
            points.setdefault(key, {})[row["provider"]] = row
    for (kernel, _, h, threads), by_name in points.items():
        if h != "1500":
            continue
        ours = by_name["iss_kernels"]
        for name, row in by_name.items():
            if name != "iss_kernels":
                over = float(row["ms_p50"]) / float(ours["ms_p50"])
                yield (
                    f"| {kernel} | {threads} | {digits(float(ours['ms_p50']))} | "
                    f"{float(ours['gbps']):.0f} | {name} | {over:.2f} |"
                )
    yield ""
    steps = []
    for (kernel, layers, h, threads), by_name in points.items():
        if kernel == "with the lasso":
            plain = float(points["training step", layers, h, threads]["iss_kernels"]["ms_p50"])
            change = float(by_name["iss_kernels"]["ms_p50"]) / plain - 1
            steps.append(f"{layers}x{h} {change:+.1%} ({threads} thread{'s' * (threads != '1')})")
    yield wrapped(
        "The group lasso over a language model of two layers of 1500 units and 10,000 words. A "
        f"whole training step with `add_gradients_` against one without: {', '.join(steps)}."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, metavar="PATH", help="between its training markers")
    options = parser.parse_args()
    speed_ups: SpeedUps = {}
    lines: list[str] = []
    for cell, module in MODULES.items():
        if rows := load(record("training", cell)):
            lines += training(rows, module, speed_ups)
    lines += means(speed_ups)
    if rows := load(RESULTS / "resets.csv"):
        lines += resets(rows)
    block = "\n".join([*lines, *lasso(load(RESULTS / "lasso.csv"))])
    print(block)
    if options.docs:
        replace_block(options.docs, "training", block)


if __name__ == "__main__":
    main()
