# SPDX-License-Identifier: Apache-2.0
"""The proximal step against the exact proximal operator of the penalty, solved in float64."""

import pytest
import torch
from torch import Tensor, nn

from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups

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
