# SPDX-License-Identifier: Apache-2.0
"""The group Lasso against its definition, written out unit by unit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iss_kernels.backend import use_backend
from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Family, Groups, Labelled

# nn.LSTM says this itself, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Tagger(nn.Module):
    def __init__(self, kind: Any = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 6, **options)
        with torch.no_grad():
            self.head = nn.Linear(self.rnn(torch.randn(2, 5))[0].shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "proj_size": 4},
    "of a GRU": {"kind": nn.GRU, "num_layers": 2, "bidirectional": True},
    "of an RNN": {"kind": nn.RNN, "num_layers": 2},
}
STRENGTH = 0.3


def built(name: str, dtype: torch.dtype = torch.float64) -> Groups:
    torch.manual_seed(0)
    model = Tagger(**LAYOUTS[name]).to(dtype)
    return find_groups(model, torch.randn(4, 2, 5, dtype=dtype))


def norm_of(groups: Groups, unit: int, eps: float = 1e-8, twice: bool = False) -> Tensor:
    """The definition: over the elements in the unit's rows or columns, each once (or twice)."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        rows, columns = weight.row_units == unit, weight.column_units == unit
        in_group = rows[:, None] | columns[None, :]
        total = total + parameter[in_group].square().sum()
        if twice:
            total = total + parameter[rows][:, columns].square().sum()
    return (total + eps).sqrt()


@pytest.fixture(params=["extension", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    try:
        chosen = use_backend(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    with chosen:
        yield


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_penalty_is_the_sum_of_group_norms(backend: None, name: str, twice: bool) -> None:
    groups = built(name)
    lasso = GroupLasso(groups, STRENGTH, paper_overlap=twice)
    expected = torch.stack([norm_of(groups, unit, twice=twice) for unit in range(groups.units)])
    torch.testing.assert_close(lasso(), STRENGTH * expected.sum())
    torch.testing.assert_close(torch.cat(list(lasso.norms().values())), expected)
    assert [len(norms) for norms in lasso.norms().values()] == [f.size for f in groups.families]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_add_gradients_adds_what_autograd_would(backend: None, name: str, twice: bool) -> None:
    groups = built(name)
    lasso = GroupLasso(groups, STRENGTH, paper_overlap=twice)
    sum(STRENGTH * norm_of(groups, unit, twice=twice) for unit in range(groups.units)).backward()
    expected = [parameter.grad for parameter in groups.parameters()]
    groups.model.zero_grad()
    lasso().backward()
    torch.testing.assert_close([parameter.grad for parameter in groups.parameters()], expected)
    groups.model.zero_grad()
    first = groups.parameters()[0]
    first.grad = torch.ones_like(first)  # the others have none yet
    value = lasso.add_gradients_()
    first.grad -= 1
    torch.testing.assert_close(value, lasso().detach())
    torch.testing.assert_close([parameter.grad for parameter in groups.parameters()], expected)


def test_float32_is_as_good_as_its_rounding(backend: None) -> None:
    single, double = built("two layers", torch.float32), built("two layers")
    double.model.load_state_dict({k: v.double() for k, v in single.model.state_dict().items()})
    for groups in (single, double):
        GroupLasso(groups, STRENGTH).add_gradients_()
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-7)


def test_strengths_may_differ_by_family() -> None:
    groups = built("two layers")
    lasso = GroupLasso(groups, {"rnn.l0": 0.0, "rnn.l1": 2.0})
    expected = 2 * lasso.norms()["rnn.l1"].sum()
    torch.testing.assert_close(lasso(), expected)
    torch.testing.assert_close(lasso.add_gradients_(), expected)
    w_ih, head = groups.parameters()[0], groups.parameters()[-1]
    assert not w_ih.grad.any()
    torch.testing.assert_close(head.grad, 2 * head / lasso.norms()["rnn.l1"])
    before = w_ih.clone()
    lasso.proximal_(10.0)
    assert torch.equal(w_ih, before) and not head.any()


def test_biases_are_in_no_group_and_frozen_weights_get_no_gradient() -> None:
    groups = built("one layer")
    w_hh = groups.model.get_parameter("rnn.weight_hh_l0").requires_grad_(False)
    GroupLasso(groups).add_gradients_()
    with_gradient = [n for n, p in groups.model.named_parameters() if p.grad is not None]
    assert with_gradient == ["rnn.weight_ih_l0", "head.weight"] and w_hh.grad is None
    for parameter in groups.parameters():
        parameter.requires_grad_(False)
    GroupLasso(groups).add_gradients_()


def test_frozen_weights_stay_as_they_are() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, 2))
    groups = find_groups(model, torch.randn(5, 2, 3))
    lasso, frozen = GroupLasso(groups, 0.1), model[0].weight_hh_l0
    frozen.requires_grad_(False)
    before = [parameter.clone() for parameter in groups.parameters()]
    lasso.proximal_(0.5)
    lasso.threshold_(0.1)
    for parameter, was in zip(groups.parameters(), before, strict=True):
        assert torch.equal(parameter, was) == (parameter is frozen)
    model.requires_grad_(False)
    lasso.threshold_(9.0)
    lasso.proximal_(9.0)
    index = [parameter is frozen for parameter in groups.parameters()].index(True)
    assert torch.equal(frozen, before[index])


def test_sparse_gradients_are_refused_before_the_step_counts() -> None:
    groups = find_groups(nn.LSTM(3, 4, 2), torch.randn(5, 2, 3))
    lasso, first = GroupLasso(groups, 0.1), groups.parameters()[0]
    first.grad = torch.zeros_like(first).to_sparse()
    with pytest.raises(ValueError, match="expected dense gradients, got one of layout sparse_coo"):
        lasso.add_gradients_()
    assert lasso.state_dict()["steps"] == 0


def test_what_is_no_number_is_named() -> None:
    groups = find_groups(nn.LSTM(3, 4, 2), torch.randn(5, 2, 3))
    for options, name in (
        ({"strength": "a"}, "strength for l0"),
        ({"strength": None}, "strength for l0"),
        ({"eps": None}, "eps"),
        ({"target": "a", "horizon": 5}, "target"),
        ({"target": 0.5, "horizon": 5, "gone": True}, "gone"),
    ):
        with pytest.raises(ValueError, match=f"expected {name} to be a number, got"):
            GroupLasso(groups, **options)  # type: ignore[arg-type]
    lasso: Any = GroupLasso(groups, torch.tensor(0.5))  # type: ignore[arg-type]
    assert lasso.strength == {"l0": 0.5}
    for method in (lasso.threshold_, lasso.proximal_):
        with pytest.raises(ValueError, match="to be a number, got tensor"):
            method(torch.ones(2))
    with pytest.raises(TypeError, match="expected the groups of find_groups, got LSTM"):
        GroupLasso(groups.model)  # type: ignore[arg-type]


def test_threshold_zeroes_small_elements_of_the_groups_only(backend: None) -> None:
    groups = built("two layers")
    head, bias = (groups.model.get_parameter(f"head.{name}") for name in ("weight", "bias"))
    with torch.no_grad():
        head[0, 0], head[1, 1], bias[0] = 9e-5, -2e-4, 9e-5
    before = [parameter.clone() for parameter in groups.model.parameters()]
    GroupLasso(groups).threshold_(1e-4)
    assert (head[0, 0], head[1, 1], bias[0]) == (0, -2e-4, 9e-5)
    assert sum((a != b).sum() for a, b in zip(before, groups.model.parameters(), strict=True)) == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_proximal_scales_each_element_by_the_factors_of_its_units(name: str) -> None:
    groups = built(name)
    lasso = GroupLasso(groups, STRENGTH)
    norms = torch.cat(list(lasso.norms().values()))
    step = float(norms.median()) / STRENGTH  # about half of the units go
    factors = [*(1 - step * STRENGTH / norms).clamp_min(0).tolist(), 1.0]
    expected = []
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        scaled = parameter.detach().clone()
        for r, row in enumerate(weight.row_units.tolist()):
            for c, column in enumerate(weight.column_units.tolist()):
                scaled[r, c] *= factors[row] * (factors[column] if row != column else 1)
        expected.append(scaled)
    lasso.proximal_(step)
    torch.testing.assert_close([parameter.detach() for parameter in groups.parameters()], expected)
    dead = torch.cat(list(groups.dead().values()))
    assert dead[norms <= norms.median()].all() and 0 < dead.sum() < len(dead)


@pytest.mark.parametrize("name", ["one layer", "of a GRU", "of an RNN"])
def test_training_with_the_proximal_step_kills_units(name: str) -> None:
    groups = built(name, torch.float32)
    lasso = GroupLasso(groups, strength=1.0)
    optimizer = torch.optim.SGD(groups.model.parameters(), lr=0.05)
    x = torch.randn(5, 4, 5)
    for _ in range(40):
        optimizer.zero_grad()
        groups.model(x).square().mean().backward()
        optimizer.step()
        lasso.proximal_(0.05)
    assert groups.dead()["rnn.l0"].any()
    assert all(p.isfinite().all() for p in groups.model.parameters())


def test_the_lasso_follows_a_model_that_changes_dtype() -> None:
    groups = built("one layer", torch.float32)
    lasso = GroupLasso(groups, STRENGTH)
    single = lasso()
    groups.model.double()
    assert lasso().dtype == torch.float64
    torch.testing.assert_close(lasso(), single.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "expected strength >= 0 for rnn.l0, got -1.0"),
        ({"strength": math.nan}, "expected strength >= 0 for rnn.l0, got nan"),
        ({"strength": {"rnn": 1.0}}, "expected strength for the families rnn.l0, got rnn"),
        ({"strength": {}}, "expected strength for the families rnn.l0, got none"),
        ({"strength": math.inf}, "expected strength >= 0 for rnn.l0, got inf"),
        ({"eps": 0.0}, "expected eps > 0 and finite, got 0.0"),
        ({"eps": math.inf}, "expected eps > 0 and finite, got inf"),
        ({"eps": math.nan}, "expected eps > 0 and finite, got nan"),
        ({"warmup": 2.5}, "expected warmup to be an int, got 2.5"),
        ({"warmup": math.nan}, "expected warmup to be an int, got nan"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        GroupLasso(built("one layer"), **options)
    assert str(error.value) == f"GroupLasso: {message}"


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_step_or_threshold_that_is_none_changes_nothing(value: float) -> None:
    groups = built("one layer")
    lasso = GroupLasso(groups, warmup=4)
    before = [parameter.clone() for parameter in groups.parameters()]
    for method, argument in ((lasso.proximal_, "step"), (lasso.threshold_, "threshold")):
        with pytest.raises(ValueError) as error:
            method(value)
        assert str(error.value) == f"GroupLasso: expected {argument} >= 0 and finite, got {value}"
    assert all(map(torch.equal, before, groups.parameters()))
    assert lasso.state_dict()["steps"] == 0


def test_weights_of_two_dtypes_are_refused() -> None:
    groups = built("one layer", torch.float32)
    groups.model.get_submodule("head").double()
    with pytest.raises(ValueError) as error:
        GroupLasso(groups)()
    assert str(error.value) == (
        "GroupLasso: expected weights of one dtype and device, "
        "got torch.float32 on cpu, torch.float64 on cpu"
    )


@pytest.mark.parametrize("backend", ["extension", "reference"], indirect=True)
def test_gradients_and_weights_may_be_strided(backend: str) -> None:
    groups, strided = built("two layers"), built("two layers")
    for weight in strided.parameters():
        weight.data = weight.data.t().contiguous().t()
        weight.grad = torch.zeros(*weight.shape, 2, dtype=weight.dtype)[..., 0]
    for each in (groups, strided):
        lasso = GroupLasso(each, STRENGTH)
        lasso.add_gradients_()
        lasso.threshold_(0.1)
        lasso.proximal_(0.1)
    for a, b in zip(groups.parameters(), strided.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)
        assert not b.grad.is_contiguous()


def test_a_gradient_whose_elements_share_memory_is_refused() -> None:
    lasso = GroupLasso(built("one layer"), STRENGTH)
    weight = lasso.groups.parameters()[0]
    weight.grad = torch.zeros(1, 1, dtype=weight.dtype).expand(weight.shape)
    with pytest.raises(RuntimeError, match="expected tensors to write whose elements share no mem"):
        lasso.add_gradients_()
    assert not weight.grad.any()


def test_a_gradient_that_is_no_matrix_in_memory_is_refused_before_the_step_counts() -> None:
    conv = nn.Conv1d(6, 4, 3)
    units = torch.arange(6, dtype=torch.int32).repeat_interleave(3)
    labels = (torch.full((4,), -1, dtype=torch.int32), units)
    groups = Groups(conv, [Family("units", "", 0, 6)], [Labelled("weight", labels, (1,))])
    lasso = GroupLasso(groups, STRENGTH, warmup=2)
    conv.weight.grad = torch.zeros(6, 4, 3).transpose(0, 1)
    before = lasso.state_dict()
    with pytest.raises(ValueError, match=r"contiguous gradients, got one of shape \[4, 6, 3\]"):
        lasso.add_gradients_()
    assert lasso.state_dict() == before


def test_a_weight_may_have_more_dimensions() -> None:
    """A convolution [4, 6, 3] over units counts as the matrix [4, 18]."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(18, 4).double(), nn.Conv1d(6, 4, 3).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view(4, 6, 3))
    units = torch.arange(6, dtype=torch.int32).repeat_interleave(3)
    none = torch.full((4,), -1, dtype=torch.int32)
    lassos = []
    for model in (linear, conv):
        family = Family("units", "", 0, 6)
        groups = Groups(model, [family], [Labelled("weight", (none, units), (1,))])
        lassos.append(GroupLasso(groups, STRENGTH))

    def assert_same(one: Tensor | None, two: Tensor | None) -> None:
        assert one is not None
        assert two is not None
        assert torch.equal(one.flatten(), two.flatten())

    assert_same(*(lasso.norms()["units"] for lasso in lassos))
    for lasso in lassos:
        lasso().backward()
    assert_same(linear.weight.grad, conv.weight.grad)
    for change in (
        lambda lasso: lasso.add_gradients_(),
        lambda lasso: lasso.threshold_(0.05),
        lambda lasso: lasso.proximal_(0.5),
    ):
        version = conv.weight._version
        for lasso in lassos:
            change(lasso)
        assert_same(linear.weight, conv.weight)
        assert_same(linear.weight.grad, conv.weight.grad)
    assert conv.weight._version > version
    assert 0 < int((conv.weight == 0).sum()) < conv.weight.numel()
    conv.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 1).contiguous().permute(0, 2, 1))
    with pytest.raises(ValueError, match=r"expected contiguous weights, got one of shape \[4, 6,"):
        lassos[1].threshold_(0.05)
