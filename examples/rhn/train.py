# SPDX-License-Identifier: Apache-2.0
"""The language model of the paper's table 2 and its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

import iss_kernels as iss
from examples.ptb.train import TextTrainer
from examples.rhn.recipes import Recipe
from examples.training import Sparsity
from iss_kernels.demo.text import Text


class HighwayModel(nn.Module):
    """Predicts the next word: tokens [T, B] and a state -> logits [T, B, V] and the next state.

    The word vectors are the softmax's weight, so that unit k of the network, element k of its input
    and element k of the word vectors are one: they leave together. While training, words, inputs,
    states and outputs are dropped, each by one mask for all steps of a window (Gal and Ghahramani
    2016; Zilly et al. 2017): a word that is dropped is dropped wherever it stands in its row.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        drop_word: float,
        drop_input: float,
        drop_state: float,
        drop_output: float,
    ) -> None:
        super().__init__()
        self.drop_word, self.drop_output = drop_word, drop_output
        self.embedding = nn.Embedding(vocabulary, width)
        self.rhn = iss.ISSRHN(
            width, width, depth, dropout_input=drop_input, dropout_state=drop_state
        )
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens: [T, B] int64; state: what the former call returned. Returns [T, B, V], state."""
        x = self.embedding(tokens)
        if self.training and self.drop_word:
            words = dropout(x.new_ones(self.decoder.out_features, tokens.size(1)), self.drop_word)
            x = x * words.gather(0, tokens)[..., None]
        y, state = self.rhn(x, state)
        if self.training and self.drop_output:
            y = y * dropout(torch.ones_like(y[0]), self.drop_output)
        return self.decoder(y), state


def build(recipe: Recipe, vocabulary: int) -> HighwayModel:
    """The model with the weights of the start, which the random state decides."""
    model = HighwayModel(
        vocabulary, recipe.width, recipe.depth, recipe.drop_word, recipe.drop_input,
        recipe.drop_state, recipe.drop_output,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.uniform_(-recipe.init, recipe.init)
        model.decoder.bias.zero_()
        bias = model.rhn.get_parameter("bias_hh_l0").view(recipe.depth, 2, recipe.width)
        bias[:, 0], bias[:, 1] = 0, recipe.bias  # candidates, transform gates
    return model


class HighwayTrainer(TextTrainer):
    """Training of it."""

    def __init__(self, model: HighwayModel, recipe: Recipe, text: Text) -> None:
        example = torch.arange(6).view(3, 2) % model.decoder.out_features
        sparsity = Sparsity.of(recipe, everywhere=False)
        groups = iss.find_groups(model, example, embedding=True)
        optimizer = torch.optim.SGD(model.parameters(), recipe.rate, weight_decay=recipe.l2)
        super().__init__(model, optimizer, recipe, text, groups, sparsity, "rhn")
