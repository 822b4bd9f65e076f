# SPDX-License-Identifier: Apache-2.0
"""An LSTM in each precision on this machine, inference and training; check, then time.

python bench/bench_precision.py [--quick] [--threads N ...] [--output CSV]
python bench/bench_precision.py --docs README.md             # how many times faster, by machine
python bench/bench_precision.py --docs docs/benchmarks.md    # the times

Inference is measured as bench_inference.py does its series `layer`: one layer, I = H, 30 steps, by
every engine. Training is a forward and a backward pass of 35 steps with gradients of the weights
and of the input, by nn.LSTM and ISSLSTM in float32 and in bfloat16. The CSV is
bench/results/precision-PROCESSOR.csv. A row gives the fraction of the roof that roofline.py
derives, by the peak of the unit for its precision.
"""

from __future__ import annotations

import copy
import csv
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import geometric_mean

import torch
from bench_inference import Point, measure
from bench_training import Problem, training_step
from harness import (
    RESULTS,
    Row,
    command_line,
    each,
    output_of,
    p50,
    record_here,
    recording,
    timed_rows,
)
from report import by_engine, digits, replace_block, wrapped
from roofline import roofline

import iss_kernels
from iss_kernels.demo.options import positive
from iss_kernels.testing import assert_no_worse_than_torch

HIDDEN, BATCH, STEPS = (64, 256, 512, 1024), (1, 10, 64), 30
TRAINED_HIDDEN, TRAINED_BATCH, TRAINED_STEPS = (64, 256, 650), (20, 64), 35
FIELDS = (
    "task", "engine", "precision", "H", "B", "T", "threads", "ms_p50", "ms_p20", "ms_p80",
    "roofline", "device", "isa", "torch", "onnxruntime", "openvino", "git", "date",
)  # fmt: skip


def inference(hidden: int, batch: int, threads: int, seconds: float) -> list[Row]:
    """A row for each engine."""
    point = Point("layer", (hidden, hidden), STEPS, batch, threads)
    rows = measure(point, seconds)
    return [{"task": "inference", "precision": row["weights"], "H": hidden, **row} for row in rows]


def training(hidden: int, batch: int, threads: int, seconds: float) -> list[Row]:
    """The same of a training step."""
    problem = Problem(hidden, TRAINED_STEPS, batch)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    layer = torch.nn.LSTM(hidden, hidden)
    ours = iss_kernels.ISSLSTM.from_torch(layer)
    truth = training_step(copy.deepcopy(layer).double(), problem, torch.float64)()
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    dtypes = {"float32": torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # or nn.LSTM has none
        dtypes["bfloat16"] = torch.bfloat16
    for precision, dtype in dtypes.items():
        theirs, own = (
            training_step(copy.deepcopy(module).to(dtype), problem, dtype)
            for module in (layer, ours)
        )
        for got, torchs, true in zip(own(), theirs(), truth, strict=True):
            assert_no_worse_than_torch(got, torchs, true)
        steps |= {("nn.LSTM", precision): theirs, ("ISSLSTM", precision): own}
    roof = roofline(threads)
    about = {"H": hidden, "B": batch, "T": TRAINED_STEPS, "threads": threads}
    rows = timed_rows(steps, seconds * len(steps), ("engine", "precision"), about)
    for row in rows:
        precision = str(row["precision"])
        least = roof.training_ms((hidden, hidden), TRAINED_STEPS, batch, precision=precision)
        row |= {"task": "training", "roofline": f"{least / p50(row):.4f}"}
    return rows


# -- the tables

# Columns of the times, by the engine and its precision.
CALLS = {
    "ours": ("prepared float32", "float32"),
    "nn.LSTM bfloat16": ("nn.LSTM bfloat16", "bfloat16"),
    "OpenVINO bfloat16": ("OpenVINO bfloat16", "bfloat16"),
    "ours, bfloat16": ("prepared bfloat16", "bfloat16"),
    "ONNX Runtime int8": ("ONNX Runtime int8", "int8"),
    "ours, int8": ("prepared int8", "int8"),
}
TRAINING_STEPS = {
    "nn.LSTM": ("nn.LSTM", "float32"),
    "ISSLSTM": ("ISSLSTM", "float32"),
    "nn.LSTM bfloat16": ("nn.LSTM", "bfloat16"),
    "ISSLSTM bfloat16": ("ISSLSTM", "bfloat16"),
}


def of_all(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of all machines, with a name for the machine."""
    rows: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    for row in rows:
        row["machine"] = f"{row['device']}, {row['isa']}"
    return rows


def ours(row: Mapping[str, str]) -> bool:
    """Whether it is a row of ours that counts."""
    name = "ISSLSTM" if row["task"] == "training" else f"prepared {row['precision']}"
    return row["engine"] == name


def theirs(row: Mapping[str, str]) -> bool:
    """Whether another engine's."""
    return not row["engine"].startswith(("prepared", "ISS"))


def lines_of(rows: list[dict[str, str]]) -> Iterable[list[str]]:
    """Of one machine: a line for each precision."""
    own: dict[tuple[str, ...], float] = {}  # ms by precision, task, B, H, threads
    best: dict[tuple[str, ...], float] = {}
    for row in rows:
        at = tuple(row[name] for name in ("precision", "task", "B", "H", "threads"))
        if ours(row):
            own[at] = float(row["ms_p50"])
        elif theirs(row):
            best[at] = min(best.get(at, float("inf")), float(row["ms_p50"]))
    singles = {("float32", *at[1:]): ms for at, ms in own.items() if at[0] == "float32"}

    def gain(precision: str, task: str, batch: str, over: Mapping[tuple[str, ...], float]) -> str:
        ratios = []
        for at, ms in own.items():
            other = ("float32" if over is singles else precision, *at[1:])
            if at[:2] == (precision, task) and batch in ("", at[2]) and other in over:
                ratios.append(over[other] / ms)
        return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-"

    for precision in dict.fromkeys(at[0] for at in own):
        yield [
            rows[0]["machine"], precision,
            *(gain(precision, "inference", str(batch), best) for batch in BATCH),
            gain(precision, "inference", str(BATCH[-1]), singles),
            gain(precision, "training", "", best), gain(precision, "training", "", singles),
        ]  # fmt: skip


def speed_ups(rows: list[dict[str, str]]) -> str:
    """One table of all machines, and what its columns are."""
    names = [
        "machine", "precision", *(f"{b} row{'s' * (b > 1)}" for b in BATCH),
        f"{BATCH[-1]} rows, over float32", "training", "training, over float32",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "--:|" * (len(names) - 2)]
    for _, its in itertools.groupby(rows, lambda row: row["machine"]):
        lines += [f"| {' | '.join(line)} |" for line in lines_of(list(its))]
    sizes, trained = (", ".join(map(str, hidden)) for hidden in (HIDDEN, TRAINED_HIDDEN))
    about = (
        "How many times faster than the fastest other engine of the same precision (nn.LSTM, "
        "OpenVINO, ONNX Runtime; in training nn.LSTM), and than our own float32: geometric mean, "
        f"and in brackets the least. One LSTM layer, I = H = {sizes}, {STEPS} steps; training "
        f"{trained} units, {TRAINED_STEPS} steps, {' and '.join(map(str, TRAINED_BATCH))} rows; "
        "one thread and all. `python bench/bench_precision.py`, `bench/results/precision-*.csv`."
    )
    return "\n".join([*lines, "", wrapped(about)])


def times(rows: list[dict[str, str]]) -> str:
    """A table of calls and one of training steps, on one thread, and what their columns are."""
    one = [row for row in rows if row["threads"] == "1"]
    return "\n".join(
        [
            *times_of([row for row in one if row["task"] == "inference"], CALLS),
            "",
            wrapped(
                f"Milliseconds for a call of one LSTM layer, I = H, {STEPS} steps, one thread. "
                "Other engines run a model of theirs in bfloat16 or int8; ours has weights "
                "prepared in that format, with float32 in and out."
            ),
            "",
            *times_of([row for row in one if row["task"] == "training"], TRAINING_STEPS),
            "",
            wrapped(
                f"Milliseconds for a forward and a backward pass of {TRAINED_STEPS} steps, one "
                "thread. `python bench/bench_precision.py`, `bench/results/precision-*.csv`."
            ),
        ]
    )


def times_of(rows: list[dict[str, str]], columns: Mapping[str, tuple[str, str]]) -> Iterable[str]:
    """Lines of a table by machine, units and rows."""
    yield f"| machine | units; rows | {' | '.join(columns)} |"
    yield "|:--|:--|" + "--:|" * len(columns)
    points = by_engine(rows, "machine", "H", "B", by=("engine", "precision"))
    for (machine, hidden, batch), ms in points:
        cells = (digits(ms[name]) if name in ms else "-" for name in columns.values())
        yield f"| {machine} | {hidden}; {batch} | {' | '.join(cells)} |"


BLOCKS = {"precision": speed_ups, "precision-times": times}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "two points, a few seconds")
    parser.add_argument("--seconds", type=positive, default=0.15, help="per engine and point")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write its table there instead")
    parser.add_argument("--csv", type=Path, nargs="+", help="of --docs: all in bench/results")
    options = parser.parse_args()
    if options.docs:
        rows = of_all(options.csv or sorted(RESULTS.glob("precision-*.csv")))
        page = options.docs.read_text()
        here = [name for name in BLOCKS if f"<!-- {name}:begin -->" in page]
        if not here:
            parser.error(f"expected <!-- {' or '.join(BLOCKS)}:begin --> in {options.docs}")
        for name in here:
            replace_block(options.docs, name, BLOCKS[name](rows))
        return
    grid = (
        list(itertools.product(HIDDEN, BATCH)),
        list(itertools.product(TRAINED_HIDDEN, TRAINED_BATCH)),
    )
    if options.quick:
        grid = [(64, 10)], [(64, 20)]
    with recording(output_of(parser, options, record_here("precision"))) as recorded:
        for threads in each(options.threads):
            for task, points in zip((inference, training), grid, strict=True):
                for hidden, batch in points:
                    new = task(hidden, batch, threads, options.seconds)
                    recorded += [{name: row.get(name, "") for name in FIELDS} for row in new]
                    text = ", ".join(f"{r['engine']} {p50(r):.3f}" for r in new)
                    print(f"{task.__name__} H{hidden} B{batch} x{threads}: {text}", flush=True)


if __name__ == "__main__":
    main()
