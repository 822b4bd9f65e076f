# SPDX-License-Identifier: Apache-2.0
"""bfloat16 tensors in the ops: summed in float32, and so never far from float64's truth."""

import copy
import functools

import pytest
import test_recurrent_ops
import torch
from test_recurrent_ops import SOME, by_cell, by_reference, is_floating, of_row, ours, problems
from torch import nn
from torch.library import opcheck
from torch.nn.utils.rnn import pack_sequence

from iss_kernels import ISSLSTM, use_backend
from iss_kernels.backend import multiplies_bfloat16, supported_isas, use_isa
from iss_kernels.cells import CELLS
from iss_kernels.testing import CASES, Case, assert_no_worse_than_torch, make_inputs, max_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, whenever oneDNN is switched
]

lib = torch.ops.iss_kernels
BFLOAT16 = torch.bfloat16
# In any dtype, the same numbers.
run = functools.partial(test_recurrent_ops.run, numbers=BFLOAT16)


def torchs(inputs):
    """torch's module; without oneDNN, whose bfloat16 LSTM needs AVX-512 and fails elsewhere."""
    with torch.backends.mkldnn.flags(enabled=False):
        return test_recurrent_ops.torchs(inputs)


def tensors_in(result):
    if torch.is_tensor(result):
        return [result]
    return [t for part in result for t in tensors_in(part)]


# -- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@problems(CASES)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch(isa, cell, case, reverse):
    for resets in (None, "few") if case in SOME else (None,):
        results = [
            run(f, case, BFLOAT16, reverse, cell=cell, resets=resets) for f in (ours, torchs)
        ]
        truth = run(torchs, case, torch.float64, reverse, cell=cell, resets=resets)
        for a, b, t in zip(*results, truth, strict=True):
            assert a.dtype == b.dtype == BFLOAT16
            assert_no_worse_than_torch(a, b, t)


@problems(SOME)
def test_only_inputs_and_outputs_are_rounded(isa, cell, case):
    """Outputs are float32's to a rounding; where the CPU multiplies bfloat16, h is rounded in each
    step as well."""
    inputs = make_inputs(case, BFLOAT16, cell=cell)
    wide = {k: v.float() if is_floating(v) else v for k, v in inputs.items()}
    for a, b in zip(given(ours(inputs)), given(ours(wide)), strict=True):
        steps = 2 if multiplies_bfloat16() else 1
        assert max_error(a, b) <= steps * 2**-8 * max(1, b.abs().max())


def given(outputs):
    return [y for y in outputs if y is not None]


@by_cell
def test_what_is_saved_for_the_gradient_is_float32(isa, cell):
    of = CELLS[cell]
    inputs = make_inputs(Case("saved", 3, 2, 5, 4, P=3 if of.projects else 0), BFLOAT16, cell=cell)
    y, h_n, c_n, *saved = lib.recurrent_forward(*inputs.values(), True)
    assert [t.dtype for t in (y, h_n, c_n)] == [BFLOAT16] * 3
    assert [t.dtype for t in saved] == [torch.float32] * 2
    depth = len(inputs["w_hh"]) // len(inputs["w_ih"])
    assert [tuple(t.shape) for t in saved] == [(6, 4 * count) for count in of.saved(depth)]
    if of.saved_states:
        assert not torch.equal(saved[1], saved[1].bfloat16().float())  # and has float32's digits
    *_, gates, cells = lib.recurrent_forward(*inputs.values(), False)
    assert gates.numel() == cells.numel() == 0 and gates.dtype == cells.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize(("cell", "case"), [
    ("lstm", Case("padded", 2, 1, 2, 3)),
    ("lstm", Case("packed_projected", 2, 3, 2, 5, P=2, batch_sizes=(3, 1))),
    ("gru", Case("packed", 2, 3, 2, 5, batch_sizes=(3, 1))),
    ("rnn_tanh", Case("padded", 2, 1, 2, 3)),
], ids=str)  # fmt: skip
def test_opcheck(cell, case):
    inputs = make_inputs(case, BFLOAT16, cell=cell, resets="few")
    y, h_n, c_n, *saved = lib.recurrent_forward(*inputs.values(), True)
    cotangents = [torch.randn_like(y), torch.randn_like(h_n)]
    cotangents += [None if inputs["c0"] is None else torch.randn_like(c_n)]
    *tensors, reverse = inputs.values()
    opcheck(lib.recurrent_backward, (*cotangents, *tensors, y, *saved, reverse, True, True, True))
    for tensor in filter(is_floating, tensors):
        tensor.requires_grad_()
    opcheck(lib.recurrent_forward, (*tensors, reverse, True))


@problems(SOME)
def test_the_reference_and_every_isa_agree(cell, case):
    with use_backend("reference"):
        expected = run(ours, case, BFLOAT16, cell=cell)
    results = []
    for name in supported_isas():
        with use_isa(name):
            results.append(run(ours, case, BFLOAT16, cell=cell))
    # The reference rounds every intermediate value too; ISAs differ where one rounding of an
    # output falls the other way, by a step of the largest value.
    pairs = [(expected, results[0], 2e-2), *((results[0], other, 2**-7) for other in results[1:])]
    # A sum that rounds to the other side of zero switches a gradient of relu on or off.
    compared = slice(2 if cell == "rnn_relu" else None)
    for first, second, tolerance in pairs:
        for a, b in zip(first[compared], second[compared], strict=True):
            assert max_error(a, b) <= tolerance * max(1, float(b.abs().max()))


@problems(SOME)
def test_the_same_input_gives_the_same_bits(isa, cell, case):
    first = run(ours, case, BFLOAT16, cell=cell, resets="few")
    for _ in range(3):
        assert all(map(torch.equal, first, run(ours, case, BFLOAT16, cell=cell, resets="few")))


@pytest.mark.parametrize(("cell", "case"), [
    ("lstm", Case("rows", 30, 13, 8, 70)),
    ("lstm", Case("one_row", 30, 1, 8, 200)),
    ("lstm", Case("few_rows", 20, 3, 8, 190, P=70)),
    ("lstm", Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1))),
    ("gru", Case("rows", 30, 13, 8, 70)),
    ("gru", Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1))),
    ("rnn_tanh", Case("rows", 30, 13, 8, 70)),
], ids=str)  # fmt: skip
def test_threads_give_the_same_bits(isa, two_threads, cell, case):
    inputs = make_inputs(case, BFLOAT16, cell=cell)

    def results():
        trained = run(ours, case, BFLOAT16, cell=cell)
        return given(ours(inputs)) + trained[: 2 + (inputs["c0"] is not None)]

    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(2)
    for _ in range(2):
        assert all(map(torch.equal, results(), alone))


@by_cell
def test_a_row_does_not_depend_on_its_batch(isa, cell):
    inputs = make_inputs(Case("rows", 30, 13, 8, 70), BFLOAT16, cell=cell, resets="few")
    y, *_ = ours(inputs)
    for row in (0, 5, 12):
        one_y, *_ = ours(of_row(inputs, row))
        assert torch.equal(one_y[:, 0], y[:, row])


@by_cell
def test_non_contiguous_arguments_give_the_same_result(isa, cell):
    case = Case("strided", 4, 5, 6, 13, P=4 if CELLS[cell].projects else 0)
    inputs = make_inputs(case, BFLOAT16, cell=cell)

    def strided(t):
        if not is_floating(t):
            return t
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    results = ours({k: strided(v) for k, v in inputs.items()})
    assert all(map(torch.equal, given(results), given(ours(inputs))))


@by_cell
def test_nan_and_infinity_pass_as_in_the_reference(isa, cell):
    inputs = make_inputs(Case("nan", 3, 5, 4, 11), BFLOAT16, cell=cell)
    inputs["x"][1, 2, 0] = float("nan")
    inputs["x"][0, 4, 1] = float("inf")
    if cell in ("lstm", "rnn_tanh", "rnn_relu"):  # test_recurrent_ops.py says why not in the others
        inputs["h0"][0, 0] = float("-inf")
    results = ours(inputs), by_reference(inputs)
    torch.testing.assert_close(*results, equal_nan=True, rtol=2e-2, atol=2e-2)


@by_cell
def test_mixed_dtypes_are_refused(cell):
    inputs = make_inputs(Case("mixed", 3, 2, 5, 4), BFLOAT16, cell=cell)
    for name in ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"):
        if inputs[name] is None:
            continue
        with pytest.raises(RuntimeError) as got:
            ours(inputs | {name: inputs[name].float()})
        assert str(got.value).splitlines()[0] == (
            f"{cell}_forward: expected {name} of dtype bfloat16, got float32"
        )


# -- ISSLSTM ---------------------------------------------------------------------------------------


def gradients(module, x):
    """Outputs of module(x), then the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    outputs = tensors_in(module(x))
    torch.manual_seed(7)
    loss = sum((y * torch.randn(y.shape).to(BFLOAT16).to(y.dtype)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, [x, *module.parameters()])
    return [*outputs, *grads]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True},
     {"proj_size": 3, "bias": False, "num_layers": 2}],
)  # fmt: skip
def test_isslstm_is_no_worse_than_nn_lstm(isa, options):
    their_lstm = nn.LSTM(5, 12, **options, dtype=BFLOAT16)
    our_lstm = ISSLSTM(5, 12, **options, dtype=BFLOAT16)
    our_lstm.load_state_dict(their_lstm.state_dict())
    x = torch.randn(7, 4, 5).to(BFLOAT16)
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = gradients(their_lstm, x)
        truth = gradients(copy.deepcopy(their_lstm).double(), x.double())
    for a, b, t in zip(gradients(our_lstm, x), theirs, truth, strict=True):
        assert a.dtype == b.dtype == BFLOAT16
        assert_no_worse_than_torch(a, b, t)


def test_a_state_dict_goes_both_ways_and_keeps_the_dtype():
    ours, torchs = ISSLSTM(3, 4, 2, dtype=BFLOAT16), nn.LSTM(3, 4, 2, dtype=BFLOAT16)
    torchs.load_state_dict(ours.state_dict())
    assert all(v.dtype == BFLOAT16 for v in ours.state_dict().values())
    for name, value in torchs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    ours.load_state_dict(nn.LSTM(3, 4, 2).state_dict())  # float32's values, rounded
    assert all(p.dtype == BFLOAT16 for p in ours.parameters())
    converted = ISSLSTM(3, 4, 2).to(BFLOAT16)
    assert converted(torch.randn(5, 2, 3).to(BFLOAT16))[0].dtype == BFLOAT16


def test_every_form_of_input(isa):
    lstm = ISSLSTM(3, [7, 4], 2, bidirectional=True, dtype=BFLOAT16)
    wide = copy.deepcopy(lstm).double()
    x = torch.randn(6, 4, 3).to(BFLOAT16)
    _, state = lstm(x)
    forms = {
        "state": ((x, state), (x.double(), _as(state, torch.float64))),
        "unbatched": ((x[:, 0],), (x[:, 0].double(),)),
        "lengths": ((x, None, [6, 1, 3, 6]), (x.double(), None, [6, 1, 3, 6])),
    }
    for mine, truth in forms.values():
        for a, t in zip(tensors_in(lstm(*mine)), tensors_in(wide(*truth)), strict=True):
            assert a.dtype == BFLOAT16 and max_error(a, t) <= 2e-2
    ragged = [torch.randn(n, 3).to(BFLOAT16) for n in (2, 7, 4)]
    packed, _ = lstm(pack_sequence(ragged, enforce_sorted=False))
    truth, _ = wide(pack_sequence([r.double() for r in ragged], enforce_sorted=False))
    assert packed.data.dtype == BFLOAT16 and max_error(packed.data, truth.data) <= 2e-2


def _as(state, dtype):
    return state.to(dtype) if torch.is_tensor(state) else tuple(_as(s, dtype) for s in state)


def test_training_lowers_the_loss(isa):
    lstm, x = ISSLSTM(3, 8, dtype=BFLOAT16), torch.randn(6, 4, 3).to(BFLOAT16)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=2.0)
    losses = []
    for _ in range(20):
        loss = (lstm(x)[0].float() - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_module_compiles_as_one_graph():
    module, x = ISSLSTM(4, 7, 2, dtype=BFLOAT16), torch.randn(5, 3, 4).to(BFLOAT16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = [gradients(function, x) for function in (module, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=2**-6)
    torch._dynamo.reset()
