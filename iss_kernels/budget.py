# SPDX-License-Identifier: Apache-2.0
"""Which units stay where a model may only have so many parameters or take so much time.

The units of all families leave in one order, first those that are small for what they cost:

    sum of the squares of the unit's weights / elements that leave with the unit

So a family does not look important because its units have many weights: it is the mean square of
these that counts. This is also the greedy order of a knapsack problem in which a removal does
damage as the square of its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from iss_kernels.arguments import call_of
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups
from iss_kernels.prepare import prepare

Kept: TypeAlias = dict[str, Tensor]  # {family name: bool [size]}

_SECONDS = 0.2  # that each model is run for, at least, for the median of its times
# Models that differ by less in their multiply-adds differ by less in time than two timings do.
_ALIKE = 0.02


def check(budget: Any, example: Any) -> None:
    """ValueError for what is no budget."""
    keys = ("parameters", "multiply-adds", "ms")
    if not isinstance(budget, Mapping) or not budget or not all(key in keys for key in budget):
        got = ", ".join(map(repr, budget)) if isinstance(budget, Mapping) else repr(budget)
        raise ValueError(
            f"shrink: expected budget to be a dict with {' or '.join(keys)}, got {got or '{}'}"
        )
    for key, value in budget.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise ValueError(f"shrink: expected a budget in {key} above 0, got {value!r}")
    if "ms" in budget and example is None:
        raise ValueError("shrink: expected example with a budget in ms, got none")


def rounded(size: int, whole: int, round_to: int) -> int:
    """A size rounded up to a multiple of round_to, from 1 up to the whole size."""
    return min(-(-max(size, 1) // round_to) * round_to, whole)


def within(
    groups: Groups,
    budget: Mapping[str, float],
    example: Any,
    round_to: int,
    removed: Callable[[Kept], nn.Module],
) -> Kept:
    """The units that stay so that every part of the budget holds.

    removed: makes the model without the units that are not kept. Dead units leave in any case, then
    as few as it takes, in the order above. A family keeps at least one unit, and has a size that
    round_to allows; of tied families one unit each leaves at a time. The order says which of two
    models is the larger one, so each part is met by bisection, and few models are timed.

    Raises ValueError for a budget that the smallest of these models does not meet.
    """
    of = "parameters" if set(budget) == {"parameters"} else "multiply-adds"
    ranking = _Ranking(groups, of, round_to)
    measures: dict[str, Callable[[Kept], float]] = {
        "parameters": lambda kept: _left(groups, "parameters", kept),
        "multiply-adds": lambda kept: _left(groups, "multiply-adds", kept),
        "ms": lambda kept: _milliseconds(removed(kept), example),
    }
    gone = ranking.dead
    for key, measure in measures.items():  # what takes time comes last
        if key not in budget or measure(ranking(gone)) <= budget[key]:
            continue
        low, high = gone, len(ranking)  # of these, the first does not hold
        least = measure(ranking(high))
        if least > budget[key]:
            least = least if isinstance(least, int) else math.ceil(1e4 * least) / 1e4
            raise ValueError(
                f"shrink: expected a budget of at least {least:,} {key}, which the smallest sizes "
                f"take, got {budget[key]:,}"
            )
        while high - low > 1 and not (key == "ms" and _alike(groups, ranking(low), ranking(high))):
            middle = (low + high) // 2
            low, high = (low, middle) if measure(ranking(middle)) <= budget[key] else (middle, high)
        gone = high
    return ranking(gone)


class _Ranking:
    """The units of all families in the order in which they leave; `ranking(n)`: what n leave over.

    Of tied families, which keep one common size, a unit each leaves as one. len(): how many can.
    """

    def __init__(self, groups: Groups, of: str, round_to: int) -> None:
        self._round_to = round_to
        elements = groups.by_family(_elements(groups, of))
        norms, dead = GroupLasso(groups).norms(), groups.dead()
        squares = {name: its.cpu().double().square() for name, its in norms.items()}
        self._blocks = groups.blocks
        self._orders: dict[str, Tensor] = {}  # of a family's units, the first to leave first
        scores, blocks = [], []
        for i, names in enumerate(self._blocks):
            for name in names:
                its = torch.where(dead[name], -1.0, squares[name] / elements[name])
                # Where units are alike, the first stays.
                self._orders[name] = its.argsort(descending=True, stable=True).flip(0)
            of_all, cost, out = (
                torch.stack([values[name][self._orders[name]] for name in names])[:, :-1]
                for values in (squares, elements, dead)
            )
            score = torch.where(out.all(0), -1.0, of_all.sum(0) / cost.sum(0))
            scores.append(score.cummax(0).values if len(score) else score)
            blocks += [i] * len(score)
        values, order = torch.cat(scores).sort(stable=True)
        self._left = torch.tensor(blocks, dtype=torch.int64, device="cpu")[order]
        self.dead = int((values < 0).sum())  # how many leave that change no answer

    def __len__(self) -> int:
        return len(self._left)

    def __call__(self, count: int) -> Kept:
        gone = torch.bincount(self._left[:count], minlength=len(self._blocks)).tolist()
        kept = {}
        for names, its in zip(self._blocks, gone, strict=True):
            for name in names:
                order = self._orders[name]
                size = rounded(len(order) - its, len(order), self._round_to)
                stay = order[len(order) - size :]
                kept[name] = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, stay, True)
        return kept


def _labels(groups: Groups, of: str) -> list[tuple[Tensor, Tensor]]:
    """Units of rows and of columns of all whose elements count; a vector has one column."""
    return [(one.row_units.long(), one.column_units.long()) for one in groups.counted(of)]


def _elements(groups: Groups, of: str) -> Tensor:
    """Elements that leave with each unit alone, [units]."""
    total = torch.zeros(groups.units, dtype=torch.float64, device="cpu")
    for rows, columns in _labels(groups, of):
        its_rows, its_columns = (
            torch.bincount(units + 1, minlength=groups.units + 1)[1:] for units in (rows, columns)
        )
        total += its_rows * len(columns) + its_columns * len(rows) - its_rows * its_columns
    return total


def _left(groups: Groups, of: str, kept: Kept) -> int:
    """Parameters of the model, or multiply-adds of its labelled weights, with these units."""
    of_no_unit = torch.ones(1, dtype=torch.bool, device="cpu")
    alive = torch.cat([*(kept[family.name] for family in groups.families), of_no_unit])  # at -1
    pairs = _labels(groups, of)
    left = sum(int(alive[rows].sum() * alive[columns].sum()) for rows, columns in pairs)
    if of == "parameters":
        left += sum(p.numel() for p in groups.model.parameters())
        left -= sum(len(rows) * len(columns) for rows, columns in pairs)
    return left


def _alike(groups: Groups, one: Kept, other: Kept) -> bool:
    """Whether timings of two models, the first the larger, would not tell which is which."""
    large, small = (_left(groups, "multiply-adds", kept) for kept in (one, other))
    return large <= (1 + _ALIKE) * small


def _milliseconds(model: nn.Module, example: Any) -> float:
    """Median time of a call of the prepared model."""
    from torch.utils.benchmark import Timer  # 0.4 s, which `import iss_kernels` need not take

    args, kwargs = call_of(example)
    names = {"model": prepare(model), "args": args, "kwargs": kwargs}
    with torch.inference_mode():
        timer = Timer("model(*args, **kwargs)", globals=names, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=_SECONDS).median
