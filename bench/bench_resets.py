# SPDX-License-Identifier: Apache-2.0
"""What resets inside a sequence cost; check, then time.

python bench/bench_resets.py [--cell lstm|gru|rnn ...] [--quick] [--threads N ...] [--output CSV]

Reinforcement learning runs a batch of environments, and an episode may end at any step: the state
of that row is then set to zero before the next step. Our modules take a mask of these resets.
torch's modules take none, so their users cut the rows into segments, which they pad, pack and run
as a longer batch (`split`). Timed in turn, with a random mask in which 3 % are True:

    ours without resets, ours with resets, torch's module without resets, torch's module with split

Ours with resets is first checked against split in float64. T = 16 steps of 128 rows are a usual
rollout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import RESULTS, Row, command_line, each, output_of, p50, recording, timed_rows
from peers import MODULES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import iss_kernels
from iss_kernels.testing import assert_no_worse_than_torch

SHARE = 0.03
SHAPES = ((64, 16, 128), (256, 16, 128), (256, 35, 20), (512, 35, 1), (512, 35, 20))  # H, T, B
QUICK = ((64, 16, 8),)

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One layer of a cell, I = H; training: forward and backward."""

    cell: str
    H: int
    T: int
    B: int
    training: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "forward"
        return f"{self.cell} H{self.H} T{self.T} B{self.B} {mode}"


def split(module: nn.Module, x: Tensor, resets: Tensor) -> Tensor:
    """y [T, B, H] of a torch module over the segments of the rows of x [T, B, I], each from zeros.

    resets: bool [T, B]; a segment begins where it is True, and at t = 0.
    """
    steps, batch, _ = x.shape
    begins = resets.t().clone()
    begins[:, 0] = True
    at = begins.flatten().nonzero().flatten()
    lengths = torch.diff(at, append=torch.tensor([batch * steps]))
    segments = torch.split(x.transpose(0, 1).flatten(0, 1), lengths.tolist())
    packed = pack_padded_sequence(pad_sequence(list(segments)), lengths, enforce_sorted=False)
    padded = pad_packed_sequence(module(packed)[0], batch_first=True)[0]
    inside = torch.arange(padded.size(1)) < lengths[:, None]
    return padded[inside].view(batch, steps, -1).transpose(0, 1)


def call(module: nn.Module, run: Run, x: Tensor, dy: Tensor, training: bool) -> Callable[[], Any]:
    """What is timed: y, or y and the gradients of x and w_hh."""
    if not training:

        def forward() -> list[Tensor]:
            with torch.inference_mode():
                return [run(x)]

        return forward
    x = x.clone().requires_grad_()

    def step() -> list[Tensor]:
        x.grad = None
        module.zero_grad()
        y = run(x)
        torch.autograd.backward(y, dy)
        gradients = (x.grad, module.get_parameter("weight_hh_l0").grad)
        return [y.detach(), *(g for g in gradients if g is not None)]

    return step


def measure(problem: Problem, threads: int, seconds: float) -> list[Row]:
    """A row per provider."""
    torch.manual_seed(0)
    module = MODULES[problem.cell]
    theirs, double = module(problem.H, problem.H), module(problem.H, problem.H).double()
    double.load_state_dict(theirs.state_dict())
    name, torchs_name = f"ISS{module.__name__}", f"nn.{module.__name__}"
    ours: Any = getattr(iss_kernels, name).from_torch(theirs)
    x = torch.randn(problem.T, problem.B, problem.H)
    dy = torch.randn(problem.T, problem.B, problem.H)
    resets = torch.rand(problem.T, problem.B) < SHARE
    runs: dict[tuple[str, bool], tuple[nn.Module, Run]] = {
        (name, False): (ours, lambda x: ours(x)[0]),
        (name, True): (ours, lambda x: ours(x, resets=resets)[0]),
        (torchs_name, False): (theirs, lambda x: theirs(x)[0]),
        (torchs_name, True): (theirs, lambda x: split(theirs, x, resets)),
    }
    calls = {key: call(*what, x, dy, problem.training) for key, what in runs.items()}
    truth = call(double, lambda x: split(double, x, resets), x.double(), dy.double(), True)()
    checked = zip(calls[name, True](), calls[torchs_name, True](), truth, strict=False)
    for got, torchs_own, true in checked:
        assert_no_worse_than_torch(got, torchs_own, true)
    about = {
        "H": problem.H, "T": problem.T, "B": problem.B, "training": int(problem.training),
        "threads": threads,
    }  # fmt: skip
    shares = {(name, SHARE if resets else 0): call for (name, resets), call in calls.items()}
    return timed_rows(shares, seconds, ("provider", "resets"), about)


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one shape, a few seconds")
    parser.add_argument("--cell", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    options = parser.parse_args()
    shapes = QUICK if options.quick else SHAPES
    with recording(output_of(parser, options, RESULTS / "resets.csv")) as rows:
        print(f"{'ms, p50':<34}{'ours':>9}{'resets':>9}{'cost':>8}{'torch':>9}{'split':>9}")
        for threads in each(options.threads):
            for cell, shape, training in itertools.product(options.cell, shapes, (False, True)):
                problem = Problem(cell, *shape, training)
                new = measure(problem, threads, seconds=0.3 if options.quick else 4)
                rows += new
                plain, cut, torchs, by_split = map(p50, new)
                print(f"{f'{problem} x{threads}':<34}{plain:9.3f}{cut:9.3f}", end="")
                print(f"{cut / plain - 1:8.1%}{torchs:9.3f}{by_split:9.3f}", flush=True)


if __name__ == "__main__":
    main()
