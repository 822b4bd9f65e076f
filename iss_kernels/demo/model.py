# SPDX-License-Identifier: Apache-2.0
"""The language model of the demo: embedding, LSTM layers, linear; and how text is cut for it.

The paper's model (Wen et al. 2018, section 4.1): dropout on every connection but the recurrent
ones, the state carried from one batch to the next.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from iss_kernels import ISSLSTM, Groups, ShrinkReport, shrink

# Strips of text that are evaluated at once, and their steps per call: they change speed only.
EVALUATION_BATCH, EVALUATION_STEPS = 10, 70


class LanguageModel(nn.Module):
    """Predicts the next word: tokens [T, B] and a state -> logits [T, B, V] and the next state."""

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int | Sequence[int],
        layers: int,
        dropout: float,
        tied: bool = False,
    ) -> None:
        """hidden: units, of each layer if several; tied: the decoder's weight is the embedding."""
        super().__init__()
        last = hidden if isinstance(hidden, int) else hidden[-1]
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, embedding)
        # nn.LSTM warns about dropout between the layers of one layer.
        self.lstm = ISSLSTM(embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(last, vocabulary)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens: [T, B] int64; state: what the former call returned. Returns [T, B, V], state."""
        x = dropout(self.embedding(tokens), self.dropout, self.training)
        y, state = self.recur(x, state)
        return self.decoder(dropout(y, self.dropout, self.training)), state

    def recur(self, x: Tensor, state: Any) -> Any:
        """The LSTM over x [T, B, E]: outputs [T, B, H], and the next state."""
        return self.lstm(x, state)

    def set_dropout(self, rate: float) -> None:
        """Train with another rate from now on."""
        self.dropout = rate
        if self.lstm.num_layers > 1:
            self.lstm.dropout = rate


def detach(state: Any) -> Any:
    """The same state without its history; tensors stand in tuples where sizes differ by layer."""
    return state.detach() if isinstance(state, Tensor) else tuple(detach(s) for s in state)


def strips(words: Tensor, batch: int) -> Tensor:
    """Cut words [N] into `batch` strips of equal length, side by side: [N // batch, batch]."""
    length = len(words) // batch
    return words[: length * batch].view(batch, length).t().contiguous()


def windows(data: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [<= steps, B] over data [L, B], one after the other."""
    for start in range(0, len(data) - 1, steps):
        targets = data[start + 1 : start + 1 + steps]
        yield data[start : start + len(targets)], targets


@torch.no_grad()
def perplexity(model: LanguageModel, words: Tensor) -> float:
    """exp of the mean loss per word over words [N], in evaluation mode."""
    model.eval()
    data = strips(words, EVALUATION_BATCH)
    total, state = 0.0, None
    for tokens, targets in windows(data, EVALUATION_STEPS):
        logits, state = model(tokens, state)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(total / ((len(data) - 1) * EVALUATION_BATCH))


@torch.no_grad()
def enlarge_(
    big: nn.Module, groups: Groups, small: nn.Module, kept: Mapping[str, Tensor]
) -> ShrinkReport:
    """Give `big` the weights of a model that units left, in their places, and zeros elsewhere.

    groups: of big; kept: {family name: indices of the units that small has}. Returns what `shrink`
    reports of the same units.
    """
    places = copy.deepcopy(big).double()
    for parameter in places.parameters():  # the place of each element in it
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    where, report = shrink(places, groups, keep=kept)
    for parameter, its, place in zip(
        big.parameters(), small.parameters(), where.parameters(), strict=True
    ):
        parameter.zero_().view(-1)[place.long().flatten()] = its.flatten()
    return report
