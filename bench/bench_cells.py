# SPDX-License-Identifier: Apache-2.0
"""A call of a cell against torch's cell, a prepared one and a Stream step, and training through a
loop; check, then time.

python bench/bench_cells.py [--cell lstm|gru|rnn] [--quick] [--threads N ...] [--output CSV]

I = H; activations are float32, and so are weights but those of `prepared`. A call takes one step
without gradients, from a given state; a Stream step of the same size is the layer's, with packed
weights. torch.no_grad() is entered once for all calls.
Training: a loop over T = 20 steps, forward and backward, with gradients of weights and inputs.
Times of a training row are those of a whole loop.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Row, command_line, each, output_of, p50, record, recording, timed_rows
from torch import Tensor, nn

import iss_kernels
from iss_kernels.testing import assert_no_worse_than_torch, max_error

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
HIDDEN = (64, 128, 256, 512, 1024)
BATCH = (1, 16, 64)
STEPS = 20
# Largest error of a state, which is below 1, with weights in a format.
WEIGHTS = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2}


@dataclass(frozen=True)
class Problem:
    """H inputs and hidden units, B rows; T steps of training, or none: a single call."""

    H: int
    B: int
    T: int = 0

    def __str__(self) -> str:
        return f"H{self.H} B{self.B}" + f" train T{self.T}" * (self.T > 0)


PROBLEMS = [Problem(h, b, t) for t, h, b in itertools.product((0, STEPS), HIDDEN, BATCH)]
QUICK = [Problem(64, 1), Problem(128, 16), Problem(64, 4, STEPS)]


def states_in(state: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """h, or h and c."""
    return [state] if isinstance(state, Tensor) else list(state)


def call(
    cell: nn.Module, cell_name: str, problem: Problem, dtype: torch.dtype
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """One step; returns the state."""
    torch.manual_seed(1)
    x, h, c = (torch.randn(problem.B, problem.H).to(dtype) for _ in range(3))
    hx = (h, c) if cell_name == "lstm" else h
    return lambda: cell(x, hx)


def training(
    cell: nn.Module, cell_name: str, problem: Problem, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """A loop over T steps, forward and backward; returns h and the gradients of x and w_hh."""
    torch.manual_seed(1)
    x = torch.randn(problem.T, problem.B, problem.H).to(dtype).requires_grad_()

    def step() -> list[Tensor]:
        x.grad = None
        cell.zero_grad()
        state: Any = None
        for x_t in x.unbind(0):
            state = cell(x_t, state)
        h = states_in(state)[0]
        torch.autograd.backward(h, torch.ones_like(h))
        gradients = (x.grad, cell.get_parameter("weight_hh").grad)
        return [h.detach(), *(g for g in gradients if g is not None)]

    return step


def measure(problem: Problem, name: str, threads: int, seconds: float) -> list[Row]:
    """Rows for all providers of one problem: torch's cell first, then ours, then a Stream."""
    torch.manual_seed(0)
    kind, ours_name = CELLS[name], f"ISS{CELLS[name].__name__}"
    ours_of: Any = getattr(iss_kernels, ours_name)
    torchs, double = kind(problem.H, problem.H), kind(problem.H, problem.H).double()
    double.load_state_dict(torchs.state_dict())
    ours = ours_of.from_torch(torchs)
    steps_of = training if problem.T else call
    steps: dict[str, Callable[[], Any]] = {
        f"nn.{kind.__name__}": steps_of(torchs, name, problem, torch.float32),
        ours_name: steps_of(ours, name, problem, torch.float32),
    }
    in_double = steps_of(double, name, problem, torch.float64)
    with torch.set_grad_enabled(problem.T > 0):
        torchs_own, own, truth = (states_in(step()) for step in (*steps.values(), in_double))
    for got, theirs, true in zip(own, torchs_own, truth, strict=True):
        assert_no_worse_than_torch(got, theirs, true)
    if not problem.T:
        layer: Any = getattr(iss_kernels, ours_name.removesuffix("Cell"))
        weights = {f"{key}_l0": p for key, p in torchs.state_dict().items()}
        module = layer(problem.H, problem.H)
        module.load_state_dict(weights)
        stream, x = iss_kernels.Stream(module, problem.B), torch.randn(problem.B, problem.H)
        first = states_in(double(x.double()))[0]
        assert max_error(stream(x), first) <= WEIGHTS["float32"]
        steps["Stream"] = lambda: stream(x)
        for weights_as, bound in WEIGHTS.items():
            prepared = iss_kernels.prepare(torchs, weights_as)
            step = steps[f"prepared {weights_as}"] = call(prepared, name, problem, torch.float32)
            with torch.no_grad():
                for got, true in zip(states_in(step()), truth, strict=True):
                    assert max_error(got, true) <= bound * max(1, true.abs().max().item())
    with torch.set_grad_enabled(problem.T > 0):
        about = {"H": problem.H, "B": problem.B, "T": problem.T, "dtype": "float32"}
        return timed_rows(steps, seconds, ["provider"], {**about, "threads": threads})


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "three problems, a few seconds")
    parser.add_argument("--cell", choices=tuple(CELLS), default="lstm")
    options = parser.parse_args()
    heads = ("torch", "ours", "Stream", *WEIGHTS)
    output = output_of(parser, options, record("cells", options.cell), free=["cell"])
    with recording(output) as rows:
        print(f"{'us, p50':<26}", *(f"{head:>9}" for head in heads), "  torch / ours")
        for threads in each(options.threads):
            ratios: dict[str, list[float]] = {}
            for problem in QUICK if options.quick else PROBLEMS:
                new = measure(problem, options.cell, threads, 0.3 if options.quick else 1)
                rows += new
                us = [1e3 * p50(row) for row in new]
                ratios.setdefault("training" if problem.T else "call", []).append(us[0] / us[1])
                print(f"{f'{problem} x{threads}':<26}", *(f"{t:9.2f}" for t in us), end="")
                print(" " * 10 * (len(heads) - len(us)), f"{us[0] / us[1]:7.2f}", flush=True)
            for series, values in ratios.items():
                mean, least = statistics.geometric_mean(values), min(values)
                print(f"{series} x{threads}: torch / ours: mean {mean:.2f}, least {least:.2f}")


if __name__ == "__main__":
    main()
