# SPDX-License-Identifier: Apache-2.0
"""PreparedLSTMCell and its like: what prepare makes of the cells of a loop."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from iss_kernels import (
    ISSGRUCell,
    ISSLSTMCell,
    ISSRNNCell,
    Stream,
    find_groups,
    load,
    prepare,
    save,
    shrink,
)  # fmt: skip
from iss_kernels.linear import PreparedLinear
from iss_kernels.prepare import PreparedCell, PreparedLSTMCell
from iss_kernels.testing import assert_no_worse_than_torch, max_error

FORMATS = ["float32", "float16", "bfloat16", "int8"]
CELLS = {
    "lstm": (nn.LSTMCell, ISSLSTMCell), "gru": (nn.GRUCell, ISSGRUCell),
    "tanh": (nn.RNNCell, ISSRNNCell),
    "relu": (lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),) * 2,
}  # fmt: skip


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


@pytest.fixture(params=CELLS)
def kind(request):
    return request.param


def made(kind, *sizes, **options):
    return CELLS[kind][0](*sizes, **options)


def state(kind, rows, hidden, dtype=torch.float32):
    h, c = torch.randn(2, rows, hidden, dtype=dtype) / 2
    return (h, c) if kind == "lstm" else h


def parts(value):
    return value if isinstance(value, tuple) else (value,)


def equal(a, b):
    return all(map(torch.equal, parts(a), parts(b)))


def mapped(f, value):
    return tuple(map(f, value)) if isinstance(value, tuple) else f(value)


# -- accuracy --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(13, 21), (37, 61), (1, 1)])
def test_a_loop_of_steps_stays_within_what_the_format_allows(
    implementation, weights, kind, sizes, bias
):
    cell = made(kind, *sizes, bias=bias)
    prepared, exact = prepare(cell, weights), copy.deepcopy(cell).double()
    for rows in (1, 3, 17):
        hx = state(kind, rows, sizes[1])
        ours, torchs, truth = hx, hx, mapped(torch.Tensor.double, hx)
        for x in torch.randn(20, rows, sizes[0]):
            ours, torchs = prepared(x, ours), cell(x, torchs)
            truth = exact(x.double(), truth)
        allowed = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
        for a, b, t in zip(*map(parts, (ours, torchs, truth)), strict=True):
            if weights == "float32":
                assert_no_worse_than_torch(a, b, t)
            else:
                assert max_error(a, t) <= allowed[weights] * max(1, t.abs().max().item())


@torch.no_grad()
def test_a_step_is_that_of_a_layer(isa, weights, kind):
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
    layer = layer(13, 21, **options)
    cell = made(kind, 13, 21)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x, hx = torch.randn(5, 13), state(kind, 5, 21)
    prepared = prepare(cell, weights)
    _, after = prepare(layer, weights)(x[None], mapped(lambda s: s[None], hx))
    for _ in range(3):
        assert equal(prepared(x, hx), mapped(lambda s: s[0], after))
    one = mapped(lambda s: s[2:3], hx)
    if weights == "float32":
        assert equal(prepared(x[2:3], one), mapped(lambda s: s[0, 2:3], after))


# -- forms of call ---------------------------------------------------------------------------------


@torch.no_grad()
def test_every_form_of_call(implementation, weights, kind):
    prepared = prepare(made(kind, 5, 7), weights)
    x, hx = torch.randn(3, 5), state(kind, 3, 7)
    y = prepared(x, hx)
    assert equal(prepared(x, hx), y)  # the first call packs
    zeros = mapped(torch.zeros_like, hx)
    assert equal(prepared(x), prepared(x, zeros))
    alone = prepared(x[0], mapped(lambda s: s[0], hx))
    assert equal(alone, mapped(lambda s: s[0], prepared(x[:1], mapped(lambda s: s[:1], hx))))
    turned = mapped(lambda s: s.t().contiguous().t(), hx)
    for got, s in zip(parts(prepared(x.t().contiguous().t(), turned)), parts(y), strict=True):
        torch.testing.assert_close(got, s, rtol=1e-6, atol=1e-6)
    before = mapped(torch.clone, hx)
    prepared(x, hx)
    assert equal(hx, before)
    empty = prepared(x[:0], mapped(lambda s: s[:0], hx))
    assert [list(s.shape) for s in parts(empty)] == [[0, 7]] * len(parts(empty))
    if kind == "lstm":
        assert equal(prepared(x, list(hx)), y)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floating_inputs_are_converted_there_and_back(implementation, weights, kind, dtype):
    prepared = prepare(made(kind, 5, 7), weights)
    x, hx = torch.randn(3, 5).to(dtype), mapped(lambda s: s.to(dtype), state(kind, 3, 7))
    y = prepared(x, hx)
    expected = prepared(x.float(), mapped(torch.Tensor.float, hx))
    assert all(s.dtype == dtype for s in parts(y))
    assert equal(y, mapped(lambda s: s.to(dtype), expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(prepared(x, hx), y)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_mistakes_are_the_cells_own(implementation, kind, used):
    cell = CELLS[kind][1](5, 7)
    prepared = prepare(cell)
    x, hx = torch.randn(3, 5), state(kind, 3, 7)
    if used:
        prepared(x, hx)
    wrong = [
        (torch.randn(3, 4), hx), (torch.randn(2, 3, 5), hx), (x, mapped(lambda s: s[:2], hx)),
        (x, mapped(lambda s: s[:, :6], hx)), (x, mapped(lambda s: s[None], hx)),
    ]  # fmt: skip
    for args in wrong:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            cell(*args)
        with pytest.raises(type(expected.value)) as got:
            prepared(*args)
        assert str(got.value) == str(expected.value)
    with pytest.raises(RuntimeError):
        prepared(torch.zeros(3, 5, dtype=torch.int64), hx)
    for args in [(x.clone().requires_grad_(), hx), (x, mapped(lambda s: s.requires_grad_(), hx))]:
        with pytest.raises(RuntimeError, match="expected an input that asks for no gradient"):
            prepared(*args)
        with torch.no_grad():
            prepared(*args)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "look",
    [
        lambda m, *a: torch.jit.trace(m, a),
        lambda m, *a: make_fx(m)(*a),
        lambda m, *a: torch.export.export(m, a).module(),
        lambda m, *a: torch.compile(m, backend="aot_eager"),
    ],
    ids=["jit.trace", "make_fx", "export", "compile"],
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_who_looks_on_sees_the_step(weights, look, used):
    torch.compiler.reset()
    prepared = prepare(nn.GRUCell(5, 7), weights)
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    if used:
        prepared(x, h)
    traced = look(prepared, x, h)
    for value in (x, 2 * x):
        torch.testing.assert_close(traced(value, h), prepared(value, h), rtol=0, atol=3e-2)


# -- the module ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(weights, kind, tmp_path):
    prepared = prepare(made(kind, 5, 7), weights)
    x, hx = torch.randn(3, 5), state(kind, 3, 7)
    y = prepared(x, hx)
    save(prepared, tmp_path / "cell.safetensors")
    read = load(tmp_path / "cell.safetensors", made(kind, 5, 7))
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), read):
        assert type(twin) is type(prepared) and twin.weights == weights
        assert equal(twin(x, hx), y)
        other = prepare(made(kind, 5, 7), weights)
        twin.load_state_dict(other.state_dict())
        assert equal(twin(x, hx), other(x, hx)) and equal(prepared(x, hx), y)


@torch.no_grad()
def test_changed_weights_are_packed_again(implementation, weights):
    prepared, x, h = prepare(nn.GRUCell(5, 7), weights), torch.randn(3, 5), torch.randn(3, 7)
    y = prepared(x, h)
    for buffer in prepared.buffers():
        buffer.zero_()
    assert torch.equal(prepared(x, h), h / 2) and not torch.equal(prepared(x, h), y)


def test_the_line_it_prints():
    assert repr(prepare(nn.LSTMCell(3, 4), "int8")) == "PreparedLSTMCell(3, 4, weights='int8')"


# -- a model around it -----------------------------------------------------------------------------


class Policy(nn.Module):
    """A loop over the steps, as in reinforcement learning."""

    def __init__(self, inner=nn.LSTMCell):
        super().__init__()
        self.inner, self.cell, self.out = nn.Linear(5, 8), inner(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], 12)
        out = []
        for step in x:
            h, c = self.cell(torch.relu(self.inner(step)), (h, c))
            out.append(self.out(h))
        return torch.stack(out)


@torch.no_grad()
def test_a_model_with_a_loop(implementation, weights, tmp_path):
    model, x = Policy(), torch.randn(9, 4, 5)
    fast = prepare(model, weights)
    assert type(fast.cell) is PreparedLSTMCell and type(fast.out) is PreparedLinear
    allowed = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}[weights]
    y = fast(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=allowed)
    save(fast, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors", Policy())(x), y)
    step = Stream(fast, 4, example=x)
    torch.testing.assert_close(torch.stack([step(x_t) for x_t in x]), y, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_shrunken_cell_stays_one(weights):
    model, x = Policy(), torch.randn(6, 2, 5)
    groups = find_groups(model, x)
    name = next(f.name for f in groups.families if f.name.startswith("cell"))
    groups.zero_units_({name: torch.arange(12) % 3 == 0})
    small, _ = shrink(model, groups)
    fast = prepare(small, weights)
    assert isinstance(fast.cell, PreparedCell) and fast.cell.hidden_size == 8
    allowed = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}[weights]
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=allowed)  # from states of width 12


@torch.no_grad()
def test_onnx_has_the_values_of_the_format(weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from iss_kernels import export_onnx

    fast, x = prepare(Policy(), weights), torch.randn(3, 2, 5)
    export_onnx(fast, x, tmp_path / "model.onnx", weights="float32", dynamic={})
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), fast(x), rtol=0, atol=2e-2)


class Own(nn.LSTMCell):
    pass


def test_which_cells_are_prepared():
    assert type(prepare(Policy(ISSLSTMCell)).cell) is PreparedLSTMCell
    with pytest.raises(ValueError, match="without one but Own, a subclass of one"):
        prepare(Policy(Own))
    for change in (
        lambda c: parametrizations.weight_norm(c, "weight_hh"),
        lambda c: prune.l1_unstructured(c, "weight_ih", 0.5),
        lambda c: c.register_buffer("further", torch.zeros(1)),
    ):
        model = Policy()
        change(model.cell)
        with pytest.raises(ValueError, match="prepare: expected cell"):
            prepare(model)
    with pytest.raises(ValueError, match="not prepared yet, got one with a PreparedLSTMCell"):
        prepare(prepare(nn.LSTMCell(3, 4)))


@torch.no_grad()
def test_hooks_and_attributes_come_along():
    seen = []
    model = Policy()
    model.cell.note = "kept"
    model.cell.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    fast = prepare(model)
    fast(torch.randn(2, 1, 5))
    assert seen == [PreparedLSTMCell] * 2 and fast.cell.note == "kept"


def test_states_in_a_named_tuple_and_of_no_floating_dtype(implementation):
    states = namedtuple("States", "h c")(torch.randn(2, 4), torch.randn(2, 4))
    cell, x = prepare(nn.LSTMCell(3, 4)), torch.randn(2, 3)
    assert all(map(torch.equal, cell(x, states), cell(x, tuple(states))))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        odd = torch.zeros(2, 4, dtype=dtype)
        with pytest.raises(RuntimeError, match="expected hx of a floating dtype, got"):
            cell(x, (states.h, odd))
        with pytest.raises(RuntimeError, match="expected hx of a floating dtype, got"):
            prepare(nn.GRUCell(3, 4))(x, odd)
