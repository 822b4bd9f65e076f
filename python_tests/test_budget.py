# SPDX-License-Identifier: Apache-2.0
"""shrink(budget=...): as many units leave as it takes, of all families together, and no more."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iss_kernels import GroupLasso, Groups, budget, find_groups, shrink, shrink_


class Model(nn.Module):
    """Families of three kinds; those of the GRU are tied: the code takes h_n as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 24)
        self.gru = nn.GRU(24, 12, bidirectional=True)
        self.rnn = nn.RNN(24, 8)
        self.head = nn.Linear(8 + 24, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        y, h_n = self.gru(self.lstm(self.embedding(tokens))[0])
        return self.head(torch.cat([self.rnn(y)[0][-1], h_n.transpose(0, 1).flatten(1)], -1))


TOKENS = torch.arange(12).view(4, 3) % 11


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def groups(model: Model) -> Groups:
    return find_groups(model, TOKENS)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, groups: Groups) -> int:
    return sum(model.get_parameter(weight.name).numel() for weight in groups.weights)


def grown(report: Any, groups: Groups, model: nn.Module) -> list[nn.Module]:
    """The models with one unit more in one family, or in each of those that are tied."""
    blocks = groups.tied + [[f.name] for f in groups.families if f.name not in sum(groups.tied, [])]
    models = []
    for names in blocks:
        keep = dict(report.kept)
        for name in names:
            size = report.sizes[name][0]
            others = [unit for unit in range(size) if unit not in keep[name].tolist()]
            keep[name] = [*keep[name].tolist(), *others[:1]]
        models.append(shrink(model, groups, keep=keep)[0])
    return [m for m in models if parameters(m) > report.parameters[1]]


# -- what is left


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_parameters_are_within_the_budget_and_near_it(
    model: Model, groups: Groups, share: float
) -> None:
    limit = int(share * parameters(model))
    small, report = shrink(model, groups, budget={"parameters": limit})
    assert parameters(small) == report.parameters[1] <= limit
    assert any(parameters(larger) > limit for larger in grown(report, groups, model))
    small(TOKENS)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_multiply_adds_are_within_the_budget_and_near_it(
    model: Model, groups: Groups, share: float
) -> None:
    limit = share * multiply_adds(model, groups)
    small, report = shrink(model, groups, budget={"multiply-adds": limit})
    assert multiply_adds(small, groups) <= limit
    assert any(multiply_adds(larger, groups) > limit for larger in grown(report, groups, model))


def test_units_leave_in_the_order_of_squares_over_elements(model: Model, groups: Groups) -> None:
    """Recomputed from single removals, for the families that are not tied."""
    norms, scores = GroupLasso(groups).norms(), {}
    for name in ("lstm.l0", "rnn.l0"):
        size = len(norms[name])
        for unit in range(size):
            others = [u for u in range(size) if u != unit]
            alone, _ = shrink(model, groups, keep={name: others})
            cost = parameters(model) - parameters(alone)
            scores[name, unit] = float(norms[name][unit]) ** 2 / cost
    _, report = shrink(model, groups, budget={"parameters": parameters(model) * 2 // 3})
    stay = {(name, unit) for name, units in report.kept.items() for unit in units.tolist()}
    gone = scores.keys() - stay
    assert 3 < len(gone) < len(scores) - 3
    assert max(scores[key] for key in gone) < min(scores[key] for key in scores.keys() & stay)


def test_units_of_a_family_that_cost_more_leave_no_sooner(model: Model, groups: Groups) -> None:
    """Same mean square everywhere: families lose about the same share, whatever their kind."""
    with torch.no_grad():
        for weight in groups.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(0))
    _, report = shrink(model, groups, budget={"parameters": parameters(model) // 2})
    assert all(after < before for before, after in report.sizes.values())


def test_dead_units_leave_first_and_in_any_case(model: Model, groups: Groups) -> None:
    dead = groups.by_family(torch.arange(groups.units) % 3 == 0)
    with torch.no_grad():  # their outgoing weights alone: their norms are large
        for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
            out = torch.cat([*dead.values(), torch.zeros(1, dtype=torch.bool)])
            parameter[:, out[weight.column_units.long()]] = 0
            parameter[out[weight.row_units.long()]] *= 10
    expected, plain = shrink(model, groups)
    assert all(after < before for before, after in plain.sizes.values())
    small, report = shrink(model, groups, budget={"parameters": 10**9})
    assert {n: k.tolist() for n, k in report.kept.items()} == {
        n: k.tolist() for n, k in plain.kept.items()
    }
    assert torch.equal(small(TOKENS), expected(TOKENS))
    _, report = shrink(model, groups, budget={"parameters": parameters(expected) - 1})
    assert all(
        set(units.tolist()) <= set(plain.kept[name].tolist()) for name, units in report.kept.items()
    )


@pytest.mark.parametrize("round_to", [1, 4, 5, 100])
def test_sizes_are_rounded_and_tied_families_alike(
    model: Model, groups: Groups, round_to: int
) -> None:
    assert groups.tied == [["gru.l0", "gru.l0_reverse"]]
    limit = parameters(model) if round_to == 100 else parameters(model) // 2
    small, report = shrink(model, groups, budget={"parameters": limit}, round_to=round_to)
    assert parameters(small) <= limit
    for before, after in report.sizes.values():
        assert after % round_to == 0 or after == before
    assert report.sizes["gru.l0"] == report.sizes["gru.l0_reverse"]
    small(TOKENS)


def test_all_parts_of_a_budget_hold(model: Model, groups: Groups) -> None:
    few = {"parameters": parameters(model) // 2, "multiply-adds": multiply_adds(model, groups)}
    small, _ = shrink(model, groups, budget=few)
    assert parameters(small) <= few["parameters"]
    few = {"multiply-adds": multiply_adds(model, groups) // 3, "parameters": parameters(model)}
    small, _ = shrink(model, groups, budget=few)
    assert multiply_adds(small, groups) <= few["multiply-adds"]


def test_the_smallest_sizes_are_one_unit_each(model: Model, groups: Groups) -> None:
    smallest, _ = shrink(model, groups, ratio=1.0)
    small, report = shrink(model, groups, budget={"parameters": parameters(smallest)})
    assert [after for _, after in report.sizes.values()] == [1, 1, 1, 1]
    assert parameters(small) == parameters(smallest)


def test_a_shared_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.one, self.two = nn.LSTM(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(x)
            return self.one(y) + self.two(y)

    model = Tied()
    groups = find_groups(model, torch.randn(3, 2, 5))
    limit = parameters(shrink(model, groups, keep={"rnn.l0": [0, 1]})[0])
    small, _ = shrink(model, groups, budget={"parameters": limit})
    assert parameters(small) == limit


def test_shrink_in_place_takes_a_budget(model: Model, groups: Groups) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    expected, _ = shrink(copy.deepcopy(model), groups, budget={"parameters": 3000})
    shrink_(model, groups, budget={"parameters": 3000}, optimizer=optimizer)
    torch.testing.assert_close(model(TOKENS), expected(TOKENS))


# -- time


def test_time_is_met_with_few_timings(
    model: Model, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where a multiply-add takes a microsecond."""
    timed: list[int] = []

    def milliseconds(small: nn.Module, example: Any) -> float:
        assert example is TOKENS
        timed.append(multiply_adds(small, groups))
        return timed[-1] / 1000

    monkeypatch.setattr(budget, "_milliseconds", milliseconds)
    whole = multiply_adds(model, groups)
    small, _ = shrink(model, groups, budget={"ms": whole / 2000}, example=TOKENS)
    assert 0.45 * whole < multiply_adds(small, groups) <= 0.5 * whole
    assert len(timed) < 10
    timed.clear()
    shrink(model, groups, budget={"ms": whole / 1000}, example=TOKENS)
    assert timed == [whole]


@pytest.mark.parametrize("example", [TOKENS, (TOKENS,), {"tokens": TOKENS}], ids=type)
def test_time_is_measured(
    model: Model, groups: Groups, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_SECONDS", 0.01)
    threads, training = torch.get_num_threads(), model.training
    _, report = shrink(model, groups, budget={"ms": 1e4}, example=example)
    assert report.parameters[0] == report.parameters[1]
    with pytest.raises(ValueError, match=r"expected a budget of at least 0\.\d+ ms, which the"):
        shrink(model, groups, budget={"ms": 1e-6}, example=example)
    assert (torch.get_num_threads(), model.training) == (threads, training)


# -- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": {"flops": 3}}, "expected budget to be a dict with parameters or multiply-adds "
         "or ms, got 'flops'"),
        ({"budget": {}}, "expected budget to be a dict with parameters or multiply-adds or ms, "
         "got {}"),
        ({"budget": 5}, "expected budget to be a dict with parameters or multiply-adds or ms, "
         "got 5"),
        ({"budget": {"parameters": 0}}, "expected a budget in parameters above 0, got 0"),
        ({"budget": {"ms": float("nan")}}, "expected a budget in ms above 0, got nan"),
        ({"budget": {"ms": "2"}}, "expected a budget in ms above 0, got '2'"),
        ({"budget": {"ms": 2.0}}, "expected example with a budget in ms, got none"),
        ({"budget": {"parameters": 9}, "ratio": 0.5}, "expected keep, ratio or budget, got ratio "
         "and budget"),
        ({"budget": {"parameters": 10}}, "expected a budget of at least 144 parameters, which the "
         "smallest sizes take, got 10"),
        ({"budget": {"multiply-adds": 3.5}, "round_to": 4}, "expected a budget of at least 468 "
         "multiply-adds, which the smallest sizes take, got 3.5"),
    ],
)  # fmt: skip
def test_errors(model: Model, groups: Groups, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        shrink(model, groups, **arguments)
    assert str(error.value) == f"shrink: {message}"
