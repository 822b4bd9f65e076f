# SPDX-License-Identifier: Apache-2.0
"""Finds which weights leave together with each recurrent unit, by running the model.

Every output of a recurrent module carries labels, which name the unit of each element; so does
every parameter, whose rows and columns are units too until it shows whether they leave with
recurrent ones. While a copy of the model runs, each torch function does to labels what the table of
rules.py says, or keeps their units whole: nothing passes unseen. What was found is verified by
removing units from copies (verify.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from iss_kernels.arguments import Path, check_module, fresh, tensors
from iss_kernels.cells import Cell
from iss_kernels.copying import copied
from iss_kernels.groups import (
    Family,
    GroupError,
    Groups,
    Labelled,
    cell_of,
    kinds,
    plain_cells,
    plain_recurrent,
)
from iss_kernels.recurrent_cell import PARAMETERS
from iss_kernels.rules import (
    ANY,
    COPIES,
    JOINS,
    METADATA,
    NONE,
    SIZES,
    Call,
    Labels,
    apply,
    compact,
    in_columns,
    is_any,
    varies,
    words,
)
from iss_kernels.shrink import names_of_parameters
from iss_kernels.verify import IN_TRAINING, Experiment, call
from iss_kernels.widths import Width, numbers

# Frames of these are not the user's code.
LIBRARIES = tuple(os.path.join(FilePath(of).parent, "") for of in (torch.__file__, __file__))


def find_groups(
    model: nn.Module, example_inputs: Any, *, on_unknown: str = "raise", embedding: bool = False
) -> Groups:
    """Find every recurrent module in a model and every weight that reads their units.

    Recurrent modules are nn.LSTM, nn.GRU, nn.RNN, their cells, and this package's own.

    example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of
    keyword arguments; any values that take the model's usual path. A copy of the model runs on
    them, to follow the units; then copies that have lost units must give the answers that a whole
    one gives where these units are dead: in eval mode on the example, and with one row more along
    its first two dimensions if the model takes that; in training mode, without dropout, if the
    model draws no random numbers there. The model stays as it is.

    Units of two layers become one where the model adds or multiplies their outputs, compares them
    (attention scores), or hands one's final state to the other: they leave together. Families keep
    one common size (`Groups.tied`) where the answers change otherwise, as with y.chunk(2, -1) of
    both directions. (Final states may reach the output: they get as small as the units.)

    Where units reach a function that needs all of them, such as layer_norm, or that no rule covers,
    or the answers change when they are removed, the module keeps the width of its outputs and
    states (`Groups.full_width`) and gets smaller inside: the units that leave are zero for every
    input, since their own rows, columns and biases are (`Groups.by_value`), and it puts out zeros
    in their places. The initial state has to be zero there: absent, made of zeros, learned, or
    another module's that leaves along.

    `Groups.kept_whole` lists the families that cannot leave and why: their units are the model's
    own output, or full width does not help. It lists modules of subclasses too.

    A number in the model's own modules that turns out to be a width, such as self.hidden_size where
    states are made, changes with the units (`Groups.widths`): it is tried where the answers change
    otherwise, and taken where it is needed.

    embedding: the dimensions of every nn.Embedding are units too, of a family with its name: they
    leave where all that reads them is zero. (The paper leaves them out.) Those of an embedding that
    is the softmax' weight as well are the units of the layer that the softmax reads. An embedding
    with max_norm stays whole, since every dimension counts there.

    on_unknown: "raise" makes it an error if units stay whole since they reach a function that no
    rule covers, or if no unit can leave; "keep" keeps these units whole, all of them where need be.

    That takes some 20 forward passes, more where code rearranges units: a short example will do.

    Raises GroupError for such a function, which it names with the line of the model's code, or
    where no unit can leave; and for recurrent modules whose weights are computed (pruning,
    weight_norm) or whose forward was replaced.

    >>> import torch, iss_kernels as iss
    >>> gru = torch.nn.GRU(4, 8, num_layers=2)
    >>> print(iss.find_groups(gru, torch.randn(5, 2, 4)))
    family  units  read by
    l0          8  weight_hh_l0, weight_ih_l1
    kept whole: l1: its outputs are the model's own
    verified: on the example, and on one with a row more along dim 0 and 1
    """
    check_module("find_groups", model)
    if on_unknown not in ("raise", "keep"):
        raise ValueError(f'find_groups: expected on_unknown "raise" or "keep", got {on_unknown!r}')
    keep = on_unknown == "keep"
    recurrent = plain_recurrent("find_groups", model, keep) | plain_cells(model)
    others = {
        name: "its weights are computed, or it is of a subclass or has a forward of its own"
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name not in recurrent
    }
    if not recurrent and not (others and keep):
        raise GroupError(
            f"find_groups: expected a model with an {kinds()}, found none"
            + f" but {', '.join(others)}, of a subclass, whose own methods would be lost"
            * bool(others)
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise GroupError(
                "find_groups: expected a model that is neither scripted nor compiled, "
                f"but {name or 'it'} is"
            )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise GroupError(
            f"find_groups: expected parameters that have a shape, got {lazy[0]} without one: "
            "call the model once"
        )
    before = {
        name: "units have left it before"
        for name, module in recurrent.items()
        if getattr(module, "full_width", False)
    }
    full = dict(before)
    first: dict[str, _Stay] = {}  # why families would stay whole if none had full width
    never: set[str] = set()  # modules in which full width makes fewer units free
    free: set[str] = set()
    while True:
        tracer = _Tracer(copied(model), list(recurrent), example_inputs, full, embedding)
        groups = _verified(tracer, model, example_inputs)
        first = tracer.whole | first
        lost = {tracer.module_of(name) for name in tracer.whole.keys() & free}
        lost &= full.keys() - before.keys()
        free |= {member for family in groups.families for member in family.members}
        more = tracer.may_have_full_width(never | full.keys())
        if not (lost or more):
            lost = tracer.last_of_stuck(full.keys() - before.keys())
        if not (lost or more):
            break
        never |= lost
        full = {name: why for name, why in (more | full).items() if name not in lost}
    for name in tracer.whole:
        stay = first[name]
        if stay.unknown and not keep:
            names = ", ".join(other for other in tracer.whole if first[other] is stay)
            raise GroupError(
                f"find_groups: cannot follow the output of {names} through {stay.operation}: "
                f"{stay.why}"
            )
    whole = {name: str(first[name]) for name in tracer.whole}
    for name, stay in tracer.whole.items():
        if tracer.module_of(name) in full and str(stay) != whole[name]:
            whole[name] += (
                "; nor can they leave inside a layer that keeps its width, and whose hidden_size "
                f"gets smaller: {stay}"
            )
    if not groups.families and not keep:
        _refuse(whole)
    return replace(groups, kept_whole=whole | others)


def _verified(tracer: _Tracer, model: nn.Module, inputs: Any) -> Groups:
    """The groups that a tracer finds, without the families that fail in experiments."""
    tracer.run()
    groups = tracer.groups(model)
    states = {mode: tracer.returned_in(mode, model, inputs) for mode in (False, True)}
    experiment = Experiment(model, inputs, states, tracer.eps)
    while failure := experiment.failure(groups):
        culprits: list[str] = []
        for candidate in tracer.candidates(groups, experiment, culprits):
            if experiment.failure(candidate) is None:
                candidate = _without_other_numbers(candidate, experiment)
                return replace(candidate, verified=str(experiment))
        why = tracer.reason(groups, culprits, failure)
        for family in groups.families:
            if family.name in culprits:
                tracer.keep_family(family, why)
        groups = tracer.groups(model)
    return replace(groups, verified=str(experiment))


def _without_other_numbers(groups: Groups, experiment: Experiment) -> Groups:
    """Groups that hold, without the numbers that need not change: they are no widths."""
    size = len(groups.widths)
    while size > 0:  # parts first, since most of many numbers are none
        for start in reversed(range(0, len(groups.widths), size)):
            some = groups.widths[:start] + groups.widths[start + size :]
            fewer = replace(groups, widths=some)
            if experiment.failure(fewer) is None:
                groups = fewer
        size //= 2
    return groups


def _refuse(kept_whole: dict[str, str]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, why in kept_whole.items():
        if why != _NOT_RUN or set(kept_whole.values()) == {_NOT_RUN}:
            reasons.setdefault(why, []).append(name)
    parts = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    raise GroupError(
        "find_groups: expected units that can leave, but all have to stay; " + "; ".join(parts)
    )


# Why units stay whole, whatever is done outside of their module.
_OWN_OUTPUT = "its outputs are the model's own"
_NOT_RUN = "the example does not run it"
_AS_ONE = "all its units would have to leave together"


@dataclass(frozen=True)
class _Layout:
    """One layer and direction: the names of its parameters, and the ids of its units.

    Ids of cells [H] and of outputs [P], the same where nothing projects.
    """

    parameters: list[str]
    cells: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Stay:
    """Units that cannot leave: which, why, and whether for want of a rule."""

    units: Tensor
    operation: str
    why: str
    unknown: bool

    def __str__(self) -> str:
        through = f"it reaches {self.operation}, and " * bool(self.operation)
        return through + self.why


class _Tracer(TorchFunctionMode):
    """Runs a model and keeps the labels of its tensors; a `rules.Trace`."""

    def __init__(
        self,
        model: nn.Module,
        recurrent: list[str],
        inputs: Any,
        full: dict[str, str],
        embedding: bool,
    ) -> None:
        super().__init__()
        self.model, self.full = model, full  # modules that keep their width outside, and why
        self.inputs = fresh(inputs)  # the model may write into them
        self.shapes = {tensor.shape for tensor in tensors(self.inputs)}
        self.root = torch.empty(0, dtype=torch.int32, device="cpu")  # unit -> the one it joined
        self.whole: dict[str, _Stay] = {}  # families that stay whole
        # The places of outputs and states of full width have ids of their own, which stay: by the
        # first unit of a layer; and {id of such a place: the unit that it is the value of}.
        self.places: dict[int, Tensor] = {}
        self.unit_at: dict[int, int] = {}
        self.families: list[Family] = []  # of layers and directions, with their own ids
        self.layouts = {name: self._number_units(name) for name in recurrent}
        # Holding the tensors, which the model may replace, keeps their ids from others.
        self.named = [*model.named_buffers(remove_duplicate=False),
                      *model.named_parameters(remove_duplicate=False)]  # fmt: skip
        self.names = {id(tensor): name for name, tensor in reversed(self.named)}
        self.units: dict[str, list[Tensor]] = {}  # parameter -> the ids of each dimension
        self.embeddings = self._number_embeddings() if embedding else {}  # parameter -> its module
        self.read_dims: set[tuple[str, int]] = set()  # dimensions that units are multiplied with
        # id -> (tensor, labels); holding the tensor keeps its id from being given to another.
        self.known: dict[int, tuple[Tensor, Labels]] = {}
        self.elements: dict[Any, int] = {}  # where the elements of a known tensor are -> its id
        self.weights: dict[int, Tensor] = {}  # what is computed from parameters alone
        self.stays: list[_Stay] = []
        self.values: list[Tensor] = []  # units read by their value
        self.summed: list[Tensor] = []  # places of parameters that are multiplied with units
        self.states: dict[int, str] = {}  # id of a final state -> its module
        self.moved: dict[int, str] = {}  # id of a final state in another shape -> its module
        self.fed: set[str] = set()  # modules whose initial state is data
        self.looked_into: set[str] = set()  # modules whose final states some function reads
        self.stacked: dict[str, bool] = {}  # modules that ran -> whether h_n is one tensor
        self.inside = False
        self.operation = ""
        self.returned: list[Path] = []  # where the model returns final states
        self.by_position: list[tuple[str, Tensor]] = []  # functions that rearranged these units
        self.by_size: list[tuple[str, Tensor]] = []  # functions that told the size of these
        self.beside: list[Tensor] = []  # labels of tensors that a function put side by side
        self.called: set[nn.Module] = set()
        self.looked_up: set[str] = set()  # parameters that were used as embeddings
        self.eps = 0.0  # of the least precise floating dtype that was seen

    # -- Units

    def _new_units(self, size: int) -> Tensor:
        start = len(self.root)
        new = torch.arange(start, start + size, dtype=torch.int32, device="cpu")
        self.root = torch.cat([self.root, new])
        return new

    def _number_units(self, name: str) -> list[list[_Layout]]:
        """Give ids to the units of a module: a layout for each [layer][direction]."""
        module: Any = self.model.get_submodule(name)
        if isinstance(module, nn.RNNCellBase):
            units = self._add_family(name, name, module.hidden_size)
            names = [*PARAMETERS[: 4 if module.bias else 2]]
            return [[_Layout(names, units, units)]]
        cell, directions = cell_of(module), 1 + module.bidirectional
        layouts: list[list[_Layout]] = [[] for _ in range(module.num_layers)]
        for index, parameters in enumerate(module._all_weights):
            layer, direction = divmod(index, directions)
            shapes = [getattr(module, parameter).shape for parameter in parameters]
            projects = sum(len(shape) == 2 for shape in shapes) > 2  # w_ih, w_hh and w_hr
            family = f"{name}.l{layer}{'_reverse' * direction}".removeprefix(".")
            (rows, _), (_, width), *_ = shapes
            outputs = cells = self._add_family(
                family + ".cell" * projects, name, rows // cell.gates
            )
            if projects:
                outputs = self._add_family(family + ".output", name, width)
            layouts[layer].append(_Layout(parameters, cells, outputs))
        return layouts

    def _number_embeddings(self) -> dict[str, str]:
        """Give ids to the dimensions of the embeddings: {parameter: module}."""
        found: dict[str, tuple[str, Tensor]] = {}
        for name, module in self.model.named_modules():
            if type(module) is nn.Embedding and module.max_norm is None:
                weight = self.names.get(id(module.weight))
                if weight is not None and weight not in found:
                    found[weight] = (name, self._add_family(name, name, module.embedding_dim))
        for weight, (_, units) in found.items():
            rows = self.model.get_parameter(weight).size(0)
            self.units[weight] = [self._new_units(rows) if rows > 1 else _none(rows), units]
        return {weight: name for weight, (name, _) in found.items()}

    def _add_family(self, name: str, module: str, size: int) -> Tensor:
        units = self._new_units(size)
        self.families.append(Family(name, module, int(units[0]) if size else 0, size))
        return units

    def module_of(self, family: str) -> str:
        """The module of a family."""
        return next(own.module for own in self.families if own.name == family)

    def may_have_full_width(self, but: Set[str]) -> dict[str, str]:
        """{module: why}: modules with families that would be free if it kept its width outside."""
        found: dict[str, str] = {}
        fixed = {
            self.module_of(n) for n, s in self.whole.items() if s.why in (_OWN_OUTPUT, _NOT_RUN)
        }
        for name, stay in self.whole.items():
            module = self.module_of(name)
            if module in self.layouts and module not in fixed | but:
                found.setdefault(module, str(stay))
        return found

    def last_of_stuck(self, modules: Set[str]) -> set[str]:
        """Of several of these modules that stay whole together, the one that ran last.

        Without it the others may be free, as an encoder whose decoder asks for the class nn.LSTM.
        """
        together: dict[int, set[str]] = {}
        for name, stay in self.whole.items():
            together.setdefault(id(stay), set()).add(self.module_of(name))
        order = list(self.stacked)
        stuck = [those & modules for those in together.values() if len(those & modules) > 1]
        return {max(those, key=order.index) for those in stuck[:1]}

    def _outside(self, name: str, index: int, which: int, units: Tensor) -> Tensor:
        """Labels of the output or state of a layer and direction of a module."""
        if name not in self.full or len(units) == 0:
            return units
        start = int(units[0])
        if start not in self.places:
            kept = self._kept_inside(name)
            at = (
                torch.arange(len(units), device="cpu")
                if kept is None
                else kept[index][which].units.cpu()
            )
            width = len(units) if kept is None else kept[index][which].before
            self.places[start] = self._new_units(width)
            self.unit_at |= zip(self.places[start][at].tolist(), units.tolist(), strict=True)
            why = f"it meets the output of {name or 'the model'}, which keeps its width"
            self.stays.append(_Stay(self.places[start], "", why, False))
        return self.places[start]

    def _kept_inside(self, name: str) -> Any:
        """Which units of a module stayed, if it kept its width when the others left."""
        module: Any = self.model.get_submodule(name)
        return module.kept if getattr(module, "full_width", False) else None

    def _inside(self, labels: Tensor) -> Tensor:
        """Labels with units for the places of full width."""
        flat = [self.unit_at.get(unit, unit) for unit in labels.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int32, device="cpu").view(labels.shape)

    def _dims(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Ids along each dimension of a parameter or buffer; none along one of size 1."""
        if name not in self.units:
            self.units[name] = [
                self._new_units(size) if size > 1 else _none(size) for size in tensor.shape
            ]
        return self.units[name]

    # -- What rules ask and tell

    def labels(self, tensor: Any) -> Labels:
        """The labels of a tensor; none for data."""
        if not isinstance(tensor, Tensor):
            return []
        same = self.elements.get(_elements(tensor))  # as Variable(tensor) makes one
        for one in (id(tensor), same):
            if one in self.known:
                return self.known[one][1]
        name = self.names.get(id(tensor))
        if name is None or not tensor.is_floating_point():
            return []
        count = tensor.dim()
        return [
            units.view(-1, *[1] * (count - 1 - dim)).expand(*[1] * dim, *[-1] * (count - dim))
            for dim, units in enumerate(self._dims(name, tensor))
            if len(units) > 1
        ]

    def label(self, tensor: Tensor, labels: Iterable[Tensor]) -> None:
        """Give a tensor its labels, with as many dimensions as it has."""
        own = [one.reshape((1,) * (tensor.dim() - one.dim()) + one.shape) for one in labels]
        own = [one for one in own if bool((one != NONE).any())]
        if tensor.numel() > 0:
            for one in own:
                one.expand(tensor.shape)  # RuntimeError for a rule whose labels do not fit
        if own or id(tensor) in self.known:
            self.known[id(tensor)] = (tensor, own)
            self.elements[_elements(tensor)] = id(tensor)

    def unite(self, one: Tensor, two: Tensor, why: str) -> Tensor:
        """Join units place by place."""
        one, two = torch.broadcast_tensors(one, two)  # type: ignore[no-untyped-call]
        result = torch.maximum(one, two)
        pairs = torch.stack([one.flatten(), two.flatten()])
        both = (pairs >= 0).all(0)
        alone = ((pairs >= 0).any(0)) & (pairs == NONE).any(0)
        if bool(alone.any()):
            self.keep_whole(pairs[:, alone].amax(0), why)
        joined = pairs[:, both].long()
        roots = self.root[joined]
        differ = roots[0] != roots[1]
        if bool(differ.any()):
            for a, b in roots[:, differ].unique(dim=1).T.tolist():  # type: ignore[no-untyped-call]
                a, b = self._find(a), self._find(b)
                if a != b:
                    self.root[max(a, b)] = min(a, b)
            while bool((self.root[self.root.long()] != self.root).any()):
                self.root = self.root[self.root.long()]
        return result

    def _find(self, unit: int) -> int:
        while int(self.root[unit]) != unit:
            unit = int(self.root[unit])
        return unit

    def read(self, labels: Tensor) -> None:
        """These units are read by their value."""
        self.values.append(labels.flatten())

    def multiplied(self, labels: Tensor) -> None:
        """These places of a parameter are multiplied with units."""
        self.summed.append(labels.flatten())

    def keep_whole(self, labels: Tensor, why: str, unknown: bool = False) -> None:
        """These units cannot leave."""
        units = labels.flatten()
        units = units[units >= 0]
        if len(units):
            self.stays.append(_Stay(units, self._place(), why, unknown))

    def is_weight(self, tensor: Any) -> bool:
        """Whether a tensor is computed from parameters alone."""
        return id(tensor) in self.weights or id(tensor) in self.names

    def keep_family(self, family: Family, why: str) -> None:
        """Keep the units of a found family whole."""
        for own in self.families:
            if own.name in family.members:
                self.stays.append(_Stay(_ids(own), "", why, False))

    def _place(self) -> str:
        """The operation, and the line of the user's code that called it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(LIBRARIES) and not file.startswith("<"):
                return f"{self.operation} ({FilePath(file).name}:{frame.f_lineno})"
            frame = frame.f_back
        return self.operation

    # -- The run

    def run(self) -> None:
        """Run the model on the example inputs and note which units its own output holds."""
        for name in self.layouts:
            # Within the user's own hooks, so that these are followed like the rest of the model;
            # in the place of forward, which a wrapper may call without hooks.
            module: Any = self.model.get_submodule(name)
            module.forward = partial(self._run_recurrent, name, module, module.forward)
        for module in self.model.modules():
            module.register_forward_pre_hook(lambda module, _: self.called.add(module))
        with self:
            output = call(self.model, self.inputs)
        for name in self.layouts:
            del self.model.get_submodule(name).forward  # which holds this tracer
        self.operation = ""
        for path, tensor in output.items():
            # One that came in as data goes out to come in again, in whatever shape.
            of, moved = self.states.get(id(tensor)), self.moved.get(id(tensor))
            if of in self.full:
                self.looked_into.add(of)
            elif of is not None or moved in self.fed - self.full.keys():
                self.returned.append(path)
                continue
            for labels in self.labels(tensor):
                units = labels[labels >= 0]
                self.stays.append(_Stay(units, "", _OWN_OUTPUT, False))
        for held in (self.known, self.elements, self.weights):  # all that the run computed
            held.clear()

    def returned_in(self, training: bool, model: nn.Module, inputs: Any) -> list[Path]:
        """Where the model returns final states in a mode, in which it may return more or less."""
        if not self.returned or training == model.training:
            return self.returned
        other = copied(model)
        other.train(training)
        tracer = _Tracer(other, [*self.layouts], inputs, self.full, False)
        try:
            tracer.run()
        except Exception:  # the experiments say so where it matters
            return self.returned
        return tracer.returned

    def groups(self, model: nn.Module) -> Groups:
        """What was found, with new ids for the units that can leave."""
        found = self._blocks()
        # Places of units: the last is of what is of none.
        renumber = _none(len(self.root) + 1)
        families: list[Family] = []
        for members, roots in found.items():
            start = families[-1].units.stop if families else 0
            names = tuple(self.families[i].name for i in members)
            # One that is in this block alone names it best.
            alone = [n for i, n in zip(members, names, strict=True)
                     if sum(i in block for block in found) == 1]  # fmt: skip
            name = next(iter(alone), " = ".join(names))
            families.append(
                Family(name, self.families[members[0]].module, start, len(roots), names)
            )
            renumber[roots.long()] = _ids(families[-1])
        of_unit = renumber[torch.cat([self.root, _none(1)]).long()]
        values = torch.cat([_none(0), *self.values, *self._seen_in_full_width()])
        values = of_unit[values[values >= 0].long()]
        count = sum(family.size for family in families)
        read = torch.zeros(count + 1, dtype=torch.bool, device="cpu")
        read[values[values >= 0].long()] = True
        weights: list[Labelled] = []
        vectors: list[Labelled] = []
        shared = names_of_parameters(model)
        order = [*model.named_parameters(), *model.named_buffers()]
        parameters = {name for name, _ in model.named_parameters()}
        summed = torch.cat([_none(0), *self.summed])
        summed = summed[summed >= 0]
        for name, tensor in order:
            if name not in self.units:
                continue
            units = tuple(of_unit[units.long()] for units in self.units[name])
            if not units or bool((torch.cat(units) < 0).all()):
                continue
            self._check_sharing(shared.get(name, [name]))
            reads = tuple(
                dim for dim, own in enumerate(self.units[name])
                if (name, dim) in self.read_dims or bool(torch.isin(own, summed).any())
            )  # fmt: skip
            penalised = tensor.dim() > 1 or bool(read[units[0].long()].any())
            is_weight = name in parameters and penalised
            (weights if is_weight else vectors).append(Labelled(name, units, reads))
        tied = []
        for alike in self._read_as_one():
            own = [family.name for family in families if set(family.members) & set(alike)]
            tied += [own] if len(own) > 1 and own not in tied else []
        free = {self.module_of(member) for family in families for member in family.members}
        return Groups(
            model, families, weights, tied, vectors,
            by_value=read[:-1] if bool(read.any()) else None,
            full_width={name: why for name, why in self.full.items() if name in free},
        )  # fmt: skip

    def _seen_in_full_width(self) -> Iterator[Tensor]:
        """Units of modules of full width whose value is seen outside."""
        for name in self.full:
            layers = self.layouts[name]
            for layer in layers if name in self.looked_into else layers[-1:]:
                for layout in layer:
                    yield layout.outputs
                    if name in self.looked_into:
                        yield layout.cells

    def _blocks(self) -> dict[tuple[int, ...], Tensor]:
        """{families that share units: these units}, of those that can leave; sets `whole`."""
        owners: dict[int, list[int]] = {}  # unit -> the families that have it
        roots = [self.root[_ids(family).long()] for family in self.families]
        for i, units in enumerate(roots):
            for unit in dict.fromkeys(units.tolist()):
                owners.setdefault(unit, []).append(i)
        blocks: dict[tuple[int, ...], list[int]] = {}
        for unit, members in owners.items():
            blocks.setdefault(tuple(members), []).append(unit)
        why: dict[tuple[int, ...], _Stay] = {}
        for stay in self.stays:
            for unit in set(self.root[stay.units.long()].tolist()) & owners.keys():
                block = tuple(owners[unit])
                if block not in why or (stay.unknown and not why[block].unknown):
                    why[block] = stay
        for block, its in blocks.items():
            if any(self.families[i].module not in self.stacked for i in block):
                why.setdefault(block, _Stay(_none(0), "", _NOT_RUN, False))
            if len(its) == 1 and all(self.families[i].size > 1 for i in block):
                why.setdefault(block, _Stay(_none(0), "", _AS_ONE, False))
        for names in self._read_as_one():
            those = [b for b in blocks if any(self.families[i].name in names for i in b)]
            # States that are apart since sizes differ would become one tensor if these got equal.
            reason = next((why[block] for block in those if block in why), None)
            if reason is None and not self.stacked[self.families[those[0][0]].module]:
                reason = _Stay(_none(0), "", "its states are read apart from each other", False)
            if reason is not None:
                for block in those:
                    why.setdefault(block, reason)
        self.whole = {self.families[i].name: stay for block, stay in why.items() for i in block}
        return {
            block: torch.tensor(units, dtype=torch.int32, device="cpu")
            for block, units in blocks.items() if block not in why
        }  # fmt: skip

    def _check_sharing(self, names: list[str]) -> None:
        """All modules that share a weight which leaves in part must have run, to be followed."""
        for other in names if len(names) > 1 else ():
            owner = self.model.get_submodule(other.rpartition(".")[0])
            # A function may have used an embedding's weight without its module.
            looked_up = isinstance(owner, nn.Embedding) and names[0] in self.looked_up
            if owner not in self.called and not looked_up:
                raise GroupError(
                    f"find_groups: cannot follow {' or '.join(names)}, which is one parameter: the "
                    f"example does not run the module of {other}"
                )

    def candidates(
        self, groups: Groups, experiment: Experiment, culprits: list[str]
    ) -> Iterator[Groups]:
        """Groups that may hold where these do not, with ever more sizes that are tied.

        At first those of the parts of a tensor, as chunk makes them; then those of all layers and
        directions, as code does that reads rnn.hidden_size; then units of these parts that leave
        together; then numbers that change with the units whose widths they may be. culprits: filled
        with the families that fail alone.
        """
        places = [*(labels for _, labels in self.by_position), *self.beside]
        sets = [set(self._names_of(labels, groups)) for labels in places]
        by_module: dict[str, set[str]] = {}
        for family in groups.families:
            by_module.setdefault(family.module, set()).add(family.name)
        for more in (sets, [*sets, *by_module.values()]):
            if (tied := _tied(groups, more)) != groups.tied:
                yield replace(groups, tied=tied)
        before = self.root.clone()
        if self._unite_families(_tied(groups, sets)):
            yield self.groups(groups.model)
            self.root = before
        culprits += experiment.culprits(groups)
        sizes = {f.name: f.size for f in groups.families if f.size > 1}
        widths, alike = [], {}
        for module, place, value in numbers(groups.model):
            for factor in range(1, 9):
                names = [n for n, size in sizes.items() if size * factor == value and n in culprits]
                if names:
                    widths.append(Width(module, place, names[0], factor))
                    alike[value // factor] = set(names)
                    break
        if not widths:
            return
        # All of them; those of one name or in one module; all but one.
        subsets = [widths]
        for key in (lambda w: w.place[-1], lambda w: w.module, str):
            for value in dict.fromkeys(map(key, widths)):
                subsets.append([width for width in widths if key(width) == value])
        subsets += [[w for w in widths if w is not one] for one in widths]
        subsets = [list(s) for s in dict.fromkeys(tuple(s) for s in subsets if s)]
        layers = [by_module[f.module] for f in groups.families if f.name in culprits]
        every = [_tied(groups, [*alike.values(), *more]) for more in ([], layers, sets)]
        for tied in [t for i, t in enumerate(every) if t not in every[:i]]:
            for subset in subsets[:_MOST_SUBSETS]:
                yield replace(groups, tied=tied, widths=subset)

    def _unite_families(self, tied: list[list[str]]) -> bool:
        """Make unit k of each of these families one, as code needs that puts them in turns."""
        start = {family.name: family for family in self.families}
        for first, *others in tied:
            for name in others:
                if first in start and name in start:
                    self.unite(_ids(start[first]), _ids(start[name]), "")
        return bool(tied)

    def reason(self, groups: Groups, families: list[str], failure: str) -> str:
        """Why the units of families stay whole that cannot be removed."""
        rearranged, measured = (
            ", ".join(
                dict.fromkeys(
                    name
                    for name, units in calls
                    if set(self._names_of(units, groups)) & set(families)
                )
            )
            for calls in (self.by_position, self.by_size)
        )
        failure = f"a copy without some of its units {failure}"
        if IN_TRAINING in failure:
            return failure
        if rearranged:
            number = f"computes with its {measured} or " * bool(measured)
            return (
                f"it reaches {rearranged}, and {failure}, as where code {number}picks units by "
                "position"
            )
        hint = f"a number computed from its {measured}, " * bool(measured)
        return (
            f"it reaches the model's answers in a way that no torch function shows ({hint}a width "
            f"written into the code, vmap, a C++ extension, random numbers of its own?): {failure}"
        )

    def _read_as_one(self) -> Iterator[list[str]]:
        """Names of families whose states are rows of one tensor that the model's code reads."""
        for module in sorted(self.looked_into - self.full.keys()):
            layouts = [layout for layer in self.layouts[module] for layout in layer]
            if len(layouts) > 1:
                cells = frozenset(int(layout.cells[0]) for layout in layouts)
                outputs = frozenset(int(layout.outputs[0]) for layout in layouts)
                for starts in dict.fromkeys((cells, outputs)):
                    yield [family.name for family in self.families if family.start in starts]

    def _names_of(self, labels: Tensor, groups: Groups) -> list[str]:
        """Names of the found families with units among these labels."""
        units = labels.flatten()
        roots = set(self.root[units[units >= 0].long()].tolist())
        members = [f.name for f in self.families
                   if roots & set(self.root[_ids(f).long()].tolist())]  # fmt: skip
        return [f.name for f in groups.families if set(f.members) & set(members)]

    # -- Recurrent modules

    def _run_recurrent(
        self, name: str, module: Any, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The module's forward, between labels for its weights and labels for what it returns."""
        if self.inside:  # a module may call itself, as for `lengths`
            return forward(*args, **kwargs)
        self.inside = True
        self.operation = name or f"the {type(module).__name__}"
        try:
            self._enter(name, module, *args, **kwargs)
            result = forward(*args, **kwargs)
            if isinstance(module, nn.RNNCellBase):
                ((layout,),) = self.layouts[name]
                for which, state in enumerate(tensors(result)):
                    self.label(state, [self._outside(name, 0, which, layout.cells)])
                    if name in self.fed:
                        self.states[id(state)] = name
                self.stacked[name] = True
            else:
                self._leave(name, cell_of(module), result)
        finally:
            self.inside = False
        return result

    def _enter(
        self, name: str, module: Any, input: Any, hx: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        layouts = [layout for layer in self.layouts[name] for layout in layer]
        if hx is not None:
            if all(not self.labels(state) for state in tensors(hx)):
                self.fed.add(name)
            for which, state in enumerate(hx if len(cell_of(module).states) > 1 else (hx,)):
                self._enter_state(
                    name, which, state,
                    [layout.cells if which else layout.outputs for layout in layouts],
                )  # fmt: skip
        for option in tensors((args, kwargs)):  # lengths and resets
            for one in self.labels(option):
                self.keep_whole(one, "it says there which steps are taken", unknown=True)
        x = input[0] if isinstance(input, PackedSequence) else input
        columns = self._columns(x)
        for layer in self.layouts[name]:
            for layout in layer:
                w_ih, w_hh, *others = [
                    (f"{name}.{parameter}".removeprefix("."), getattr(module, parameter))
                    for parameter in layout.parameters
                ]
                self._tie(w_ih, _repeated(layout.cells, len(w_ih[1])), columns)
                self._tie(w_hh, _repeated(layout.cells, len(w_hh[1])), layout.outputs)
                for other in others:  # biases, and a projection
                    if other[1].dim() == 1:
                        self._tie(other, _repeated(layout.cells, len(other[1])))
                    else:
                        self._tie(other, layout.outputs, layout.cells)
            columns = torch.cat([layout.outputs for layout in layer])
        self.called.add(module)

    def _tie(self, parameter: tuple[str, Tensor], *units: Tensor) -> None:
        """Join the dimensions of a parameter with these units."""
        name = self.names.get(id(parameter[1]), parameter[0])
        if name not in self.units:
            # Columns of the input alone get ids of their own, as do those of zeros.
            self.units[name] = [
                self._new_units(len(one))
                if bool((one == NONE).all())
                else torch.where(one == ANY, self._new_units(len(one)), one)
                for one in units
            ]
        if len(units) > 1:
            self.read_dims.add((name, 1))
        for own, one in zip(self.units[name], units, strict=True):
            self.unite(own, one, "it is multiplied there with what does not leave")

    def _enter_state(self, name: str, which: int, state: Any, units: list[Tensor]) -> None:
        """A state that is handed over has the units of its module; others are cut there.

        Where the module keeps its width outside, and its cell carries the state on, it has to be
        zero in the places of the units that leave: another's that are, or made of zeros.
        """
        module: Any = self.model.get_submodule(name)
        cell = cell_of(module)
        zero = name in self.full and cell.states[which] == cell.carries
        parts = [state] if isinstance(state, Tensor) else tensors(state)
        rows: list[Tensor] = []
        for part in parts:
            labels = self.labels(part)
            if zero and (is_any(labels) and bool(part.any()) or not labels):
                for own in units:
                    self.keep_whole(own, f"{cell.carries}_0 need not be zero")
            labels = [one for one in labels if not bool((one == ANY).all())]
            if not labels:
                return
            if zero:
                labels = [self._inside(one) for one in labels]
            elif any(unit in self.unit_at for one in labels for unit in one.flatten().tolist()):
                return  # of full width: it is cut there
            for one in labels:
                if varies(one) & {-2} or varies(one) - {-1, -3}:
                    for each in (one, *units * zero):
                        self.keep_whole(each, "it is an initial state there")
                    return
            one = labels[-1].expand(*labels[-1].shape[:-1], part.shape[-1])
            one = one.reshape(-1, part.shape[-1])
            rows += [*one.expand(part.size(0) if part.dim() == 3 else 1, -1)]
        recurrent = sum(family.size for family in self.families)
        if len(rows) > 1 and len({tuple(self.root[r.long()].tolist()) for r in rows}) < len(rows):
            soft = all(bool((self.root[r.long()] >= recurrent).all()) for r in rows)
            if soft:  # one source for all layers, which each cuts its own way
                for row in rows:
                    self.keep_whole(row, "it is the initial state of several layers")
                return
        kept = self._kept_inside(name) if zero else None
        if kept is not None:
            stayed = [states[which] for states in kept]
            if [*map(len, rows)] == [its.before for its in stayed]:
                rows = [row[its.units.cpu()] for row, its in zip(rows, stayed, strict=True)]
        for row, own in zip(rows, units, strict=False):
            if len(row) == len(own):
                self.unite(row, own, "it is an initial state there")
        fits = list(map(len, rows)) == list(map(len, units))
        if zero and not fits:
            for own in units:
                self.keep_whole(own, "its initial state is of another form")

    def _columns(self, tensor: Tensor) -> Tensor:
        """Labels of the last dimension, [C] int32."""
        for one in in_columns(self, self.labels(tensor)):
            if varies(one):
                return one.flatten()
            if bool((one == ANY).all()):
                return torch.full((tensor.shape[-1],), ANY, dtype=torch.int32, device="cpu")
        return _none(tensor.shape[-1])

    def _leave(self, name: str, cell: Cell, result: Any) -> None:
        y, final = result
        y = y[0] if isinstance(y, PackedSequence) else y
        layouts = [layout for layer in self.layouts[name] for layout in layer]
        outputs = [self._outside(name, i, 0, each.outputs) for i, each in enumerate(layouts)]
        self.label(y, [torch.cat(outputs[-len(self.layouts[name][-1]) :])])
        h_n, *others = final if len(cell.states) > 1 else (final,)
        self._set_state(h_n, outputs)
        for state in others:
            cells = [self._outside(name, i, 1, each.cells) for i, each in enumerate(layouts)]
            self._set_state(state, cells)
        self.states |= {id(state): name for state in tensors(final)}
        self.stacked[name] = isinstance(h_n, Tensor)

    def _set_state(self, state: Any, units: list[Tensor]) -> None:
        """Label one tensor [L * D, B, H], or as many of [B, H]."""
        if isinstance(state, Tensor):
            rows = torch.stack(units)
            self.label(state, [compact(rows.view(len(rows), *[1] * (state.dim() - 2), -1))])
            return
        for part, own in zip(state, units, strict=True):
            self.label(part, [own])

    # -- Torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and label what it returns."""
        name, kwargs = _name(func), kwargs or {}
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        result = func(*args, **kwargs)
        if name not in METADATA:
            dtypes = {tensor.dtype for tensor in tensors(result) if tensor.is_floating_point()}
            self.eps = max([self.eps, *(torch.finfo(dtype).eps for dtype in dtypes)])
        if self.inside:
            return result
        given = tensors((args, kwargs))
        if name in METADATA:
            self.looked_into.update(self.states[id(t)] for t in given if id(t) in self.states)
            if name in SIZES and self.labels(args[0]):
                self.by_size += [(name, labels) for labels in self.labels(args[0])]
            return result
        if name == "embedding":
            used = {self.names[id(t)] for t in given if id(t) in self.names}
            self.looked_up |= used
            self.stacked |= {self.embeddings[name]: True for name in used & self.embeddings.keys()}
        for tensor in given:
            of = self.states.get(id(tensor))
            hidden = name in COPIES if of in self.full else _takes_one(name, args)
            if of is not None and not hidden:
                self.looked_into.add(of)
        before = [self.labels(tensor) for tensor in given]
        self.operation = name
        one = Call(name, func, args, kwargs, result)
        try:
            apply(self, one)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:
            for tensor in given:
                for labels in self.labels(tensor):
                    self.keep_whole(labels, f"its rule failed ({error})", unknown=True)
        if given and all(self.is_weight(tensor) for tensor in given):
            self.weights |= {id(tensor): tensor for tensor in tensors(result)}
        if before and before[0] and name in _BY_POSITION:
            self._note_position(name, before[0], result)
        if name in JOINS and sum(map(bool, before)) > 1:
            self.beside.append(torch.cat([one.flatten() for labels in before for one in labels]))
        parts = tensors(result) if given else []
        if len(parts) == 1 and id(parts[0]) not in self.states:
            (part,) = parts
            of = self.states.get(id(given[0]), self.moved.get(id(given[0])))
            # h and c of a cell in one tensor, like the one that they came in.
            as_given = name in ("cat", "stack") and part.shape in self.shapes
            # The state of the only layer, taken out of all.
            as_given |= name in _PARTS and part.numel() == given[0].numel()
            if of is not None and (name in _SHAPES or as_given):
                self.moved[id(part)] = of
                self.known.setdefault(id(part), (part, []))
        if name in COPIES and id(args[0]) in self.states:
            self.states[id(result)] = self.states[id(args[0])]
            self.known.setdefault(id(result), (result, []))
        return result

    def _note_position(self, name: str, before: Labels, result: Any) -> None:
        """Note a function that took some units, or put them elsewhere."""
        for tensor in tensors(result):
            for labels in before:
                for after in self.labels(tensor):
                    if varies(labels) and not _same_rows(labels, after):
                        self.by_position.append((name, labels))
                        return


_BY_POSITION = words(
    """T __getitem__ chunk dsplit flatten flip gather hsplit index_select mT masked_select moveaxis
    movedim narrow permute repeat repeat_interleave reshape roll select split split_with_sizes
    swapaxes swapdims t take tensor_split tile transpose unflatten unfold unsafe_chunk unsafe_split
    view"""
)


# What may be done to a final state before the model returns it.
_SHAPES = words("clone contiguous detach permute reshape squeeze transpose unsqueeze view")
_PARTS = words("__getitem__ select unbind")
_MOST_SUBSETS = 16  # of numbers that may be widths


def _elements(tensor: Tensor) -> Any:
    """What tensors share that are the same elements in the same layout."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a tensor of vmap has no storage
        return id(tensor)
    return tensor.device, start, tensor.shape, tensor.stride(), tensor.dtype


def _takes_one(name: str, args: Any) -> bool:
    """Whether a function takes one layer's state out of all, as h_n[-1] does."""
    index = args[1] if len(args) > 1 else None
    return name == "__getitem__" and isinstance(index, int) and not isinstance(index, bool)


def _name(function: Any) -> str:
    """Short name of a torch function; for a property, the property's."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function)
    name: str = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


def _tied(groups: Groups, sets: list[set[str]]) -> list[list[str]]:
    """The groups' ties and these sets of families, where equal in size, joined where they meet."""
    sizes = {family.name: family.size for family in groups.families}
    tied = [set(names) for names in groups.tied]
    for names in (names & sizes.keys() for names in sets):
        if len({sizes[name] for name in names}) == 1:
            joined = names.union(*(others for others in tied if others & names))
            tied = [*(others for others in tied if not others & names), joined]
    return [[name for name in sizes if name in names] for names in tied if len(names) > 1]


def _repeated(units: Tensor, rows: int) -> Tensor:
    """The units of rows that come in blocks: of gates, and of the micro-steps of a deep cell."""
    return units.repeat(rows // len(units))


def _none(size: int) -> Tensor:
    """Labels of what is of no unit."""
    return torch.full((size,), NONE, dtype=torch.int32, device="cpu")


def _ids(family: Family) -> Tensor:
    return torch.tensor(family.units, dtype=torch.int32, device="cpu")


def _same_rows(one: Tensor, two: Tensor) -> bool:
    """Whether both labels are one row of units, and the same."""
    return one.shape[-1:] == two.shape[-1:] and torch.equal(
        one.reshape(-1, one.shape[-1])[:1], two.reshape(-1, two.shape[-1])[:1]
    )
