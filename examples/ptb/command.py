# SPDX-License-Identifier: Apache-2.0
"""Train a language model on the Penn Treebank, with the paper's recipes.

    python -m examples.ptb --config small --method baseline --data ptb.zip --output runs/baseline
    python -m examples.ptb --config small --method iss --data ptb.zip --output runs/iss

--data: the zip or folder of Mikolov's files ptb.train.txt, ptb.valid.txt and ptb.test.txt. The
methods iss-finetune and l1 start from a baseline's run, --start. With several processes:
`torchrun --nproc-per-node 2 -m examples.ptb ...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from examples import command_line, training
from examples.ptb import train
from examples.ptb.data import read
from examples.ptb.recipes import CONFIGS, FROM_BASELINE, METHODS, Recipe, recipe
from examples.ptb.train import LanguageTrainer, build
from examples.training import DataError
from iss_kernels.demo.model import LanguageModel
from iss_kernels.demo.text import Text


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser("examples.ptb", __doc__)
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="small", help="the sizes (default: small)")
    add("--method", choices=METHODS, default="baseline", help="default: baseline")
    add("--data", type=Path, required=True, metavar="PATH", help="zip or folder of the text")
    add("--any-text", action="store_true", help="take a text that is not the Penn Treebank")
    add("--start", type=Path, metavar="DIR", help="the baseline's run, for iss-finetune and l1")
    add("--label", metavar="TEXT", help="the run's name in the table (default: the method)")
    command_line.add_run(parser)
    command_line.add_recipe(parser, Recipe)
    return parser


def run(args: argparse.Namespace) -> None:
    """One run, from the text to result.json."""
    chosen = command_line.changed(recipe(args.config, args.method), args)
    _check(args, chosen)
    text = read(args.data, args.any_text)
    torch.manual_seed(args.seed)
    model = build(chosen, len(text.vocabulary))
    if args.start:
        _start(model, args.start, text)
    trainer = LanguageTrainer(model, chosen, text)
    train.run("ptb", args, trainer, lambda: {"label": args.label or args.method, **_sizes(model)})


def _sizes(model: LanguageModel) -> dict[str, Any]:
    """Sizes of the embedding and the layers, and the multiply-adds of a time step.

    And the share of the LSTM's weights that are zero one by one, as L1 makes them.
    """
    lstm = model.lstm
    layers = [lstm.get_parameter(f"weight_hh_l{i}").shape[1] for i in range(lstm.num_layers)]
    weights = [w for w in lstm.parameters() if w.dim() == 2]
    multiply_adds = sum(w.numel() for w in weights)
    return {
        "sizes": [model.embedding.embedding_dim, *layers],
        "lstm_multiply_adds": multiply_adds,
        "lstm_zeros": sum(int((w == 0).sum()) for w in weights) / multiply_adds,
        "softmax_multiply_adds": model.decoder.weight.numel(),
    }


def _check(args: argparse.Namespace, chosen: Recipe) -> None:
    if (args.start is None) == (args.method in FROM_BASELINE):
        expected = "with" if args.method in FROM_BASELINE else "without"
        raise DataError(f"expected --method {args.method} {expected} --start, the baseline's run")
    if chosen.tied and chosen.embedding != chosen.hidden[-1]:
        raise DataError(
            f"expected an embedding of the last layer's size, {chosen.hidden[-1]}, with --tied, "
            f"got {chosen.embedding}"
        )
    if max(chosen.hidden) == 1:
        raise DataError(
            "expected --hidden with a layer of 2 units or more, of which some can leave, got 1"
        )
    if chosen.groups not in ("lstm", "lstm+embedding"):
        raise DataError(f"expected --groups lstm or lstm+embedding, got {chosen.groups}")
    if chosen.optimizer not in ("sgd", "adamw"):
        raise DataError(f"expected --optimizer sgd or adamw, got {chosen.optimizer}")
    if chosen.weight_decay and chosen.optimizer != "adamw":
        raise DataError(f"expected --weight-decay with --optimizer adamw, got {chosen.optimizer}")


def _start(model: LanguageModel, folder: Path, text: Text) -> None:
    """Take over the weights of a finished run."""
    options, run = training.of_run(folder, "--start")
    weights = run.get("average") or run.get("model", {})
    if options.get("text") != text.fingerprint:
        raise DataError(f"expected --start trained on the text of --data, got {folder}, on another")
    own = {name: list(p.shape) for name, p in model.state_dict().items()}
    there = {name: list(p.shape) for name, p in weights.items()}
    for name in own.keys() | there.keys():
        if own.get(name) != there.get(name):
            raise DataError(
                f"expected --start with {name} {own.get(name)}, got {there.get(name)} in {folder}"
            )
    model.load_state_dict(weights)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments().parse_args(argv)
    return command_line.main("examples.ptb", lambda: run(args), args)
