# SPDX-License-Identifier: Apache-2.0
"""Leads a group Lasso to the share of a model that is to be left, by its strength.

One number is watched: the critical norm, the largest among the units that have to go if the
smallest go first. It is known from the first step, long before a unit is gone, and it falls as the
penalty rises; so the strength can follow it, and no search over strengths is needed. Where families
differ in strength, a norm counts as a multiple of its family's strength: the penalty takes that
many steps to bring it to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from iss_kernels.groups import Groups

MEASURES = ("units", "parameters", "multiply-adds")
# Gains on the logarithm of the strength, for a norm that falls from 1 to 0 in a horizon. 20: being
# 5 % behind makes the strength e times as high, so that one 100 times too high does no harm.
# 100 = 20^2 / 4: critical damping, for norms that fall as fast as the strength is high.
_PROPORTIONAL, _INTEGRAL = 20.0, 100.0
_MOST = 30.0  # logarithm of the factor, where nothing fades: still finite in float32


def check_int(argument: str, value: Any) -> None:
    """ValueError for what is not a whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"GroupLasso: expected {argument} to be an int, got {value!r}")


def number(argument: str, value: Any) -> float:
    """A number as a float, also one in a tensor; ValueError for what is none."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not (one or isinstance(value, Real)) or isinstance(value, bool):
        raise ValueError(f"GroupLasso: expected {argument} to be a number, got {value!r}")
    return float(value)


class Target:
    """The share of a model that is to be left, and the factor on the strengths that leads there.

    strengths: of the units, float64 [units]; those with 0 stay. target, of, horizon, gone and the
    errors: see GroupLasso. eps: what the norms have under their root.
    """

    def __init__(
        self,
        groups: Groups,
        strengths: Tensor,
        target: float,
        of: str,
        horizon: int | None,
        gone: float,
        eps: float,
    ) -> None:
        target, gone = number("target", target), number("gone", gone)
        if not 0 < target < 1:
            raise ValueError(f"GroupLasso: expected target between 0 and 1, got {target}")
        if of not in MEASURES:
            choices = ", ".join(MEASURES)
            raise ValueError(f"GroupLasso: expected of to be one of {choices}, got {of}")
        if horizon is not None:
            check_int("horizon", horizon)
        if horizon is None or horizon < 1:
            raise ValueError(f"GroupLasso: expected horizon >= 1 with target, got {horizon}")
        if not 0 < gone < 1:
            raise ValueError(f"GroupLasso: expected gone between 0 and 1, got {gone}")
        self._target, self._horizon, self._gone = target, horizon, gone
        self._floor = 2 * math.sqrt(eps)  # norms of units that are zero are sqrt(eps)
        self._of = of
        # As multiples of the least one, so that with one strength for all a norm stays what it is.
        self._strengths = strengths / strengths.where(strengths > 0, math.inf).min()
        self._measure = _Measure(groups, of)
        self._whole = 1.0
        self._whole = float(self._shares(self._ids[:0])[0])
        least = float(self._shares(self._ids)[-1])
        if target < least:
            raise ValueError(
                f"GroupLasso: expected target >= {least:.4f}, the {of} left with one unit in every "
                f"family that has a strength, got {target}"
            )
        self._highest = 0.0  # critical norm so far
        self._behind = 0.0  # integral over time of how far behind its schedule it was
        self.left = 1.0
        self.out: Tensor | None = None  # ids of the units that went, once the target is reached

    def factor(self, norms: Tensor, steps: int) -> float:
        """The factor on the strengths for a step with these norms [units]; 0 once reached.

        steps: since the warm-up. From then on the critical norm should fall linearly, to `gone` of
        its highest in a horizon; before that, not at all. Where it falls faster the strength goes
        down, where it does not the strength goes up.
        """
        if self.out is not None:
            return 0.0
        if not bool(norms.isfinite().all()):  # a step that went wrong says nothing
            return 0.0
        ids = self._ids
        values, order = (norms.cpu().double() / self._strengths)[ids].sort(stable=True)
        left = self._shares(ids[order])
        count = int((left > self._target).sum())
        critical = float(values[count - 1]) if count else 0.0
        self._highest = max(self._highest, critical)
        limit = max(self._gone * self._highest, self._floor)
        if critical <= limit:
            self.out, self.left = ids[order[:count]], float(left[count])
            return 0.0
        self.left = float(left[(values <= limit).sum()])
        time = steps / self._horizon
        behind = critical / self._highest - 1 + (1 - self._gone) * time
        self._behind += behind / self._horizon
        return math.exp(min(_PROPORTIONAL * behind + _INTEGRAL * self._behind, _MOST))

    def go_on(self, groups: Groups, kept: Tensor) -> None:
        """Go on with what is left of the groups; kept: bool [former units]."""
        kept = kept.cpu()
        self._strengths = self._strengths[kept]
        self._measure = _Measure(groups, self._of)
        if self.out is not None:
            out = torch.zeros_like(kept).index_fill_(0, self.out, True)
            self.out = out[kept].nonzero().flatten()

    @property
    def _ids(self) -> Tensor:
        """Ids of the units that may go."""
        return self._strengths.nonzero().flatten()

    def _shares(self, order: Tensor) -> Tensor:
        """What is left after the first 0, 1, ... all of the units of these ids went: [n + 1]."""
        return self._measure(order) / self._whole

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training."""
        return {
            "whole": self._whole,
            "highest": self._highest,
            "behind": self._behind,
            "left": self.left,
            "out": self.out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._whole, self._highest, self._behind = (
            state[name] for name in ("whole", "highest", "behind")
        )
        self.left, out = state["left"], state["out"]
        self.out = None if out is None else out.cpu()


class _Measure:
    """What is left of a model as its units go one by one.

    A weight costs its rows times its columns, as `shrink` leaves them: a family keeps at least one
    unit, and tied families as many as the largest of them. A vector has one column, which is of no
    unit. Units are counted as the rows of a vector that has them all.
    """

    def __init__(self, groups: Groups, of: str) -> None:
        self._families = groups.families
        index = {family.name: i for i, family in enumerate(groups.families)}
        self._tied = [[index[name] for name in names] for names in groups.tied]
        # Units of each family, [families + 1], and what each unit counts there, [units, the same].
        # The last is 1 for all that is of no unit.
        like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        self._sizes = torch.tensor([*(f.size for f in groups.families), 1], **like)
        self._of_family = torch.zeros(groups.units, len(index) + 1, **like)
        for i, family in enumerate(groups.families):
            self._of_family[family.units, i] = 1
        if of == "units":
            one_column = torch.eye(len(index) + 1, **like)[-1]
            rows, columns = [1 - one_column], [one_column]
        else:
            counted = groups.counted(of)
            rows = [self._per_unit(one.row_units) for one in counted]
            columns = [self._per_unit(one.column_units) for one in counted]
        self._rows, self._columns = torch.stack(rows), torch.stack(columns)  # [weights, families+1]

    def _per_unit(self, labels: Tensor) -> Tensor:
        """Rows (or columns) that one unit of each family has, and those of no unit."""
        counts = [
            int(((labels >= f.start) & (labels < f.units.stop)).sum()) / f.size
            for f in self._families
        ]
        others = int((labels < 0).sum())
        return torch.tensor([*counts, others], dtype=torch.float64, device="cpu")

    def __call__(self, order: Tensor) -> Tensor:
        """The cost left after the first 0, 1, ... all of the units of these ids: [n + 1]."""
        gone = self._of_family[order].cumsum(0)
        sizes = torch.cat([self._sizes[None], self._sizes - gone]).clamp_min(1)
        for families in self._tied:
            sizes[:, families] = sizes[:, families].amax(1, keepdim=True)
        return (sizes @ self._rows.T * (sizes @ self._columns.T)).sum(1)
