# SPDX-License-Identifier: Apache-2.0
"""lstm_forward and lstm_backward: every ISA and dtype against torch's own error."""

import math

import mpmath
import pytest
import torch
from test_reference import torch_lstm
from torch.utils._python_dispatch import TorchDispatchMode

from iss_kernels import ops, reference
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.testing import CASES, Case, assert_no_worse_than_torch, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

ALL = [pytest.param(c, marks=[pytest.mark.slow] * c.slow, id=c.name) for c in CASES]
SOME = [c for c in CASES if c.name in ("tail_avx512", "projected", "packed", "packed_projected")]


def is_floating(value):
    return torch.is_tensor(value) and value.is_floating_point()


def run(function, case, dtype, reverse=False, numbers=None):
    """Outputs and the gradients of everything, for cotangents that are the same in every dtype.

    numbers: a dtype that holds all inputs and cotangents exactly, where `dtype` is wider.
    """
    numbers = numbers or dtype
    inputs = {
        k: v.to(dtype) if is_floating(v) else v
        for k, v in make_inputs(case, numbers, reverse).items()
    }
    leaves = [v.requires_grad_() for v in inputs.values() if is_floating(v)]
    outputs = function(inputs)
    torch.manual_seed(1)
    cotangents = [torch.randn(y.shape).to(numbers).to(dtype) for y in outputs]
    given = [(y, d) for y, d in zip(outputs, cotangents, strict=True) if y.requires_grad]
    ys, dys = zip(*given, strict=True)
    grads = torch.autograd.grad(ys, leaves, dys, materialize_grads=True)
    return [t.detach() for t in (*outputs, *grads)]


def ours(inputs):
    return ops.recurrent(**inputs)


def by_reference(inputs):
    return reference.recurrent(**inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ALL)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch(isa, case, dtype, reverse):
    torchs = torch_lstm if case.T > 0 else by_reference  # nn.LSTM takes no empty sequence
    result = run(lambda i: ours(i), case, dtype, reverse)
    same_dtype = run(torchs, case, dtype, reverse)
    if dtype == torch.float64:  # no truth beyond float64 at hand: the two may differ by rounding
        for a, b in zip(result, same_dtype, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        return
    truth = run(torchs, case, torch.float64, reverse)
    for a, b, t in zip(result, same_dtype, truth, strict=True):
        assert_no_worse_than_torch(a, b, t)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_are_right_to_a_few_ulp(isa, dtype, name):
    """Through the op with H = 1 and no recurrence: a saved gate is the activation of its input."""
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.logspace(-12, 1.9, 500)])
    # Beyond exp's range the result is that at its end: 0 and 1 to within exp(-87).
    x = torch.cat([x, -x, torch.tensor([0.0, 90, -90, 1e30, -1e30])]).to(dtype)
    zeros, w_ih = torch.zeros(len(x), 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    gate = 3 if name == "sigmoid" else 2
    w_ih[gate] = 1
    *_, gates, _ = torch.ops.iss_kernels.recurrent_forward(
        x.view(1, -1, 1), None, zeros, zeros, w_ih, torch.zeros(4, 1, dtype=dtype), None, None,
        None, False, True,
    )  # fmt: skip
    exact = {"sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "tanh": mpmath.tanh}[name]
    eps = torch.finfo(dtype).eps
    with mpmath.workdps(40):
        for value, result in zip(x.tolist(), gates[:, gate].tolist(), strict=True):
            truth = exact(mpmath.mpf(value))
            assert abs(result - truth) <= 4 * eps * abs(truth) + 2e-38


def test_nan_and_infinity_pass_as_in_torch(isa, dtype):
    case = Case("nan", 3, 5, 4, 11)
    inputs = make_inputs(case, dtype)
    inputs["x"][1, 2, 0] = float("nan")
    inputs["x"][0, 4, 1] = float("inf")
    inputs["h0"][0, 0] = float("-inf")
    for a, b in zip(ours(inputs), by_reference(inputs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradcheck_and_gradgradcheck(isa, case):
    small = Case("small", 3, case.B if case.batch_sizes else 2, 2, 3, 2 if case.P else 0,
                 case.batch_sizes and (case.B, 2, 1))  # fmt: skip
    inputs = make_inputs(small, torch.float64, reverse=True)
    names = [k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()]
    leaves = [inputs[k].requires_grad_() for k in names]

    def function(*tensors):
        return ops.recurrent(**(inputs | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


class Asked(TorchDispatchMode):
    """Remembers need_dx, need_dh0 and need_dw of the last lstm_backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.iss_kernels.recurrent_backward.default:
            self.needed = args[-3:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_only_gradients_that_are_asked_for_are_computed(case):
    inputs = make_inputs(case, torch.float64)
    names = [k for k, v in inputs.items() if is_floating(v)]

    def gradients(asked, require):
        leaves = {k: inputs[k].clone().requires_grad_(k in require) for k in names}
        loss = sum(y.square().sum() for y in ours(inputs | leaves))
        with Asked() as mode:
            grads = torch.autograd.grad(loss, [leaves[k] for k in asked])
        return dict(zip(asked, grads, strict=True)), mode.needed

    everything, needed = gradients(names, names)
    assert needed == (True, True, True)
    for name in names:
        for require in (names, [name]):
            grads, needed = gradients([name], require)
            assert needed == (name == "x", name == "h0", name not in ("x", "h0", "c0"))
            assert torch.equal(grads[name], everything[name])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_same_input_gives_the_same_bits(isa, dtype, case):
    first = run(ours, case, dtype, False)
    for _ in range(3):
        assert all(map(torch.equal, first, run(ours, case, dtype, False)))


def test_a_row_does_not_depend_on_its_batch_or_on_the_threads(isa, dtype, two_threads):
    case = Case("rows", 30, 13, 8, 70)
    inputs = make_inputs(case, dtype)
    y, h_n, c_n = ours(inputs)
    for row in (0, 5, 12):
        one_y, one_h, one_c = ours(of_row(inputs, row))
        assert torch.equal(one_y[:, 0], y[:, row])
    torch.set_num_threads(1)
    assert all(map(torch.equal, ours(inputs), (y, h_n, c_n)))
    alone = run(ours, case, dtype)
    torch.set_num_threads(2)
    for _ in range(2):
        assert all(map(torch.equal, run(ours, case, dtype), alone))


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_product_with_a_state_of_zeros_is_left_out(isa, dtype, batch, steps, reverse):
    """Every row of zeros has the bits that it has beside a row that starts from something else."""
    inputs = make_inputs(Case("zeros", steps, batch + 1, 8, 19), dtype, reverse)
    inputs["h0"][:batch] = 0
    dy = torch.randn(steps, batch + 1, 19, dtype=torch.float64).to(dtype)
    rows = {k: inputs[k][..., :batch, :] for k in ("x", "h0", "c0")}

    def run(inputs, dy):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_floating(v)}
        outputs = ours(inputs | leaves)
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), dy)
        return outputs, dict(zip(leaves, grads, strict=True))

    together, grads_together = run(inputs, dy)
    alone, grads_alone = run(inputs | rows, dy[:, :batch])
    dy[:, batch] = 0
    _, grads = run(inputs, dy)
    assert all(torch.equal(a, b[..., :batch, :]) for a, b in zip(alone, together, strict=True))
    for name in ("x", "h0", "c0"):
        assert torch.equal(grads_alone[name], grads_together[name][..., :batch, :])
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        assert torch.equal(grads_alone[name], grads[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"])
@pytest.mark.parametrize("zeros", [0, 2, 3])
def test_what_is_not_finite_shows_whatever_the_batch(isa, dtype, name, bad, zeros):
    """Where a state is zero, no less than beside it: 0 * inf and 0 * NaN are NaN."""
    inputs = make_inputs(Case("bad", 3, 3, 4, 19, P=5 * (name == "w_hr")), dtype)
    inputs["h0"][:zeros] = 0
    inputs[name].view(-1)[-2] = bad
    dy = torch.randn(3, 3, inputs["h0"].shape[1], dtype=torch.float64).to(dtype)

    def run(function, inputs, dy):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_floating(v)}
        outputs = function(inputs | leaves)
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), dy)
        return outputs, dict(zip(leaves, grads, strict=True))

    outputs, grads = run(ours, inputs, dy)
    expected, expected_grads = run(by_reference, inputs, dy)
    for a, b in zip(
        (*outputs, *grads.values()), (*expected, *expected_grads.values()), strict=True
    ):
        # inf closes a gate to 1e-38 in place of 0, and inf * 1e-38 is not NaN.
        if math.isnan(bad):
            assert torch.equal(a.isnan(), b.isnan())
        elif name != "w_hr":
            assert torch.equal(a.isfinite(), b.isfinite())
    for row in range(3):
        alone, grads_alone = run(ours, of_row(inputs, row), dy[:, row : row + 1])
        for a, b in zip(alone, outputs, strict=True):
            assert torch.equal(bits(a), bits(b[..., row : row + 1, :]))
        for k in ("x", "h0", "c0"):
            assert torch.equal(bits(grads_alone[k]), bits(grads[k][..., row : row + 1, :]))


def bits(tensor):
    """As integers, where NaN is equal to itself."""
    return tensor.detach().contiguous().view(torch.int64 if tensor.itemsize == 8 else torch.int32)


def of_row(inputs, row):
    """The inputs of one row of the batch."""
    one = {k: inputs[k][row : row + 1] for k in ("h0", "c0")}
    return inputs | one | {"x": inputs["x"][:, row : row + 1]}


def test_nor_does_its_gradient(isa, dtype, two_threads):
    """A product with few rows packs a panel at a time; 4H > 512 is added up in two parts."""
    inputs = make_inputs(Case("gradient", 5, 14, 70, 140), dtype)
    dy = torch.randn(5, 14, 140, dtype=torch.float64).to(dtype)

    def run_training(inputs, dy):
        x = inputs["x"].clone().requires_grad_()
        y = ours(inputs | {"x": x})[0]
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    y, dx = run_training(inputs, dy)
    for _ in range(2):
        for row in (0, 6, 13):
            one_y, one_dx = run_training(of_row(inputs, row), dy[:, row : row + 1])
            assert torch.equal(one_y[:, 0], y[:, row])
            assert torch.equal(one_dx[:, 0], dx[:, row])


@pytest.mark.parametrize("threads", [2, 7])  # 7: more than this machine may have cores
@pytest.mark.parametrize("case", [
    Case("one_row", 30, 1, 8, 200),
    Case("few_rows", 20, 3, 8, 190, P=70),
    Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1)),
    Case("few_units", 60, 5, 8, 20),
    Case("packed_rows", 5, 50, 8, 70, batch_sizes=(50, 41, 41, 7, 1)),
], ids=str)  # fmt: skip
def test_threads_that_divide_the_work_give_the_same_bits(isa, dtype, two_threads, case, threads):
    for reverse in (False, True):
        torch.set_num_threads(1)
        alone = run(ours, case, dtype, reverse)
        torch.set_num_threads(threads)
        for _ in range(2):  # sleeping threads are not woken for so little: the first may run alone
            assert all(map(torch.equal, run(ours, case, dtype, reverse), alone))


def test_isas_agree_to_rounding(dtype):
    case = Case("isas", 12, 6, 10, 45)
    results = []
    for name in supported_isas():
        with use_isa(name):
            results.append(run(ours, case, dtype, False))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(
                a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * b.abs().max()
            )


def test_non_contiguous_arguments_give_the_same_result(isa, dtype):
    inputs = make_inputs(Case("strided", 4, 5, 6, 13, P=4), dtype)

    def strided(t):
        if not torch.is_tensor(t) or not t.is_floating_point():
            return t
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    for a, b in zip(ours({k: strided(v) for k, v in inputs.items()}), ours(inputs), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_written_outside_the_outputs(isa, dtype):
    """c_n, h_n and y of neighbouring sizes stay inside their own allocation (guard bands)."""
    case = Case("guard", 3, 4, 5, 9)
    inputs = make_inputs(case, dtype)
    originals = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    guarded = {}
    for key, value in originals.items():
        wide = torch.full((value.numel() + 64,), 7.0, dtype=dtype)
        wide[32:-32] = value.flatten()
        guarded[key] = wide
    views = {k: w[32:-32].view(originals[k].shape).requires_grad_() for k, w in guarded.items()}
    torch.stack([t.sum() for t in ours(inputs | views)]).sum().backward()
    for key, wide in guarded.items():
        assert bool((wide[:32] == 7).all()) and bool((wide[-32:] == 7).all())
        assert torch.equal(wide[32:-32].view(originals[key].shape), originals[key])
