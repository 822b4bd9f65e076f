# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain torch: the definition of correct, and the fallback without a compiler.

Written to be read, and differentiated by autograd as often as asked. The kernels under csrc/ are
held to these functions by tests, and these to torch's modules in float64. Letters: T steps, B
batch, I input size, H hidden (cell) size, P output size (H, or proj_size), G gates of a unit, D
micro-steps of a step of a deep cell, N rows of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear


def recurrent(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    masks: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of a cell in one direction, over all time steps.

    cell: a name in `cells.CELLS`; the equations are those of `STEPS`.
    x: [T, B, I]; or [N, I] with batch_sizes: [T] int64 on the CPU, as in a PackedSequence; or
    [B, I], a single step.
    resets: bool [T, B] or [N]; where True the state is zero before step t, whichever way the layer
    walks: in a reverse direction that falls between steps t and t - 1.
    h0: [B, P], c0: [B, H] for a cell with a state c. w_ih: [G H, I], w_hh: [G H, P], b_ih and b_hh:
    [G H], w_hr: [P, H], gates in torch's order. Of a deep cell w_hh: [D G H, H], b_hh: [D G H].
    masks: [2, B, H], for a deep cell alone, the same at all steps: see `rhn_step`.
    Returns y: [T, B, P], [N, P] or [B, P], h_n: [B, P], c_n: [B, H] or None.
    """
    single = x.dim() == 2 and batch_sizes is None
    if single:
        x = x.unsqueeze(0)
    steps = x.unbind(0) if batch_sizes is None else torch.split(x, batch_sizes.tolist())
    cuts: Sequence[Tensor | None] = [None] * len(steps)
    if resets is not None:
        cuts = torch.split(resets.flatten(), [len(step) for step in steps])
    outputs = [x.new_empty(0)] * len(steps)
    h, c = h0, c0
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = len(steps[t])  # rows still running; the others keep their state
        # Forward the cut before step t; in reverse the one between steps t + 1 and t.
        cut = cuts[t] if not reverse else cuts[t + 1] if t + 1 < len(steps) else None
        running = [h[:n]] if c is None else [h[:n], c[:n]]
        if cut is not None:
            among = torch.nn.functional.pad(cut, (0, n - len(cut)))[:, None]
            running = [state.masked_fill(among, 0) for state in running]
        gates_x = linear(steps[t], w_ih, b_ih)
        masked = {} if masks is None else {"masks": masks[:, :n]}
        now = STEPS[cell](gates_x, *running, w_hh=w_hh, b_hh=b_hh, w_hr=w_hr, **masked)
        outputs[t] = now[0]
        h = torch.cat([now[0], h[n:]])
        c = None if c is None else torch.cat([now[1], c[n:]])
    if not steps:
        y = x.new_empty((*x.shape[:-1], h0.shape[1]))
    else:
        y = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return (y[0] if single else y), h, c


def lstm_step(
    gates_x: Tensor,
    h: Tensor,
    c: Tensor,
    *,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.nn.LSTM's step from gates_x = W_ih x + b_ih; gates in the order i, f, g, o."""
    gates = gates_x + linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else linear(h, w_hr)), c


def gru_step(
    gates_x: Tensor, h: Tensor, *, w_hh: Tensor, b_hh: Tensor | None, w_hr: None = None
) -> tuple[Tensor]:
    """torch.nn.GRU's step; gates in the order r, z, n. r scales the recurrent part of n alone."""
    r_x, z_x, n_x = gates_x.chunk(3, dim=1)
    r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, dim=1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return (n + z * (h - n),)


def rnn_tanh_step(
    gates_x: Tensor, h: Tensor, *, w_hh: Tensor, b_hh: Tensor | None, w_hr: None = None
) -> tuple[Tensor]:
    """torch.nn.RNN's step with nonlinearity="tanh"."""
    return ((gates_x + linear(h, w_hh, b_hh)).tanh(),)


def rnn_relu_step(
    gates_x: Tensor, h: Tensor, *, w_hh: Tensor, b_hh: Tensor | None, w_hr: None = None
) -> tuple[Tensor]:
    """torch.nn.RNN's step with nonlinearity="relu"."""
    return ((gates_x + linear(h, w_hh, b_hh)).relu(),)


def rhn_step(
    gates_x: Tensor,
    h: Tensor,
    *,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: None = None,
    masks: Tensor | None = None,
    separate_carry: bool = False,
) -> tuple[Tensor]:
    """A step of a recurrent highway network: Zilly et al. 2017, equations 6 to 9.

    D micro-steps, each with matrices of its own, w_hh: [D G H, H]; the input enters the first.
    Gates in the order candidate, transform, carry; without a carry gate it is 1 - transform.
    masks: [2, B, H], as variational dropout scales them: of the state before each product (Gal and
    Ghahramani 2016), and of each candidate (Semeniuta et al. 2016: what a state keeps is not
    dropped).
    """
    depth = len(w_hh) // gates_x.shape[1]
    biases = [None] * depth if b_hh is None else b_hh.chunk(depth)
    for d, (weight, bias) in enumerate(zip(w_hh.chunk(depth), biases, strict=True)):
        products = linear(h if masks is None else masks[0] * h, weight, bias)
        gates = gates_x + products if d == 0 else products
        candidate, transform, *carry = gates.chunk(3 if separate_carry else 2, dim=1)
        candidate, transform = candidate.tanh(), transform.sigmoid()
        if masks is not None:
            candidate = masks[1] * candidate
        if separate_carry:
            h = transform * candidate + carry[0].sigmoid() * h
        else:
            h = h + transform * (candidate - h)
    return (h,)


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
    "rhn": rhn_step,
    "rhn_carry": partial(rhn_step, separate_carry=True),
}


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
