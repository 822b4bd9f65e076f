# SPDX-License-Identifier: Apache-2.0
"""A training step of one LSTM layer, forward and backward, against torch.nn.LSTM; check, then time.

python bench/bench_training.py [--quick] [--threads N ...] [--output CSV]

I = H, T = 35 steps, gradients of the weights and of the input, which are given up before the next
step as torch's optimisers do by default; the same over an input that needs no gradient, as features
of a first layer; then packed sequences of lengths 1 to 64. A row gives the fraction of the roof
that roofline.py derives (nothing for packed ones).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, interleaved_ms, machine, percentiles, write_csv
from peers import without_onednn
from roofline import roofline, training_flops
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from iss_kernels import ISSLSTM
from iss_kernels.testing import assert_no_worse_than_torch

HIDDEN = (64, 128, 256, 315, 650)
BATCH = (1, 20, 64)
STEPS = 35
PACKED_HIDDEN = (64, 256, 650)
LENGTHS = torch.arange(64, 0, -1)

Input = Tensor | PackedSequence


@dataclass(frozen=True)
class Problem:
    """H inputs and hidden units; T steps, B rows, which end after 1 to 64 steps where packed.

    features: the input needs no gradient.
    """

    H: int
    T: int
    B: int
    packed: bool = False
    features: bool = False

    @property
    def flops(self) -> int:
        """Of a forward and a backward pass."""
        rows = int(LENGTHS.sum()) if self.packed else self.T * self.B
        return training_flops((self.H, self.H), rows, 1, not self.features)

    @property
    def kind(self) -> str:
        """Which mean it belongs to."""
        return "packed" if self.packed else "features" if self.features else "padded"

    def input(self) -> tuple[Tensor, Callable[[Tensor], Input]]:
        """x, and what makes the modules' input of it."""
        torch.manual_seed(0)
        x = torch.randn(self.T, self.B, self.H)
        if not self.packed:
            return x, lambda x: x
        return x, lambda x: pack_padded_sequence(x, LENGTHS)

    def __str__(self) -> str:
        kind = "" if self.kind == "padded" else f" {self.kind}"
        return f"H{self.H} B{self.B} T{self.T}{kind}"


PROBLEMS = [
    *(
        Problem(h, STEPS, b, features=features)
        for features, h, b in itertools.product((False, True), HIDDEN, BATCH)
    ),
    *(Problem(h, 64, 64, packed=True) for h in PACKED_HIDDEN),
]
QUICK = [
    Problem(64, STEPS, 1), Problem(128, STEPS, 20, features=True), Problem(64, 64, 64, packed=True)
]  # fmt: skip


def outputs(module: Callable[[Input], Input], given: Input) -> Tensor:
    """y of a padded or packed input."""
    y = module(given)
    return y if isinstance(y, Tensor) else y.data


def training_step(
    lstm: nn.Module,
    problem: Problem,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Callable[[Input], Input]], Callable[[Input], Input]] = lambda run: run,
) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns y and the gradients of x, where it has one, and of w_hh."""
    module = wrap(lambda x: lstm(x)[0])
    x, prepared = problem.input()
    x = x.to(dtype).requires_grad_(not problem.features)
    y = outputs(module, prepared(x))
    dy = torch.randn(y.shape, dtype=torch.float32).to(dtype)  # the same numbers in every dtype

    def step() -> list[Tensor]:
        x.grad = None
        lstm.zero_grad()
        y = outputs(module, prepared(x))
        torch.autograd.backward(y, dy)
        gradients = (x.grad, lstm.get_parameter("weight_hh_l0").grad)
        return [y.detach(), *(g for g in gradients if g is not None)]

    return step


def measure(problem: Problem, threads: int, seconds: float) -> list[dict[str, object]]:
    """Rows for all providers of one problem."""
    torch.manual_seed(0)
    torchs, double = nn.LSTM(problem.H, problem.H), nn.LSTM(problem.H, problem.H).double()
    double.load_state_dict(torchs.state_dict())
    ours, again = ISSLSTM.from_torch(torchs), ISSLSTM.from_torch(torchs)
    again.recompute = True
    steps = {
        "nn.LSTM": training_step(torchs, problem),
        "nn.LSTM without oneDNN": training_step(torchs, problem, wrap=without_onednn),
        "ISSLSTM": training_step(ours, problem),
        "ISSLSTM recompute": training_step(again, problem),
    }
    truth = training_step(double, problem, torch.float64)()
    for name in ("ISSLSTM", "ISSLSTM recompute"):
        for got, torchs_own, true in zip(steps[name](), steps["nn.LSTM"](), truth, strict=True):
            assert_no_worse_than_torch(got, torchs_own, true)
    roof = roofline(threads).training_ms(
        (problem.H, problem.H), problem.T, problem.B, not problem.features
    )
    rows: list[dict[str, object]] = []
    for name, values in interleaved_ms(steps, seconds).items():
        p20, p50, p80 = percentiles(values)
        rows.append(
            {
                "provider": name, "H": problem.H, "T": problem.T, "B": problem.B,
                "packed": int(problem.packed), "features": int(problem.features),
                "dtype": "float32", "threads": threads,
                "ms_p50": f"{p50:.4f}", "ms_p20": f"{p20:.4f}", "ms_p80": f"{p80:.4f}",
                "gflops": f"{problem.flops / p50 / 1e6:.1f}",
                "roofline": "" if problem.packed else f"{roof / p50:.4f}", **machine(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three problems, a few seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--output", type=Path, default=RESULTS / "training.csv")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    print(f"{'ms, p50':<26}{'nn.LSTM':>10}{'no oneDNN':>11}{'ISSLSTM':>9}{'recompute':>11}", end="")
    print("  best nn.LSTM / ISSLSTM")
    with contextlib.suppress(KeyboardInterrupt):
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            ratios: dict[str, list[float]] = {}
            for problem in QUICK if options.quick else PROBLEMS:
                new = measure(problem, threads, seconds=0.3 if options.quick else 2)
                rows += new
                ms = [float(str(row["ms_p50"])) for row in new]
                ratio = min(ms[:2]) / ms[2]
                ratios.setdefault(problem.kind, []).append(ratio)
                print(f"{f'{problem} x{threads}':<26}{ms[0]:10.3f}{ms[1]:11.3f}", end="")
                print(f"{ms[2]:9.3f}{ms[3]:11.3f}{ratio:8.2f}", flush=True)
            for kind, values in ratios.items():
                mean, least = statistics.geometric_mean(values), min(values)
                print(f"{kind} x{threads}: geometric mean {mean:.2f}, least {least:.2f}")
    if rows:
        write_csv(options.output, rows)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
