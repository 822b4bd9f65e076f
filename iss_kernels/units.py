# SPDX-License-Identifier: Apache-2.0
"""Ids of the units of a model that is followed, and which of them leave together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from iss_kernels.groups import Family
from iss_kernels.rules import NONE


class Units:
    """Units by their ids, int32: which of them became one, and the families that they are of.

    families: those of layers and directions, with the ids that they had before any became one.
    """

    def __init__(self) -> None:
        self.root = none(0)  # unit -> the least of those that it became one with
        self.families: list[Family] = []

    def new(self, size: int) -> Tensor:
        """Ids for units that are of no family."""
        start = len(self.root)
        new = torch.arange(start, start + size, dtype=torch.int32, device="cpu")
        self.root = torch.cat([self.root, new])
        return new

    def new_family(self, name: str, module: str, size: int) -> Tensor:
        """Ids for the units of a layer and direction, or of an embedding."""
        units = self.new(size)
        self.families.append(Family(name, module, int(units[0]) if size else 0, size))
        return units

    def roots(self, units: Tensor) -> Tensor:
        """One id for all that became one."""
        return self.root[units.long()]

    def module_of(self, family: str) -> str:
        """The module of a family."""
        return next(own.module for own in self.families if own.name == family)

    def among(self, labels: Tensor) -> set[str]:
        """Names of the families with units among these labels."""
        units = labels.flatten()
        roots = set(self.roots(units[units >= 0]).tolist())
        return {f.name for f in self.families if roots & set(self.roots(ids(f)).tolist())}

    def unite(self, one: Tensor, two: Tensor) -> None:
        """Make units of one shape one, place by place."""
        roots = torch.stack([self.roots(one.flatten()), self.roots(two.flatten())])
        differ = roots[0] != roots[1]
        if not bool(differ.any()):
            return
        for a, b in roots[:, differ].unique(dim=1).T.tolist():  # type: ignore[no-untyped-call]
            a, b = self._find(a), self._find(b)
            if a != b:
                self.root[max(a, b)] = min(a, b)
        while bool((self.roots(self.root) != self.root).any()):
            self.root = self.roots(self.root)

    def united(self, alike: Iterable[list[Tensor]]) -> Units:
        """The same, with unit k of each of these labels [size] one."""
        result = Units()
        result.root, result.families = self.root.clone(), self.families
        for first, *others in alike:
            for other in others:
                result.unite(first, other)
        return result

    def blocks(self) -> dict[tuple[int, ...], list[int]]:
        """{places in `families` of those that share units: the roots of these units}."""
        owners: dict[int, list[int]] = {}
        for i, family in enumerate(self.families):
            for unit in dict.fromkeys(self.roots(ids(family)).tolist()):
                owners.setdefault(unit, []).append(i)
        blocks: dict[tuple[int, ...], list[int]] = {}
        for unit, members in owners.items():
            blocks.setdefault(tuple(members), []).append(unit)
        return blocks

    def _find(self, unit: int) -> int:
        while int(self.root[unit]) != unit:
            unit = int(self.root[unit])
        return unit


def none(size: int) -> Tensor:
    """Labels of what is of no unit."""
    return torch.full((size,), NONE, dtype=torch.int32, device="cpu")


def ids(family: Family) -> Tensor:
    """The ids of a family's units."""
    return torch.tensor(family.units, dtype=torch.int32, device="cpu")
