# SPDX-License-Identifier: Apache-2.0
"""One streaming step on a GPU: every tail of units, rows and inputs, aligned or not."""

import functools

import pytest
import simt
import torch

from iss_kernels import reference
from iss_kernels.cells import CELLS
from iss_kernels.testing import assert_no_worse_than_torch

lib = torch.ops.iss_kernels
by_name = functools.partial(pytest.mark.parametrize, ids=lambda v: str(v).removeprefix("torch."))
# (activations, weights)
KINDS = [(d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
KINDS += [(torch.float32, d) for d in (torch.bfloat16, torch.float16)]
# (inputs, units, projected outputs or 0)
SIZES = [(1, 1, 0), (3, 5, 0), (7, 17, 0), (40, 33, 9), (300, 64, 0), (5, 64, 48)]
# The most that rows begin with a multiple of 16 bytes, how nn.LSTM has it, and nothing aligned.
LAYOUTS = ["padded", "plain", "odd"]


def placed(tensor, layout):
    """The same values where rows begin as `layout` says."""
    rows, columns = tensor.shape
    if layout == "plain":
        return tensor.contiguous()
    stride = (columns + 7) // 8 * 8 if layout == "padded" else columns + 1
    memory = tensor.new_full((rows * stride + 1,), float("nan"))
    start = 0 if layout == "padded" else 1
    view = memory[start : start + rows * stride].view(rows, stride)[:, :columns]
    return view.copy_(tensor)


def step_inputs(kind, batch, sizes, bias=True, cell="lstm"):
    """x, h, c, w_ih, w_hh, b_ih, b_hh of recurrent_step_: of unit scale."""
    dtype, stored = kind
    inputs, hidden, output = sizes[0], sizes[1], sizes[2] or sizes[1]
    rows = CELLS[cell].gates * hidden
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    x, h, c = (normal(batch, n).to(dtype) for n in (inputs, output, hidden))
    w_ih, w_hh = (normal(rows, n, scale=hidden**-0.5).to(stored) for n in (inputs, output))
    b_ih = normal(rows).to(dtype) if bias else None
    b_hh = normal(rows).to(dtype) if bias and cell != "lstm" else None
    c = c.to(torch.promote_types(dtype, torch.float32)) if cell == "lstm" else None
    return x, h, c, w_ih, w_hh, b_ih, b_hh


def run(gpu, inputs, layout, cell="lstm"):
    """-> out, and c where the cell has one"""
    x, h, c, w_ih, w_hh, *biases = gpu.to(inputs)
    x, h, w_ih, w_hh = (placed(t, layout) for t in (x, h, w_ih, w_hh))
    rows, hidden = len(x), len(w_ih) // CELLS[cell].gates
    out = placed(x.new_full((rows, hidden), float("nan")), layout)
    c = None if c is None else c.clone()
    lib.recurrent_step_(cell, x, h, c, w_ih, w_hh, *biases, out)
    return [t.cpu() for t in (out, c) if t is not None]


def by_torch(inputs, dtype, cell="lstm"):
    """The next h before any projection, and c, from the reference's step."""
    x, h, c, w_ih, w_hh, *biases = (None if t is None else t.to(dtype) for t in inputs)
    hidden, w_hr = len(w_ih) // CELLS[cell].gates, None
    if h.shape[1] != hidden:  # a w_hr that keeps h as it is
        w_hr, unused = torch.eye(hidden, dtype=dtype), hidden - h.shape[1]
        h, w_hh = (torch.nn.functional.pad(t, (0, unused)) for t in (h, w_hh))
    y, _, c = reference.recurrent(
        cell, x[None], None, None, h, c, w_ih, w_hh, *biases, w_hr, None, False
    )
    return [t for t in (y[0], c) if t is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@by_name("kind", KINDS)
def test_a_step_errs_at_most_twice_as_much_as_torch(gpu, kind, sizes, batch, layout):
    inputs = step_inputs(kind, batch, sizes, bias=sizes[1] != 17)
    result, same = run(gpu, inputs, layout), by_torch(inputs, kind[0])
    truth = by_torch(inputs, torch.float64)
    for a, b, t in zip(result, same, truth, strict=True):
        assert_no_worse_than_torch(a, b.to(a.dtype), t)
    assert result[0].dtype == kind[0]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
@by_name("kind", KINDS)
def test_other_cells_too(gpu, kind, cell, batch, layout):
    inputs = step_inputs(kind, batch, (40, 33, 0), cell=cell)
    (result,), (same,) = run(gpu, inputs, layout, cell), by_torch(inputs, kind[0], cell)
    (truth,) = by_torch(inputs, torch.float64, cell)
    assert_no_worse_than_torch(result, same, truth)


@by_name("kind", KINDS)
@pytest.mark.parametrize("sizes", [(7, 17, 0), (40, 64, 0)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(gpu, kind, sizes):
    x, h, c, *weights = step_inputs(kind, 9, sizes)
    out, c_new = run(gpu, (x, h, c, *weights), "padded")
    for first, last in ((0, 1), (3, 5), (2, 5), (1, 9)):
        rows = slice(first, last)
        part = run(gpu, (x[rows], h[rows], c[rows], *weights), "padded")
        assert torch.equal(part[0], out[rows]) and torch.equal(part[1], c_new[rows])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e4])
def test_extreme_inputs_saturate(gpu, value):
    inputs = step_inputs(KINDS[0], 2, (4, 5, 0))
    inputs[0][0, 1] = value
    result, same = run(gpu, inputs, "plain"), by_torch(inputs, torch.float32)
    for a, b in zip(result, same, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.slow
def test_more_rows_than_a_grid_has_blocks_for(gpu):
    """A grid has 65,535 blocks along y, each with 8 rows."""
    x, h, c, *weights = step_inputs(KINDS[0], 7, (1, 1, 0))
    repeats = 8 * 65535 // 7 + 2
    many = (t.repeat(repeats, 1) for t in (x, h, c))
    for result, few in zip(
        run(gpu, (*many, *weights), "plain"), run(gpu, (x, h, c, *weights), "plain"), strict=True
    ):
        assert torch.equal(result, few.repeat(repeats, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@by_name("kind", KINDS)
def test_the_checker_finds_nothing(checked_gpu, kind, layout):
    inputs = step_inputs(kind, 9, (40, 17, 0))
    results = []
    for order in simt.ORDERS:
        checked_gpu.simulator.configure(*order, preempt=50)
        results.append(run(checked_gpu, inputs, layout))
    checked_gpu.simulator.configure()
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
