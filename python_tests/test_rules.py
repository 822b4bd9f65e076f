# SPDX-License-Identifier: Apache-2.0
"""Models of many kinds are followed and shrunk exactly, or their units stay for a reason."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import GroupError, Groups
from iss_kernels.saving import load, save
from iss_kernels.shrink import shrink, shrink_
from iss_kernels.verify import call

X = torch.randn(6, 3, 5)  # [T, B, I]
TOKENS = torch.randint(0, 9, (6, 3))


class Model(nn.Module):
    """Modules, and a function of them and the inputs as forward."""

    def __init__(self, run: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def halved(groups: Groups) -> dict[str, Tensor]:
    """About half of the units of each family, scattered; equally many of those of one size."""
    generator = torch.Generator().manual_seed(1)
    return {
        f.name: torch.zeros(f.size, dtype=torch.bool).index_fill(
            0, torch.randperm(f.size, generator=generator)[: f.size // 2], True
        )
        for f in groups.families
    }


def shrinks(model: nn.Module, inputs: Any = X, on_unknown: str = "raise") -> Groups:
    """The groups of a model, which must lose half of each family without another answer."""
    model.eval()
    groups = find_groups(model, inputs, on_unknown=on_unknown)
    masks = halved(groups)
    groups.zero_units_(masks)
    assert all(torch.equal(dead | masks[name], dead) for name, dead in groups.dead().items())
    small, report = shrink(model, groups)
    expected, got = call(model, inputs), call(small.eval(), inputs)
    for path, value in expected.items():
        if path in got and value.shape == got[path].shape:
            # rtol: sums of fewer terms round otherwise, and values may be as large as 20.
            torch.testing.assert_close(got[path], value, rtol=1e-6, atol=1e-5)
    assert any(a < b for b, a in report.sizes.values())
    assert report.parameters[1] < report.parameters[0]
    return groups


def sizes(groups: Groups) -> dict[str, int]:
    return {" = ".join(family.members): family.size for family in groups.families}


class Hidden(nn.Module):
    """A model that makes its states by a width of its own."""

    def __init__(self, layers: int = 1, directions: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.layers, self.directions = 8, layers, directions
        self.lstm = nn.LSTM(5, 8, layers, bidirectional=directions == 2)
        self.out = nn.Linear(8 * directions, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(self.layers * self.directions, x.size(1), self.hidden_size)
        y, _ = self.lstm(x, (h, x.new_zeros(h.shape)))
        return self.out(y.reshape(-1, self.hidden_size * self.directions))


def attended(scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A decoder that reads an encoder by these scores of [B, T, H] and [B, S, H]: [B, T, S]."""

    def run(m: Any, x: Tensor) -> Tensor:
        memory, (h, c) = m.encoder(x)
        y, _ = m.decoder(x, (h, c))
        keys, queries = memory.transpose(0, 1), y.transpose(0, 1)
        weights = scores(queries, keys).softmax(-1)
        return m.out(torch.cat([queries, weights @ keys], -1))

    return run


def encoder_decoder(run: Callable[..., Any], **others: Any) -> Model:
    modules = {"encoder": nn.LSTM(5, 8), "decoder": nn.LSTM(5, 8), "out": nn.Linear(16, 2)}
    return Model(run, **modules | others)


def cell_loop(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.size(1), 8)
    ys = []
    for step in x:
        h = m.cell(step, h)
        ys.append(h)
    return m.out(torch.stack(ys))


def lstm_cell_loop(m: Any, x: Tensor) -> Tensor:
    state, below = None, None
    for step in x:
        below = m.below(step, below)
        state = m.cell(below[0], state)
    return m.out(state[0])


def bridge(m: Any, x: Tensor) -> Tensor:
    _, h = m.encoder(x)
    h = torch.tanh(m.bridge(torch.cat([h[0], h[1]], 1)))
    return m.out(m.decoder(x, h.unsqueeze(0))[0])


def learned(m: Any, x: Tensor) -> Tensor:
    h = m.h0.expand(-1, x.size(1), -1).contiguous()
    return m.out(m.rnn(x, h)[0])


def written(m: Any, x: Tensor) -> Tensor:
    y, _ = m.rnn(x)
    ys = y.new_zeros(y.shape)
    for t in range(y.size(0)):
        ys[t] = y[t] * 2
    return m.out(ys)


def padded_by_mask(m: Any, x: Tensor) -> Tensor:
    """Rows of 4 and 2 steps one after another, padded to 4 steps, and back."""
    steps = torch.tensor([4, 2])
    y = m.rnn(x)[0].transpose(0, 1)  # [B, 6, H]
    mask = (torch.arange(4) < steps[:, None]).expand(len(y), -1, -1)[..., None]
    padded = y.new_zeros(len(y), 2, 4, y.size(-1)).masked_scatter(mask, y.reshape(-1))
    z = m.top(padded.flatten(0, 1).transpose(0, 1))[0].transpose(0, 1)
    return m.out(z)


def complex_product(m: Any, x: Tensor) -> Tensor:
    (rr, _), (ri, _), (ir, _), (ii, _) = m.real(x), m.imag(x), m.real(x * 2), m.imag(x * 2)
    return m.out(rr - ii) + m.out(ri + ir)


def packed(m: Any, x: Tensor) -> Tensor:
    y, _ = m.rnn(pack_padded_sequence(x, torch.tensor([6, 4, 2])))
    y = pad_packed_sequence(y)[0]
    mask = (torch.arange(y.size(0))[:, None] < torch.tensor([6, 4, 2])).float()[..., None]
    return m.out((y * mask).sum(0) / mask.sum(0))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(50, 8))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.table[: y.size(0), None]  # type: ignore[index]


def conv(m: Any, x: Tensor) -> Tensor:
    y = m.rnn(x)[0].permute(1, 2, 0)  # [B, H, T]
    y = F.max_pool1d(m.act(m.conv(m.norm(y))), 2)
    return m.out(F.adaptive_avg_pool1d(y, 1).squeeze(-1))


def mean_by(mask: Callable[[Tensor, Tensor], Tensor]) -> tuple[Model, Any, dict[str, int]]:
    """The mean of outputs over the steps that a mask [T, B, 1], made wide, picks."""

    def run(m: Any, x: Tensor, steps: Tensor) -> Any:
        y, _ = m.rnn(x)
        wide = mask(steps.unsqueeze(-1), y)
        return m.out((y * wide).sum(0) / wide.sum(0).clamp(min=1e-9))

    return Model(run, rnn=rnn(), out=head()), (X, torch.ones(6, 3, dtype=torch.long)), {"rnn.l0": 8}


def asks_by_feature(m: Any, x: Tensor) -> Tensor:
    """DA-RNN's encoder: attention over the features of the input, which the state asks."""
    h = torch.zeros(x.size(1), m.cell.hidden_size)
    for step in x:
        features = torch.cat([h.unsqueeze(1).expand(-1, 5, -1), x.permute(1, 2, 0)], 2)
        weights = m.ask(features.view(-1, features.size(2))).view(-1, 5).softmax(1)
        h = m.cell(step * weights, h)
    return m.out(h)


def one_after_the_other(how: str) -> tuple[Model, Any, dict[str, int]]:
    """Outputs of two layers, joined along time, which a third one reads."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, (h, _) = m.a(x)
        y = torch.cat([*[torch.zeros_like(h)] * (how == "zeros too"), m.b(x)[1], y])
        if how == "packed":
            y = pack_padded_sequence(y, torch.tensor([7, 6, 4]))
        y = m.top(y)[0]
        return m.out(pad_packed_sequence(y)[0] if how == "packed" else y)

    return Model(run, a=nn.LSTM(5, 8), b=rnn(), top=nn.LSTM(8, 6), out=head(6)), X, {
        "a.l0 = b.l0": 8, "top.l0": 6,
    }  # fmt: skip


def rnn(size: int = 8, **options: Any) -> nn.GRU:
    return nn.GRU(5, size, **options)


def head(size: int = 8) -> nn.Linear:
    return nn.Linear(size, 2)


MODELS: dict[str, tuple[Model | nn.Module, Any, dict[str, int] | None]] = {
    "states made inside": (Hidden(), X, {"lstm.l0": 8}),
    "states made inside, layers and directions": (Hidden(2, 2), X, None),
    "encoder to decoder": (
        Model(
            lambda m, x: m.out(m.decoder(x, m.encoder(x)[1])[0]),
            encoder=nn.LSTM(5, 8), decoder=nn.LSTM(5, 8), out=head(),
        ),
        X, {"encoder.l0 = decoder.l0": 8},
    ),
    "a bridge between both": (
        Model(
            bridge, encoder=rnn(bidirectional=True), bridge=nn.Linear(16, 12),
            decoder=rnn(12), out=head(12),
        ),
        X, {"encoder.l0": 8, "encoder.l0_reverse": 8, "decoder.l0": 12},
    ),
    "a learned state": (
        Model(learned, h0=nn.Parameter(torch.randn(1, 1, 8)), rnn=rnn(), out=head()), X, None,
    ),
    "a learned state of two layers": (
        Model(
            learned, h0=nn.Parameter(torch.randn(2, 1, 8)), rnn=rnn(num_layers=2), out=head()
        ),
        X, {"rnn.l0": 8, "rnn.l1": 8},
    ),
    "dot-product attention": (
        encoder_decoder(attended(lambda q, k: torch.bmm(q, k.transpose(1, 2)))), X,
        {"encoder.l0 = decoder.l0": 8},
    ),
    "attention by einsum": (
        encoder_decoder(attended(lambda q, k: torch.einsum("bth,bsh->bts", q, k))), X, None,
    ),
    "scaled attention with a scale": (
        encoder_decoder(
            lambda m, x: m.out(torch.cat([
                y := m.decoder(x, (r := m.encoder(x))[1])[0],
                F.scaled_dot_product_attention(y, r[0], r[0], scale=0.3),
            ], -1))
        ),
        X, {"encoder.l0 = decoder.l0": 8},
    ),
    "bilinear attention": (
        Model(
            lambda m, x: m.out(
                (m.w(m.a(x)[0].transpose(0, 1)) @ m.b(x)[0].permute(1, 2, 0)).softmax(-1)
                @ m.b(x)[0].transpose(0, 1)
            ),
            a=rnn(), b=rnn(12), w=nn.Linear(8, 12), out=head(12),
        ),
        X, {"a.l0": 8, "b.l0": 12},
    ),
    "additive attention": (
        Model(
            lambda m, x: m.out(
                ((y := m.rnn(x)[0]) * (torch.tanh(m.w(y)) @ m.v).softmax(0)[..., None]).sum(0)
            ),
            rnn=rnn(), w=nn.Linear(8, 6), v=nn.Parameter(torch.randn(6)), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "nn.Bilinear": (
        Model(
            lambda m, x: m.out(m.a(x)[0], m.b(x)[0]), a=rnn(), b=rnn(6), out=nn.Bilinear(8, 6, 2)
        ),
        X, {"a.l0": 8, "b.l0": 6},
    ),
    "a matrix of parameters": (
        Model(
            lambda m, x: torch.matmul(m.rnn(x)[0], m.w) + m.b,
            rnn=rnn(), w=nn.Parameter(torch.randn(8, 2)), b=nn.Parameter(torch.randn(2)),
        ),
        X, {"rnn.l0": 8},
    ),
    "residual": (
        Model(
            lambda m, x: m.out((y := m.into(x)) + m.a(y)[0] + m.b(y)[0]),
            into=nn.Linear(5, 8), a=nn.LSTM(8, 8), b=nn.GRU(8, 8), out=head(),
        ),
        X, {"a.l0 = b.l0": 8},
    ),
    "gated": (
        Model(
            lambda m, x: m.out((y := m.rnn(x)[0]) * torch.sigmoid(m.gate(y))),
            rnn=rnn(), gate=nn.Linear(8, 8), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "both directions added": (
        Model(
            lambda m, x: m.out(m.rnn(x)[0].unflatten(-1, (2, -1)).sum(2)),
            rnn=rnn(bidirectional=True), out=head(),
        ),
        X, {"rnn.l0 = rnn.l0_reverse": 8},
    ),
    "maximum of both directions": (
        Model(
            lambda m, x: m.out(torch.maximum(*m.rnn(x)[0].chunk(2, -1))),
            rnn=rnn(bidirectional=True), out=head(),
        ),
        X, {"rnn.l0 = rnn.l0_reverse": 8},
    ),
    "glu": (
        Model(lambda m, x: m.out(F.glu(m.rnn(x)[0])), rnn=rnn(), out=head(4)), X, {"rnn.l0": 4},
    ),
    "complex product": (
        Model(complex_product, real=nn.LSTM(5, 8), imag=nn.LSTM(5, 8), out=head()), X,
        {"real.l0 = imag.l0": 8},
    ),
    "tied embedding": (
        Model(
            lambda m, x: F.linear(m.rnn(m.embed(x))[0], m.embed.weight),
            embed=nn.Embedding(9, 8), rnn=nn.LSTM(8, 8),
        ),
        TOKENS, {"rnn.l0": 8},
    ),
    "one head for two": (
        Model(lambda m, x: m.out(m.a(x)[0]) + m.out(m.b(x)[0]), a=rnn(), b=rnn(), out=head()), X,
        {"a.l0 = b.l0": 8},
    ),
    "GRU cell in a loop": (
        Model(cell_loop, cell=nn.GRUCell(5, 8), out=head()), X, {"cell": 8},
    ),
    "RNN cell in a loop": (
        Model(cell_loop, cell=nn.RNNCell(5, 8, nonlinearity="relu"), out=head()), X, {"cell": 8},
    ),
    "LSTM cells in a loop": (
        Model(lstm_cell_loop, below=nn.LSTMCell(5, 6), cell=nn.LSTMCell(6, 8), out=head()), X,
        {"below": 6, "cell": 8},
    ),
    "BatchNorm, Conv1d, PReLU, pooling": (
        Model(
            conv, rnn=rnn(), norm=nn.BatchNorm1d(8), conv=nn.Conv1d(8, 4, 3, padding=1),
            act=nn.PReLU(4), out=head(4),
        ),
        X, {"rnn.l0": 8},
    ),
    "depthwise convolution": (
        Model(
            conv, rnn=rnn(), norm=nn.InstanceNorm1d(8, affine=True),
            conv=nn.Conv1d(8, 8, 3, groups=8), act=nn.PReLU(8), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "transposed convolution": (
        Model(
            conv, rnn=rnn(), norm=nn.GroupNorm(8, 8), conv=nn.ConvTranspose1d(8, 3, 2),
            act=nn.PReLU(), out=head(3),
        ),
        X, {"rnn.l0": 8},
    ),
    "padded by masked_scatter": (
        Model(padded_by_mask, rnn=nn.GRU(5, 8), top=nn.LSTM(8, 4), out=head(4)), X,
        {"rnn.l0": 8, "top.l0": 4},
    ),
    "writes into a buffer": (Model(written, rnn=rnn(), out=head()), X, {"rnn.l0": 8}),
    "index_copy": (
        Model(
            lambda m, x: m.out(
                (y := m.rnn(x)[0]).index_copy(0, torch.tensor([1, 3]), y[[0, 2]] * 2)
            ),
            rnn=rnn(), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "padded over time": (
        Model(
            lambda m, x: m.out(F.pad(m.rnn(x)[0], (0, 0, 0, 0, 2, 0))[:-2]), rnn=rnn(), out=head()
        ),
        X, {"rnn.l0": 8},
    ),
    "statistics over time": (
        Model(
            lambda m, x: m.out(torch.cat([
                (y := m.rnn(x)[0]).std(0), y.var(0), y.topk(2, 0)[0].sum(0), y.sort(0)[0][-1],
                y.cumsum(0)[2], y.softmax(0)[1], y.norm(dim=0), y.amax(0),
            ], -1)),
            rnn=rnn(), out=head(64),
        ),
        X, {"rnn.l0": 8},
    ),
    "packed and averaged": (Model(packed, rnn=rnn(), out=head()), X, {"rnn.l0": 8}),
    "normalised": (
        Model(
            lambda m, x: m.out(F.normalize(m.rnn(x)[0], dim=-1)), rnn=rnn(), out=head()
        ),
        X, {"rnn.l0": 8},
    ),
    "states in a Variable": (
        Model(
            lambda m, x: m.out(torch.cat([
                y := m.rnn(x)[0], torch.autograd.Variable(torch.zeros(y.shape)) + y,
            ], -1)),
            rnn=rnn(), out=head(16),
        ),
        X, {"rnn.l0": 8},
    ),
    "a table of positions": (
        Model(
            lambda m, x: m.out(m.positions(m.rnn(x)[0])), rnn=rnn(), positions=Positions(),
            out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "the last layer's state": (
        Model(lambda m, x: m.out(m.rnn(x)[1][-1]), rnn=rnn(num_layers=3), out=head()), X,
        {"rnn.l0": 8, "rnn.l1": 8, "rnn.l2": 8},
    ),
    "a mask expanded, then float": mean_by(lambda mask, y: mask.expand(y.size()).float()),
    "a mask expanded": mean_by(lambda mask, y: mask.float().expand_as(y).clone()),
    "a mask repeated": mean_by(lambda mask, y: mask.float().repeat(1, 1, y.size(2))),
    "a mask tiled": mean_by(lambda mask, y: mask.float().tile(1, 1, y.size(2))),
    "a mask, each repeated": mean_by(lambda mask, y: mask.repeat_interleave(y.size(2), -1)),
    "a mask times ones": mean_by(lambda mask, y: mask.float() * torch.ones_like(y)),
    "attention that is repeated": (
        Model(
            lambda m, x: m.out((
                (y := m.rnn(x)[0]) * m.score(y).softmax(0).repeat(1, 1, y.size(2))
            ).sum(0)),
            rnn=rnn(), score=nn.Linear(8, 1), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
    "zeros beside data, viewed": (
        Model(asks_by_feature, cell=nn.GRUCell(5, 8), ask=nn.Linear(8 + 6, 1), out=head()), X,
        {"cell": 8},
    ),
    "zeros before the steps, which are last": (
        Model(
            lambda m, x: m.out(m.conv(torch.cat(
                [(y := m.rnn(x)[0].permute(1, 2, 0)).new_zeros(3, y.size(1), 2), y], -1
            )).mean(-1)),
            rnn=rnn(), conv=nn.Conv1d(8, 4, 3), out=head(4),
        ),
        X, {"rnn.l0": 8},
    ),
    "dropout of channels": (
        Model(
            lambda m, x: m.out(m.drop2(m.drop3(
                m.drop1(m.rnn(x)[0].transpose(1, 2))[..., None, None]
            )[..., 0])[..., 0].transpose(1, 2)),
            rnn=rnn(), out=head(), drop1=nn.Dropout1d(), drop2=nn.Dropout2d(),
            drop3=nn.Dropout3d(),
        ),
        X, {"rnn.l0": 8},
    ),
    "dropout of features": (
        Model(
            lambda m, x: m.out(torch.feature_dropout(m.drop(m.rnn(x)[0]), 0.5, m.training)),
            rnn=rnn(), out=head(), drop=nn.FeatureAlphaDropout(),
        ),
        X, {"rnn.l0": 8},
    ),
    "weight norm": (
        Model(
            lambda m, x: m.out(m.rnn(x)[0]), rnn=rnn(),
            out=nn.utils.parametrizations.weight_norm(head()),
        ),
        X, {"rnn.l0": 8},
    ),
    "weight norm of all": (
        Model(
            lambda m, x: m.out(m.rnn(x)[0]), rnn=rnn(),
            out=nn.utils.parametrizations.weight_norm(head(), dim=None),
        ),
        X, {"rnn.l0": 8},
    ),
    "one layer after the other": one_after_the_other(""),
    "zeros and one layer after the other": one_after_the_other("zeros too"),
    "one layer after the other, packed": one_after_the_other("packed"),
    "isfinite": (
        Model(
            lambda m, x: m.out(torch.where(torch.isfinite(y := m.rnn(x)[0]), y, 0)),
            rnn=rnn(), out=head(),
        ),
        X, {"rnn.l0": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_lose_units_and_give_the_same_answers(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, expected = MODELS[name]
    groups = shrinks(model, inputs)
    assert expected is None or sizes(groups) == expected
    assert not groups.full_width


def test_a_number_that_is_a_width_changes_with_the_units() -> None:
    model = Hidden(2, 2)
    groups = find_groups(model, X)
    assert [str(width) for width in groups.widths] == ["hidden_size"]
    small, report = shrink(model, groups, ratio=0.5)
    assert small.hidden_size == 4
    assert model.hidden_size == 8
    assert set(report.sizes.values()) == {(8, 4)}


LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "squeezed": lambda h: h.squeeze(0),
    "the first": lambda h: h[0],
    "the last": lambda h: h[-1],
    "selected": lambda h: h.select(0, 0),
    "unbound": lambda h: h.unbind()[0],
    "iterated": lambda h: next(iter(h)),
}


@pytest.mark.parametrize("name", LAST)
def test_the_state_of_one_layer_goes_out_as_it_came_in(name: str) -> None:
    """As h and c of [B, 2, H], which a replay memory stores; or as [B, H]."""

    def both(m: Any, x: Tensor, state: Tensor) -> Any:
        y, (h, c) = m.lstm(x, (state[:, 0].unsqueeze(0), state[:, 1].unsqueeze(0)))
        return m.out(y), torch.stack([LAST[name](h), LAST[name](c)], 1)

    def alone(m: Any, x: Tensor, state: Tensor) -> Any:
        y, h = m.rnn(x, state.unsqueeze(0))
        return m.out(y), LAST[name](h)

    model = Model(both, lstm=nn.LSTM(5, 8), out=head())
    assert not shrinks(model, (X, torch.zeros(3, 2, 8))).full_width
    model = Model(alone, rnn=rnn(), out=head())
    assert not shrinks(model, (X, torch.zeros(3, 8))).full_width


def test_the_state_of_one_layer_of_two_is_an_answer() -> None:
    model = Model(lambda m, x, h: (m.out((r := m.rnn(x, h))[0]), r[1][-1]),
                  rnn=rnn(num_layers=2), out=head())  # fmt: skip
    groups = find_groups(model, (X, torch.zeros(2, 3, 8)))
    assert [*groups.kept_whole] == ["rnn.l1"]


@pytest.mark.parametrize("period", [1, 8, 16, 32])
def test_a_number_that_is_no_width_stays(period: int) -> None:
    """Though it is that of the units, or some times it, in however many places."""
    model = Hidden()
    model.period, model.horizon, model.lags = period, 8, [8, 8, 16, 24, 48]
    groups = shrinks(model)
    assert [str(width) for width in groups.widths] == ["hidden_size"]
    small, _ = shrink(model, groups, ratio=0.5)
    assert (small.hidden_size, small.period, small.horizon) == (4, period, 8)
    assert small.lags == [8, 8, 16, 24, 48]


def test_a_width_that_changed_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Hidden(2, 2).eval()
    small, _ = shrink(model, find_groups(model, X), ratio=0.5)
    save(small, tmp_path / "small.safetensors")
    fresh = load(tmp_path / "small.safetensors", Hidden(2, 2)).eval()
    assert fresh.hidden_size == 4
    assert torch.equal(fresh(X), small(X))


def test_a_width_may_be_in_an_object_that_the_model_holds() -> None:
    config = SimpleNamespace(hidden=8, other=3)
    model = Model(
        lambda m, x: m.out(m.rnn(x)[0].view(-1, m.config.hidden)), config=config, rnn=rnn(),
        out=head(),
    )  # fmt: skip
    groups = shrinks(model)
    assert [str(width) for width in groups.widths] == ["config.hidden"]
    assert config.hidden == 8


def reads_a_config(config: Any) -> Model:
    """Two modules of it hold one config, of which another holds a part."""
    inner = Model(lambda m, y: m.out(y.view(-1, m.config.sizes["hidden"])), out=head())
    inner.config, inner.sizes = config, config.sizes
    return Model(
        lambda m, x: m.inner(m.rnn(x, x.new_zeros(1, x.size(1), m.config.sizes["hidden"]))[0]),
        config=config, rnn=rnn(config.sizes["hidden"]), inner=inner,
    )  # fmt: skip


def test_an_object_that_other_models_hold_too_keeps_its_width() -> None:
    config = SimpleNamespace(sizes={"hidden": 8}, other=[3])
    model, target = reads_a_config(config), reads_a_config(config)
    groups = find_groups(model, X)
    assert [str(width) for width in groups.widths] == ["config.sizes.hidden"]
    for _ in range(2):
        _, groups = shrink_(model, groups, ratio=0.5)
    assert model.config.sizes == {"hidden": 2} and model(X).shape == (18, 2)
    assert model.inner.config is model.config and model.inner.sizes is model.config.sizes
    assert model.config.other is config.other
    assert target.config is config and config.sizes == {"hidden": 8}
    assert target(X).shape == (18, 2)


OUTSIDE: dict[str, tuple[Callable[..., Any], str]] = {
    "layer_norm": (lambda m, y: F.layer_norm(y, y.shape[-1:]), "layer_norm"),
    "BatchNorm of steps": (lambda m, y: m.steps(y.transpose(0, 1)).transpose(0, 1), "batch_norm"),
    "BatchNorm of an image": (lambda m, y: m.image(y[None])[0], "batch_norm"),
    "softmax": (lambda m, y: y.softmax(-1), "softmax"),
    "mean of the units": (lambda m, y: y * y.mean(-1, keepdim=True), "mean"),
    "attention with the root of the width": (
        lambda m, y: F.scaled_dot_product_attention(y, y, y), "scaled_dot_product_attention",
    ),
    "the inputs added": (lambda m, y: y + torch.cat([X, X], -1)[..., :8], "__add__|add"),
    "the inputs flattened and added": (
        lambda m, y: y + X[..., :1].repeat_interleave(8).view(6, 3, 8), "__add__|add",
    ),
    "the inputs repeated, and added": (
        lambda m, y: y + torch.cat([X, X], -1)[:1, :, :8].repeat(6, 1, 1), "__add__|add",
    ),
    "steps of the inputs before its own": (
        lambda m, y: m.again(torch.cat([torch.cat([X, X], -1)[:2, :, :8], y])), "linear",
    ),
    "half of the units": (lambda m, y: torch.cat([y[..., :4], y[..., :4]], -1), "__getitem__"),
    "the root of the width": (lambda m, y: y / math.sqrt(y.size(-1)), "size"),
    "weight norm of columns": (lambda m, y: m.normed(y), "_weight_norm"),
    "weight norm of rows": (lambda m, y: y + m.rows(y), "_weight_norm"),
    "many heads": (lambda m, y: m.attention(y, y, y)[0], "multi_head_attention_forward"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_units_that_are_read_at_once_leave_zeros_for_a_reason(name: str) -> None:
    run, operation = OUTSIDE[name]
    model = Model(
        lambda m, x: m.out(run(m, m.top(m.rnn(x)[0])[0])), rnn=rnn(), top=nn.GRU(8, 8),
        attention=nn.MultiheadAttention(8, 2), steps=nn.BatchNorm1d(6), image=nn.BatchNorm2d(6),
        normed=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8), dim=1),
        rows=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), again=nn.Linear(8, 8),
        out=head(),
    )  # fmt: skip
    groups = shrinks(model)
    assert sizes(groups) == {"rnn.l0": 8, "top.l0": 8}
    assert list(groups.full_width) == ["top"]
    assert any(part in groups.full_width["top"] for part in operation.split("|"))
    assert "of full width outside: top: it reaches" in str(groups)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_of_data_before_those_of_units_keep_these_inside(packed: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([torch.cat([x, x], -1)[..., :8], m.rnn(x)[0]])
        y = pack_padded_sequence(y, torch.full((y.size(1),), len(y))) if packed else y
        y = m.top(y)[0]
        return m.out(pad_packed_sequence(y)[0] if packed else y)

    groups = find_groups(Model(run, rnn=rnn(), top=nn.LSTM(8, 6), out=head(6)), X)
    assert [*groups.full_width] == ["rnn"]
    assert "mixes its units with elements" in groups.full_width["rnn"]


def test_units_that_a_layer_reads_as_its_steps_leave_inside() -> None:
    model = Model(lambda m, x: m.out(m.top(m.rnn(x)[0].permute(1, 2, 0))[0]), rnn=rnn(),
                  top=nn.LSTM(6, 6), out=head(6))  # fmt: skip
    groups = find_groups(model, X)
    assert "its units are not in the last dimension" in groups.full_width["rnn"]


def test_what_has_no_rule_is_an_error_that_names_the_line_or_stays_whole() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(x)
        z, _ = m.top(y, X.sum() * torch.ones(1, 3, 8))  # which is not zero in any place
        return m.out(torch.fft.rfft(z, dim=0).abs())

    model = Model(run, rnn=rnn(), top=nn.GRU(8, 8), out=head())
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert "the output of top.l0 through" in str(error.value)
    assert "fft_rfft (test_rules.py:" in str(error.value)
    groups = shrinks(model, on_unknown="keep")
    assert sizes(groups) == {"rnn.l0": 8}
    assert "no rule says" in groups.kept_whole["top.l0"]


def test_a_model_all_of_whose_units_stay_is_refused_or_kept() -> None:
    model = Model(lambda m, x: m.rnn(x)[0], rnn=rnn())
    with pytest.raises(GroupError, match="expected units that can leave, but all have to stay"):
        find_groups(model, X)
    groups = find_groups(model, X, on_unknown="keep")
    assert groups.families == []
    assert groups.kept_whole == {"rnn.l0": "its outputs are the model's own"}
    groups.zero_units_({})
    small, report = shrink(model, groups)
    assert torch.equal(small(X), model(X))
    assert report.sizes == groups.dead() == {}
    with pytest.raises(ValueError, match="expected groups with units that can leave, got none"):
        GroupLasso(groups)


def test_units_read_by_their_value_are_dead_only_without_biases() -> None:
    model = encoder_decoder(attended(lambda q, k: torch.bmm(q, k.transpose(1, 2))))
    groups = find_groups(model, X)
    assert groups.by_value is not None
    assert bool(groups.by_value.all())
    biases = [weight.name for weight in groups.weights if len(weight.units) == 1]
    assert "encoder.bias_ih_l0" in biases
    with torch.no_grad():
        for weight in groups.weights:
            if weight.name not in biases:
                groups.model.get_parameter(weight.name).zero_()
    assert not any(dead.any() for dead in groups.dead().values())
    GroupLasso(groups).proximal_(1e6)
    assert all(dead.all() for dead in groups.dead().values())


class Standardised(nn.Module):
    """Products of what a batch norm without parameters makes of the units."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.GRU(5, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(16, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)[0].transpose(1, 2)).transpose(1, 2)
        return y @ y.transpose(1, 2)


def test_statistics_that_come_later_are_noticed() -> None:
    """A unit that is zero is not zero once its mean is subtracted."""
    model, x = Standardised(), torch.randn(6, 4, 5)
    groups = find_groups(model, x)
    assert list(groups.full_width) == ["a"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        for _ in range(60):
            model(torch.randn(32, 10, 5) + 0.5)
    groups.zero_units_(halved(groups))
    small, report = shrink(model, groups)
    assert report.sizes["a.l0"] == (16, 8)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_buffer_of_zeros_that_is_filled_later_is_noticed() -> None:
    model = Model(
        lambda m, x: (m.head(m.rnn(x)[0]), m.rnn(x)[0] @ m.table),
        rnn=nn.GRU(5, 12), head=nn.Linear(12, 2),
    )  # fmt: skip
    model.register_buffer("table", torch.zeros(12, 3))
    groups = find_groups(model, X)
    assert list(groups.full_width) == ["rnn"]
    model.table.normal_()
    groups.zero_units_(halved(groups))
    small, _ = shrink(model, groups)
    torch.testing.assert_close(call(small.eval(), X), call(model.eval(), X))


@pytest.mark.parametrize("zeros", [torch.zeros(12), torch.zeros(1).expand(12)])
def test_buffers_of_zeros_along_units_leave_with_them(zeros: Tensor) -> None:
    model = Model(lambda m, x: m.head(m.rnn(x)[0] + m.at), rnn=nn.GRU(5, 12), head=nn.Linear(12, 2))
    model.register_buffer("at", zeros)
    assert not shrinks(model).full_width


# Functions of y [T, B, H] with arguments by other names, and by names in another order.
OTHER_NAMES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean over an axis": lambda m, y: m.head(y.mean(axis=0)),
    "sum over an axis": lambda m, y: m.head(y.sum(axis=0, keepdims=True)),
    "torch.sum": lambda m, y: m.head(torch.sum(axis=0, input=y)),
    "amax": lambda m, y: m.head(torch.amax(y, axis=0, keepdims=True)),
    "maximum": lambda m, y: m.head(torch.max(y, other=torch.zeros(()))),
    "softmax": lambda m, y: m.head(y.softmax(dim=0)),
    "cumsum": lambda m, y: m.head(torch.cumsum(axis=0, input=y)),
    "cat": lambda m, y: m.head(torch.cat(axis=0, tensors=[y, y])),
    "stack": lambda m, y: m.head(torch.stack([y, y], axis=0)),
    "flip": lambda m, y: m.head(torch.flip(dims=(0,), input=y)),
    "matmul": lambda m, y: torch.matmul(other=m.head.weight.T, input=y),
    "add": lambda m, y: m.head(torch.add(x2=y, x1=y)),
    "clone": lambda m, y: m.head(torch.clone(input=y)),
    "numel": lambda m, y: m.head(y) + torch.numel(input=m.head.bias),
    "h_n": lambda m, y: m.head(torch.select(dim=0, index=-1, input=y)),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_arguments_may_have_other_names(name: str) -> None:
    run = OTHER_NAMES[name]
    model = Model(lambda m, x: run(m, m.rnn(x)[0]), rnn=nn.GRU(5, 12), head=nn.Linear(12, 2))
    groups = shrinks(model)
    assert sizes(groups) == {"rnn.l0": 12}
    assert not groups.full_width


def test_on_unknown_is_checked() -> None:
    with pytest.raises(ValueError, match='expected on_unknown "raise" or "keep", got'):
        find_groups(Hidden(), X, on_unknown="drop")


def test_a_stored_state_is_cut_by_the_report() -> None:
    model = Model(
        lambda m, x, h, c: m.out(m.rnn(x, (h, c))[0]), rnn=nn.LSTM(5, 8), out=head()
    )  # fmt: skip
    h, c = torch.randn(2, 1, 3, 8).unbind()
    groups = find_groups(model, (X, h, c))
    small, report = shrink(model, groups, keep={"rnn.l0": [1, 4, 6]})
    cut = report.cut_state((h, c))
    assert all(torch.equal(a, b[..., [1, 4, 6]]) for a, b in zip(cut, (h, c), strict=True))
    torch.testing.assert_close(small(X, *cut), small(X, h, c))
    with pytest.raises(ValueError, match="expected module to be one of 'rnn', got 'lstm'"):
        report.cut_state((h, c), "lstm")
    with pytest.raises(ValueError, match="cut_state: expected h of the widths before"):
        report.cut_state(cut)
