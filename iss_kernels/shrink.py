# SPDX-License-Identifier: Apache-2.0
"""Takes units out of a model for good: a new, smaller model that gives the same answers.

Which units stay is decided per family; then every labelled weight loses the rows and columns of the
others, and every labelled vector their elements. Modules of torch.nn become this package's own
(nn.LSTM an ISSLSTM), which hold unequal sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from iss_kernels import budget as budgets
from iss_kernels import optimizers
from iss_kernels.accelerate import HOOK_TABLES, check_plain, take_over
from iss_kernels.arguments import Model, check_module
from iss_kernels.copying import copied, places
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups, Labelled, cell_of, plain_cells, plain_recurrent
from iss_kernels.recurrent import CELL_MODULES, class_of
from iss_kernels.states import States, cut_state
from iss_kernels.widths import set_number

# Which places along each dimension stayed, by the tensor that is new in a labelled one's place.
Masks: TypeAlias = dict[Tensor, list[Tensor]]


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did; str() is a table.

    kept: {family name: indices of the units that stayed, ascending}; sizes: {family name: (before,
    after)}; parameters and recurrent_parameters: (before, after), of the model and of its recurrent
    modules. stayed: {recurrent module: for each layer and direction, for each state, bool [width
    before], True for the units that stayed}.
    """

    kept: dict[str, Tensor]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    recurrent_parameters: tuple[int, int]
    stayed: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)

    def cut_state(self, hx: States, module: str | None = None) -> States:
        """A state of the width before, cut to the units that stayed.

        hx: as the recurrent module took it before: h, of an LSTM (h, c), each [L * D, B, H] (or
        L * D tensors [B, H]), of a cell [B, H]. module: its name in the model, which a report on
        one module alone does not need. Raises ValueError for another name or width.

        >>> import iss_kernels as iss
        >>> gru = torch.nn.GRU(4, 16, num_layers=2)
        >>> groups = iss.find_groups(gru, torch.zeros(3, 1, 4))
        >>> small, report = iss.shrink(gru, groups, keep={"l0": [1, 2]})
        >>> [h.shape[-1] for h in report.cut_state(torch.zeros(2, 1, 16))]
        [2, 16]
        """
        names = [*self.stayed]
        if module is None and len(names) == 1:
            (module,) = names
        if module not in self.stayed:
            raise ValueError(
                f"cut_state: expected module to be one of {', '.join(map(repr, names))}, "
                f"got {module!r}"
            )
        return cut_state(hx, self.stayed[module])

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


@torch.inference_mode(False)  # in which the new parameters could not be trained
def shrink(
    model: Model,
    groups: Groups,
    *,
    keep: Mapping[str, Tensor | Sequence[int] | Sequence[bool]] | None = None,
    ratio: float | None = None,
    budget: Mapping[str, float] | None = None,
    example: Any = None,
    round_to: int = 1,
    optimizer: Any = None,
) -> tuple[Model, ShrinkReport]:
    """A copy of the model without its dead units, and a report; the model itself stays as it is.

    groups: of this model or of one with the same parameters. By default the units go that
    `groups.dead()` names, which changes no answer. Instead, keep={family name: indices or bool
    mask} keeps those units (families not named stay whole), and ratio removes that fraction of each
    family, rounded down, smallest norm first: both whatever the weights are. Sizes are then rounded
    up to multiples of round_to, no further than the old size; a family keeps at least one unit, and
    those in `groups.tied` keep one common size. The units taken back are those of largest norm.

    budget={"parameters": n, "multiply-adds": n, "ms": t}, one or several of these, which all hold
    afterwards: parameters of the whole model; multiply-adds of one time step, the elements of the
    labelled weights; and the time of `prepare(small)` on this machine, with as many threads as
    torch has, called with `example` (as find_groups takes it, in the sizes that matter), the median
    of repeated runs. The dead units leave, then as many as it takes of all families together, in
    the order of

        sum of squares of the unit's weights / parameters that leave with the unit

    or multiply-adds, unless the budget is one of parameters alone. round_to and tied families hold.

    Every nn.LSTM that changes becomes an ISSLSTM, and so on for each kind; final states shrink, and
    are tuples of tensors where sizes differ (see ISSLSTM). An initial state of the width before,
    as the model's code or its caller may go on making it, is cut. Modules in `groups.full_width`
    put out zeros in the places of the units that left.

    optimizer: a torch.optim.Optimizer of the model, or several: each is moved over, to train the
    copy and no longer the model, so that learning rate schedulers and scalers that know it go on.
    Its state is cut along, if it is of the parameters' shape, as with SGD, Adam, RMSprop and
    Adagrad; its param_groups stay. Gradients do not come along, nor hooks of parameters: see
    `shrink_`.

    Raises ValueError for arguments that do not fit together or do not fit the groups, a budget that
    one unit in each family exceeds, and an optimiser whose state is of another shape, as
    Adafactor's.

    >>> import iss_kernels as iss
    >>> lstm = torch.nn.LSTM(4, 16, num_layers=2)  # whose last layer is the answer and stays
    >>> groups = iss.find_groups(lstm, torch.zeros(3, 1, 4))
    >>> small, report = iss.shrink(lstm, groups, budget={"parameters": 2000})
    >>> report.parameters, report.sizes
    ((3584, 1964), {'l0': (16, 7)})
    """
    kept = _chosen(model, groups, keep, ratio, budget, example, round_to)
    small = removed(model, groups, kept)
    new = {old: small.get_parameter(name) for name, old in model.named_parameters()}
    optimizers.move(optimizers.several(optimizer), model, new, _cut(model, groups, kept))
    before, stayed = _counts(model, groups), _all_stayed(model, groups, kept)
    return small, _report(groups, kept, before, _counts(small, groups), stayed)


@torch.inference_mode(False)
def shrink_(
    model: nn.Module,
    groups: Groups,
    *,
    optimizer: Any = None,
    lasso: GroupLasso | None = None,
    keep: Mapping[str, Tensor | Sequence[int] | Sequence[bool]] | None = None,
    ratio: float | None = None,
    budget: Mapping[str, float] | None = None,
    example: Any = None,
    round_to: int = 1,
) -> tuple[ShrinkReport, Groups]:
    """Shrink a model in place, so that its training goes on in a smaller, faster one.

    Returns the report, and the groups of the model as it is now: no call of find_groups is needed.
    Other arguments and errors: see `shrink`.

    >>> import iss_kernels as iss
    >>> lstm = torch.nn.LSTM(4, 16, num_layers=2)
    >>> optimizer = torch.optim.Adam(lstm.parameters())
    >>> groups = iss.find_groups(lstm, torch.zeros(3, 1, 4))
    >>> report, groups = iss.shrink_(lstm, groups, optimizer=optimizer, keep={"l0": [2, 5, 6]})
    >>> lstm
    ISSLSTM(4, [3, 16], num_layers=2)

    All modules stay the objects that they are, with their hooks; an nn.LSTM that changes becomes an
    ISSLSTM. Parameters that lose units give their place to new ones, with their gradients and
    hooks: take model.parameters() anew where you keep a list of them, and wrap the model in
    DistributedDataParallel anew. Carry no state over: start from none, or from one of the
    very first width, which is cut when it comes in.

    optimizer: as for `shrink`. After it state_dict() of model and optimiser are those of the small
    ones, and load there. lasso: the GroupLasso of these groups, which goes on with those that are
    left: its strength, steps and target stay. A moving average (EMA) of the weights shrinks with
    the former groups: `shrink_(average.module, groups, keep=report.kept)`.

    Where dead units leave and nothing but their weights is set to zero at every step, training goes
    on as it would have without, to rounding. (A norm of all gradients, which some clip, is smaller:
    it counted those of the dead.)

    Raises ValueError before anything changes, also for a parameter in a place where no other can be
    put: a tuple, a set, a key of a dict, a function that holds it.
    """
    kept = _chosen(model, groups, keep, ratio, budget, example, round_to)
    before, stayed = _counts(model, groups), _all_stayed(model, groups, kept)
    cut = _cut(model, groups, kept)
    cut_all = _cut_tensors(model, groups, kept).items()
    new = {old: its for old, its in cut_all if its.shape != old.shape}
    parameters = {
        old: its
        for old, its in new.items()
        if isinstance(old, nn.Parameter) and isinstance(its, nn.Parameter)
    }
    # All that may fail comes before all that changes the model.
    masks = _masks(model, groups, kept, new)
    full_width = [model.get_submodule(name) for name in groups.full_width]
    rebuilt = {
        module: _rebuilt(module, new, masks, module in full_width)
        for module in _recurrent(model)
        if new.keys() & set(module.parameters())
    }
    moved = optimizers.several(optimizer)
    held = places(model, new.keys(), but=moved)
    left = _left(groups, model, kept)
    if lasso is not None and not (
        isinstance(lasso, GroupLasso)
        and lasso.groups.model is model
        and lasso.groups.families == groups.families
    ):
        got = "that of others" if isinstance(lasso, GroupLasso) else f"a {type(lasso).__name__}"
        raise ValueError(f"shrink_: expected the lasso of these groups and this model, got {got}")
    optimizers.move(moved, model, parameters, cut)
    optimizers.hand_over(parameters, cut)
    for container, key in held:
        container[key] = new[container[key]]
    _fit(model, rebuilt, set(new.values()), groups, kept)
    if lasso is not None:
        lasso.go_on(left, _alive(groups, kept)[:-1])
    return _report(groups, kept, before, _counts(model, groups), stayed), left


def _counts(model: nn.Module, groups: Groups) -> tuple[int, int]:
    """Parameters of a model, and of those of its recurrent modules that have labelled weights."""
    labelled = {model.get_parameter(weight.name) for weight in groups.weights}
    cut = [module for module in _recurrent(model) if labelled & set(module.parameters())]
    return _count(model), sum(map(_count, cut))


def _all_stayed(
    model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]
) -> dict[str, list[tuple[Tensor, ...]]]:
    """{recurrent module that loses units: which of its units stay}, see `_stayed`."""
    masks = _masks(model, groups, kept, {})
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module]: _stayed(module, _own_parameters(module), masks)
        for module in _recurrent(model)
        if masks.keys() & set(module.parameters())
    }


def _report(
    groups: Groups,
    kept: Mapping[str, Tensor],
    before: tuple[int, int],
    after: tuple[int, int],
    stayed: dict[str, list[tuple[Tensor, ...]]],
) -> ShrinkReport:
    indices = {name: mask.nonzero().flatten() for name, mask in kept.items()}
    return ShrinkReport(
        kept=indices,
        sizes={f.name: (f.size, len(indices[f.name])) for f in groups.families},
        parameters=(before[0], after[0]),
        recurrent_parameters=(before[1], after[1]),
        stayed=stayed,
    )


class NoInputsError(ValueError):
    """All units left that a layer reads."""


def removed(
    model: Model, groups: Groups, kept: Mapping[str, Tensor], whole_too: bool = True
) -> Model:
    """A copy of the model without the units that are not kept: {family name: bool [size]}.

    Every nn.LSTM with a labelled weight is an ISSLSTM there, and so on for each kind; but with
    whole_too=False those that lose nothing. What the model shares, the copy shares.
    """
    cut = _cut_tensors(model, groups, kept)
    new = {its for old, its in cut.items() if whole_too or its.shape != old.shape}
    masks = _masks(model, groups, kept, cut)
    small = copied(model, {id(tensor): smaller for tensor, smaller in cut.items()})
    full_width = [small.get_submodule(name) for name in groups.full_width]
    rebuilt = {
        module: _rebuilt(module, {}, masks, module in full_width)
        for module in _recurrent(small)
        if new & set(module.parameters())
    }
    _fit(small, rebuilt, new, groups, kept)
    return small


def _recurrent(model: nn.Module) -> list[Any]:
    """The recurrent modules and cells that can be rebuilt."""
    return [*plain_recurrent("shrink", model, True).values(), *plain_cells(model).values()]


def _fit(
    model: nn.Module,
    rebuilt: Mapping[Any, Any],
    new: set[Tensor],
    groups: Groups,
    kept: Mapping[str, Tensor],
) -> None:
    """Make the modules fit their new parameters; rebuilt: {recurrent module: what it becomes}."""
    for module, its in rebuilt.items():
        # In place, so that whatever refers to the module, or to its hooks, goes on to refer to it.
        hooks = {name: vars(module)[name] for name in HOOK_TABLES}
        module.__dict__, module.__class__ = vars(its) | hooks, type(its)
    for module in model.modules():
        if new & {*module.parameters(recurse=False), *module.buffers(recurse=False)}:
            fit(module)
    for width in groups.widths:
        size = width.factor * int(kept[width.family].sum())
        set_number(model, width.module, width.place, size)


# {class of torch.nn: {attribute: (parameter or buffer, dimension)}}: sizes that parameters have.
_SIZES: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    nn.Bilinear: {
        "out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2),
    },
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0), "num_groups": ("weight", 0)},
}  # fmt: skip
_NORMS = (nn.modules.batchnorm._NormBase,)


def fit(module: nn.Module) -> None:
    """Set the sizes that a module of torch.nn keeps as attributes to those of its parameters."""
    own: Any = module
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        depthwise = module.groups == module.in_channels == module.out_channels
        module.groups = first if depthwise else module.groups
        rows, columns = (second, first) if module.transposed else (first, second)
        module.out_channels, module.in_channels = rows, first if depthwise else columns
    elif isinstance(module, _NORMS):
        own.num_features = len(module.running_mean if module.weight is None else module.weight)
    for kind, sizes in _SIZES.items():
        if isinstance(module, kind):
            for attribute, (name, dim) in sizes.items():
                setattr(own, attribute, getattr(module, name).shape[dim])


def _chosen(
    model: nn.Module,
    groups: Groups,
    keep: Any,
    ratio: float | None,
    budget: Any,
    example: Any,
    round_to: int,
) -> dict[str, Tensor]:
    """{family name: bool [size]} of the units that stay."""
    check_module("shrink", model)
    if not isinstance(groups, Groups):
        raise TypeError(f"shrink: expected the groups of find_groups, got {type(groups).__name__}")
    if keep is not None and not isinstance(keep, Mapping):
        raise TypeError(
            "shrink: expected keep to be {family name: units that stay}, got a "
            f"{type(keep).__name__}"
        )
    given = {"keep": keep, "ratio": ratio, "budget": budget}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"shrink: expected keep, ratio or budget, got {' and '.join(names)}")
    _check(model, groups, ratio, round_to)
    groups = replace(groups, model=model)
    if budget is None:
        return _kept(groups, keep, ratio, round_to)
    budgets.check(budget, example)
    return budgets.within(groups, budget, example, round_to, partial(removed, model, groups))


def _check(model: nn.Module, groups: Groups, ratio: float | None, round_to: int) -> None:
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if ratio is not None and not (is_number and 0 <= ratio <= 1):
        raise ValueError(f"shrink: expected ratio between 0 and 1, got {ratio}")
    if not isinstance(round_to, Integral) or isinstance(round_to, bool):
        raise ValueError(f"shrink: expected round_to to be an int, got {round_to!r}")
    if round_to < 1:
        raise ValueError(f"shrink: expected round_to >= 1, got {round_to}")
    names, expected_names = names_of_parameters(model), names_of_parameters(groups.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    for labelled in groups.labelled:
        expected = tuple(map(len, labelled.units))
        if shapes.get(labelled.name) != expected:
            raise ValueError(
                f"shrink: expected the model of the groups, with {labelled.name} of shape "
                f"{list(expected)}, got {list(shapes.get(labelled.name, ())) or 'none'}"
            )
        one, other = (of.get(labelled.name, []) for of in (expected_names, names))
        if one != other:
            raise ValueError(
                "shrink: expected the model of the groups, with one parameter under "
                f"{', '.join(one or ['none'])}, got one under {', '.join(other)}"
            )
        owner = labelled.name.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), nn.RNNBase):
            check_plain(model.get_submodule(owner), "shrink", owner or "the model")


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
        counts[name] = budgets.rounded(counts[name], len(mask), round_to)
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


def _alive(groups: Groups, kept: Mapping[str, Tensor]) -> Tensor:
    """Which units stay, by their ids, bool [units + 1]; the last, at -1, is what is of no unit."""
    return torch.cat([*(kept[family.name].cpu() for family in groups.families), all_of(1)])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _without(values: Tensor, labelled: Labelled, alive: Tensor) -> Tensor:
    """Values in the shape of a labelled parameter, without the units that are not alive."""
    for dim, units in enumerate(labelled.units):
        stay = alive[units.long()].nonzero().flatten()
        values = values.index_select(dim, stay.to(values.device))
    return values


def _cut(model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]) -> optimizers.Cut:
    """What takes the units that leave out of tensors that have the shape of a parameter."""
    alive, own = _alive(groups, kept), _tensors(model)
    labelled = {own[each.name]: each for each in groups.labelled}

    def cut(parameter: Tensor, values: Tensor) -> Tensor:
        its = labelled.get(parameter)
        return values if its is None else _without(values, its, alive)

    return cut


def _cut_tensors(
    model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    """{labelled parameter or buffer: the same without the units that are not kept}."""
    alive, own, cut = _alive(groups, kept), _tensors(model), {}
    for labelled in groups.labelled:
        old = own[labelled.name]
        new = _without(old.detach(), labelled, alive)
        is_parameter = isinstance(old, nn.Parameter)
        cut[old] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    return cut


def _left(groups: Groups, model: nn.Module, kept: Mapping[str, Tensor]) -> Groups:
    """The groups of a model that has only the units that are kept."""
    alive = _alive(groups, kept)
    ids = torch.where(alive, alive.cumsum(0) - 1, -1).int()
    ids[-1] = -1

    def left(units: Tensor) -> Tensor:
        return ids[units[alive[units.long()]].long()]

    families, start = [], 0
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    for family in groups.families:
        families.append(replace(family, start=start, size=int(kept[family.name].sum())))
        start = families[-1].units.stop
    return replace(
        groups,
        model=model,
        families=families,
        weights=[replace(one, units=tuple(map(left, one.units))) for one in groups.weights],
        vectors=[replace(one, units=tuple(map(left, one.units))) for one in groups.vectors],
        by_value=None if groups.by_value is None else groups.by_value[alive[:-1]],
        origin=torch.cat([none, *(its[kept[name]] for name, its in groups.kept.items())]),
    )


def _masks(
    model: nn.Module, groups: Groups, kept: Mapping[str, Tensor], new: Mapping[Tensor, Tensor]
) -> Masks:
    """Which places of the labelled tensors stayed."""
    alive, own = _alive(groups, kept), _tensors(model)
    masks = {}
    for labelled in groups.labelled:
        old = own[labelled.name]
        masks[new.get(old, old)] = [alive[units.long()] for units in labelled.units]
    return masks


def _own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module by name; one that two layers of it share, by both names."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _stayed(
    module: Any, parameters: Mapping[str, Tensor], masks: Masks
) -> list[tuple[Tensor, ...]]:
    """For each layer and direction, for each state: bool [size before], True where a unit stayed.

    parameters: the module's, new ones in the place of those that lost units.
    """
    cell, stayed = cell_of(module), []
    is_cell = isinstance(module, nn.RNNCellBase)
    for names in [("weight_ih", "weight_hh")] if is_cell else module._all_weights:
        w_ih, w_hh = (parameters[name] for name in names[:2])
        rows, _ = masks.get(w_ih) or map(all_of, w_ih.shape)
        _, outputs = masks.get(w_hh) or map(all_of, w_hh.shape)
        stayed.append((outputs, rows[: len(rows) // cell.gates])[: len(cell.states)])
    return stayed


def _rebuilt(module: Any, new: Mapping[Tensor, Tensor], masks: Masks, full_width: bool) -> Any:
    """This package's module like `module`, of the sizes that its parameters have.

    new: {parameter: the one in its place}, where it differs; masks: see `_masks`; full_width: see
    `Groups`. Raises NoInputsError for a module that would read nothing.
    """
    own = _own_parameters(module).items()
    parameters: dict[str, Any] = {name: new.get(one, one) for name, one in own}
    if any(p.dim() == 2 and not p.shape[1] for p in parameters.values()):
        raise NoInputsError(
            "shrink: expected units to leave an input to every layer that reads them, got an "
            f"{cell_of(module).name.upper()} without one"
        )
    # On meta: no storage and no random numbers, since the parameters follow.
    small: Any
    if isinstance(module, nn.RNNCellBase):
        sizes = (parameters["weight_ih"].shape[1], parameters["weight_hh"].shape[1])
        kind: Any = CELL_MODULES.get(type(module), type(module))
        options = {"nonlinearity": module.nonlinearity} if hasattr(module, "nonlinearity") else {}
        small = kind(*sizes, bool(module.bias), device="meta", **options)
    else:
        small = _layers_like(module, parameters)
    small = take_over(small, module, parameters)
    if full_width and not small.full_width:  # outside it stays as wide as it is now
        small.kept, small.full_width = None, True
    small.remember(_stayed(module, parameters, masks))
    return small


def _layers_like(module: Any, parameters: Mapping[str, Tensor]) -> nn.Module:
    """This package's layers like those of `module`, of the sizes of these parameters."""
    cell, directions = cell_of(module), 1 + module.bidirectional
    matrices = [  # w_ih, w_hh and w_hr
        [parameters[name] for name in names if parameters[name].dim() == 2]
        for names in module._all_weights
    ]
    sizes = {"hidden_size": [len(w_ih) // cell.gates for w_ih, *_ in matrices]}
    if cell.projects:
        sizes["proj_size"] = [sum(map(len, w_hr)) for _, _, *w_hr in matrices]
        sizes = sizes if any(sizes["proj_size"]) else {"hidden_size": sizes["hidden_size"]}
    kind: Any = class_of(module)
    options = kind.options_of(module) | {"input_size": matrices[0][0].shape[1]}
    for name, flat in sizes.items():
        by_layer = [flat[i : i + directions] for i in range(0, len(flat), directions)]
        alike = len(set(flat)) == 1 and len(sizes) == 1
        options[name] = flat[0] if alike else by_layer
    return cast(nn.Module, kind(**options, device="meta"))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
