# SPDX-License-Identifier: Apache-2.0
"""Train a recurrent highway network on the Penn Treebank, with the paper's recipe or a small one.

    python -m examples.rhn --config small --method baseline --data ptb.zip --output runs/baseline
    python -m examples.rhn --config small --method iss --strength 0.006 --data ptb.zip \\
        --output runs/iss

--data: as for examples.ptb.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from examples import command_line
from examples.ptb import train
from examples.ptb.data import read
from examples.rhn.recipes import CONFIGS, DROPS, METHODS, Recipe, recipe
from examples.rhn.train import HighwayTrainer, build
from examples.training import DataError


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser("examples.rhn", __doc__)
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="small")
    add("--method", choices=METHODS, default="baseline")
    add("--data", type=Path, required=True, metavar="PATH", help="zip or folder of the text")
    add("--any-text", action="store_true", help="take a text that is not the Penn Treebank")
    command_line.add_run(parser)
    command_line.add_recipe(parser, Recipe)
    return parser


def run(args: argparse.Namespace) -> None:
    """One run, from the text to result.json."""
    chosen = command_line.changed(recipe(args.config, args.method), args)
    _check(chosen)
    text = read(args.data, args.any_text)
    torch.manual_seed(args.seed)
    model = build(chosen, len(text.vocabulary))
    trainer = HighwayTrainer(model, chosen, text)
    train.run("rhn", args, trainer, lambda: {"width": model.rhn.hidden_size})


def _check(chosen: Recipe) -> None:
    for name in DROPS:
        if not 0 <= getattr(chosen, name) < 1:
            shown = name.replace("_", "-")
            raise DataError(f"expected --{shown} in [0, 1), got {getattr(chosen, name)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments().parse_args(argv)
    return command_line.main("examples.rhn", lambda: run(args), args)


if __name__ == "__main__":
    sys.exit(main())
