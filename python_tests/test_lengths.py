# SPDX-License-Identifier: Apache-2.0
"""lengths= is nn.LSTM between pack_padded_sequence and pad_packed_sequence."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from iss_kernels import ISSLSTM, prepare

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

T, B, I = 6, 4, 3  # noqa: E741  (the letter of the shape alphabet)
LENGTHS = [3, 6, 1, 3]  # unsorted, with the longest, the shortest, and two alike
SHORT = [3, 4, 1, 2]  # no row reaches T: the last steps are all padding


def packed_and_padded(lstm, x, hx, lengths):
    """The same by torch's three calls, around nn.LSTM or any other."""
    packed = pack_padded_sequence(x, torch.tensor(lengths), lstm.batch_first, enforce_sorted=False)
    y, state = lstm(packed, hx)
    return pad_packed_sequence(y, lstm.batch_first, total_length=T)[0], state


def tensors_in(result):
    if torch.is_tensor(result):
        return [result]
    return [t for part in result for t in tensors_in(part)]


def inputs_for(lstm, dtype=torch.float64):
    return torch.randn(*((B, T) if lstm.batch_first else (T, B)), I, dtype=dtype)


def with_gradients(call, x, hx, parameters):
    """Outputs of call(x, hx), then the gradients of x, hx and the parameters."""
    x = x.clone().requires_grad_()
    hx = hx and tuple(s.clone().requires_grad_() for s in hx)
    outputs = tensors_in(call(x, hx))
    torch.manual_seed(7)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *(hx or ()), *parameters])]


FORMS = list(itertools.product([False, True], [False, True], [0, 2], [1, 2]))


@pytest.mark.parametrize(("batch_first", "bidirectional", "proj_size", "num_layers"), FORMS)
def test_outputs_and_gradients_are_torchs(
    implementation, batch_first, bidirectional, proj_size, num_layers
):
    torchs = nn.LSTM(
        I, 5, num_layers, batch_first=batch_first, bidirectional=bidirectional,
        proj_size=proj_size, dtype=torch.float64,
    )  # fmt: skip
    ours = ISSLSTM.from_torch(torchs)
    x, cells = inputs_for(ours), num_layers * (1 + bidirectional)
    hx = tuple(torch.randn(cells, B, size).double() for size in (proj_size or 5, 5))
    for state, lengths in ((None, LENGTHS), (hx, SHORT)):

        def our_call(x, hx, lengths=lengths):
            return ours(x, hx, lengths)

        def torchs_calls(x, hx, lengths=lengths):
            return packed_and_padded(torchs, x, hx, lengths)

        results = [
            with_gradients(call, x, state, torchs.parameters()) for call in (our_call, torchs_calls)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unequal_sizes_are_what_each_row_gives_alone(implementation, batch_first):
    lstm = ISSLSTM(
        I, [(4, 2), 5], 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64
    )
    x = inputs_for(lstm)
    y, state = lstm(x, None, LENGTHS)
    y, state = lstm(x, state, LENGTHS)  # hx takes the form that h_n, c_n come in
    rows = x if batch_first else x.transpose(0, 1)
    rows_y = y if batch_first else y.transpose(0, 1)
    for row, length in enumerate(LENGTHS):
        _, alone = lstm(rows[row, :length])
        alone_y, alone = lstm(rows[row, :length], alone)
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


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_padding_is_not_looked_at(implementation, padding):
    lstm = ISSLSTM(I, 5, 2, bidirectional=True, dtype=torch.float64)
    x = inputs_for(lstm)
    past = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
    padded = x.masked_fill(past[..., None], padding)

    def call(x, hx):
        return lstm(x, hx, LENGTHS)

    results = [with_gradients(call, x, None, lstm.parameters()) for x in (x, padded)]
    assert all(map(torch.equal, *results))
    y, dx = results[0][0], results[0][3]
    assert not y[past].any() and not dx[past].any()


def test_full_lengths_are_the_plain_call(implementation):
    lstm = ISSLSTM(I, 5, 2, bidirectional=True, proj_size=2, dtype=torch.float64)
    x = inputs_for(lstm)
    _, state = lstm(x)
    for a, b in zip(tensors_in(lstm(x, state, [T] * B)), tensors_in(lstm(x, state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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


COUNT = "LSTM: expected lengths to be B = 4 ints, got "
RANGE = "LSTM: expected lengths from 1 to T = 6, got "
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


@pytest.mark.parametrize("batch_first", [False, True])
def test_other_mistakes_are_nn_lstms(batch_first):
    torchs = nn.LSTM(I, 5, batch_first=batch_first)
    ours = ISSLSTM.from_torch(torchs)
    x = inputs_for(ours, torch.float32)
    state = torch.zeros(1, B, 5)
    for args in ((x.double(), None), (x[..., :2], None), (x, (state[:, :2], state))):
        with pytest.raises(Exception) as expected:
            torchs(*args)
        with pytest.raises(expected.type) as got:
            ours(*args, LENGTHS)
        assert str(got.value) == str(expected.value)
