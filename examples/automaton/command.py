# SPDX-License-Identifier: Apache-2.0
"""A task whose answer is known: how many units does the group lasso leave, how many are needed?

    python -m examples.automaton --output runs/automaton [--bits 1 2 ...] [--seeds 1 2 ...]
        [--cells lstm gru]

The network remembers k bits. It starts with many more units than k, loses those that die, and is
then tested on sequences that are 40 times as long. Writes sweep.json and units.svg into
--output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import iss_kernels as iss
from examples import command_line
from examples.training import (
    FILES,
    DataError,
    circumstances,
    diverged,
    expect_finite,
    make_folder,
)
from iss_kernels.demo.checkpoint import expect_no_run, write

SWEEP, PICTURE = "sweep.json", "units.svg"
CELLS: dict[str, type[iss.ISSLSTM] | type[iss.ISSGRU]] = {"lstm": iss.ISSLSTM, "gru": iss.ISSGRU}


def sequences(bits: int, steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, bits] in {-1, 0, 1} and wanted outputs [T, B, bits] in {0, 1}.

    An input that is not 0 writes the bit of its channel, one step in four; the output is the bit
    written last. All bits are written at the first step.
    """
    written = torch.rand(steps, batch, bits) < 0.25
    written[0] = True
    values = torch.randint(2, (steps, batch, bits))
    times = torch.where(written, torch.arange(steps)[:, None, None], 0)
    wanted = values.gather(0, times.cummax(0).values)
    return torch.where(written, 2.0 * values - 1, 0.0), wanted.float()


class Memory(nn.Module):
    """A recurrent layer and a linear one: x [T, B, bits] -> logits [T, B, bits]."""

    def __init__(self, cell: str, bits: int, hidden: int) -> None:
        super().__init__()
        self.rnn = CELLS[cell](bits, hidden)
        self.linear = nn.Linear(hidden, bits)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.rnn(x)[0])
        return logits


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every number of a run, alike for all cells and numbers of bits."""

    width: int = 64
    strength: float = 0.3  # of the lasso, on a loss that is a sum over bits and a mean over steps
    warmup: int = 1000  # steps in which the strength grows: the bits are learned first
    lasso_steps: int = 1500
    heal_steps: int = 300  # without the lasso, at a learning rate that falls to 0
    rate: float = 0.3
    momentum: float = 0.9
    clip: float = 1.0  # largest norm of the gradient
    batch: int = 32
    steps: int = 25
    test_batch: int = 50
    test_steps: int = 1000


def train(cell: str, bits: int, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train a network that is much too wide; the units that die leave it on the way."""
    begin = time.process_time()
    torch.manual_seed(seed)
    model = Memory(cell, bits, recipe.width)
    groups = iss.find_groups(model, sequences(bits, 3, 2)[0])
    lasso = iss.GroupLasso(groups, recipe.strength, warmup=recipe.warmup)
    optimizer = torch.optim.SGD(model.parameters(), recipe.rate, momentum=recipe.momentum)
    left = []
    steps = recipe.lasso_steps + recipe.heal_steps
    for step in range(steps):
        rate = recipe.rate * min(1, (steps - step) / recipe.heal_steps)
        optimizer.param_groups[0]["lr"] = rate
        x, wanted = sequences(bits, recipe.steps, recipe.batch)
        loss = binary_cross_entropy_with_logits(model(x), wanted) * bits
        if not loss.isfinite():
            found = f"a finite loss, got {loss.item()}"
            raise diverged(found, step + 1, rate, recipe.clip)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if step < recipe.lasso_steps:
            lasso.proximal_(rate)
        if step % 50 == 49:
            _, groups = iss.shrink_(model, groups, optimizer=optimizer, lasso=lasso)
            left.append(groups.units)
    expect_finite(model, steps, rate, recipe.clip)
    with torch.no_grad():
        x, wanted = sequences(bits, recipe.test_steps, recipe.test_batch)
        wrong = int(((model(x) > 0) != (wanted > 0.5)).sum())
    return {
        "cell": cell, "bits": bits, "seed": seed, "units": groups.units, "wrong": wrong,
        "answers": wanted.numel(), "loss": loss.item(), "left": left,
        "cpu_seconds": round(time.process_time() - begin, 2),
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser("examples.automaton", __doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=range(1, 9), metavar="K")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 4), metavar="SEED")
    parser.add_argument("--cells", choices=CELLS, nargs="+", default=list(CELLS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of it")
    command_line.add_torch(parser, threads=1)
    command_line.add_recipe(parser, Recipe)
    return parser


def run(args: argparse.Namespace) -> None:
    """The sweep, from the first run to the picture."""
    from examples.automaton.picture import draw  # before the runs: it needs matplotlib

    recipe = command_line.changed(Recipe(), args)
    if min(args.bits) < 1:
        raise DataError(f"expected --bits in [1, inf), got {min(args.bits)}")
    expect_no_run(args.output, (SWEEP, PICTURE, *FILES))
    make_folder(args.output)
    runs = []
    for cell in args.cells:
        for bits in args.bits:
            for seed in args.seeds:
                runs.append(train(cell, bits, seed, recipe))
                done = runs[-1]
                print(
                    f"{cell} {bits} bits, seed {seed}: {recipe.width} -> {done['units']} units, "
                    f"{done['wrong']} of {done['answers']:,} answers wrong, "
                    f"{done['cpu_seconds']:.1f} s",
                    flush=True,
                )
    result = circumstances() | {"recipe": dataclasses.asdict(recipe), "runs": runs}
    result["cpu_seconds"] = round(sum(run["cpu_seconds"] for run in runs), 1)
    write(args.output / SWEEP, (json.dumps(result) + "\n").encode())
    draw(runs, args.output / PICTURE)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments().parse_args(argv)
    return command_line.main("examples.automaton", lambda: run(args), args)
