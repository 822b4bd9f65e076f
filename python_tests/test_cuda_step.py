# SPDX-License-Identifier: Apache-2.0
"""One streaming step on a GPU: every tail of units, rows and inputs, aligned or not."""

import functools

import pytest
import simt
import torch

from iss_kernels import reference
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


def step_inputs(kind, batch, sizes, bias=True):
    """x, h, c, w_ih, w_hh, bias of lstm_step_, as test_lstm_ops has them: of unit scale."""
    dtype, stored = kind
    inputs, hidden, output = sizes[0], sizes[1], sizes[2] or sizes[1]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    x, h, c = (normal(batch, n).to(dtype) for n in (inputs, output, hidden))
    w_ih, w_hh = (normal(4 * hidden, n, scale=hidden**-0.5).to(stored) for n in (inputs, output))
    b = normal(4 * hidden).to(dtype) if bias else None
    return x, h, c.to(torch.promote_types(dtype, torch.float32)), w_ih, w_hh, b


def run(gpu, inputs, layout):
    """-> out, c"""
    x, h, c, w_ih, w_hh, bias = gpu.to(inputs)
    x, h, w_ih, w_hh = (placed(t, layout) for t in (x, h, w_ih, w_hh))
    c, out = c.clone(), placed(torch.full_like(c, float("nan")).to(x.dtype), layout)
    lib.lstm_step_(x, h, c, w_ih, w_hh, bias, out)
    return out.cpu(), c.cpu()


def by_torch(inputs, dtype):
    """o * tanh(c) before any projection, and c, from the reference's step."""
    x, h, c, w_ih, w_hh, bias = (None if t is None else t.to(dtype) for t in inputs)
    hidden = c.shape[1]
    eye = torch.eye(hidden, dtype=dtype)  # keeps h as it is where P != H
    w_hr = None if h.shape[1] == hidden else eye
    padded_h = h if w_hr is None else torch.zeros(len(h), hidden, dtype=dtype)
    if w_hr is not None:
        padded_h[:, : h.shape[1]] = h
        wide = torch.zeros(4 * hidden, hidden, dtype=dtype)
        wide[:, : h.shape[1]] = w_hh
        w_hh = wide
    y, _, c = reference.recurrent(x[None], None, padded_h, c, w_ih, w_hh, bias, None, w_hr, False)
    return y[0], c


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
