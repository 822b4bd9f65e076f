# SPDX-License-Identifier: Apache-2.0
"""A recurrent highway network against plain torch, eager and compiled; check, then time.

python bench/bench_rhn.py [--quick] [--threads N ...] [--depth D] [--output CSV]

The widths that the paper's lasso found (Wen et al. 2018, table 2: 830 is dense), depth 10, T = 35
steps, I = H: forward alone without gradients, and a training step, forward and backward with the
gradients of the weights and of the input.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import RESULTS, Row, command_line, each, output_of, p50, recording, timed_rows
from torch import Tensor
from torch.nn.functional import linear

from iss_kernels import ISSRHN
from iss_kernels.demo.options import whole
from iss_kernels.testing import assert_no_worse_than_torch

WIDTHS = (830, 726, 517, 403, 328)
BATCH = (20, 1)
STEPS = 35

Weights = tuple[Tensor, Tensor, Tensor]
Network = Callable[[Tensor, Tensor, Weights], Tensor]


@dataclass(frozen=True)
class Problem:
    """H inputs and units, D micro-steps, B rows of STEPS steps; trains: with the gradients."""

    H: int
    D: int
    B: int
    trains: bool

    @property
    def flops(self) -> int:
        """2 for each weight of a gate, step and row; three times that with both gradients."""
        forward = 2 * STEPS * self.B * 2 * (self.D + 1) * self.H**2
        return forward * (3 if self.trains else 1)

    def __str__(self) -> str:
        return f"H{self.H} D{self.D} B{self.B} {'train' if self.trains else 'infer'}"


def step(gates_x: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """One time step: gates_x [B, 2 H], the products of its input; h [B, H]."""
    depth = len(w_hh) // gates_x.shape[1]
    for d, (weight, bias) in enumerate(zip(w_hh.chunk(depth), b_hh.chunk(depth), strict=True)):
        gates = linear(h, weight, bias)
        candidate, transform = (gates + gates_x if d == 0 else gates).chunk(2, 1)
        h = h + transform.sigmoid() * (candidate.tanh() - h)
    return h


def plain(x: Tensor, h: Tensor, weights: Weights, step: Callable[..., Tensor] = step) -> Tensor:
    """A recurrent highway network as one writes it in torch: x [T, B, I], h [B, H] -> y.

    The inputs of all steps are multiplied at once, and both gates of a micro-step. What is compiled
    is a step with all its micro-steps: for a whole sequence, torch.compile takes minutes.
    """
    w_ih, w_hh, b_hh = weights
    outputs = []
    for gates_x in linear(x, w_ih).unbind(0):
        h = step(gates_x, h, w_hh, b_hh)
        outputs.append(h)
    return torch.stack(outputs)


def call_of(
    network: Network, problem: Problem, weights: Weights, dtype: torch.dtype = torch.float32
) -> Callable[[], list[Tensor]]:
    """One call: y, and where it trains the gradients of x and of the weights."""
    torch.manual_seed(1)
    x = torch.randn(STEPS, problem.B, problem.H).to(dtype).requires_grad_(problem.trains)
    h, dy = x.new_zeros(problem.B, problem.H), torch.randn(x.shape).to(dtype)
    leaves = (x, *weights)

    def call() -> list[Tensor]:
        if not problem.trains:
            with torch.no_grad():
                return [network(x, h, weights)]
        for leaf in leaves:
            leaf.grad = None
        y = network(x, h, weights)
        torch.autograd.backward(y, dy)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return call


def measure(problem: Problem, threads: int, seconds: float, compiled: bool) -> list[Row]:
    """Rows for all providers of one problem."""
    torch.manual_seed(0)
    rhn = ISSRHN(problem.H, problem.H, problem.D)
    weights: Weights = (rhn.weight_ih_l0, rhn.weight_hh_l0, rhn.bias_hh_l0)  # type: ignore[assignment]
    double = tuple(w.detach().double().requires_grad_(problem.trains) for w in weights)
    calls = {"torch": call_of(plain, problem, weights)}
    if compiled:
        torch._dynamo.reset()
        whole = partial(plain, step=torch.compile(step, dynamic=False))
        calls["torch.compile"] = call_of(whole, problem, weights)
    calls["ISSRHN"] = call_of(lambda x, h, _: rhn(x, h[None])[0], problem, weights)
    truth = call_of(plain, problem, double, torch.float64)()  # type: ignore[arg-type]
    for ours, torchs, true in zip(calls["ISSRHN"](), calls["torch"](), truth, strict=True):
        assert_no_worse_than_torch(ours, torchs, true)
    about = {
        "H": problem.H, "D": problem.D, "T": STEPS, "B": problem.B,
        "trains": int(problem.trains), "dtype": "float32", "threads": threads,
    }  # fmt: skip
    rows = timed_rows(calls, seconds, ["provider"], about)
    for row in rows:
        row["gflops"] = f"{problem.flops / p50(row) / 1e6:.1f}"
    return rows


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one width of 64, not compiled")
    parser.add_argument("--widths", type=whole, nargs="+", default=WIDTHS)
    parser.add_argument("--depth", type=whole, default=10)
    parser.add_argument("--no-compile", action="store_true", help="eager torch alone")
    options = parser.parse_args()
    output = output_of(parser, options, RESULTS / "rhn.csv")
    widths, compiled = options.widths, not (options.quick or options.no_compile)
    if options.quick:
        widths, options.depth = [64], 3
    names = ["torch", *["torch.compile"] * compiled, "ISSRHN"]
    with recording(output) as rows:
        print(f"{'ms, p50':<28}", *(f"{name:>13}" for name in names), "  best of torch / ISSRHN")
        for threads in each(options.threads):
            ratios: dict[tuple[bool, int], list[float]] = {}
            for trains, batch, width in itertools.product((False, True), BATCH, widths):
                problem = Problem(width, options.depth, batch, trains)
                new = measure(problem, threads, 0.3 if options.quick else 4, compiled)
                rows += new
                *torchs, ours = map(p50, new)
                ratios.setdefault((trains, batch), []).append(min(torchs) / ours)
                print(f"{f'{problem} x{threads}':<28}", *(f"{ms:13.3f}" for ms in torchs), end="")
                print(f"{ours:14.3f}{min(torchs) / ours:8.2f}", flush=True)
            for (trains, batch), values in ratios.items():
                mean, least = statistics.geometric_mean(values), min(values)
                kind = f"{'train' if trains else 'infer'} B{batch} x{threads}"
                print(f"{kind}: geometric mean {mean:.2f}, least {least:.2f}")


if __name__ == "__main__":
    main()
