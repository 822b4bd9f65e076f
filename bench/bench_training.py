# SPDX-License-Identifier: Apache-2.0
"""A training step of one layer, forward and backward, against torch's module; check, then time.

python bench/bench_training.py [--cell lstm|gru|rnn] [--quick] [--threads N ...] [--output CSV]

Three kinds of problems. Padded: I = H, T = 35 steps, gradients of the weights and of the input,
which are set to None before each step, as torch's optimisers do. Features: the same, where the
input needs no gradient, as the features of a first layer. Packed: sequences of lengths 1 to 64. A
row gives the fraction of the roof that roofline.py derives (nothing for packed problems).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Row, command_line, each, output_of, p50, record, recording, timed_rows
from peers import GATES, MODULES, without_onednn
from roofline import roofline, training_flops
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import iss_kernels
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

    def flops(self, gates: int) -> int:
        """Of a forward and a backward pass."""
        rows = int(LENGTHS.sum()) if self.packed else self.T * self.B
        return training_flops((self.H, self.H), rows, 1, not self.features, gates)

    @property
    def kind(self) -> str:
        """Which mean it belongs to."""
        return "packed" if self.packed else "features" if self.features else "padded"

    def input(self) -> tuple[Tensor, Callable[[Tensor], Input]]:
        """x, and the function that packs it, or returns it, for the modules."""
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
    layer: nn.Module,
    problem: Problem,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Callable[[Input], Input]], Callable[[Input], Input]] = lambda run: run,
) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns y and the gradients of x, where it has one, and of w_hh."""
    module = wrap(lambda x: layer(x)[0])
    x, prepared = problem.input()
    x = x.to(dtype).requires_grad_(not problem.features)
    y = outputs(module, prepared(x))
    dy = torch.randn(y.shape, dtype=torch.float32).to(dtype)  # the same numbers in every dtype

    def step() -> list[Tensor]:
        x.grad = None
        layer.zero_grad()
        y = outputs(module, prepared(x))
        torch.autograd.backward(y, dy)
        gradients = (x.grad, layer.get_parameter("weight_hh_l0").grad)
        return [y.detach(), *(g for g in gradients if g is not None)]

    return step


def measure(problem: Problem, cell: str, threads: int, seconds: float) -> list[Row]:
    """Rows for all providers of one problem: torch's first, then ours, then ours with recompute."""
    torch.manual_seed(0)
    module, ours_name = MODULES[cell], f"ISS{MODULES[cell].__name__}"
    torchs, double = module(problem.H, problem.H), module(problem.H, problem.H).double()
    double.load_state_dict(torchs.state_dict())
    ours_of: Any = getattr(iss_kernels, ours_name)
    ours, again = ours_of.from_torch(torchs), ours_of.from_torch(torchs)
    again.recompute = True
    torchs_name = f"nn.{module.__name__}"
    steps = {torchs_name: training_step(torchs, problem)}
    if cell == "lstm":
        steps["nn.LSTM without oneDNN"] = training_step(torchs, problem, wrap=without_onednn)
    own = {
        ours_name: training_step(ours, problem),
        f"{ours_name} recompute": training_step(again, problem),
    }
    truth = training_step(double, problem, torch.float64)()
    for step in own.values():
        for got, torchs_own, true in zip(step(), steps[torchs_name](), truth, strict=True):
            assert_no_worse_than_torch(got, torchs_own, true)
    steps |= own
    roof = roofline(threads).training_ms(
        (problem.H, problem.H), problem.T, problem.B, not problem.features, GATES[cell]
    )
    about = {
        "H": problem.H, "T": problem.T, "B": problem.B, "packed": int(problem.packed),
        "features": int(problem.features), "dtype": "float32", "threads": threads,
    }  # fmt: skip
    rows = timed_rows(steps, seconds, ["provider"], about)
    for row in rows:
        row["gflops"] = f"{problem.flops(GATES[cell]) / p50(row) / 1e6:.1f}"
        row["roofline"] = "" if problem.packed else f"{roof / p50(row):.4f}"
    return rows


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "three problems, a few seconds")
    parser.add_argument("--cell", choices=tuple(MODULES), default="lstm")
    options = parser.parse_args()
    ours = f"ISS{MODULES[options.cell].__name__}"
    output = output_of(parser, options, record("training", options.cell), free=["cell"])
    with recording(output) as rows:
        print(f"{'ms, p50':<26}{'torch, best':>12}{ours:>9}{'recompute':>11}  torch / {ours}")
        for threads in each(options.threads):
            ratios: dict[str, list[float]] = {}
            for problem in QUICK if options.quick else PROBLEMS:
                new = measure(problem, options.cell, threads, 0.3 if options.quick else 2)
                rows += new
                *torchs, own, again = map(p50, new)
                ratio = min(torchs) / own
                ratios.setdefault(problem.kind, []).append(ratio)
                print(f"{f'{problem} x{threads}':<26}{min(torchs):12.3f}{own:9.3f}", end="")
                print(f"{again:11.3f}{ratio:8.2f}", flush=True)
            for kind, values in ratios.items():
                mean, least = statistics.geometric_mean(values), min(values)
                print(f"{kind} x{threads}: geometric mean {mean:.2f}, least {least:.2f}")


if __name__ == "__main__":
    main()
