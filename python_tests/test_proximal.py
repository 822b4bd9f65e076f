# SPDX-License-Identifier: Apache-2.0
"""The proximal step against the exact proximal operator of the penalty, solved in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups
from iss_kernels.shrink import shrink_

STRENGTH = 0.3


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, num_layers=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def built() -> Groups:
    torch.manual_seed(0)
    return find_groups(Tagger().double(), torch.randn(4, 2, 5, dtype=torch.float64))


def values(groups: Groups) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in groups.parameters()]


def exact(groups: Groups, step: float) -> list[Tensor]:
    """argmin over X of |X - W|^2 / 2 + step * STRENGTH * sum of the groups' norms.

    Ascent of the dual, a group at a time: X = W - sum of Z_u, each Z_u of norm <= step * STRENGTH
    and zero outside its group. Given the others, the best Z_u is what is left of W in the group,
    projected onto that ball (Jenatton et al. 2011, which is Dykstra's algorithm here).
    """
    masks = [
        [
            (weight.row_units == unit)[:, None] | (weight.column_units == unit)[None, :]
            for weight in groups.weights
        ]
        for unit in range(groups.units)
    ]
    x = values(groups)
    taken = [[torch.zeros_like(w) for w in x] for _ in masks]
    for _ in range(1000):
        change = 0.0
        for unit, mask in enumerate(masks):
            left = [(w + z) * m for w, z, m in zip(x, taken[unit], mask, strict=True)]
            norm = float(torch.stack([part.square().sum() for part in left]).sum().sqrt())
            share = min(1.0, step * STRENGTH / norm) if norm > 0 else 0.0
            new = [share * part for part in left]
            for w, z, z_new in zip(x, taken[unit], new, strict=True):
                w += z - z_new
                change = max(change, float((z - z_new).abs().max()))
            taken[unit] = new
        if change < 1e-14:
            return x
    raise AssertionError(f"the exact operator did not converge: {change}")


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def proximal(step: float, groups: Groups) -> list[Tensor]:
    GroupLasso(groups, STRENGTH, eps=1e-30).proximal_(step)
    return values(groups)


def test_it_is_the_exact_operator_to_first_order_in_step() -> None:
    """The difference shrinks fourfold as the step halves, the step itself twofold."""
    differences, moves = [], []
    for step in (0.2, 0.1, 0.05, 0.025):
        before, truth = values(built()), exact(built(), step)
        differences.append(distance(proximal(step, built()), truth))
        moves.append(distance(before, truth))
    ratios = [a / b for a, b in zip(differences, differences[1:], strict=False)]
    assert all(3.5 < ratio < 4.5 for ratio in ratios), ratios
    assert all(b < a < 2.5 * b for a, b in zip(moves, moves[1:], strict=False))
    assert differences[-1] < 0.01 * moves[-1]


def test_it_is_the_exact_operator_where_groups_share_nothing() -> None:
    """Block soft-thresholding: every weight but those that the second layer's units own is 0."""
    groups = built()
    with torch.no_grad():
        for name, parameter in groups.model.named_parameters():
            if name != "head.weight":
                parameter.zero_()
    norms = groups.model.get_parameter("head.weight").detach().norm(dim=0)
    between = float(norms.sort().values[2:4].mean())
    truth = exact(groups, between / STRENGTH)
    assert distance(proximal(between / STRENGTH, groups), truth) < 1e-12
    assert (truth[-1] != 0).any(0).tolist() == (norms > between).tolist()


def test_a_unit_dies_as_a_whole_at_its_norm() -> None:
    groups = built()
    lasso = GroupLasso(groups, STRENGTH)
    norms = torch.cat(list(lasso.norms().values()))
    smallest = int(norms.argmin())
    at_norm = float(norms[smallest]) / STRENGTH
    lasso.proximal_(0.999 * at_norm)
    assert not torch.cat(list(groups.dead().values())).any()
    groups = built()
    GroupLasso(groups, STRENGTH).proximal_(1.001 * at_norm)
    assert torch.cat(list(groups.dead().values())).nonzero().flatten().tolist() == [smallest]
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        assert not parameter[weight.row_units == smallest].any()
        assert not parameter[:, weight.column_units == smallest].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_fewer_digits_takes_the_same_step(dtype: torch.dtype) -> None:
    narrow, wide = built(), built()
    narrow.model.to(dtype)
    wide.model.load_state_dict({k: v.double() for k, v in narrow.model.state_dict().items()})
    results = [proximal(0.5, groups) for groups in (narrow, wide)]
    eps = torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=1e-30)


# -- in the optimiser's metric --------------------------------------------------------------------

OPTIMISERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.8, "dampening": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2}),
    "Adam, a tensor": (torch.optim.Adam, {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-3, "betas": (0.8, 0.9)}),
    "amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2, "betas": (0.8, 0.9)}),
    "Adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5, "eps": 1e-3}),
    "centered": (torch.optim.RMSprop, {"lr": 1e-2, "alpha": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-1, "lr_decay": 0.1}),
}


def trained(name: str, steps: int = 3, frozen: str = "") -> tuple[Groups, torch.optim.Optimizer]:
    """After some steps of an optimiser."""
    groups = built()
    for its, parameter in groups.model.named_parameters():
        parameter.requires_grad_(its != frozen)
    make, options = OPTIMISERS[name]
    optimizer = make(groups.model.parameters(), **options)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    for step in range(steps):
        optimizer.zero_grad()
        groups.model(x + step).square().sum().backward()
        optimizer.step()
    return groups, optimizer


def roots_of(groups: Groups, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """By what the optimiser divided the gradients, from its documentation."""
    (group,) = optimizer.param_groups
    roots = []
    for parameter in groups.parameters():
        state = optimizer.state[parameter]
        if not parameter.requires_grad:
            roots.append(torch.zeros_like(parameter))
        elif isinstance(optimizer, torch.optim.SGD):
            share = (1 - group["dampening"]) / (1 - group["momentum"]) if group["momentum"] else 1
            roots.append(torch.full_like(parameter, 1 / (group["lr"] * share)))
        elif isinstance(optimizer, torch.optim.Adamax):
            roots.append(state["exp_inf"] / group["lr"])
        elif isinstance(optimizer, torch.optim.RMSprop):
            mean = state["square_avg"] - (state["grad_avg"] ** 2 if group["centered"] else 0)
            rate = group["lr"] / (1 - group["momentum"])
            roots.append((mean.sqrt() + group["eps"]) / rate)
        elif isinstance(optimizer, torch.optim.Adagrad):
            rate = group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
            roots.append((state["sum"].sqrt() + group["eps"]) / rate)
        else:
            squares = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
            mean = squares / (1 - group["betas"][1] ** float(state["step"]))
            roots.append((mean.sqrt() + group["eps"]) / float(group["lr"]))
    return roots


@pytest.mark.parametrize("frozen", ["", "rnn.weight_hh_l0"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_unit_s_step_is_that_of_the_root_mean_square_of_its_divisors(
    name: str, frozen: str
) -> None:
    groups, optimizer = trained(name, frozen=frozen)
    norms = torch.cat([*GroupLasso(groups).norms().values()])
    roots, steps = roots_of(groups, optimizer), []
    for unit in range(groups.units):
        divisors = []
        for weight, root in zip(groups.weights, roots, strict=True):
            if weight.name != frozen:
                rows, columns = weight.row_units == unit, weight.column_units == unit
                divisors.append(root[rows[:, None] | columns])
        steps.append(1 / float(torch.cat(divisors).square().mean().sqrt()))
    strength = float((norms / torch.tensor(steps)).median()) * 0.9  # some go, some stay
    factors = [max(0.0, 1 - s * strength / float(n)) for s, n in zip(steps, norms, strict=True)]
    assert min(factors) < 0.2 and max(factors) > 0.05
    expected = values(groups)
    for weight, value in zip(groups.weights, expected, strict=True):
        for unit, factor in enumerate(factors if weight.name != frozen else ()):
            value[(weight.row_units == unit)[:, None] | (weight.column_units == unit)] *= factor
    GroupLasso(groups, strength).proximal_(optimizer)
    torch.testing.assert_close(values(groups), expected)


def test_sgd_is_its_learning_rate() -> None:
    ours, theirs = trained("SGD"), trained("SGD")
    GroupLasso(ours[0], STRENGTH).proximal_(ours[1])
    GroupLasso(theirs[0], STRENGTH).proximal_(0.1)
    assert all(torch.equal(a, b) for a, b in zip(values(ours[0]), values(theirs[0]), strict=True))


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam", "AdamW", "NAdam", "Adamax", "RMSprop"])
def test_the_same_units_leave_whatever_the_optimiser(name: str) -> None:
    """A column of the head matters in the measure of its distance from zero to its best value.

    Loss: sum of curvature * (column - best)^2 / 2. Such a unit is zero where the norm of its
    gradient there, curvature * |best|, is at most the strength.
    """
    groups = built()
    with torch.no_grad():
        for its, parameter in groups.model.named_parameters():
            parameter.requires_grad_(its == "head.weight")
            parameter.mul_(its == "head.weight")  # or the weights that stay count in the norms
    head = groups.model.get_parameter("head.weight")
    curvature = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 0.2], dtype=torch.float64)
    best = torch.tensor([10.0, 2.0, 0.5, 0.2, 0.01, 1.0], dtype=torch.float64) / 3**0.5
    strength = 0.35
    lives = curvature * best * 3**0.5 > strength
    make, options = OPTIMISERS[name]
    optimizer = make([head], **options)
    lasso = GroupLasso(groups, {"rnn.l0": 0.0, "rnn.l1": strength})
    torch.manual_seed(0)
    for _ in range(6000):
        optimizer.zero_grad()
        noise = 0.05 * torch.randn_like(head)
        head.grad = curvature * (head.detach() - best) + noise
        optimizer.step()
        lasso.proximal_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9995
    assert (~groups.dead()["rnn.l1"]).tolist() == lives.tolist()
    expected = best - (strength / curvature) * 3**-0.5
    torch.testing.assert_close(
        head.detach()[:, lives], expected[lives].expand(3, -1), rtol=0.15, atol=0.05
    )


def test_optimisers_of_other_kinds_are_refused() -> None:
    groups, optimizer = trained("Adam")
    lasso, before = GroupLasso(groups, STRENGTH, warmup=3), values(groups)
    parameters = [*groups.model.parameters()]

    class Mine(torch.optim.Adam):
        pass

    for other in (torch.optim.Rprop(parameters), Mine(parameters), "0.1"):
        with pytest.raises(TypeError) as error:
            lasso.proximal_(other)
        assert str(error.value) == (
            "proximal_: expected a step size, or an optimizer of type SGD, Adam, AdamW, NAdam, "
            f"Adamax, RMSprop or Adagrad, got {type(other).__name__}"
        )
    with pytest.raises(ValueError) as error:
        lasso.proximal_(torch.optim.SGD(parameters[1:], 0.1))
    assert str(error.value) == (
        "proximal_: expected an optimizer that has rnn.weight_ih_l0, got one without it"
    )
    assert lasso.state_dict()["steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))
    lasso.proximal_(optimizer)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate wraps an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state, self.param_groups = optimizer.state, optimizer.param_groups


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_a_wrapper_without_a_state_of_its_own_is_its_optimiser(name: str) -> None:
    ours, theirs = trained(name), trained(name)
    GroupLasso(ours[0], STRENGTH).proximal_(Wrapper(Wrapper(ours[1])))
    GroupLasso(theirs[0], STRENGTH).proximal_(theirs[1])
    assert all(torch.equal(a, b) for a, b in zip(values(ours[0]), values(theirs[0]), strict=True))
    other = Wrapper(ours[1])
    other.state = {}
    with pytest.raises(TypeError, match="got Wrapper"):
        GroupLasso(ours[0], STRENGTH).proximal_(other)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimiser_that_made_no_step_moves_nothing(fused: bool) -> None:
    """A GradScaler skips the first steps, until its scale has come down."""
    groups = built()
    optimizer = torch.optim.AdamW(groups.model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    lasso, before = GroupLasso(groups, STRENGTH), values(groups)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        y = groups.model(torch.randn(4, 2, 5, dtype=torch.float64))
        scaler.scale(y.square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        lasso.proximal_(optimizer)
        same = all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))
        assert same == (factor == torch.inf)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    for name in ("SGD", "Adam"):
        groups, optimizer = trained(name)
        optimizer.param_groups[0]["lr"] = 0.0
        before = values(groups)
        GroupLasso(groups, STRENGTH).proximal_(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(values(groups), before, strict=True))


# -- weights that the optimiser has not moved -----------------------------------------------------

ADAPTIVE = [name for name in OPTIMISERS if name not in ("SGD", "momentum")]


class Towers(nn.Module):
    """Two layers with a head, and a second tower, of which a call may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 6, num_layers=2), nn.Linear(6, 3)
        self.other, self.other_head = nn.LSTM(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.rnn(x)[0]), self.other_head(self.other(x)[0])


def one_step(name: str, set_to_none: bool = True) -> tuple[Groups, torch.optim.Optimizer]:
    """After a step in which neither rnn.l0, before a head of zeros, nor `other` had a gradient."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    groups = find_groups(Towers().double(), x)
    model = groups.model
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    make, options = OPTIMISERS[name]
    optimizer = make(model.parameters(), **options)
    sum(y.sum() for y in model(x)).backward()
    optimizer.zero_grad(set_to_none)
    (model(x)[0] - 1).square().mean().backward()
    optimizer.step()
    return groups, optimizer


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_had_no_gradient_stays(name: str, set_to_none: bool) -> None:
    groups, optimizer = one_step(name, set_to_none)
    names = [weight.name for weight in groups.weights]
    before = dict(zip(names, values(groups), strict=True))
    GroupLasso(groups, 1e-3).proximal_(optimizer)
    after = dict(zip(names, values(groups), strict=True))
    # A head of zeros moves, but what only reads and recurs in rnn.l0 does not; SGD cannot tell.
    still = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"] if name in ADAPTIVE else []
    if set_to_none or name in ADAPTIVE:
        still += ["other.weight_ih_l0", "other.weight_hh_l0", "other_head.weight"]
    assert all(torch.equal(after[its], before[its]) for its in still)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.cat([*groups.dead().values()]).any()


def test_gradients_that_are_gone_after_a_step_change_nothing() -> None:
    """A loop may set them to None before the proximal step."""
    for name in ("SGD", "momentum", "Adam"):
        ours, theirs = trained(name), trained(name)
        ours[1].zero_grad()
        for groups, optimizer in (ours, theirs):
            GroupLasso(groups, STRENGTH).proximal_(optimizer)
        pairs = zip(values(ours[0]), values(theirs[0]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("option", ["momentum", "dampening"])
@pytest.mark.parametrize("value", [1.0, 1.5])
def test_steps_that_do_not_add_up_are_refused(option: str, value: float) -> None:
    groups = built()
    options = {"momentum": 0.9, option: value}
    lasso = GroupLasso(groups, STRENGTH, warmup=3)
    with pytest.raises(ValueError) as error:
        lasso.proximal_(torch.optim.SGD(groups.model.parameters(), 0.1, **options))
    assert str(error.value) == f"proximal_: expected an optimizer of {option} below 1, got {value}"
    assert lasso.state_dict()["steps"] == 0


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_goes_on_after_a_shrink_as_with_the_dead_units_held_at_zero(name: str) -> None:
    groups, optimizer = trained(name)
    gone = {"rnn.l0": torch.arange(6) < 3, "rnn.l1": torch.arange(6) % 2 == 0}
    groups.zero_units_(gone)
    big = copy.deepcopy(groups.model)
    big_groups = find_groups(big, torch.randn(4, 2, 5, dtype=torch.float64))
    make, options = OPTIMISERS[name]
    big_optimizer = make(big.parameters(), **options)
    big_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lasso, big_lasso = GroupLasso(groups, 1e-2), GroupLasso(big_groups, 1e-2)
    small = groups.model
    _, left = shrink_(small, groups, optimizer=optimizer, lasso=lasso)
    for _ in range(5):
        x = torch.randn(4, 2, 5, dtype=torch.float64)
        for model, its, hold in ((small, optimizer, False), (big, big_optimizer, True)):
            its.zero_grad()
            model(x).square().sum().backward()
            its.step()
            if hold:
                big_groups.zero_units_(gone)
            (big_lasso if hold else lasso).proximal_(its)
        norms, big_norms = (torch.cat([*each.norms().values()]) for each in (lasso, big_lasso))
        kept = ~torch.cat([*gone.values()])
        torch.testing.assert_close(norms, big_norms[kept], rtol=1e-8, atol=1e-10)
    assert [family.size for family in left.families] == [3, 3]
