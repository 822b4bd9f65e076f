# SPDX-License-Identifier: Apache-2.0
"""What bench_training.py and bench_lasso.py measured: the tables of docs/training.md.

python bench/report_training.py [--docs PATH]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

from report import RESULTS, digits, replace_block, wrapped

HIDDEN = (64, 256, 650)
Rows = list[dict[str, str]]


def load(name: str) -> Rows:
    """The rows of a CSV in bench/results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def training(rows: Rows) -> Iterable[str]:
    """One layer, forward and backward."""
    points: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("threads", "packed", "features", "H", "B"))
        points.setdefault(key, {})[row["provider"]] = row
    yield "| H | B | nn.LSTM | ISSLSTM | recompute | speed-up | nn.LSTM of roof | ISSLSTM of roof |"
    yield "|--:" * 8 + "|"
    speed_ups: dict[tuple[str, ...], list[float]] = {}
    for (threads, packed, features, h, b), by_name in points.items():
        torchs = min(
            (by_name[name] for name in ("nn.LSTM", "nn.LSTM without oneDNN")),
            key=lambda row: float(row["ms_p50"]),
        )
        ours = by_name["ISSLSTM"]
        over = float(torchs["ms_p50"]) / float(ours["ms_p50"])
        kind = "packed" if packed == "1" else "features" if features == "1" else "padded"
        speed_ups.setdefault((kind, threads), []).append(over)
        if threads != "1" or features == "1" or int(h) not in HIDDEN:
            continue
        times = [digits(float(row["ms_p50"])) for row in (torchs, ours)]
        again = digits(float(by_name["ISSLSTM recompute"]["ms_p50"]))
        roofs = [f"{float(r['roofline']):.2f}" if r["roofline"] else "-" for r in (torchs, ours)]
        rows_of = f"{b}, 1 to 64 steps" if packed == "1" else b
        yield f"| {h} | {rows_of} | {' | '.join([*times, again, f'{over:.2f}', *roofs])} |"
    last = rows[-1]
    yield ""
    yield wrapped(
        f"Milliseconds of a forward and a backward pass, I = H, 35 steps, float32, 1 thread "
        f"({last['device']}, {last['isa']}; torch {last['torch']}). nn.LSTM runs with or without "
        "oneDNN, whichever is faster."
    )
    yield ""
    yield "| problems | threads | speed-up | least |"
    yield "|:--|--:|--:|--:|"
    for (kind, threads), values in speed_ups.items():
        yield f"| {kind} | {threads} | {geometric_mean(values):.2f} | {min(values):.2f} |"
    yield ""
    yield wrapped(
        "Geometric mean of the speed-up over all sizes, and the least. Features: the padded "
        "problems over an input that needs no gradient."
    )


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
    block = "\n".join([*training(load("training.csv")), "", *lasso(load("lasso.csv"))])
    print(block)
    if options.docs:
        replace_block(options.docs, "training", block)


if __name__ == "__main__":
    main()
