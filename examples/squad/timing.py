# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of the models of finished runs for one question: for a calm machine.

python -m examples.squad.timing --dev FILE RUN ...: prints them, and adds them to each result.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import iss_kernels as iss
from examples import command_line
from examples.command_line import DataError
from examples.squad.data import Encoder, Question, Vocabulary, read_questions
from examples.squad.model import BiDAF
from examples.squad.training import Recipe, new_model
from examples.training import RESULT
from iss_kernels.demo.checkpoint import write

MODEL, VOCABULARY = "model.safetensors", "vocabulary.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="examples.squad.timing", description=__doc__)
    add = parser.add_argument
    add("--dev", type=Path, required=True, metavar="FILE", help="SQuAD's dev questions")
    add("--seconds", type=float, default=5.0, help="measured for each number (default: 5)")
    command_line.add_torch(parser)
    add("runs", type=Path, nargs="+", metavar="RUN", help="--output of a finished run")
    args = parser.parse_args(argv)
    return command_line.main("examples.squad.timing", lambda: run(args), args)


def run(args: argparse.Namespace) -> None:
    """Time every model on the same question, whose text is of the median length."""
    questions = sorted(read_questions([args.dev], exact=False), key=lambda q: len(q.context.spans))
    question = questions[len(questions) // 2]
    for folder in args.runs:
        model, encoder, result = opened(folder)
        result["milliseconds"] = measured(model, encoder, question, args.seconds)
        print(f"{folder}: {json.dumps(result['milliseconds'])}")
        write(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def opened(folder: Path) -> tuple[BiDAF, Encoder, dict[str, Any]]:
    """The model of a finished run, what makes its inputs, and result.json. Raises DataError."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        vocabulary = Vocabulary(**json.loads((folder / VOCABULARY).read_text(encoding="utf-8")))
        names = Recipe.__dataclass_fields__
        recipe = Recipe(**{k: v for k, v in result["options"].items() if k in names})
        vectors = torch.zeros(len(vocabulary.known), recipe.vector_size)
        model = new_model(recipe, vocabulary, vectors)
        iss.load(folder / MODEL, model)
    except OSError as error:
        raise DataError(f"expected a finished run in {folder}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"expected a finished run in {folder}: {error}") from None
    return model.eval(), Encoder(vocabulary, recipe.letters), result


@torch.inference_mode()
def measured(
    model: BiDAF, encoder: Encoder, question: Question, seconds: float
) -> dict[str, float]:
    """Median milliseconds for one question: as trained, and prepared for inference."""
    inputs: tuple[Tensor, ...] = encoder.inputs([question])
    found: dict[str, float] = {
        "context_tokens": len(question.context.spans),
        "threads": torch.get_num_threads(),
    }
    for name, one in {"module": model, "prepared": iss.prepare(model)}.items():
        timer = Timer(
            "model(*inputs)",
            globals={"model": one, "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        found[name] = round(timer.blocked_autorange(min_run_time=seconds).median * 1e3, 3)
    return found


if __name__ == "__main__":
    sys.exit(main())
