# SPDX-License-Identifier: Apache-2.0
"""Which parameters leave with which unit: their rows and columns carry unit ids.

`find_groups` (find.py) makes these for a model; the lasso, `shrink` and the pictures all walk the
same labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from iss_kernels.accelerate import _name
from iss_kernels.cells import CELLS, Cell
from iss_kernels.recurrent import CELL_MODULES, MODULES
from iss_kernels.recurrent_cell import PARAMETERS
from iss_kernels.widths import Width


class GroupError(ValueError):
    """The model cannot be followed; the message names the recurrent layer and the operation."""


@dataclass(frozen=True)
class Family:
    """Units that can leave one by one: those of one layer and direction of a recurrent module.

    name: "rnn.l0" or "rnn.l0_reverse" where `module` is "rnn", the module's name in the model; with
    a projection there are two families, "rnn.l0.cell" and "rnn.l0.output". Where the model adds,
    multiplies or hands over the units of several layers, unit k of each is one unit of one family,
    which has the name of the first; members: the names of all.
    """

    name: str
    module: str
    start: int
    size: int
    members: tuple[str, ...] = ()

    @property
    def units(self) -> range:
        """Ids of its units."""
        return range(self.start, self.start + self.size)


@dataclass(frozen=True)
class Labelled:
    """A parameter or buffer by its name, and for each of its dimensions the units, int32.

    units[d]: the unit that each place along dimension d belongs to, -1 for none. reads: dimensions
    that units are multiplied with, so that a zero there is an outgoing weight that is zero.
    """

    name: str
    units: tuple[Tensor, ...]
    reads: tuple[int, ...] = ()

    @property
    def row_units(self) -> Tensor:
        """Units along the first dimension, [R]."""
        return self.units[0]

    @property
    def column_units(self) -> Tensor:
        """Units along all others, [C], as `flatten(1)` lays out the parameter."""
        columns = torch.full((1,), -1, dtype=torch.int32, device="cpu")
        for units in self.units[1:]:
            columns = torch.maximum(columns[:, None], units[None]).flatten()
        return columns


@dataclass
class Groups:
    """The units of a model and the weights that leave with each (Wen et al. 2018, section 3.1).

    Parameters are looked up by name in `model` whenever they are used, so moving it or loading a
    state_dict leaves nothing stale. weights: the matrices, which the lasso penalises; vectors: what
    is cut and not penalised, such as biases; but those of units in `by_value`, which have to become
    zero too, are among the weights. tied: names of families that must keep one common
    size, because the model's code takes them from one tensor: final states, or parts of equal
    width. verified: on which inputs models without some of the units were compared with the whole
    one. kept_whole: {layer and direction: why its units cannot leave}. by_value: bool [units] of
    those that something reads without a weight, as attention scores do, which are dead only where
    all that makes their value is zero too; None where there are none. widths: numbers in the
    model's own modules that are widths and change with them. full_width: {recurrent module: why}:
    the model's code needs its outputs and states as wide as they are, so it gets smaller inside
    alone and puts out zeros in the places of the units that left. Those that something outside
    reads are in `by_value`. origin: int64 [units], which unit of its family each one was when
    `find_groups` made the groups; None where no unit has left since.
    """

    model: nn.Module
    families: list[Family]
    weights: list[Labelled]
    tied: list[list[str]] = field(default_factory=list)
    vectors: list[Labelled] = field(default_factory=list)
    verified: str = ""
    kept_whole: dict[str, str] = field(default_factory=dict)
    by_value: Tensor | None = None
    widths: list[Width] = field(default_factory=list)
    full_width: dict[str, str] = field(default_factory=dict)
    origin: Tensor | None = None

    @property
    def units(self) -> int:
        """Number of units in all families."""
        return self.families[-1].units.stop if self.families else 0

    @property
    def kept(self) -> dict[str, Tensor]:
        """{family name: int64 [size]}: its units, counted in the groups that `find_groups` made.

        After any number of calls of `shrink_`, `shrink_(fresh, find_groups(fresh, example),
        keep=groups.kept)` gives the model as it was built the sizes that it has now, so that a
        checkpoint loads.
        """
        if self.origin is None:
            return {
                family.name: torch.arange(family.size, device="cpu") for family in self.families
            }
        return self.by_family(self.origin)

    @property
    def blocks(self) -> list[list[str]]:
        """Names of families, those together that keep one common size."""
        tied = sum(self.tied, [])
        return self.tied + [[f.name] for f in self.families if f.name not in tied]

    @property
    def labelled(self) -> list[Labelled]:
        """All that is cut when a unit leaves."""
        return [*self.weights, *self.vectors]

    def counted(self, of: str) -> list[Labelled]:
        """Labelled "parameters", or those whose elements are one of the "multiply-adds" each."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return [
            one for one in self.labelled
            if one.name in parameters and (of == "parameters" or len(one.units) > 1)
        ]  # fmt: skip

    def parameters(self) -> list[nn.Parameter]:
        """The labelled weights themselves, in the order of `weights`.

        Raises ValueError where the model has them no longer, or in other shapes.
        """
        return [self._own(weight) for weight in self.weights]

    def _own(self, labelled: Labelled) -> Any:
        """The parameter or buffer of a label; ValueError for a model that has another."""
        path, _, name = labelled.name.rpartition(".")
        expected, found = [*map(len, labelled.units)], None
        with contextlib.suppress(AttributeError):
            module = self.model.get_submodule(path)
            found = module._parameters.get(name, module._buffers.get(name))
        got = "none" if found is None else list(found.shape)
        # Columns may be labelled as flatten(1) lays them out.
        if found is None or (found.numel(), got[:1]) != (math.prod(expected), expected[:1]):
            raise ValueError(
                f"Groups: expected {labelled.name} of shape {expected} in the model, got {got}; a "
                "model that has changed since has other groups (shrink_ returns them)"
            )
        if hasattr(found, "placements"):
            raise ValueError(
                f"Groups: expected {labelled.name} as a tensor that this process holds whole, got "
                "a DTensor, a part of one, as FSDP makes it; DistributedDataParallel keeps it whole"
            )
        return found

    def by_family(self, values: Tensor) -> dict[str, Tensor]:
        """Cut values: [units] into {family name: [size]}."""
        return {f.name: values[f.start : f.start + f.size] for f in self.families}

    @torch.no_grad()
    def dead(self) -> dict[str, Tensor]:
        """{family name: bool [size]}: True where removing the unit changes no answer.

        A unit is dead when all its outgoing weights are exactly zero: then its value reaches
        nothing, whatever its gates and biases hold. One that is read by its value is dead when all
        that is labelled with it is zero.
        """
        alive = torch.zeros(self.units + 1, dtype=torch.bool, device="cpu")  # the last: of no unit
        for _, tensor, units, dim, read in self._places():
            others = [d for d in range(tensor.dim()) if d != dim]
            holds = ((tensor != 0).any(others) if others else tensor != 0).cpu()
            alive[units[holds & read].long()] = True
        return self.by_family(~alive[:-1])

    @torch.no_grad()
    def zero_(self, gone: Tensor, rows: bool = True) -> None:
        """Set the weights of these units (bool [units]) to zero, in place.

        rows=False: their outgoing weights alone. What is read by its value loses all, biases too.
        """
        padded = torch.cat([gone.cpu(), torch.zeros(1, dtype=torch.bool, device="cpu")])
        for is_weight, tensor, units, dim, read in self._places():
            places = padded[units.long()] & (read | (rows and is_weight))
            tensor.index_fill_(dim, places.nonzero().flatten().to(tensor.device), 0)

    def _places(self) -> Iterator[tuple[bool, Tensor, Tensor, int, Tensor]]:
        """Every dimension of every labelled parameter.

        Whether that is a weight, the parameter, its units along the dimension, the dimension, and
        which of these units go out there, or make a value that is read.
        """
        by_value = torch.zeros(self.units + 1, dtype=torch.bool, device="cpu")
        if self.by_value is not None:
            by_value[:-1] = self.by_value
        every = [(labelled, self._own(labelled)) for labelled in self.labelled]
        for labelled, tensor in every:
            is_weight = any(labelled is weight for weight in self.weights)
            if isinstance(tensor, nn.Parameter):
                for dim, units in enumerate(labelled.units):
                    read = by_value[units.long()] | (dim in labelled.reads)
                    yield is_weight, tensor, units, dim, read

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
        none = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.zero_(torch.cat([none, *chosen.values()]))

    def __str__(self) -> str:
        table = [("family", "units", "read by")]
        for family in self.families:
            readers = [
                w.name for w in self.weights if any(family.start in w.units[d] for d in w.reads)
            ]
            name = " = ".join(family.members) or family.name
            table.append((name, str(family.size), ", ".join(readers)))
        width = max(len(name) for name, _, _ in table)
        lines = [f"{name:<{width}}  {size:>5}  {readers}" for name, size, readers in table]
        lines += [f"one common size: {', '.join(names)}" for names in self.tied]
        lines += [f"changed with {width.family}: {width}" for width in self.widths]
        lines += [
            f"of full width outside: {name or 'the model'}: {why}"
            for name, why in self.full_width.items()
        ]
        lines += [f"kept whole: {name}: {why}" for name, why in self.kept_whole.items()]
        return "\n".join([*lines, f"verified: {self.verified}"] if self.verified else lines)


def kinds() -> str:
    """The classes whose units can leave, as error messages list them."""
    *most, last = sorted(map(_name, {*MODULES, *MODULES.values()}), reverse=True)  # nn. first
    return f"{', '.join(most)} or {last}"


def cell_of(module: Any) -> Cell:
    """The registry's row of a recurrent module or a cell, torch's or ours."""
    if isinstance(module, nn.RNNCellBase):
        kind = CELL_MODULES.get(type(module), type(module)).__name__
        name = {"ISSLSTMCell": "lstm", "ISSGRUCell": "gru"}.get(kind)
        return CELLS[name or f"rnn_{module.nonlinearity}"]
    return CELLS[module.mode.lower()]


def plain_cells(model: nn.Module) -> dict[str, Any]:
    """{name: module} of the cells, torch's and ours, but of no subclass."""
    kinds_of_cells = {*CELL_MODULES, *CELL_MODULES.values()}
    return {
        name: module for name, module in model.named_modules()
        if type(module) in kinds_of_cells and "forward" not in vars(module)
        and {*PARAMETERS[: 4 if module.bias else 2]} <= module._parameters.keys()
    }  # fmt: skip


def plain_recurrent(function: str, model: nn.Module, others: bool = False) -> dict[str, Any]:
    """{name: module} of the recurrent modules, torch's and ours, but of no subclass.

    Raises GroupError, in the name of `function`, for one that `shrink` could not rebuild: its
    weights are computed from other parameters, or its forward is not that of its class. others:
    such are left out instead.
    """
    found = {}
    for name, module in model.named_modules():
        if type_before_parametrizations(module) not in {*MODULES, *MODULES.values()}:
            continue
        recurrent: Any = module
        computed = [w for w in sum(recurrent._all_weights, []) if w not in recurrent._parameters]
        if others and (computed or "forward" in vars(recurrent)):
            continue
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
