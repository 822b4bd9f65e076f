# SPDX-License-Identifier: Apache-2.0
"""Shapes, inputs and the error bound that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iss_kernels.cells import CELLS


@dataclass(frozen=True)
class Case:
    """One problem: T steps, B batch, I inputs, H units, P projected outputs (0: none; LSTM alone).

    batch_sizes: rows still running at each step, for a packed batch; None for a padded one.
    """

    name: str
    T: int
    B: int
    I: int  # noqa: E741  (the letter of the shape alphabet)
    H: int
    P: int = 0
    batch_sizes: tuple[int, ...] | None = None
    slow: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one", 1, 1, 1, 1),  # every loop runs zero or one time
    Case("one_step", 1, 5, 4, 16),
    Case("one_row", 6, 1, 4, 40),  # batch 1: two panels at a time, and one left over
    Case("tail_avx2", 3, 2, 5, 17),  # 2 * 8 + 1 units
    Case("tail_avx512", 4, 7, 5, 31),  # 2 * 16 - 1 units, 7 rows: every height of tile
    Case("wide_input", 7, 3, 24, 16),  # I != H: catches swapped sizes
    Case("projected", 5, 4, 6, 19, P=5),
    Case("packed", 5, 6, 3, 9, batch_sizes=(6, 6, 4, 1, 1)),
    Case("packed_projected", 4, 3, 3, 10, P=7, batch_sizes=(3, 2, 2, 1)),
    Case("no_rows", 4, 0, 3, 5),
    Case("no_steps", 0, 3, 4, 5),
    Case("many_rows", 64, 64, 5, 8),  # weight gradients are sums over 4096 rows
    Case("wide_batch", 3, 600, 2, 3),  # backward takes 1024 rows at a time, whole steps
    Case("many_steps", 70, 30, 3, 10, P=7, batch_sizes=(30,) * 15 + (17,) * 30 + (3,) * 25),
    Case("two_threads", 30, 8, 20, 64),  # enough work that the batch is split
    Case("ptb_medium", 35, 20, 650, 650, slow=True),
]


# Masks that `make_resets` makes: nowhere, at 3 % of all places, at the first step, at one in the
# middle, at every step.
RESETS = ("none", "few", "first", "middle", "all")


def make_resets(case: Case, kind: str) -> Tensor:
    """A mask of one of the kinds in RESETS for `case`: bool, [T, B] or, packed, [N]."""
    steps = len(case.batch_sizes or range(case.T))
    t = torch.arange(steps)[:, None].expand(steps, case.B)
    few = torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) < 0.03
    few[1:2, :1] = True  # also where 3 % of all places are none
    mask = {
        "none": t < 0,
        "few": few,
        "first": t == 0,
        "middle": t == steps // 2,
        "all": t >= 0,
    }[kind]
    if case.batch_sizes is None:
        return mask
    return torch.cat([row[:n] for row, n in zip(mask, case.batch_sizes, strict=True)])


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    reverse: bool = False,
    cell: str = "lstm",
    resets: str | None = None,
) -> dict[str, Any]:
    """Arguments of `ops.recurrent`: unit-scale inputs, weights as torch's modules draw them.

    resets: one of RESETS, or None for no mask.
    """
    of = CELLS[cell]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Rounded to float32, so that one problem is exactly the same in every dtype.
        return (values * scale).float().to(dtype)

    out, scale = case.P or case.H, case.H**-0.5
    packed = case.batch_sizes is not None
    rows = (sum(case.batch_sizes),) if case.batch_sizes is not None else (case.T, case.B)
    gates = of.gates * case.H
    depth = 3 if of.deep else 1
    return {
        "cell": cell,
        "x": normal(*rows, case.I),
        "batch_sizes": torch.tensor(case.batch_sizes) if packed else None,
        "resets": make_resets(case, resets) if resets else None,
        "h0": normal(case.B, out),
        "c0": normal(case.B, case.H) if "c" in of.states else None,
        "w_ih": normal(gates, case.I, scale=scale),
        "w_hh": normal(depth * gates, out, scale=scale),
        "b_ih": normal(gates, scale=scale),
        "b_hh": normal(depth * gates, scale=scale),
        "w_hr": normal(out, case.H, scale=scale) if case.P else None,
        "masks": None,
        "reverse": reverse,
    }


def max_error(values: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from `truth`; 0 where there is nothing to compare."""
    if values.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(values.shape)}")
    if not values.isfinite().all():
        return float("inf")
    difference = (values.detach().double() - truth.detach().double()).abs()
    return float(difference.max()) if truth.numel() else 0.0


def assert_no_worse_than_torch(
    ours: Tensor, torchs: Tensor, truth: Tensor, floor_eps: float = 8
) -> None:
    """Our error against `truth` is at most twice torch's own, plus a floor.

    The floor is floor_eps units of rounding of the largest value: what is left where torch happens
    to be exact, or where a short sum leaves both with an error of an ulp or two.
    """
    scale = max(1.0, float(truth.detach().abs().max()) if truth.numel() else 0.0)
    floor = floor_eps * torch.finfo(ours.dtype).eps * scale
    error, allowed = max_error(ours, truth), 2 * max_error(torchs, truth) + floor
    if not error <= allowed:
        raise AssertionError(
            f"error {error:.3g}, allowed {allowed:.3g} (2 x torch's + {floor:.3g})"
        )
