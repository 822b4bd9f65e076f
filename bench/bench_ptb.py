# SPDX-License-Identifier: Apache-2.0
"""The language model of the paper's table 1 in its sizes, in each precision; check, then time.

python bench/bench_ptb.py [--sizes 1500,373,315 ...] [--quick] [--threads N ...] [--output CSV]
python bench/bench_ptb.py --docs docs/benchmarks.md    # the table of all machines

Wen et al. (2018, table 1) time the two LSTM layers and the softmax layer over 30 steps of 10 rows:
157.0 ms with 1500 and 1500 units, 14.82 ms with 373 and 315, 22.11 ms with 381 and 535, by Intel
MKL on 24 cores of two Xeon E5-2673 v3. The words' vectors have 1500 numbers in all three. The other
sizes are those that ISS found in examples/ptb's `large`, and its `medium` before and after. Timed
here in turn: nn.LSTM and nn.Linear, in float32 and in bfloat16 where torch multiplies it, our
prepared model in each format of the weights, and a model in bfloat16 prepared, whose input and
output are bfloat16 too. float32 is checked against torch's in float64; what is rounded must come
near. The CSV is bench/results/ptb-PROCESSOR.csv.

Multiply-adds of one step, in million: 4 H1 (E + H1) + 4 H2 (H1 + H2) + 10000 H2, 51.0 at 1500 and
1500 units, 6.8 at 373 and 315.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
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
from report import by_engine, replace_block, wrapped
from torch import Tensor, nn

import iss_kernels
from iss_kernels.demo.options import whole
from iss_kernels.testing import assert_no_worse_than_torch, max_error

# Numbers of a word's vector, units of the layers.
SIZES = (
    (1500, 1500, 1500), (1500, 381, 535), (1500, 373, 315), (1500, 237, 410), (650, 650, 650),
    (650, 243, 421),
)  # fmt: skip
QUICK = ((50, 40, 30),)
PAPER = {(1500, 1500, 1500): 157.0, (1500, 381, 535): 22.11, (1500, 373, 315): 14.82}  # ms
STEPS, BATCHES, VOCABULARY = 30, (10, 64), 10_000
# Largest error of an answer, which is of the order of 0.3, with rounded weights.
ROUNDED = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}
WHOLE = "bfloat16 model"  # its input and its output too
# Columns of the table.
COLUMNS = {
    "nn.LSTM": ("torch", "float32"),
    "nn.LSTM bfloat16": ("torch", "bfloat16"),
    WHOLE: ("iss_kernels", WHOLE),
    "float32": ("iss_kernels", "float32"),
    "bfloat16": ("iss_kernels", "bfloat16"),
    "int8": ("iss_kernels", "int8"),
}


class Plain(nn.Module):
    """An nn.LSTM for each layer, and the softmax layer."""

    def __init__(self, sizes: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(*pair) for pair in itertools.pairwise(sizes))
        self.softmax = nn.Linear(sizes[-1], vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, E], the words' vectors. Returns [T, B, V]."""
        for layer in self.layers:
            x = layer(x)[0]
        y: Tensor = self.softmax(x)
        return y


class Ours(nn.Module):
    """One ISSLSTM of several sizes, and the softmax layer, with the weights of a Plain."""

    def __init__(self, plain: Plain, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.lstm = iss_kernels.ISSLSTM(sizes[0], sizes[1:], len(sizes) - 1)
        self.softmax = plain.softmax
        weights = {
            name.replace("_l0", f"_l{i}"): weight
            for i, layer in enumerate(plain.layers)
            for name, weight in layer.state_dict().items()
        }
        self.lstm.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        """As Plain."""
        y: Tensor = self.softmax(self.lstm(x)[0])
        return y


@torch.inference_mode()
def measure(
    sizes: tuple[int, ...], batch: int, threads: int, seconds: float, vocabulary: int
) -> list[Row]:
    """A row per engine."""
    torch.manual_seed(0)
    plain = Plain(sizes, vocabulary).eval()
    ours = Ours(plain, sizes).eval()
    x = torch.randn(STEPS, batch, sizes[0])
    calls = {("torch", "float32"): partial(plain, x)}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # or nn.LSTM has none
        calls["torch", "bfloat16"] = partial(copy.deepcopy(plain).bfloat16(), x.bfloat16())
        whole = iss_kernels.prepare(copy.deepcopy(ours).bfloat16(), "bfloat16")
        calls["iss_kernels", WHOLE] = partial(whole, x.bfloat16())
    for weights in ("float32", *ROUNDED):
        calls["iss_kernels", weights] = partial(iss_kernels.prepare(ours, weights), x)
    truth = copy.deepcopy(plain).double()(x.double())
    assert_no_worse_than_torch(calls["iss_kernels", "float32"](), plain(x), truth)
    if ("iss_kernels", WHOLE) in calls:
        assert_no_worse_than_torch(
            calls["iss_kernels", WHOLE](), calls["torch", "bfloat16"](), truth
        )
    for weights, bound in ROUNDED.items():
        error = max_error(calls["iss_kernels", weights](), truth)
        assert error <= bound, f"{weights}: an error of {error:.2g}"
    about = dict(zip(("E", "H1", "H2"), sizes, strict=True), T=STEPS, B=batch, threads=threads)
    return timed_rows(calls, seconds, ("provider", "weights"), about)


def table(paths: Iterable[Path]) -> str:
    """One table of all machines, with all threads, and what its columns are."""
    lines = [f"| machine | units; rows | {' | '.join(COLUMNS)} |"]
    lines.append("|:--|:--|" + "--:|" * len(COLUMNS))
    for path in paths:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["B"] != "1"]
        threads = max(row["threads"] for row in rows)
        rows = [row for row in rows if row["threads"] == threads]
        for (first, second, batch), times in by_engine(rows, "H1", "H2", "B"):
            cells = (f"{times[key]:.1f}" if key in times else "-" for key in COLUMNS.values())
            name = f"{rows[0]['device']}, {rows[0]['isa']}, {threads} threads"
            lines.append(f"| {name} | {first} + {second}; {batch} | {' | '.join(cells)} |")
    about = (
        f"Milliseconds for {STEPS} steps of two LSTM layers and the softmax layer of "
        f"{VOCABULARY:,} words. The last four columns are ours: a model in bfloat16 prepared, with "
        "bfloat16 in and out as in the column before, and a float32 model with weights prepared in "
        "a format. "
        "On 24 cores the paper has 157.0 ms for 1500 + 1500 units and 10 rows, 22.11 for "
        "381 + 535 and 14.82 for 373 + 315. `python bench/bench_ptb.py --batch 10 64`, "
        "`bench/results/ptb-*.csv`."
    )
    return "\n".join([*lines, "", wrapped(about)])


def three(text: str) -> tuple[int, ...]:
    """Sizes as in 1500,373,315."""
    sizes = tuple(whole(size) for size in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected three sizes E,H1,H2, got {text!r}")
    return sizes


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one small size, a few seconds")
    add = parser.add_argument
    add("--sizes", nargs="+", type=three, metavar="E,H1,H2", default=SIZES)
    add("--batch", nargs="+", type=whole, default=BATCHES)
    add("--docs", type=Path, metavar="FILE", help="write the table there instead")
    options = parser.parse_args()
    if options.docs:
        replace_block(options.docs, "ptb", table(sorted(RESULTS.glob("ptb-*.csv"))))
        return
    sizes, batches = (QUICK, (2,)) if options.quick else (options.sizes, options.batch)
    with recording(output_of(parser, options, record_here("ptb"))) as rows:
        for threads in each(options.threads):
            for batch in batches:
                for size in sizes:
                    seconds, vocabulary = (0.3, 50) if options.quick else (6, VOCABULARY)
                    new = measure(size, batch, threads, seconds, vocabulary)
                    rows += new
                    times = ", ".join(f"{r['provider']} {r['weights']} {p50(r):.2f}" for r in new)
                    paper = f" (paper: {PAPER[size]})" if batch == 10 and size in PAPER else ""
                    print(f"{size} x{threads} B{batch}: {times}{paper}", flush=True)


if __name__ == "__main__":
    main()
