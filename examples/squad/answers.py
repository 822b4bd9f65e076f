# SPDX-License-Identifier: Apache-2.0
"""What a model answers, and how often that is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from examples.squad.data import Encoder, Question, batches
from examples.squad.metric import exact_match, f1


def best_spans(start: Tensor, end: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """First and last token of the likeliest answer of at most `longest` tokens, [B] each.

    start, end: scores [B, T]; what the sum of both is, the likelihood goes by.
    """
    count = start.size(1)
    sums = start.unsqueeze(2) + end.unsqueeze(1)  # [B, first, last]
    first = torch.arange(count, device=start.device).unsqueeze(1)
    last = first.mT
    sums = sums.masked_fill((last < first) | (last >= first + longest), -torch.inf)
    best = sums.flatten(1).argmax(1)
    return best // count, best % count


@torch.no_grad()
def answers(
    model: nn.Module, encoder: Encoder, questions: Sequence[Question], size: int, longest: int
) -> Iterator[tuple[Question, str]]:
    """Each question with the model's answer, a part of its text; `size` questions at a time."""
    model.eval()
    for batch in batches(questions, size):
        start, end = model(*encoder.inputs(batch))
        spans = best_spans(start, end, longest)
        for question, first, last in zip(batch, *(s.tolist() for s in spans), strict=True):
            yield question, question.context.between(first, last)


def score(
    model: nn.Module, encoder: Encoder, questions: Sequence[Question], size: int, longest: int
) -> dict[str, float]:
    """Exact match and F1 in percent."""
    exact = overlap = 0.0
    for question, answer in answers(model, encoder, questions, size, longest):
        exact += exact_match(answer, question.answers)
        overlap += f1(answer, question.answers)
    return {"em": 100 * exact / len(questions), "f1": 100 * overlap / len(questions)}
