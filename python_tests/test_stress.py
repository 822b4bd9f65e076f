# SPDX-License-Identifier: Apache-2.0
"""Random shapes against the reference, and every form of a layer against finite differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recurrent_ops import run
from torch.nn.utils.rnn import pack_padded_sequence

from iss_kernels import ISSLSTM, ops, reference
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.cells import CELLS
from iss_kernels.testing import RESETS, Case, max_error

SIZE = st.integers(1, 70)  # past four vectors of 16, and every tail on the way there
WORK = 4_000_000  # multiply-adds of a layer at most: sequences get as short as that asks for

# The same examples on every run, and none kept on disk.
stress = settings(derandomize=True, deadline=None, database=None)


@st.composite
def cases(draw, cells=tuple(CELLS)):
    """A cell and a Case of `testing` with sizes in 1..70, projected or not, padded or packed."""
    cell = draw(st.sampled_from(("lstm", *cells)))
    B, I, H = draw(SIZE), draw(SIZE), draw(SIZE)  # noqa: E741  (the letter of the shape alphabet)
    P = draw(st.just(0) | SIZE) if CELLS[cell].projects else 0
    # Over many steps, random weights with more outputs than cells amplify rounding without bound.
    longest = 4 if P > H else 70
    T = draw(st.integers(1, max(1, min(longest, WORK // (4 * B * H * (I + (P or H)))))))
    batch_sizes = None
    if draw(st.booleans()):
        length = st.integers(1, T) | st.sampled_from([1, T])  # many ties, ones and full lengths
        lengths = draw(st.lists(length, min_size=B, max_size=B))
        batch_sizes = tuple(sum(n > t for n in lengths) for t in range(max(lengths)))
    return cell, Case("random", T, B, I, H, P, batch_sizes)


def without(biases, function):
    """`function` over the inputs of a Case, with all, one or no biases."""
    return lambda inputs: function(**(inputs | dict.fromkeys(biases)))


RESET = st.sampled_from((None, None, *RESETS))
BIASES = st.sampled_from([(), ("b_ih", "b_hh"), ("b_ih",), ("b_hh",)])


@pytest.mark.parametrize("numbers", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_the_references(numbers):
    # A sum that rounds to the other side of zero switches a gradient of relu on or off.
    cells = [cell for cell in CELLS if (cell, numbers) != ("rnn_relu", torch.bfloat16)]

    @settings(stress, max_examples=90)
    @given(cases(cells), st.booleans(), BIASES, RESET, st.sampled_from(supported_isas()))
    def check(problem, reverse, biases, resets, isa):
        cell, case = problem
        options = {"numbers": numbers, "cell": cell, "resets": resets}
        with use_isa(isa):
            result = run(without(biases, ops.recurrent), case, numbers, reverse, **options)
        same, truth = (
            run(without(biases, reference.recurrent), case, dtype, reverse, **options)
            for dtype in (numbers, torch.float64)
        )
        # This looks for mistakes; how exact the kernels are, test_recurrent_ops.py holds. Sums over
        # all rows of all steps round as their root, and the largest tensor passes it on to others.
        rows = sum(case.batch_sizes or (case.T * case.B,))
        largest = max(1.0, *(float(t.abs().max()) for t in truth))
        eps = torch.finfo(torch.promote_types(numbers, torch.float32)).eps  # of what sums
        rounding = (64 + math.sqrt(rows)) * eps * largest
        for a, b, t in zip(result, same, truth, strict=True):
            assert a.dtype == b.dtype == numbers
            own = torch.finfo(numbers).eps * float(t.abs().max())
            assert max_error(a, t) <= 2 * max_error(b, t) + rounding + own

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_same_again_and_outputs_on_any_number_of_threads(dtype, two_threads):
    @settings(stress, max_examples=40)
    @given(cases(), st.booleans(), BIASES, RESET)
    def check(problem, reverse, biases, resets):
        cell, case = problem
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            function = without(biases, ops.recurrent)
            results.append(run(function, case, dtype, reverse, cell=cell, resets=resets))
        one, *two = results
        assert all(all(map(torch.equal, one, other)) for other in two)

    check()


@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "proj_size", "bias", "batch_first"),
    list(itertools.product([1, 2], [False, True], [0, 2], [True, False], [False, True])),
)
def test_gradcheck(num_layers, bidirectional, proj_size, bias, batch_first, form):
    lstm = ISSLSTM(
        2, 3, num_layers, bias, batch_first, bidirectional=bidirectional, proj_size=proj_size,
        dtype=torch.float64,
    )  # fmt: skip
    T, B = 3, 2
    lengths = torch.tensor([2, 3])
    layers = num_layers * (1 + bidirectional)
    leaves = [
        torch.randn(*((B, T) if batch_first else (T, B)), 2, dtype=torch.float64),
        torch.randn(layers, B, proj_size or 3, dtype=torch.float64),
        torch.randn(layers, B, 3, dtype=torch.float64),
    ]
    names = [name for name, _ in lstm.named_parameters()]

    def call(x, h0, c0, *parameters):
        args = (x, (h0, c0))
        if form == "lengths":
            args = (x, (h0, c0), lengths)
        elif form == "packed":
            args = (pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), (h0, c0))
        tensors = dict(zip(names, parameters, strict=True))
        y, (h_n, c_n) = torch.func.functional_call(lstm, tensors, args)
        return y.data if form == "packed" else y, h_n, c_n

    parameters = [p.detach().clone() for p in lstm.parameters()]
    given = [t.requires_grad_() for t in leaves + parameters]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
