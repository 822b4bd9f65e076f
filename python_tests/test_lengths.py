# SPDX-License-Identifier: Apache-2.0
"""lengths= is torch's module between pack_padded_sequence and pad_packed_sequence."""

import itertools
import math

import pytest
import torch
from kinds import KINDS, as_state, assert_same, every_kind, tensors_in, with_gradients
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from iss_kernels import ISSLSTM, prepare

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

T, B, I = 6, 4, 3  # noqa: E741  (the letter of the shape alphabet)
LENGTHS = [3, 6, 1, 3]  # unsorted, with the longest, the shortest, and two alike
SHORT = [3, 4, 1, 2]  # no row reaches T: the last steps are all padding


def packed_and_padded(lstm, x, hx, lengths):
    """The same by torch's three calls, around its module or any other."""
    packed = pack_padded_sequence(x, torch.tensor(lengths), lstm.batch_first, enforce_sorted=False)
    y, state = lstm(packed, hx)
    return pad_packed_sequence(y, lstm.batch_first, total_length=T)[0], state


def inputs_for(lstm, dtype=torch.float64):
    return torch.randn(*((B, T) if lstm.batch_first else (T, B)), I, dtype=dtype)


FORMS = [
    pytest.param(kind, *form, id="-".join(map(str, (name, *form))))
    for name, kind in KINDS.items()
    for form in itertools.product([False, True], [False, True], [0, 2], [1, 2])
    if kind.projects or form[2] == 0
]


@pytest.mark.parametrize(("kind", "batch_first", "bidirectional", "proj", "num_layers"), FORMS)
def test_outputs_and_gradients_are_torchs(
    implementation, kind, batch_first, bidirectional, proj, num_layers
):
    options = {"proj_size": proj} if proj else {}
    torchs, ours = kind.pair(
        I, 5, num_layers, batch_first=batch_first, bidirectional=bidirectional, **options,
        dtype=torch.float64,
    )  # fmt: skip
    x = inputs_for(ours)
    hx = kind.random_hx(num_layers * (1 + bidirectional), B, hidden=5, proj=proj)
    for state, lengths in ((None, LENGTHS), (hx, SHORT)):

        def our_call(x, *hx, lengths=lengths):
            return ours(x, as_state(*hx), lengths)

        def torchs_calls(x, *hx, lengths=lengths):
            return packed_and_padded(torchs, x, as_state(*hx), lengths)

        args = (x, *tensors_in(state))
        results = [
            with_gradients(call, args, parameters=module.parameters())
            for call, module in ((our_call, ours), (torchs_calls, torchs))
        ]
        assert_same(*results)


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_unequal_sizes_are_what_each_row_gives_alone(implementation, kind, batch_first):
    module = kind(
        I, [(4, 2), 5], 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64
    )
    x = inputs_for(module)
    y, state = module(x, None, LENGTHS)
    y, state = module(x, state, LENGTHS)  # hx takes the form that h_n, c_n come in
    rows = x if batch_first else x.transpose(0, 1)
    rows_y = y if batch_first else y.transpose(0, 1)
    for row, length in enumerate(LENGTHS):
        _, alone = module(rows[row, :length])
        alone_y, alone = module(rows[row, :length], alone)
        torch.testing.assert_close(rows_y[row, :length], alone_y, rtol=1e-12, atol=1e-12)
        for a, b in zip(tensors_in(state), tensors_in(alone), strict=True):
            torch.testing.assert_close(a[..., row, :], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "lengths",
    [
        tuple(LENGTHS),
        torch.tensor(LENGTHS),
        torch.tensor(LENGTHS, dtype=torch.int32),
        torch.tensor(LENGTHS, dtype=torch.uint8),
        torch.tensor([[n, 0] for n in LENGTHS])[:, 0],
        [torch.tensor(n) for n in LENGTHS],
        torch.tensor(LENGTHS).numpy(),
    ],
    ids=["tuple", "int64", "int32", "uint8", "strided", "list of tensors", "NumPy"],
)
def test_lengths_come_in_any_form(lengths):
    lstm = ISSLSTM(I, 5)
    x = inputs_for(lstm, torch.float32)
    for a, b in zip(tensors_in(lstm(x, None, lengths)), tensors_in(lstm(x, None, LENGTHS))):  # noqa: B905
        assert torch.equal(a, b)


@every_kind
@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_padding_is_not_looked_at(implementation, kind, padding):
    module = kind(I, 5, 2, bidirectional=True, dtype=torch.float64)
    x = inputs_for(module)
    past = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
    padded = x.masked_fill(past[..., None], padding)

    results = [with_gradients(module, (x, None, LENGTHS)) for x in (x, padded)]
    assert all(map(torch.equal, *results))
    y, dx = results[0][0], results[0][1 + len(module.cell.states)]
    assert not y[past].any() and not dx[past].any()


@every_kind
def test_full_lengths_are_the_plain_call(implementation, kind):
    options = {"proj_size": 2} if kind.projects else {}
    module = kind(I, 5, 2, bidirectional=True, dtype=torch.float64, **options)
    x = inputs_for(module)
    _, state = module(x)
    assert_same(tensors_in(module(x, state, [T] * B)), tensors_in(module(x, state)))


@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "int8"])
def test_a_prepared_lstm_takes_lengths(implementation, weights):
    for options in ({"proj_size": 2}, {"batch_first": True, "bidirectional": True}):
        prepared = prepare(ISSLSTM(I, 5, 2, **options), weights)
        x = inputs_for(prepared, torch.float32)
        _, state = prepared(x)
        ours = prepared(x, state, LENGTHS)
        expected = packed_and_padded(prepared, x, state, LENGTHS)
        for a, b in zip(tensors_in(ours), tensors_in(expected), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(tensors_in(prepared(x.double(), None, LENGTHS)),
                        tensors_in(prepared(x, None, LENGTHS)), strict=True):  # fmt: skip
            assert a.dtype == torch.float64 and torch.equal(a.float(), b)


def test_lengths_may_be_given_by_name():
    lstm = ISSLSTM(I, 5)
    x = inputs_for(lstm, torch.float32)
    assert torch.equal(lstm(x, lengths=LENGTHS)[0], lstm(x, None, LENGTHS)[0])


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_is_lengths(implementation, kind, batch_first):
    module = kind(I, 5, 2, bidirectional=True, batch_first=batch_first)
    x = inputs_for(module, torch.float32)
    mask = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    mask = mask.t() if batch_first else mask
    _, state = module(x)
    for run in (module, prepare(module)):
        expected = tensors_in(run(x, state, LENGTHS))
        assert all(map(torch.equal, tensors_in(run(x, state, mask=mask)), expected))


RANGE = "LSTM: expected lengths from 1 to T = 6, got "
MASK = "LSTM: expected mask bool, in the layout of an input of rows [T, B, I] or [B, T, I], got "
ONES = torch.ones(T, B) > 0


@pytest.mark.parametrize(
    ("mask", "options", "error", "message"),
    [
        (ONES.t(), {}, ValueError, MASK + "[4, 6] of torch.bool"),
        (ONES[0], {}, ValueError, MASK + "[4] of torch.bool"),
        (ONES.float(), {}, ValueError, MASK + "[6, 4] of torch.float32"),
        ([1], {}, TypeError, MASK + "a list"),
        (ONES, {"lengths": LENGTHS}, ValueError, "LSTM: expected lengths or mask, got both"),
        (
            torch.arange(T)[:, None].expand(T, B) != 2,
            {},
            ValueError,
            "LSTM: expected mask to be True for the first steps of each row, got one with gaps",
        ),
        (
            ~ONES,
            {},
            ValueError,
            "LSTM: expected mask to be True for the first steps of each row, got one with a row of "
            "no steps",
        ),
    ],
    ids=["turned", "one dimension", "floats", "a list", "both", "gaps", "empty rows"],
)
@pytest.mark.parametrize("kind", [lambda lstm: lstm, prepare], ids=["ISSLSTM", "prepared"])
def test_wrong_masks(kind, mask, options, error, message):
    lstm = kind(ISSLSTM(I, 5))
    with pytest.raises(error) as got:
        lstm(inputs_for(lstm, torch.float32), mask=mask, **options)
    assert str(got.value) == message


COUNT = "LSTM: expected lengths to be B = 4 ints, got "
FORM = "LSTM: expected input of shape [T, B, I] or [B, T, I] with lengths, got "


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2, 3], COUNT + "(3,) of torch.int64"),
        ([[1, 2, 3, 4]], COUNT + "(1, 4) of torch.int64"),
        (5, COUNT + "() of torch.int64"),
        ([1.0, 2.0, 3.0, 4.0], COUNT + "(4,) of torch.float32"),
        (torch.tensor([True] * 4), COUNT + "(4,) of torch.bool"),
        (torch.ones(4, dtype=torch.complex64), COUNT + "(4,) of torch.complex64"),
        ([0, 2, 3, 4], RANGE + "0"),
        ([1, -2, 3, 4], RANGE + "-2"),
        ([1, 2, 7, 9], RANGE + "7"),
    ],
    ids=["three", "two dimensions", "one int", "floats", "bools", "complex", "0", "-2", "7"],
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [lambda lstm: lstm, prepare], ids=["ISSLSTM", "prepared"])
def test_wrong_lengths(kind, batch_first, lengths, message):
    lstm = kind(ISSLSTM(I, 5, batch_first=batch_first))
    with pytest.raises(ValueError) as got:
        lstm(inputs_for(lstm, torch.float32), None, lengths)
    assert str(got.value) == message


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(T, I), FORM + "2-D"),
        (torch.zeros(T, B, 1, I), FORM + "4-D"),
        (pack_sequence([torch.zeros(T, I)] * B), FORM + "a PackedSequence"),
    ],
    ids=["unbatched", "four dimensions", "packed"],
)
def test_wrong_inputs(x, message):
    with pytest.raises(ValueError) as got:
        ISSLSTM(I, 5)(x, None, LENGTHS)
    assert str(got.value) == message


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_other_mistakes_are_torchs(kind, batch_first):
    torchs, ours = kind.pair(I, 5, batch_first=batch_first)
    x = inputs_for(ours, torch.float32)
    state = torch.zeros(1, B, 5)
    for args in ((x.double(), None), (x[..., :2], None), (x, kind.hx(state[:, :2], state))):
        with pytest.raises(Exception) as expected:
            torchs(*args)
        with pytest.raises(expected.type) as got:
            ours(*args, LENGTHS)
        assert str(got.value) == str(expected.value)
