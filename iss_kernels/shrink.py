# SPDX-License-Identifier: Apache-2.0
"""Takes units out of a model for good: a new, smaller model that gives the same answers.

Which units stay is decided per family; then every labelled weight loses the rows and columns of the
others, and every labelled vector their elements. Modules of torch.nn become this package's own
(nn.LSTM an ISSLSTM), which hold unequal sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from iss_kernels.accelerate import take_over
from iss_kernels.copying import copied
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups, LabelledWeight, cell_of, plain_recurrent
from iss_kernels.recurrent import Recurrent, class_of


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did; str() is a table.

    kept: {family name: indices of the units that stayed, ascending}; sizes: {family name: (before,
    after)}; parameters and recurrent_parameters: (before, after), of the model and of its recurrent
    modules.
    """

    kept: dict[str, Tensor]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    recurrent_parameters: tuple[int, int]

    def __str__(self) -> str:
        totals = {
            "recurrent parameters": self.recurrent_parameters,
            "all parameters": self.parameters,
        }
        table = [("", "before", "after", "left")]
        for name, (before, after) in (self.sizes | totals).items():
            table.append((name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
        width = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            f"{a:<{width[0]}}  {b:>{width[1]}}  {c:>{width[2]}}  {d:>{width[3]}}"
            for a, b, c, d in table
        )


def shrink(
    model: nn.Module,
    groups: Groups,
    *,
    keep: Mapping[str, Tensor | Sequence[int] | Sequence[bool]] | None = None,
    ratio: float | None = None,
    round_to: int = 1,
) -> tuple[nn.Module, ShrinkReport]:
    """A copy of the model without its dead units, and a report; the model itself stays as it is.

    groups: of this model or of one with the same parameters. By default the units go that
    `groups.dead()` names, which changes no answer. Instead, keep={family name: indices or bool
    mask} keeps those units (families not named stay whole), and ratio removes that fraction of each
    family, rounded down, smallest norm first: both whatever the weights are. Sizes are then rounded
    up to multiples of round_to, no further than the old size; a family keeps at least one unit, and
    those in `groups.tied` keep one common size. The units taken back are those of largest norm.

    Every nn.LSTM that changes becomes an ISSLSTM, and so on for each kind; final states shrink, and
    are tuples of tensors where sizes differ (see ISSLSTM). An initial state of the width before,
    as the model's code or its caller may go on making it, is cut. Raises ValueError for arguments
    that do not fit together or do not fit the groups.
    """
    _check(model, groups, keep, ratio, round_to)
    kept = _kept(replace(groups, model=model), keep, ratio, round_to)
    small = removed(model, groups, kept)
    indices = {name: mask.nonzero().flatten() for name, mask in kept.items()}
    labelled = {model.get_parameter(weight.name) for weight in groups.weights}
    cut = [n for n, m in plain_recurrent("shrink", model).items() if labelled & set(m.parameters())]
    recurrent = [sum(_count(m.get_submodule(name)) for name in cut) for m in (model, small)]
    return small, ShrinkReport(
        kept=indices,
        sizes={f.name: (f.size, len(indices[f.name])) for f in groups.families},
        parameters=(_count(model), _count(small)),
        recurrent_parameters=(recurrent[0], recurrent[1]),
    )


def removed(model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model without the units that are not kept: {family name: bool [size]}.

    Every nn.LSTM with a labelled weight is an ISSLSTM there, and so on for each kind. What the
    model shares, the copy shares.
    """
    of_units = torch.cat([*(kept[f.name].cpu() for f in groups.families), all_of(1)])
    cut = _cut_parameters(model, groups, of_units)
    new = set(cut.values())
    masks = {
        cut[model.get_parameter(weight.name)]: (
            of_units[weight.row_units.long()], of_units[weight.column_units.long()]
        )
        for weight in groups.weights
    }  # fmt: skip
    small = copied(model, {id(parameter): smaller for parameter, smaller in cut.items()})
    for module in plain_recurrent("shrink", small).values():
        if new & set(module.parameters()):
            # In place, so that whatever refers to the module goes on to refer to it.
            rebuilt = _rebuilt(module)
            rebuilt.remember(_stayed(module, masks))
            module.__dict__, module.__class__ = rebuilt.__dict__, type(rebuilt)
    for linear in small.modules():
        if isinstance(linear, nn.Linear) and linear.weight in new:
            linear.in_features = linear.weight.shape[1]
    return small


def _check(model: nn.Module, groups: Groups, keep: Any, ratio: float | None, round_to: int) -> None:
    if keep is not None and ratio is not None:
        raise ValueError("shrink: expected keep or ratio, got both")
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if ratio is not None and not (is_number and 0 <= ratio <= 1):
        raise ValueError(f"shrink: expected ratio between 0 and 1, got {ratio}")
    if not isinstance(round_to, Integral) or isinstance(round_to, bool):
        raise ValueError(f"shrink: expected round_to to be an int, got {round_to!r}")
    if round_to < 1:
        raise ValueError(f"shrink: expected round_to >= 1, got {round_to}")
    plain_recurrent("shrink", model)
    names, expected_names = names_of_parameters(model), names_of_parameters(groups.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for labelled in groups.labelled:
        expected = (len(labelled.row_units),)
        if isinstance(labelled, LabelledWeight):
            expected += (len(labelled.column_units),)
        if shapes.get(labelled.name) != expected:
            raise ValueError(
                f"shrink: expected the model of the groups, with {labelled.name} of shape "
                f"{list(expected)}, got {list(shapes.get(labelled.name, ())) or 'none'}"
            )
        one, other = expected_names.get(labelled.name), names[labelled.name]
        if one != other:
            raise ValueError(
                "shrink: expected the model of the groups, with one parameter under "
                f"{', '.join(one or ['none'])}, got one under {', '.join(other)}"
            )


def names_of_parameters(model: nn.Module) -> dict[str, list[str]]:
    """{parameter name: all names of the same parameter}."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name: shared for shared in names.values() for name in shared}


def _kept(groups: Groups, keep: Any, ratio: float | None, round_to: int) -> dict[str, Tensor]:
    """{family name: bool [size]} of the units that stay."""
    wanted = {name: ~dead for name, dead in groups.dead().items()}
    if keep is not None:
        wanted = {family.name: all_of(family.size) for family in groups.families}
        for name, units in keep.items():
            if name not in wanted:
                raise ValueError(f"shrink: expected keep for {', '.join(wanted)}, got {name}")
            wanted[name] = _mask(units, len(wanted[name]), name)
    counts = {name: int(mask.sum()) for name, mask in wanted.items()}
    if ratio is not None:
        wanted = {family.name: ~all_of(family.size) for family in groups.families}
        # 1e-9: 0.29 * 100 is 28.999...
        counts = {f.name: f.size - int(ratio * f.size + 1e-9) for f in groups.families}
    for name, mask in wanted.items():
        counts[name] = min(-(-max(counts[name], 1) // round_to) * round_to, len(mask))
    for names in groups.tied:
        counts |= dict.fromkeys(names, max(counts[name] for name in names))
    if all(counts[name] == int(mask.sum()) for name, mask in wanted.items()):
        return wanted
    norms = GroupLasso(groups).norms()
    return {n: _first(counts[n], norms[n].cpu(), mask) for n, mask in wanted.items()}


def _first(count: int, norms: Tensor, wanted: Tensor) -> Tensor:
    """Mask of `count` units: the wanted ones, then those of largest norm, then of lowest index."""
    order = norms.argsort(descending=True, stable=True)
    order = order[wanted[order].int().argsort(descending=True, stable=True)]
    return ~all_of(len(norms)).index_fill(0, order[:count], False)


def all_of(size: int) -> Tensor:
    """A mask that keeps all units."""
    return torch.ones(size, dtype=torch.bool, device="cpu")


def _mask(units: Any, size: int, name: str) -> Tensor:
    """Mask [size] of units given as a mask or as indices."""
    given = torch.as_tensor(units, device="cpu")
    if given.dtype == torch.bool and given.shape == (size,):
        return given
    fits = given.dim() == 1 and given.dtype != torch.bool
    fits = fits and not (given.is_floating_point() or given.is_complex())
    if given.numel() > 0 and not (fits and bool(((given >= 0) & (given < size)).all())):
        raise ValueError(
            f"shrink: expected keep for {name} as a mask of {size} or indices below {size}, "
            f"got {units}"
        )
    indices = given.long()
    if len(set(indices.tolist())) < len(indices):
        raise ValueError(f"shrink: expected keep for {name} to name each unit once, got {units}")
    return ~all_of(size).index_fill(0, indices, False)


def _cut_parameters(
    model: nn.Module, groups: Groups, kept: Tensor
) -> dict[nn.Parameter, nn.Parameter]:
    """{parameter: the same without the units that go}; kept: bool [units + 1], at -1 True."""
    cut = {}
    for labelled in groups.labelled:
        parameter = model.get_parameter(labelled.name)
        values = parameter.detach()[kept[labelled.row_units.long()].to(parameter.device)]
        if isinstance(labelled, LabelledWeight):
            values = values[:, kept[labelled.column_units.long()].to(parameter.device)]
        cut[parameter] = nn.Parameter(values, parameter.requires_grad)
    return cut


def _stayed(
    module: Any, masks: Mapping[nn.Parameter, tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, ...]]:
    """For each layer and direction, for each state: bool [size before], True where a unit stayed.

    module: with its cut parameters; masks: of these, by rows and by columns.
    """
    cell, stayed = cell_of(module), []
    for names in module._all_weights:
        w_ih, w_hh = (module._parameters[name] for name in names[:2])
        rows, _ = masks.get(w_ih) or map(all_of, w_ih.shape)
        _, outputs = masks.get(w_hh) or map(all_of, w_hh.shape)
        stayed.append((outputs, rows[: len(rows) // cell.gates])[: len(cell.states)])
    return stayed


def _rebuilt(module: Any) -> Recurrent:
    """This package's module like `module`, with its parameters and of the sizes that these have."""
    cell, directions = cell_of(module), 1 + module.bidirectional
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    matrices = [  # w_ih, w_hh and w_hr
        [parameters[name] for name in names if parameters[name].dim() == 2]
        for names in module._all_weights
    ]
    sizes = {"hidden_size": [len(w_ih) // cell.gates for w_ih, *_ in matrices]}
    if cell.projects:
        sizes["proj_size"] = [sum(map(len, w_hr)) for _, _, *w_hr in matrices]
    kind: Any = class_of(module)
    options = kind.options_of(module) | {"input_size": matrices[0][0].shape[1]}
    for name, flat in sizes.items():
        options[name] = [flat[i : i + directions] for i in range(0, len(flat), directions)]
    # On meta: no storage and no random numbers, since the parameters follow.
    return cast(Recurrent, take_over(kind(**options, device="meta"), module, parameters))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
