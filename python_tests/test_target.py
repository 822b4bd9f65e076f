# SPDX-License-Identifier: Apache-2.0
"""A group Lasso with a target leaves that much of the model, wherever its strength starts."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iss_kernels import GroupLasso, Groups, find_groups, shrink
from iss_kernels.lstm import ISSLSTM
from iss_kernels.target import Target

# nn.LSTM says this itself, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, SYMBOLS, DELAY = 12, 8, 5, 3


class Echo(nn.Module):
    """Says the symbol of DELAY steps ago."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = ISSLSTM(SYMBOLS, 16, num_layers=2, **options)
        self.head = nn.Linear(16, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    symbols = torch.randint(SYMBOLS, (T + DELAY, B), generator=generator)
    return nn.functional.one_hot(symbols[DELAY:], SYMBOLS).float(), symbols[:T]


OPTIMISERS = {
    "SGD": (torch.optim.SGD, {"lr": 1.0}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 5e-3}),
}


class Run:
    """A model in training."""

    def __init__(self, optimiser: str, method: str, strength: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.method = Echo(), method
        self.groups = find_groups(self.model, batch(0)[0])
        self.lasso = GroupLasso(self.groups, strength, **options)
        make, settings = OPTIMISERS[optimiser]
        self.optimiser, self.rate = make(self.model.parameters(), **settings), settings["lr"]
        self.done = 0

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            x, symbols = batch(self.done)
            self.optimiser.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), symbols.flatten())
            loss.backward()
            if self.method == "gradient":
                self.lasso.add_gradients_()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            if self.method == "gradient":
                self.lasso.threshold_(0)
            else:
                self.lasso.proximal_(self.rate)
            self.done += 1

    def left(self, of: str) -> float:
        """What `shrink` leaves, counted in its model."""
        small, report = shrink(self.model, self.groups)
        if of == "units":
            return sum(a for _, a in report.sizes.values()) / self.groups.units
        names = {weight.name for weight in self.groups.weights}
        after, before = (
            sum(
                p.numel()
                for n, p in model.named_parameters()
                if n in names or (of == "parameters" and n.startswith("rnn.bias"))
            )
            for model in (small, self.model)
        )
        return after / before


@pytest.mark.parametrize(
    ("target", "of"), [(0.3, "units"), (0.5, "parameters"), (0.7, "multiply-adds")]
)
@pytest.mark.parametrize("strength", [1e-5, 1e-1])
@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_lands_on_the_target(
    optimiser: str, method: str, strength: float, target: float, of: str
) -> None:
    run = Run(optimiser, method, strength, target=target, of=of, horizon=80, warmup=10)
    assert run.lasso.left == 1 and not run.lasso.reached
    run.go_on(160)
    assert run.lasso.reached
    assert run.left(of) == pytest.approx(run.lasso.left, abs=1e-12)
    assert target - 0.06 < run.left(of) <= target  # a unit of 32 holds up to 6 % of a parameter


def test_what_went_stays_and_the_rest_heals() -> None:
    run = Run("Adam", "gradient", 1e-2, target=0.5, horizon=100)
    while not run.lasso.reached:
        run.go_on(1)
    dead, norms = run.groups.dead(), run.lasso.norms()
    assert sum(int(mask.sum()) for mask in dead.values()) == 16
    assert run.lasso.strength == {"rnn.l0": 0.0, "rnn.l1": 0.0}
    assert run.lasso.add_gradients_() == 0
    run.go_on(30)
    for name, after in run.lasso.norms().items():
        assert torch.equal(run.groups.dead()[name], dead[name])
        assert after[~dead[name]].mean() > norms[name][~dead[name]].mean()


def test_families_keep_their_proportions() -> None:
    run = Run("Adam", "gradient", {"rnn.l0": 1e-2, "rnn.l1": 3e-2}, target=0.5, horizon=100)
    factors = set()
    for _ in range(20):
        run.go_on(1)
        strength = run.lasso.strength
        assert strength["rnn.l1"] == pytest.approx(3 * strength["rnn.l0"])
        factors.add(strength["rnn.l0"] / 1e-2)
    assert len(factors) == 20


@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_units_go_by_their_norms_as_multiples_of_their_strengths(strength: float) -> None:
    groups = Run("SGD", "proximal", 1.0).groups
    torch.manual_seed(0)
    norms, strengths = 1 + torch.rand(32).double(), torch.ones(32).double()
    strengths[16:] = strength
    target = Target(groups, strengths, 0.75, "units", horizon=10, gone=0.3, eps=1e-8)
    target.factor(norms, 0)
    assert target.out is None
    target.factor(norms * 0.2, 1)
    assert target.out is not None and target.left == 0.75
    assert target.out.tolist() == (norms / strengths).argsort()[:8].tolist()


def test_families_without_a_strength_keep_their_units() -> None:
    run = Run("SGD", "proximal", {"rnn.l0": 0.0, "rnn.l1": 1e-2}, target=0.6, horizon=100)
    run.go_on(200)
    dead = run.groups.dead()
    assert run.lasso.reached and not dead["rnn.l0"].any()
    assert run.left("units") == pytest.approx(19 / 32)  # 0.6 of 32 is 19.2


def test_the_strength_rises_linearly_in_the_warm_up() -> None:
    run = Run("SGD", "gradient", {"rnn.l0": 1e-3, "rnn.l1": 0.0}, warmup=4)
    seen = [run.lasso.strength["rnn.l0"]]
    for _ in range(6):
        run.go_on(1)
        seen.append(run.lasso.strength["rnn.l0"])
    assert seen == pytest.approx([0, 0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    norms = run.lasso.norms()["rnn.l0"]
    torch.testing.assert_close(run.lasso(), 1e-3 * norms.sum())
    torch.testing.assert_close(run.lasso.add_gradients_(), 1e-3 * norms.sum())


def test_where_nothing_fades_the_strength_stays_finite() -> None:
    run = Run("Adam", "gradient", 1.0, target=0.5, horizon=5)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    run.go_on(100)
    assert not run.lasso.reached and run.lasso.left == 1
    assert run.lasso.strength["rnn.l0"] == pytest.approx(math.exp(30))
    assert all(p.grad.isfinite().all() for p in run.model.parameters())


# -- what is counted -------------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads the outputs, or the final states: then all families keep a common size."""

    def __init__(self, states: bool, one_bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn, self.states = nn.LSTM(3, 6, num_layers=2, **options), states
        if one_bias:
            self.rnn.bias_hh_l0 = self.rnn.bias_ih_l0
        width = (options.get("proj_size") or 6) * (1 + bool(options.get("bidirectional")))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, (h_n, _) = self.rnn(x)
        return self.head(h_n.transpose(0, 1)[:, -1] if self.states else y)


class Normed(nn.Module):
    """Reads its units by value, so that their biases are among the weights of the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm, self.head = nn.GRU(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.rnn(x)[0]))
        return y


def test_biases_are_no_multiply_adds() -> None:
    groups = find_groups(Normed(), torch.randn(4, 2, 3))
    assert any(len(weight.units) == 1 for weight in groups.weights)
    matrices = [weight for weight in groups.weights if len(weight.units) > 1]
    groups.zero_units_({"rnn.l0": torch.arange(6) < 2})
    lasso = GroupLasso(groups, target=0.2, of="multiply-adds", horizon=1)
    lasso.add_gradients_()
    left = sum(
        int(((weight.row_units < 0) | (weight.row_units >= 2)).sum())
        * int(((weight.column_units < 0) | (weight.column_units >= 2)).sum())
        for weight in matrices
    )
    whole = sum(len(weight.row_units) * len(weight.column_units) for weight in matrices)
    assert lasso.left == pytest.approx(left / whole)


@pytest.mark.parametrize("of", ["units", "parameters", "multiply-adds"])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"bidirectional": True}, {"proj_size": 4}, {"states": True},
    {"one_bias": True},
], ids=str)  # fmt: skip
def test_left_is_what_shrink_leaves(options: dict[str, Any], of: str) -> None:
    torch.manual_seed(0)
    model = Reader(**({"states": False} | options))
    groups = find_groups(model, torch.randn(4, 2, 3))
    assert bool(groups.tied) == bool(options.get("states"))
    run = Run.__new__(Run)  # for its count of what shrink leaves
    run.model, run.groups = model, groups
    for dead in ((0, 0), (1, 0), (3, 1), (6, 1)):  # of each second family; 6: one of them stays
        groups.zero_units_(
            {f.name: torch.arange(f.size) < dead[i % 2] for i, f in enumerate(groups.families)}
        )
        target = 0.21 if of == "units" else 0.1  # less than what is left here
        lasso = GroupLasso(groups, target=target, of=of, horizon=1)
        lasso.proximal_(0.0)
        assert not lasso.reached
        assert lasso.left == pytest.approx(run.left(of), abs=1e-12)


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize("at", [7, 60, 140])  # in the warm-up, on the way, and when reached
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(method: str, at: int) -> None:
    options: dict[str, Any] = {"target": 0.5, "horizon": 100, "warmup": 10}
    whole = Run("Adam", method, 1e-3, **options)
    whole.go_on(at)
    stopped = io.BytesIO()
    parts = [part.state_dict() for part in (whole.model, whole.optimiser, whole.lasso)]
    torch.save(parts, stopped)
    whole.go_on(30)
    resumed = Run("Adam", method, 1e-3, **options)
    stopped.seek(0)
    for part, state in zip(
        (resumed.model, resumed.optimiser, resumed.lasso),
        torch.load(stopped, weights_only=True),
        strict=True,
    ):
        part.load_state_dict(state)
    assert resumed.lasso.reached == (at == 140)
    resumed.done = at
    resumed.go_on(30)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.lasso.strength == whole.lasso.strength and resumed.lasso.left == whole.lasso.left


def test_a_state_is_a_copy() -> None:
    run = Run("Adam", "proximal", 1e-3, target=0.5, horizon=20)
    run.go_on(3)
    state = run.lasso.state_dict()
    kept = copy.deepcopy(state)
    run.go_on(40)
    assert state == kept


def test_a_state_of_something_else_is_refused() -> None:
    groups = Run("SGD", "gradient", 1e-3).groups
    wide = GroupLasso(find_groups(Reader(False), torch.randn(4, 2, 3)))
    lasso, targeted = GroupLasso(groups), GroupLasso(groups, target=0.5, horizon=10)
    for of, to, message in (
        (wide, lasso, "families rnn.l0 [16], rnn.l1 [16], got rnn.l0 [6], rnn.l1 [6]"),
        (targeted, lasso, "a lasso with no target, got one with a target"),
        (lasso, targeted, "a lasso with a target, got one with no target"),
    ):
        with pytest.raises(ValueError) as error:
            to.load_state_dict(of.state_dict())
        assert str(error.value) == f"GroupLasso: expected the state of {message}"


# -- errors ----------------------------------------------------------------------------------------

TARGET = {"target": 0.5, "horizon": 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "expected warmup >= 0, got -1"),
        ({"horizon": 10}, "expected target with horizon, got None"),
        ({"target": 0.5}, "expected horizon >= 1 with target, got None"),
        (TARGET | {"horizon": 0}, "expected horizon >= 1 with target, got 0"),
        (TARGET | {"horizon": 2.5}, "expected horizon to be an int, got 2.5"),
        (TARGET | {"horizon": math.nan}, "expected horizon to be an int, got nan"),
        (TARGET | {"gone": math.nan}, "expected gone between 0 and 1, got nan"),
        (TARGET | {"target": 0.0}, "expected target between 0 and 1, got 0.0"),
        (TARGET | {"target": 1.0}, "expected target between 0 and 1, got 1.0"),
        (TARGET | {"target": math.nan}, "expected target between 0 and 1, got nan"),
        (TARGET | {"of": "flops"},
         "expected of to be one of units, parameters, multiply-adds, got flops"),
        (TARGET | {"gone": 0.0}, "expected gone between 0 and 1, got 0.0"),
        (TARGET | {"gone": 1.5}, "expected gone between 0 and 1, got 1.5"),
        (TARGET | {"target": 0.01},
         "expected target >= 0.0625, the units left with one unit in every family that has a "
         "strength, got 0.01"),
        (TARGET | {"strength": {"rnn.l0": 0.0, "rnn.l1": 1.0}},
         "expected target >= 0.5312, the units left with one unit in every family that has a "
         "strength, got 0.5"),
        (TARGET | {"strength": 0.0},
         "expected target >= 1.0000, the units left with one unit in every family that has a "
         "strength, got 0.5"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    groups: Groups = find_groups(Echo(), batch(0)[0])
    with pytest.raises(ValueError) as error:
        GroupLasso(groups, **options)
    assert str(error.value) == f"GroupLasso: {message}"


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_units_that_went_are_zero_in_weights_that_do_not_train(method: str) -> None:
    """Else the target would be reached and no unit be dead."""
    run = Run("SGD", method, 1e-2, target=0.5, horizon=50)
    run.model.head.requires_grad_(False)
    with torch.no_grad():
        run.model.head.weight.mul_(0.1)
    while not run.lasso.reached and run.done < 400:
        run.go_on(10)
    assert run.lasso.reached
    run.go_on(1)
    assert run.left("units") == run.lasso.left


def test_a_step_whose_norms_are_not_finite_leaves_the_strength_alone() -> None:
    run = Run("SGD", "gradient", 1e-3, target=0.5, horizon=50)
    run.go_on(2)
    weight = run.groups.parameters()[0].data
    before = weight.clone()
    weight.fill_(math.inf)
    run.lasso.add_gradients_()
    weight.copy_(before)
    run.go_on(2)
    assert all(0 < strength < math.inf for strength in run.lasso.strength.values())
    assert all(bool(parameter.isfinite().all()) for parameter in run.groups.parameters())
