# SPDX-License-Identifier: Apache-2.0
"""Which parameters leave with which unit: their rows and columns carry unit ids.

`find_groups` (find.py) makes these for a model; the lasso, `shrink` and the pictures all walk the
same labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from iss_kernels.accelerate import _name
from iss_kernels.cells import CELLS, Cell
from iss_kernels.recurrent import MODULES


class GroupError(ValueError):
    """The model cannot be followed; the message names the recurrent layer and the operation."""


@dataclass(frozen=True)
class Family:
    """Units that can leave one by one: those of one layer and direction of a recurrent module.

    name: "rnn.l0" or "rnn.l0_reverse" where `module` is "rnn", the module's name in the model; with
    a projection there are two families, "rnn.l0.cell" and "rnn.l0.output".
    """

    name: str
    module: str
    start: int
    size: int

    @property
    def units(self) -> range:
        """Ids of its units."""
        return range(self.start, self.start + self.size)


@dataclass(frozen=True)
class LabelledWeight:
    """A weight matrix [R, C] by its parameter name, with row_units [R] and column_units [C].

    Both int32: the unit that a row or column belongs to, -1 for none.
    """

    name: str
    row_units: Tensor
    column_units: Tensor


@dataclass(frozen=True)
class LabelledVector:
    """A parameter [R] by its name, such as a bias, with row_units [R] as a weight has them.

    Its elements are cut with their units, and not penalised.
    """

    name: str
    row_units: Tensor


@dataclass
class Groups:
    """The units of a model and the weights that leave with each (Wen et al. 2018, section 3.1).

    Parameters are looked up by name in `model` whenever they are used, so moving it or loading a
    state_dict leaves nothing stale. tied: names of families that must keep one common size, because
    the model's code takes them from one tensor: final states, or parts of equal width. verified: on
    which inputs models without some of the units were compared with the whole one.
    """

    model: nn.Module
    families: list[Family]
    weights: list[LabelledWeight]
    tied: list[list[str]] = field(default_factory=list)
    vectors: list[LabelledVector] = field(default_factory=list)
    verified: str = ""

    @property
    def units(self) -> int:
        """Number of units in all families."""
        return self.families[-1].units.stop

    @property
    def labelled(self) -> list[LabelledWeight | LabelledVector]:
        """All that is cut when a unit leaves."""
        return [*self.weights, *self.vectors]

    def parameters(self) -> list[nn.Parameter]:
        """The labelled weights themselves, in the order of `weights`."""
        return [self.model.get_parameter(weight.name) for weight in self.weights]

    def by_family(self, values: Tensor) -> dict[str, Tensor]:
        """Cut values: [units] into {family name: [size]}."""
        return {f.name: values[f.start : f.start + f.size] for f in self.families}

    @torch.no_grad()
    def dead(self) -> dict[str, Tensor]:
        """{family name: bool [size]}: True where removing the unit changes no answer.

        A unit is dead when all its outgoing weights, the columns labelled with it, are exactly
        zero: then its value reaches nothing, whatever its gates and biases hold.
        """
        alive = torch.zeros(self.units, dtype=torch.bool, device="cpu")
        for weight, parameter in zip(self.weights, self.parameters(), strict=True):
            columns = weight.column_units
            alive[columns[(columns >= 0) & (parameter != 0).any(0).cpu()].long()] = True
        return self.by_family(~alive)

    @torch.no_grad()
    def zero_units_(self, units: Mapping[str, Tensor]) -> None:
        """Set every weight of these units to zero, in place: then they are dead.

        units: {family name: bool [size]}; families not named stay as they are. Raises ValueError
        for a name or a size that the groups do not have.
        """
        sizes = {family.name: family.size for family in self.families}
        chosen = self.by_family(torch.zeros(self.units, dtype=torch.bool, device="cpu"))
        for name, mask in units.items():
            is_tensor = isinstance(mask, Tensor)
            if (
                name not in sizes
                or not is_tensor
                or (mask.shape, mask.dtype) != ((sizes[name],), torch.bool)
            ):
                expected = ", ".join(f"{family} [{size}]" for family, size in sizes.items())
                got = f"{list(mask.shape)} {mask.dtype}" if is_tensor else type(mask).__name__
                raise ValueError(
                    f"zero_units_: expected bool masks for {expected}, got {name} {got}"
                )
            chosen[name] = mask.cpu()
        no_unit = torch.zeros(1, dtype=torch.bool, device="cpu")
        padded = torch.cat([*chosen.values(), no_unit])  # no_unit at -1
        for weight, parameter in zip(self.weights, self.parameters(), strict=True):
            rows, columns = padded[weight.row_units.long()], padded[weight.column_units.long()]
            parameter.masked_fill_((rows[:, None] | columns[None, :]).to(parameter.device), 0)

    def __str__(self) -> str:
        table = [("family", "units", "read by")]
        for family in self.families:
            readers = [w.name for w in self.weights if family.start in w.column_units]
            table.append((family.name, str(family.size), ", ".join(readers)))
        width = max(len(name) for name, _, _ in table)
        lines = [f"{name:<{width}}  {size:>5}  {readers}" for name, size, readers in table]
        lines += [f"one common size: {', '.join(names)}" for names in self.tied]
        return "\n".join([*lines, f"verified: {self.verified}"] if self.verified else lines)


def kinds() -> str:
    """The classes whose units can leave, as error messages list them."""
    *most, last = sorted(map(_name, {*MODULES, *MODULES.values()}), reverse=True)  # nn. first
    return f"{', '.join(most)} or {last}"


def cell_of(module: nn.RNNBase) -> Cell:
    """The registry's row of a recurrent module, torch's or ours."""
    return CELLS[module.mode.lower()]


def plain_recurrent(function: str, model: nn.Module) -> dict[str, Any]:
    """{name: module} of the recurrent modules, but of no subclass with a forward of its own.

    Raises GroupError, in the name of `function`, for one that `shrink` could not rebuild: its
    weights are computed from other parameters, or its forward is not that of its class.
    """
    found = {}
    for name, module in model.named_modules():
        if type_before_parametrizations(module) not in {*MODULES, *MODULES.values()}:
            continue
        recurrent: Any = module
        computed = [w for w in sum(recurrent._all_weights, []) if w not in recurrent._parameters]
        if computed:
            raise GroupError(
                f"{function}: expected recurrent modules whose weights are parameters, "
                f"got {name or 'one'} whose {computed[0]} is computed (pruning, weight_norm or "
                "another parametrisation): remove that first"
            )
        if "forward" in vars(recurrent):
            raise GroupError(
                f"{function}: expected recurrent modules with the forward of their class, "
                f"got {name or 'one'} with another, which shrink could not keep"
            )
        found[name] = recurrent
    return found
