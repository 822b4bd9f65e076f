# SPDX-License-Identifier: Apache-2.0
"""A training step of one LSTM layer against torch.nn.LSTM; check, then time.

python bench/bench_training.py [--quick] [--threads N ...] [--output CSV]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, interleaved_ms, machine, percentiles, write_csv
from peers import without_onednn
from torch import Tensor, nn

from iss_kernels import ISSLSTM
from iss_kernels.testing import assert_no_worse_than_torch


@dataclass(frozen=True)
class Problem:
    """T steps, B batch, I inputs, H hidden units."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int

    @property
    def flops(self) -> int:
        """Of a forward and a backward pass: three products with each weight, step and row."""
        return 3 * 2 * self.T * self.B * 4 * self.H * (self.I + self.H)


SIZES = [(100, 64), (128, 128), (256, 200), (256, 256), (373, 315), (512, 512)]  # I, H
CALLS = [(1, 1), (30, 1), (30, 10), (30, 64)]  # T, B
PROBLEMS = [Problem(t, b, i, h) for i, h in SIZES for t, b in CALLS]
QUICK = [Problem(1, 1, 100, 64), Problem(30, 10, 128, 128)]


def training_step(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.backward(module(x).sum())


def measure(problem: Problem, threads: int, seconds: float) -> list[dict[str, object]]:
    """Rows for all providers of one problem."""
    torch.manual_seed(0)
    torchs = nn.LSTM(problem.I, problem.H)
    ours = ISSLSTM.from_torch(torchs)
    x = torch.randn(problem.T, problem.B, problem.I)
    providers: dict[str, Callable[[Tensor], Tensor]] = {
        "nn.LSTM": lambda x: torchs(x)[0],
        "nn.LSTM without oneDNN": without_onednn(lambda x: torchs(x)[0]),
        "ISSLSTM": lambda x: ours(x)[0],
    }
    with torch.no_grad():
        truth = nn.LSTM(problem.I, problem.H).double()
        truth.load_state_dict(torchs.state_dict())
        assert_no_worse_than_torch(ours(x)[0], torchs(x)[0], truth(x.double())[0])
    rows: list[dict[str, object]] = []
    functions = {name: training_step(module, x) for name, module in providers.items()}
    for name, values in interleaved_ms(functions, seconds).items():
        p20, p50, p80 = percentiles(values)
        rows.append(
            {
                "kernel": "lstm", "provider": name, "mode": "training", "T": problem.T,
                "B": problem.B, "I": problem.I, "H": problem.H, "dtype": "float32",
                "threads": threads, "ms_p50": f"{p50:.4f}", "ms_p20": f"{p20:.4f}",
                "ms_p80": f"{p80:.4f}", "gflops": f"{problem.flops / p50 / 1e6:.1f}", **machine(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two problems, a few seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--output", type=Path, default=RESULTS / "training.csv")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    print(f"{'':34}{'nn.LSTM':>10}{'no oneDNN':>11}{'ISSLSTM':>9}  ratio   ms, p50; ratio: nn.LSTM")
    with contextlib.suppress(KeyboardInterrupt):
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            for problem in QUICK if options.quick else PROBLEMS:
                new = measure(problem, threads, seconds=0.3 if options.quick else 1.5)
                rows += new
                torchs, plain, ours = (float(str(row["ms_p50"])) for row in new)
                label = f"{problem.I}->{problem.H} B{problem.B} T{problem.T} x{threads}"
                print(f"{label:<34}{torchs:10.3f}{plain:11.3f}{ours:9.3f}{torchs / ours:7.2f}")
    if rows:
        write_csv(options.output, rows)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
