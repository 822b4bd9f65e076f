# SPDX-License-Identifier: Apache-2.0
"""Verifies groups by experiment: removes units from copies of a model and compares the answers.

A unit whose outgoing weights are zero can be removed if the labels are right and the model's code
does the same at another width. Code does not where it picks units by position (y[..., :8]), or
computes with their number (y / y.size(-1)).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from iss_kernels.arguments import (
    Path,
    as_tensor,
    brief,
    call_of,
    fresh,
    has_size,
    leaves,
    mapped,
    tensors,
)
from iss_kernels.copying import copied
from iss_kernels.groups import Family, GroupError, Groups
from iss_kernels.rules import DROPOUTS
from iss_kernels.shrink import NoInputsError, all_of, removed


@torch.no_grad()
def call(model: nn.Module, inputs: Any) -> dict[Path, Any]:
    """The leaves of what the model returns, from the same random state every time.

    That is torch's, Python's and NumPy's, which code for teacher forcing draws from.
    """
    states = random.getstate(), np.random.get_state()
    try:
        return _called(model, inputs)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _called(model: nn.Module, inputs: Any) -> dict[Path, Any]:
    with torch.random.fork_rng(_cuda(model)):
        args, kwargs = call_of(inputs)
        return leaves(model(*args, **kwargs))


def _random_states(model: nn.Module) -> list[Any]:
    """The states of the random generators that its code may draw from."""
    numpy: Any = np.random.get_state()
    cuda = [torch.cuda.get_rng_state(device) for device in _cuda(model)]
    own = [state.tolist() for state in (numpy[1], torch.get_rng_state(), *cuda)]
    return [random.getstate(), numpy[2:], *own]


def _cuda(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that a model is on."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _full_precision(cuda: bool) -> Iterator[None]:
    """Products of float32 as exact as they can be: not in TF32, nor in bfloat16 as on some CPUs.

    cuda: whether cuDNN matters, which takes TF32 by default.
    """
    backends: Any = torch.backends
    places = [backends.mkldnn.matmul, backends.mkldnn.rnn, backends.mkldnn.conv]
    if cuda:
        places += [backends.cuda.matmul, backends.cudnn.rnn, backends.cudnn.conv]
    before = [place.fp32_precision for place in places]
    for_all = None
    # These raise where settings by backend contradict them.
    with contextlib.suppress(RuntimeError):
        for_all = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        if for_all is not None and for_all[0] != "highest":
            torch.set_float32_matmul_precision("highest")
        if for_all is not None and cuda:
            backends.cudnn.allow_tf32 = False
        for place in places:
            if place.fp32_precision not in ("none", "ieee"):
                place.fp32_precision = "ieee"
        yield
    finally:
        if for_all is not None and for_all[0] != "highest":
            torch.set_float32_matmul_precision(for_all[0])
        if for_all is not None and cuda:
            backends.cudnn.allow_tf32 = for_all[1]
        for place, precision in zip(places, before, strict=True):
            if place.fp32_precision != precision:
                place.fp32_precision = precision


class _NoDropout(TorchFunctionMode):
    """Dropout does nothing: its mask over the units would depend on their number."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


def _without_dropout(model: nn.Module) -> nn.Module:
    """A copy without the dropout that is inside a torch function, of layers and of attention."""
    model = copied(model)
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
    return model


# What a failure says that only training mode shows.
IN_TRAINING = "in training mode"
# How often weights are drawn to see what units do.
_DRAWS = 8
# How many times its own rounding error an answer may differ.
_ROUNDINGS = 8
_ROUNDINGS_IN_TRAINING = 64

_Outcome: TypeAlias = dict[Path, Any] | Exception  # a model's answers, or what it raised


@dataclass
class _Drawn:
    """A copy with weights drawn for labelled names, and what the units do to its answers.

    alive: what it does on each of the inputs in eval mode, and last on the first in training mode;
    effects: {path of a leaf: the difference that it makes if no unit is left}, likewise.
    """

    names: list[str]
    model: nn.Module
    alive: list[_Outcome]
    effects: list[dict[Path, Tensor]]


@dataclass
class _Tolerance:
    """How far answers may be apart: parts of what the units do to them, and of their own size."""

    of_effect: float
    of_size: float

    def same(
        self, one: dict[Path, Any], two: dict[Path, Any], effects: Mapping[Path, Tensor]
    ) -> bool:
        """Whether two outcomes have the same leaves."""
        return one.keys() == two.keys() and all(
            self._close(as_tensor(value), as_tensor(two[path]), effects.get(path))
            for path, value in one.items()
        )

    def _close(self, one: Tensor, two: Tensor, effect: Tensor | None) -> bool:
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        if not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, two)
        one, two = _wide(one), _wide(two)
        size = _finite(one).abs()
        if effect is None or effect.shape != size.shape:
            effect = torch.zeros_like(size)
        # What no unit reaches may be large, as the elements of a mask are, and tells nothing of how
        # large the others are. Of each kind, what is small by chance has the errors of the others.
        reached, allowed = effect > 0, torch.zeros_like(size)
        for which, part in ((reached, effect), (~reached, size)):
            if bool(which.any()):
                parts = self.of_effect * part[which], self.of_size * size[which]
                allowed[which] = sum(each.maximum(each.median()) for each in parts)
        equal = torch.isclose(one, two, rtol=0, atol=0, equal_nan=True)
        return bool((equal | ((one - two).abs() <= allowed)).all())


def _effects(alive: _Outcome, dead: _Outcome) -> dict[Path, Tensor]:
    """What the units do to each leaf that has the same form without them."""
    effects = {}
    if isinstance(alive, dict) and isinstance(dead, dict):
        for path in alive.keys() & dead.keys():
            one, two = _wide(as_tensor(alive[path])), _wide(as_tensor(dead[path]))
            if one.shape == two.shape:
                effects[path] = _finite(one - two).abs()
    return effects


def _has_floats(outcome: _Outcome) -> bool:
    return isinstance(outcome, dict) and any(
        as_tensor(leaf).is_floating_point() or as_tensor(leaf).is_complex()
        for leaf in outcome.values()
    )


def _are_equal(one: _Outcome, two: _Outcome) -> bool:
    if isinstance(one, Exception) or isinstance(two, Exception):
        return type(one) is type(two)
    return _Tolerance(0, 0).same(one, two, {})


def _wide(leaf: Tensor) -> Tensor:
    return leaf.to("cpu", torch.complex128 if leaf.is_complex() else torch.float64)


def _finite(leaf: Tensor) -> Tensor:
    return torch.where(leaf.isfinite(), leaf, 0)


class Experiment:
    """Compares copies of a model that have lost units with the whole model.

    states: {training mode: paths of the final states in what the model returns}, which get as small
    as the units.
    eps: machine epsilon of the least precise dtype that the model computes in.

    All copies are without dropout. Their labelled weights and buffers, and parameters of zeros, are
    drawn anew, so that no unit is hidden. They are compared in eval mode; in training mode too, if
    the model gives the same answers twice there and draws no random numbers, whose count may be
    that of the units.

    Answers may differ by a small part of what the units do to them, which copies with all units and
    with none show, and by rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        states: dict[bool, list[Path]],
        eps: float,
    ) -> None:
        self.model, self.states = model, states
        self.cuda = bool(_cuda(model))
        # Rounding errors grow on their way to the answers, yet stay far below what a unit that is
        # read wrongly does, which grows alike. 7e-5 of the units' effect in float32, 0.05 in
        # bfloat16.
        self.tolerance = _Tolerance(eps**0.6, min(_ROUNDINGS * eps, eps**0.6))
        # Statistics of few rows divide these errors by a small deviation.
        self.tolerance_in_training = _Tolerance(
            eps**0.5, min(_ROUNDINGS_IN_TRAINING * eps, eps**0.5)
        )
        self.drawn: _Drawn | None = None
        self.seed = 0
        self.same_in_training = self._same_in_training(inputs)
        whole = copied(model).eval()
        self._check(self._outcome(whole, inputs))
        self.inputs = [inputs]
        self.longer: list[int] = []  # dimensions along which the model takes one row more
        for dim in (0, 1):
            longer = _longer(inputs, dim)
            shapes, before = ([t.shape for t in tensors(x)] for x in (longer, inputs))
            if shapes not in ([], before) and isinstance(self._outcome(whole, longer), dict):
                self.inputs.append(longer)
                self.longer.append(dim)

    def __str__(self) -> str:
        dims = " and ".join(map(str, self.longer))
        return "on the example" + f", and on one with a row more along dim {dims}" * bool(dims)

    def failure(self, groups: Groups) -> str | None:
        """What a copy without some of the units does wrong; None where nothing."""
        return self._failures(groups, list(_trials(groups))) if groups.families else None

    def culprits(self, groups: Groups) -> list[str]:
        """Names of the families that fail while the others stay whole; of all, if none does."""
        names = []
        for block in groups.blocks:
            trials = [
                {f: mask if f in block else all_of(len(mask)) for f, mask in kept.items()}
                for kept in _trials(groups)
            ]
            if self._failures(groups, trials, whole_too=False):
                names += block
        return names or [family.name for family in groups.families]

    @torch.no_grad()
    def unseen(self, groups: Groups) -> set[str]:
        """Names of the families that something reads, without which no answer changes.

        Where that is so with the weights that were drawn, as an activation may be zero, larger ones
        are. Nothing is said of answers that are states or choices, which few units change.
        """
        read = [family for family in groups.families if _is_read(groups, family)]
        unseen = {family.name for family in read}
        for self.seed in range(_DRAWS):
            self.drawn = None
            without = {family.name for family in read if self._is_unseen(groups, family)}
            unseen &= without
            if not without:
                break
        return unseen

    def _is_unseen(self, groups: Groups, family: Family) -> bool:
        drawn = self._draw(groups)
        if not any(_has_floats(outcome) for outcome in drawn.alive):
            return False
        dead = copied(drawn.model)
        units = torch.arange(groups.units, device="cpu")
        gone = (units >= family.start) & (units < family.units.stop)
        replace(groups, model=dead).zero_(gone, rows=False)
        return all(map(_are_equal, drawn.alive, self._outcomes(dead)))

    def _failures(
        self, groups: Groups, trials: list[dict[str, Tensor]], whole_too: bool = True
    ) -> str | None:
        """The first failure: the first trial takes all inputs, each other one of them."""
        for i, kept in enumerate(trials):
            count = len(self.inputs)
            which = range(count) if i == 0 else [i % count]
            if failure := self._failure(groups, kept, which, whole_too):
                return failure
        return None

    @torch.no_grad()
    def _failure(
        self,
        groups: Groups,
        kept: Mapping[str, Tensor],
        which: Sequence[int],
        whole_too: bool,
    ) -> str | None:
        """Compare a copy that keeps these units with one where the others are dead.

        which: of the inputs; whole_too: as `removed` takes it.
        """
        drawn = self._draw(groups)
        whole = copied(drawn.model)
        groups = replace(groups, model=whole)
        try:
            small = removed(whole, groups, kept, whole_too)
        except NoInputsError as error:
            return f"fails with {brief(error)}"
        groups.zero_(torch.cat([~kept[f.name] for f in groups.families]), rows=False)
        for i in which:
            expected, got = (self._outcome(m, self.inputs[i]) for m in (whole, small))
            expected = self._check(expected)
            if isinstance(got, Exception):
                return f"fails with {brief(got)}"
            if not self.tolerance.same(expected, got, drawn.effects[i]):
                return "gives other answers"
        # Both have been called alike till here, so what they keep from call to call is the same.
        expected, got = (self._outcome(m.train(), self.inputs[0]) for m in (whole, small))
        if isinstance(expected, Exception):
            return None
        if isinstance(got, Exception):
            return f"fails {IN_TRAINING} with {brief(got)}"
        same = self.tolerance_in_training.same
        if self.same_in_training and not same(expected, got, drawn.effects[-1]):
            return f"gives other answers {IN_TRAINING}"
        return None

    def _draw(self, groups: Groups) -> _Drawn:
        """The copy that all others are copies of; kept for groups with the same labelled names."""
        names = [one.name for one in groups.labelled]
        if self.drawn is None or self.drawn.names != names:
            model = _without_dropout(self.model).eval()
            _draw(replace(groups, model=model), self.seed)
            dead = copied(model)
            replace(groups, model=dead).zero_(all_of(groups.units), rows=False)
            alive = [*self._outcomes(copied(model))]
            effects = [*map(_effects, alive, self._outcomes(dead))]
            self.drawn = _Drawn(names, model, alive, effects)
        return self.drawn

    def _outcomes(self, model: nn.Module) -> Iterator[_Outcome]:
        """What a copy does on all inputs in eval mode, and then on the first in training mode."""
        for inputs in self.inputs:
            yield self._outcome(model, inputs)
        yield self._outcome(model.train(), self.inputs[0])

    def _same_in_training(self, inputs: Any) -> bool:
        """Whether two copies in training mode give the same answers and draw no random numbers."""
        states: list[Any] = []
        outcomes = []
        for _ in range(2):
            model = _without_dropout(self.model).train()
            model.register_forward_pre_hook(
                lambda model, _: states.append(_random_states(model)), prepend=True
            )
            model.register_forward_hook(lambda model, *_: states.append(_random_states(model)))
            outcomes.append(self._outcome(model, inputs))
        one, two = outcomes
        if isinstance(one, Exception) or isinstance(two, Exception):
            return False
        drawn = any(state != states[0] for state in states)
        return not drawn and self.tolerance_in_training.same(one, two, {})

    def _outcome(self, model: nn.Module, inputs: Any) -> _Outcome:
        """The model's answers, or what it raises."""
        inputs = fresh(inputs)  # it may write into them
        try:
            with _NoDropout(), _full_precision(self.cuda):
                output = call(model, inputs)
        except Exception as error:
            return error
        states = self.states[model.training]
        return {path: leaf for path, leaf in output.items() if not _is_state(path, states)}

    def _check(self, expected: _Outcome) -> dict[Path, Any]:
        """The answers of a whole copy, by which others can be verified; GroupError for none."""
        if isinstance(expected, Exception):
            raise GroupError(
                "find_groups: expected a model that takes the example in eval mode, got "
                + brief(expected)
            ) from expected
        if not self.states[False] and not any(
            bool(torch.as_tensor(leaf, device="cpu").isfinite().any()) for leaf in expected.values()
        ):
            raise GroupError(
                "find_groups: expected a model that returns finite tensors or numbers, got none, "
                "by which the groups could be verified"
            )
        return expected


def _is_state(path: Path, states: list[Path]) -> bool:
    # A state is one tensor where sizes are equal, else a tuple of them: its path gets longer.
    return any(path[: len(s)] == s or s[: len(path)] == path for s in states)


def _is_read(groups: Groups, family: Family) -> bool:
    """Whether its units are read by more than weights of their own, and not in full width.

    There they leave zeros, whatever reads these.
    """
    if family.module in groups.full_width:
        return False
    own = torch.tensor(family.units, device="cpu")
    if groups.by_value is not None and bool(groups.by_value[own].any()):
        return True
    return any(
        bool(torch.isin(own, units).any())
        and not all(bool(torch.isin(other, own).all()) for other in weight.units)
        for weight in groups.labelled
        for units in (weight.units[dim] for dim in weight.reads)
    )


def _trials(groups: Groups) -> Iterator[dict[str, Tensor]]:
    """Units to keep, {family name: bool [size]}, three times.

    Each block of families keeps scattered units once, the others once, and all once: so each unit
    leaves once. Blocks take turns, so sizes differ, by block and from what they were.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = {family.name: family.size for family in groups.families}
    orders = {
        name: torch.randperm(size, generator=generator, device="cpu")
        for name, size in sizes.items()
    }
    for turn in range(3):
        kept = {name: all_of(size) for name, size in sizes.items()}
        for i, block in enumerate(groups.blocks):
            for name in block:
                size, which = sizes[name], (i + turn) % 3
                few = 1 + (size // 3 + i // 3) % max(size - 1, 1)
                if size > 1 and which < 2:
                    gone = orders[name][few:] if which == 0 else orders[name][:few]
                    kept[name][gone] = False
        yield kept


@torch.no_grad()
def _draw(groups: Groups, seed: int) -> None:
    """Draw values anew where the present ones may hide a unit: labelled ones, and parameters of 0.

    Buffers too, such as statistics, which training changes; what is positive, as a variance, stays
    positive.
    """
    own = [*groups.model.named_parameters(), *groups.model.named_buffers()]
    names = {one.name for one in groups.labelled}
    # torch.manual_seed would seed the generators of all devices, those of the caller.
    generators: dict[torch.device, torch.Generator] = {}
    for name, tensor in own:
        zero = isinstance(tensor, nn.Parameter) and not tensor.any()
        expanded = any(
            n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if not tensor.is_floating_point() or expanded or not (name in names or zero):
            continue
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        columns = tensor.shape[-1] if tensor.numel() > 0 and tensor.dim() > 0 else 1
        bound = (1 + seed) * columns**-0.5
        least = 0.5 if not isinstance(tensor, nn.Parameter) and bool((tensor > 0).all()) else -bound
        tensor.uniform_(least, least + 2 * bound, generator=generators[device])


def _longer(inputs: Any, dim: int) -> Any:
    """The inputs with the last row once more along `dim` of the first tensor; None without it.

    Tensors and lists of numbers of that size get longer too: states, masks, lengths of a batch.
    """
    if isinstance(inputs, PackedSequence):
        x, lengths = _longer(pad_packed_sequence(inputs), 1)
        return pack_padded_sequence(x, lengths, enforce_sorted=False) if dim == 1 else None
    first = next(iter(tensors(inputs)), None)
    if first is None or first.dim() <= dim or first.size(dim) == 0:
        return None
    size = first.size(dim)

    def repeat(_: Path, part: Any) -> Any:
        if isinstance(part, list):
            return [*part, part[-1]] if len(part) == size else part
        dims = [d for d in (dim, *range(part.dim())) if d < part.dim() and part.size(d) == size]
        return torch.cat([part, part.narrow(dims[0], size - 1, 1)], dims[0]) if dims else part

    return mapped(inputs, repeat, is_leaf=has_size)
