# SPDX-License-Identifier: Apache-2.0
"""PreparedLinear: what prepare makes of an nn.Linear, and which it leaves alone."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from iss_kernels import ISSLSTM, Stream, load, prepare, save
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.linear import PreparedLinear
from iss_kernels.testing import assert_no_worse_than_torch, max_error

FORMATS = ["float32", "float16", "bfloat16", "int8"]


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


def prepared_of(linear, weights="float32"):
    """The Linear of a prepared model, which has to have a recurrent module."""
    return prepare(nn.ModuleList([nn.RNN(1, 1), linear]), weights)[1]


# -- accuracy --------------------------------------------------------------------------------------

# in_features, out_features: tails of every vector, one column, one element, several blocks, long
# sums.
SIZES = [(1, 1), (3, 70), (37, 61), (64, 1), (131, 300), (20, 2100), (1030, 90)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_answers_are_as_accurate_as_the_format_allows(isa, weights, sizes, bias):
    linear = nn.Linear(*sizes, bias=bias)
    prepared = prepared_of(linear, weights)
    allowed = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 5e-2}
    for rows in (1, 2, 7, 16, 67, 200):
        x = torch.randn(rows, sizes[0])
        with torch.no_grad():
            truth = copy.deepcopy(linear).double()(x.double())
            torchs, ours = linear(x), prepared(x)
        assert ours.dtype == torch.float32 and ours.shape == torchs.shape
        if weights == "float32":
            assert_no_worse_than_torch(ours, torchs, truth)
        else:
            assert max_error(ours, truth) <= allowed[weights] * max(1, truth.abs().max().item())


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_not_finite_comes_out_as_of_nn_linear(isa, weights, sizes, two_threads):
    linear, x = nn.Linear(*sizes), torch.randn(70, sizes[0])
    prepared, usual = prepared_of(linear, weights), x.clone()
    x[3, -1], x[5], x[67, 0] = math.inf, -math.inf, math.nan
    x[66, 0], x[66, -1] = math.inf, -math.inf
    x[7, -1] = 3e38
    with torch.no_grad():
        y, expected = prepared(x), nn.functional.linear(x, prepared.weight, linear.bias)
        odd = [3, 5, 66, 67]
        assert equal(y[odd], expected[odd])
        torch.testing.assert_close(y[7], expected[7], rtol=1e-2, atol=1e30)
        rest = [row for row in range(70) if row not in (7, *odd)]
        assert torch.equal(y[rest], prepared(usual)[rest])


def equal(one, other):
    return torch.equal(one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9))


def test_the_widest_row_of_int8_has_the_right_sum(isa):
    linear = nn.Linear(2**17, 2, bias=False)
    nn.init.constant_(linear.weight, 2**-17)
    y = prepared_of(linear, "int8")(torch.ones(2, 2**17))
    torch.testing.assert_close(y, torch.ones(2, 2), rtol=0, atol=1e-2)


def test_leading_dimensions_and_strides_are_nn_linears(implementation, weights):
    linear = nn.Linear(5, 7)
    prepared = prepared_of(linear, weights)
    x = torch.randn(4, 3, 6, 5)
    whole = prepared(x.reshape(-1, 5))
    assert torch.equal(prepared(x), whole.view(4, 3, 6, 7))
    torch.testing.assert_close(prepared(x[0, 0, 0]), whole[0], rtol=1e-6, atol=1e-6)
    turned = x.transpose(0, 2)
    torch.testing.assert_close(prepared(turned), prepared(x).transpose(0, 2), rtol=1e-6, atol=1e-6)
    for empty in (x[:0], x[:, :0]):
        assert prepared(empty).shape == linear(empty).shape


def test_a_row_does_not_depend_on_its_batch_and_no_call_on_the_last(isa, weights):
    prepared = prepared_of(nn.Linear(37, 300), weights)
    x = torch.randn(150, 37)
    whole = prepared(x)
    assert torch.equal(prepared(x), whole)
    for row in (0, 66, 149):
        assert torch.equal(prepared(x[row]), whole[row])


# Few columns, which threads divide by rows, and many, which they divide by panels.
@pytest.mark.parametrize("sizes", [(200, 10), (64, 5000)])
def test_threads_give_the_same_bits(isa, weights, two_threads, sizes):
    prepared = prepared_of(nn.Linear(*sizes), weights)
    x = torch.randn(1000, sizes[0])
    torch.set_num_threads(1)
    alone = prepared(x)
    torch.set_num_threads(2)
    for _ in range(5):
        assert torch.equal(prepared(x), alone)


def test_another_isa_packs_again(weights):
    prepared = prepared_of(nn.Linear(45, 130), weights)
    x = torch.randn(12, 45)
    tolerance = {"int8": 5e-2, "bfloat16": 2e-2}.get(weights, 1e-5)
    results = []
    for name in [*supported_isas(), *supported_isas()]:
        with use_isa(name):
            results.append(prepared(x))
            assert torch.equal(copy.deepcopy(prepared)(x), results[-1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=tolerance)


def test_features_of_wide_range_keep_the_small_ones(isa):
    linear = nn.Linear(40, 30)
    with torch.no_grad():
        linear.weight[:, -1] = 0
    x = torch.randn(9, 40)
    x[:, -1] = 1000
    with torch.no_grad():
        expected = linear(x)
    assert max_error(prepared_of(linear, "int8")(x), expected) <= 0.3


def test_a_bias_may_rule_an_answer_out(implementation, weights):
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        linear.bias[1] = -math.inf
    y = prepared_of(linear, weights)(torch.randn(5, 3))
    assert bool((y[:, 1] == -math.inf).all()) and bool(y[:, [0, 2, 3]].isfinite().all())


# -- forms of call ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floating_inputs_are_converted_there_and_back(implementation, weights, dtype):
    prepared = prepared_of(nn.Linear(3, 4), weights)
    x = torch.randn(5, 3).to(dtype)
    y = prepared(x)
    assert y.dtype == dtype and torch.equal(y, prepared(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(x), y)


@pytest.mark.parametrize("sizes", SIZES)
def test_bfloat16_goes_in_and_comes_out_as_float32_does_rounded(isa, weights, sizes):
    prepared = prepared_of(nn.Linear(*sizes), weights)
    for rows in (1, 2, 67, 300):
        x = torch.randn(rows * sizes[0] + 1).bfloat16()
        x[1] = math.inf
        x = x[1:].view(rows, sizes[0])  # begins inside a pair
        assert_same(prepared(x), prepared(x.float()).bfloat16())
        apart = torch.randn(rows, sizes[0] + 1).bfloat16()[:, 1:]
        assert_same(prepared(apart), prepared(apart.float()).bfloat16())


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_inputs_that_do_not_fit_are_refused(implementation, weights):
    prepared = prepared_of(nn.Linear(3, 4), weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            prepared(torch.randn(5, 2))
        with pytest.raises(RuntimeError, match="floating dtype, got int64"):
            prepared(torch.zeros(5, 3, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="no gradient"):
            prepared(torch.randn(5, 3, requires_grad=True))
        with torch.no_grad():
            prepared(torch.randn(5, 3, requires_grad=True))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "look",
    [
        lambda m, x: torch.jit.trace(m, x),
        lambda m, x: make_fx(m)(x),
        lambda m, x: torch.export.export(m, (x,)).module(),
        lambda m, x: torch.compile(m, backend="aot_eager"),
        lambda m, x: vmap(m),
    ],
    ids=["jit.trace", "make_fx", "export", "compile", "vmap"],
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_who_looks_on_sees_the_product(weights, look, used):
    torch.compiler.reset()
    model = prepared_of(nn.Linear(3, 4), weights)
    x = torch.randn(5, 3)
    if used:
        model(x)
    traced = look(model, x)
    for value in (x, 2 * x):
        torch.testing.assert_close(traced(value), model(value), rtol=0, atol=2e-2)


# -- the module ------------------------------------------------------------------------------------


def test_weight_gives_the_values_in_every_format(weights):
    linear = nn.Linear(5, 3)
    prepared = prepared_of(linear, weights)
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    assert prepared.weight.dtype == torch.float32
    assert bool(((prepared.weight - linear.weight).abs() <= step).all())
    assert torch.equal(prepared.bias, linear.bias)
    names = {"weight", "bias"} | ({"weight_scale"} if weights == "int8" else set())
    assert set(prepared.state_dict()) == names
    assert prepared.state_dict()["weight"].dtype == getattr(torch, weights)
    assert next(prepared.parameters()).numel() == 0
    assert repr(prepared) == (
        f"PreparedLinear(in_features=5, out_features=3, bias=True, weights='{weights}')"
    )
    assert prepared_of(nn.Linear(5, 3, bias=False), weights).bias is None


def test_a_copy_has_weights_of_its_own(weights):
    prepared = prepared_of(nn.Linear(5, 3), weights)
    x = torch.randn(2, 5)
    y = prepared(x)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), read):
        assert torch.equal(twin(x), y)
        twin.load_state_dict(prepared_of(nn.Linear(5, 3), weights).state_dict())
        assert not torch.equal(twin(x), y) and torch.equal(prepared(x), y)


def test_changed_and_loaded_weights_are_the_ones_that_run(implementation, weights):
    linear, other = nn.Linear(5, 3), nn.Linear(5, 3)
    prepared, x = prepared_of(linear, weights), torch.randn(2, 5)
    y = prepared(x)
    with torch.no_grad():
        prepared._buffers["bias"].add_(1)
    torch.testing.assert_close(prepared(x), y + 1)
    prepared.load_state_dict(prepared_of(other, weights).state_dict())
    assert torch.equal(prepared(x), prepared_of(other, weights)(x))
    if weights != "int8":
        prepared.load_state_dict(linear.state_dict())
        assert torch.equal(prepared(x), y)
    bad = {k: t.clone() for k, t in prepared_of(other, weights).state_dict().items()}
    name = "weight_scale" if weights == "int8" else "weight"
    bad[name].view(-1)[0] = math.nan
    before = prepared(x)
    with pytest.raises(RuntimeError, match="finite"):
        prepared.load_state_dict(bad)
    assert torch.equal(prepared(x), before)


@pytest.mark.parametrize("change", ["double", "half", "bfloat16", "float"])
def test_a_change_of_dtype_leaves_the_weights_as_they_are(weights, change):
    prepared, x = prepared_of(nn.Linear(5, 3), weights), torch.randn(2, 5)
    y = prepared(x)
    getattr(prepared, change)()
    assert torch.equal(prepared(x), y)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(weights, value):
    linear = nn.Linear(5, 3)
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(ValueError, match="prepare: expected finite weights, got .* in weight"):
        prepared_of(linear, weights)


# -- which of a model's ----------------------------------------------------------------------------


class Own(nn.Linear):
    pass


def changed(linear):
    linear.forward = lambda x: x
    return linear


def pruned(linear):
    return prune.l1_unstructured(linear, "weight", 0.5)


def transposed(linear):
    linear.weight = nn.Parameter(linear.weight.t().contiguous())
    return linear


LEFT = {
    "a subclass": lambda: Own(4, 3),
    "a forward of its own": lambda: changed(nn.Linear(4, 3)),
    "pruned": lambda: pruned(nn.Linear(4, 3)),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "complex": lambda: nn.Linear(4, 3, dtype=torch.complex64),
    "of another shape": lambda: transposed(nn.Linear(4, 3)),
    "lazy": lambda: nn.LazyLinear(3),
    "without inputs": lambda: nn.Linear(0, 3),
    "without outputs": lambda: nn.Linear(4, 0),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize("name", LEFT)
def test_what_computes_something_else_is_copied_as_it_is(name):
    linear = LEFT[name]()
    copied = prepared_of(linear, "int8")
    assert type(copied) is type(linear) and copied is not linear


@torch.no_grad()
def test_layers_inside_of_torchs_own_modules_stay(weights):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.rnn = nn.GRU(8, 8, batch_first=True)
            self.out = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.out(self.rnn(self.inner(x))[0])

    model = Mixed().eval()
    fast = prepare(model, weights)
    kinds = [type(m) for m in fast.modules() if isinstance(m, (nn.Linear, PreparedLinear))]
    assert kinds.count(PreparedLinear) == 2 and type(fast.inner.linear1) is nn.Linear
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=3e-2)


@torch.no_grad()
def test_hooks_attributes_and_sharing_come_along():
    seen = []
    linear = nn.Linear(4, 4)
    linear.note = ["kept"]
    linear.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    model = nn.ModuleList([nn.RNN(1, 1), linear, linear])
    fast = prepare(model)
    assert fast[1] is fast[2] and fast[1].note == ["kept"] and fast[1].note is not linear.note
    fast[1](torch.randn(2, 4))
    assert seen == [PreparedLinear]


class Tied(nn.Module):
    """A language model whose softmax shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 12)
        self.softmax = nn.Linear(12, 30)
        self.softmax.weight = self.embedding.weight

    def forward(self, tokens):
        return self.softmax(self.lstm(self.embedding(tokens))[0])


@torch.no_grad()
def test_a_tied_weight_stays_exact_where_it_is_looked_up(weights):
    model, tokens = Tied(), torch.arange(20).view(10, 2)
    fast = prepare(model, weights)
    assert torch.equal(fast.embedding.weight, model.embedding.weight)
    allowed = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 3e-2, "int8": 3e-2}
    torch.testing.assert_close(fast(tokens), model(tokens), rtol=0, atol=allowed[weights])


# -- with the rest of the package ------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 7)
        self.out = nn.Linear(7, 4, bias=False)

    def forward(self, x):
        return self.out(self.lstm(torch.tanh(self.inner(x)))[0])


@torch.no_grad()
def test_save_and_load(weights, tmp_path):
    fast, x = prepare(Model(), weights), torch.randn(3, 2, 5)
    y = fast(x)
    save(fast, tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors", Model())
    assert torch.equal(read(x), y)
    assert [type(m) for m in read.modules()] == [type(m) for m in fast.modules()]
    again = load(tmp_path / "model.safetensors", Model().to("meta"))
    assert torch.equal(again(x), y)


def test_loading_into_something_else_is_refused(tmp_path):
    save(prepare(Model(), "int8"), tmp_path / "model.safetensors")
    other = Model()
    other.out = Own(7, 4, bias=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="load: expected out to be an nn.Linear.* got a Own"):
        load(tmp_path / "model.safetensors", other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match="not prepared, got inner as a PreparedLinear"):
        load(tmp_path / "model.safetensors", prepare(Model(), "int8"))


def test_preparing_twice_is_refused():
    with pytest.raises(ValueError, match="not prepared yet, got one with a Prepared"):
        prepare(prepare(Model()))
    fast = prepare(nn.ModuleList([nn.RNN(1, 1), nn.Linear(2, 2)]))
    fast[0] = nn.RNN(1, 1)
    with pytest.raises(ValueError, match="not prepared yet, got one with a PreparedLinear"):
        prepare(fast)


class Chained(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.lstm, self.out = nn.Linear(5, 6), ISSLSTM(6, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.out(self.lstm(self.inner(x))[0])


@torch.no_grad()
def test_a_stream_keeps_the_format(implementation, weights):
    fast, x = prepare(Chained(), weights), torch.randn(6, 2, 5)
    step = Stream(fast, batch_size=2)
    y = torch.stack([step(x_t).clone() for x_t in x])
    torch.testing.assert_close(y, fast(x), rtol=0, atol=1e-6 if weights == "float32" else 2e-2)


@torch.no_grad()
def test_a_stream_is_a_snapshot(implementation, weights):
    fast, x = prepare(Chained(), weights), torch.randn(2, 5)
    step = Stream(fast, batch_size=2)
    y = step(x).clone()
    for buffer in fast.out.buffers():
        buffer.zero_()
    step.reset()
    assert torch.equal(step(x), y)


@torch.no_grad()
def test_onnx_has_the_values_of_the_format(weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from iss_kernels import export_onnx

    fast, x = prepare(Model(), weights), torch.randn(3, 2, 5)
    export_onnx(fast, x, tmp_path / "model.onnx", weights="float32")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), fast(x), rtol=0, atol=2e-2)
