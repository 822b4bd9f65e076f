# SPDX-License-Identifier: Apache-2.0
"""BiDAF (Seo et al. 2017), a reader that points to the answer in a text, from ordinary modules.

Letters: B questions, T tokens of a text, J tokens of a question, N distinct tokens of W letters,
H units of an LSTM in each direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iss_kernels as iss


class Highway(nn.Module):
    """Layers that each pass a part of their input on as it is (Srivastava et al. 2015)."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.change = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for change, gate in zip(self.change, self.gate, strict=True):
            x = x + gate(x).sigmoid() * (change(x).relu() - x)
        return x


class Words(nn.Module):
    """Vectors of tokens, [N, C + V]: what their letters say, and what is known of the word.

    Words below `known` have the vectors that came with the data, which do not train; the others
    learn their own.
    """

    def __init__(
        self, vectors: Tensor, own: int, letters: int, letter_size: int, channels: int, width: int
    ) -> None:
        super().__init__()
        self.known = nn.Parameter(vectors, requires_grad=False)
        self.own = nn.Parameter(torch.randn(own, vectors.size(1)) * 0.1)
        self.letters = nn.Embedding(letters, letter_size)
        self.convolution = nn.Conv1d(letter_size, channels, width)
        self.highway = Highway(channels + vectors.size(1), 2)

    def forward(self, words: Tensor, letters: Tensor, dropout: float) -> Tensor:
        """words: [N]; letters: [N, W]."""
        seen = F.dropout(self.letters(letters).transpose(1, 2), dropout, self.training)
        shape = self.convolution(seen).relu().amax(-1)
        meaning = F.embedding(words, torch.cat([self.known, self.own]))
        y: Tensor = self.highway(torch.cat([shape, meaning], -1))
        return y


class BiDAF(nn.Module):
    """Scores of every token of a text as the first and the last one of the answer.

    vectors: [N, V], of the words 0 .. N - 1; own: number of words after these, which learn theirs.
    dropout: share of what enters each layer that is dropped in training.
    """

    def __init__(
        self,
        vectors: Tensor,
        own: int,
        letters: int,
        hidden_size: int = 100,
        letter_size: int = 8,
        channels: int = 100,
        width: int = 5,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.words = Words(vectors, own, letters, letter_size, channels, width)

        def lstm(inputs: int) -> iss.ISSLSTM:
            made = iss.ISSLSTM(inputs, hidden_size, batch_first=True, bidirectional=True)
            with torch.no_grad():
                for direction in ("", "_reverse"):  # at first nothing is forgotten
                    biases = made.get_parameter("bias_ih_l0" + direction)
                    biases[hidden_size : 2 * hidden_size] = 1
            return made

        both = 2 * hidden_size
        self.phrase = lstm(channels + vectors.size(1))
        # The similarity of a token of the text and one of the question is the sum of these.
        self.of_context = nn.Linear(both, 1, bias=False)
        self.of_question = nn.Linear(both, 1, bias=False)
        self.of_product = nn.Linear(both, 1, bias=False)
        # At first tokens fit that are alike, as in scaled dot-product attention.
        nn.init.constant_(self.of_product.weight, both**-0.5)
        self.modelling1 = lstm(4 * both)
        self.modelling2 = lstm(both)
        self.start = nn.Linear(5 * both, 1)
        self.output = lstm(7 * both)
        self.end = nn.Linear(5 * both, 1)

    def forward(
        self,
        context: Tensor,
        context_lengths: Tensor,
        question: Tensor,
        question_lengths: Tensor,
        words: Tensor,
        letters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Scores of the first and of the last token, [B, T] each; those of padding are -inf.

        context: [B, T] and question: [B, J], numbers of tokens; their lengths: [B] each; of every
        token the word: [N] and the letters: [N, W].
        """
        tokens = self.words(words, letters, self.dropout)  # each of them once, however often used
        c = self._phrases(tokens, context, context_lengths)  # [B, T, 2H]
        q = self._phrases(tokens, question, question_lengths)  # [B, J, 2H]
        padding = _padding(context, context_lengths)  # [B, T]
        flow = self._attend(c, q, padding, _padding(question, question_lengths))  # [B, T, 8H]

        m1 = self.modelling1(flow, lengths=context_lengths)[0]
        m2 = self._drop(self.modelling2(self._drop(m1), lengths=context_lengths)[0])
        start = self._score(self.start, m2, flow, padding)
        # What the first token is likely to be, in the units of m2.
        likely = (start.softmax(-1).unsqueeze(1) @ m2).expand_as(m2)
        m3 = self.output(torch.cat([flow, m2, likely, m2 * likely], -1), lengths=context_lengths)[0]
        return start, self._score(self.end, self._drop(m3), flow, padding)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _phrases(self, tokens: Tensor, numbers: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.phrase(self._drop(F.embedding(numbers, tokens)), lengths=lengths)[0]
        return y

    def _attend(self, c: Tensor, q: Tensor, c_padding: Tensor, q_padding: Tensor) -> Tensor:
        """The text, what the question says to each of its tokens, and to the text as a whole."""
        similarity = self.of_context(c) + self.of_question(q).mT
        weights = self.of_product.weight
        similarity = similarity + torch.einsum("bth,zh,bjh->btj", c, weights, q)  # [B, T, J]
        similarity = similarity.masked_fill(q_padding.unsqueeze(1), -torch.inf)
        asked = similarity.softmax(-1) @ q  # [B, T, 2H]
        best = similarity.amax(-1).masked_fill(c_padding, -torch.inf)  # [B, T]
        fitting = best.softmax(-1).unsqueeze(1) @ c  # [B, 1, 2H]
        return self._drop(torch.cat([c, asked, c * asked, c * fitting], -1))

    def _score(self, layer: nn.Module, m: Tensor, flow: Tensor, padding: Tensor) -> Tensor:
        scores: Tensor = layer(torch.cat([m, flow], -1)).squeeze(-1)
        return scores.masked_fill(padding, -torch.inf)


def _padding(tokens: Tensor, lengths: Tensor) -> Tensor:
    """True beyond the length, [B, T]."""
    return torch.arange(tokens.size(1), device=tokens.device) >= lengths.unsqueeze(1)


def example() -> tuple[Tensor, ...]:
    """A small batch of inputs: two texts and questions of unequal lengths."""

    def numbers(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape)).view(shape) % 3

    texts = numbers(2, 7), torch.tensor([7, 4])
    questions = numbers(2, 5), torch.tensor([5, 3])
    return (*texts, *questions, torch.zeros(3, dtype=torch.long), numbers(3, 6) % 2)


# The six that the paper groups, in the order of its tables, then those of the phrases.
FAMILIES = {
    "ModFwd1": "modelling1.l0",
    "ModBwd1": "modelling1.l0_reverse",
    "ModFwd2": "modelling2.l0",
    "ModBwd2": "modelling2.l0_reverse",
    "OutFwd": "output.l0",
    "OutBwd": "output.l0_reverse",
    "PhraseFwd": "phrase.l0",
    "PhraseBwd": "phrase.l0_reverse",
}


def parameters(model: nn.Module) -> int:
    """Number of parameters without the vectors of words, as the paper counts."""
    vectors = ("words.known", "words.own")
    return sum(p.numel() for name, p in model.named_parameters() if name not in vectors)
