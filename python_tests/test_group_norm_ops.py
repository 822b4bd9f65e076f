# SPDX-License-Identifier: Apache-2.0
"""The group-lasso ops against the reference: odd shapes, shared units, unlabelled rows, zeros."""

import pytest
import torch
from torch.library import opcheck

from iss_kernels import ops, reference
from iss_kernels.testing import assert_no_worse_than_torch, max_error

UNITS = 23
BFLOAT16 = torch.bfloat16


@pytest.fixture(params=[torch.float32, torch.float64, BFLOAT16], ids=str)
def dtype(request):
    return request.param


def wide(dtype):
    """The dtype of norms and factors."""
    return torch.promote_types(dtype, torch.float32)


def labelled(dtype, seed=0):
    """Matrices of odd sizes whose labels cover what models have, and what they have not."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count, low=-1):
        return torch.randint(low, UNITS, (count,), generator=generator).to(torch.int32)

    def matrix(rows, columns):
        # Rounded to bfloat16, so that one problem is exactly the same in every dtype.
        return torch.randn(rows, columns, generator=generator).to(BFLOAT16).to(dtype)

    gates = torch.arange(20, dtype=torch.int32).repeat(4)
    none = torch.full((7,), -1, dtype=torch.int32)
    triples = [
        (matrix(80, 20), gates, gates[:20]),  # a recurrent weight: one shared column a row
        (matrix(150, 20), torch.full((150,), -1, dtype=torch.int32), gates[:20]),  # three blocks
        (matrix(33, 37), ids(33), ids(37)),  # anything: several columns of a unit, some of none
        (matrix(1, 1), ids(1, 0), ids(1, 0)),
        (matrix(5, 7), ids(5, 0), none),
        (matrix(0, 4), ids(0), ids(4)),
        (matrix(3, 0), ids(3), ids(0)),
        (matrix(1702, 83), ids(1702), ids(83)),  # strips and blocks end anywhere; two threads
    ]
    weights, rows, columns = (list(t) for t in zip(*triples, strict=True))
    return weights, rows, columns


def in_guard_bands(weights):
    """Copies with NaN before and after, for kernels that write: (the copies, unharmed())."""
    bands = []
    for w in weights:
        band = torch.full((w.numel() + 32,), float("nan"), dtype=w.dtype)
        band[16:-16] = w.flatten()
        bands.append(band)
    copies = [b[16:-16].view_as(w) for b, w in zip(bands, weights, strict=True)]
    return copies, lambda: all(b[:16].isnan().all() and b[-16:].isnan().all() for b in bands)


@pytest.mark.parametrize("paper_overlap", [False, True])
def test_norms_and_gradients_err_at_most_twice_as_much_as_torch(isa, dtype, paper_overlap):
    def run(function, dtype):
        weights, rows, columns = labelled(dtype)
        for w in weights:
            w.requires_grad_()
        norms = function(weights, rows, columns, UNITS, 1e-8, paper_overlap)
        assert norms.dtype == wide(dtype)
        dnorms = torch.linspace(-1, 1, UNITS).to(norms)
        return [norms, *torch.autograd.grad(norms, weights, dnorms)]

    result, torchs = run(ops.group_norms, dtype), run(reference.group_norms, dtype)
    truth = run(reference.group_norms, torch.float64)
    for a, b, t in zip(result, torchs, truth, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse_than_torch(a, b, t)


@pytest.mark.parametrize("paper_overlap", [False, True])
def test_gradcheck_and_gradgradcheck(isa, paper_overlap):
    weights, rows, columns = labelled(torch.float64)
    pick = [2, 3, 4]
    weights = [weights[i][:6, :7].clone().requires_grad_() for i in pick]
    rows, columns = [rows[i][:6] for i in pick], [columns[i][:7] for i in pick]

    def function(*weights):
        return ops.group_norms(weights, rows, columns, UNITS, 1e-8, paper_overlap)

    assert torch.autograd.gradcheck(function, weights)
    assert torch.autograd.gradgradcheck(function, weights)


def test_norms_of_many_rows_keep_their_accuracy(isa, dtype):
    """No sum in the weight's dtype grows so long that its rounding shows: 20 000 equal squares."""
    weight = torch.full((20_000, 3), 1.1, dtype=dtype)
    rows, columns = torch.full((20_000,), -1, dtype=torch.int32), torch.arange(3).int()
    norms = ops.group_norms([weight], [rows], [columns], 3, 1e-8, False)
    expected = (weight[0].double().square() * 20_000 + 1e-8).sqrt()
    assert max_error(norms, expected) < 8 * torch.finfo(norms.dtype).eps * expected.max()


def test_a_group_of_zeros_has_norm_sqrt_eps_and_no_gradient(isa, dtype):
    weight = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    rows = torch.tensor([0, 0, 1, -1], dtype=torch.int32)
    columns = torch.tensor([0, 1, -1], dtype=torch.int32)
    norms = ops.group_norms([weight], [rows], [columns], 2, 1e-8, False)
    torch.testing.assert_close(norms, torch.full((2,), 1e-4, dtype=wide(dtype)))
    norms.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("paper_overlap", [False, True])
def test_adding_scaled_weights_in_place_is_the_gradient(isa, dtype, paper_overlap):
    weights, rows, columns = labelled(dtype)
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))
    outputs, unharmed = in_guard_bands([torch.ones_like(w) for w in weights])
    ops.add_scaled_by_units_(outputs, weights, rows, columns, factors, paper_overlap)
    for output, *labels in zip(outputs, weights, rows, columns, strict=True):
        scaled = reference.scaled_by_units(*labels, factors, paper_overlap)
        assert scaled.dtype == wide(dtype)
        expected = (1 + scaled).to(dtype)
        truth = 1 + reference.scaled_by_units(
            labels[0].double(), *labels[1:], factors.double(), paper_overlap
        )
        assert_no_worse_than_torch(output, expected, truth, floor_eps=2)
    assert unharmed()


def test_scaling_by_units_is_the_reference(isa, dtype):
    weights, rows, columns = labelled(dtype)
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))
    factors[3] = 0
    expected = [reference.scaled(*t, factors) for t in zip(weights, rows, columns, strict=True)]
    results, unharmed = in_guard_bands(weights)
    ops.scale_by_units_(results, rows, columns, factors)
    for result, scaled in zip(results, expected, strict=True):
        assert torch.equal(result, scaled)
    assert unharmed()


def test_scaling_by_units_by_hand():
    # Unit 0 owns row 0 and column 1, unit 1 owns row 1 and column 0; row 2 and column 2 are free.
    weight = torch.ones(3, 3)
    rows, columns = torch.tensor([0, 1, -1]).int(), torch.tensor([1, 0, -1]).int()
    scaled = [[6.0, 2.0, 2.0], [3.0, 6.0, 3.0], [3.0, 2.0, 1.0]]
    factors = torch.tensor([2.0, 3.0])
    assert reference.scaled(weight, rows, columns, factors).tolist() == scaled


def test_threshold_is_the_reference_to_the_bit(isa, dtype):
    weights, rows, columns = labelled(dtype)
    weights[2][0, 0] = float("nan")
    weights[0][0, :2] = torch.tensor([0.5, -0.5])  # on the threshold: stays
    expected = [reference.thresholded(*t, 0.5) for t in zip(weights, rows, columns, strict=True)]
    results, unharmed = in_guard_bands(weights)
    ops.threshold_(results, rows, columns, 0.5)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert unharmed()


def test_a_threshold_between_two_bfloat16_keeps_the_larger(isa):
    """0.1 rounded to bfloat16 is above 0.1: thresholds are float32."""
    weight = torch.full((2, 40), 0.1, dtype=BFLOAT16)
    assert float(weight[0, 0].double()) > 0.1
    rows, columns = torch.zeros(2, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    ops.threshold_([weight], [rows], [columns], float(weight[0, 0].double()) + 1e-5)
    assert not weight.any()
    weight.fill_(0.1)
    ops.threshold_([weight], [rows], [columns], float(weight[0, 0].double()) - 1e-5)
    assert weight.all()


def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, two_threads):
    def run():
        weights, rows, columns = labelled(dtype)
        labels = weights, rows, columns
        norms = ops.group_norms(*labels, UNITS, 1e-8, False)
        outputs = [torch.ones_like(w) for w in weights]
        ops.add_scaled_by_units_(outputs, *labels, norms, False)
        ops.scale_by_units_(*labels, norms)
        ops.threshold_(*labels, 0.5)
        return [norms, *outputs, *weights]

    several = run()
    assert all(map(torch.equal, several, run()))
    torch.set_num_threads(1)
    assert all(map(torch.equal, several, run()))


@pytest.mark.parametrize("name", ["add_scaled_by_units_", "scale_by_units_", "threshold_"])
def test_a_graph_that_saved_what_an_op_changes_is_refused(name):
    weight, rows, columns = torch.ones(4, 3), torch.zeros(4).int(), torch.zeros(3).int()
    calls = {
        "add_scaled_by_units_": lambda w: ops.add_scaled_by_units_(
            [w], [weight], [rows], [columns], torch.ones(1), False
        ),
        "scale_by_units_": lambda w: ops.scale_by_units_([w], [rows], [columns], torch.zeros(1)),
        "threshold_": lambda w: ops.threshold_([w], [rows], [columns], 2.0),
    }
    leaf = torch.ones(4, 3, requires_grad=True)
    loss = leaf.square().sum()
    calls[name](leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        calls[name](torch.ones(4, 3))  # has no versions


def test_non_contiguous_weights_are_read_right(isa, dtype):
    weights, rows, columns = labelled(dtype)
    strided = [torch.stack([w, w.new_full(w.shape, 9.0)], -1)[..., 0] for w in weights]
    a = ops.group_norms(strided, rows, columns, UNITS, 1e-8, False)
    assert torch.equal(a, ops.group_norms(weights, rows, columns, UNITS, 1e-8, False))
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))
    results = []
    for inputs in (strided, weights):
        outputs = [torch.ones_like(w, memory_format=torch.contiguous_format) for w in inputs]
        ops.add_scaled_by_units_(outputs, inputs, rows, columns, factors, False)
        results.append(outputs)
    assert all(map(torch.equal, *results))


def test_non_contiguous_tensors_are_written_right(dtype):
    """A gradient may be transposed, as that of a transposed weight is, or part of a larger one."""
    weights, rows, columns = labelled(dtype)
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))

    def part(w):
        return w.new_full((w.shape[0], w.shape[1] + 3), 9.0)[:, 1 : w.shape[1] + 1].copy_(w)

    results = []
    for layout in (torch.clone, lambda w: w.clone().t().contiguous().t(), part):
        outputs, changed = ([layout(w) for w in weights] for _ in range(2))
        versions = [w._version for w in changed]
        ops.add_scaled_by_units_(outputs, weights, rows, columns, factors, False)
        ops.scale_by_units_(changed, rows, columns, factors)
        ops.threshold_(changed, rows, columns, 0.5)
        assert all(w._version > version for w, version in zip(changed, versions, strict=True))
        if layout is part:
            for w in (*outputs, *changed):
                assert w.numel() == 0 or (w._base[:, 0] == 9).all() and (w._base[:, -2:] == 9).all()
        results.append(outputs + changed)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa):
    factors = torch.cat([
        torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-40, 0.0]),
        1 + torch.arange(64) / 512,  # every other one half-way between two bfloat16
        torch.randn(1000),
    ])  # fmt: skip
    rows = torch.arange(len(factors), dtype=torch.int32)
    columns = torch.full((37,), -1, dtype=torch.int32)
    weight = torch.ones(len(factors), 37, dtype=BFLOAT16)
    ops.scale_by_units_([weight], [rows], [columns], factors)
    expected = factors.to(BFLOAT16)[:, None].expand_as(weight)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
def test_opcheck_of_bfloat16():
    lib = torch.ops.iss_kernels
    weights, rows, columns = labelled(BFLOAT16)
    weights = [w.requires_grad_() for w in weights[2:4]]
    labels = weights, rows[2:4], columns[2:4]
    norms = lib.group_norms_forward(*labels, UNITS, 1e-8, False)
    opcheck(lib.group_norms_forward, (*labels, UNITS, 1e-8, False))
    opcheck(lib.group_norms_backward, (norms.detach(), norms.detach(), *labels, 1e-8, False))
