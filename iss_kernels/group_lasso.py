# SPDX-License-Identifier: Apache-2.0
"""Group Lasso over the units of a model: the penalty that makes whole units fade during training.

`lasso()` is the definition, for autograd; the methods that end in _ do the same, or a step of it,
in place and in one pass over each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import compress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from iss_kernels import ops
from iss_kernels.groups import Groups
from iss_kernels.optimizers import metric
from iss_kernels.target import Target, check_int, number


class GroupLasso:
    """The penalty sum over units of strength * norm (Wen et al. 2018, section 3.2).

    The norm of a unit is sqrt(sum of squares + eps) over all weights that leave with it; biases are
    in no group but those of units that are read by their value (`Groups.by_value`) and leave when
    they are zero too. strength is one float, or {family name: float} with every family of `groups`
    named. paper_overlap=True counts the recurrent elements that lie in both a row and a column of
    their unit twice, as the paper's code does. Use either `lasso()` in the loss, or
    `add_gradients_` after backward(), not both; then `threshold_` after each optimiser step:

        loss.backward(); lasso.add_gradients_(); optimizer.step(); lasso.threshold_(1e-4)

    warmup: steps in which the strength rises linearly from 0; `add_gradients_` and `proximal_` each
    count as a step. With a target they adapt the strength as well, by one factor for all families,
    so that about `horizon` steps after the warm-up the model has this share left, wherever the
    strength starts. of: what is counted, before and after `shrink`:

        "units"          of all families; the default
        "parameters"     elements of the labelled weights, and of the biases that leave with units
        "multiply-adds"  elements of the labelled weights: each is used once per time step

    The units with the smallest norms are the ones to go; where families differ in strength, those
    with the smallest norm / strength, which the penalty brings to zero first. The target is reached
    when they have faded, when the largest norm among them is `gone` times the highest it has been,
    by default 0.3: less fades them further, and presses harder on those that stay. From then on
    `threshold_` and `proximal_` hold them at zero, exactly, for `shrink` to take out, and the
    strength is 0, so that the others heal. A family with strength 0 keeps its units. Weights that
    do not train cannot fade, but those of units that went are zero too.

    Raises ValueError for a strength that is negative, not finite, or does not name the families,
    and for a target that cannot be reached.
    Every method raises ValueError where the weights differ in dtype or device.
    """

    def __init__(
        self,
        groups: Groups,
        strength: float | Mapping[str, float] = 1e-4,
        eps: float = 1e-8,
        paper_overlap: bool = False,
        *,
        warmup: int = 0,
        target: float | None = None,
        of: str | None = None,
        horizon: int | None = None,
        gone: float | None = None,
    ) -> None:
        if not isinstance(groups, Groups):
            got = type(groups).__name__
            raise TypeError(f"GroupLasso: expected the groups of find_groups, got {got}")
        names = [family.name for family in groups.families]
        if not names:
            raise ValueError("GroupLasso: expected groups with units that can leave, got none")
        by_name = strength if isinstance(strength, Mapping) else dict.fromkeys(names, strength)
        if set(by_name) != set(names):
            raise ValueError(
                f"GroupLasso: expected strength for the families {', '.join(names)}, "
                f"got {', '.join(by_name) or 'none'}"
            )
        for name, given in by_name.items():
            value = number(f"strength for {name}", given)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"GroupLasso: expected strength >= 0 for {name}, got {value}")
        eps = number("eps", eps)
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"GroupLasso: expected eps > 0 and finite, got {eps}")
        check_int("warmup", warmup)
        if warmup < 0:
            raise ValueError(f"GroupLasso: expected warmup >= 0, got {warmup}")
        needing = {"horizon": horizon, "of": of, "gone": gone}
        named = [name for name, value in needing.items() if value is not None]
        if target is None and named:
            raise ValueError(f"GroupLasso: expected target with {named[0]}, got None")
        self.eps = eps
        self.paper_overlap = paper_overlap
        self._strengths = torch.tensor(  # of each unit, [units]
            [float(by_name[f.name]) for f in groups.families for _ in f.units],
            dtype=torch.float64,
            device="cpu",
        )
        self._label(groups)
        self._given = {name: float(value) for name, value in by_name.items()}
        self._warmup = warmup
        self._steps = 0
        self._factor = 0.0 if warmup else 1.0  # on the strengths, of the last step
        self._target = None
        if target is not None:
            of, gone = "units" if of is None else of, 0.3 if gone is None else gone
            self._target = Target(groups, self._strengths, target, of, horizon, gone, eps)

    def __call__(self) -> Tensor:
        """The penalty, a scalar with autograd: add it to the loss.

        With the strengths of the last step; it counts as none, so warmup and target need the
        methods that do.
        """
        weights = self._weights()
        return torch.dot(self._strengths * self._factor, self._norms(weights))

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Norm of every unit: {family name: [size]}, without autograd."""
        return self.groups.by_family(self._norms(self._weights()))

    @torch.no_grad()
    def add_gradients_(self) -> Tensor:
        """Add the penalty's gradient to .grad of the weights; returns the penalty, a scalar.

        Creates .grad where it is None, and passes over weights that do not require a gradient.
        Equivalent to `lasso().backward()`. With a GradScaler, call it after scaler.unscale_.
        """
        weights, parameters = self._weights(), self.groups.parameters()
        trained = [weight.requires_grad for weight in parameters]
        for weight in compress(parameters, trained):
            if weight.grad is not None and weight.grad.layout != torch.strided:
                raise ValueError(
                    "GroupLasso: expected dense gradients, got one of layout "
                    f"{str(weight.grad.layout).removeprefix('torch.')}"
                )
        grads = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in compress(parameters, trained)
        ]
        matrices = [_matrix(grad, "gradients") for grad in grads]
        norms = self._norms(weights)
        strengths = self._step(norms)
        if any(trained):
            for weight, grad in zip(compress(parameters, trained), grads, strict=True):
                weight.grad = grad
            ops.add_scaled_by_units_(
                matrices, *self._labelled(weights, trained), strengths / norms, self.paper_overlap
            )
        return torch.dot(strengths, norms)

    @torch.no_grad()
    def threshold_(self, threshold: float = 1e-4) -> None:
        """Set the elements of the groups that are smaller than `threshold` to zero.

        What makes the zeros exact when the gradient is used: the paper runs it after each step.
        Passes over weights that do not require a gradient. Raises ValueError for a threshold that
        is negative or not finite.
        """
        _check_step("threshold", threshold)
        weights = self._weights()
        trained = [weight.requires_grad for weight in self.groups.parameters()]
        if not any(trained):
            return
        ops.threshold_(*self._labelled(weights, trained), threshold)
        if self.reached:
            factors = self._held(torch.ones_like(self._strengths))
            ops.scale_by_units_(weights, self._rows, self._columns, factors)

    @torch.no_grad()
    def proximal_(self, step: float | torch.optim.Optimizer) -> None:
        """Scale every unit's weights by max(0, 1 - step * strength / norm): exact zeros at once.

        The proximal step of the penalty, after the optimiser's; it takes the place of
        `add_gradients_` and `threshold_`. step is the learning rate, or the optimiser itself: SGD,
        Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad, bare or wrapped by Accelerate or Lightning.
        Adam divides the gradient of each weight by the root of its mean square; then the penalty of
        a unit is divided by the root mean square of these divisors over its weights, but those that
        are zero or have had no gradient, so that it balances the same gradient of the loss as with
        SGD, at the same strength (proximal steps in the optimiser's metric: Yun et al. 2021, Deleu
        & Bengio 2021; here one number for a unit).
        With the learning rate alone, Adam's divisors are in the gradient of the loss and not in the
        penalty, which then fades units that matter and units that do not alike.

        Norms are those before the step. In bfloat16 a factor within 2^-9 of 1 changes no weight:
        the product is rounded to what it was.

        For groups that share no weight this is the penalty's proximal operator, block
        soft-thresholding (Yuan & Lin 2006). Groups overlap, though: a weight whose row and column
        belong to two units is in both their groups, and is scaled by both factors. The product is
        the exact operator to first order in step; they differ by O(step^2). As with the exact
        operator a unit leaves as a whole, its weights set to zero together, here where its norm is
        at most step * strength: what is left is a unit that can be removed, not a thinned one.
        Passes over weights that do not require a gradient, or that the optimiser has not moved yet,
        and over units of which no weight has had a gradient. Raises ValueError for a step that is
        negative or not finite, and for an optimiser that lacks a weight of the groups or has a
        momentum or dampening of 1 or more; TypeError for other optimisers.
        """
        steps: float | Tensor
        if isinstance(step, (float, Real, Tensor)):
            steps = _check_step("step", step)
            trained = [weight.requires_grad for weight in self.groups.parameters()]
        else:
            steps, trained = self._steps_of(step)
        weights = self._weights()
        norms = self._norms(weights)
        factors = self._held((1 - steps * self._step(norms) / norms).clamp_min(0))
        if self.reached:  # units that went are zero everywhere, and no other changes
            ops.scale_by_units_(weights, self._rows, self._columns, factors)
        elif any(trained):
            ops.scale_by_units_(*self._labelled(weights, trained), factors)

    @property
    def strength(self) -> dict[str, float]:
        """{family name: strength}, those of the last step; 0 once the target is reached."""
        return {name: value * self._factor for name, value in self._given.items()}

    @property
    def left(self) -> float | None:
        """The share of `of` that the units not yet gone make up, at the last step; 1 before it.

        None without a target. Once `reached`, it stays as it is: at most the target.
        """
        return None if self._target is None else self._target.left

    @property
    def reached(self) -> bool:
        """Whether the target is reached, so that training may end or go on without a penalty."""
        return self._target is not None and self._target.out is not None

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step; for a lasso made with the same arguments."""
        return {
            "families": {family.name: family.size for family in self.groups.families},
            "steps": self._steps,
            "factor": self._factor,
            "target": None if self._target is None else self._target.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises ValueError where the families differ, or only one of the two has a target.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"GroupLasso: expected a state with {min(missing)!r}, got one without")
        families = {family.name: family.size for family in self.groups.families}
        if state["families"] != families:
            expected, got = (
                ", ".join(f"{name} [{size}]" for name, size in sizes.items())
                for sizes in (families, state["families"])
            )
            raise ValueError(f"GroupLasso: expected the state of families {expected}, got {got}")
        if (state["target"] is None) != (self._target is None):
            expected, got = (
                "no target" if target is None else "a target"
                for target in (self._target, state["target"])
            )
            raise ValueError(
                f"GroupLasso: expected the state of a lasso with {expected}, got one with {got}"
            )
        self._steps, self._factor = state["steps"], state["factor"]
        if self._target is not None:
            self._target.load_state_dict(state["target"])

    def go_on(self, groups: Groups, kept: Tensor) -> None:
        """Go on with the groups that are left of the former ones; kept: bool [former units].

        What `shrink_` does with a lasso. Strengths, steps and the target, a share of the model as
        it was when the lasso was made, stay.
        """
        self._label(groups)
        self._strengths = self._strengths[kept.to(self._strengths.device)]
        if self._target is not None:
            self._target.go_on(groups, kept)

    def _label(self, groups: Groups) -> None:
        self.groups = groups
        self._rows = [weight.row_units for weight in groups.weights]
        self._columns = [weight.column_units for weight in groups.weights]

    def _step(self, norms: Tensor) -> Tensor:
        """Strengths for this step [units], adapted to these norms; counts the step."""
        after = max(0, self._steps - self._warmup)
        self._factor = 1.0 if self._target is None else self._target.factor(norms, after)
        if self._steps < self._warmup:
            self._factor *= self._steps / self._warmup
        self._steps += 1
        return self._strengths * self._factor

    def _held(self, factors: Tensor) -> Tensor:
        """Factors [units] of all weights, 0 for the units that went."""
        if self.reached:
            factors[self._target.out] = 0  # type: ignore[union-attr]
        return factors

    def _norms(self, weights: list[Tensor], eps: float | None = None) -> Tensor:
        eps = self.eps if eps is None else eps
        return ops.group_norms(
            weights, self._rows, self._columns, self.groups.units, eps, self.paper_overlap
        )

    def _labelled(
        self, weights: list[Tensor], chosen: list[bool]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The chosen weights with the labels of their rows and columns, as ops take them."""
        kinds = weights, self._rows, self._columns
        weights, rows, columns = (list(compress(each, chosen)) for each in kinds)
        return weights, rows, columns

    def _steps_of(self, optimizer: torch.optim.Optimizer) -> tuple[float | Tensor, list[bool]]:
        """The step size of each unit, [units], 0 for those that do not move; or one for all.

        And which weights the optimiser moves.
        """
        parameters, weights = self.groups.parameters(), self._weights()
        names = [weight.name for weight in self.groups.weights]
        divisors = metric(optimizer, dict(zip(names, parameters, strict=True)))
        moves = [divisor is not None for divisor in divisors]
        first = divisors[0]
        if isinstance(first, float) and all(each == first for each in divisors):
            return 1 / first, moves
        # Up to the sign. Elements of dead units count no more than after a shrink.
        full = [
            _matrix(divisor).mul_(weight.sign())
            if isinstance(divisor, Tensor)
            else weight.sign().mul_(divisor or 0.0)
            for weight, divisor in zip(weights, divisors, strict=True)
        ]
        squares = self._norms(full, eps=0.0)  # their roots
        sizes = self._norms([each.sign_() for each in full], eps=0.0)
        return torch.where(sizes > 0, sizes / squares, 0.0), moves

    def _weights(self) -> list[Tensor]:
        """The weights now, as matrices; labels and strengths follow them to device and dtype."""
        weights = [_matrix(weight) for weight in self.groups.parameters()]
        kinds = {(weight.dtype, weight.device): weight for weight in weights}
        if len(kinds) > 1:
            got = ", ".join(f"{dtype} on {device}" for dtype, device in kinds)
            raise ValueError(f"GroupLasso: expected weights of one dtype and device, got {got}")
        ((dtype, device),) = kinds
        self._strengths = self._strengths.to(device, torch.promote_types(dtype, torch.float32))
        self._rows = [rows.to(device) for rows in self._rows]
        self._columns = [columns.to(device) for columns in self._columns]
        return weights


def _matrix(weight: Tensor, what: str = "weights") -> Tensor:
    """A weight of any number of dimensions as a matrix over the same memory."""
    if weight.dim() == 2:
        return weight
    if not weight.is_contiguous():
        got = f"one of shape {list(weight.shape)} that is not"
        raise ValueError(f"GroupLasso: expected contiguous {what}, got {got}")
    return weight.view(len(weight), -1)


def _check_step(argument: str, given: Any) -> float:
    value = number(argument, given)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"GroupLasso: expected {argument} >= 0 and finite, got {value}")
    return value
