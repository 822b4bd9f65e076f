# SPDX-License-Identifier: Apache-2.0
"""Stream: step by step what the model gives for the whole sequence, from its own memory."""

import contextlib
import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from kinds import KINDS, every_kind
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import MaskedTensor
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from iss_kernels import ISSGRU, ISSLSTM, ISSRHN, ISSRNN, Stream, prepare, use_backend
from iss_kernels.backend import backend as backend_now
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.chain import ACTIVATIONS, FUNCTIONS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

FORMATS = ["float32", "float16", "bfloat16", "int8"]


@pytest.fixture(params=["extension", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


class Chain(nn.Module):
    """Modules and functions one after the other; of a recurrent layer's result, the output."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers
        self.kept = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0] if isinstance(layer, nn.RNNBase) else layer(x)
        return x


class Recurrent(nn.Module):
    """A model with a state of its own: x, state -> y, state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6), nn.Linear(6, 2)


class Whole(Recurrent):
    def forward(self, x, state=None):
        y, state = self.lstm(x, state)
        return self.head(y), state


class TakenApart(Recurrent):
    def forward(self, x, state=None):
        y, (h, c) = self.lstm(x, state)
        return self.head(y), (h, c)


class OutputOnly(Recurrent):
    def forward(self, x):
        y, (_, _) = self.lstm(x)
        return self.head(y)


class ByName(Recurrent):
    def forward(self, x):
        return self.head(input=self.lstm(input=x)[0])


class Bare(Recurrent):
    def forward(self, x, state=None):
        return self.lstm(x, state)


class OfGru(nn.Module):
    """Its state is one tensor."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(5, 6), nn.Linear(6, 2)

    def forward(self, x, state=None):
        y, h = self.gru(x, state)
        return self.head(y), h


def whole_sequence(model, x):
    """model(x) for x [T, B, I], without the state."""
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x)
    return y[0] if isinstance(y, tuple) else y


def step_by_step(step, x):
    return torch.stack([step(x_t).clone() for x_t in x])


def assert_streams(model, x, tolerance=1e-5):
    expected = whole_sequence(model, x)
    step = Stream(model, batch_size=x.shape[1])
    torch.testing.assert_close(step_by_step(step, x), expected, rtol=0, atol=tolerance)
    step.reset()
    from_numpy = [step(x_t).copy() for x_t in x.numpy()]
    assert all(isinstance(y, np.ndarray) and y.dtype == np.float32 for y in from_numpy)
    np.testing.assert_allclose(np.stack(from_numpy), expected, rtol=0, atol=tolerance)


# -- the same as the sequence ----------------------------------------------------------------------

LAYERS = {
    "nn.LSTM": lambda: nn.LSTM(5, 17),
    "ISSLSTM": lambda: ISSLSTM(5, 17),
    "layers": lambda: nn.LSTM(5, 9, 3, dropout=0.5),
    "no bias": lambda: nn.LSTM(5, 9, 2, bias=False),
    "projected": lambda: nn.LSTM(5, 19, 2, proj_size=4),
    "unequal": lambda: ISSLSTM(5, [7, 31], 2),
    "unequal, projected": lambda: ISSLSTM(5, [7, 31], 2, proj_size=[3, 0]),
    "wide": lambda: nn.LSTM(5, 130),
    "batch_first": lambda: nn.LSTM(5, 6, batch_first=True),  # a step has no time: no difference
    "nn.GRU": lambda: nn.GRU(5, 17, 2),
    "nn.GRU, no bias": lambda: nn.GRU(5, 9, bias=False, batch_first=True),
    "ISSGRU, unequal": lambda: ISSGRU(5, [7, 31], 2),
    "wide GRU": lambda: nn.GRU(5, 130),
    "nn.RNN": lambda: nn.RNN(5, 17, 2),
    "relu": lambda: nn.RNN(5, 17, nonlinearity="relu"),
    "ISSRNN, unequal": lambda: ISSRNN(5, [7, 31], 2, nonlinearity="relu"),
    "ISSRHN": lambda: ISSRHN(5, 17, depth=3),
    "ISSRHN, separate": lambda: ISSRHN(5, 9, depth=2, carry="separate", bias=False),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_step_by_step_is_the_layer_over_the_sequence(implementation, name, batch):
    layer = LAYERS[name]()
    x = torch.randn(12, batch, 5)
    if not layer.batch_first:
        assert_streams(layer, x)
        return
    expected = whole_sequence(layer, x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(step_by_step(Stream(layer, batch), x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_prepared_model_streams_in_its_format(implementation, kind, weights):
    prepared = prepare(Chain(kind(5, 17, 2), nn.Linear(17, 3)), weights)
    # Chunks of steps and single steps may differ in a last bit; int8 rounds it to a whole step.
    assert_streams(prepared, torch.randn(12, 3, 5), 1e-2 if weights == "int8" else 1e-6)


CHAINS = {
    "a head": lambda: Chain(
        nn.LSTM(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.Tanh()
    ),
    "a foot": lambda: Chain(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.LSTM(7, 6)),
    "two LSTMs": lambda: Chain(nn.LSTM(5, 6), nn.Tanh(), ISSLSTM(6, [4, 3], 2), nn.Linear(3, 2)),
    "the same LSTM twice": lambda: Chain(*[nn.LSTM(5, 5)] * 2),
    "plain LayerNorm, no bias": lambda: Chain(
        nn.LSTM(5, 8),
        nn.LayerNorm(8, elementwise_affine=False, eps=0.5),
        nn.Linear(8, 3, bias=False),
    ),
    "LayerNorm without bias": lambda: Chain(nn.LSTM(5, 8), nn.LayerNorm(8, bias=False)),
    "dropout and identity at the ends": lambda: Chain(nn.Dropout(), nn.LSTM(5, 8), nn.Identity()),
    "Sequential inside": lambda: Chain(
        nn.LSTM(5, 8), nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.SiLU(), nn.Dropout()))
    ),
    "in place": lambda: Chain(nn.LSTM(5, 8), nn.ReLU(inplace=True)),
    "wide Linear": lambda: Chain(nn.LSTM(5, 33), nn.Linear(33, 70), nn.Linear(70, 1)),
    "state": Whole,
    "state taken apart": TakenApart,
    "state left": OutputOnly,
    "an LSTM's own result": Bare,
    "inputs by name": ByName,
    "the state of a GRU": OfGru,
    "a GRU between Linears": lambda: Chain(nn.Linear(5, 7), nn.GRU(7, 9), nn.Linear(9, 3)),
    "one of each": lambda: Chain(
        nn.GRU(5, 6), ISSLSTM(6, [4, 7], 2), nn.ReLU(), nn.RNN(7, 9), ISSGRU(9, [5, 3], 2)
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_step_by_step_is_the_chain_over_the_sequence(implementation, name, batch):
    model = CHAINS[name]()
    for parameter in model.parameters():  # LayerNorm's are 1 and 0 otherwise
        nn.init.normal_(parameter, std=0.3)
    assert_streams(model, torch.randn(10, batch, 5))


MODULES = list(ACTIVATIONS)
CALLABLES = [f for f in FUNCTIONS if not isinstance(f, str)]
METHODS = [name for name in FUNCTIONS if isinstance(name, str)]


def called(name):
    return lambda x: getattr(x, name)()


@pytest.mark.parametrize(
    "activation",
    [*[kind() for kind in MODULES], nn.LeakyReLU(0.3), *CALLABLES, *map(called, METHODS)],
    ids=[*[kind.__name__ for kind in MODULES], "slope", *[f.__name__ for f in CALLABLES],
         *METHODS],
)  # fmt: skip
def test_activations_are_torchs_also_at_nan_and_infinity(implementation, activation):
    model = Chain(nn.LSTM(1, 1), nn.Linear(1, 9), activation)
    special = [0.0, -0.0, 1e-6, -0.5, 3.0, -100.0, float("inf"), -float("inf"), float("nan")]
    with torch.no_grad():
        model.layers[1].weight.zero_()
        model.layers[1].bias.copy_(torch.tensor(special))
        expected = activation(torch.tensor([special]))
        # On some CPUs torch's GELU of inf is NaN in a vector of float32, and inf in float64.
        double = activation(torch.tensor([special], dtype=torch.float64)).float()
        decided = expected.isnan() == double.isnan()
    y = Stream(model)(torch.zeros(1, 1))
    torch.testing.assert_close(y[decided], expected[decided], equal_nan=True, rtol=1e-6, atol=1e-6)


def test_the_modules_of_every_kind_are_known():
    assert {nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.LeakyReLU} <= set(MODULES)
    assert {F.relu, torch.tanh, torch.sigmoid, F.silu} <= set(CALLABLES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_streams_in_float32(implementation, dtype):
    model = Chain(nn.LSTM(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)).to(dtype)
    x = torch.randn(4, 1, 5)
    expected = whole_sequence(copy.deepcopy(model).float(), x)
    torch.testing.assert_close(step_by_step(Stream(model), x), expected, rtol=0, atol=1e-5)


def test_isas_agree_also_when_they_change_on_the_way():
    model = Chain(nn.LSTM(5, 17, 2), nn.GRU(17, 13), nn.RNN(13, 9), nn.Linear(9, 3))
    step, x = Stream(model, 2), torch.randn(8, 2, 5)
    for t, y in enumerate(whole_sequence(model, x)):
        with use_isa(supported_isas()[t % len(supported_isas())]):
            torch.testing.assert_close(step(x[t]), y, rtol=0, atol=1e-5)


def test_the_number_of_threads_may_change_on_the_way(isa, two_threads):
    lstm, x = nn.LSTM(300, 300, 2), torch.randn(12, 1, 300)
    torch.set_num_threads(1)
    alone, step = step_by_step(Stream(lstm), x), Stream(lstm)
    for t, y in enumerate(alone):
        torch.set_num_threads(1 + t // 3 % 2)
        assert torch.equal(step(x[t]), y)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_two_threads_give_the_same_bits(isa, two_threads, kind):
    model = Chain(kind(300, 300, 2), nn.Linear(300, 1000))
    x = torch.randn(6, 1, 300)
    torch.set_num_threads(1)
    alone = step_by_step(Stream(model), x)
    torch.set_num_threads(2)
    assert torch.equal(step_by_step(Stream(model), x), alone)


@contextlib.contextmanager
def default_dtype(dtype):
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


@pytest.mark.parametrize(
    "defaults",
    [
        *(lambda d=d: default_dtype(d) for d in (torch.float64, torch.bfloat16, torch.float16)),
        lambda: torch.device("meta"),
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["float64", "bfloat16", "float16", "meta", "inference_mode", "autocast"],
)
def test_torchs_defaults_and_modes_change_nothing(implementation, defaults):
    model, x = Chain(nn.LSTM(5, 40, 2), nn.Linear(40, 3)), torch.randn(6, 3, 5)
    expected, step = step_by_step(Stream(model, 3), x), Stream(model, 3)
    step_by_step(step, x[:3])
    state = step.state
    with defaults():
        inside = Stream(model, 3)
        assert torch.equal(step_by_step(inside, x), expected)
        assert all(part.dtype == torch.float32 and part.is_cpu for part in inside.state)
        inside.state = state
        assert torch.equal(step_by_step(inside, x[3:]), expected[3:])
    inside.reset()
    assert torch.equal(step_by_step(inside, x), expected)


def test_a_stream_draws_no_random_numbers_and_leaves_its_model_alone(backend):
    class Counting(Whole):
        def forward(self, x, state=None):
            self.calls = getattr(self, "calls", 0) + torch.rand(1).item()
            return super().forward(x, state)

    model, before = Counting(), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    Stream(model, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not hasattr(model, "calls") and "forward" not in vars(model.lstm)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# -- memory ----------------------------------------------------------------------------------------


def test_out_is_written_and_returned(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(3, 2, 5)
    for convert, empty in ((lambda t: t, torch.empty), (lambda t: t.numpy(), np.empty)):
        step, again, own = Stream(lstm, 2), Stream(lstm, 2), Stream(lstm, 2)
        other_kind = np.empty((2, 4), np.float32) if empty is torch.empty else torch.empty(2, 4)
        for x_t in x:
            out = empty((2, 4), dtype=torch.float32 if empty is torch.empty else np.float32)
            assert step(convert(x_t), out=out) is out
            expected = torch.as_tensor(own(convert(x_t)))
            assert torch.equal(torch.as_tensor(out), expected)
            assert again(convert(x_t), other_kind) is other_kind  # the other kind, by position
            assert torch.equal(torch.as_tensor(other_kind), expected)


def test_arguments_go_by_position_or_by_name(implementation):
    step, x, out = Stream(nn.LSTM(5, 4)), torch.randn(1, 5), torch.empty(1, 4)
    for y in (step(x, out), step(x, out=out), step(x=x, out=out), step(out=out, x=x)):
        assert y is out
    for y in (step(x), step(x=x), step(x, None), step(x, out=None)):
        assert y is not out
    for arguments, named in (
        ((), {}),
        ((), {"out": out}),
        ((x, out, x), {}),
        ((x,), {"x": x}),
        ((x, out), {"out": out}),
        ((x,), {"y": x}),
    ):
        with pytest.raises(TypeError):
            step(*arguments, **named)


def test_what_is_called_keeps_its_stream_alive(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(1, 5)
    call = Stream(lstm).__call__
    gc.collect()
    y = call(x).clone()
    again = weakref.ref(Stream(lstm))
    gc.collect()
    assert again() is None  # and yet it goes
    torch.testing.assert_close(y, Stream(lstm)(x), rtol=0, atol=0)


def test_without_out_the_same_memory_comes_back(isa):
    step, x = Stream(nn.LSTM(5, 4), 2), torch.randn(2, 5)
    first = step(x)
    kept = first.clone()
    second = step(x)
    assert second is first and not torch.equal(second, kept)  # overwritten
    array = step(x.numpy())
    assert array is step(x.numpy())
    assert array.__array_interface__["data"][0] == first.data_ptr()


def test_a_step_allocates_nothing(isa):
    model = Chain(
        nn.Linear(5, 7), nn.LSTM(7, 33, 2), nn.GRU(33, 21), nn.RNN(21, 33), nn.LayerNorm(33),
        nn.GELU(), nn.Linear(33, 3),
    )  # fmt: skip
    for weights in FORMATS:
        step, x = Stream(prepare(model, weights)), torch.randn(1, 5)
        array, out = x.numpy(), torch.empty(1, 3)

        def steps(step=step, x=x, array=array, out=out):
            for _ in range(20):
                step(x), step(array), step(x, out)

        steps()
        with torch.profiler.profile(profile_memory=True) as profile:
            steps()
        assert not [event for event in profile.events() if event.name == "[memory]"]
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            steps()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 1000 and peak - before < 4000  # the frames of Python itself


def test_the_output_may_be_the_next_input(implementation):
    lstm, x = nn.LSTM(4, 4, 2), torch.randn(1, 4)
    step, expected, state = Stream(lstm), x, None
    y = step(x)
    with torch.no_grad():
        for _ in range(5):
            out, state = lstm(expected[None], state)
            expected = out[0]
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
            y = step(y)
        z = y.clone()
        assert step(z, out=z) is z
        for _ in range(2):
            out, state = lstm(expected[None], state)
            expected = out[0]
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)


def test_inputs_need_not_be_contiguous(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(2, 5)
    wide, columns = torch.randn(2, 10), x.t().contiguous()
    wide[:, ::2] = x
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    expected = Stream(lstm, 2)(x).clone()
    for strided in (
        wide[:, ::2],
        columns.t(),
        wide.numpy()[:, ::2],
        columns.numpy().T,
        x.flip(0).numpy()[::-1],
        read_only,
    ):
        y = torch.as_tensor(Stream(lstm, 2)(strided))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


def test_inputs_are_only_read_and_no_gradient_flows(implementation):
    step, x = Stream(nn.LSTM(5, 4), 2), torch.randn(2, 5, requires_grad=True)
    before = x.detach().clone()
    y = step(x)
    assert not y.requires_grad and x.grad is None
    assert torch.equal(x, before)
    strided = torch.randn(2, 10, requires_grad=True)[:, ::2]
    assert not step(strided).requires_grad
    assert not any(s.requires_grad for s in step.state)


def test_out_that_is_a_lazy_clone_leaves_its_original_alone(backend):
    step, x, original = Stream(nn.LSTM(5, 4), 2), torch.randn(2, 5), torch.ones(2, 4)
    clone = torch._lazy_clone(original)
    y = step(x, out=clone)
    assert y is clone and not torch.equal(clone, original)
    assert torch.equal(original, torch.ones(2, 4))


def test_a_lazy_clone_of_the_result_keeps_its_values(backend):
    step, x = Stream(nn.LSTM(5, 4)), torch.randn(1, 5)
    clone = torch._lazy_clone(step(x))
    kept = clone.clone()
    array = step(x.numpy())
    assert torch.equal(clone, kept) and not np.array_equal(array, kept)


@pytest.mark.parametrize("shift", [0, 1, 150, 300])
@pytest.mark.parametrize("layers", [1, 2])
def test_out_may_overlap_x(two_threads, layers, shift):
    lstm, rows, size = nn.LSTM(300, 300, layers), 70, 300
    step, apart = Stream(lstm, rows), Stream(lstm, rows)
    for x_at, out_at in ((0, shift), (shift, 0)):
        memory = torch.randn(rows * size + shift)
        x, out = (memory[at : at + rows * size].view(rows, size) for at in (x_at, out_at))
        expected = apart(x.clone()).clone()
        assert torch.equal(step(x, out=out), expected)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_x_of_any_layout_is_read_as_torch_reads_it(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(2, 5)
    misaligned = np.frombuffer(b"." + x.numpy().tobytes(), np.float32, offset=1).reshape(2, 5)
    assert not misaligned.flags.aligned
    row = x[:1].expand(2, 5)
    for given, values in (
        (torch.complex(x, -x).conj().imag, x),
        (torch._efficientzerotensor(2, 5), torch.zeros(2, 5)),
        (row, row.clone()),
        (np.broadcast_to(x.numpy()[:1], (2, 5)), row.clone()),
        (np.asmatrix(x.numpy()), x),
        (misaligned, x),
        (torch.frombuffer(bytearray(b"." + x.numpy().tobytes()), dtype=torch.float32, offset=1)
         .view(2, 5), x),
        (nn.Parameter(x), x),
        (torch._lazy_clone(x), x),
    ):  # fmt: skip
        expected = Stream(lstm, 2)(values).clone()
        # torch's own products may depend on where their rows lie in memory.
        atol = 1e-6 if implementation == "reference" else 0
        result = torch.as_tensor(Stream(lstm, 2)(given))
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")  # from NumPy 2.5 on
def test_the_result_may_be_made_into_something_else():
    def to_array_of_ints(y):
        y.dtype = np.int32

    lstm, x = nn.LSTM(5, 4), torch.randn(1, 5)
    step, untouched = Stream(lstm), Stream(lstm)
    for change in (
        lambda y: y.unsqueeze_(0),
        lambda y: y.resize_(3),
        lambda y: y.set_(torch.zeros(7)),
        lambda y: y.requires_grad_(),
        lambda y: y.mul_(torch.ones(1, 4, requires_grad=True)),
    ):
        change(step(x))
        untouched(x)
        y = step(x)
        assert torch.equal(y, untouched(x)) and not y.requires_grad
    for change in (lambda y: y.resize(4, 1), to_array_of_ints, lambda y: y.setflags(write=False)):
        with contextlib.suppress(ValueError):  # NumPy's, where the array cannot be resized
            change(step(x.numpy()))
            untouched(x)
        assert np.array_equal(step(x.numpy()), untouched(x))


# -- gradients -------------------------------------------------------------------------------------


def test_a_head_trained_over_steps_raises_instead_of_taking_overwritten_values(backend):
    lstm, x, w = nn.LSTM(5, 4), torch.randn(3, 1, 5), torch.randn(1, 4, requires_grad=True)
    with torch.no_grad():
        expected = lstm(x)[0].sum(0)
    step = Stream(lstm)
    sum((step(x_t).clone() * w).sum() for x_t in x).backward()
    torch.testing.assert_close(w.grad, expected)
    w.grad = None
    step.reset()
    loss = sum((step(x_t) * w).sum() for x_t in x)
    if step(x[0]) is step(x[0]):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:  # the reference gives new memory
        loss.backward()
        torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:, :], lambda t: t.detach()])
def test_writing_to_out_is_a_new_version(implementation, view):
    step, x, out = Stream(nn.LSTM(5, 4)), torch.randn(1, 5), torch.ones(1, 4)
    loss = (out * torch.ones(1, 4, requires_grad=True)).sum()
    step(x, out=view(out))
    assert out._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_that_asks_for_a_gradient_is_torchs_to_refuse(backend):
    lstm, x = nn.LSTM(5, 4), torch.randn(1, 5)
    step, untouched = Stream(lstm), Stream(lstm)
    for out in (torch.zeros(1, 4, requires_grad=True), nn.Parameter(torch.zeros(2, 4))[:1]):
        with pytest.raises(ValueError) as got:
            step(x, out=out)
        assert str(got.value) == (
            "Stream: expected out to ask for no gradient (a stream is not differentiable), got "
            "one with requires_grad=True"
        )
        assert not out.any()
        with torch.no_grad():
            assert torch.equal(step(x, out=out), untouched(x))


def test_a_stream_lets_its_model_go(backend):
    model = OutputOnly()
    gone, step = weakref.ref(model.head), Stream(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    step(torch.zeros(1, 5))


# -- inference mode --------------------------------------------------------------------------------


def test_a_stream_made_in_inference_mode_goes_on_outside(implementation):
    lstm, x, w = nn.LSTM(5, 4, 2), torch.randn(3, 1, 5), torch.ones(1, 4, requires_grad=True)
    expected = step_by_step(Stream(lstm), x)
    with torch.inference_mode():
        step = Stream(lstm)
        made_inside = torch.empty(1, 4)
        for x_t in x.clone():
            step(x_t)
        state, y = step.state, step(x[0])
    assert not any(t.is_inference() for t in (*state, y))
    (step(x[1]) * w).sum().backward()
    step.reset()
    assert torch.equal(step_by_step(step, x), expected)
    with torch.inference_mode():
        given = tuple(part.clone() for part in state)
    step.state = given
    torch.testing.assert_close(step.state, state, rtol=0, atol=0)
    step.reset()
    assert torch.equal(step(x[0], out=made_inside), expected[0])


# -- the weights are a snapshot --------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, *FORMATS])
def test_later_changes_of_the_model_have_no_effect(implementation, weights):
    model = Chain(nn.Linear(5, 5), nn.LSTM(5, 8, 2), nn.LayerNorm(8), nn.Linear(8, 3))
    model = model if weights is None else prepare(model, weights)
    x = torch.randn(4, 1, 5)
    expected = step_by_step(Stream(model), x)
    step = Stream(model)
    new = {name: value * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(new)
    assert torch.equal(step_by_step(step, x), expected)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, partial(ISSRHN, depth=2)])
def test_weights_that_change_in_place_are_not_the_streams(backend, make):
    prepared, x = prepare(make(5, 8)), torch.randn(4, 1, 5)
    step, expected = Stream(prepared), prepared(x)[0]
    for buffer in prepared.buffers():
        buffer.mul_(2)
    torch.testing.assert_close(step_by_step(step, x), expected, rtol=0, atol=1e-6)


def test_a_change_of_isa_does_not_bring_later_changes_in():
    prepared = prepare(nn.LSTM(5, 8))
    x, results = torch.randn(4, 1, 5), []
    with use_isa(supported_isas()[0]):
        step = Stream(prepared)
        results.append(step_by_step(step, x))
    prepared.load_state_dict({name: 2 * value for name, value in prepared.state_dict().items()})
    step.reset()
    with use_isa(supported_isas()[-1]):
        results.append(step_by_step(step, x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


# -- state -----------------------------------------------------------------------------------------

STATEFUL = {
    "one LSTM": lambda: nn.LSTM(5, 6, 2),
    "projected": lambda: nn.LSTM(5, 6, proj_size=2),
    "unequal": lambda: ISSLSTM(5, [6, 4], 2),
    "two LSTMs": lambda: Chain(nn.LSTM(5, 6, 2), nn.ReLU(), ISSLSTM(6, [3, 4], 2)),
    "one GRU": lambda: nn.GRU(5, 6, 2),
    "unequal GRU": lambda: ISSGRU(5, [6, 4], 2),
    "one RNN": lambda: nn.RNN(5, 6, 2),
    "one RHN": lambda: ISSRHN(5, 6, depth=3),
    "LSTM and GRU": lambda: Chain(nn.LSTM(5, 6, 2), ISSGRU(6, [3, 4], 2)),
}
SINGLE = [name for name in STATEFUL if name not in ("two LSTMs", "LSTM and GRU")]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_resumes_in_another_stream(implementation, name):
    model, x = STATEFUL[name](), torch.randn(9, 2, 5)
    expected = step_by_step(Stream(model, 2), x)
    first, second = Stream(model, 2), Stream(model, 2)
    step_by_step(first, x[:4])
    state = first.state
    step_by_step(first, x[4:])  # must not reach into the state already taken
    second.state = pickle.loads(pickle.dumps(state))
    assert torch.equal(step_by_step(second, x[4:]), expected[4:])
    second.state = state
    assert torch.equal(step_by_step(second, x[4:]), expected[4:])
    first.reset()
    assert torch.equal(step_by_step(first, x), expected)


@pytest.mark.parametrize("name", SINGLE)
def test_the_state_is_that_of_torchs_module(implementation, name):
    layer, x = STATEFUL[name](), torch.randn(9, 2, 5)
    step = Stream(layer, 2)
    step_by_step(step, x[:4])
    with torch.no_grad():
        _, state = layer(x[:4])
        torch.testing.assert_close(step.state, state, rtol=0, atol=1e-6)
        y, state = layer(x[4:], step.state)
    step_by_step(step, x[4:])
    torch.testing.assert_close(step.state, state, rtol=0, atol=1e-6)


def test_the_state_of_two_lstms_is_a_pair_of_states(implementation):
    step = Stream(STATEFUL["two LSTMs"](), 2)
    (h, c), (h_of_second, _) = step.state
    assert h.shape == c.shape == (2, 2, 6)
    assert [s.shape for s in h_of_second] == [(2, 3), (2, 4)]
    step(torch.randn(2, 5))
    assert not h.any() and step.state[0][0].any()  # a copy of what was


def test_the_states_of_an_lstm_and_a_gru_are_a_pair_and_a_tensor(implementation):
    step, gru = Stream(Chain(nn.LSTM(5, 6), nn.GRU(6, 3)), 2), Stream(nn.GRU(5, 4), 2)
    (h, c), h_of_gru = step.state
    assert h.shape == c.shape == (1, 2, 6) and h_of_gru.shape == (1, 2, 3)
    given = torch.randn(1, 2, 4)
    gru.state = given.double()
    assert torch.equal(gru.state, given)


def test_changing_a_state_does_not_change_the_stream(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(1, 5)
    step, untouched = Stream(lstm), Stream(lstm)
    step(x), untouched(x)
    for part in step.state:
        part.fill_(7)
    given = untouched.state
    step.state = given
    for part in given:
        part.fill_(7)
    assert torch.equal(step(x), untouched(x))


def test_a_state_of_another_dtype_or_that_asks_for_a_gradient_is_taken(implementation):
    lstm, x = nn.LSTM(5, 4), torch.randn(1, 1, 5)
    step = Stream(lstm)
    state = lstm(x)[1]
    assert state[0].requires_grad
    for given in (state, tuple(s.detach().double() for s in state)):
        step.state = given
        with torch.no_grad():
            torch.testing.assert_close(step(x[0]), lstm(x, state)[0][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, c: None, ValueError, "to be (h, c), got NoneType"),
        (lambda h, c: torch.stack([h, c]), ValueError, "to be (h, c), got Tensor"),
        (lambda h, c: (h,), ValueError, "to be (h, c), got 1 parts"),
        (lambda h, c: (h, c, c), ValueError, "to be (h, c), got 3 parts"),
        (lambda h, c: (h, c.tolist()), TypeError, "to be tensors, got float"),
        (lambda h, c: (h, c.numpy()), TypeError, "to be tensors, got ndarray"),
        (lambda h, c: (h, c.to(torch.complex64)), ValueError,
         "to be dense floating-point tensors, got a strided Tensor of complex64 on cpu"),
        (lambda h, c: (h.long(), c), ValueError,
         "to be dense floating-point tensors, got a strided Tensor of int64 on cpu"),
        (lambda h, c: (h, c > 0), ValueError,
         "to be dense floating-point tensors, got a strided Tensor of bool on cpu"),
        (lambda h, c: (h, c.to("meta")), ValueError,
         "to be dense floating-point tensors, got a strided Tensor of float32 on meta"),
        (lambda h, c: (h, c.to_sparse()), ValueError,
         "to be dense floating-point tensors, got a sparse_coo Tensor of float32 on cpu"),
        (lambda h, c: (FakeTensorMode().from_tensor(h), c), ValueError,
         "to be dense floating-point tensors, got a strided FakeTensor of float32 on cpu"),
    ],
    ids=["None", "tensor", "one", "three", "list", "array", "complex", "int", "bool", "meta",
         "sparse", "fake"],
)  # fmt: skip
def test_only_a_pair_of_dense_floating_point_tensors_is_a_state(backend, change, error, message):
    lstm, x = nn.LSTM(5, 4), torch.randn(1, 5)
    step, untouched = Stream(lstm), Stream(lstm)
    step(x), untouched(x)
    with pytest.raises(error) as got:
        step.state = change(*step.state)
    assert str(got.value) == "Stream: expected state " + message
    assert torch.equal(step(x), untouched(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: None, TypeError, "Stream: expected state to be tensors, got NoneType"),
        (lambda h: h.numpy(), TypeError, "Stream: expected state to be tensors, got ndarray"),
        (lambda h: h.long(), ValueError,
         "Stream: expected state to be dense floating-point tensors, got a strided Tensor of int64 "
         "on cpu"),
        (lambda h: (h, h), TypeError, "GRU: expected hx to be a tensor h_0, got a tuple"),
        (lambda h: h[:, :0], RuntimeError, "Expected hidden size (1, 1, 4), got [1, 0, 4]"),
    ],
    ids=["None", "array", "int", "an LSTM's", "shape"],
)  # fmt: skip
def test_only_a_tensor_is_the_state_of_a_gru(backend, change, error, message):
    gru, x = nn.GRU(5, 4), torch.randn(1, 5)
    step, untouched = Stream(gru), Stream(gru)
    step(x), untouched(x)
    with pytest.raises(error) as got:
        step.state = change(step.state)
    assert str(got.value) == message
    assert torch.equal(step(x), untouched(x))


def test_a_state_that_torch_negates_when_it_is_read_is_taken(backend):
    step, h = Stream(nn.LSTM(5, 4)), torch.randn(1, 1, 4)
    step.state = (torch.complex(h, -h).conj().imag, h.flip(-1).expand(1, 1, 4))
    assert torch.equal(step.state[0], h) and torch.equal(step.state[1], h.flip(-1))


# -- reset -----------------------------------------------------------------------------------------


def flat(state):
    """All tensors of a state, in order."""
    return [state] if torch.is_tensor(state) else [t for part in state for t in flat(part)]


@pytest.mark.parametrize("name", STATEFUL)
def test_rows_that_are_reset_go_on_as_from_the_beginning(implementation, name):
    model, x = STATEFUL[name](), torch.randn(12, 3, 5)
    resets = torch.rand(12, 3) < 0.3
    step, alone = Stream(model, 3), [Stream(model, 1) for _ in range(3)]
    for t, x_t in enumerate(x):
        step.reset(rows=resets[t])
        y = step(x_t)
        for row, one in enumerate(alone):
            if resets[t, row]:
                one.reset()
            # Another batch, and so another order of sums in torch's own products.
            torch.testing.assert_close(y[row], one(x_t[row : row + 1])[0], rtol=0, atol=1e-6)
    before = flat(step.state)
    step.reset(rows=[False, True, False])
    for state, former in zip(flat(step.state), before, strict=True):
        assert not state[..., 1, :].any()
        assert torch.equal(state[..., ::2, :], former[..., ::2, :]) and former.all()
    step.reset()
    assert not any(state.any() for state in flat(step.state))


@every_kind
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_rows_are_reset_where_a_sequences_resets_are(implementation, kind, weights):
    prepared, x = prepare(kind(5, 17, 2), weights), torch.randn(12, 3, 5)
    resets = torch.rand(12, 3) < 0.3
    resets[5] = True
    expected = prepared(x, resets=resets)[0]
    step = Stream(prepared, 3)
    for t, mask in enumerate(resets):
        step.reset(rows=mask)
        # int8 rounds a last bit to a whole step.
        tolerance = 1e-2 if weights == "int8" else 1e-6
        torch.testing.assert_close(step(x[t]), expected[t], rtol=0, atol=tolerance)
    late = Stream(prepared, 3)
    y = []
    for x_t, mask in zip(x, resets, strict=True):
        y.append(late(x_t).clone())
        late.reset(rows=mask)  # a step too late
    assert (torch.stack(y)[5] - expected[5]).abs().max() > 0.03


@pytest.mark.parametrize(
    "mask", [[True, False, True], np.array([True, False, True]), torch.tensor([True, False, True]),
             [np.True_, False, np.True_], torch.tensor([True, True, False, True, True])[::2],
             np.array([True, True, False, True, True])[::2],
             torch.tensor([[True, False, True]]).expand(3, 3)[1]],
    ids=["list", "array", "tensor", "NumPy's bools", "strided", "strided array", "expanded"],
)  # fmt: skip
def test_rows_are_a_tensor_an_array_or_a_list(implementation, mask):
    step = Stream(nn.GRU(5, 4), 3)
    step(torch.randn(3, 5))
    step.reset(mask)
    assert step.state.any(-1).tolist() == [[False, True, False]]
    step.state = torch.full((1, 3, 4), float("nan"))
    step.reset(rows=mask)  # whatever the state was
    assert step.state.isnan().any(-1).tolist() == [[False, True, False]]


ROWS = "Stream: expected rows of shape [B] = [2] and dtype bool, got "


@pytest.mark.parametrize(
    ("rows", "error", "got"),
    [
        ([True], ValueError, "[1] and bool"),
        ([], ValueError, "[0] and bool"),
        ([0, 1], ValueError, "a list of int"),
        ([[True], [False]], ValueError, "a list of list"),
        (torch.tensor([[True, False]]), ValueError, "[1, 2] and bool"),
        (torch.ones(2), ValueError, "[2] and float32"),
        (torch.tensor([True] * 3), ValueError, "[3] and bool"),
        (np.array([0, 1]), ValueError, "[2] and int64"),
        (np.ma.masked_array([True, False]), TypeError, "a MaskedArray"),
        (True, TypeError, "a bool"),
        ((True, False), TypeError, "a tuple"),
        (torch.tensor([True, False]).to_sparse(), ValueError,
         "a sparse_coo Tensor of bool on cpu"),
        (torch.tensor([True, False], device="meta"), ValueError,
         "a strided Tensor of bool on meta"),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_do_not_fit_leave_the_state_alone(backend, rows, error, got):
    step = Stream(nn.LSTM(5, 4), 2)
    step(torch.randn(2, 5))
    before = step.state
    with pytest.raises(error) as raised:
        step.reset(rows=rows)
    assert str(raised.value) == ROWS + got
    assert all(map(torch.equal, step.state, before))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_is_neither_copied_nor_pickled(backend, copied):
    with pytest.raises(TypeError) as got:
        copied(Stream(nn.LSTM(5, 4)))
    assert str(got.value) == (
        "Stream: expected to be neither copied nor pickled; make another Stream of the model and "
        "set its state"
    )


# -- side by side ----------------------------------------------------------------------------------


def test_two_streams_of_one_model_have_states_of_their_own(implementation):
    prepared = prepare(nn.LSTM(5, 6, 2))
    x = torch.randn(2, 7, 1, 5)
    expected = [step_by_step(Stream(prepared), sequence) for sequence in x]
    streams = [Stream(prepared), Stream(prepared)]
    for t in range(7):
        for step, sequence, y in zip(streams, x, expected, strict=True):
            assert torch.equal(step(sequence[t]), y[t])


@pytest.mark.parametrize("size", [20, 300])
def test_two_python_threads_stream_from_one_prepared_model(isa, two_threads, size):
    prepared = prepare(Chain(nn.LSTM(size, size), nn.Linear(size, 3)))
    x = torch.randn(2, 50, 1, size)
    expected = [step_by_step(Stream(prepared), sequence) for sequence in x]
    fresh = copy.deepcopy(prepared)
    streams = [Stream(fresh), Stream(fresh)]

    def work(which):
        return torch.equal(step_by_step(streams[which], x[which]), expected[which])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_two_python_threads_take_turns_at_one_stream(implementation, two_threads):
    lstm, x, steps = nn.LSTM(20, 20), torch.randn(1, 20), 200
    alone, shared = Stream(lstm), Stream(lstm)
    for _ in range(2 * steps):
        alone(x)

    def work(_):
        out = torch.empty(1, 20)
        for _ in range(steps):
            shared(x, out)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert all(map(torch.equal, shared.state, alone.state))


def test_a_state_is_read_and_set_between_steps(implementation):
    """Never half of one: all layers of the same weights in a state of the same numbers."""
    lstm, steps = nn.LSTM(2, 2, 30), 200
    for parameter in lstm.parameters():
        nn.init.zeros_(parameter)  # so that each step halves every c
    step, ones = Stream(lstm), torch.ones(30, 1, 2)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            step(torch.zeros(1, 2))

    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(work)
        try:
            for _ in range(steps):
                step.state = (ones, ones)
                c = step.state[1]
                assert (c == c[0, 0, 0]).all()
                step.reset()
        finally:
            stop.set()
        stepping.result()


def test_two_python_threads_make_their_streams_at_once():
    model, x = Chain(nn.LSTM(5, 6), nn.Linear(6, 3)), torch.randn(1, 5)
    expected = Stream(model)(x).clone()

    def work(_):
        return torch.equal(Stream(model)(x), expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(100)))


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", [*KINDS, "rhn"])
def test_every_kind_streams_on_a_gpu(gpu, name, weights):
    layer = KINDS[name](9, [12, 7], 2) if name in KINDS else ISSRHN(9, 7, depth=3)
    model, x = Chain(nn.Linear(5, 9), layer, nn.Linear(7, 3)), torch.randn(8, 3, 5)
    resets = torch.rand(8, 3) < 0.3
    step, expected = Stream(prepare(model, weights).to(gpu.device), 3), whole_sequence(model, x)
    bounds = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
    close = {"rtol": 0, "atol": bounds[weights]}
    for x_t, y in zip(x, expected, strict=True):
        torch.testing.assert_close(step(gpu.to(x_t)).cpu(), y, **close)
    step.reset()
    prepared = prepare(layer)
    inside, _ = prepared(model.layers[0](x).detach(), resets=resets)
    expected = model.layers[2](inside).detach()
    for x_t, mask, y in zip(x, resets, expected, strict=True):
        step.reset(rows=mask.tolist())
        torch.testing.assert_close(step(gpu.to(x_t)).cpu(), y, **close)
    state = step.state
    after = step(gpu.to(x[0])).clone()
    step.state = state
    assert torch.equal(step(gpu.to(x[0])), after)


# -- errors ----------------------------------------------------------------------------------------


class Skip(Recurrent):
    def forward(self, x):
        return self.lstm(x)[0] + x


class OffTheChain(Recurrent):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 2)

    def forward(self, x):
        self.lstm(x)
        return self.other(x)


class FromTheState(Recurrent):
    def forward(self, x):
        _, (h, _) = self.lstm(x)
        return self.head(h)


class Branching(Recurrent):
    def forward(self, x):
        return self.head(self.lstm(x)[0]) if x.sum() > 0 else x


CHAIN = (
    "Stream: expected a plain chain of recurrent layers, Linear, LayerNorm and activations, or an "
    "example of another model's input, got "
)
MODELS = {
    "no module": (
        lambda: [nn.LSTM(3, 4)],
        TypeError,
        "Stream: expected a torch.nn.Module, got list",
    ),
    "no LSTM": (
        lambda: Chain(nn.Linear(3, 4), nn.ReLU()),
        ValueError,
        "Stream: expected a model with a recurrent layer, got one without",
    ),
    "a cell": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LSTMCell(4, 5)),
        ValueError,
        "Stream: expected a plain chain of recurrent layers, Linear, LayerNorm and activations, or "
        "an example of another model's input, got Sequential with a cell, 1",
    ),
    "bidirectional": (
        lambda: nn.LSTM(3, 4, bidirectional=True),
        ValueError,
        "Stream: expected recurrent layers in one direction, got a bidirectional one: its backward "
        "half begins at the last step, which a stream has not seen yet",
    ),
    "a bidirectional GRU inside": (
        lambda: Chain(nn.Linear(3, 3), ISSGRU(3, 4, bidirectional=True)),
        ValueError,
        "Stream: expected recurrent layers in one direction, got a bidirectional one: its backward "
        "half begins at the last step, which a stream has not seen yet",
    ),
    "LayerNorm over two dimensions": (
        lambda: Chain(nn.LSTM(3, 4), nn.LayerNorm((2, 4))),
        ValueError,
        "Stream: expected LayerNorm over the last dimension, got normalized_shape=(2, 4)",
    ),
    "another GELU": (
        lambda: Chain(nn.LSTM(3, 4), nn.GELU("tanh")),
        ValueError,
        "Stream: expected GELU in its exact form, got approximate='tanh'",
    ),
    "an output without features": (
        lambda: Chain(nn.LSTM(3, 4), nn.Linear(4, 0)),
        ValueError,
        "Stream: expected layers that put out features, got Linear for 0",
    ),
    "an activation at the beginning": (
        lambda: Chain(nn.ReLU(), nn.LSTM(3, 4)),
        ValueError,
        "Stream: expected the chain to begin with a layer that has a size, got ReLU",
    ),
    "a skip connection": (
        Skip,
        ValueError,
        CHAIN + "Skip with the operation add",
    ),
    "a layer beside the chain": (
        OffTheChain,
        ValueError,
        CHAIN + "OffTheChain with other off the chain",
    ),
    "an unknown module": (
        lambda: Chain(nn.LSTM(3, 4), nn.Softmax(-1)),
        ValueError,
        CHAIN + "Chain with the operation softmax",
    ),
    "an unknown function": (
        lambda: Chain(nn.LSTM(3, 4), torch.exp),
        ValueError,
        CHAIN + "Chain with the operation exp",
    ),
    "control flow": (
        Branching,
        ValueError,
        CHAIN + "Branching with the operation sum",
    ),
}  # fmt: skip


class Lora(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


class Residual(nn.LayerNorm):
    def forward(self, x):
        return x + super().forward(x)


class Twice(nn.Identity):
    def forward(self, x):
        return 2 * x


class Noisy(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p)


class Reversed(nn.LSTM):
    def forward(self, x, state=None):
        return super().forward(x.flip(0), state)


class ReversedISS(ISSLSTM):
    def forward(self, x, state=None):
        return super().forward(x.flip(0), state)


class ReversedGru(nn.GRU):
    def forward(self, x, state=None):
        return super().forward(x.flip(0), state)


class Doubled(Recurrent):
    def __call__(self, x):
        return 2 * super().__call__(x)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Excusing(Recurrent):
    def forward(self, x):
        y, _ = self.lstm(x)
        with contextlib.suppress(Exception):
            y = y * 1.01
        return self.head(y)


def changed(change, model=OutputOnly):
    def make():
        made = model()
        change(made)
        return made

    return make


def set_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x)


def complex_head(model):
    model.head = nn.Linear(6, 2, dtype=torch.complex64)


def weight_of_another(model):
    del model.head.weight
    model.head.weight = torch.zeros(2, 6)


NOT_PLAIN = {
    "Linear": (lambda: Chain(nn.LSTM(3, 4), Lora(4, 4)),
               "Chain with kept.1, of Lora, a subclass of Linear"),
    "Linear by another name": (lambda: Chain(nn.LSTM(3, 4), Renamed(4, 4)),
                               "Chain with kept.1, of Renamed, a subclass of Linear"),
    "LazyLinear": (lambda: Chain(nn.LSTM(3, 4), nn.LazyLinear(4)),
                   "Chain with kept.1, of LazyLinear, a subclass of Linear"),
    "LayerNorm": (lambda: Chain(nn.LSTM(3, 4), Residual(4)),
                  "Chain with kept.1, of Residual, a subclass of LayerNorm"),
    "Identity": (lambda: Chain(nn.LSTM(3, 4), Twice()),
                 "Chain with kept.1, of Twice, a subclass of Identity"),
    "Dropout": (lambda: Chain(nn.LSTM(3, 4), Noisy()),
                "Chain with kept.1, of Noisy, a subclass of Dropout"),
    "an LSTM": (lambda: Reversed(3, 4), "Reversed with the model, of Reversed, a subclass of LSTM"),
    "an LSTM inside": (lambda: Chain(ReversedISS(3, 4), nn.Linear(4, 2)),
                       "Chain with kept.0, of ReversedISS, a subclass of ISSLSTM"),
    "a GRU": (lambda: ReversedGru(3, 4),
              "ReversedGru with the model, of ReversedGru, a subclass of GRU"),
    "a hook on a GRU": (
        changed(lambda m: m.gru.register_forward_hook(lambda *_: None), OfGru),
        "OfGru with a forward hook on gru"),
    "forward of a GRU": (changed(lambda m: set_forward(m.gru), OfGru),
                         "OfGru with a forward set on the instance of gru"),
    "parametrised GRU": (
        changed(lambda m: parametrizations.weight_norm(m.gru, "weight_hh_l0"), OfGru),
        "OfGru with gru, of ParametrizedGRU, a subclass of GRU"),
    "a hook on a layer": (changed(lambda m: m.head.register_forward_hook(lambda *_: None)),
                          "OutputOnly with a forward hook on head"),
    "a pre-hook with kwargs": (
        changed(lambda m: m.lstm.register_forward_pre_hook(lambda *_: None, with_kwargs=True)),
        "OutputOnly with a forward hook on lstm"),
    "a hook on the model": (changed(lambda m: m.register_forward_hook(lambda m, a, y: 2 * y)),
                            "OutputOnly with a forward hook on the model"),
    "a hook on a part": (
        lambda: Chain(nn.LSTM(3, 4),
                      changed(lambda m: m.register_forward_hook(lambda m, a, y: 2 * y),
                              lambda: nn.Sequential(nn.Linear(4, 2)))()),
        "Chain with a forward hook on kept.1"),
    "a prepared layer's hook": (
        lambda: prepare(changed(lambda m: m.lstm.register_forward_hook(lambda *_: None))()),
        "OutputOnly with a forward hook on lstm"),
    "forward of a layer": (changed(lambda m: set_forward(m.head)),
                           "OutputOnly with a forward set on the instance of head"),
    "forward of an activation": (
        lambda: Chain(nn.LSTM(3, 4), changed(set_forward, nn.ReLU)()),
        "Chain with a forward set on the instance of kept.1"),
    "forward of the model": (changed(set_forward),
                             "OutputOnly with a forward set on the instance of the model"),
    "call": (Doubled, "Doubled with the operation rmul"),
    "pruned": (changed(lambda m: prune.l1_unstructured(m.head, "weight", 0.5)),
               "OutputOnly with a forward hook on head"),
    "pruned LSTM": (changed(lambda m: prune.l1_unstructured(m.lstm, "weight_hh_l0", 0.5)),
                    "OutputOnly with a forward hook on lstm"),
    "parametrised": (changed(lambda m: parametrizations.weight_norm(m.head)),
                     "OutputOnly with head, of ParametrizedLinear, a subclass of Linear"),
    "spectral norm": (changed(lambda m: parametrizations.spectral_norm(m.lstm, "weight_hh_l0")),
                      "OutputOnly with lstm, of ParametrizedLSTM, a subclass of LSTM"),
    "a weight that is no parameter": (changed(weight_of_another),
                                      "OutputOnly with head, whose weight is no parameter"),
    "a weight of another shape": (
        changed(lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(2, 9)))),
        "OutputOnly with head, whose weight is of shape [2, 9] and not [2, 6]"),
    "a bias of another shape": (
        changed(lambda m: setattr(m.head, "bias", nn.Parameter(torch.zeros(1)))),
        "OutputOnly with head, whose bias is of shape [1] and not [2]"),
    "an operation in a try": (Excusing, "Excusing with the operation mul"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_layers_with_ways_of_their_own_are_refused_by_name(backend, name):
    make, got = NOT_PLAIN[name]
    with pytest.raises(ValueError) as error:
        Stream(make())
    assert str(error.value) == CHAIN + got


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_normed_layer_whose_weight_is_stale_is_refused(backend):
    model, other = OutputOnly(), OutputOnly()
    weight_norm(model.head), weight_norm(other.head)
    model.load_state_dict(other.state_dict())  # head.weight itself follows in the next forward
    with pytest.raises(ValueError, match="with a forward hook on head$"):
        Stream(model)


def test_hooks_of_all_modules_are_refused(backend):
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError) as got:
            Stream(OutputOnly())
    finally:
        hook.remove()
    assert str(got.value) == CHAIN + "OutputOnly with a forward hook on all modules"


def test_ways_of_layers_beside_the_chain_do_not_matter(backend):
    model, x = OutputOnly(), torch.randn(4, 2, 5)
    expected = step_by_step(Stream(model, 2), x)
    model.unused = parametrizations.weight_norm(Lora(3, 3))
    assert torch.equal(step_by_step(Stream(model, 2), x), expected)


class Subclass(torch.Tensor):
    """A tensor that torch cannot deep-copy."""


def test_layers_that_cannot_be_copied_are_refused(backend):
    odd, torn = OutputOnly(), OutputOnly()
    odd.head.weight = nn.Parameter(odd.head.weight.detach().as_subclass(Subclass))
    torn.lstm.bidirectional = True
    for model in (odd, torn):
        with pytest.raises(ValueError, match="OutputOnly with a layer that cannot be copied: "):
            Stream(model)


def test_complex_weights_are_refused(backend):
    model = OutputOnly()
    complex_head(model)
    with pytest.raises(ValueError) as got:
        Stream(model)
    assert str(got.value) == "Stream: expected floating-point weights, got complex64 in Linear"


def test_a_model_on_meta_is_refused(backend):
    with pytest.raises(ValueError) as got:
        Stream(OutputOnly().to("meta"))
    assert str(got.value) == "Stream: expected a model on the CPU or a CUDA device, got meta"


class OtherWhenTrained(Recurrent):
    def forward(self, x):
        y, _ = self.lstm(x)
        return self.head(y if self.training else y.relu())


def test_a_stream_infers_whatever_mode_the_model_is_in(backend):
    model, x = OtherWhenTrained(), torch.randn(4, 2, 5)
    assert_streams(model.train(), x)
    assert model.training and model.head.training
    assert_streams(model.eval(), x)


class OfTensors(Recurrent):
    """Takes a stand-in's way for what is no tensor."""

    def forward(self, x):
        y, _ = self.lstm(x)
        y = self.head(y)
        return y * 1.001 if isinstance(x, torch.Tensor) else y


class Mixed(nn.Module):
    """Its second LSTM runs over the batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LSTM(5, 6, batch_first=True), nn.LSTM(6, 2)

    def forward(self, x):
        return self.two(self.one(x)[0])[0]


class LastOnly(Recurrent):
    def forward(self, x):
        y, _ = self.lstm(x)
        return self.head(y[-1] if isinstance(x, torch.Tensor) else y)


@pytest.mark.parametrize("weights", [None, *FORMATS])
@pytest.mark.parametrize("model", [OfTensors, Mixed])
def test_a_model_whose_answers_are_others_than_its_layers_is_refused(backend, model, weights):
    model = model() if weights is None else prepare(model(), weights)
    with pytest.raises(ValueError) as got:
        Stream(model, 2)
    assert str(got.value).startswith(
        f"{CHAIN}{type(model).__name__} with an answer that differs from that of its layers in a "
        "row by "
    )


def test_a_model_whose_answers_have_another_shape_is_refused(backend):
    with pytest.raises(ValueError) as got:
        Stream(LastOnly(), 4)
    assert str(got.value) == (
        CHAIN + "LastOnly with an answer of shape [4, 2], where that of its layers in a row is "
        "[3, 4, 2]"
    )


def test_a_model_that_cannot_be_copied_is_refused(backend):
    model = OutputOnly()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="OutputOnly with a part that cannot be copied: cannot"):
        Stream(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_models_in_other_forms_stand_the_comparison(implementation, dtype):
    class BatchFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.LSTM(5, 6, 2, batch_first=True, dropout=0.5)
            self.two, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, state=None, scale=1.0, *, check=False):
            y, first = self.one(x, state)
            y, (h, c) = self.two(y)
            return self.head(y), first, (h, c)

    model, x = BatchFirst().to(dtype), torch.randn(6, 3, 5)
    expected = whole_sequence(copy.deepcopy(model).float(), x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(step_by_step(Stream(model, 3), x), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_streamed(backend, name):
    model, error, message = MODELS[name]
    with pytest.raises(error) as got:
        Stream(model())
    assert str(got.value) == message


def test_an_output_computed_from_the_state_is_refused(backend):
    with pytest.raises(ValueError, match="expected a plain chain of recurrent layers, Linear,"):
        Stream(FromTheState())


@pytest.mark.parametrize(
    "last",
    [lambda: nn.Linear(7, 2), lambda: nn.LSTM(7, 2), lambda: nn.GRU(7, 2), lambda: nn.LayerNorm(7)],
    ids=["Linear", "LSTM", "GRU", "LayerNorm"],
)  # fmt: skip
def test_layers_whose_sizes_do_not_fit_are_refused(backend, last):
    with pytest.raises((ValueError, RuntimeError)):
        Stream(Chain(nn.LSTM(3, 4), last()))(torch.zeros(1, 3))


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, "1", None])
def test_a_batch_size_is_a_whole_number_from_1(batch_size):
    with pytest.raises(ValueError) as got:
        Stream(nn.LSTM(3, 4), batch_size)
    expected = f"Stream: expected batch_size to be an int from 1, got {batch_size!r}"
    assert str(got.value) == expected


X = "Stream: expected x of shape [B, I] = [2, 3] and dtype float32, got "
KIND = "Stream: expected x to be a torch tensor or a NumPy array, got "
INPUTS = [
    (torch.zeros(2, 4), ValueError, X + "[2, 4] and float32 on cpu"),
    (torch.zeros(1, 3), ValueError, X + "[1, 3] and float32 on cpu"),
    (torch.zeros(3), ValueError, X + "[3] and float32 on cpu"),
    (torch.zeros(1, 2, 3), ValueError, X + "[1, 2, 3] and float32 on cpu"),
    (torch.zeros(2, 3).double(), ValueError, X + "[2, 3] and float64 on cpu"),
    (torch.zeros(2, 3, device="meta"), ValueError, X + "[2, 3] and float32 on meta"),
    (np.zeros((2, 4), np.float32), ValueError, X + "[2, 4] and float32"),
    (np.zeros(3, np.float32), ValueError, X + "[3] and float32"),
    (np.zeros((2, 3)), ValueError, X + "[2, 3] and float64"),
    (np.zeros((2, 3), ">f4"), ValueError, X + "[2, 3] and >f4"),
    (np.ma.masked_array(np.zeros((2, 3), np.float32)), ValueError, X + "a MaskedArray"),
    ([[0.0] * 3] * 2, TypeError, KIND + "list"),
    (None, TypeError, KIND + "NoneType"),
]


@pytest.mark.parametrize(("x", "error", "message"), INPUTS, ids=[m[-25:] for *_, m in INPUTS])
def test_inputs_that_do_not_fit_leave_the_state_alone(backend, x, error, message):
    lstm, right = nn.LSTM(3, 4), torch.randn(2, 3)
    step, untouched = Stream(lstm, 2), Stream(lstm, 2)
    with pytest.raises(error) as got:
        step(x)
    assert str(got.value) == message
    assert torch.equal(step(right), untouched(right))


UNUSUAL = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "a subclass with a dispatch of its own": lambda t: MaskedTensor(t, t > 0),
}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*deprecated")
def test_tensors_without_plain_memory_are_refused(backend, name):
    lstm, right = nn.LSTM(3, 4), torch.randn(2, 3)
    step, untouched = Stream(lstm, 2), Stream(lstm, 2)
    with pytest.raises((ValueError, RuntimeError)):
        step(UNUSUAL[name](torch.zeros(2, 3)))
    with pytest.raises((ValueError, RuntimeError)):
        step(right, out=UNUSUAL[name](torch.zeros(2, 4)))
    assert torch.equal(step(right), untouched(right))


def test_a_tensor_whose_memory_was_given_back_is_refused():
    step, x = Stream(nn.LSTM(3, 4)), torch.zeros(1, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated yet"):
        step(x)


def test_tracers_and_transforms_are_refused():
    x = torch.randn(2, 1, 3)
    step = Stream(nn.LSTM(3, 4))
    for transformed in (
        lambda: torch.jit.trace(step, (x[0],)),
        lambda: make_fx(step)(x[0]),
        lambda: torch.func.vmap(step)(x),
        lambda: torch.func.functionalize(step)(x[0]),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            transformed()


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_stream_is_made_where_nobody_watches():
    with Mode(), pytest.raises(RuntimeError, match="made outside of torch's modes, transforms and"):
        Stream(nn.LSTM(3, 4))


def test_steps_in_plain_torch_leave_the_backend_of_others_alone():
    """It is the process's: steps of two threads that set it would restore each other's."""
    with use_backend("reference"):
        steps = [Stream(nn.GRU(3, 4)) for _ in range(2)]
    seen = []
    with use_backend("extension"):
        for step in steps:
            step._engine._layers[0].register_forward_pre_hook(lambda *_: seen.append(backend_now()))
            step(torch.zeros(1, 3))
        assert backend_now() == "extension"
    assert "reference" not in seen


def read_only():
    array = np.zeros((2, 4), np.float32)
    array.flags.writeable = False
    return array


OUT = "Stream: expected out of shape [B, O] = [2, 4] and dtype float32, got "
OUTPUTS = [
    (torch.zeros(2, 5), ValueError, OUT + "[2, 5] and float32 on cpu"),
    (torch.zeros(4), ValueError, OUT + "[4] and float32 on cpu"),
    (torch.zeros(2, 4).double(), ValueError, OUT + "[2, 4] and float64 on cpu"),
    (np.zeros((2, 4)), ValueError, OUT + "[2, 4] and float64"),
    (torch.zeros(2, 8)[:, ::2], ValueError, "Stream: expected out to be contiguous and writeable"),
    (np.zeros((2, 8), np.float32)[:, ::2], ValueError,
     "Stream: expected out to be contiguous and writeable"),
    (read_only(), ValueError, "Stream: expected out to be contiguous and writeable"),
    (torch.zeros(1, 4).expand(2, 4), ValueError,
     "Stream: expected out to be contiguous and writeable"),
    (torch._neg_view(torch.zeros(2, 4)), ValueError,
     "Stream: expected out to be contiguous and writeable"),
    (np.frombuffer(bytearray(33), np.float32, offset=1).reshape(2, 4), ValueError,
     "Stream: expected out to be contiguous and writeable"),
    (np.zeros((2, 4), ">f4"), ValueError, OUT + "[2, 4] and >f4"),
    (np.ma.masked_array(np.zeros((2, 4), np.float32)), ValueError, OUT + "a MaskedArray"),
    ([0.0], TypeError, "Stream: expected out to be a torch tensor or a NumPy array, got list"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("out", "error", "message"), OUTPUTS,
    ids=["shape", "dim", "dtype", "NumPy dtype", "strided", "NumPy strided", "read-only",
         "expanded", "negated", "misaligned", "byte order", "masked", "list"],
)  # fmt: skip
def test_outputs_that_do_not_fit_leave_the_state_alone(backend, out, error, message):
    lstm, right = nn.LSTM(3, 4), torch.randn(2, 3)
    step, untouched = Stream(lstm, 2), Stream(lstm, 2)
    with pytest.raises(error) as got:
        step(right, out=out)
    assert str(got.value) == message
    assert torch.equal(step(right), untouched(right))


def test_states_that_do_not_fit_leave_the_state_alone(backend):
    one, two = Stream(nn.LSTM(3, 4), 2), Stream(Chain(nn.LSTM(3, 4), nn.LSTM(4, 5)), 2)
    with pytest.raises(RuntimeError) as got:
        one.state = (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    assert str(got.value) == "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"
    with pytest.raises(ValueError) as got:
        two.state = (one.state,)
    assert str(got.value) == (
        "Stream: expected state with one part for each of 2 recurrent layers, got 1"
    )
    two(torch.randn(2, 3))
    before = two.state
    with pytest.raises(RuntimeError):
        two.state = (one.state, one.state)
    torch.testing.assert_close(two.state, before, rtol=0, atol=0)
