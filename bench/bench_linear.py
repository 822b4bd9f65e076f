# SPDX-License-Identifier: Apache-2.0
"""A prepared nn.Linear against torch's, in each precision; check, then time.

python bench/bench_linear.py [--quick] [--threads N ...] [--output CSV]
python bench/bench_linear.py --docs docs/benchmarks.md    # the table of the CSV

Rows, in_features and out_features: a head of 10 classes, the layer of a small network for one row
and for many, and the softmax layer of a language model over 10,000 words for a word, for 10, and
for 30 steps of 10. torch: nn.Linear in float32, in bfloat16 as a whole where torch multiplies it,
and with weights in 8 bits as torch.ao.quantization.quantize_dynamic makes it.
"""

from __future__ import annotations

import copy
import csv
import warnings
from functools import partial
from pathlib import Path

import torch
from harness import RESULTS, Row, command_line, each, output_of, recording, timed_rows
from report import by_engine, replace_block, wrapped
from torch import nn

from iss_kernels.linear import PreparedLinear
from iss_kernels.testing import assert_no_worse_than_torch, max_error

SIZES = (  # rows, in_features, out_features
    (1, 128, 10), (1, 256, 256), (300, 256, 256), (1, 315, 10_000), (10, 315, 10_000),
    (300, 315, 10_000), (300, 1500, 10_000),
)  # fmt: skip
QUICK = ((5, 30, 70),)
# Largest error of an answer, which is of the order of 1, with rounded weights.
ROUNDED = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
COLUMNS = {
    "torch": ("torch", "float32"), "torch bfloat16": ("torch", "bfloat16"),
    "torch int8": ("torch", "int8"), "float32": ("iss_kernels", "float32"),
    "bfloat16": ("iss_kernels", "bfloat16"), "int8": ("iss_kernels", "int8"),
}  # fmt: skip


def in_8_bits(linear: nn.Linear) -> nn.Module:
    """torch's own, whose rows are quantised on the fly too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to move to another package
        model = nn.Sequential(copy.deepcopy(linear))
        made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})  # type: ignore[no-untyped-call]
    quantised: nn.Module = made
    return quantised


@torch.inference_mode()
def measure(size: tuple[int, int, int], threads: int, seconds: float) -> list[Row]:
    """A row per engine."""
    torch.manual_seed(0)
    rows, inputs, outputs = size
    with torch.inference_mode(False):
        linear = nn.Linear(inputs, outputs)
        calls = {("torch", "int8"): in_8_bits(linear)}
        for weights in ("float32", *ROUNDED):
            calls["iss_kernels", weights] = PreparedLinear(linear, weights)
    x = torch.randn(rows, inputs)
    truth = copy.deepcopy(linear).double()(x.double())
    assert_no_worse_than_torch(calls["iss_kernels", "float32"](x), linear(x), truth)
    for weights, bound in ROUNDED.items():
        error = max_error(calls["iss_kernels", weights](x), truth)
        assert error <= bound, f"{weights}: an error of {error:.2g}"
    functions = {name: partial(call, x) for name, call in calls.items()}
    functions["torch", "float32"] = partial(linear, x)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        functions["torch", "bfloat16"] = partial(copy.deepcopy(linear).bfloat16(), x.bfloat16())
    about = {"rows": rows, "in": inputs, "out": outputs, "threads": threads}
    return timed_rows(functions, seconds, ("provider", "weights"), about)


def table(path: Path) -> str:
    """The times, and what its columns are."""
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    lines = [f"| rows, in, out; threads | {' | '.join(COLUMNS)} |"]
    lines.append("|:--|" + "--:|" * len(COLUMNS))
    for (count, inputs, outputs, threads), times in by_engine(rows, "rows", "in", "out", "threads"):
        cells = (f"{times[key]:.3g}" if key in times else "-" for key in COLUMNS.values())
        lines.append(f"| {count}, {inputs}, {outputs}; {threads} | {' | '.join(cells)} |")
    about = (
        f"Milliseconds per call ({rows[0]['device']}, {rows[0]['isa']}, torch {rows[0]['torch']}). "
        "The first three columns are nn.Linear in float32, in bfloat16 with its input and output, "
        "and after quantize_dynamic; the last three a prepared model's, with float32 in and out. "
        "`python bench/bench_linear.py`, `bench/results/linear.csv`."
    )
    return "\n".join([*lines, "", wrapped(about)])


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one small size, a second")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the table there instead")
    options = parser.parse_args()
    if options.docs:
        replace_block(options.docs, "linear", table(RESULTS / "linear.csv"))
        return
    with recording(output_of(parser, options, RESULTS / "linear.csv")) as rows:
        for threads in each(options.threads):
            for size in QUICK if options.quick else SIZES:
                new = measure(size, threads, 0.3 if options.quick else 3)
                rows += new
                times = ", ".join(f"{r['provider']} {r['weights']} {r['ms_p50']}" for r in new)
                print(f"{size} x{threads}: {times}", flush=True)


if __name__ == "__main__":
    main()
