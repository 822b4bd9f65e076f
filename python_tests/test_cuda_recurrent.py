# SPDX-License-Identifier: Apache-2.0
"""The recurrent ops on a GPU: every cell, tier and dtype, against torch's own error."""

import dataclasses
import functools

import pytest
import test_recurrent_ops
import torch
from gpu import limits_for, names_of_ops
from test_recurrent_ops import by_reference, is_floating, ours
from torch.library import opcheck

from iss_kernels import explain_plan
from iss_kernels.cells import CELLS
from iss_kernels.testing import Case, assert_no_worse_than_torch, make_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, whenever oneDNN is switched
]

lib = torch.ops.iss_kernels
TIERS = ("block", "cluster", "grid", "steps", "one step")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
by_name = functools.partial(pytest.mark.parametrize, ids=lambda v: str(v).removeprefix("torch."))
CASES = [
    Case("one", 1, 1, 1, 1),  # every loop runs zero or one time
    Case("two_steps", 2, 1, 1, 1),
    Case("odd", 7, 3, 4, 5),
    Case("two_tiles", 2, 5, 3, 17),  # 2 * 8 + 1 units
    Case("many_tiles", 5, 1, 6, 33),
    Case("wide", 4, 3, 5, 64),
    Case("packed", 7, 5, 3, 33, batch_sizes=(5, 5, 3, 3, 2, 1, 1)),
    Case("one_step", 1, 3, 4, 17),
    Case("one_step_aligned", 1, 9, 8, 32),  # 16 bytes at a time; 8 rows and one more
    Case("one_step_packed", 1, 9, 3, 5, batch_sizes=(9,)),
    Case("one_large_step", 1, 5, 3, 164),  # too large for a single launch on a small GPU
]
SMALL = Case("small", 3, 3, 4, 17, batch_sizes=(3, 2, 1))
PADDED = Case("padded", 4, 5, 3, 33)
# What cells share is tried with the LSTM. Of the others: more units than a warp has (of an RNN 32),
# several blocks, rows that end, and the single step.
OTHERS = {
    "gru": ("odd", "packed", "wide", "one_step", "one_step_aligned"),
    "rnn_tanh": ("packed", "wide", "one_step_aligned"),
    "rnn_relu": ("packed",),
}
CUDA_CELLS = ("lstm", *OTHERS)
by_cell = pytest.mark.parametrize("cell", CUDA_CELLS)
PROJECTED = [
    Case("projected", 5, 4, 6, 19, P=5),
    Case("packed_projected", 4, 3, 3, 10, P=7, batch_sizes=(3, 2, 2, 1)),
    Case("one_step_projected", 1, 9, 6, 19, P=5),
]


@pytest.fixture(params=TIERS)
def tier(request, gpu):
    """A tier, which `be` makes the GPU take for a case, or skips where it has no use."""
    return request.param


def be(gpu, tier, case, dtype, tf32=False, cell="lstm"):
    """Make the GPU one on which this case is run by this tier."""
    limits = limits_for(tier, case.H, case.B, dtype, tf32, case.T, cell)
    if limits is None:
        pytest.skip(f"no GPU runs {case.H} units of {dtype}, {case.T} steps, by {tier}")
    gpu.pretend(limits)


def of_tier(tier, case):
    """The same case, or its first step where the tier takes no more."""
    if tier != "one step":
        return case
    return dataclasses.replace(case, T=1, batch_sizes=case.batch_sizes and case.batch_sizes[:1])


def run(gpu, function, case, dtype, reverse=False, cell="lstm", resets=None):
    """As test_recurrent_ops.run, with inputs on the GPU and results on the CPU."""

    def on_cpu(inputs):
        return [None if y is None else y.cpu() for y in function(gpu.to(inputs))]

    results = test_recurrent_ops.run(on_cpu, case, dtype, reverse, None, cell, resets)
    return [t.cpu() for t in results]


def torchs(inputs):
    """torch's module; without oneDNN, whose 16-bit LSTM needs AVX-512 and fails elsewhere."""
    with torch.backends.mkldnn.flags(enabled=False):
        return test_recurrent_ops.torchs(inputs)


def assert_as_good_as_torch(gpu, case, dtype, reverse, cell="lstm", resets=None):
    result = run(gpu, ours, case, dtype, reverse, cell, resets)
    same = test_recurrent_ops.run(torchs, case, dtype, reverse, None, cell, resets)
    assert [t.dtype for t in result] == [t.dtype for t in same] == [dtype] * len(same)
    if dtype == torch.float64:  # no truth beyond float64 at hand: the two may differ by rounding
        for a, b in zip(result, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        return
    truth = test_recurrent_ops.run(torchs, case, torch.float64, reverse, dtype, cell, resets)
    for a, b, t in zip(result, same, truth, strict=True):
        assert_no_worse_than_torch(a, b, t)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@by_name("dtype", DTYPES)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch(gpu, tier, dtype, case, reverse):
    be(gpu, tier, case, dtype)
    assert_as_good_as_torch(gpu, case, dtype, reverse)


@pytest.mark.parametrize(
    ("cell", "case"),
    [pytest.param(k, c, id=f"{k}-{c}") for k, v in OTHERS.items() for c in CASES if c.name in v],
)
@by_name("dtype", DTYPES)
def test_other_cells_too(gpu, tier, dtype, cell, case):
    if cell == "rnn_relu" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("rounding decides where the gradient of relu is 1")
    be(gpu, tier, case, dtype, cell=cell)
    assert_as_good_as_torch(gpu, case, dtype, case.name == "packed", cell)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["few", "first", "all"])
@pytest.mark.parametrize("case", [PADDED, SMALL], ids=str)
@by_cell
def test_resets_cut_states_and_gradients(gpu, tier, cell, case, kind, reverse):
    case = of_tier(tier, case)
    be(gpu, tier, case, torch.float32, cell=cell)
    assert_as_good_as_torch(gpu, case, torch.float32, reverse, cell, kind)


@by_cell
def test_no_infinity_crosses_a_reset(gpu, tier, cell):
    """What is before a reset is not multiplied by zero but left out."""
    case = of_tier(tier, PADDED)
    be(gpu, tier, case, torch.float32, cell=cell)
    inputs = make_inputs(case, torch.float32, cell=cell, resets="first")
    inputs["h0"][2, 1] = float("inf")
    inputs["h0"][3, 0] = float("nan")
    leaves = gpu.to({k: v.clone().requires_grad_() for k, v in inputs.items() if is_floating(v)})
    outputs = [y for y in ours(gpu.to(inputs) | leaves) if y is not None]
    grads = torch.autograd.grad([y.sum() for y in outputs], leaves.values(), materialize_grads=True)
    assert all(t.isfinite().all() for t in (*outputs, *grads))
    states = dict(zip(leaves, grads, strict=True))
    assert all((states[k] == 0).all() for k in ("h0", "c0") if k in states)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", PROJECTED, ids=str)
@by_name("dtype", DTYPES)
def test_projections_too(gpu, dtype, case, reverse):
    plan = explain_plan(case.H, case.B, dtype, proj_size=case.P, steps=case.T, device="H100")
    assert plan.tier == ("one step" if case.T == 1 else "steps")
    assert_as_good_as_torch(gpu, case, dtype, reverse)


@pytest.mark.parametrize("case", [
    Case("no_rows", 4, 0, 3, 5),
    Case("no_steps", 0, 3, 4, 5),
    Case("no_steps_projected", 0, 3, 4, 5, P=2),
], ids=str)  # fmt: skip
def test_nothing_to_do(gpu, case):
    for a, b in zip(
        run(gpu, ours, case, torch.float32),
        test_recurrent_ops.run(by_reference, case, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_layer_without_units_has_empty_outputs(gpu):
    x, h, w_ih, w_hh = gpu.to([torch.ones(s) for s in ((3, 2, 4), (2, 0), (0, 4), (0, 0))])
    for steps in (1, 3):
        arguments = ("lstm", x[:steps], None, None, h, h, w_ih, w_hh, *[None] * 4)
        y, h_n, c_n, gates, cells = lib.recurrent_forward(*arguments, False, True)
        assert (y.shape, h_n.shape, c_n.shape) == ((steps, 2, 0), (2, 0), (2, 0))
        saved = (y, gates, cells)
        dx, *rest = lib.recurrent_backward(y, h, h, *arguments, *saved, False, True, True, True)
        assert torch.equal(dx, torch.zeros_like(x[:steps]))
        assert all(t.numel() == 0 for t in rest)


# -- TF32 ------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


def to_tf32(t):
    """To the nearest number with 10 bits after the point."""
    bits = t.float().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tf32_errs_no_more_than_its_rounding(gpu, tier, case, tf32):
    """Held to a reference that rounds what its products multiply; gradients as outputs are."""
    be(gpu, tier, case, torch.float32, tf32=True)
    truth = test_recurrent_ops.run(torchs, case, torch.float64, numbers=torch.float32)
    result = run(gpu, ours, case, torch.float32)
    exact = test_recurrent_ops.run(torchs, case, torch.float32)
    for a, b, t in zip(result, exact, truth, strict=True):
        # A product's operands are each within 2^-11, or, where cuBLAS makes every product and cuts
        # them off, 2^-10 (an H100: 2^13.1 eps); sums over H (and N) terms of mixed sign.
        by_cublas = tier == "steps" and not gpu.simulator
        assert_no_worse_than_torch(a, b, t, floor_eps=8 + 2 ** (14 if by_cublas else 13))
    resident = tier not in ("steps", "one step")
    if resident and case.H > 1 and gpu.simulator:  # and it is what was computed with
        assert not torch.equal(result[0], exact[0])


def test_float32_is_exact_unless_asked(gpu):
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    case = Case("wide", 2, 3, 5, 64)
    assert_as_good_as_torch(gpu, case, torch.float32, False)


# -- what else an op must do -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@by_name("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits_in_any_order_of_threads(gpu, tier, dtype, cell):
    case = of_tier(tier, SMALL)
    be(gpu, tier, case, dtype, cell=cell)
    first = run(gpu, ours, case, dtype, cell=cell, resets="few")
    orders = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2)]
    for policy, seed in orders:
        if gpu.simulator:
            gpu.simulator.configure(policy, seed)
        again = run(gpu, ours, case, dtype, cell=cell, resets="few")
        assert all(map(torch.equal, first, again))
    if gpu.simulator:
        gpu.simulator.configure()


@pytest.mark.parametrize("tier", ["cluster", "grid"])
def test_a_device_that_was_partitioned_since_it_was_asked_gets_another_plan(gpu, tier):
    """Host files remember a device's limits, and ask it about each plan that they make of them."""
    if not gpu.simulator:
        pytest.skip("needs a device that says another thing when it is asked again")
    case = Case("wide", 4, 3, 5, 64)
    limits = limits_for(tier, case.H, case.B, torch.float32, False, case.T)
    for left in (1, 3):
        gpu.simulator.pretend(*limits, left=left)
        assert_as_good_as_torch(gpu, case, torch.float32, False)


def test_a_row_does_not_depend_on_its_batch(gpu, tier):
    case = of_tier(tier, Case("rows", 3, 5, 4, 17))
    be(gpu, tier, case, torch.float32)
    inputs = gpu.to(make_inputs(case, torch.float32))
    y, *_ = ours(inputs)
    for row in (0, 4):
        one = {k: inputs[k][row : row + 1] for k in ("h0", "c0")}
        one_y, *_ = ours(inputs | one | {"x": inputs["x"][:, row : row + 1]})
        # The emulated device's GEMM is torch's for the CPU, whose rows depend on their batch.
        torch.testing.assert_close(one_y[:, 0], y[:, row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [slice(None, None, 2), slice(1, None)], ids=str)
def test_non_contiguous_arguments_give_the_same_result(gpu, tier, kept):
    """Every other column of a wider tensor, or all but the first."""
    case = of_tier(tier, Case("strided", 4, 5, 6, 13))
    be(gpu, tier, case, torch.float32)
    inputs = make_inputs(case, torch.float32)

    def strided(t):
        if not is_floating(t):
            return t
        columns = 2 * t.shape[-1] if kept.step else t.shape[-1] + 1
        wide = torch.full((*t.shape[:-1], columns), float("nan"), dtype=t.dtype)
        wide[..., kept] = t
        return wide[..., kept]

    apart = {k: strided(v) for k, v in inputs.items()}
    for a, b in zip(ours(gpu.to(apart)), ours(gpu.to(inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_nan_and_infinity_pass_as_in_the_reference(gpu, tier):
    case = of_tier(tier, Case("nan", 3, 5, 4, 11))
    be(gpu, tier, case, torch.float32)
    inputs = make_inputs(case, torch.float32)
    inputs["x"][-1, 2, 0] = float("nan")
    inputs["x"][0, 4, 1] = float("inf")
    inputs["h0"][0, 0] = float("-inf")
    for a, b in zip(ours(gpu.to(inputs)), by_reference(inputs), strict=True):
        torch.testing.assert_close(a.cpu(), b, equal_nan=True, rtol=1e-5, atol=1e-5)


@by_cell
def test_no_bias_or_one(gpu, tier, cell):
    case = of_tier(tier, Case("biases", 3, 2, 4, 9))
    be(gpu, tier, case, torch.float32, cell=cell)
    for none in (("b_ih", "b_hh"), ("b_ih",), ("b_hh",)):
        inputs = make_inputs(case, torch.float32, cell=cell) | dict.fromkeys(none)
        for a, b in zip(ours(gpu.to(inputs)), by_reference(inputs), strict=True):
            if b is not None:
                torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@by_cell
@by_name("dtype", DTYPES)
def test_a_single_step_has_the_bits_of_a_stream(gpu, dtype, cell):
    case = Case("one_step", 1, 9, 8, 32)
    be(gpu, "one step", case, dtype, cell=cell)
    inputs = gpu.to(make_inputs(case, dtype, cell=cell) | {"b_hh": None})
    y, h_n, c_n, gates, cells = lib.recurrent_forward(*inputs.values(), True)
    out, c = torch.empty_like(h_n), None
    if "c" in CELLS[cell].states:
        c = inputs["c0"].to(cells.dtype, copy=True)
    lib.recurrent_step_(
        *(cell, inputs["x"][0], inputs["h0"], c, inputs["w_ih"], inputs["w_hh"], inputs["b_ih"]),
        *(None, out),
    )
    assert torch.equal(y[0], out) and torch.equal(h_n, out)
    assert c is None or (torch.equal(cells, c) and torch.equal(c_n, c.to(dtype)))
    without = lib.recurrent_forward(*inputs.values(), False)
    assert all(map(torch.equal, without[:3], (y, h_n, c_n)))


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_saved_for_the_gradient_is_float32(gpu, steps):
    inputs = gpu.to(make_inputs(Case("saved", steps, 2, 5, 4), torch.float16))
    y, h_n, c_n, gates, cells = lib.recurrent_forward(*inputs.values(), True)
    assert [t.dtype for t in (y, h_n, c_n)] == [torch.float16] * 3
    assert [t.dtype for t in (gates, cells)] == [torch.float32] * 2
    assert gates.shape == (2 * steps, 16) and cells.shape == (2 * steps, 4)
    *_, gates, cells = lib.recurrent_forward(*inputs.values(), False)
    assert gates.numel() == cells.numel() == 0


@pytest.mark.parametrize(
    ("cell", "case"),
    [
        *(("lstm", c) for c in (Case("one_step", 1, 3, 2, 3), SMALL, *PROJECTED[1:])),
        *((cell, Case("padded", 2, 2, 2, 3)) for cell in CUDA_CELLS),
    ],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(gpu, cell, case):
    inputs = gpu.to(make_inputs(case, torch.float64, True, cell, "few"))
    names = [k for k, v in inputs.items() if is_floating(v)]
    small = {k: v[:, :2] if k == "w_ih" else v for k, v in inputs.items()}
    small["x"] = inputs["x"][..., :2]
    leaves = [small[k].clone().requires_grad_() for k in names]

    def function(*tensors):
        outputs = ours(small | dict(zip(names, tensors, strict=True)))
        return tuple(y for y in outputs if y is not None)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if case.H == 3:
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [*(("lstm", d) for d in DTYPES), ("gru", torch.float32), ("rnn_tanh", torch.float32)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_opcheck(gpu, cell, dtype):
    cases = (Case("padded", 2, 1, 2, 3), Case("one_step", 1, 2, 2, 3), PROJECTED[1])
    for case in cases[: 3 if cell == "lstm" else 1]:
        inputs = gpu.to(make_inputs(case, dtype, cell=cell, resets="few"))
        outputs = lib.recurrent_forward(*inputs.values(), True)
        cotangents = [torch.randn_like(t) for t in outputs[:3]]
        if "c" not in CELLS[cell].states:
            cotangents[2] = None
        *tensors, reverse = inputs.values()
        arguments = (*cotangents, *tensors, outputs[0], *outputs[3:], reverse)
        for needed in ((True, True, True), (True, False, False), (False, False, True)):
            opcheck(lib.recurrent_backward, (*arguments, *needed))
        for tensor in filter(is_floating, tensors):
            tensor.requires_grad_()
        opcheck(lib.recurrent_forward, (*tensors, reverse, True))


def step_inputs(gpu, dtype, held=None, batch=3, sizes=(5, 7, 7)):
    """Arguments of recurrent_step_ for an LSTM."""
    inputs, hidden, output = sizes
    wide = torch.promote_types(dtype, torch.float32)
    shapes = [(batch, inputs), (batch, output), (batch, hidden), (4 * hidden, inputs),
              (4 * hidden, output), (4 * hidden,), (4 * hidden,), (batch, hidden)]  # fmt: skip
    dtypes = [dtype, dtype, wide, held or dtype, held or dtype, dtype, dtype, dtype]
    tensors = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    return ["lstm", *gpu.to(tensors)]


def test_opcheck_of_a_step(gpu):
    inputs = step_inputs(gpu, torch.float32, torch.bfloat16)
    opcheck(lib.recurrent_step_, tuple(inputs))
    opcheck(lib.recurrent_step_, ("rnn_tanh", *inputs[1:3], None, *(w[:7] for w in inputs[4:8]),
                                  inputs[8]))  # fmt: skip


def test_packed_sequences_are_refused_during_capture(gpu, tier):
    if not gpu.simulator or tier == "one step":
        pytest.skip("a refusal ends a real capture; a single step has no offsets")
    be(gpu, tier, SMALL, torch.float32)
    padded = Case("padded", 3, 3, 4, 17)
    with gpu.simulator.capturing():
        run(gpu, ours, padded, torch.float32)
        with pytest.raises(RuntimeError, match="expected padded sequences in a CUDA graph"):
            run(gpu, ours, SMALL, torch.float32)


@pytest.mark.parametrize("name", ["dy", "dh_n", "dc_n", "y", "gates", "cells"])
def test_backward_checks_what_forward_has_not_seen(gpu, name):
    """As the CPU does: what is too small or of another dtype would be read beyond its end."""
    inputs = gpu.to(make_inputs(SMALL, torch.float32))
    *tensors, reverse = inputs.values()
    y, h_n, c_n, gates, cells = lib.recurrent_forward(*tensors, reverse, True)
    given = dict(dy=y, dh_n=h_n, dc_n=c_n, y=y, gates=gates, cells=cells)

    def backward(dy, dh_n, dc_n, **saved):
        lib.recurrent_backward(dy, dh_n, dc_n, *tensors, *saved.values(), reverse, True, True, True)

    backward(**given)
    for other in (given[name][:-1], given[name][:, :-1], given[name].bfloat16()):
        with pytest.raises(RuntimeError, match=f"^lstm_backward: expected {name} of .*, got"):
            backward(**given | {name: other})


def test_every_op_has_a_kernel(gpu):
    key = "CPU" if gpu.simulator else "CUDA"
    for name in names_of_ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"iss_kernels::{name}", key)


def test_a_step_cannot_write_over_the_h_it_reads(gpu):
    inputs = step_inputs(gpu, torch.float32)
    with pytest.raises(RuntimeError, match="lstm_step_: expected out to be other memory than h"):
        lib.recurrent_step_(*inputs[:-1], inputs[2])


# -- checked runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "math"),
    [
        *(("lstm", m) for m in (*DTYPES, "tf32")),
        ("gru", torch.float32),
        ("gru", torch.bfloat16),
        ("rnn_tanh", torch.float32),
        ("rnn_relu", torch.bfloat16),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
@pytest.mark.parametrize("tier", TIERS)
def test_no_race_and_no_stray_access(checked_gpu, tier, cell, math, request):
    """Forward and backward with every access of the kernels checked, tensors between guards."""
    dtype = torch.float32 if math == "tf32" else math
    if math == "tf32":
        request.getfixturevalue("tf32")
    case = of_tier(tier, SMALL)
    be(checked_gpu, tier, case, dtype, tf32=math == "tf32", cell=cell)
    for resets in (None, "few"):
        results = run(checked_gpu, ours, case, dtype, True, cell, resets)
        assert all(t.isfinite().all() for t in results)


@by_cell
@by_name("dtype", DTYPES)
def test_the_sanitizer_finds_nothing(gpu, tier, dtype, cell):
    """What `make test-gpu` runs again under compute-sanitizer: small, each kernel once."""
    case = of_tier(tier, SMALL)
    be(gpu, tier, case, dtype, cell=cell)
    results = run(gpu, ours, case, dtype, cell=cell, resets="few")
    assert all(t.isfinite().all() for t in results)
