# SPDX-License-Identifier: Apache-2.0
"""resets= is a loop over the stretches between them: outputs, final states and all gradients."""

import copy
import itertools
import math

import pytest
import torch
from kinds import KINDS, as_state, assert_same, every_kind, tensors_in, with_gradients
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from iss_kernels import ISSGRU, ISSLSTM

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

T, B, I = 7, 4, 3  # noqa: E741  (the letter of the shape alphabet)
LENGTHS = [3, 7, 1, 4]


def some_resets():
    """[T, B]: row 0 at the first step, row 1 never, row 3 twice running and past its length."""
    resets = torch.zeros(T, B, dtype=torch.bool)
    for step, row in ((0, 0), (2, 0), (0, 2), (2, 2), (1, 3), (2, 3), (6, 3)):
        resets[step, row] = True
    return resets


RESETS = some_resets()


def by_segments(module, x, hx, lengths, resets):
    """y [T, B, P] and the final state of a module without resets, a call for each stretch.

    x: [T, B, I]; hx: tensors [L * D, B, size] or None.
    """
    directions = 2 if module.bidirectional else 1
    forward = (torch.arange(module.num_layers * directions) % directions == 0)[:, None, None]
    rows, finals = [], []
    for row in range(x.size(1)):
        steps = T if lengths is None else lengths[row]
        cuts = [0, *(t for t in range(1, steps) if resets[t, row]), steps]
        outputs, states = [], []
        for begin, end in itertools.pairwise(cuts):
            state = None
            if hx is not None:
                # A forward direction begins with hx in the first stretch, a reverse in the last.
                first = begin == 0 and not bool(resets[0, row])
                given = forward & first | ~forward & (end == steps)
                state = as_state(*(s[:, row : row + 1].where(given, 0) for s in hx))
            y, last = module(x[begin:end, row : row + 1], state)
            outputs.append(y)
            states.append(tensors_in(last))
        rest = x.new_zeros(T - steps, 1, outputs[0].size(-1))
        rows.append(torch.cat([*outputs, rest]))
        ends = zip(states[-1], states[0], strict=True)
        finals.append([at_end.where(forward, at_begin) for at_end, at_begin in ends])
    return torch.cat(rows, 1), tuple(torch.cat(s, 1) for s in zip(*finals, strict=True))


def expected_of(module, x, hx, lengths=None, resets=RESETS):
    """Outputs and gradients of x, hx and parameters, by `by_segments`."""

    def call(x, *hx):
        return by_segments(module, x, hx or None, lengths, resets)

    return with_gradients(call, (x, *tensors_in(hx)), parameters=module.parameters())


def pair_and_hx(kind, **options):
    """torch's module, ours, an input and a state."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64} | options
    torchs, ours = kind.pair(I, 5, **options)
    count = options["num_layers"] * (1 + options["bidirectional"])
    hx = kind.random_hx(count, B, hidden=5, proj=options.get("proj_size", 0))
    return torchs, ours, torch.randn(T, B, I, dtype=torch.float64), hx


SHAPES = [
    pytest.param(kind, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name, kind in KINDS.items()
    for options in (
        {"num_layers": 1, "bidirectional": False},
        {"num_layers": 1, "bidirectional": True},
        {"num_layers": 2, "bidirectional": False},
        {"num_layers": 2, "bidirectional": True, "bias": False},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    )
    if kind.projects or "proj_size" not in options
]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_outputs_states_and_gradients_are_those_of_the_segments(
    implementation, kind, options, recompute
):
    torchs, ours, x, hx = pair_and_hx(kind, **options)
    ours.recompute = recompute
    lengths = torch.tensor(LENGTHS)
    for state in (None, hx):

        def padded(x, *hx):
            return ours(x, as_state(*hx), None, RESETS)

        def ragged(x, *hx):
            return ours(x, as_state(*hx), LENGTHS, RESETS)

        def packed(x, *hx):
            given = pack_padded_sequence(x, lengths, enforce_sorted=False)
            resets = pack_padded_sequence(RESETS, lengths, enforce_sorted=False)
            y, last = ours(given, as_state(*hx), None, resets)
            assert isinstance(y, PackedSequence) and y.unsorted_indices is given.unsorted_indices
            return nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0], last

        args = (x, *tensors_in(state))
        whole = expected_of(torchs, x, state)
        cut = expected_of(torchs, x, state, LENGTHS)
        for call, expected in ((padded, whole), (ragged, cut), (packed, cut)):
            got = with_gradients(call, args, parameters=ours.parameters())
            assert_same(got, expected, rtol=1e-11, atol=1e-11)


@every_kind
def test_float32_is_as_near_as_torch(implementation, kind):
    torchs, ours, x, hx = pair_and_hx(kind)
    x, hx = x.float(), [s.float() for s in tensors_in(hx)]

    def call(x, *hx):
        return ours(x, as_state(*hx), LENGTHS, RESETS)

    expected = expected_of(torchs, x.double(), [s.double() for s in hx], LENGTHS)
    got = with_gradients(call, (x, *hx), parameters=ours.float().parameters())
    assert_same([t.double() for t in got], expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_reset_after_the_step_is_another_thing(implementation, kind):
    """The mistake that people make: the state is cleared once the step is done."""
    torchs, ours, x, hx = pair_and_hx(kind)
    late = torch.cat([torch.zeros(1, B, dtype=torch.bool), RESETS[:-1]])
    y, states = ours(x, hx, resets=RESETS)
    right, wrong = (by_segments(torchs, x, tensors_in(hx), None, r) for r in (RESETS, late))
    assert_same(tensors_in((y, states)), tensors_in(right))
    for a, b in zip(tensors_in((y, states)), tensors_in(wrong), strict=True):
        assert (a - b).abs().max() > 1e-3


@every_kind
def test_a_reset_at_the_first_step_takes_hx_away_but_not_from_the_reverse_direction(
    implementation, kind
):
    _, ours, x, hx = pair_and_hx(kind, num_layers=1)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    hx = [s.requires_grad_() for s in tensors_in(hx)]
    y, _ = ours(x, as_state(*hx), resets=first)
    zeroed = [torch.cat([torch.zeros_like(s[:1]), s[1:]]) for s in hx]
    assert torch.equal(y, ours(x, as_state(*zeroed))[0])
    for gradient in torch.autograd.grad(y.sum(), hx):
        assert not gradient[0].any() and gradient[1].any()


@every_kind
def test_nothing_crosses_a_cut(implementation, kind):
    """Neither gradients, which are zero to the bit, nor states that are no numbers."""
    _, ours, x, hx = pair_and_hx(kind)
    cut = torch.zeros(T, B, dtype=torch.bool)
    cut[4] = True
    x.requires_grad_()
    y, _ = ours(x, hx, resets=cut)
    early, late = y[:4].sum(), y[4:].sum()
    (gradient,) = torch.autograd.grad(late, x, retain_graph=True)
    assert not gradient[:4].any() and gradient[4:].all()
    (gradient,) = torch.autograd.grad(early, x)
    assert not gradient[4:].any() and gradient[:4].all()
    for value in (math.nan, math.inf):
        for steps, others in ((slice(0, 4), slice(4, T)), (slice(4, T), slice(0, 4))):
            wrong = x.detach().clone()
            wrong[steps] = value
            assert torch.equal(ours(wrong, hx, resets=cut)[0][others], y[others])


@every_kind
def test_none_and_all(implementation, kind):
    _, ours, x, hx = pair_and_hx(kind)
    nowhere = torch.zeros(T, B, dtype=torch.bool)
    for given in (x, x.float()):
        module, state = ours.to(given.dtype), as_state(*(s.to(given) for s in tensors_in(hx)))
        for a, b in zip(
            with_gradients(module, (given, state, None, nowhere)),
            with_gradients(module, (given, state)),
            strict=True,
        ):
            assert torch.equal(a, b)
    ours.double()
    y, _ = ours(x, resets=~nowhere)
    alone, _ = ours(x.reshape(1, T * B, I))
    torch.testing.assert_close(y, alone.reshape(y.shape), rtol=1e-12, atol=1e-12)


@every_kind
def test_every_layout(implementation, kind):
    _, ours, x, hx = pair_and_hx(kind)
    y, states = ours(x, hx, resets=RESETS)
    turned = copy.deepcopy(ours)
    turned.batch_first = True
    other, states_of_turned = turned(x.transpose(0, 1), hx, resets=RESETS.t())
    assert_same(tensors_in((other.transpose(0, 1), states_of_turned)), tensors_in((y, states)))
    ragged, _ = ours(x, hx, LENGTHS, RESETS)
    other, _ = turned(x.transpose(0, 1), hx, LENGTHS, RESETS.t().contiguous())
    assert_same([other.transpose(0, 1)], [ragged])
    for row in range(B):
        state = as_state(*(s[:, row] for s in tensors_in(hx)))
        for module in (ours, turned):  # batch_first says nothing where there is no batch
            alone, last = module(x[:, row], state, resets=RESETS[:, row])
            assert_same([alone], [y[:, row]])
            assert_same(tensors_in(last), [s[:, row] for s in tensors_in(states)])
    in_order = pack_padded_sequence(x, [7, 7, 5, 2])
    packed, _ = ours(in_order, hx, None, pack_padded_sequence(RESETS, [7, 7, 5, 2]))
    padded, _ = ours(x, hx, [7, 7, 5, 2], RESETS)
    again = pack_padded_sequence(padded, [7, 7, 5, 2])
    assert_same([packed.data], [again.data])


@every_kind
def test_sizes_by_layer_and_direction(implementation, kind):
    ours = kind(I, [(4, 2), 3], num_layers=2, bidirectional=True, dtype=torch.float64)
    x, hx = torch.randn(T, B, I).double(), None
    for _ in range(2):  # without a state, then with one by layer
        y, after = ours(x, hx, resets=RESETS)
        for row in range(B):
            cuts = [0, *(t for t in range(1, T) if RESETS[t, row]), T]
            for begin, end in itertools.pairwise(cuts):
                if hx is None or (begin > 0 and end < T):
                    assert_same([y[begin:end, row]], [ours(x[begin:end, row])[0]])
        hx = after


@every_kind
def test_dropout_draws_as_without(kind):
    _, ours, x, _ = pair_and_hx(kind, dropout=0.5)
    results = []
    for resets in (None, torch.zeros(T, B, dtype=torch.bool)):
        torch.manual_seed(1)
        results.append(ours(x, resets=resets)[0])
    assert torch.equal(*results)


@every_kind
def test_under_transforms(kind):
    """torch.func goes by the reference; resets may be one of the things that are mapped over."""
    _, ours, x, _ = pair_and_hx(kind)

    def loss(x, resets):
        return ours(x, resets=resets)[0].square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, RESETS), leaf)
    assert_same([grad(loss)(x, RESETS)], [expected])
    by_row = vmap(grad(lambda x, r: loss(x[:, None], r[:, None])), (1, 1), 1)(x, RESETS)
    assert_same([by_row], [expected])


@every_kind
def test_second_derivatives(implementation, kind):
    torchs, ours, x, hx = pair_and_hx(kind)
    hx = tensors_in(hx)

    def ours_call(x, *hx):
        return ours(x, as_state(*hx), None, RESETS)

    def torchs_call(x, *hx):
        return by_segments(torchs, x, hx, None, RESETS)

    results = []
    for call, module in ((ours_call, ours), (torchs_call, torchs)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *hx)]
        y = tensors_in(call(*leaves))
        first = torch.autograd.grad(sum(t.sin().sum() for t in y), leaves, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    assert_same(*results, rtol=1e-10, atol=1e-10)


X = torch.zeros(T, B, I)
PACKED = pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
OTHER = pack_sequence([torch.zeros(n, dtype=torch.bool) for n in (7, 4, 3, 1)])
LIKE = PACKED._replace(data=torch.zeros(len(PACKED.data), dtype=torch.bool))
BOOLS = "GRU: expected resets to be a bool tensor "
PADDED = BOOLS + "[T, B] = [7, 4] on cpu, got "
MISTAKES = {
    "another shape": (X, None, RESETS[:5], PADDED + "[5, 4]"),
    "turned": (X, None, RESETS.t(), PADDED + "[4, 7]"),
    "three dimensions": (X, None, RESETS[..., None], PADDED + "[7, 4, 1]"),
    "turned, with lengths": (X, LENGTHS, RESETS.t(), PADDED + "[4, 7]"),
    "floats": (X, None, RESETS.float(), PADDED + "float32"),
    "bytes": (X, None, RESETS.byte(), PADDED + "uint8"),
    "a list": (X, None, RESETS.tolist(), PADDED + "a list"),
    "an array": (X, None, RESETS.numpy(), PADDED + "a ndarray"),
    "another device": (X, None, RESETS.to("meta"), PADDED + "one on meta"),
    "unbatched": (X[:, 0], None, RESETS, BOOLS + "[T] = [7] on cpu, got [7, 4]"),
    "packed for a padded input": (X, None, LIKE, PADDED + "a PackedSequence"),
    "packed for lengths": (X, LENGTHS, LIKE, PADDED + "a PackedSequence"),
    "padded for a packed input": (
        PACKED, None, RESETS,
        "GRU: expected resets to be a PackedSequence like the input, got a Tensor",
    ),
    "packed with other lengths": (
        PACKED, None, pack_padded_sequence(RESETS, [3, 7, 2, 3], enforce_sorted=False),
        "GRU: expected resets with the batch_sizes of the input, [4, 3, 3, 2, 1, 1, 1], "
        "got [4, 4, 3, 1, 1, 1, 1]",
    ),
    "packed in another order": (
        PACKED, None, pack_padded_sequence(RESETS, [7, 3, 1, 4], enforce_sorted=False),
        "GRU: expected resets with the sorted_indices of the input, [1, 3, 0, 2], "
        "got [0, 3, 1, 2]",
    ),
    "packed without an order": (
        PACKED, None, OTHER,
        "GRU: expected resets with the sorted_indices of the input, [1, 3, 0, 2], got None",
    ),
    "packed floats": (
        PACKED, None, LIKE._replace(data=LIKE.data.float()),
        BOOLS + "[N] = [15] on cpu, got float32",
    ),
    "packed with another N": (
        PACKED, None, LIKE._replace(data=LIKE.data[1:]), BOOLS + "[N] = [15] on cpu, got [14]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(implementation, name):
    x, lengths, resets, message = MISTAKES[name]
    with pytest.raises(ValueError) as got:
        ISSGRU(I, 5)(x, None, lengths, resets)
    assert str(got.value) == message


def test_with_batch_first_the_layout_is_that_of_the_input():
    with pytest.raises(ValueError) as got:
        ISSLSTM(I, 5, batch_first=True)(X.transpose(0, 1), resets=RESETS)
    assert str(got.value) == BOOLS.replace("GRU", "LSTM") + "[B, T] = [4, 7] on cpu, got [7, 4]"
