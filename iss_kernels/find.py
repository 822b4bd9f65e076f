# SPDX-License-Identifier: Apache-2.0
"""Finds which weights leave together with each recurrent unit, by running the model.

A copy of the model runs while tracer.py follows the units; what the run shows is verified by
removing units from other copies (verify.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iss_kernels.arguments import check_module
from iss_kernels.copying import copied
from iss_kernels.groups import (
    Family,
    GroupError,
    Groups,
    Labelled,
    kinds,
    plain_cells,
    plain_recurrent,
)
from iss_kernels.shrink import names_of_parameters
from iss_kernels.tracer import OWN_OUTPUT, Stay, Tracer
from iss_kernels.units import Units, ids, none
from iss_kernels.verify import IN_TRAINING, Experiment
from iss_kernels.widths import Width, numbers

_NOT_RUN = "the example does not run it"
_AS_ONE = "all its units would have to leave together"
_UNSEEN = (
    "the example does not show its units: without them a copy of the model with random weights in "
    "their place gives the same answers"
)
_MOST_SUBSETS = 16  # of numbers that may be widths


def find_groups(
    model: nn.Module, example_inputs: Any, *, on_unknown: str = "raise", embedding: bool = False
) -> Groups:
    """Find every recurrent module in a model and every weight that reads their units.

    Recurrent modules are nn.LSTM, nn.GRU, nn.RNN, their cells, and this package's own.

    example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of
    keyword arguments; any values that take the model's usual path and on which the answers depend
    on the units, so no mask of zeros. A copy of the model runs on them, to follow the units; then
    copies that have lost units must give the answers that a whole one gives where these units are
    dead: in eval mode on the example, and with one row more along its first two dimensions if the
    model takes that; in training mode, without dropout, if the model draws no random numbers there.
    The model stays as it is. Its hooks run on the copies, and write to what is outside of the
    model, as to a list of yours.

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
    own output, or full width does not help, or the example does not show their units: no answer
    changes without them. It lists modules of subclasses too.

    A number in the model's own modules that turns out to be a width, such as self.hidden_size where
    states are made, changes with the units (`Groups.widths`): it is tried where the answers change
    otherwise, and taken where it is needed.

    embedding: the dimensions of every nn.Embedding are units too, of a family with its name: they
    leave where all that reads them is zero. (The paper leaves them out.) Those of an embedding that
    is the softmax' weight as well are the units of the layer that the softmax reads. An embedding
    with max_norm stays whole, since every dimension counts there.

    on_unknown: "raise" makes it an error if units stay whole since they reach a function that no
    rule covers, or if no unit can leave; "keep" keeps these units whole, all of them where need be.

    That takes some 30 forward passes, more where code rearranges units: a short example will do.

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
    first: dict[str, Stay] = {}  # why families would stay whole if none had full width
    never: set[str] = set()  # modules in which full width makes fewer units free
    free: set[str] = set()
    while True:
        findings = _Findings(
            Tracer(copied(model), list(recurrent), example_inputs, full, embedding)
        )
        groups = _verified(findings, model, example_inputs)
        first = findings.whole | first
        lost = {findings.units.module_of(name) for name in findings.whole.keys() & free}
        lost &= full.keys() - before.keys()
        free |= {member for family in groups.families for member in family.members}
        more = findings.may_have_full_width(never | full.keys())
        if not (lost or more):
            lost = findings.last_of_stuck(full.keys() - before.keys())
        if not (lost or more):
            break
        never |= lost
        full = {name: why for name, why in (more | full).items() if name not in lost}
    for name in findings.whole:
        stay = first[name]
        if stay.unknown and not keep:
            names = ", ".join(other for other in findings.whole if first[other] is stay)
            raise GroupError(
                f"find_groups: cannot follow the output of {names} through {stay.operation}: "
                f"{stay.why}"
            )
    whole = {name: str(first[name]) for name in findings.whole}
    for name, stay in findings.whole.items():
        if findings.units.module_of(name) in full and str(stay) != whole[name]:
            whole[name] += (
                "; nor can they leave inside a layer that keeps its width, and whose hidden_size "
                f"gets smaller: {stay}"
            )
    if not groups.families and not keep:
        _refuse(whole)
    return replace(groups, kept_whole=whole | others)


def _verified(findings: _Findings, model: nn.Module, inputs: Any) -> Groups:
    """The groups that a run shows, without the families that fail in experiments."""
    trace = findings.trace
    trace.run()
    groups = findings.groups(model)
    states = {mode: trace.returned_in(mode, model, inputs) for mode in (False, True)}
    experiment = Experiment(model, inputs, states, trace.eps)
    if unseen := experiment.unseen(groups):
        for family in groups.families:
            if family.name in unseen:
                findings.keep_family(family, _UNSEEN)
        groups = findings.groups(model)
    while failure := experiment.failure(groups):
        culprits: list[str] = []
        for candidate in findings.candidates(groups, experiment, culprits):
            if experiment.failure(candidate) is None:
                candidate = _without_other_numbers(candidate, experiment)
                return replace(candidate, verified=str(experiment))
        why = findings.reason(groups, culprits, failure)
        for family in groups.families:
            if family.name in culprits:
                findings.keep_family(family, why)
        groups = findings.groups(model)
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


class _Findings:
    """What a run shows: which units can leave, with which weights, and why others stay."""

    def __init__(self, trace: Tracer) -> None:
        self.trace, self.units = trace, trace.units
        self.whole: dict[str, Stay] = {}  # families that stay whole

    def groups(self, model: nn.Module, units: Units | None = None) -> Groups:
        """What was found, with new ids for the units that can leave."""
        units = units or self.units
        found = self._blocks(units)
        # Places of units: the last is of what is of none.
        renumber = none(len(units.root) + 1)
        families: list[Family] = []
        for members, roots in found.items():
            start = families[-1].units.stop if families else 0
            names = tuple(units.families[i].name for i in members)
            # One that is in this block alone names it best.
            alone = [n for i, n in zip(members, names, strict=True)
                     if sum(i in block for block in found) == 1]  # fmt: skip
            name = next(iter(alone), " = ".join(names))
            families.append(
                Family(name, units.families[members[0]].module, start, len(roots), names)
            )
            renumber[roots.long()] = ids(families[-1])
        of_unit = renumber[torch.cat([units.root, none(1)]).long()]
        values = torch.cat([none(0), *self.trace.values, *self._seen_in_full_width()])
        values = of_unit[values[values >= 0].long()]
        count = sum(family.size for family in families)
        read = torch.zeros(count + 1, dtype=torch.bool, device="cpu")
        read[values[values >= 0].long()] = True
        weights: list[Labelled] = []
        vectors: list[Labelled] = []
        shared = names_of_parameters(model)
        order = [*model.named_parameters(), *model.named_buffers()]
        parameters = {name for name, _ in model.named_parameters()}
        summed = torch.cat([none(0), *self.trace.summed])
        summed = summed[summed >= 0]
        for name, tensor in order:
            dims = self.trace.dims.get(name, [])
            left = tuple(of_unit[own.long()] for own in dims)
            if not left or bool((torch.cat(left) < 0).all()):
                continue
            self._check_sharing(shared.get(name, [name]))
            reads = tuple(
                dim for dim, own in enumerate(dims)
                if (name, dim) in self.trace.read_dims or bool(torch.isin(own, summed).any())
            )  # fmt: skip
            penalised = tensor.dim() > 1 or bool(read[left[0].long()].any())
            is_weight = name in parameters and penalised
            (weights if is_weight else vectors).append(Labelled(name, left, reads))
        tied = []
        for alike in self._read_as_one():
            those = [family.name for family in families if set(family.members) & set(alike)]
            tied += [those] if len(those) > 1 and those not in tied else []
        free = {units.module_of(member) for family in families for member in family.members}
        return Groups(
            model, families, weights, tied, vectors,
            by_value=read[:-1] if bool(read.any()) else None,
            full_width={name: why for name, why in self.trace.full.items() if name in free},
        )  # fmt: skip

    def _seen_in_full_width(self) -> Iterator[Tensor]:
        """Units of modules of full width whose value is seen outside."""
        for name in self.trace.full:
            layers, looked_into = self.trace.layouts[name], name in self.trace.looked_into
            for layer in layers if looked_into else layers[-1:]:
                for layout in layer:
                    yield layout.outputs
                    if looked_into:
                        yield layout.cells

    def _blocks(self, units: Units) -> dict[tuple[int, ...], Tensor]:
        """{families that share units: these units}, of those that can leave; sets `whole`."""
        blocks, families, stacked = units.blocks(), units.families, self.trace.stacked
        block_of = {unit: block for block, its in blocks.items() for unit in its}
        why: dict[tuple[int, ...], Stay] = {}
        for stay in self.trace.stays:
            for unit in set(units.roots(stay.units).tolist()) & block_of.keys():
                block = block_of[unit]
                if block not in why or (stay.unknown and not why[block].unknown):
                    why[block] = stay
        for block, its in blocks.items():
            if any(families[i].module not in stacked for i in block):
                why.setdefault(block, Stay(none(0), "", _NOT_RUN, False))
            if len(its) == 1 and all(families[i].size > 1 for i in block):
                why.setdefault(block, Stay(none(0), "", _AS_ONE, False))
        for names in self._read_as_one():
            those = [block for block in blocks if any(families[i].name in names for i in block)]
            # States that are apart since sizes differ would become one tensor if these got equal.
            reason = next((why[block] for block in those if block in why), None)
            if reason is None and not stacked[families[those[0][0]].module]:
                reason = Stay(none(0), "", "its states are read apart from each other", False)
            if reason is not None:
                for block in those:
                    why.setdefault(block, reason)
        self.whole = {families[i].name: stay for block, stay in why.items() for i in block}
        return {
            block: torch.tensor(its, dtype=torch.int32, device="cpu")
            for block, its in blocks.items() if block not in why
        }  # fmt: skip

    def _check_sharing(self, names: list[str]) -> None:
        """All modules that share a weight which leaves in part must have run, to be followed."""
        for other in names if len(names) > 1 else ():
            owner = self.trace.model.get_submodule(other.rpartition(".")[0])
            # A function may have used an embedding's weight without its module.
            looked_up = isinstance(owner, nn.Embedding) and names[0] in self.trace.looked_up
            if owner not in self.trace.called and not looked_up:
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
        places = [*(labels for _, labels in self.trace.by_position), *self.trace.beside]
        sets = [set(self._names_of(labels, groups)) for labels in places]
        by_module: dict[str, set[str]] = {}
        for family in groups.families:
            by_module.setdefault(family.module, set()).add(family.name)
        for more in (sets, [*sets, *by_module.values()]):
            if (tied := _tied(groups, more)) != groups.tied:
                yield replace(groups, tied=tied)
        if in_turns := _tied(groups, sets):  # unit k of each of these is one
            # These are the units that can leave, perhaps a part of their layer's.
            found = self._blocks(self.units).values()
            units = {family.name: its for family, its in zip(groups.families, found, strict=True)}
            same = [[units[name] for name in names] for names in in_turns]
            yield self.groups(groups.model, self.units.united(same))
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
            for calls in (self.trace.by_position, self.trace.by_size)
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
        for module in sorted(self.trace.looked_into - self.trace.full.keys()):
            layouts = [layout for layer in self.trace.layouts[module] for layout in layer]
            if len(layouts) > 1:
                cells = frozenset(int(layout.cells[0]) for layout in layouts)
                outputs = frozenset(int(layout.outputs[0]) for layout in layouts)
                for starts in dict.fromkeys((cells, outputs)):
                    yield [f.name for f in self.units.families if f.start in starts]

    def _names_of(self, labels: Tensor, groups: Groups) -> list[str]:
        """Names of the found families with units among these labels."""
        members = self.units.among(labels)
        return [family.name for family in groups.families if members & set(family.members)]

    def may_have_full_width(self, but: Set[str]) -> dict[str, str]:
        """{module: why}: modules with families that would be free if it kept its width outside."""
        found: dict[str, str] = {}
        stays = [
            name for name, stay in self.whole.items() if stay.why in (OWN_OUTPUT, _NOT_RUN, _UNSEEN)
        ]
        fixed = set(map(self.units.module_of, stays))
        for name, stay in self.whole.items():
            module = self.units.module_of(name)
            if module in self.trace.layouts and module not in fixed | but:
                found.setdefault(module, str(stay))
        return found

    def last_of_stuck(self, modules: Set[str]) -> set[str]:
        """Of several of these modules that stay whole together, the one that ran last.

        Without it the others may be free, as an encoder whose decoder asks for the class nn.LSTM.
        """
        together: dict[int, set[str]] = {}
        for name, stay in self.whole.items():
            together.setdefault(id(stay), set()).add(self.units.module_of(name))
        order = list(self.trace.stacked)
        stuck = [those & modules for those in together.values() if len(those & modules) > 1]
        return {max(those, key=order.index) for those in stuck[:1]}

    def keep_family(self, family: Family, why: str) -> None:
        """Keep the units of a found family whole."""
        for own in self.units.families:
            if own.name in family.members:
                self.trace.stays.append(Stay(ids(own), "", why, False))


def _tied(groups: Groups, sets: list[set[str]]) -> list[list[str]]:
    """The groups' ties and these sets of families, where equal in size, joined where they meet."""
    sizes = {family.name: family.size for family in groups.families}
    tied = [set(names) for names in groups.tied]
    for names in (names & sizes.keys() for names in sets):
        if len({sizes[name] for name in names}) == 1:
            joined = names.union(*(others for others in tied if others & names))
            tied = [*(others for others in tied if not others & names), joined]
    return [[name for name in sizes if name in names] for names in tied if len(names) > 1]
