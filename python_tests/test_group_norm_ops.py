# SPDX-License-Identifier: Apache-2.0
"""The group-lasso ops against the reference: odd shapes, shared units, unlabelled rows, zeros."""

import pytest
import torch

from iss_kernels import ops, reference
from iss_kernels.testing import assert_no_worse_than_torch

UNITS = 23


def labelled(dtype, seed=0):
    """Matrices of odd sizes whose labels cover what models have, and what they have not."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count, low=-1):
        return torch.randint(low, UNITS, (count,), generator=generator).to(torch.int32)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator).to(dtype)

    gates = torch.arange(20, dtype=torch.int32).repeat(4)
    none = torch.full((7,), -1, dtype=torch.int32)
    triples = [
        (matrix(80, 20), gates, gates[:20]),  # a recurrent weight: one shared column a row
        (matrix(150, 20), torch.full((150,), -1, dtype=torch.int32), gates[:20]),  # three blocks
        (matrix(33, 37), ids(33), ids(37)),  # anything: several columns of a unit, some of none
        (matrix(1, 1), ids(1, 0), ids(1, 0)),
        (matrix(5, 7), ids(5, 0), none),
        (matrix(0, 4), ids(0), ids(4)),
    ]
    weights, rows, columns = (list(t) for t in zip(*triples, strict=True))
    return weights, rows, columns


@pytest.mark.parametrize("paper_overlap", [False, True])
def test_norms_and_gradients_err_at_most_twice_as_much_as_torch(isa, dtype, paper_overlap):
    def run(function, dtype):
        weights, rows, columns = labelled(dtype)
        for w in weights:
            w.requires_grad_()
        norms = function(weights, rows, columns, UNITS, 1e-8, paper_overlap)
        return [norms, *torch.autograd.grad(norms, weights, torch.linspace(-1, 1, UNITS).to(dtype))]

    result, torchs = run(ops.group_norms, dtype), run(reference.group_norms, dtype)
    truth = run(reference.group_norms, torch.float64)
    for a, b, t in zip(result, torchs, truth, strict=True):
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


def test_a_group_of_zeros_has_norm_sqrt_eps_and_no_gradient(isa, dtype):
    weight = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    rows = torch.tensor([0, 0, 1, -1], dtype=torch.int32)
    columns = torch.tensor([0, 1, -1], dtype=torch.int32)
    norms = ops.group_norms([weight], [rows], [columns], 2, 1e-8, False)
    torch.testing.assert_close(norms, torch.full((2,), 1e-4, dtype=dtype))
    norms.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("paper_overlap", [False, True])
def test_adding_scaled_weights_in_place_is_the_gradient(isa, dtype, paper_overlap):
    weights, rows, columns = labelled(dtype)
    factors = torch.linspace(-1, 2, UNITS, dtype=dtype)
    outputs = [torch.ones_like(w) for w in weights]
    ops.add_scaled_by_units_(outputs, weights, rows, columns, factors, paper_overlap)
    for output, *labels in zip(outputs, weights, rows, columns, strict=True):
        expected = 1 + reference.scaled_by_units(*labels, factors, paper_overlap)
        torch.testing.assert_close(output, expected)


def test_threshold_is_the_reference_to_the_bit(isa, dtype):
    weights, rows, columns = labelled(dtype)
    weights[2][0, 0] = float("nan")
    weights[0][0, :2] = torch.tensor([0.5, -0.5])  # on the threshold: stays
    expected = [reference.thresholded(*t, 0.5) for t in zip(weights, rows, columns, strict=True)]
    ops.threshold_(weights, rows, columns, 0.5)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, two_threads):
    weights, rows, columns = labelled(dtype)
    several = ops.group_norms(weights, rows, columns, UNITS, 1e-8, False)
    torch.set_num_threads(1)
    one = ops.group_norms(weights, rows, columns, UNITS, 1e-8, False)
    assert torch.equal(one, several)


def test_non_contiguous_weights_are_read_right(isa, dtype):
    weights, rows, columns = labelled(dtype)
    strided = [torch.stack([w, w.new_full(w.shape, 9.0)], -1)[..., 0] for w in weights]
    a = ops.group_norms(strided, rows, columns, UNITS, 1e-8, False)
    assert torch.equal(a, ops.group_norms(weights, rows, columns, UNITS, 1e-8, False))
