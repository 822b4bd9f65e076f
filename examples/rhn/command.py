# SPDX-License-Identifier: Apache-2.0
"""Train a recurrent highway network on the Penn Treebank, with the paper's recipe or a small one.

    python -m examples.rhn --config small --method baseline --data ptb.zip --output runs/baseline
    python -m examples.rhn --config small --method iss --strength 0.006 --data ptb.zip \\
        --output runs/iss

--data: as for examples.ptb.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples import command_line
from examples.ptb import train
from examples.ptb.data import read
from examples.rhn.recipes import CONFIGS, METHODS, Recipe, recipe
from examples.rhn.train import HighwayTrainer, build


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser("examples.rhn", __doc__)
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="small", help="the sizes (default: small)")
    add("--method", choices=METHODS, default="baseline", help="default: baseline")
    add("--data", type=Path, required=True, metavar="PATH", help="zip or folder of the text")
    add("--any-text", action="store_true", help="take a text that is not the Penn Treebank")
    command_line.add_run(parser)
    command_line.add_recipe(parser, Recipe)
    return parser


def run(args: argparse.Namespace) -> None:
    """One run, from the text to result.json."""
    chosen = command_line.changed(recipe(args.config, args.method), args)
    text = read(args.data, args.any_text)
    torch.manual_seed(args.seed)
    model = build(chosen, len(text.vocabulary))
    trainer = HighwayTrainer(model, chosen, text)
    train.run("rhn", args, trainer, lambda: {"width": model.rhn.hidden_size})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments().parse_args(argv)
    return command_line.main("examples.rhn", lambda: run(args), args)
