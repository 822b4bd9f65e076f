# SPDX-License-Identifier: Apache-2.0
"""Verifies groups by experiment: removes units from copies of a model and compares the answers.

A unit whose outgoing weights are zero can be removed if the labels are right and the model's code
does the same at another width. Code does not where it picks units by position (y[..., :8]), or
computes with their number (y / y.size(-1)).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from iss_kernels.arguments import Path, brief, call_of, fresh, has_size, leaves, mapped, tensors
from iss_kernels.copying import copied
from iss_kernels.groups import GroupError, Groups
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


class Experiment:
    """Compares copies of a model that have lost units with the whole model.

    states: {training mode: paths of the final states in what the model returns}, which get as small
    as the units.
    eps: machine epsilon of the least precise dtype that the model computes in.

    All copies are without dropout. Their labelled weights, and the parameters that are zero, are
    drawn anew, so that no unit is hidden. They are compared in eval mode; in training mode too, if
    the model gives the same answers twice there and draws no random numbers, whose count may be
    that of the units.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        states: dict[bool, list[Path]],
        eps: float,
    ) -> None:
        self.model, self.states = model, states
        if torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, 2**-8)  # bfloat16
        elif any(parameter.is_cuda for parameter in model.parameters()):
            eps = max(eps, 2**-10)  # TF32, which cuDNN takes by default
        # Rounding errors grow on their way to the answers, yet stay far below what a unit that is
        # read wrongly does. 7e-5 of the largest answer in float32, 0.05 in bfloat16.
        self.tolerance = eps**0.6
        # Statistics of few rows divide these errors by a small deviation.
        self.tolerance_in_training = eps**0.5
        self.drawn: tuple[list[str], nn.Module] | None = None  # with weights drawn for these names
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

    def _failures(
        self, groups: Groups, trials: list[dict[str, Tensor]], whole_too: bool = True
    ) -> str | None:
        """The first failure: the first trial takes all inputs, each other one of them."""
        for i, kept in enumerate(trials):
            inputs = self.inputs if i == 0 else [self.inputs[i % len(self.inputs)]]
            if failure := self._failure(groups, kept, inputs, whole_too):
                return failure
        return None

    @torch.no_grad()
    def _failure(
        self,
        groups: Groups,
        kept: Mapping[str, Tensor],
        examples: list[Any],
        whole_too: bool,
    ) -> str | None:
        """Compare a copy that keeps these units with one where the others are dead.

        whole_too: as `removed` takes it.
        """
        names = [one.name for one in groups.labelled]
        if self.drawn is None or self.drawn[0] != names:
            model = _without_dropout(self.model).eval()
            _draw(replace(groups, model=model))
            self.drawn = names, model
        whole = copied(self.drawn[1])
        groups = replace(groups, model=whole)
        try:
            small = removed(whole, groups, kept, whole_too)
        except NoInputsError as error:
            return f"fails with {brief(error)}"
        groups.zero_(torch.cat([~kept[f.name] for f in groups.families]), rows=False)
        for inputs in examples:
            expected, got = self._outcome(whole, inputs), self._outcome(small, inputs)
            expected = self._check(expected)
            if isinstance(got, Exception):
                return f"fails with {brief(got)}"
            if not _same(expected, got, self.tolerance):
                return "gives other answers"
        # Both have been called alike till here, so what they keep from call to call is the same.
        expected, got = (self._outcome(m.train(), self.inputs[0]) for m in (whole, small))
        if isinstance(expected, Exception):
            return None
        if isinstance(got, Exception):
            return f"fails {IN_TRAINING} with {brief(got)}"
        if self.same_in_training and not _same(expected, got, self.tolerance_in_training):
            return f"gives other answers {IN_TRAINING}"
        return None

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
        return not drawn and _same(one, two, self.tolerance_in_training)

    def _outcome(self, model: nn.Module, inputs: Any) -> dict[Path, Any] | Exception:
        """The model's answers, or what it raises."""
        inputs = fresh(inputs)  # it may write into them
        try:
            with _NoDropout():
                output = call(model, inputs)
        except Exception as error:
            return error
        states = self.states[model.training]
        return {path: leaf for path, leaf in output.items() if not _is_state(path, states)}

    def _check(self, expected: dict[Path, Any] | Exception) -> dict[Path, Any]:
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
def _draw(groups: Groups) -> None:
    """Draw weights anew where their present values may hide a unit: labelled ones, and zeros."""
    own = dict(groups.model.named_parameters())
    labelled = {own[one.name] for one in groups.labelled if one.name in own}
    # torch.manual_seed would seed the generators of all devices, those of the caller.
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in groups.model.parameters():
        if not parameter.is_floating_point() or (parameter not in labelled and parameter.any()):
            continue
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        columns = parameter.shape[-1] if parameter.numel() > 0 and parameter.dim() > 0 else 1
        parameter.uniform_(-(columns**-0.5), columns**-0.5, generator=generators[device])


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


def _same(one: dict[Path, Any], two: dict[Path, Any], tolerance: float) -> bool:
    """Whether two outcomes have the same leaves, to rounding."""
    return one.keys() == two.keys() and all(
        _close(value, two[path], tolerance) for path, value in one.items()
    )


def _close(one: Any, two: Any, tolerance: float) -> bool:
    """Whether two leaves are equal, floats up to `tolerance` times the largest of them."""
    one, two = (
        leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device="cpu")
        for leaf in (one, two)
    )
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    atol = tolerance * float(_finite(one).abs().max()) if one.numel() > 0 else 0.0
    return torch.allclose(one, two, rtol=0, atol=atol, equal_nan=True)


def _finite(leaf: Tensor) -> Tensor:
    return torch.where(leaf.isfinite(), leaf, 0)
