# SPDX-License-Identifier: Apache-2.0
"""Takes units out of a model for good: a new, smaller model that gives the same answers.

Which units stay is decided per family; then every labelled weight loses the rows and columns of the
others, and every bias the elements of their gates. LSTMs become ISSLSTMs, which hold unequal sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups
from iss_kernels.lstm import ISSLSTM, take_over


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did; str() is a table.

    kept: {family name: indices of the units that stayed, ascending}; sizes: {family name: (before,
    after)}; parameters and lstm_parameters: (before, after), of the model and of its LSTMs.
    """

    kept: dict[str, Tensor]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    lstm_parameters: tuple[int, int]

    def __str__(self) -> str:
        totals = {"LSTM parameters": self.lstm_parameters, "all parameters": self.parameters}
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

    Every LSTM that changes becomes an ISSLSTM; h_n and c_n shrink, and come apart into tuples where
    sizes differ (see ISSLSTM). Raises ValueError for arguments that do not fit together or do not
    fit the groups.
    """
    groups = replace(groups, model=model)
    _check(groups, keep, ratio, round_to)
    kept = _kept(groups, keep, ratio, round_to)
    small = copy.deepcopy(model)
    new = _cut_parameters(small, groups, torch.cat(list(kept.values())))
    lstms: dict[nn.Module, nn.Module] = {}  # LSTM -> its successor
    for name, parameter in list(small.named_parameters(remove_duplicate=False)):
        owner_name, _, attribute = name.rpartition(".")
        owner = small.get_submodule(owner_name)
        if parameter not in new:
            continue
        if isinstance(owner, (nn.LSTM, ISSLSTM)):
            if owner not in lstms:
                lstms[owner] = _rebuilt(owner, new)
            continue
        setattr(owner, attribute, new[parameter])
        if isinstance(owner, nn.Linear):
            owner.in_features = new[parameter].shape[1]
    before = sum(_count(lstm) for lstm in lstms)
    for name, module in list(small.named_modules(remove_duplicate=False)):
        if name and module in lstms:
            parent, _, child = name.rpartition(".")
            setattr(small.get_submodule(parent), child, lstms[module])
    small = lstms.get(small, small)
    indices = {name: mask.nonzero().flatten() for name, mask in kept.items()}
    return small, ShrinkReport(
        kept=indices,
        sizes={f.name: (f.size, len(indices[f.name])) for f in groups.families},
        parameters=(_count(model), _count(small)),
        lstm_parameters=(before, sum(_count(lstm) for lstm in lstms.values())),
    )


def _check(groups: Groups, keep: Any, ratio: float | None, round_to: int) -> None:
    if keep is not None and ratio is not None:
        raise ValueError("shrink: expected keep or ratio, got both")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"shrink: expected ratio between 0 and 1, got {ratio}")
    if round_to < 1:
        raise ValueError(f"shrink: expected round_to >= 1, got {round_to}")
    shapes = {name: tuple(p.shape) for name, p in groups.model.named_parameters()}
    for weight in groups.weights:
        expected = (len(weight.row_units), len(weight.column_units))
        if shapes.get(weight.name) != expected:
            raise ValueError(
                f"shrink: expected the model of the groups, with {weight.name} of shape "
                f"{list(expected)}, got {list(shapes.get(weight.name, ())) or 'none'}"
            )


def _kept(groups: Groups, keep: Any, ratio: float | None, round_to: int) -> dict[str, Tensor]:
    """{family name: bool [size]} of the units that stay."""
    norms = {name: of_family.cpu() for name, of_family in GroupLasso(groups).norms().items()}
    wanted = {name: ~dead for name, dead in groups.dead().items()}
    for family in groups.families:
        if keep is not None:
            wanted[family.name] = torch.ones(family.size, dtype=torch.bool)
        elif ratio is not None:
            count = family.size - int(ratio * family.size + 1e-9)  # 0.29 * 100 is 28.999...
            wanted[family.name] = _first(count, norms[family.name])
    for name, units in (keep or {}).items():
        if name not in wanted:
            raise ValueError(f"shrink: expected keep for {', '.join(wanted)}, got {name}")
        wanted[name] = _mask(units, len(wanted[name]), name)
    counts = {
        name: min(-(-max(int(mask.sum()), 1) // round_to) * round_to, len(mask))
        for name, mask in wanted.items()
    }
    for names in groups.tied:
        counts |= dict.fromkeys(names, max(counts[name] for name in names))
    return {name: _first(counts[name], norms[name], mask) for name, mask in wanted.items()}


def _first(count: int, norms: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Mask of `count` units: the wanted ones, then those of largest norm, then of lowest index."""
    order = norms.argsort(descending=True, stable=True)
    if wanted is not None:
        order = order[wanted[order].int().argsort(descending=True, stable=True)]
    return torch.zeros(len(norms), dtype=torch.bool).index_fill(0, order[:count], True)


def _mask(units: Any, size: int, name: str) -> Tensor:
    """Mask [size] of units given as a mask or as indices."""
    given = torch.as_tensor(units).cpu()
    if given.dtype == torch.bool and given.shape == (size,):
        return given
    indices = given.long()
    if given.dtype == torch.bool or ((indices < 0) | (indices >= size)).any():
        raise ValueError(
            f"shrink: expected keep for {name} as a mask of {size} or indices below {size}, "
            f"got {units}"
        )
    return torch.zeros(size, dtype=torch.bool).index_fill(0, indices.flatten(), True)


def _cut_parameters(
    small: nn.Module, groups: Groups, kept: Tensor
) -> dict[nn.Parameter, nn.Parameter]:
    """{parameter of the copy: the same without the units that go}; kept: bool [units]."""
    new = {}
    kept = torch.cat([kept, torch.ones(1, dtype=torch.bool)])  # [-1]: of no unit
    for weight in groups.weights:
        parameter = small.get_parameter(weight.name)
        rows = kept[weight.row_units.long()].to(parameter.device)
        columns = kept[weight.column_units.long()].to(parameter.device)
        new[parameter] = parameter.detach()[rows][:, columns]
        owner_name, _, attribute = weight.name.rpartition(".")
        owner = small.get_submodule(owner_name)
        is_lstm = isinstance(owner, (nn.LSTM, ISSLSTM))
        if is_lstm and owner.bias and attribute.startswith("weight_hh_"):
            for kind in ("bias_ih", "bias_hh"):
                bias = owner.get_parameter(attribute.replace("weight_hh", kind))
                new[bias] = bias.detach()[rows]
    return {old: nn.Parameter(cut, old.requires_grad) for old, cut in new.items()}


def _rebuilt(old: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> ISSLSTM:
    """An ISSLSTM like the LSTM `old`, of the sizes that its new parameters have."""
    lstm: Any = old
    parameters = {n: new.get(p, p) for n, p in lstm.named_parameters(recurse=False)}
    hidden: list[list[int]] = []
    projected: list[list[int]] = []
    for layer in range(lstm.num_layers):
        names = [f"_l{layer}", f"_l{layer}_reverse"][: 1 + lstm.bidirectional]
        hidden.append([len(parameters["weight_hh" + name]) // 4 for name in names])
        projected.append([len(parameters.get("weight_hr" + name, ())) for name in names])
    rebuilt = ISSLSTM(
        parameters["weight_ih_l0"].shape[1],
        hidden,
        lstm.num_layers,
        lstm.bias,
        lstm.batch_first,
        bidirectional=lstm.bidirectional,
        proj_size=projected,
        device="meta",  # no storage, no random numbers: the parameters follow
    )
    return cast(ISSLSTM, take_over(rebuilt, lstm, parameters))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
