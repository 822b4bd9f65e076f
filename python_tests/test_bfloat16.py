# SPDX-License-Identifier: Apache-2.0
"""bfloat16 tensors in the ops: summed in float32, and so never far from float64's truth."""

import copy
import functools

import pytest
import test_lstm_ops
import torch
from test_lstm_ops import ALL, SOME, by_reference, is_floating, ours
from test_reference import torch_lstm
from torch import nn
from torch.library import opcheck
from torch.nn.utils.rnn import pack_sequence

from iss_kernels import ISSLSTM, use_backend
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.testing import Case, assert_no_worse_than_torch, make_inputs, max_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, whenever oneDNN is switched
]

lib = torch.ops.iss_kernels
BFLOAT16 = torch.bfloat16
run = functools.partial(test_lstm_ops.run, numbers=BFLOAT16)  # in any dtype, the same numbers


def torchs(inputs):
    """nn.LSTM; without oneDNN, whose bfloat16 LSTM needs AVX-512 and fails elsewhere."""
    with torch.backends.mkldnn.flags(enabled=False):
        return torch_lstm(inputs)


def tensors_in(result):
    if torch.is_tensor(result):
        return [result]
    return [t for part in result for t in tensors_in(part)]


# -- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ALL)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch(isa, case, reverse):
    same = torchs if case.T > 0 else by_reference  # nn.LSTM takes no empty sequence
    results = run(ours, case, BFLOAT16, reverse), run(same, case, BFLOAT16, reverse)
    truth = run(same, case, torch.float64, reverse)
    for a, b, t in zip(*results, truth, strict=True):
        assert a.dtype == b.dtype == BFLOAT16
        assert_no_worse_than_torch(a, b, t)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_only_inputs_and_outputs_are_rounded(isa, case):
    """Outputs are float32's to a rounding, but that h is rounded once at each step."""
    inputs = make_inputs(case, BFLOAT16)
    wide = {k: v.float() if is_floating(v) else v for k, v in inputs.items()}
    for a, b in zip(ours(inputs), ours(wide), strict=True):
        assert max_error(a, b) <= 2**-8 * max(1, b.abs().max())


def test_what_is_saved_for_the_gradient_is_float32(isa):
    inputs = make_inputs(Case("saved", 3, 2, 5, 4, P=3), BFLOAT16)
    y, h_n, c_n, gates, cells = lib.recurrent_forward(*inputs.values(), True)
    assert [t.dtype for t in (y, h_n, c_n)] == [BFLOAT16] * 3
    assert [t.dtype for t in (gates, cells)] == [torch.float32] * 2
    assert gates.shape == (6, 16) and cells.shape == (6, 4)
    assert not torch.equal(cells, cells.bfloat16().float())  # and has float32's digits
    *_, gates, cells = lib.recurrent_forward(*inputs.values(), False)
    assert gates.numel() == cells.numel() == 0 and gates.dtype == cells.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize("case", [
    Case("padded", 2, 1, 2, 3),
    Case("packed_projected", 2, 3, 2, 5, P=2, batch_sizes=(3, 1)),
], ids=str)  # fmt: skip
def test_opcheck(case):
    inputs = make_inputs(case, BFLOAT16)
    outputs = lib.recurrent_forward(*inputs.values(), True)
    cotangents = [torch.randn_like(t) for t in outputs[:3]]
    *tensors, reverse = inputs.values()
    opcheck(
        lib.recurrent_backward,
        (*cotangents, *tensors, outputs[0], *outputs[3:], reverse, True, True, True),
    )
    for tensor in filter(is_floating, tensors):
        tensor.requires_grad_()
    opcheck(lib.recurrent_forward, (*tensors, reverse, True))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_reference_and_every_isa_agree(case):
    with use_backend("reference"):
        expected = run(ours, case, BFLOAT16)
    results = []
    for name in supported_isas():
        with use_isa(name):
            results.append(run(ours, case, BFLOAT16))
    # The reference rounds every intermediate value too; ISAs differ where one rounding of an
    # output falls the other way, by a step of the largest value.
    pairs = [(expected, results[0], 2e-2), *((results[0], other, 2**-7) for other in results[1:])]
    for first, second, tolerance in pairs:
        for a, b in zip(first, second, strict=True):
            assert max_error(a, b) <= tolerance * max(1, float(b.abs().max()))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_same_input_gives_the_same_bits(isa, case):
    first = run(ours, case, BFLOAT16)
    for _ in range(3):
        assert all(map(torch.equal, first, run(ours, case, BFLOAT16)))


@pytest.mark.parametrize("case", [
    Case("rows", 30, 13, 8, 70),
    Case("one_row", 30, 1, 8, 200),
    Case("few_rows", 20, 3, 8, 190, P=70),
    Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1)),
], ids=str)  # fmt: skip
def test_threads_give_the_same_bits(isa, two_threads, case):
    inputs = make_inputs(case, BFLOAT16)
    torch.set_num_threads(1)
    alone = ours(inputs), run(ours, case, BFLOAT16)[:3]
    torch.set_num_threads(2)
    for _ in range(2):
        again = ours(inputs), run(ours, case, BFLOAT16)[:3]
        assert all(map(torch.equal, tensors_in(again), tensors_in(alone)))


def test_a_row_does_not_depend_on_its_batch(isa):
    inputs = make_inputs(Case("rows", 30, 13, 8, 70), BFLOAT16)
    y, *_ = ours(inputs)
    for row in (0, 5, 12):
        one = {k: inputs[k][row : row + 1] for k in ("h0", "c0")}
        one_y, *_ = ours(inputs | one | {"x": inputs["x"][:, row : row + 1]})
        assert torch.equal(one_y[:, 0], y[:, row])


def test_non_contiguous_arguments_give_the_same_result(isa):
    inputs = make_inputs(Case("strided", 4, 5, 6, 13, P=4), BFLOAT16)

    def strided(t):
        if not is_floating(t):
            return t
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    for a, b in zip(ours({k: strided(v) for k, v in inputs.items()}), ours(inputs), strict=True):
        assert torch.equal(a, b)


def test_nan_and_infinity_pass_as_in_the_reference(isa):
    inputs = make_inputs(Case("nan", 3, 5, 4, 11), BFLOAT16)
    inputs["x"][1, 2, 0] = float("nan")
    inputs["x"][0, 4, 1] = float("inf")
    inputs["h0"][0, 0] = float("-inf")
    for a, b in zip(ours(inputs), by_reference(inputs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_are_refused():
    inputs = make_inputs(Case("mixed", 3, 2, 5, 4), BFLOAT16)
    for name in ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"):
        with pytest.raises(RuntimeError) as got:
            ours(inputs | {name: inputs[name].float()})
        assert str(got.value).splitlines()[0] == (
            f"lstm_forward: expected {name} of dtype bfloat16, got float32"
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
