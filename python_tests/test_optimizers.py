# SPDX-License-Identifier: Apache-2.0
"""Training goes on in a model that shrinks: what the optimiser and the lasso hold is cut along."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_list
from torch.optim.swa_utils import AveragedModel

from iss_kernels import ISSLSTM, GroupLasso, Groups, find_groups, shrink, shrink_

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "ISSLSTM": ISSLSTM}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "AMSGrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-2),
}


class Model(nn.Module):
    """Embedding, recurrent layers, head; some of its parameters are of no unit."""

    def __init__(self, kind: str = "LSTM", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, dtype=dtype)
        self.rnn = KINDS[kind](5, 9, 2, bidirectional=True, dtype=dtype)
        self.head = nn.Linear(18, 7, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def tokens(step: int = 0) -> Tensor:
    return torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = tokens(step)
    return nn.functional.cross_entropy(model(x[:-1]).flatten(0, 1), x[1:].flatten())


def train(
    model: nn.Module,
    optimizer: Any,
    steps: range,
    lasso: GroupLasso | None = None,
    after: Callable[[], None] = lambda: None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if lasso is not None:
            lasso.add_gradients_()
        optimizer.step()
        after()


def make(kind: str = "LSTM", dtype: torch.dtype = torch.float64) -> tuple[Model, Groups]:
    torch.manual_seed(0)
    model = Model(kind, dtype)
    return model, find_groups(model, tokens())


def some_units(groups: Groups) -> dict[str, Tensor]:
    """Other counts in each family, scattered."""
    return {
        family.name: torch.arange(family.size) % (i + 2) == 1
        for i, family in enumerate(groups.families)
    }


def assert_equal(small: nn.Module, big: nn.Module, groups: Groups, kept: dict[str, Tensor]) -> None:
    """small has the weights that big, whose groups these are, has without the units not kept."""
    expected = shrink(big, groups, keep=kept)[0].state_dict()
    got = small.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-10)


# -- training goes on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_dead_units_held_at_zero(name: str, kind: str) -> None:
    if kind != "LSTM" and name not in ("momentum", "Adam"):
        pytest.skip("the state does not depend on the cell")
    model, groups = make(kind)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))
    groups.zero_units_(some_units(groups))
    big = copy.deepcopy(model)
    big_groups = find_groups(big, tokens())
    big_optimizer = OPTIMIZERS[name](big.parameters())
    big_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    report, left = shrink_(model, groups, optimizer=optimizer)
    for family, units in some_units(big_groups).items():
        assert torch.equal(report.kept[family], (~units).nonzero().flatten())
    train(model, optimizer, range(5, 10))
    hold = partial(big_groups.zero_units_, some_units(big_groups))
    train(big, big_optimizer, range(5, 10), after=hold)
    assert_equal(model, big, big_groups, report.kept)
    assert optimizer.state.keys() == (set() if name == "SGD" else set(model.parameters()))
    for parameter, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
    assert [f.size for f in left.families] == [after for _, after in report.sizes.values()]


@pytest.mark.parametrize("of", ["units", "parameters", "multiply-adds"])
@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_the_lasso_goes_on(method: str, of: str) -> None:
    """Also its warm-up, and the way to its target, which is a share of the first model."""

    def step(
        model: nn.Module,
        optimizer: Any,
        lasso: GroupLasso,
        number: int,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        steps = range(number, number + 1)
        train(model, optimizer, steps, lasso if method == "gradient" else None, after)
        if method == "proximal":
            lasso.proximal_(0.1)

    def lasso_of(groups: Groups) -> GroupLasso:
        by_name = {family.name: 0.01 * (i + 1) for i, family in enumerate(groups.families)}
        return GroupLasso(groups, by_name, warmup=3, target=0.3, of=of, horizon=20)

    model, groups = make()
    optimizer, lasso = OPTIMIZERS["momentum"](model.parameters()), lasso_of(groups)
    for number in range(5):
        step(model, optimizer, lasso, number)
    groups.zero_units_(some_units(groups))
    big = copy.deepcopy(model)
    big_groups = find_groups(big, tokens())
    big_optimizer, big_lasso = OPTIMIZERS["momentum"](big.parameters()), lasso_of(big_groups)
    big_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    big_lasso.load_state_dict(lasso.state_dict())

    report, left = shrink_(model, groups, optimizer=optimizer, lasso=lasso)
    assert lasso.groups is left
    hold = partial(big_groups.zero_units_, some_units(big_groups))
    for number in range(5, 10):
        step(model, optimizer, lasso, number)
        # Before the norms are taken, which count weights that dead units would have.
        step(big, big_optimizer, big_lasso, number, hold)
    assert_equal(model, big, big_groups, report.kept)
    assert lasso.strength == pytest.approx(big_lasso.strength)
    assert lasso.left == pytest.approx(big_lasso.left)
    again = lasso_of(left)
    again.load_state_dict(lasso.state_dict())
    assert (again.left, again.strength) == (lasso.left, lasso.strength)


def test_the_lasso_goes_on_after_its_target() -> None:
    """Units that went and had to stay, to fill up a size, are still held at zero."""
    model, groups = make()
    lasso = GroupLasso(groups, 1.0, target=0.5, horizon=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(200):
        train(model, optimizer, range(number, number + 1))
        lasso.proximal_(0.1)
        if lasso.reached:
            break
    report, left = shrink_(model, groups, optimizer=optimizer, lasso=lasso, round_to=4)
    dead = {name: int(units.sum()) for name, units in left.dead().items()}
    assert sum(dead.values()) > 0
    assert lasso.left is not None
    assert lasso.left <= 0.5
    train(model, optimizer, range(2))
    lasso.threshold_(0.0)
    assert {name: int(units.sum()) for name, units in left.dead().items()} == dead
    assert all(after % 4 == 0 or after == before for before, after in report.sizes.values())


def test_shrinking_twice_is_shrinking_once() -> None:
    model, groups = make()
    once, once_groups = copy.deepcopy(model), copy.deepcopy(groups)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(2))
    once.load_state_dict(model.state_dict())
    first, left = shrink_(model, groups, keep={"rnn.l0": [1, 3, 5, 7]}, optimizer=optimizer)
    assert left.model is model
    second, left = shrink_(model, left, keep={"rnn.l0": [0, 2], "rnn.l1": [4]}, optimizer=optimizer)
    keep = {"rnn.l0": first.kept["rnn.l0"][second.kept["rnn.l0"]], "rnn.l1": [4]}
    assert keep["rnn.l0"].tolist() == [1, 5]
    whole = {name: units.tolist() for name, units in once_groups.kept.items()}
    kept = {name: units.tolist() for name, units in left.kept.items()}
    assert kept == whole | {"rnn.l0": [1, 5], "rnn.l1": [4]}
    # So a checkpoint loads into the model as it was built.
    fresh, fresh_groups = make()
    _, again = shrink_(fresh, fresh_groups, keep=left.kept)
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(units, left.kept[name]) for name, units in again.kept.items())
    expected, _ = shrink(once, once_groups, keep=keep)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    # What is left is what would be found.
    found = find_groups(model, tokens())
    assert left.families == found.families
    for got, want in zip(left.labelled, found.labelled, strict=True):
        assert got.name == want.name
        assert torch.equal(got.row_units, want.row_units)
    for mine, want in zip(left.weights, found.weights, strict=True):
        assert torch.equal(mine.column_units, want.column_units)
        assert mine.column_units.dtype == torch.int32
    train(model, optimizer, range(2, 4))


# -- optimisers


def test_groups_schedulers_and_scalers_go_on() -> None:
    model, groups = make(dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.rnn.weight_hh_l1, model.embedding.weight], "lr": 0.5, "mine": "a"},
            {"params": model.head.parameters(), "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    step()
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    shrink_(model, groups, ratio=0.5, optimizer=optimizer)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    held = [group["params"] for group in optimizer.param_groups]
    expected = [[model.rnn.weight_hh_l1, model.embedding.weight], [*model.head.parameters()]]
    assert [[id(p) for p in g] for g in held] == [[id(p) for p in g] for g in expected]
    weight = model.rnn.weight_hh_l1.clone()
    step()
    assert not torch.equal(weight, model.rnn.weight_hh_l1)
    assert optimizer.param_groups[0]["lr"] == 0.5 / 4
    # What is saved is that of a small model, and loads into an optimiser of one.
    again = torch.optim.AdamW([{"params": group} for group in held])
    again.load_state_dict(optimizer.state_dict())
    again.step()


def test_several_optimizers_and_those_of_other_models() -> None:
    model, groups = make()
    other = nn.Linear(3, 3, dtype=torch.float64)
    one = torch.optim.SGD([*model.rnn.parameters(), *other.parameters()], 0.1, momentum=0.9)
    two = torch.optim.Adam(model.head.parameters())
    loss_of(model, 0).backward()
    other.weight.sum().backward()
    one.step()
    two.step()
    shrink_(model, groups, ratio=0.5, optimizer=[one, two])
    assert {id(p) for p in one.state} == {id(p) for p in [*model.rnn.parameters(), other.weight]}
    assert {id(p) for p in two.state} == {id(p) for p in model.head.parameters()}
    assert other.weight in set(one.param_groups[0]["params"])


def test_shrink_moves_the_optimizer_to_the_copy() -> None:
    model, groups = make()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(3))
    groups.zero_units_(some_units(groups))
    big = copy.deepcopy(model.state_dict())
    small, report = shrink(model, groups, optimizer=optimizer)
    in_place = copy.deepcopy(model)
    its = OPTIMIZERS["Adam"](in_place.parameters())
    train(small, optimizer, range(3, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, big[name])  # trains no more
    assert {id(p) for p in optimizer.state} == {id(p) for p in small.parameters()}
    assert its.state == {}
    assert sum(after for _, after in report.sizes.values()) < groups.units


class Factored(torch.optim.Optimizer):
    """Keeps a list, whatever it is for."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["factors"] = [torch.zeros(3)]


REFUSALS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "Adafactor": (
        lambda m: torch.optim.Adafactor(m.parameters()),
        ValueError,
        "shrink: expected an optimizer whose state is of its parameter's shape, [7, 5] for "
        "embedding.weight, got Adafactor with row_var of shape [7, 1]",
    ),
    "LBFGS": (
        lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2),
        ValueError,
        "shrink: expected an optimizer whose state is of its parameter's shape, [7, 5] for "
        "embedding.weight, got LBFGS with d of shape [3408]",
    ),
    "list": (
        lambda m: Factored(m.parameters()),
        ValueError,
        "shrink: expected an optimizer whose state is of its parameter's shape, [7, 5] for "
        "embedding.weight, got Factored with factors, a list",
    ),
    "other": (
        lambda m: torch.optim.Adam(copy.deepcopy(m).parameters()),
        ValueError,
        "shrink: expected an optimizer of the model's parameters, got Adam with none of these",
    ),
    "model": (
        lambda m: m,
        TypeError,
        "shrink: expected an optimizer or several of them, got Model",
    ),
}


@pytest.mark.parametrize("function", [shrink, shrink_])
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_optimizers_change_nothing(case: str, function: Any) -> None:
    make_optimizer, kind, message = REFUSALS[case]
    model, groups = make()
    refused = make_optimizer(model)
    fine = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, fine, range(1))
    if case in ("Adafactor", "LBFGS", "list"):
        refused.step(lambda: loss_of(model, 0))
    parameters, state = list(model.parameters()), dict(fine.state)
    with pytest.raises(kind) as error:
        function(model, groups, ratio=0.5, optimizer=[fine, refused])
    assert str(error.value) == message
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [id(p) for p in fine.state] == [id(p) for p in state]
    assert type(model.rnn) is nn.LSTM
    model(tokens())


# -- in place


def test_modules_stay_with_their_hooks() -> None:
    model, groups = make()
    modules, calls = list(model.modules()), []
    expected, _ = shrink(model, groups, ratio=0.5)
    handle = model.rnn.register_forward_hook(lambda *_: calls.append("forward"))
    model.rnn.mine = "attribute"
    shrink_(model, groups, ratio=0.5)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert type(model.rnn) is ISSLSTM
    assert model.rnn.mine == "attribute"
    assert model.head.in_features == model.head.weight.shape[1]
    assert torch.equal(model(tokens()), expected(tokens()))
    assert calls == ["forward"]
    handle.remove()
    model(tokens())
    assert calls == ["forward"]


def test_gradients_hooks_and_attributes_of_parameters_come_along() -> None:
    model, groups = make()
    weight, seen = model.rnn.weight_hh_l0, []
    handle = weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    weight.mine = "attribute"
    loss = loss_of(model, 0)
    loss.backward()
    reference, gradients = copy.deepcopy(model), [p.grad for p in model.parameters()]
    for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
        parameter.data = gradient.clone()
    report, _ = shrink_(model, groups, ratio=0.5)
    small, _ = shrink(reference, groups, keep=report.kept)
    for parameter, gradient in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(parameter.grad, gradient)
    seen.clear()
    loss_of(model, 1).backward()  # while the former graph is alive
    new = model.rnn.weight_hh_l0
    assert seen == [tuple(new.shape), id(new)]
    assert tuple(new.shape) == (4 * report.sizes["rnn.l0"][1], report.sizes["rnn.l0"][1])
    assert new.mine == "attribute"
    handle.remove()
    loss_of(model, 1).backward()
    assert len(seen) == 3
    assert loss.isfinite()


def test_what_loses_nothing_stays() -> None:
    model, groups = make()
    before = dict(model.named_parameters())
    shrink_(model, groups, keep={"rnn.l1": [1]})
    changed = {name for name, p in model.named_parameters() if p is not before[name]}
    assert changed == {n for n in before if n.endswith("_l1") or n == "head.weight"}


def test_tied_and_listed_parameters_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 6)
            self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)
            self.two.weight = self.one.weight
            self.kept = {"weights": [self.one.weight]}

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(x)
            return self.one(y) + self.two(y)

    model = Tied()
    groups = find_groups(model, torch.randn(3, 2, 5))
    shrink_(model, groups, ratio=0.5)
    assert model.one.weight is model.two.weight is model.kept["weights"][0]
    assert model.one.weight.shape == (3, 3)
    weight = model.one.weight
    for held, kind in (((weight,), "tuple"), (lambda x: x @ weight.t(), "function")):
        model.held = held  # type: ignore[assignment]
        groups = find_groups(model, torch.randn(3, 2, 5))
        with pytest.raises(ValueError) as error:
            shrink_(model, groups, ratio=0.5)
        assert str(error.value) == (
            "shrink_: expected a model with its parameters in modules, lists and dicts, got one of "
            f"shape [3, 3] in a {kind}"
        )
        assert model.one.weight.shape == (3, 3)


def test_a_model_that_holds_its_optimizer() -> None:
    model, groups = make()
    model.optimizer = torch.optim.Adam(model.parameters())
    train(model, model.optimizer, range(1))
    with pytest.raises(ValueError, match="in a defaultdict as a key"):
        shrink_(model, groups, ratio=0.5)
    shrink_(model, groups, ratio=0.5, optimizer=model.optimizer)
    assert {id(p) for p in model.optimizer.state} == {id(p) for p in model.parameters()}
    train(model, model.optimizer, range(1, 2))


def test_a_moving_average_shrinks_with_the_former_groups() -> None:
    model, groups = make()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, range(2))
    average.update_parameters(model)
    report, _ = shrink_(model, groups, ratio=0.5, optimizer=optimizer)
    shrink_(average.module, groups, keep=report.kept)
    average.update_parameters(model)
    assert average.module.rnn.weight_hh_l0.shape == model.rnn.weight_hh_l0.shape
    average(tokens())


def test_the_model_itself_may_be_recurrent() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 9, 2)
    groups = find_groups(lstm, torch.randn(3, 2, 5))
    expected, _ = shrink(lstm, groups, ratio=0.5)
    shrink_(lstm, groups, ratio=0.5)
    x = torch.randn(3, 2, 5)
    assert type(lstm) is ISSLSTM
    assert torch.equal(lstm(x)[0], expected(x)[0])


def test_another_lasso_is_refused() -> None:
    model, groups = make()
    other = nn.LSTM(5, 9, 2)
    lasso = GroupLasso(find_groups(other, torch.randn(3, 2, 5)))
    alike, its = make()  # with families of the same names and sizes
    expected = "expected the lasso of these groups and this model, got"
    for one, got in {
        lasso: "that of others",
        GroupLasso(its): "that of others",
        3: "a int",
    }.items():
        with pytest.raises(ValueError, match=f"{expected} {got}"):
            shrink_(model, groups, ratio=0.5, lasso=one)  # type: ignore[arg-type]
    assert type(model.rnn) is nn.LSTM
    with pytest.raises(TypeError, match="expected keep to be {family name: units that stay}, got"):
        shrink_(model, groups, keep=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected the groups of find_groups, got NoneType"):
        shrink_(model, None)  # type: ignore[arg-type]


class Wrapper(torch.optim.Optimizer):
    """Steps by another optimiser, with whose groups and state it goes or not."""

    def __init__(self, inner: torch.optim.Optimizer, shares: bool) -> None:
        self.inner, self.defaults = inner, {}
        self.param_groups = inner.param_groups
        self.state = inner.state if shares else defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_a_wrapper_whose_inner_optimiser_has_its_own_state_is_refused() -> None:
    """The inner one would go on with the parameters that were."""
    model, groups = make()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="inside of Wrapper too, which has a state of its own"):
        shrink_(model, groups, ratio=0.5, optimizer=Wrapper(adam, False))
    assert type(model.rnn) is nn.LSTM
    for optimizer in (Wrapper(adam, True), [Wrapper(adam, False), adam], [adam, adam],
        [Wrapper(adam, True), adam],
    ):  # fmt: skip
        model, groups = make()
        adam.param_groups[0]["params"][:] = model.parameters()
        adam.state.clear()
        train(model, adam, range(1))
        shrink_(model, groups, ratio=0.5, optimizer=optimizer)
        assert set(adam.param_groups[0]["params"]) == set(model.parameters())


def test_a_list_that_takes_no_other_parameter_is_refused() -> None:
    model, groups = make()
    model.held = immutable_list([*model.rnn.parameters()])
    optimizer = torch.optim.Adam(model.parameters())
    before = list(model.parameters())
    with pytest.raises(ValueError, match="in a immutable_list that takes no other"):
        shrink_(model, groups, ratio=0.5, optimizer=optimizer)
    assert [*map(id, model.parameters())] == [*map(id, before)]
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, before)]


@pytest.mark.parametrize("function", [shrink, shrink_])
def test_a_subclass_whose_forward_would_be_lost_is_refused(function: Any) -> None:
    class Doubled(ISSLSTM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, state = super().forward(*args, **kwargs)
            return 2 * y, state

    plain, groups = make("ISSLSTM")
    model = copy.deepcopy(plain)
    model.rnn = Doubled(5, 9, 2, bidirectional=True, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        function(model, groups, ratio=0.5)
    assert str(error.value) == (
        "shrink: expected rnn to be an nn.LSTM or ISSLSTM itself, got a Doubled, whose own methods "
        "would be lost"
    )


def test_a_state_of_the_first_width_is_cut() -> None:
    model, groups = make()
    whole, x = copy.deepcopy(model), torch.randn(3, 2, 5, dtype=torch.float64)
    first, left = shrink_(model, groups, ratio=0.3)
    second, _ = shrink_(model, left, keep={"rnn.l1": [1, 2, 4]})
    keep = {name: units[second.kept[name]] for name, units in first.kept.items()}
    once, _ = shrink(whole, find_groups(whole, tokens()), keep=keep)
    state = torch.randn(4, 2, 9).double(), torch.randn(4, 2, 9).double()
    assert torch.equal(model.rnn(x, state)[0], once.rnn(x, state)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_goes_on_after_a_shrink_in_evaluation(mode: Any) -> None:
    model, groups = make()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(2))
    with mode():
        _, groups = shrink_(model, groups, ratio=0.3, optimizer=optimizer)
    train(model, optimizer, range(2))
    with mode():
        small, _ = shrink(model, groups, ratio=0.3, optimizer=optimizer)
    train(small, optimizer, range(2))
