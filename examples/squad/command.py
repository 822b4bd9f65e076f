# SPDX-License-Identifier: Apache-2.0
"""Train BiDAF, a reader, to answer questions with fewer units (Wen et al. 2018, section 4.3).

    python -m examples.squad --method baseline --train train-v1.1.json --dev dev-v1.1.json \\
        --vectors glove.6B.100d.txt --output runs/baseline
    python -m examples.squad --method iss ... --output runs/iss

Method iss-finetune starts from a baseline's run, --start. Into --output go checkpoint.pt, log.csv,
TensorBoard's events, and at the end result.json and the small model: model.safetensors with its
vocabulary.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import iss_kernels as iss
from examples import command_line
from examples.squad import training
from examples.squad.data import (
    Encoder,
    Question,
    Vocabulary,
    fingerprint,
    read_questions,
    read_vectors,
    short_enough,
    words_of,
)
from examples.squad.model import BiDAF
from examples.training import MODEL, VOCABULARY, DataError, fit, is_first, write_result
from iss_kernels.demo.checkpoint import write


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser("examples.squad", __doc__)
    add = parser.add_argument
    add("--method", choices=training.METHODS, default="baseline", help="default: baseline")
    add("--train", type=Path, nargs="+", required=True, metavar="FILE",
        help="questions in SQuAD's format, whose answers stand where the files say")  # fmt: skip
    add("--dev", type=Path, required=True, metavar="FILE", help="SQuAD's dev questions")
    add("--vectors", type=Path, required=True, metavar="FILE", help="vectors in GloVe's format")
    add("--start", type=Path, metavar="DIR", help="the baseline's run, for iss-finetune")
    command_line.add_run(parser)
    command_line.add_recipe(parser, training.Recipe)
    return parser


def run(args: argparse.Namespace) -> None:
    """Train, answer all dev questions, and write the results."""
    recipe = command_line.changed(training.METHODS[args.method], args)
    _check(args, recipe)
    questions = read_questions(args.train)
    short = short_enough(questions, recipe.context_tokens, recipe.question_tokens)
    if len(short) < recipe.batch:
        raise DataError(
            f"expected at least {recipe.batch} questions for a batch, got {len(short)} of at most "
            f"{recipe.question_tokens} tokens on texts of at most {recipe.context_tokens}"
        )
    # Answers are compared by their text: where they stand in the dev set is not used.
    dev = read_questions([args.dev], exact=False)
    vectors = read_vectors(args.vectors, words_of([*short, *dev]), recipe.vector_size)
    vocabulary = Vocabulary.of(short, dev, vectors, recipe.least_word, recipe.least_letter)
    torch.manual_seed(args.seed)
    known = vocabulary.matrix(vectors, recipe.vector_size)
    model = training.new_model(recipe, vocabulary, known)
    if args.start is not None:
        _start(model, args.start, vocabulary)
    encoder = Encoder(vocabulary, recipe.letters)
    reader = training.Reader(model, recipe, encoder, short, dev, args.seed)
    options = {
        "example": "squad",
        "data": fingerprint([*short, *dev], known),
        "questions": [len(short), len(dev)],
        "method": args.method,
        **command_line.run_options(args),
        **asdict(recipe),
    }
    fit(reader, args.output, options, resume=args.resume)
    _finish(reader, args.output, options, vocabulary, dev)


def _check(args: argparse.Namespace, recipe: training.Recipe) -> None:
    if (args.start is not None) != (args.method == "iss-finetune"):
        expected = "without" if args.start is not None else "with"
        raise DataError(f"expected --method {args.method} {expected} --start, the baseline's run")
    if recipe.letters < recipe.width:
        raise DataError(f"expected --letters of at least --width {recipe.width}")
    if recipe.steps % recipe.evaluate_every:
        raise DataError(
            f"expected --steps of a multiple of --evaluate-every {recipe.evaluate_every}, "
            f"got {recipe.steps}"
        )


def _start(model: BiDAF, folder: Path, vocabulary: Vocabulary) -> None:
    """Take over the weights of a finished run."""
    try:
        theirs = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        if theirs != asdict(vocabulary):
            raise DataError(
                f"expected {folder / VOCABULARY} to be the vocabulary of these questions and "
                "vectors, got another: give the files that the run was made with"
            )
        sizes = training.sizes(model)
        iss.load(folder / MODEL, model)
        if training.sizes(model) != sizes:
            raise DataError(f"--start {folder}: expected a model of sizes {sizes}")
    except OSError as error:
        raise DataError(f"--start {folder}: {error.strerror}: {error.filename}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"--start {folder}: {error}") from None


def _finish(
    reader: training.Reader,
    folder: Path,
    options: dict[str, Any],
    vocabulary: Vocabulary,
    dev: Sequence[Question],
) -> None:
    """Answer all dev questions with the small model, and write it and what it reached."""
    small = reader.small()
    reached = reader.score(small, dev) | training.sizes(small)
    if not is_first():
        return
    iss.save(small, folder / MODEL)
    write(folder / VOCABULARY, json.dumps(asdict(vocabulary)).encode())
    write_result(folder, options, reader, {"small": reached})
    print(json.dumps(reached))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments().parse_args(argv)
    return command_line.main("examples.squad", lambda: run(args), args)
