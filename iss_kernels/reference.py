# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain torch: the definition of correct, and the fallback without a compiler.

Written to be read, and differentiated by autograd as often as asked. The kernels under csrc/ are
held to these functions by tests, and these to torch.nn.LSTM in float64. Letters: T steps, B batch,
I input size, H hidden (cell) size, P output size (H, or proj_size), N rows of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def lstm(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction, over all time steps; torch.nn.LSTM's equations.

    x: [T, B, I]; or [N, I] with batch_sizes: [T] int64 on the CPU, as in a PackedSequence.
    h0: [B, P], c0: [B, H], w_ih: [4H, I], w_hh: [4H, P], b_ih and b_hh: [4H], w_hr: [P, H];
    gates in torch's order i, f, g, o. Returns y: [T, B, P] or [N, P], h_n: [B, P], c_n: [B, H].
    """
    steps = x.unbind(0) if batch_sizes is None else torch.split(x, batch_sizes.tolist())
    outputs = [x.new_empty(0)] * len(steps)
    h, c = h0, c0
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = len(steps[t])  # rows still running; the others keep their state
        gates = linear(steps[t], w_ih, b_ih) + linear(h[:n], w_hh, b_hh)
        i, f, g, o = gates.chunk(4, dim=1)
        c_t = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        if w_hr is not None:
            h_t = linear(h_t, w_hr)
        outputs[t] = h_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    if not steps:
        y = x.new_empty((*x.shape[:-1], h0.shape[1]))
    else:
        y = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return y, h, c


def group_norms(
    weights: Sequence[Tensor],
    row_units: Sequence[Tensor],
    column_units: Sequence[Tensor],
    units: int,
    eps: float,
    paper_overlap: bool,
) -> Tensor:
    """Norm of each unit's group: sqrt(sum of the squares of its elements + eps), [units].

    weights: matrices [R, C]; row_units: [R] and column_units: [C] (int32) name the unit that a row
    or column belongs to, -1 for none. An element whose row and column belong to the same unit
    counts once, since a group is a set; paper_overlap=True counts it twice, as the paper's code
    does.
    The norms have the dtype of the weights; for bfloat16 weights, all is computed in float32.
    Wen et al. 2018, section 3.2; eps inside the root as in their code.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    squares = torch.zeros(units + 1, dtype=wide, device=weights[0].device)
    for weight, rows, columns in zip(weights, row_units, column_units, strict=True):
        square = weight.to(wide).square()
        both = rows[:, None] == columns[None, :]
        in_columns = square if paper_overlap else square.masked_fill(both, 0)
        # Elements of no unit (-1) fall into one more place at the end, which is dropped.
        squares = squares.index_add(0, rows.long() % (units + 1), square.sum(1))
        squares = squares.index_add(0, columns.long() % (units + 1), in_columns.sum(0))
    return (squares[:units] + eps).sqrt()


def scaled_by_units(
    weight: Tensor, rows: Tensor, columns: Tensor, factors: Tensor, paper_overlap: bool
) -> Tensor:
    """weight[r, c] * (factors[rows[r]] + factors[columns[c]]), or one factor where both are equal.

    The gradient of sum(dnorms * norms) for factors = dnorms / norms. Shapes as in `group_norms`;
    factors: [units], float32 for a bfloat16 weight, as is then the result.
    """
    padded = torch.cat([factors, factors.new_zeros(1)])  # [-1] is the factor of no unit
    by_row, by_column = padded[rows.long()][:, None], padded[columns.long()][None, :]
    both = rows[:, None] == columns[None, :]
    by_column = by_column.expand_as(weight)
    return weight * (by_row + (by_column if paper_overlap else by_column.masked_fill(both, 0)))


def scaled(weight: Tensor, rows: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
    """weight[r, c] * factors[rows[r]] * factors[columns[c]], or one factor where both are equal.

    Shapes as in `group_norms`; factors: [units], float32 for a bfloat16 weight, whose products are
    rounded to bfloat16.
    """
    padded = torch.cat([factors, factors.new_ones(1)])  # [-1] is the factor of no unit
    by_row, by_column = padded[rows.long()][:, None], padded[columns.long()][None, :]
    both = rows[:, None] == columns[None, :]
    by_column = by_column.expand_as(weight).masked_fill(both, 1)
    return (weight * (by_row * by_column)).to(weight.dtype)


def thresholded(weight: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """weight with the elements of any group (row or column labelled) below threshold set to 0."""
    grouped = (rows >= 0)[:, None] | (columns >= 0)[None, :]
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    return weight.masked_fill(grouped & (size < threshold), 0)
