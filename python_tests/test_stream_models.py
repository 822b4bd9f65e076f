# SPDX-License-Identifier: Apache-2.0
"""Stream of models that are no plain chain: their own forward, one step at a time."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from iss_kernels import ISSLSTM, Stream, prepare, use_backend

F_IN, H, V, B = 5, 8, 11, 2  # features, units, words, rows


def floats(*shape):
    return torch.randn(*shape)


def words(*shape):
    return torch.randint(V, shape)


class Language(nn.Module):
    """Embedding and softmax share their weight; the state is taken and returned."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(V, H), nn.LSTM(H, H, 2, dropout=0.3)
        self.head = nn.Linear(H, V)
        self.head.weight = self.embed.weight

    def forward(self, tokens, state=None):
        y, state = self.lstm(self.embed(tokens), state)
        return self.head(y.reshape(-1, H)), state


class BatchFirstLanguage(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(V, H), nn.GRU(H, H, batch_first=True)
        self.head = nn.Linear(H, V)

    def forward(self, tokens, state):
        y, state = self.gru(self.embed(tokens), state)
        return self.head(y.reshape(-1, H)), state


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.foot = nn.Linear(F_IN, H)
        self.grus = nn.ModuleList(nn.GRU(H, H, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(3))

    def forward(self, x):
        x = self.foot(x)
        for gru, norm in zip(self.grus, self.norms, strict=True):
            x = x + gru(norm(x))[0]
        return x


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.mean, self.scale = nn.RNN(F_IN, H), nn.Linear(H, 3), nn.Linear(H, 1)

    def forward(self, x):
        y, _ = self.rnn(x)
        return {"mean": self.mean(y), "scales": [self.scale(y).squeeze(-1).exp()]}


class Policy(nn.Module):
    """A loop over a cell, from zeros."""

    def __init__(self):
        super().__init__()
        self.cell, self.policy, self.value = (
            nn.GRUCell(F_IN, H),
            nn.Linear(H, 3),
            nn.Linear(H, 1),
        )

    def forward(self, observations):
        h, outputs = observations.new_zeros(observations.size(1), H), []
        for x in observations:
            h = self.cell(x, h)
            outputs.append(h)
        y = torch.stack(outputs)
        return self.policy(y), self.value(y).squeeze(-1)


class TwoCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.LSTMCell(1, H), nn.LSTMCell(H, H), nn.Linear(H, 1)

    def forward(self, x):
        states = [torch.zeros(x.size(0), H) for _ in range(4)]
        outputs = []
        for x_t in x.split(1, 1):
            states[:2] = self.one(x_t, states[:2])
            states[2:] = self.two(states[0], states[2:])
            outputs.append(self.head(states[2]))
        return torch.cat(outputs, 1)


class Attending(nn.Module):
    """Attention over a fixed memory, after the recurrent layer (Luong)."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(V, H), nn.LSTM(H, H, batch_first=True)
        self.head = nn.Linear(2 * H, V)

    def forward(self, tokens, memory):
        y, _ = self.lstm(self.embed(tokens))
        scores = torch.bmm(y, memory.transpose(1, 2)).softmax(-1)
        return self.head(torch.cat([y, torch.bmm(scores, memory)], -1)), scores


class AskingFirst(nn.Module):
    """Attention over a fixed memory that asks with the state, before the cell (Bahdanau)."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.head = (
            nn.Embedding(V, H),
            nn.LSTMCell(2 * H, H),
            nn.Linear(H, V),
        )
        self.begin, self.ask = nn.Linear(H, 2 * H), nn.Linear(H, H)

    def forward(self, memory, tokens):
        h, c = self.begin(memory.mean(1)).chunk(2, -1)
        outputs = []
        for x in self.embed(tokens).unbind(1):
            scores = (memory @ self.ask(h).unsqueeze(-1)).softmax(1)
            h, c = self.cell(torch.cat([x, (scores * memory).sum(1)], -1), (h, c))
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class Feeding(nn.Module):
    """A loop that carries what it attends to beside the state, all from the same zeros."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(F_IN + H, H), nn.Linear(H, 3)

    def forward(self, x, memory):
        h = c = context = x.new_zeros(x.size(1), H)
        outputs = []
        for x_t in x:
            h, c = self.cell(torch.cat([x_t, context], -1), (h, c))
            context = h + ((memory @ h.unsqueeze(-1)).softmax(1) * memory).sum(1)
            outputs.append(self.head(context))
        return torch.stack(outputs)


class Masked(nn.Module):
    """Zeroes the state where an episode begins, and mixes it with the one before."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(F_IN, H), nn.Linear(H, 3)

    def forward(self, x, begins):
        h, outputs = torch.zeros(x.size(1), H), []
        for x_t, begin in zip(x, begins, strict=True):
            h = h * (1 - begin).unsqueeze(-1)
            h = 0.9 * self.cell(x_t, h) + 0.1 * h
            outputs.append(self.head(h))
        return torch.stack(outputs)


class OfItsOwn(nn.Module):
    """A recurrent network without a recurrent module."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(F_IN + H, H), nn.Linear(H, 3)

    def forward(self, x):
        h, outputs = x.new_zeros(x.size(0), H), []
        for t in range(x.size(1)):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], -1)))
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))


class EncoderDecoder(nn.Module):
    """The encoder, in both directions, runs over an argument that stays."""

    def __init__(self):
        super().__init__()
        self.encoder, self.bridge = nn.GRU(F_IN, H, bidirectional=True), nn.Linear(2 * H, H)
        self.decoder, self.head = nn.GRU(F_IN, H), nn.Linear(H, 2)

    def forward(self, source, target):
        _, h = self.encoder(source)
        y, _ = self.decoder(target, self.bridge(torch.cat([h[0], h[1]], -1)).unsqueeze(0))
        return self.head(y)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(F_IN, H, 2, batch_first=True), nn.Linear(H, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, lengths = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(y), lengths


class Channels(nn.Module):
    """Features before time, as convolutions have them."""

    def __init__(self):
        super().__init__()
        self.foot, self.lstm = nn.Conv1d(F_IN, H, 1), nn.LSTM(H, H, batch_first=True)
        self.head = nn.Conv1d(H, 2, 1)

    def forward(self, x):
        return self.head(self.lstm(self.foot(x).transpose(1, 2))[0].transpose(1, 2))


class Learned(nn.Module):
    """Begins with a learned state."""

    def __init__(self):
        super().__init__()
        self.h0, self.gru = nn.Parameter(torch.randn(2, 1, H)), nn.GRU(F_IN, H, 2)

    def forward(self, x):
        return self.gru(x, self.h0.expand(-1, x.size(1), -1).contiguous())[0]


class Keeping(nn.Module):
    """Keeps its state on itself."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(F_IN, H), nn.Linear(H, 3)
        self.state = torch.randn(1, B, H), torch.randn(1, B, H)

    def forward(self, x):
        y, self.state = self.lstm(x, self.state)
        return self.head(y)


class Normed(nn.Module):
    """Changes the state between the steps, and returns it."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.GRUCell(F_IN, H), nn.LayerNorm(H)

    def forward(self, x, h):
        outputs = []
        for x_t in x:
            h = self.norm(self.cell(x_t, h))
            outputs.append(h)
        return torch.stack(outputs), h


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.norm, self.head = (
            nn.LSTM(F_IN, H, batch_first=True),
            nn.BatchNorm1d(H),
            nn.Linear(H, 1),
        )

    def begin(self, batch):
        weight = next(self.parameters())
        return weight.new(1, batch, H).zero_(), weight.new(1, batch, H).zero_()

    def forward(self, x):
        y, _ = self.lstm(x, self.begin(x.size(0)))
        return self.head(self.norm(y[:, -1]))


class LooksAtParameters(nn.Module):
    """Its code wants a parameter, which a prepared layer has not."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(F_IN, H)

    def forward(self, x):
        zeros = next(self.parameters()).new_zeros(1, x.size(1), H)
        return self.lstm(x, (zeros, zeros))[0].exp()


class Answer(NamedTuple):
    y: Any
    h: Any


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = ISSLSTM(F_IN, [H, 3], 2)

    def forward(self, x):
        y, _ = self.gru(x)
        return Answer(y.sin(), y.cos())


def first(output, t):
    return tree_map(lambda y: y[t], output)


def second(output, t):
    return tree_map(lambda y: y[:, t], output)


def third(output, t):
    return tree_map(lambda y: y[:, :, t], output)


@dataclass
class Case:
    """make: the model. arguments: of how many steps. at: the output of a step, of the whole."""

    make: Any
    arguments: Any
    at: Any = first
    streamed: tuple[int, ...] = (0,)
    dim: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def stream(self, model, example):
        return Stream(model, B, example, **self.options)

    def step(self, arguments, t):
        """The arguments of a step, by position or else by name."""
        parts = [
            a.select(self.dim, t) if i in self.streamed else a for i, a in enumerate(arguments)
        ]
        return parts[: max(self.streamed) + 1]  # what is left out is the example's


CASES = {
    "a language model": Case(
        Language, lambda n: (words(n, B), (floats(2, B, H), floats(2, B, H))),
        lambda output, t: output[0].view(-1, B, V)[t]),
    "its state left out": Case(
        Language, lambda n: (words(n, B),), lambda output, t: output[0].view(-1, B, V)[t]),
    "rows flattened batch first": Case(
        BatchFirstLanguage, lambda n: (words(B, n), floats(1, B, H)),
        lambda output, t: output[0].view(B, -1, V)[:, t], dim=1),
    "a residual stack": Case(Residual, lambda n: (floats(B, n, F_IN),), second, dim=1),
    "heads in a dict": Case(Heads, lambda n: (floats(n, B, F_IN),)),
    "a policy": Case(Policy, lambda n: (floats(n, B, F_IN),)),
    "two cells": Case(TwoCells, lambda n: (floats(B, n),), second, dim=1),
    "attention after": Case(
        Attending, lambda n: (words(B, n), floats(B, 4, H)), second, dim=1),
    "attention before": Case(
        AskingFirst, lambda n: (floats(B, 4, H), words(B, n)), second, (1,), 1),
    "a context that is fed back": Case(
        Feeding, lambda n: (floats(n, B, F_IN), floats(B, 4, H))),
    "a state that is masked": Case(
        Masked, lambda n: (floats(n, B, F_IN), (torch.rand(n, B) < 0.3).float()),
        streamed=(0, 1)),
    "a cell of its own": Case(
        OfItsOwn, lambda n: (floats(B, n, F_IN),), second, dim=1, options={"time_dim": 1}),
    "an encoder and a decoder": Case(
        EncoderDecoder, lambda n: (floats(4, B, F_IN), floats(n, B, F_IN)), first, (1,),
        options={"fixed": "source"}),
    "packed": Case(
        Packed, lambda n: (floats(B, n, F_IN), torch.full((B,), n)),
        lambda output, t: output[0][:, t], dim=1),
    "packed, a list of lengths": Case(
        Packed, lambda n: (floats(B, n, F_IN), [n] * B), lambda output, t: output[0][:, t], dim=1),
    "channels": Case(Channels, lambda n: (floats(B, F_IN, n),), third, dim=2),
    "channels, by the last": Case(
        Channels, lambda n: (floats(B, F_IN, n),), third, dim=2, options={"time_dim": -1}),
    "a learned state": Case(Learned, lambda n: (floats(n, B, F_IN),)),
    "a state on the model": Case(Keeping, lambda n: (floats(n, B, F_IN),)),
    "a state that changes between steps": Case(
        Normed, lambda n: (floats(n, B, F_IN), torch.zeros(B, H)), lambda output, t: output[0][t]),
    "a look at the parameters": Case(LooksAtParameters, lambda n: (floats(n, B, F_IN),)),
    "a named tuple, unequal layers": Case(Named, lambda n: (floats(n, B, F_IN),)),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def whole(model, arguments):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*arguments)


def assert_step(case, step, arguments, output, t, rows=slice(None)):
    """One step of the stream is the output of step t."""
    expected = tree_leaves(case.at(output, t))
    given = tree_leaves(step(*case.step(arguments, t)))
    for one, other in zip(expected, given, strict=False):
        torch.testing.assert_close(other[rows], one[rows], rtol=0, atol=1e-5)
    return given


@pytest.mark.parametrize("backend", ["extension", "reference"])
@every_case
def test_steps_are_those_of_the_model(case, backend):
    with use_backend(backend):
        check_steps(case)


def check_steps(case):
    model, example = case.make(), case.arguments(5)
    step = case.stream(model, example)
    arguments = (*case.arguments(9)[: max(case.streamed) + 1], *example[max(case.streamed) + 1 :])
    lengths = [9] * B if model.__class__ is Packed else None
    output = whole(model, arguments if lengths is None else (arguments[0], lengths))
    for _ in range(2):
        for t in range(9):
            assert_step(case, step, arguments, output, t)
        step.reset()


@every_case
def test_a_state_resumes_in_another_stream(case):
    model, example = case.make(), case.arguments(6)
    output = whole(model, example)
    one, two = case.stream(model, example), case.stream(model, example)
    for t in range(3):
        assert_step(case, one, example, output, t)
    two.state = one.state
    for t in range(3, 6):
        assert_step(case, one, example, output, t)
        assert_step(case, two, example, output, t)


@every_case
def test_rows_that_are_reset_go_on_as_from_the_beginning(case):
    model, example = case.make(), case.arguments(6)
    output = whole(model, example)
    step, anew = case.stream(model, example), case.stream(model, example)
    for t in range(6):
        given = assert_step(case, step, example, output, t, rows=slice(1, 2))
        expected = anew(*case.step(example, t))
        for one, other in zip(tree_leaves(case.at(output, t)), tree_leaves(expected), strict=False):
            if t >= 3:  # row 0 is then two steps behind
                assert (one[0] - other[0]).abs().max() > 1e-4
        for one, other, _ in zip(
            tree_leaves(expected), given, tree_leaves(case.at(output, t)), strict=False
        ):
            torch.testing.assert_close(other[0], one[0], rtol=0, atol=1e-5)
        if t == 2:
            step.reset(rows=[True, False])
            anew.reset()


class Agents(nn.Module):
    """Some agents in each row, [T, B, N, I]."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(F_IN + H, H)

    def forward(self, x, h=None):
        h, outputs = x.new_zeros(*x.shape[1:3], H) if h is None else h, []
        for x_t in x:
            h = torch.tanh(self.cell(torch.cat([x_t, h], -1)))
            outputs.append(h)
        return torch.stack(outputs), h


class DualPath(nn.Module):
    """A layer within a step, and one over the steps for each band: [B, T, bands, I]."""

    def __init__(self):
        super().__init__()
        self.intra = nn.GRU(F_IN, H, bidirectional=True, batch_first=True)
        self.inter = nn.GRU(2 * H, H, 2, batch_first=True)

    def forward(self, x):
        rows, steps, bands, _ = x.shape
        y = self.intra(x.flatten(0, 1))[0].reshape(rows, steps, bands, -1).transpose(1, 2)
        return self.inter(y.flatten(0, 1))[0].reshape(rows, bands, steps, -1).transpose(1, 2)


@pytest.mark.parametrize("agents", [2, 3])
@pytest.mark.parametrize("given", [False, True])
def test_rows_are_found_among_dimensions_of_their_number(agents, given):
    model, x = Agents(), floats(6, 3, agents, F_IN)
    states = (floats(3, agents, H),) if given else ()
    step = Stream(model, 3, (x, *states), time_dim=0)
    assert bool(step._engine.feeds) == given
    expected, rows = whole(model, (x, *states))[0], torch.tensor([True, False, False])
    for t in range(6):
        if t == 3:
            step.reset(rows=rows)
            assert torch.equal(step.state[0], states[0][0] if given else torch.zeros(agents, H))
            anew = whole(model, (x[3:], *states))[0]
            expected[3:] = torch.where(rows.view(-1, 1, 1), anew, expected[3:])
        torch.testing.assert_close(step(x[t])[0], expected[t], rtol=0, atol=1e-5)


def test_rows_of_a_model_of_one_step_are_found_too():
    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gru = nn.Conv1d(2, H, 3), nn.GRU(H, H, 2, batch_first=True)

        def forward(self, x, h, seen):  # [B, 2], [2, B, H], [B, 2, 2]
            seen = torch.cat([seen, x.unsqueeze(2)], 2)
            y, h = self.gru(self.conv(seen).transpose(1, 2), h)
            return y[:, -1].sin(), h, seen[:, :, 1:]

    model, states = TwoLayers(), (floats(2, B, H), floats(B, 2, 2))
    step, first = Stream(model, B, (floats(B, 2), *states)), states
    for t in range(6):
        x = floats(B, 2)
        y, *states = whole(model, (x, *states))
        torch.testing.assert_close(step(x)[0], y, rtol=0, atol=1e-5)
        if t == 3:
            step.reset(rows=[True, False])
            states[0][:, 0], states[1][0] = first[0][:, 0], first[1][0]
            torch.testing.assert_close(step.state, tuple(states), rtol=0, atol=1e-5)


def test_rows_that_are_not_those_of_the_states_are_not_reset():
    model, x = DualPath(), floats(B, 6, 4, F_IN)
    step, expected = Stream(model, B, x, time_dim=1), whole(model, (x,))
    for t in range(6):
        torch.testing.assert_close(step(x[:, t]), expected[:, t], rtol=0, atol=1e-5)
        with pytest.raises(ValueError) as got:
            step.reset(rows=[True, False])
        assert "expected states with B = 2 rows, got one of shape [2, 8, 8]" in str(got.value)


def test_rows_that_no_output_shows_are_not_reset():
    class Loudest(Policy):
        def forward(self, x):
            return super().forward(x)[0].flatten(1).amax(1)

    step = Stream(Loudest(), B, floats(6, B, F_IN))
    step(floats(B, F_IN))
    with pytest.raises(ValueError, match="one by one .no output shows its rows., got some"):
        step.reset(rows=[True, False])


# -- a step per call -------------------------------------------------------------------------------


class PolicyStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.policy = nn.GRUCell(F_IN, H), nn.Linear(H, 3)

    def forward(self, x, h):
        h = self.cell(x, h)
        return self.policy(h), h


class DecoderStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(V, H), nn.GRU(2 * H, H), nn.Linear(H, V)

    def forward(self, word, h, memory):
        scores = torch.einsum("bh,sbh->sb", h[-1], memory).softmax(0)
        x = torch.cat([self.embed(word), torch.einsum("sb,sbh->bh", scores, memory)], -1)
        y, h = self.gru(x.unsqueeze(0), h)
        return self.head(y[0]), h, scores


class Detector(nn.Module):
    """Takes features of a chunk, [B, I, 1], and both states as one tensor, as silero-vad's."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(F_IN, H)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.ReLU(), nn.Conv1d(H, 1, 1), nn.Sigmoid())

    def forward(self, x, state):
        h, c = self.cell(x.squeeze(-1), (state[0], state[1]))
        return self.head(h.unsqueeze(-1)), torch.stack([h, c])


STEPS = {
    "a policy": (PolicyStep, lambda: (floats(B, F_IN), floats(B, H)), 1),
    "a decoder": (DecoderStep, lambda: (words(B), floats(1, B, H), floats(4, B, H)), 1),
    "a detector": (Detector, lambda: (floats(B, F_IN, 1), floats(2, B, H)), 1),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_model_of_one_step_is_given_its_state_back(name):
    make, arguments, which = STEPS[name]
    model, example = make(), arguments()
    step, state = Stream(model, B, example), example[1]
    for t in range(5):
        x = arguments()[0]
        output = whole(model, (x, state, *example[2:]))
        torch.testing.assert_close(step(x), output, rtol=0, atol=1e-5)
        torch.testing.assert_close(step.state, output[which], rtol=0, atol=1e-5)
        state = output[which].clone()
        if t == 2:
            step.reset(rows=[False, True])
            row = (1,) if state.dim() == 2 else (slice(None), 1)
            state[row] = example[1][row]


class CachedStep(nn.Module):
    """A causal convolution, with what it has seen, before the cell."""

    def __init__(self):
        super().__init__()
        self.conv, self.cell = nn.Conv1d(F_IN, H, 3), nn.GRUCell(H, H)

    def forward(self, x, h, seen):
        seen = torch.cat([seen, x.unsqueeze(2)], 2)
        h = self.cell(self.conv(seen).squeeze(2).relu(), h)
        return h.sum(1), h, seen[:, :, 1:]


class BatchFirstCachedStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gru = nn.Conv1d(F_IN, H, 3), nn.GRU(H, H, batch_first=True)

    def forward(self, x, h, seen):
        seen = torch.cat([seen, x], 1)
        y, h = self.gru(self.conv(seen.transpose(1, 2)).transpose(1, 2).relu(), h)
        return y.sum(-1), h, seen[:, 1:]


class MeanStep(nn.Module):
    """Subtracts a running mean."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(F_IN, H)

    def forward(self, x, h, mean):
        mean = 0.9 * mean + 0.1 * x
        h = self.cell(x - mean, h)
        return h.sum(1), h, mean


class CrosswiseStep(nn.Module):
    """Returns the states in another order than it takes them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.GRUCell(F_IN, H), nn.GRUCell(H, H)

    def forward(self, x, second, first):
        first = self.one(x, first)
        second = self.two(first, second)
        return second.sum(1), first, second


@pytest.mark.parametrize(
    ("make", "given", "order"),
    [
        (CachedStep, lambda: (floats(3, F_IN), floats(3, H), floats(3, F_IN, 2)), (1, 2)),
        (BatchFirstCachedStep, lambda: (floats(3, 1, F_IN), floats(1, 3, H), floats(3, 2, F_IN)),
         (1, 2)),
        (MeanStep, lambda: (floats(3, F_IN), floats(3, H), torch.zeros(3, F_IN)), (1, 2)),
        (CrosswiseStep, lambda: (floats(3, F_IN), torch.zeros(3, H), torch.zeros(3, H)), (2, 1)),
    ],
)  # fmt: skip
def test_all_states_of_a_model_of_one_step_are_given_back(make, given, order):
    model, example = make(), given()
    step, states = Stream(model, 3, example), example[1:]
    for t in range(6):
        x = given()[0]
        output = whole(model, (x, *states))
        torch.testing.assert_close(step(x), output, rtol=0, atol=1e-5)
        states = tuple(output[i].clone() for i in order)
        torch.testing.assert_close(step.state, states, rtol=0, atol=1e-5)
        if t == 3:
            step.reset(rows=[False, True, False])
            for state, first in zip(states, example[1:], strict=True):
                row = (slice(None), 1) if state.size(0) == 1 else (1,)
                state[row] = first[row]


def test_what_may_be_a_state_or_not_is_to_be_named():
    class Speaker(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(F_IN, H), nn.Linear(H, 3)

        def forward(self, x, h, speaker):
            h = self.cell(x, h)
            return self.head(h) * speaker, h

    model, x, states = Speaker(), floats(6, B, F_IN), (floats(B, H), floats(B, 3))
    with pytest.raises(ValueError) as got:
        Stream(model, B, (x[0], *states))
    assert str(got.value).endswith(
        "and fixed= for what is no state, got 1 arguments and 1 outputs of shape [2, 3]"
    )
    step, h = Stream(model, B, (x[0], *states), fixed="speaker"), states[0]
    for t in range(6):
        expected = whole(model, (x[t], h, states[1]))
        torch.testing.assert_close(step(x[t]), expected, rtol=0, atol=1e-5)
        h = expected[1]


def test_a_memory_may_change_from_step_to_step():
    model = Attending()
    step = Stream(model, B, (words(B, 5), floats(B, 4, H)))
    tokens = words(B, 3)
    for t in range(3):
        memory = floats(B, 2 + t, H)
        y, scores = step(tokens[:, t], memory)
        expected = whole(model, (tokens[:, : t + 1], memory))
        torch.testing.assert_close((y, scores), (expected[0][:, t], expected[1][:, t]))
    step.reset()
    torch.testing.assert_close(
        step(memory=memory, tokens=tokens[:, 0])[0], whole(model, (tokens, memory))[0][:, 0]
    )


def test_lengths_of_the_example_may_differ():
    model = Packed()
    step = Stream(model, B, (floats(B, 5, F_IN), torch.tensor([3, 5])))
    x = floats(B, 6, F_IN)
    for t, y in enumerate(whole(model, (x, [6] * B))[0].unbind(1)):
        torch.testing.assert_close(step(x[:, t])[0], y, rtol=0, atol=1e-5)


def test_a_layer_may_run_over_two_inputs():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(F_IN, H)

        def forward(self, one, two):
            return self.gru(one)[0] - self.gru(two)[0]

    model, one, two = Siamese(), floats(6, B, F_IN), floats(6, B, F_IN)
    step = Stream(model, B, {"one": one, "two": two})
    for t, y in enumerate(whole(model, (one, two))):
        torch.testing.assert_close(step(two=two[t], one=one[t]), y, rtol=0, atol=1e-5)
    assert [tuple(h.shape) for h in step.state] == [(1, B, H)] * 2


def test_a_layer_whose_weights_are_computed_streams_as_it_is():
    model, x = Heads(), floats(6, B, F_IN)
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    step, expected = Stream(model, B, x), whole(model, (x,))
    for t in range(6):
        torch.testing.assert_close(step(x[t]), first(expected, t), rtol=0, atol=1e-5)


def test_what_has_no_steps_is_the_answer_so_far():
    model, x = LastStep(), floats(B, 6, F_IN)
    step = Stream(model, B, floats(B, 5, F_IN))
    for t in range(6):
        torch.testing.assert_close(step(x[:, t]), whole(model, (x[:, : t + 1],)), rtol=0, atol=1e-5)


def test_one_row_keeps_its_dimension_where_the_model_flattens_it():
    step = Stream(Language(), 1, words(6, 1))
    y, (h, c) = step(words(1))
    assert y.shape == (1, V) and h.shape == c.shape == (2, 1, H)


class Tagger(nn.Module):
    """Takes a sentence without a batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(V, H), nn.LSTM(H, H), nn.Linear(H, 3)

    def forward(self, words):
        y, _ = self.lstm(self.embed(words).view(len(words), 1, -1))
        return F.log_softmax(self.head(y.view(len(words), -1)), 1)


def test_a_model_without_a_batch():
    model, sentence = Tagger(), words(7)
    step = Stream(model, example=words(5))
    for word, expected in zip(sentence, whole(model, (sentence,)), strict=True):
        torch.testing.assert_close(step(word), expected, rtol=0, atol=1e-5)
    step.reset(rows=[True])
    torch.testing.assert_close(step(sentence[0]), whole(model, (sentence,))[0], rtol=0, atol=1e-5)


# -- one surface -----------------------------------------------------------------------------------


def test_an_example_of_a_plain_chain_changes_nothing():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(F_IN, H, batch_first=True), nn.Linear(H, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model, x = Chain(), floats(B, 5, F_IN)
    plain, step = Stream(model, B), Stream(model, B, x)
    out = torch.empty(B, 3)
    assert step(x[:, 0], out=out) is out and torch.equal(out, plain(x[:, 0]))
    assert type(step._engine) is type(plain._engine)


@pytest.mark.parametrize("name", ["attention before", "a context that is fed back"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_prepared_model_with_a_loop_streams(weights, name):
    """Its Linear layers run by kernels, which no torch function shows."""
    case = CASES[name]
    arguments = case.arguments(6)
    torch.manual_seed(0)
    model = prepare(case.make(), weights)
    step, output = case.stream(model, arguments), whole(model, arguments)
    bound = 1e-5 if weights == "float32" else 0.05
    for t in range(6):
        given = tree_leaves(step(*case.step(arguments, t)))
        for one, other in zip(tree_leaves(case.at(output, t)), given, strict=False):
            torch.testing.assert_close(other, one, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["attention before", "a context that is fed back"])
def test_linear_layers_in_a_loop_run_by_kernels(name):
    case = CASES[name]
    assert case.stream(case.make(), case.arguments(6))._engine.fast


@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "int8"])
def test_a_prepared_model_streams_in_its_format(weights):
    model, example = prepare(Residual(), weights), floats(B, 6, F_IN)
    step, expected = Stream(model, B, example), whole(model, (example,))
    bound = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}[weights]
    for t in range(6):
        torch.testing.assert_close(step(example[:, t]), expected[:, t], rtol=0, atol=bound)
    assert {m.weights for m in step._engine.model.grus} == {weights}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_keeps_it(dtype):
    model, x = Residual().to(dtype), floats(B, 6, F_IN).to(dtype)
    step, expected = Stream(model, B, x), whole(model, (x,))
    for t in range(6):
        y = step(x[:, t])
        assert y.dtype == dtype
        torch.testing.assert_close(
            y, expected[:, t], rtol=0, atol=0.05 if dtype != torch.float64 else 1e-12
        )


@pytest.mark.parametrize("make", [Residual, lambda: prepare(Residual().bfloat16())])
def test_an_example_of_another_dtype_than_the_model_takes_is_an_error(make):
    with pytest.raises(ValueError) as got:
        Stream(make().bfloat16(), B, floats(B, 6, F_IN))
    assert str(got.value).startswith(
        "Stream: expected a model that takes the example in eval mode, got "
    )
    assert " (weights of bfloat16" in str(got.value)
    assert str(got.value).endswith(", an example of float32)")


def test_the_batch_is_the_examples_where_none_is_given():
    x = floats(5, 3, F_IN)
    assert Stream(Policy(), example=x).batch_size == 3
    assert Stream(nn.LSTM(F_IN, H), example=x).batch_size == 3
    step = Stream(PolicyStep(), example=(floats(3, F_IN), floats(3, H)))
    step.reset(rows=[True, False, True])
    assert step.batch_size == 3


def test_a_layer_with_an_example_returns_its_state_too():
    lstm, x = nn.LSTM(F_IN, H, 2, batch_first=True), floats(B, 6, F_IN)
    step = Stream(lstm, B, x)
    for t in range(6):
        y, state = step(x[:, t])
        expected, expected_state = whole(lstm, (x[:, : t + 1],))
        torch.testing.assert_close(y, expected[:, t], rtol=0, atol=1e-5)
        torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-5)


def test_a_stream_says_what_it_streams():
    tokens, memory = words(B, 5), floats(B, 4, H)
    assert repr(Stream(nn.LSTM(3, 4))) == "Stream(batch_size=1)"
    assert repr(Stream(Attending(), B, (tokens, memory))) == (
        "Stream(batch_size=2, streamed=tokens, time_dim=1)"
    )
    step = Stream(PolicyStep(), B, (floats(B, F_IN), floats(B, H)))
    assert repr(step) == "Stream(batch_size=2, streamed=x)"


def test_a_state_that_is_left_out_or_none_is_the_examples():
    model, x, h = Normed(), floats(5, B, F_IN), floats(B, H)
    step = Stream(model, B, (x, h))
    expected = whole(model, (x, h))[0]
    torch.testing.assert_close(step(x[0])[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(step(x[1], None)[0], expected[1], rtol=0, atol=1e-5)
    step.reset()
    begun = whole(model, (x, 2 * h))[0]
    torch.testing.assert_close(step(x[0], 2 * h)[0], begun[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(step(x[1], 7 * h)[0], begun[1], rtol=0, atol=1e-5)  # it has begun


def test_arrays_give_arrays():
    model, x = Heads(), floats(6, B, F_IN)
    step, expected = Stream(model, B, x), whole(model, (x,))
    for t in range(6):
        y = step(x[t].numpy())
        assert isinstance(y["mean"], np.ndarray) and isinstance(y["scales"][0], np.ndarray)
        np.testing.assert_allclose(y["mean"], expected["mean"][t], rtol=0, atol=1e-5)


def test_the_state_is_the_models_and_a_copy():
    model, x = Policy(), floats(6, B, F_IN)
    step = Stream(model, B, x)
    assert not step.state.any()
    y = step(x[0])
    state = step.state
    step.state.fill_(7)
    tree_map(lambda t: t.fill_(7), y)
    assert torch.equal(step.state, state) and state.shape == (B, H)
    step.reset(rows=[True, False])
    assert not step.state[0].any() and torch.equal(step.state[1], state[1])
    step.state = state.double()
    assert torch.equal(step.state, state)
    for wrong in (state[:1], state[:, :3], None, state.tolist(), state.long(), (state, state)):
        with pytest.raises((ValueError, TypeError)):
            step.state = wrong
        assert torch.equal(step.state, state)


class Previous(nn.Module):
    """Sees the input of the step before, which it takes and returns or carries in its loop."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2 * F_IN, H)

    def forward(self, x, h=None, before=None):
        h = x.new_zeros(x.size(1), H) if h is None else h
        before, outputs = x[0].mul(0) if before is None else before[0], []
        for t in range(len(x)):
            h = self.cell(torch.cat([x[t], before], -1), h)
            before = x[t]
            outputs.append(h)
        return torch.stack(outputs), h, before.unsqueeze(0)


@pytest.mark.parametrize("states", [(), (torch.zeros(B, H), torch.zeros(1, B, F_IN))])
def test_an_input_whose_memory_is_written_to_after_the_step_changes_nothing(states):
    model, x = Previous(), floats(6, B, F_IN)
    step, expected = Stream(model, B, (x, *states)), whole(model, (x, *states))[0]
    assert bool(step._engine.feeds) == bool(states)
    buffer = torch.empty(B, F_IN)
    for t in range(6):
        y = step(buffer.copy_(x[t]))[0]
        torch.testing.assert_close(y, expected[t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [Previous(), nn.GRU(F_IN, H)])
def test_an_initial_state_whose_memory_is_written_to_is_kept(model):
    layer = isinstance(model, nn.GRU)
    states = (floats(1, B, H),) if layer else (floats(B, H), floats(1, B, F_IN))
    step = Stream(model, B, (floats(6, B, F_IN), *states))
    given = [state + 1 for state in states]
    step(floats(B, F_IN), *given)
    expected = given[0][..., 0, :].clone()
    given[0].zero_()
    step.reset(rows=[True, False])
    kept = step.state if layer else step.state[0]
    torch.testing.assert_close(kept[..., 0, :], expected)


def test_a_state_that_the_model_writes_to_begins_anew():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(F_IN, H)

        def forward(self, x, h):
            return self.cell(x, h.mul_(0.5)).mul_(1.5)

    model, x, h = Writing(), floats(B, F_IN), floats(B, H)
    step, expected = Stream(model, B, (x, h)), whole(model, (x, h.clone()))
    for _ in range(2):
        torch.testing.assert_close(step(x), expected, rtol=0, atol=1e-5)
        step.reset()


def test_what_the_model_returns_is_the_callers_to_write_to():
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.begin = nn.GRU(F_IN, H), nn.Parameter(torch.randn(1, 1, H))

        def forward(self, x, memory):
            y, _ = self.gru(x, self.begin.expand(1, x.size(1), H).contiguous())
            return y + memory.sum(0), memory, self.begin

    model, x, memory = Returning(), floats(6, B, F_IN), floats(4, B, H)
    step, expected = Stream(model, B, (x, memory)), whole(model, (x, memory))[0]
    for t in range(6):
        y, *rest = step(x[t])
        torch.testing.assert_close(y, expected[t], rtol=0, atol=1e-5)
        for t in rest:
            t.zero_()
    step.reset()
    torch.testing.assert_close(step(x[0])[0], expected[0], rtol=0, atol=1e-5)


def test_a_fixed_argument_may_be_sparse():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(H, H)

        def forward(self, x, edges):
            return self.gru(torch.stack([torch.sparse.mm(edges, x_t) for x_t in x]))[0].sin()

    model, x, edges = Graph(), floats(6, 3, H), torch.eye(3).roll(1, 0).to_sparse()
    step, expected = Stream(model, 3, (x, edges)), whole(model, (x, edges))
    for t in range(6):
        torch.testing.assert_close(step(x[t], edges), expected[t], rtol=0, atol=1e-5)


def test_a_cells_output_is_not_its_state():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(F_IN, H)

        def forward(self, x):
            h, outputs = None, []
            for x_t in x:
                h = self.cell(x_t, h)
                outputs.append(h)
            return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)

    model, x = Bare(), floats(4, B, F_IN)
    step, expected = Stream(model, B, x), whole(model, (x,))
    for t in range(4):
        y = step(x[t])
        torch.testing.assert_close(y, expected[t], rtol=0, atol=1e-5)
        y.fill_(7)


def test_inputs_that_do_not_fit_leave_the_state_alone():
    model, x = Language(), words(5, B)
    step, untouched = Stream(model, B, x), Stream(model, B, x)
    step(x[0]), untouched(x[0])
    for wrong, error, message in (
        (
            x[0, :1],
            ValueError,
            "expected tokens of shape [2] and dtype int64 on cpu, as a step of the example, got "
            "[1] and int64 on cpu",
        ),
        (x[:1], ValueError, "got [1, 2] and int64"),
        (x[0].float(), ValueError, "got [2] and float32"),
        (x[0].to("meta"), ValueError, "got [2] and int64 on meta"),
        ([1, 2], TypeError, "got list"),
        (x[0] + 1000, IndexError, ""),
    ):
        with pytest.raises(error) as got:
            step(wrong)
        assert message in str(got.value)
    with pytest.raises(TypeError):
        step()
    with pytest.raises(TypeError):
        step(x[0], None, x[0])
    assert torch.equal(step(x[1])[0], untouched(x[1])[0])


def test_later_changes_of_the_model_have_no_effect():
    model, x = Language(), words(5, B)
    step, expected = Stream(model, B, x), whole(model, (x,))[0].view(5, B, V)
    before = copy.deepcopy(model.state_dict())
    assert model.training and all(map(torch.equal, before.values(), model.state_dict().values()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(step(x[0])[0], expected[0], rtol=0, atol=1e-5)


def test_no_gradient_flows_and_no_random_numbers_are_drawn():
    model, x = Residual(), floats(B, 5, F_IN).requires_grad_()
    before = torch.get_rng_state()
    step = Stream(model, B, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not step(x[:, 0]).requires_grad and not step.state[0].requires_grad


def test_a_stream_made_in_inference_mode_goes_on_outside():
    model, x = Residual(), floats(B, 5, F_IN)
    expected = whole(model, (x,))
    with torch.inference_mode():
        step = Stream(model, B, x)
        step(x[:, 0])
    torch.testing.assert_close(step(x[:, 1]), expected[:, 1], rtol=0, atol=1e-5)
    assert not any(t.is_inference() for t in step.state)


def test_autocast_changes_nothing():
    model, x = Residual(), floats(B, 5, F_IN)
    expected = Stream(model, B, x)(x[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Stream(model, B, x)(x[:, 0]), expected)


def test_two_python_threads_take_turns_at_one_stream():
    model, x = Policy(), floats(5, B, F_IN)
    alone, shared = Stream(model, B, x), Stream(model, B, x)
    for _ in range(200):
        alone(x[0])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: [shared(x[0]) for _ in range(100)], range(2)))
    assert torch.equal(alone.state, shared.state)


def test_a_compiled_step_is_the_step():
    model, x = Residual(), floats(B, 5, F_IN)
    step, expected = Stream(model, B, x), whole(model, (x,))

    @torch.compile(backend="eager")
    def twice(x):
        return 2 * step(x)

    for t in range(5):
        torch.testing.assert_close(twice(x[:, t]), 2 * expected[:, t], rtol=0, atol=1e-5)


# -- errors ----------------------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(F_IN, H), nn.Linear(H, 3)


class BothWays(Body):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(F_IN, H // 2, bidirectional=True)

    def forward(self, x):
        return self.head(self.lstm(x)[0].sin())


class OverItself(Body):
    def forward(self, x):
        y = self.lstm(x)[0].transpose(0, 1)
        return ((y @ y.transpose(1, 2)).softmax(-1) @ y).transpose(0, 1)


class Heads2(Body):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(H, 2)

    def forward(self, x):
        y = self.lstm(x)[0]
        return self.attention(y, y, y)[0]


class Pooled(Body):
    def forward(self, x):
        return self.head(self.lstm(x)[0].max(0).values)


class Centred(Body):
    def forward(self, x):
        y = self.lstm(x)[0]
        return self.head(y - y.mean(0))


class Convolved(Body):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(F_IN, F_IN, 3, padding=1)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x.permute(1, 2, 0)).permute(2, 0, 1))[0].sin())


class Strided(Body):
    def forward(self, x):
        return self.head(self.lstm(x[::2])[0])


class Positions(Body):
    def forward(self, x):
        return self.head(self.lstm(x + torch.arange(len(x)).view(-1, 1, 1))[0])


class FromTheFuture(Body):
    def forward(self, x):
        return self.head(self.lstm(x)[0]) + x.roll(-1, 0)[..., :3]


class FarFromZero(Body):
    """What it takes from the future is small beside its constant."""

    def forward(self, x):
        y = self.lstm(x)[0]
        return self.head(y + 0.1 * y.mean(0)) + 1000


class Choosing(Body):
    """Some choices are masked, always or where the input says so."""

    def __init__(self, value, by_input, centred):
        super().__init__()
        self.value, self.by_input, self.centred = value, by_input, centred
        self.register_buffer("masked", torch.tensor([False, False, True]))

    def forward(self, x):
        y = self.lstm(x)[0]
        y = y - y.mean(0) if self.centred else y
        masked = x[..., :3] > 0 if self.by_input else self.masked
        return self.head(y).masked_fill(masked, self.value)


class Dropping(Body):
    def forward(self, x):
        return F.dropout(self.lstm(x)[0], 0.5)


class Reversed(nn.LSTM):
    def forward(self, x, state=None):
        return super().forward(x.flip(0), state)


class Backwards(Body):
    def __init__(self):
        super().__init__()
        self.lstm = Reversed(F_IN, H)

    def forward(self, x):
        return self.head(self.lstm(x)[0].sin())


class Remembering(Body):
    """Adds up its inputs by itself."""

    def __init__(self):
        super().__init__()
        self.sum = 0

    def forward(self, x):
        x = x.cumsum(0) + self.sum
        self.sum = x[-1]
        return self.head(self.lstm(x)[0].sin())


class Nothing(Body):
    def forward(self, x):
        return self.lstm(x)[0] * float("nan")


def hooked_by_hand():
    model = Policy()
    forward = model.cell.forward
    model.cell.forward = lambda x, h: forward(x, h)
    return model


CAUSAL = (
    "Stream: expected a causal model, whose memory is the state of its recurrent modules or the "
    "variables of a loop over the steps, got "
)
REFUSED = {
    "both directions": (
        BothWays,
        "Stream: expected recurrent layers in one direction, got lstm, a bidirectional one: its ",
    ),
    "attention over itself": (
        OverItself,
        CAUSAL + "OverItself, whose output at step 1 differs by ",
    ),
    "MultiheadAttention": (Heads2, ", first in attention (MultiheadAttention)"),
    "pooling": (Pooled, CAUSAL + "Pooled, whose output at step 2 differs by "),
    "the mean over time": (Centred, ", first in head (Linear)"),
    "convolution": (Convolved, ", first in conv (Conv1d)"),
    "a stride": (Strided, "the steps that a recurrent module takes (3 of lstm), got x [6, 2, 5]"),
    "positions": (Positions, "Positions, whose output at step 2 differs by"),
    "the next input": (FromTheFuture, "FromTheFuture, whose output at step 1 differs by"),
    "the mean beside a constant": (FarFromZero, "FarFromZero, whose output at step 1 differs by"),
    "dropout": (Dropping, "Dropping, whose output at step "),
    "a subclass": (
        Backwards,
        "got one without but lstm, of a subclass",
    ),
    "a memory of its own": (Remembering, CAUSAL + "Remembering, whose "),
    "no finite answer": (Nothing, "Nothing, which returns no finite number"),
    "a forward set on a cell": (hooked_by_hand, "got one set on the instance of cell"),
    "no recurrent module": (
        lambda: nn.Sequential(nn.Linear(F_IN, 3)),
        "Stream: expected a model with a recurrent layer, got one without",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_causal_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError) as got:
        Stream(make(), B, floats(6, B, F_IN))
    assert message in str(got.value)


@pytest.mark.parametrize("value", [0.0, -1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("by_input", [False, True])
def test_a_masked_output_hides_no_other(value, by_input):
    x = floats(6, B, F_IN)
    model = Choosing(value, by_input, False)
    step, expected = Stream(model, B, x), whole(model, (x,))
    for t in range(6):
        torch.testing.assert_close(step(x[t]), expected[t], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Choosing, whose output at step . differs by"):
        Stream(Choosing(value, by_input, True), B, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example": floats(2, B, F_IN)}, "expected an example of at least 3 steps, got 2"),
        (
            {"example": floats(5, 3, F_IN)},
            "expected an example with batch_size = 2 rows, got 3",
        ),
        ({"example": (floats(5, B, F_IN), 1, 2)}, "expected example to fit Policy.forward"),
        ({"example": pack_sequence([floats(5, F_IN)] * B)}, "got a PackedSequence"),
        ({"example": {"x": floats(5, B, F_IN)}}, "expected example to fit Policy.forward"),
        (
            {"example": floats(5, B, F_IN + 1)},
            "expected a model that takes the example in eval mode, got Policy with ",
        ),
        (
            {"example": floats(5, B, F_IN), "fixed": "memory"},
            "expected fixed to hold names or positions of the example's arguments, observations, "
            "got 'memory'",
        ),
        (
            {"example": floats(5, B, F_IN), "time_dim": 3},
            "expected time_dim=3 to be a dimension of the first argument that is streamed, got one "
            "of shape [5, 2, 5]",
        ),
        (
            {"example": floats(5, 5, F_IN), "time_dim": 1},
            "expected an example with batch_size = 2 rows, got 5",
        ),
        (
            {"example": floats(5, B, F_IN), "fixed": 0},
            "expected an example with a tensor to stream, got none",
        ),
    ],
)
def test_examples_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError) as got:
        Stream(Policy(), B, **options)
    assert message in str(got.value)


def test_a_model_on_meta_is_refused():
    with pytest.raises(ValueError) as got:
        Stream(Language().to("meta"), B, words(5, B))
    assert str(got.value) == "Stream: expected a model on the CPU or a CUDA device, got meta"


def test_code_that_takes_another_way_than_for_the_example_is_an_error():
    class Turning(Masked):
        def forward(self, x, begins):
            h, outputs = torch.zeros(x.size(1), H), []
            for x_t in x:
                if (x_t > 100).any():
                    h = h.tanh()
                h = 0.9 * self.cell(x_t, h) + 0.1 * h
                outputs.append(self.head(h))
            return torch.stack(outputs)

    model, x = Turning(), floats(6, B, F_IN)
    step, expected = Stream(model, B, (x, x)), whole(model, (x, x))
    for t in range(6):
        if t == 3:
            with pytest.raises(RuntimeError) as got:
                step(x[t] + 200, x[t])
            assert str(got.value) == (
                "Stream: expected the model's code to call cell here, as for the example, got tanh"
            )
        torch.testing.assert_close(step(x[t], x[t]), expected[t], rtol=0, atol=1e-5)


def test_equal_words_verify_nothing():
    with pytest.raises(ValueError) as got:
        Stream(Language(), B, torch.zeros(5, B, dtype=torch.int64))
    assert str(got.value) == (
        "Stream: expected an example whose steps differ, by which the model could be verified, got "
        "5 equal ones"
    )


def test_equal_answers_verify_nothing():
    class Looking(Body):
        """Hears the next step, too."""

        bound = 9.0

        def forward(self, x):
            return self.lstm(torch.cat([x[1:], x[-1:]]))[0].sum(-1) > self.bound

    model, x = Looking(), floats(12, B, F_IN)
    with pytest.raises(ValueError) as got:
        Stream(model, B, x)
    assert str(got.value) == (
        "Stream: expected an example on which the answers differ, by which the model could be "
        "verified, got 12 equal ones"
    )
    model.bound = model.lstm(x)[0].sum(-1).median().item()
    with pytest.raises(ValueError, match="Looking, whose output at step . differs"):
        Stream(model, B, x)


def test_a_step_whose_state_could_be_either_output_is_refused():
    class Twins(PolicyStep):
        def forward(self, x, h):
            h = self.cell(x, h)
            return h.sin(), h.cos(), 1

    with pytest.raises(ValueError, match="got 1 arguments and 2 outputs of shape"):
        Stream(Twins(), B, (floats(B, F_IN), floats(B, H)))


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("make", [Residual, Language], ids=["GRUs", "LSTMs"])
def test_a_model_streams_on_a_gpu(gpu, make, weights):
    model, x = make(), words(6, B) if make is Language else floats(B, 6, F_IN)
    expected, dim = whole(model, (x,)), 0 if make is Language else 1
    step = Stream(prepare(model, weights).to(gpu.device), B, gpu.to(x))
    for t in range(6):
        y = step(gpu.to(x.select(dim, t)))
        one = expected[0].view(6, B, V)[t] if make is Language else expected[:, t]
        y = y[0] if make is Language else y
        torch.testing.assert_close(y.cpu(), one, rtol=0, atol=1e-4 if weights == "float32" else 0.1)
    step.reset(rows=[True, False])
    state = step.state
    after = tree_leaves(step(gpu.to(x.select(dim, 0))))[0]
    step.state = state
    assert torch.equal(tree_leaves(step(gpu.to(x.select(dim, 0))))[0], after)


def test_the_precision_of_float32_may_be_set_by_backend():
    backend: Any = torch.backends.mkldnn.matmul
    backend.fp32_precision = "bf16"
    try:
        x = torch.randn(5, 2, 3)
        assert Stream(nn.Sequential(nn.Flatten(2), nn.LSTM(3, 4)), 2, example=x)(x[0])[0].shape == (
            2,
            4,
        )
    finally:
        backend.fp32_precision = "none"
