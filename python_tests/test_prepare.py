# SPDX-License-Identifier: Apache-2.0
"""prepare: as accurate as each format allows, and in every form of call what ISSLSTM is."""

import copy
import ctypes
import io
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from kinds import KINDS, every_kind, tensors_in
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from iss_kernels import ISSGRU, ISSLSTM, ISSRHN, ISSRNN, load, prepare, save, use_backend
from iss_kernels.backend import multiplies_bfloat16, supported_isas, use_isa
from iss_kernels.demo.model import LanguageModel, perplexity, windows
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import PreparedGRU, PreparedLSTM, PreparedRHN, PreparedRNN
from iss_kernels.testing import assert_no_worse_than_torch, max_error

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

FORMATS = ["float32", "float16", "bfloat16", "int8"]
DTYPES = {name: getattr(torch, name) for name in FORMATS}
X = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


def equal(a, b):
    return all(map(torch.equal, tensors_in(a), tensors_in(b)))


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, values):
    now = module.state_dict()
    return list(now) == list(values) and all(
        now[name].dtype == value.dtype and torch.equal(now[name], value)
        for name, value in values.items()
    )


class Tagger(nn.Module):
    """A model around LSTMs, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.first = nn.LSTM(3, 3)
        self.inner = nn.ModuleList([ISSLSTM(3, [4, 5], 2), nn.Linear(5, 2)])
        self.again = self.first

    def forward(self, x):
        y = self.again(self.first(self.norm(x))[0])[0]
        return self.inner[1](self.inner[0](y)[0])


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(61, 37, 2), lambda: nn.LSTM(37, 61, 2), lambda: nn.GRU(37, 61, 2),
     lambda: nn.RNN(37, 61, 2), lambda: nn.RNN(37, 61, 2, nonlinearity="relu")],
    ids=["LSTM, narrow", "LSTM", "GRU", "RNN", "relu"],
)  # fmt: skip
def test_errors_over_100_steps_stay_within_what_the_format_allows(implementation, weights, make):
    module = make()
    x = torch.randn(100, 3, module.input_size)
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(x.double())
        torchs, ours = module(x), prepare(module, weights)(x)
    allowed = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
    for a, b, t in zip(*map(tensors_in, (ours, torchs, truth)), strict=True):
        if weights == "float32":
            assert_no_worse_than_torch(a, b, t)
        else:
            assert max_error(a, t) <= allowed[weights]


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [partial(ISSLSTM, proj_size=5), ISSGRU, ISSRNN])
def test_half_formats_only_round_the_weights(isa, make, weights):
    """The rest is float32: what float32 gives from the weights that were rounded beforehand."""
    if weights == "bfloat16" and multiplies_bfloat16():
        pytest.skip("here products round their rows too: the test below")
    module = make(13, 21, num_layers=2, bidirectional=True)
    rounded = copy.deepcopy(module)
    for name, parameter in rounded.named_parameters():
        if name.startswith("weight"):
            parameter.data = parameter.data.to(DTYPES[weights]).float()
    x = torch.randn(20, 4, 13)
    ours, expected = prepare(module, weights)(x), prepare(rounded)(x)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_where_the_cpu_multiplies_bfloat16_products_round_their_rows(isa):
    """x and h, not c, biases or gates; sums are exact to float32, sigmoid and tanh to 2^-13."""
    if not multiplies_bfloat16():
        pytest.skip("here weights are widened: the test above")
    lstm = nn.LSTM(7, 9).double()
    x = torch.randn(12, 3, 7).double()
    w_ih, w_hh, b_ih, b_hh = lstm.parameters()

    def product(rows, weight):
        return rows.bfloat16().double() @ weight.bfloat16().double().t()

    h, c, expected = torch.zeros(3, 9).double(), torch.zeros(3, 9).double(), []
    for x_t in x:
        i, f, g, o = (product(x_t, w_ih) + b_ih + product(h, w_hh) + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        expected.append(h)
    y, (h_n, c_n) = prepare(lstm.float(), "bfloat16")(x.float())
    torch.testing.assert_close(y.double(), torch.stack(expected), rtol=0, atol=2**-13)
    torch.testing.assert_close(c_n[0].double(), c, rtol=0, atol=2**-13)


def test_int8_keeps_each_row_within_half_a_step_of_its_weights():
    lstm = nn.LSTM(5, 7, proj_size=2)
    with torch.no_grad():
        lstm.weight_ih_l0[3] *= 1000  # a scale of its own, so that no other row suffers
        lstm.weight_hh_l0[4] = 0
    prepared = prepare(lstm, "int8")
    codes = prepared.state_dict()
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        weight, scale = getattr(lstm, name), getattr(prepared, name + "_scale")
        back = codes[name].float() * scale[:, None]
        assert torch.equal(getattr(prepared, name), back)  # code that reads weights gets values
        assert scale.shape == weight.shape[:1] and scale.dtype == torch.float32
        assert bool(((back - weight).abs() <= scale[:, None] * 0.5001).all())


def test_a_language_models_perplexity_hardly_moves():
    # Counts up, mostly: something to learn.
    steps = torch.randint(1, 3, (4000,), generator=torch.Generator().manual_seed(0))
    words = (steps.cumsum(0) % 30).view(20, 200).t().contiguous()
    model = LanguageModel(30, 16, 33, 2, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for tokens, targets in windows(words, 20):
            loss = cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    text = words.t().flatten()
    before = perplexity(model, text)
    assert before < 4  # of 30 words: it has learnt
    for weights, allowed in (("float16", 1e-3), ("bfloat16", 1e-3), ("int8", 5e-3)):
        assert abs(math.log(perplexity(prepare(model, weights), text) / before)) < allowed


def relative_error(ours, truth):
    return float((ours - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.5, 3])
def test_int8_features_of_wide_range_keep_the_small_ones(isa, sigma):
    lstm = nn.LSTM(40, 64, 3)
    x = (sigma * torch.randn(50, 8, 40)).exp()
    prepared, alone = prepare(lstm, "int8"), copy.deepcopy(lstm)
    for name, parameter in alone.named_parameters():
        if name.startswith("weight"):
            parameter.copy_(getattr(prepared, name))
    truth = lstm(x)[0]
    # h in 7 bits, on AVX2, has a share in it of its own.
    allowed = 1.25 * relative_error(alone(x)[0], truth) + 3e-3
    assert relative_error(prepared(x)[0], truth) < allowed


@torch.no_grad()
@pytest.mark.parametrize("value", [math.inf, -math.inf, 3e38, 1e-45, math.nan])
@pytest.mark.parametrize("make", [partial(nn.LSTM, proj_size=5), nn.GRU], ids=["LSTM", "GRU"])
def test_a_row_with_an_extreme_element(isa, weights, make, value):
    """Gates saturate as they do in torch's module, and no other row changes."""
    lstm = make(6, 9, num_layers=2)
    lstm.weight_ih_l0[:, 2] = torch.where(lstm.weight_ih_l0[:, 2] > 0, 0.3, -0.3)
    prepared, x = prepare(lstm, weights), torch.randn(7, 4, 6)
    y = prepared(x)[0]
    x[3, 1] = 0
    x[3, 1, 2] = value
    ours, truth = prepared(x)[0], lstm(x)[0]
    assert torch.equal(ours[:, [0, 2, 3]], y[:, [0, 2, 3]])
    torch.testing.assert_close(ours, truth, rtol=0, atol=3e-2, equal_nan=True)
    assert bool(ours[3:, 1].isnan().all()) == math.isnan(value)


# -- forward forms ---------------------------------------------------------------------------------

FORMS = [
    {"hidden_size": 4},
    {"hidden_size": 9, "batch_first": True, "bias": False},
    {"hidden_size": 17, "num_layers": 3, "proj_size": 2},
    {"hidden_size": 5, "num_layers": 2, "bidirectional": True, "batch_first": True},
    {"hidden_size": 6, "num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False},
    {"hidden_size": [7, 3], "num_layers": 2},
    {"hidden_size": [(5, 4), 6], "proj_size": [(2, 3), 0], "num_layers": 2, "bidirectional": True},
    {"kind": "gru", "hidden_size": 9},
    {"kind": "gru", "hidden_size": [(5, 17), 6], "num_layers": 2, "bidirectional": True},
    {"kind": "gru", "hidden_size": 4, "num_layers": 2, "batch_first": True, "bias": False},
    {"kind": "rnn_tanh", "hidden_size": [17, 6], "num_layers": 2},
    {"kind": "rnn_relu", "hidden_size": 5, "bidirectional": True, "batch_first": True},
    {"kind": "rhn", "hidden_size": 9, "depth": 3},
    {"kind": "rhn", "hidden_size": 17, "depth": 1, "batch_first": True, "bias": False},
    {"kind": "rhn", "hidden_size": 5, "depth": 2, "carry": "separate"},
]
MAKES = {**KINDS, "rhn": ISSRHN}


@torch.no_grad()
def calls(lstm, features=3):
    """Arguments of every form of call, by name."""
    time, batch = (1, 0) if lstm.batch_first else (0, 1)
    x = torch.randn(*(6, 4)[:: -1 if lstm.batch_first else 1], features)
    assert x.shape[time] == 6 and x.shape[batch] == 4
    state, one_row = lstm(x)[1], lstm(x.select(batch, 0))[1]
    ragged = [torch.randn(n, features) for n in (2, 7, 4, 4)]
    packed, sorted_ = (
        pack_sequence(ragged, enforce_sorted=False),
        pack_sequence(sorted(ragged, key=len, reverse=True)),
    )
    return {
        "plain": (x,),
        "one step": (x.narrow(time, 0, 1),),
        "one row": (x.narrow(batch, 0, 1),),
        "strided": (torch.randn(*x.shape[:2], 2 * features)[..., ::2],),
        "state": (x, state),
        **({"state as a list": (x, list(state))} if isinstance(state, tuple) else {}),
        "unbatched": (x.select(batch, 0),),
        "unbatched, state": (x.select(batch, 0), one_row),
        "packed": (packed,),
        "packed, state": (packed, state),
        "packed and sorted": (sorted_, state),
        "lengths": (x, None, [6, 1, 3, 6]),
        "lengths, state": (x, state, torch.tensor([2, 6, 3, 1])),
        "resets": (x, state, None, torch.rand(x.shape[:2]) < 0.3),
        "resets, unbatched": (x.select(batch, 0), None, None, torch.rand(6) < 0.3),
        "resets, strided": (x, None, None, torch.rand(*x.shape[:2], 2)[..., 0] < 0.3),
        "resets, packed": (packed, state, None, packed._replace(data=packed.data[:, 0] < 0)),
        "resets, lengths": (x, state, [6, 1, 3, 6], torch.rand(x.shape[:2]) < 0.3),
    }


@pytest.mark.parametrize("options", FORMS, ids=lambda o: " ".join(f"{v}" for v in o.values()))
def test_every_form_of_call_is_that_of_our_module(implementation, options):
    options = dict(options)
    lstm = MAKES[options.pop("kind", "lstm")](3, **options)
    prepared = prepare(lstm)
    with torch.no_grad():
        for name, args in calls(lstm).items():
            originals = [t.clone() for t in tensors_in([a for a in args[:2] if a is not None])]
            ours, expected = prepared(*args), lstm(*args)
            assert type(ours[0]) is type(expected[0])
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, msg=name)
            left = tensors_in([a for a in args[:2] if a is not None])
            assert all(map(torch.equal, left, originals)), f"{name}: an argument was written to"


@pytest.mark.parametrize("make", [partial(ISSLSTM, proj_size=5), *list(KINDS.values())[1:]],
                         ids=KINDS)  # fmt: skip
def test_formats_take_every_form_of_call_too(isa, weights, make):
    lstm = make(3, 17, num_layers=2, bidirectional=True)
    prepared = prepare(lstm, weights)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}[weights]
    with torch.no_grad():
        for args in calls(lstm).values():
            torch.testing.assert_close(prepared(*args), lstm(*args), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "make"),
    [(torch.bfloat16, ISSLSTM), (torch.float16, ISSGRU), (torch.float64, ISSLSTM)],
)
def test_other_floating_inputs_are_converted_there_and_back(implementation, weights, dtype, make):
    lstm = make(3, 4, 2)
    prepared = prepare(lstm, weights)
    for name, args in calls(lstm).items():
        x, *rest = args
        x = x.to(dtype)
        ours = prepared(x, *rest)
        expected = prepared(x.to(torch.float32), *rest)
        for a, b in zip(tensors_in(ours), tensors_in(expected), strict=True):
            assert a.dtype == dtype, name
            assert torch.equal(a, b.to(dtype)), name
        if rest and rest[0] is not None:
            state = rest[0]
            state = state.to(dtype) if torch.is_tensor(state) else tuple(s.to(dtype) for s in state)
            assert tensors_in(prepared(x, state))[0].dtype == dtype


@pytest.mark.parametrize("carry", ["coupled", "separate"])
def test_a_recurrent_highway_network_in_every_format(implementation, weights, carry):
    rhn = ISSRHN(13, 21, 4, carry, dropout_input=0.5, dropout_state=0.5, dropout_gate=0.5)
    for parameter in rhn.parameters():  # which begin so small that nothing would be seen
        nn.init.uniform_(parameter, -0.3, 0.3)
    prepared, x = prepare(rhn, weights).train(), torch.randn(50, 3, 13)  # it drops nothing
    assert type(prepared) is PreparedRHN
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}[weights]
    with torch.no_grad():
        for args in calls(rhn.eval(), 13).values():
            torch.testing.assert_close(prepared(*args), rhn(*args), rtol=0, atol=tolerance)
        torch.testing.assert_close(prepared(x), rhn(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float64, "float32")],
)
def test_by_default_weights_keep_the_dtype_of_the_model(implementation, dtype, form):
    layers = nn.ModuleList([nn.LSTM(3, 4, 2), nn.Linear(3, 2), nn.LSTMCell(3, 2)]).to(dtype)
    model, x = layers.append(nn.GRU(3, 5)), X.to(dtype)
    fast, asked = prepare(model), prepare(model, form)
    assert [layer.weights for layer in fast] == [form, form, form, "float32"]
    assert equal(fast[0](x), asked[0](x)) and equal(fast[1](x), asked[1](x))
    assert equal(fast[2](x[0]), asked[2](x[0])) and equal(fast[3](X), prepare(model[3])(X))


def test_a_float64_lstm_is_prepared_for_float32():
    lstm = nn.LSTM(3, 4, 2, dtype=torch.float64)
    y, _ = prepare(lstm)(X)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, lstm(X.double())[0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_same_dtype_with_the_extension_and_without(dtype):
    prepared, x = prepare(nn.LSTM(3, 4)), X.to(dtype)
    state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for args in ((x,), (x, state), (x, None, [5, 1])):
            ours = prepared(*args)
            with use_backend("reference"):
                expected = prepared(*args)
            assert [t.dtype for t in tensors_in(ours)] == [t.dtype for t in tensors_in(expected)]


def test_no_dropout_between_the_layers_even_in_training_mode():
    lstm = ISSLSTM(3, 4, 2, dropout=0.9)
    prepared = prepare(lstm).train()
    torch.testing.assert_close(prepared(X), lstm.eval()(X))


def test_mistakes_are_isslstms():
    lstm = ISSLSTM(3, 4, 2)
    prepared = prepare(lstm)
    for args in (
        (torch.randn(5, 2, 4),),
        (X.long(),),
        (torch.randn(0, 2, 3),),
        (X[None],),
        (X, (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))),
        (X, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
        (X, None, [6, 1]),
        (X, None, None, torch.ones(5, 2)),
        (X, None, None, torch.ones(2, 5, dtype=torch.bool)),
    ):
        with pytest.raises(Exception) as expected:
            lstm(*args)
        with pytest.raises(expected.type) as got:
            prepared(*args)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("make", [ISSGRU, ISSRNN])
def test_an_lstms_state_is_no_state_of_another(implementation, make):
    module, h = make(3, 4), torch.zeros(1, 2, 4)
    for hx in ((h, h), h[0], h[:, :1]):
        with pytest.raises((TypeError, RuntimeError)) as expected:
            module(X, hx)
        with pytest.raises(expected.type) as got:
            prepare(module)(X, hx)
        assert str(got.value) == str(expected.value)


# -- what a call is given --------------------------------------------------------------------------


def negative(t):
    """-t, as a view that leaves the memory as it is."""
    view = torch.complex(t, t).conj().imag
    assert view.is_neg()
    return view


@torch.no_grad()
def test_lazily_negated_tensors_keep_their_sign(implementation, weights):
    lstm = nn.LSTM(3, 4, proj_size=2)
    h, c = torch.randn(1, 2, 2), torch.randn(1, 2, 4)
    prepared = prepare(lstm, weights)
    for args in ((X,), (X, (h, c))):
        given = tuple(
            tuple(map(negative, a)) if isinstance(a, tuple) else negative(a) for a in args
        )
        expected = tuple(tuple(-t for t in a) if isinstance(a, tuple) else -a for a in args)
        assert equal(prepared(*given), prepared(*expected))
    lstm.weight_hh_l0 = nn.Parameter(negative(lstm.weight_hh_l0.detach()))
    opposite = prepare(lstm, weights)
    assert not opposite.weight_hh_l0.is_neg()
    assert torch.equal(opposite.weight_hh_l0, -prepared.weight_hh_l0)
    if weights != "int8":  # of which there are no complex numbers
        expected = opposite(X)
        prepared.weight_hh_l0 = negative(prepared.weight_hh_l0.float()).to(DTYPES[weights])
        assert equal(prepared(X), expected)
        if weights == "float32":
            prepared.weight_hh_l0 = negative(-opposite.weight_hh_l0)
            assert prepared.weight_hh_l0.is_neg() and equal(prepared(X), expected)


@torch.no_grad()
def test_tensors_whose_memory_is_not_what_they_are(implementation):
    lstm = nn.LSTM(3, 4)
    prepared, state = prepare(lstm), (torch.randn(1, 2, 4),) * 2
    with torch.inference_mode():
        mode = X.clone(), tuple(t.clone() for t in state)
    lazy = torch._lazy_clone(X)
    for args in (mode, (lazy, state), (nn.Parameter(X), state)):
        for values in (args, args[:1]):
            torch.testing.assert_close(
                prepared(*values), lstm(X, *((state,) if values[1:] else ()))
            )
    assert torch._C._is_cow_tensor(lazy)
    zero = torch._efficientzerotensor(X.shape)  # has no memory
    torch.testing.assert_close(prepared(zero), lstm(torch.zeros_like(X)))


class Tagged(torch.Tensor):
    pass


@torch.no_grad()
def test_a_subclass_comes_back_as_it_does_from_nn_lstm(implementation):
    lstm = nn.LSTM(3, 4)
    prepared, x = prepare(lstm), X.as_subclass(Tagged)
    for _ in range(2):
        ours, expected = tensors_in(prepared(x)), tensors_in(lstm(x))
        assert list(map(type, ours)) == list(map(type, expected)) == [Tagged] * 3
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(prepared(X), lstm(X))


@torch.no_grad()
def test_layouts_that_no_kernel_takes_are_refused():
    prepared, state = prepare(nn.LSTM(3, 4)), torch.zeros(1, 2, 4)
    prepared(X)
    for layout in (torch.Tensor.to_sparse, torch.Tensor.to_mkldnn):
        for args in ((layout(X),), (X, (layout(state), state)), (X, (state, layout(state)))):
            with pytest.raises(NotImplementedError, match="Could not run"):
                prepared(*args)


@torch.no_grad()
def test_other_devices_and_dtypes_are_nn_lstms_errors(implementation):
    lstm = nn.LSTM(3, 4)
    prepared, state = prepare(lstm), torch.zeros(1, 2, 4)
    for _ in range(2):
        for hx in ((state.to("meta"), state), (state, state.to("meta"))):
            with pytest.raises(RuntimeError) as expected:
                lstm(X, hx)
            with pytest.raises(RuntimeError) as got:
                prepared(X, hx)
            assert str(got.value) == str(expected.value)
        with pytest.raises(RuntimeError) as got:
            prepared(X.to("meta"))
        assert str(got.value) == (
            "Input and parameter tensors are not at the same device, found input tensor at meta "
            "and parameter tensor at cpu"
        )
        for dtype in (torch.complex64, torch.bool, torch.int64):
            for x in (X, X.double()):
                with pytest.raises(RuntimeError) as got:
                    prepared(x, (state, state.to(dtype)))
                name = str(dtype).removeprefix("torch.")
                assert str(got.value) == (
                    f"PreparedLSTM: expected hx of a floating dtype, got {name}"
                )
        prepared(X)


@torch.no_grad()
def test_states_of_any_floating_dtype_are_converted(implementation, weights):
    prepared = prepare(nn.LSTM(3, 4), weights)
    state = tuple(torch.randn(1, 2, 4).half() for _ in range(2))
    expected = prepared(X, tuple(t.float() for t in state))
    for dtype in (torch.float16, torch.float64):
        assert equal(prepared(X, tuple(t.to(dtype) for t in state)), expected)


PACKED = pack_padded_sequence(X, [5, 2])  # batch_sizes 2, 2, 1, 1, 1
BAD_PACKED = {
    "fewer rows than said": {"data": PACKED.data[:-1]},
    "more rows than said": {"batch_sizes": PACKED.batch_sizes[:-1]},
    "growing": {"batch_sizes": torch.tensor([1, 2, 2, 1, 1])},
    "zero": {"batch_sizes": torch.tensor([2, 0, 5])},
    "negative": {"batch_sizes": torch.tensor([2, -(2**62), 5])},
    "none": {"batch_sizes": torch.tensor([], dtype=torch.int64)},
    "no rows": {"batch_sizes": torch.tensor([0])},
    "int32": {"batch_sizes": PACKED.batch_sizes.int()},
    "2-D": {"batch_sizes": PACKED.batch_sizes[None]},
    "sorted too short": {"sorted_indices": torch.tensor([0])},
    "sorted too long": {"sorted_indices": torch.tensor([0, 1, 0])},
    "sorted out of range": {"sorted_indices": torch.tensor([0, 2])},
    "unsorted too short": {"unsorted_indices": torch.tensor([0])},
    "unsorted out of range": {"unsorted_indices": torch.tensor([0, -1])},
}


@torch.no_grad()
@pytest.mark.parametrize("name", BAD_PACKED)
def test_a_packed_sequence_that_does_not_fit_is_refused(isa, weights, name):
    prepared = prepare(nn.LSTM(3, 4, 2, bidirectional=True), weights)
    state = (torch.zeros(4, 2, 4),) * 2
    packed = PACKED._replace(**BAD_PACKED[name])
    for _ in range(2):
        # IndexError: what torch says of an index out of range
        with pytest.raises(IndexError if "range" in name else RuntimeError) as got:
            prepared(packed, state)
        assert "range" in str(got.value) or str(got.value).startswith(
            ("PreparedLSTM: ", "lstm: ", "Expected")
        )
        prepared(PACKED, state)


@torch.no_grad()
def test_defaults_of_torch_change_nothing(implementation, weights):
    lstm, state = nn.LSTM(3, 4), (torch.randn(1, 2, 4),) * 2
    expected = prepare(lstm, weights)
    random = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            prepared = prepare(lstm, weights)
            results = [[prepared(X), prepared(X, state), prepared(PACKED)] for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    for result in results:
        for ours, args in zip(result, ((X,), (X, state), (PACKED,)), strict=True):
            assert equal(ours, expected(*args))
    assert torch.equal(torch.get_rng_state(), random)


def test_a_process_whose_first_call_is_in_inference_mode():
    program = """
import torch, iss_kernels
prepared, x = iss_kernels.prepare(torch.nn.LSTM(3, 4), "int8"), torch.randn(5, 2, 3)
with torch.inference_mode():
    first = prepared(x)[0]
    assert prepared._native is not None
assert prepared._native.run_plain(x, False, prepared._buffers) is not None
assert torch.equal(first, prepared(x)[0])
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@torch.no_grad()
def test_a_batch_of_no_rows(implementation, weights):
    x, c = torch.zeros(5, 0, 3), torch.zeros(2, 0, 4)
    for module, given in ((nn.LSTM(3, 4, 2, proj_size=2), (c[..., :2], c)), (nn.GRU(3, 4, 2), c)):
        prepared = prepare(module, weights)
        for state in (None, given):
            shapes = [t.shape for t in tensors_in(prepared(x, state))]
            assert shapes == [t.shape for t in tensors_in(module(x, state))]


# -- buffers that change ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_replaced_and_changed_buffers_are_packed_again(implementation, weights, kind):
    lstm, other = kind(3, 4), kind(3, 4)
    h = torch.zeros(1, 2, 4)
    prepared, expected = prepare(lstm, weights), prepare(other, weights)
    first, second = prepared(X), expected(X)
    new = {name: value.clone() for name, value in expected.named_buffers()}
    with torch.inference_mode():
        of_inference = {name: value.clone() for name, value in new.items()}
    for buffers in (new, of_inference):
        for args in ((X,), (X, h if kind is nn.GRU else (h, h))):
            assert close(functional_call(prepared, buffers, args), second, weights)
            assert equal(prepared(*args), first)
    for name, buffer in prepared.named_buffers():
        buffer.copy_(new[name])
    assert equal(prepared(X), second)
    prepared.bias_hh_l0.add_(1)
    expected.bias_hh_l0 = expected.bias_hh_l0 + 1
    assert equal(prepared(X), expected(X)) and not equal(prepared(X), second)


def close(ours, expected, weights):
    """Whether they agree where one of them does not quantise or round its activations."""
    atol = {"int8": 2e-2, "bfloat16": 5e-3}.get(weights, 1e-6)
    pairs = zip(tensors_in(ours), tensors_in(expected), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


BAD_BUFFERS = {
    "dtype": lambda t: t.double(),
    "shape": lambda t: t[:-1],
    "parameter": lambda t: nn.Parameter(t),
    "none": lambda t: None,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


@torch.no_grad()
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_a_buffer_of_another_kind_is_refused(name, used):
    prepared = prepare(nn.LSTM(3, 4, 2))
    if used:
        prepared(X)
    prepared.weight_hh_l1 = BAD_BUFFERS[name](prepared.weight_hh_l1)
    for args in ((X,), (X, (torch.zeros(2, 2, 4),) * 2)):
        with pytest.raises(RuntimeError, match="weight_hh_l1|same device|Could not run"):
            prepared(*args)


def test_weights_that_ask_for_a_gradient_are_refused(implementation):
    prepared = prepare(nn.LSTM(3, 4))
    y = prepared(X)
    prepared.weight_hh_l0.requires_grad_()
    with pytest.raises(RuntimeError, match="weights that ask for no gradient"):
        prepared(X)
    with torch.no_grad():
        assert equal(prepared(X), y)


@torch.no_grad()
def test_a_replica_of_data_parallel_runs_its_own_weights(implementation):
    prepared = prepare(nn.LSTM(3, 4))
    y = prepared(X)
    replica = prepared._replicate_for_data_parallel()
    replica._buffers = {name: 2 * value for name, value in prepared._buffers.items()}
    twin = copy.deepcopy(prepared)
    for value in twin.buffers():
        value.mul_(2)
    for _ in range(2):
        assert equal(replica(X), twin(X)) and equal(prepared(X), y)


@pytest.mark.parametrize("call", ["reset_parameters", "to_torch"])
def test_what_makes_no_sense_is_refused(call):
    prepared = prepare(nn.LSTM(3, 4))
    before = values_of(prepared)
    with pytest.raises((RuntimeError, TypeError), match="PreparedLSTM"):
        getattr(prepared, call)()
    with pytest.raises(TypeError, match="made by prepare"):
        PreparedLSTM.from_torch(nn.LSTM(3, 4))
    assert same_state(prepared, before) and prepared.requires_grad_() is prepared


# -- who looks on ----------------------------------------------------------------------------------


class Sum(nn.Module):
    """A prepared module within a model."""

    def __init__(self, weights):
        super().__init__()
        # One kind of each suffices: their ops are one.
        kind = nn.GRU if weights == "float16" else nn.LSTM
        self.prepared = prepare(kind(3, 4, 2, bidirectional=True, batch_first=True), weights)

    def forward(self, x):
        return self.prepared(x)[0] + x.sum(-1, keepdim=True)


TRACERS = {
    "jit.trace": torch.jit.trace,
    "make_fx": lambda model, x: make_fx(model)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, backend="aot_eager"),
    "a dispatch mode": lambda model, x: model,
    "vmap": lambda model, x: lambda v: vmap(lambda row: model(row[None])[0])(v),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", TRACERS)
def test_a_tracer_sees_the_lstm(weights, name, used):
    torch.compiler.reset()
    model, x = Sum(weights), X.transpose(0, 1).contiguous()
    if used:
        model(x)
    traced = TRACERS[name](model, x)
    for value in (x, 2 * x, x.flip(1)):
        assert close(traced(value), model(value), weights)
    fresh = copy.deepcopy(model)
    assert torch.equal(model(x), fresh(x))  # nothing of a tracer's is kept


@torch.no_grad()
def test_a_dispatch_mode_sees_the_ops():
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    prepared = prepare(nn.LSTM(3, 4))
    prepared(X)
    with Seen():
        for args in ((X,), (X, (torch.zeros(1, 2, 4),) * 2)):
            prepared(*args)
            assert torch.ops.iss_kernels.recurrent_forward.default in seen
            seen.clear()


@torch.no_grad()
def test_a_tangent_is_not_dropped(implementation):
    prepared = prepare(nn.LSTM(3, 4))
    state = (torch.zeros(1, 2, 4),) * 2
    prepared(X)
    with dual_level():
        x = make_dual(X, torch.ones_like(X))
        h = make_dual(state[0], torch.ones_like(state[0]))
        for args in ((x,), (X, (h, state[1])), (x, state)):
            try:
                y = prepared(*args)[0]
            except RuntimeError as error:
                assert "jvp" in str(error)
            else:  # the reference is plain torch
                assert unpack_dual(y).tangent is not None


# -- the model around it ---------------------------------------------------------------------------


def test_every_lstm_and_linear_of_a_model_is_prepared_and_the_rest_copied(weights):
    model = Tagger()
    before, types = values_of(model), [type(m) for m in model.modules()]
    prepared = prepare(model, weights)
    assert type(prepared) is Tagger and prepared is not model and not prepared.training
    assert type(prepared.first) is PreparedLSTM and prepared.again is prepared.first
    assert type(prepared.inner[0]) is PreparedLSTM
    assert prepared.norm is not model.norm and prepared.norm.weight is not model.norm.weight
    assert type(prepared.inner[1]) is PreparedLinear
    with torch.no_grad():
        torch.testing.assert_close(prepared(X), model(X), rtol=0, atol=3e-2)
    assert model.training and [type(m) for m in model.modules()] == types
    assert same_state(model, before)


def test_later_changes_of_the_model_do_not_reach_the_prepared_one(implementation, weights):
    model = Tagger()
    prepared = prepare(model, weights)  # not run yet: nothing may be packed so far
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        expected = twin(X)
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(prepared(X), expected)
        prepared.inner[1].weight.zero_()
        assert model.inner[1].weight.any()


class OfEachKind(nn.Module):
    """Torch's modules and ours, in a row."""

    def __init__(self):
        super().__init__()
        self.gru, self.rnn = nn.GRU(3, 5, bidirectional=True), ISSRNN(10, [4, 3], 2)
        self.relu, self.lstm = nn.RNN(3, 6, nonlinearity="relu"), nn.LSTM(6, 4)

    def forward(self, x):
        for layer in (self.gru, self.rnn, self.relu, self.lstm):
            x = layer(x)[0]
        return x


def test_modules_of_each_kind_are_prepared(implementation, weights):
    model = OfEachKind()
    prepared = prepare(model, weights)
    assert [type(layer) for layer in prepared.children()] == [
        PreparedGRU, PreparedRNN, PreparedRNN, PreparedLSTM,
    ]  # fmt: skip
    assert isinstance(prepared.gru, ISSGRU) and prepared.relu.cell.name == "rnn_relu"
    with torch.no_grad():
        torch.testing.assert_close(prepared(X), model(X), rtol=0, atol=3e-2)


class Counter(nn.Module):
    """A model whose hooks are methods of its own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.calls = nn.LSTM(3, 4), []
        self.lstm.register_forward_pre_hook(self.before, with_kwargs=True)
        self.lstm.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        self.lstm.register_full_backward_hook(lambda *_: None)  # nothing to run for
        self.lstm.register_load_state_dict_pre_hook(self.loading)
        self.lstm.tag = ["an attribute"]

    def before(self, module, args, kwargs):
        self.calls.append("before")
        return (args[0] * 2,), kwargs

    def after(self, module, args, kwargs, result):
        self.calls.append("after")
        return None if result is None else (result[0] + 1, result[1])

    def loading(self, module, state_dict, prefix, *_):
        self.calls.append("loading")
        for name in [name for name in state_dict if name.startswith(prefix + "old_")]:
            state_dict[name.replace("old_", "")] = state_dict.pop(name)

    def forward(self, x):
        return self.lstm(x)[0]


@torch.no_grad()
def test_hooks_of_an_lstm_stay_and_are_the_copys():
    model = Counter()
    prepared = prepare(model)
    torch.testing.assert_close(prepared(X), model.eval()(X))
    assert prepared.calls == model.calls == ["before", "after"]
    with pytest.raises(RuntimeError):
        prepared(X.new_zeros(1, 1, 7))
    assert prepared.calls == ["before", "after"] * 2  # always_call
    assert prepared.lstm.tag == model.lstm.tag and prepared.lstm.tag is not model.lstm.tag
    values = {name.replace(".", ".old_"): value for name, value in model.state_dict().items()}
    prepared.load_state_dict(values)
    assert prepared.calls[-1] == "loading" and "loading" not in model.calls


def with_(change):
    """A model with an LSTM that has been changed."""
    model = Tagger()
    change(model.first)
    return model


def old_weight_norm(lstm):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(lstm, "weight_hh_l0")


REPARAMETRISED = {
    "pruned": lambda lstm: prune.l1_unstructured(lstm, "weight_hh_l0", 0.5),
    "weight_norm": lambda lstm: nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0"),
    "old weight_norm": old_weight_norm,
}


@pytest.mark.parametrize("make", [nn.LSTM, ISSLSTM, nn.GRU, ISSRNN])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_a_reparametrised_module_is_refused(make, name):
    lstm = make(3, 4)
    REPARAMETRISED[name](lstm)
    for where, model in (("the module", lstm), ("1", nn.ModuleList([nn.LSTM(3, 4), lstm]))):
        with pytest.raises(ValueError) as got:
            prepare(model)
        assert str(got.value).startswith(
            f"prepare: expected {where} with its own parameters, got weight_hh_l0 computed by "
        )


EXTRAS = {
    "attribute 'forward'": lambda lstm: setattr(lstm, "forward", lambda x: (x, None)),
    "attribute 'extra_repr'": lambda lstm: setattr(lstm, "extra_repr", str),
    "buffer scale": lambda lstm: lstm.register_buffer("scale", torch.ones(1)),
    "parameter scale": lambda lstm: setattr(lstm, "scale", nn.Parameter(torch.ones(1))),
    "module norm": lambda lstm: setattr(lstm, "norm", nn.LayerNorm(3)),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_what_cannot_come_along_is_refused(what):
    with pytest.raises(ValueError) as got:
        prepare(with_(EXTRAS[what]))
    assert str(got.value).startswith("prepare: expected first ") and what in str(got.value)


class Doubled(nn.LSTM):
    def forward(self, x):
        return super().forward(2 * x)


class DoubledGru(ISSGRU):
    def forward(self, x):
        return super().forward(2 * x)


@torch.no_grad()
def test_subclasses_are_copied_as_they_are():
    model = nn.ModuleList([nn.LSTM(3, 4), Doubled(3, 4), DoubledGru(3, 4)])
    prepared = prepare(model)
    assert [type(layer) for layer in prepared] == [PreparedLSTM, Doubled, DoubledGru]
    for ours, expected in zip(prepared[1:], model[1:], strict=True):
        assert equal(ours(X), expected(X))


@torch.no_grad()
def test_parameters_that_are_shared_or_lazily_copied():
    lstm, other = nn.LSTM(3, 4), nn.LSTM(3, 4)
    lstm.bias_ih_l0 = lstm.bias_hh_l0 = other.bias_ih_l0
    lstm.weight_hh_l0 = nn.Parameter(torch._lazy_clone(other.weight_hh_l0.detach()))
    prepared = prepare(nn.ModuleList([lstm, other]))
    for twin, model in zip(prepared, (lstm, other), strict=True):
        torch.testing.assert_close(twin(X), model(X))


def test_state_dict_has_nn_lstms_names_and_the_formats_dtypes(weights):
    lstm = nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True)
    values = prepare(lstm, weights).state_dict()
    names = list(lstm.state_dict())
    scales = {f"{name}_scale" for name in names if name.startswith("weight")}
    assert set(values) == set(names) | (scales if weights == "int8" else set())
    assert [name for name in values if name in names] == names
    for name in names:
        assert values[name].shape == lstm.state_dict()[name].shape
        wanted = DTYPES[weights] if name.startswith("weight") else torch.float32
        assert values[name].dtype == wanted


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [partial(ISSLSTM, proj_size=2), ISSGRU], ids=["LSTM", "GRU"])
def test_loaded_weights_are_the_ones_that_run(implementation, weights, make, assign):
    first, second = (prepare(make(3, 9, num_layers=2), weights) for _ in range(2))
    expected = second(X)
    assert not equal(first(X), expected)
    first.load_state_dict(copy.deepcopy(second.state_dict()), assign=assign)
    assert equal(first(X), expected)
    outer, other = prepare(Tagger(), weights), prepare(Tagger(), weights)
    with torch.no_grad():
        outer(X)
        outer.load_state_dict(other.state_dict())  # the hook of a module inside
        assert torch.equal(outer(X), other(X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_torchs_state_dict_loads_into_the_floating_formats(kind):
    lstm = kind(3, 4)
    for weights in ("float32", "float16", "bfloat16"):
        prepared = prepare(kind(3, 4), weights)
        prepared(X)
        prepared.load_state_dict(lstm.state_dict())
        assert equal(prepared(X), prepare(lstm, weights)(X))


def loaded_with(change):
    """A state_dict in float32 with one value changed."""
    values = nn.LSTM(3, 4).state_dict()
    name, value = change
    values[name] = value(values[name])
    return values


BAD_VALUES = {
    "int8 from floats": ("int8", ("bias_ih_l0", lambda v: v), "into the model before prepare"),
    "beyond float16": ("float16", ("weight_hh_l0", lambda v: v * 1e6), "float16's range of 65504"),
    "below float16": ("float16", ("weight_hh_l0", lambda v: v * 1e-8), "float16 holds to 3 bits"),
    "beyond float32": ("float32", ("bias_ih_l0", lambda v: v.double() * 1e300), "float32's range"),
    "nan": ("bfloat16", ("weight_ih_l0", lambda v: v * math.nan), "finite weights"),
    "infinite bias": (
        "int8",
        ("bias_hh_l0", lambda v: v / 0),
        "into the model before prepare",
    ),
    "ints": ("float32", ("weight_ih_l0", lambda v: v.long()), "floating dtype, got int64"),
    "meta": ("float32", ("weight_ih_l0", lambda v: v.to("meta")), "meta"),
    "sparse": ("float32", ("weight_ih_l0", lambda v: v.to_sparse()), "dense"),
    "shape": ("float32", ("weight_ih_l0", lambda v: v[:, :2]), "size mismatch"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_loading_checks_as_prepare_does_and_leaves_the_weights_after_an_error(name, strict, assign):
    weights, change, message = BAD_VALUES[name]
    prepared = prepare(nn.ModuleDict({"lstm": nn.LSTM(3, 4)}), weights)
    before, y = values_of(prepared), prepared["lstm"](X)
    values = {f"lstm.{name}": value for name, value in loaded_with(change).items()}
    with pytest.raises(RuntimeError) as got:
        prepared.load_state_dict(values, strict=strict, assign=assign)
    assert message in str(got.value) and "lstm." in str(got.value)
    assert same_state(prepared, before) and equal(prepared["lstm"](X), y)


def test_loading_int8_scales_that_are_not_finite_is_refused():
    prepared = prepare(nn.LSTM(3, 4), "int8")
    for value in (math.nan, math.inf, -1.0):
        values = values_of(prepared)
        values["weight_hh_l0_scale"][2] = value
        with pytest.raises(RuntimeError, match="weight_hh_l0_scale to be finite"):
            prepared.load_state_dict(values)


@pytest.mark.parametrize("left_out", ["weight_hh_l0", "weight_hh_l0_scale"])
def test_loading_int8_weights_without_their_scales_is_refused(left_out):
    prepared, other = (prepare(nn.LSTM(3, 4), "int8") for _ in range(2))
    before, values = values_of(prepared), values_of(other)
    del values[left_out]
    with pytest.raises(RuntimeError, match="weight_hh_l0 of dtype int8 and weight_hh_l0_scale"):
        prepared.load_state_dict(values, strict=False)
    assert same_state(prepared, before)
    for name in list(values):
        if "hh" in name:
            values.pop(name)
    prepared.load_state_dict(values, strict=False)  # neither of them
    assert torch.equal(prepared.weight_ih_l0, other.weight_ih_l0)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_code_may_ask_for_the_first_parameter(weights, tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x):
            h_0 = next(self.parameters()).new_zeros(1, x.size(1), 4)
            return self.rnn(x, h_0)[0]

    model = Encoder()
    prepared = prepare(model, weights)
    assert torch.equal(prepared(X), prepare(model.rnn, weights)(X)[0])
    assert not [name for name in prepared.state_dict() if "like" in name]
    prepared.load_state_dict(prepared.state_dict())
    save(prepared, tmp_path / "small.safetensors")
    assert torch.equal(load(tmp_path / "small.safetensors", Encoder())(X), prepared(X))


@pytest.mark.parametrize("weights", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_code_may_ask_for_the_models_dtype(weights, dtype, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.norm, self.out = nn.LSTM(3, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.norm(self.lstm(x.to(next(self.parameters()).dtype))[0])
            y = self.norm(self.out(y.to(self.out.weight.dtype)))
            return nn.functional.linear(y, self.out.weight)

    model, path = Model().to(dtype), tmp_path / "small.safetensors"
    prepared = prepare(model, weights)
    save(prepared, path)
    with torch.no_grad():
        y = prepared(X)
        assert y.dtype == dtype
        torch.testing.assert_close(y, model(X), rtol=0.1, atol=0.1)
        assert torch.equal(load(path, Model())(X), y)
    assert prepared.float()(X).dtype == torch.float32


def test_a_compiled_layer_is_copied_and_saved_without_what_was_compiled():
    prepared = prepare(nn.LSTM(3, 4))
    prepared.compile(backend="eager")
    other = copy.deepcopy(prepared)
    torch.save(prepared, io.BytesIO())
    for value in other.buffers():
        value.zero_()
    assert not other(X)[0].any()


@pytest.mark.parametrize("change", ["half", "double", "parameters"])
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16"])
def test_assigned_weights_are_converted(weights, change):
    lstm, prepared = nn.LSTM(3, 4), prepare(nn.LSTM(3, 4), weights)
    values = lstm.state_dict(keep_vars=True)
    if change != "parameters":
        lstm = getattr(lstm, change)()
        values = lstm.state_dict()
    prepared.load_state_dict(values, assign=True)
    assert [parameter.numel() for parameter in prepared.parameters()] == [0]
    assert equal(prepared(X), prepare(lstm, weights)(X))
    with torch.no_grad():
        y = prepared(X)
        lstm.weight_hh_l0.zero_()
        assert equal(prepared(X), y)


def test_assigning_brings_a_model_back_from_the_meta_device(weights):
    prepared = prepare(nn.LSTM(3, 4), weights)
    away = copy.deepcopy(prepared).to("meta")
    away.load_state_dict(prepared.state_dict(), assign=True)
    assert equal(away(X), prepared(X))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_weights_under_vmap():
    models = [prepare(nn.LSTM(3, 4)) for _ in range(3)]
    buffers, _ = stack_module_state(models)[::-1]
    results = vmap(lambda b: functional_call(models[0], b, (X,))[0])(buffers)
    for result, model in zip(results, models, strict=True):
        torch.testing.assert_close(result, model(X)[0])


def through_a_file(module, folder):
    torch.save(module, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@every_kind
def test_deepcopy_pickle_and_save(weights, tmp_path, kind, used):
    prepared_type = {nn.LSTM: PreparedLSTM, nn.GRU: PreparedGRU, nn.RNN: PreparedRNN}[kind.torchs]
    prepared = prepare(kind(3, [4, 2], num_layers=2), weights)
    if used:
        prepared(X)
    for twin in (
        copy.deepcopy(prepared),
        pickle.loads(pickle.dumps(prepared)),
        through_a_file(prepared, tmp_path),
    ):
        assert type(twin) is prepared_type and twin.weights == weights
        assert equal(twin(X), prepared(X)) and same_state(twin, values_of(prepared))
        twin.load_state_dict(prepare(kind(3, [4, 2], num_layers=2), weights).state_dict())
        assert not equal(twin(X), prepared(X))  # a twin has its own weights, and its own hook


@pytest.mark.parametrize(
    "change",
    [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half(), lambda m: m.float()],
    ids=["bfloat16", "double", "half", "float"],
)
def test_a_change_of_dtype_leaves_the_weights_as_they_are(implementation, weights, change):
    lstm = nn.LSTM(3, 4, 2)
    with torch.no_grad():
        lstm.bias_ih_l0[0] = 1e5  # beyond float16
    prepared = prepare(lstm, weights)
    before, y = values_of(prepared), prepared(X)
    assert change(prepared) is prepared
    assert same_state(prepared, before)
    assert equal(prepared(X), y)


def test_the_line_it_prints():
    assert repr(prepare(nn.LSTM(3, 4, 2), "int8")) == (
        "PreparedLSTM(3, 4, num_layers=2, weights='int8')"
    )
    assert repr(prepare(ISSGRU(3, [4, 5], 2))) == (
        "PreparedGRU(3, [4, 5], num_layers=2, weights='float32')"
    )


# -- errors ----------------------------------------------------------------------------------------


def with_a_weight(value, dtype=torch.float32):
    lstm = nn.LSTM(3, 4, dtype=dtype)
    lstm.weight_hh_l0.data[1, 2] = value
    return lstm


def with_an_attribute(name):
    lstm = nn.LSTM(3, 4)
    setattr(lstm, name, 1)
    return lstm


def with_a_row(value):
    lstm = nn.LSTM(3, 4)
    lstm.weight_hh_l0.data[1] = value
    return lstm


ERRORS = {
    "an unknown format": (
        lambda: prepare(nn.LSTM(3, 4), "int4"),
        ValueError,
        "prepare: expected weights to be one of ('float32', 'float16', 'bfloat16', 'int8'), "
        "got 'int4'",
    ),
    "an attribute that a prepared module has": (
        lambda: prepare(with_an_attribute("held")),
        ValueError,
        "prepare: expected the module as its class makes it, got one with a further attribute held",
    ),
    "a cell without inputs": (
        lambda: prepare(nn.LSTMCell(0, 4)),
        ValueError,
        "prepare: expected a weight_ih with columns, got [16, 0]",
    ),
    "rows whose sums in int8 would overflow": (
        lambda: prepare(nn.RNN(2**17 + 1, 1), "int8"),
        ValueError,
        "prepare: expected rows of at most 131072 weights for int8, whose sums have 32 bits, got "
        "131073 in weight_ih_l0",
    ),
    "no module": (
        lambda: prepare([nn.LSTM(3, 4)]),
        TypeError,
        "prepare: expected a torch.nn.Module, got list",
    ),
    "no recurrent module": (
        lambda: prepare(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))),
        ValueError,
        "prepare: expected a model with a recurrent module of torch.nn or of this package, got "
        "Sequential without one",
    ),
    "prepared already": (
        lambda: prepare(nn.ModuleList([nn.LSTM(3, 4), prepare(nn.LSTM(3, 4))])),
        ValueError,
        "prepare: expected a model that is not prepared yet, got one with a PreparedLSTM",
    ),
    "a subclass alone": (
        lambda: prepare(nn.Sequential(Doubled(3, 4))),
        ValueError,
        "prepare: expected a model with a recurrent module of torch.nn or of this package, got "
        "Sequential without one but Doubled, a subclass of one",
    ),
    "meta": (
        lambda: prepare(nn.LSTM(3, 4, device="meta")),
        ValueError,
        "prepare: expected weight_ih_l0 to be a dense tensor with values, got one on the meta "
        "device",
    ),
    "complex": (
        lambda: prepare(nn.LSTM(3, 4, dtype=torch.complex64)),
        ValueError,
        "prepare: expected weight_ih_l0 of a floating dtype, got complex64",
    ),
    "another shape": (
        lambda: prepare(
            with_(lambda lstm: setattr(lstm, "weight_hh_l0", nn.Parameter(torch.ones(2, 2))))
        ),
        ValueError,
        "prepare: expected weight_hh_l0 of shape [12, 3] on cpu, got [2, 2] on cpu",
    ),
    "below float16": (
        lambda: prepare(with_a_row(1e-9), "float16"),
        ValueError,
        "prepare: expected rows of weights that float16 holds to 3 bits, got one with no larger "
        "element than 1e-09 in weight_hh_l0[1]",
    ),
    "few bits of float16": (
        lambda: prepare(with_a_row(1e-7), "float16"),
        ValueError,
        "prepare: expected rows of weights that float16 holds to 3 bits, got one with no larger "
        "element than 1e-07 in weight_hh_l0[1]",
    ),
    "below int8's scales": (
        lambda: prepare(with_a_row(1e-44), "int8"),
        ValueError,
        "prepare: expected rows of weights that int8 holds to 3 bits, got one with no larger "
        "element than 9.80909e-45 in weight_hh_l0[1]",
    ),
    "NaN": (
        lambda: prepare(with_a_weight(math.nan)),
        ValueError,
        "prepare: expected finite weights, got inf or nan in weight_hh_l0",
    ),
    "infinity": (
        lambda: prepare(with_a_weight(-math.inf), "int8"),
        ValueError,
        "prepare: expected finite weights, got inf or nan in weight_hh_l0",
    ),
    "beyond float16": (
        lambda: prepare(with_a_weight(-7e4), "float16"),
        ValueError,
        "prepare: expected weights within float16's range of 65504, got 70000 in weight_hh_l0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error) as got:
        call()
    assert str(got.value) == message


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_float64_weight_beyond_the_format_is_not_called_float16s(weights):
    with pytest.raises(ValueError, match="in weight_hh_l0") as got:
        prepare(with_a_weight(1e300, torch.float64), weights)
    assert "float16" not in str(got.value).replace("bfloat16", "")


STATE = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
NO_GRADIENT = (
    "PreparedLSTM: expected an input that asks for no gradient (a prepared model only infers; use "
    "torch.no_grad()), got one with requires_grad=True"
)


@pytest.mark.parametrize(
    "args",
    [
        lambda: (X.clone().requires_grad_(),),
        lambda: (X.clone().requires_grad_(), None, [5, 1]),
        lambda: (pack_sequence([X[:, 0].clone().requires_grad_()]),),
        lambda: (X.double().requires_grad_(),),
        lambda: (X, (STATE[0].clone().requires_grad_(), STATE[1])),
        lambda: (X, (STATE[0], STATE[1].clone().requires_grad_())),
    ],
    ids=["input", "lengths", "packed", "float64", "h_0", "c_0"],
)
def test_a_gradient_is_refused_rather_than_wrong(implementation, args):
    prepared = prepare(nn.LSTM(3, 4))
    with pytest.raises(RuntimeError) as got:
        prepared(*args())
    assert str(got.value) == NO_GRADIENT
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors_in(prepared(*args())))


def test_a_gradient_through_the_state_of_a_gru_is_refused(implementation):
    prepared, h = prepare(nn.GRU(3, 4)), torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError) as got:
        prepared(X, h.clone().requires_grad_())
    assert str(got.value) == NO_GRADIENT.replace("LSTM", "GRU")
    assert not any(t.requires_grad for t in tensors_in(prepared(X, h)))


# -- the same bits ---------------------------------------------------------------------------------


@every_kind
def test_a_row_does_not_depend_on_its_batch_and_no_call_on_the_last(isa, weights, kind):
    options = [{"hidden_size": 31, "num_layers": 2}]
    options += [{"hidden_size": 70, "proj_size": 13}] * kind.projects
    for option in options:
        prepared = prepare(kind(8, bidirectional=True, **option), weights)
        x = torch.randn(30, 13, 8)
        whole = prepared(x)
        for _ in range(3):
            assert equal(prepared(x), whole)
        for row in (0, 5, 12):
            one = tensors_in(prepared(x[:, row : row + 1].contiguous()))
            assert equal(one, [t[:, row : row + 1] for t in tensors_in(whole)])


@pytest.mark.parametrize(("kind", "hidden"), [(nn.LSTM, 397), (nn.GRU, 461)])
def test_a_row_of_weights_beyond_the_cache_is_the_same_too(isa, weights, kind, hidden):
    # Over 2 MB of float32 in w_ih and w_hh, where a single row takes two panels at a time; with
    # AVX-512 an odd number of them, the last in part.
    prepared = prepare(kind(390, hidden), weights)
    x = torch.randn(3, 2, 390)
    whole = prepared(x)
    for row in (0, 1):
        one = tensors_in(prepared(x[:, row : row + 1].contiguous()))
        assert equal(one, [t[:, row : row + 1] for t in tensors_in(whole)])


# Shapes that are split by units, directions, layers and rows: T, B, and the module's options.
SPLITS = {
    "units": (20, 1, {"hidden_size": 300}),
    "units, projected": (20, 1, {"hidden_size": 300, "proj_size": 150}),
    "directions": (20, 1, {"hidden_size": 200, "num_layers": 2, "bidirectional": True}),
    "layers": (200, 1, {"hidden_size": 64, "num_layers": 3}),
    "rows": (20, 64, {"hidden_size": 64, "num_layers": 2}),
    "GRU by units": (20, 1, {"kind": "gru", "hidden_size": 350}),
    "GRU by layers": (200, 1, {"kind": "gru", "hidden_size": 80, "num_layers": 3}),
    "GRU by rows": (20, 64, {"kind": "gru", "hidden_size": 80}),
    "RNN by units": (20, 1, {"kind": "rnn_tanh", "hidden_size": 500}),
}


@pytest.mark.parametrize("weights", ["float32", "int8"])  # int8: each thread quantises rows
@pytest.mark.parametrize("split", SPLITS)
def test_threads_give_the_same_bits(isa, weights, two_threads, split):
    steps, batch, options = SPLITS[split]
    options = dict(options)
    prepared = prepare(KINDS[options.pop("kind", "lstm")](20, **options), weights)
    x = torch.randn(steps, batch, 20)
    packed = pack_sequence([x[: steps - n // 4, n] for n in range(batch)])
    torch.set_num_threads(1)
    alone = prepared(x), prepared(packed)
    torch.set_num_threads(2)
    # rows: cheap, and threads drift apart by chance. The first call may run alone.
    for _ in range(10 if "rows" in split else 3):
        assert equal((prepared(x), prepared(packed)), alone)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_two_python_threads_share_a_prepared_model(isa, weights, two_threads):
    steps, batch, options = SPLITS["units"]
    prepared = prepare(ISSLSTM(20, **options), weights)
    inputs = [torch.randn(steps, batch, 20) for _ in range(2)]
    twin = copy.deepcopy(prepared)
    expected = [twin(x) for x in inputs]

    def work(which):  # the first calls of both also pack at once
        return all(equal(prepared(inputs[which]), expected[which]) for _ in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def openmp():
    """The OpenMP library that torch runs on, where it is GNU's; else None."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if "libgomp" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


@pytest.mark.skipif(openmp() is None, reason="needs GNU's OpenMP to begin a parallel region")
def test_inside_a_parallel_region_it_runs_alone(isa, two_threads):
    steps, batch, options = SPLITS["units"]
    prepared = prepare(ISSLSTM(20, **options))
    inputs = [torch.randn(steps, batch, 20) for _ in range(2)]
    expected = [prepared(x) for x in inputs]
    results = {}
    library = openmp()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        member = library.omp_get_thread_num()
        with torch.no_grad():
            results[member] = library.omp_in_parallel(), prepared(inputs[member])

    library.GOMP_parallel(body, None, 2, 0)
    assert sorted(results) == [0, 1]
    for member, (parallel, result) in results.items():
        assert parallel and equal(result, expected[member])


@pytest.mark.parametrize("make", [partial(ISSLSTM, proj_size=9), ISSGRU], ids=["LSTM", "GRU"])
def test_another_isa_packs_again(weights, make):
    prepared = prepare(make(8, 45, num_layers=2), weights)
    x = torch.randn(12, 6, 8)
    results = []
    for name in [*supported_isas(), *supported_isas()]:
        with use_isa(name):
            results.append(prepared(x))
            fresh = copy.deepcopy(prepared)(x)
        assert equal(results[-1], fresh)
    # int8 quantises h on the fly: a last bit may make it round the other way, by one step. Some
    # ISAs round h for a product with bfloat16.
    tolerance = {"int8": 1e-2, "bfloat16": 5e-3}.get(weights, 1e-5)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=tolerance)
