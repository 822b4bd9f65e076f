# SPDX-License-Identifier: Apache-2.0
"""Group Lasso over the units of a model: the penalty that makes whole units fade during training.

`lasso()` is the definition, for autograd; the methods that end in _ do the same, or a step of it,
in place and in one pass over each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iss_kernels import ops
from iss_kernels.groups import Groups


class GroupLasso:
    """The penalty sum over units of strength * norm (Wen et al. 2018, section 3.2).

    The norm of a unit is sqrt(sum of squares + eps) over all weights that leave with it; biases are
    in no group. strength is one float, or {family name: float} with every family of `groups` named.
    paper_overlap=True counts the recurrent elements that lie in both a row and a column of their
    unit twice, as the paper's code does. Use either `lasso()` in the loss, or `add_gradients_`
    after backward(), not both; then `threshold_` after each optimiser step:

        loss.backward(); lasso.add_gradients_(); optimizer.step(); lasso.threshold_(1e-4)

    Raises ValueError for a strength that is negative, not finite, or does not name the families.
    Every method raises ValueError where the weights differ in dtype or device.
    """

    def __init__(
        self,
        groups: Groups,
        strength: float | Mapping[str, float] = 1e-4,
        eps: float = 1e-8,
        paper_overlap: bool = False,
    ) -> None:
        names = [family.name for family in groups.families]
        by_name = strength if isinstance(strength, Mapping) else dict.fromkeys(names, strength)
        if set(by_name) != set(names):
            raise ValueError(
                f"GroupLasso: expected strength for the families {', '.join(names)}, "
                f"got {', '.join(by_name) or 'none'}"
            )
        for name, value in by_name.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"GroupLasso: expected strength >= 0 for {name}, got {value}")
        if not eps > 0:
            raise ValueError(f"GroupLasso: expected eps > 0, got {eps}")
        self.groups = groups
        self.eps = eps
        self.paper_overlap = paper_overlap
        self._strengths = torch.tensor(  # of each unit, [units]
            [by_name[f.name] for f in groups.families for _ in f.units], dtype=torch.float64
        )
        self._rows = [weight.row_units for weight in groups.weights]
        self._columns = [weight.column_units for weight in groups.weights]

    def __call__(self) -> Tensor:
        """The penalty, a scalar with autograd: add it to the loss."""
        weights = self._weights()
        return torch.dot(self._strengths, self._norms(weights))

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
        weights = self._weights()
        norms = self._norms(weights)
        trained, grads = [], []
        for i, weight in enumerate(weights):
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                trained.append(i)
                grads.append(weight.grad)
        if trained:
            ops.add_scaled_by_units_(
                grads,
                [weights[i] for i in trained],
                [self._rows[i] for i in trained],
                [self._columns[i] for i in trained],
                self._strengths / norms,
                self.paper_overlap,
            )
        return torch.dot(self._strengths, norms)

    def threshold_(self, threshold: float = 1e-4) -> None:
        """Set the elements of the groups that are smaller than `threshold` to zero.

        What makes the zeros exact when the gradient is used: the paper runs it after each step.
        """
        ops.threshold_(self._weights(), self._rows, self._columns, threshold)

    @torch.no_grad()
    def proximal_(self, step: float) -> None:
        """Scale every unit's weights by max(0, 1 - step * strength / norm): exact zeros at once.

        step is the learning rate. The proximal step of the penalty, decoupled from the optimiser as
        weight decay is in AdamW; it takes the place of `add_gradients_` and `threshold_`. Norms are
        those before the step. In bfloat16 a factor within 2^-9 of 1 changes no weight: the product
        is rounded to what it was.

        For groups that share no weight this is the penalty's proximal operator, block
        soft-thresholding (Yuan & Lin 2006). Groups overlap, though: a weight whose row and column
        belong to two units is in both their groups, and is scaled by both factors. The product is
        the exact operator to first order in step; they differ by O(step^2). As with the exact
        operator a unit leaves as a whole, its weights set to zero together, here where its norm is
        at most step * strength: what is left is a unit that can be removed, not a thinned one.
        """
        weights = self._weights()
        factors = (1 - step * self._strengths / self._norms(weights)).clamp_min(0)
        ops.scale_by_units_(weights, self._rows, self._columns, factors)

    def _norms(self, weights: list[nn.Parameter]) -> Tensor:
        return ops.group_norms(
            weights, self._rows, self._columns, self.groups.units, self.eps, self.paper_overlap
        )

    def _weights(self) -> list[nn.Parameter]:
        """The weights now; labels and strengths follow them to their device and dtype."""
        weights = self.groups.parameters()
        kinds = {(weight.dtype, weight.device): weight for weight in weights}
        if len(kinds) > 1:
            got = ", ".join(f"{dtype} on {device}" for dtype, device in kinds)
            raise ValueError(f"GroupLasso: expected weights of one dtype and device, got {got}")
        ((dtype, device),) = kinds
        self._strengths = self._strengths.to(device, torch.promote_types(dtype, torch.float32))
        self._rows = [rows.to(device) for rows in self._rows]
        self._columns = [columns.to(device) for columns in self._columns]
        return weights
