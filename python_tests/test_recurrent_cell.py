# SPDX-License-Identifier: Apache-2.0
"""ISSLSTMCell, ISSGRUCell and ISSRNNCell are torch's cells; a loop over one is the layer."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

from iss_kernels import (
    ISSGRU,
    ISSLSTM,
    ISSRNN,
    ISSGRUCell,
    ISSLSTMCell,
    ISSRNNCell,
    accelerate,
    ops,
    use_backend,
)
from iss_kernels.recurrent_cell import RecurrentCell
from iss_kernels.testing import assert_no_worse_than_torch

RELU = {"nonlinearity": "relu"}
# name: torch's cell, ours, the layer, and options of all three
KINDS = {
    "lstm": (nn.LSTMCell, ISSLSTMCell, ISSLSTM, {}),
    "gru": (nn.GRUCell, ISSGRUCell, ISSGRU, {}),
    "rnn_tanh": (nn.RNNCell, ISSRNNCell, ISSRNN, {}),
    "rnn_relu": (nn.RNNCell, ISSRNNCell, ISSRNN, RELU),
}
# I, H, B: every height of a tile, tails of every ISA, one row, wide input, no rows, no inputs, no
# units
SIZES = [
    (1, 1, 1), (4, 16, 5), (5, 17, 1), (3, 31, 7), (33, 8, 2), (40, 40, 13), (7, 70, 3), (4, 5, 0),
    (0, 5, 3), (4, 0, 3), (64, 64, 1), (128, 100, 20), (20, 9, 70),
]  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pair(kind, *args, dtype=torch.float32, **options):
    """torch's cell and ours, with the same parameters."""
    torchs_class, our_class, _, more = KINDS[kind]
    torch.manual_seed(3)
    torchs = torchs_class(*args, dtype=dtype, **options, **more)
    ours = our_class(*args, dtype=dtype, **options, **more)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def state_of(kind, *shape, dtype=torch.float32, scale=1.0):
    """A random state of the cell."""
    h, c = (torch.randn(*shape, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))
    return (h, c) if kind == "lstm" else h


def tensors_in(state):
    if state is None:
        return []
    return [state] if torch.is_tensor(state) else list(state)


def with_gradients(cell, x, hx, dtype=None):
    """The state after a step, and the gradients of x, hx and the parameters."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *tensors_in(hx))]
    given = None if hx is None else leaves[1] if torch.is_tensor(hx) else tuple(leaves[1:])
    cell.zero_grad()
    outputs = tensors_in(cell(leaves[0], given))
    torch.manual_seed(7)
    cotangents = [torch.randn(y.shape, dtype=torch.float32).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, cotangents)
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in cell.parameters())]


def assert_as_torchs(torchs, ours, x, hx):
    """Outputs and gradients: error at most twice torch's; float64 to rounding."""
    if x.dtype == torch.float64:
        for a, b in zip(with_gradients(ours, x, hx), with_gradients(torchs, x, hx), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        return
    truth = with_gradients(copy.deepcopy(torchs).double(), x, hx, torch.float64)
    results = with_gradients(ours, x, hx), with_gradients(torchs, x, hx), truth
    for a, b, t in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse_than_torch(a, b, t)


# -- Values and gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_step_and_its_gradients_are_those_of_torchs_cell(implementation, kind, dtype, size, bias):
    inputs, hidden, batch = size
    torchs, ours = pair(kind, inputs, hidden, bias, dtype=dtype)
    x = torch.randn(batch, inputs).to(dtype)
    assert_as_torchs(torchs, ours, x, state_of(kind, batch, hidden, dtype=dtype))
    assert_as_torchs(torchs, ours, x, None)


def test_bfloat16_is_summed_in_float32(implementation, kind):
    torchs, ours = pair(kind, 37, 45, dtype=torch.bfloat16)
    for batch in (1, 6):
        x = torch.randn(batch, 37).bfloat16()
        assert_as_torchs(torchs, ours, x, state_of(kind, batch, 45, dtype=torch.bfloat16))


@pytest.mark.parametrize("module", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchs_own_module_inputs(implementation, dtype, training, module):
    (info,) = (i for i in module_db if i.module_cls is getattr(nn, module))
    given = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for sample in given:
        options = sample.constructor_input
        torchs = getattr(nn, module)(*options.args, **options.kwargs).to(dtype).train(training)
        ours = accelerate(copy.deepcopy(torchs))
        assert isinstance(ours, RecurrentCell)
        x, *hx = sample.forward_input.args
        hx = hx[0] if hx else sample.forward_input.kwargs.get("hx")
        assert_as_torchs(torchs, ours, x, hx)


def test_a_row_does_not_depend_on_the_others(isa, kind, dtype):
    _, ours = pair(kind, 33, 50, dtype=dtype)
    x, hx = torch.randn(70, 33).to(dtype), state_of(kind, 70, 50, dtype=dtype)
    for train in (True, False):
        with torch.set_grad_enabled(train):
            whole = tensors_in(ours(x, hx))
            for rows in (slice(0, 1), slice(3, 5), slice(60, 67), slice(0, 66)):
                part = tuple(s[rows] for s in tensors_in(hx))
                some = tensors_in(ours(x[rows], part if kind == "lstm" else part[0]))
                assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole, strict=True))


def test_two_threads_give_the_same_bits(two_threads, isa, kind):
    torchs, ours = pair(kind, 300, 400)
    x, hx = torch.randn(40, 300), state_of(kind, 40, 400)
    many = with_gradients(ours, x, hx)
    assert_as_torchs(torchs, ours, x, hx)
    torch.set_num_threads(1)
    for a, b in zip(with_gradients(ours, x, hx), many, strict=True):
        assert torch.equal(a, b)


def test_a_loop_over_a_cell_is_the_layer(implementation, kind, dtype):
    """Output, final state and all gradients, over a sequence."""
    steps, batch, inputs, hidden = 9, 4, 6, 18
    _, cell = pair(kind, inputs, hidden, dtype=dtype)
    _, _, layer_class, options = KINDS[kind]
    layer = layer_class(inputs, hidden, dtype=dtype, **options)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    x, hx = torch.randn(steps, batch, inputs).to(dtype), state_of(kind, batch, hidden, dtype=dtype)

    def run(by_cell):
        leaves = [t.clone().requires_grad_() for t in (x, *tensors_in(hx))]
        state = tuple(leaves[1:]) if kind == "lstm" else leaves[1]
        if by_cell:
            outputs = []
            for x_t in leaves[0]:
                state = cell(x_t, state)
                outputs.append(tensors_in(state)[0])
            y, final = torch.stack(outputs), tensors_in(state)
        else:
            given = tuple(s[None] for s in state) if kind == "lstm" else state[None]
            y, final = layer(leaves[0], given)
            final = [s[0] for s in tensors_in(final)]
        module = cell if by_cell else layer
        module.zero_grad()
        sum((t * t.cos()).sum() for t in (y, *final)).backward()
        grads = [t.grad for t in leaves] + [p.grad for p in module.parameters()]
        return [y, *final, *grads]

    for a, b in zip(run(True), run(False), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=100 * eps, atol=100 * eps)


def test_strided_inputs_and_states(implementation, kind):
    torchs, ours = pair(kind, 5, 18)
    x, hx = torch.randn(5, 6).t(), state_of(kind, 18, 6)
    hx = tuple(s.t() for s in hx) if kind == "lstm" else hx.t()
    torch.testing.assert_close(ours(x, hx), torchs(x, hx))
    wide = torch.randn(12, 10)
    torch.testing.assert_close(ours(wide[::2, ::2], hx), torchs(wide[::2, ::2], hx))
    w_hh, w_ih = (p.detach().t().contiguous().t() for p in (torchs.weight_hh, torchs.weight_ih))
    for cell in (torchs, ours):
        cell.weight_hh.data, cell.weight_ih.data = w_hh, w_ih
    torch.testing.assert_close(ours(x, hx), torchs(x, hx))


def test_infinite_and_nan_inputs_go_through_as_in_torch(implementation, kind):
    torchs, ours = pair(kind, 4, 20)
    x, hx = torch.randn(5, 4), state_of(kind, 5, 20)
    x[0, 1], x[1, 2], x[2, 0] = float("nan"), float("inf"), -float("inf")
    for a, b in zip(tensors_in(ours(x, hx)), tensors_in(torchs(x, hx)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_product_is_exact_next_to_the_end_of_memory(isa, kind):
    """Nothing beyond the weights, the inputs or the states is read or written."""
    for inputs, hidden, batch in itertools.product((3, 16), (5, 16, 17), (1, 3)):
        torchs, ours = pair(kind, inputs, hidden)
        guarded = []

        def within_nan(t, guarded=guarded):
            room = torch.full((t.numel() + 128,), float("nan"))
            inner = room[64:-64].view(t.shape)
            inner.copy_(t)
            guarded.append(room)
            return inner

        for name, parameter in torchs.named_parameters():
            setattr(ours, name, nn.Parameter(within_nan(parameter.detach())))
        x = within_nan(torch.randn(batch, inputs))
        hx = state_of(kind, batch, hidden)
        hx = tuple(map(within_nan, hx)) if kind == "lstm" else within_nan(hx)
        assert_as_torchs(torchs, ours, x, hx)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, hx), torchs(x, hx))
        assert all(t[:64].isnan().all() and t[-64:].isnan().all() for t in guarded)


# -- Derivatives


def double(cell):
    """In float64, and what gradcheck asks for: a function of tensors."""
    cell = cell.double()
    names = [name for name, _ in cell.named_parameters()]

    def function(*args):
        x, *rest = args
        state, weights = rest[: -len(names)], rest[-len(names) :]
        hx = state[0] if len(state) == 1 else tuple(state)
        return torch.func.functional_call(
            cell, dict(zip(names, weights, strict=True)), (x, hx), tie_weights=False
        )

    return function, [p.detach().clone().requires_grad_() for p in cell.parameters()]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck_and_gradgradcheck(implementation, kind, bias):
    _, ours = pair(kind, 2, 3, bias)
    function, weights = double(ours)
    x = torch.randn(2, 2).double().requires_grad_()
    state = [t.requires_grad_() for t in tensors_in(state_of(kind, 2, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(function, (x, *state, *weights))
    assert torch.autograd.gradgradcheck(function, (x, *state, *weights))


def test_gradients_of_some_inputs_alone(implementation, kind):
    """Frozen weights, an input without a gradient, a state without one."""
    torchs, ours = pair(kind, 6, 20)
    for which in itertools.product([False, True], repeat=3):
        results = []
        for cell in (torchs, ours):
            torch.manual_seed(1)
            x, hx = torch.randn(3, 6), tensors_in(state_of(kind, 3, 20))
            x.requires_grad_(which[0])
            [s.requires_grad_(which[1]) for s in hx]
            cell.requires_grad_(which[2])
            state = tensors_in(cell(x, tuple(hx) if kind == "lstm" else hx[0]))
            assert all(s.requires_grad == any(which) for s in state)
            inputs = [t for t in (x, *hx, *cell.parameters()) if t.requires_grad]
            if inputs:
                results.append(torch.autograd.grad(state[-1].sum(), inputs))
        for a, b in zip(*results, strict=True) if results else ():
            torch.testing.assert_close(a, b)


def test_torch_func(kind):
    """vmap, grad, jvp and an ensemble see into the cell, by the reference."""
    torchs, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)

    def results(cell):
        parameters = {name: p.detach() for name, p in cell.named_parameters()}

        def loss(parameters, x, hx):
            state = torch.func.functional_call(cell, parameters, (x, hx))
            return sum(s.square().sum() for s in tensors_in(state))

        dims = (None, 0, tuple(0 for _ in hx) if kind == "lstm" else 0)
        yield from torch.func.grad(loss)(parameters, x, hx).values()
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=dims)(parameters, x, hx)
        yield from per_sample.values()
        tangents = (parameters, x, hx)
        yield from torch.func.jvp(loss, (parameters, x, hx), tangents)

    for a, b in zip(results(ours), results(torchs), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_and_saved_tensors(kind):
    _, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4).requires_grad_(), state_of(kind, 3, 5)
    plain = torch.autograd.grad(tensors_in(ours(x, hx))[0].sum(), x)
    again = checkpoint(ours, x, hx, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(tensors_in(again)[0].sum(), x)[0], plain[0])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, hx)
    kept = {"lstm": 5, "gru": 4}.get(kind, 0) * 3 * 5
    new = [t for t in saved if t.numel() and not any(t is p for p in ours.parameters())]
    given = x.numel() + sum(s.numel() for s in tensors_in(hx))
    assert sum(t.numel() for t in new) == given + 3 * 5 + kept  # ..., h' and what cells.Cell says


def test_a_weight_written_behind_torchs_back_counts_in_the_next_call(isa, kind):
    torchs, ours = pair(kind, 32, 32)
    x, hx = torch.randn(1, 32), state_of(kind, 1, 32)
    with torch.no_grad():
        for _ in range(3):
            ours(x, hx)
        for cell in (torchs, ours):
            cell.weight_hh.detach().numpy()[5, 7] += 1
            cell.weight_ih.data[3, 4] -= 1
        torch.testing.assert_close(ours(x, hx), torchs(x, hx))


# -- Modes of torch


def test_compile(kind):
    torch.compiler.reset()
    torchs, ours = pair(kind, 4, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, hx), torchs(x, hx))
        torch.testing.assert_close(compiled(x), torchs(x))
        for a, b in zip(
            with_gradients(compiled, x, hx), with_gradients(torchs, x, hx), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_autocast_returns_the_dtype_of_torchs_cell(implementation, kind, state_dtype):
    torchs, ours = pair(kind, 4, 5)
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 4).to(x_dtype)
        hx = None if state_dtype is None else state_of(kind, 3, 5, dtype=state_dtype)
        with torch.autocast("cpu"):
            a, b = tensors_in(ours(x, hx)), tensors_in(torchs(x, hx))
        assert [t.dtype for t in a] == [t.dtype for t in b]
        for mine, other in zip(a, b, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone(implementation, kind):
    torchs, ours = pair(kind, 4, 5, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu"):
        a, b = tensors_in(ours(x)), tensors_in(torchs(x))
    assert [t.dtype for t in a] == [t.dtype for t in b]
    torch.testing.assert_close(a, b)


def test_inference_mode_and_no_grad(implementation, kind):
    torchs, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            state = ours(x, hx)
            torch.testing.assert_close(state, torchs(x, hx))
            assert not any(s.requires_grad for s in tensors_in(state))
    assert ours.requires_grad_(False)(x, hx) is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of sizes
def test_trace(kind):
    torchs, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)
    traced = torch.jit.trace(ours, (x, hx), check_trace=False)
    other = torch.randn(3, 4)
    torch.testing.assert_close(traced(other, hx), torchs(other, hx))


def test_meta_and_fake_tensors(kind):
    _, ours = pair(kind, 4, 5)
    ours = ours.to("meta")
    state = ours(torch.randn(3, 4, device="meta"))
    assert all(s.shape == (3, 5) and s.device.type == "meta" for s in tensors_in(state))


def test_the_plain_call_is_taken_by_the_extension(kind, monkeypatch):
    """Batched calls, trained or not, never reach Python's op; other calls do."""
    _, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)
    unbatched = tuple(s[0] for s in hx) if kind == "lstm" else hx[0]
    calls = []
    recurrent = ops.recurrent
    monkeypatch.setattr(ops, "recurrent", lambda *a, **k: calls.append(1) or recurrent(*a, **k))
    ours(x, hx), ours(x)
    with torch.no_grad():
        ours(x, hx)
    assert not calls
    ours(x[0], unbatched)
    with torch.autocast("cpu"):
        ours(x, hx)
    with use_backend("reference"):
        ours(x, hx)
    assert len(calls) == 3


# -- The module


def test_unbatched(implementation, kind):
    torchs, ours = pair(kind, 4, 5)
    x = torch.randn(4)
    for hx in (None, state_of(kind, 5)):
        a, b = ours(x, hx), torchs(x, hx)
        torch.testing.assert_close(a, b)
        assert all(s.shape == (5,) for s in tensors_in(a))


def test_constructor_repr_and_initialisation(kind):
    torchs_class, our_class, _, more = KINDS[kind]
    for options in ({}, {"bias": False}, {"dtype": torch.float64}):
        torch.manual_seed(11)
        torchs = torchs_class(3, 5, **options, **more)
        torch.manual_seed(11)
        ours = our_class(3, 5, **options, **more)
        assert repr(ours) == repr(torchs).replace(torchs_class.__name__, our_class.__name__)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert ours.bias_ih is None if not options.get("bias", True) else True


def test_copy_and_pickle(kind):
    _, ours = pair(kind, 3, 5)
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        torch.testing.assert_close(other(x), ours(x), rtol=0, atol=0)


def test_from_torch_and_back(kind):
    torchs, _ = pair(kind, 3, 5)
    torchs.register_forward_hook(lambda module, args, result: result)
    torchs.note = "kept"
    ours = KINDS[kind][1].from_torch(torchs.eval())
    back = ours.to_torch()
    assert type(back) is type(torchs)
    assert ours.note == back.note == "kept" and not ours.training
    assert len(ours._forward_hooks) == len(back._forward_hooks) == 1
    for name, parameter in torchs.named_parameters():
        assert getattr(ours, name) is parameter is getattr(back, name)
    assert vars(ours).get("nonlinearity") == vars(torchs).get("nonlinearity")
    without = KINDS[kind][1].from_torch(KINDS[kind][0](3, 5, bias=False, **KINDS[kind][3]))
    assert without.bias_hh is None and without.to_torch().bias_hh is None
    with pytest.raises(TypeError, match=r"from_torch: expected a torch.nn.\w+Cell, got Linear"):
        KINDS[kind][1].from_torch(nn.Linear(3, 5))


def test_accelerate_swaps_cells(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = KINDS[kind][0](3, 5, **KINDS[kind][3])
            self.more = nn.ModuleList([KINDS[kind][0](5, 5, **KINDS[kind][3])])
            self.out = nn.Linear(5, 2)

        def forward(self, xs):
            first = second = None
            for x in xs:
                first = self.cell(x, first)
                second = self.more[0](tensors_in(first)[0], second)
            return self.out(tensors_in(second)[0])

    model, x = Loop(), torch.randn(6, 4, 3)
    expected, names = model(x), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert accelerate(model) is model
    assert type(model.cell) is type(model.more[0]) is KINDS[kind][1]
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == names
    model(x).sum().backward()
    before = model.cell.weight_hh.clone()
    optimizer.step()
    assert not torch.equal(model.cell.weight_hh, before)
    assert accelerate(model).cell is model.cell


def test_accelerate_leaves_or_refuses_what_is_not_torchs_cell_itself():
    class Own(nn.LSTMCell):
        pass

    model = nn.ModuleList([Own(3, 5)])
    assert type(accelerate(model)[0]) is Own
    model = nn.ModuleList([nn.utils.parametrizations.weight_norm(nn.GRUCell(3, 5), "weight_hh")])
    with pytest.raises(ValueError, match=r"accelerate: expected 0 with its own parameters, got"):
        accelerate(model)


# -- Bad input


def message(call):
    with pytest.raises(Exception) as info:
        call()
    return type(info.value), str(info.value)


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_what_torch_refuses_is_refused_in_its_words(kind, backend):
    torchs, ours = pair(kind, 4, 5)
    x, hx = torch.randn(3, 4), state_of(kind, 3, 5)

    def each(change):
        return tuple(map(change, hx)) if kind == "lstm" else change(hx)

    calls = [
        (torch.tensor(1.0),),
        (x[None],),
        (x, each(lambda s: s[None])),
        (torch.randn(3, 6),),
        (torch.randn(3, 6), hx),
        (x, each(lambda s: s[:2])),
        (x, each(lambda s: s[:1])),
        (x, each(lambda s: s[:, :4])),
        (x[0], hx),
        (x[0], each(lambda s: s[:1])),
        (x, each(lambda s: s[0])),
    ]
    if kind == "lstm":
        h, c = hx
        calls += [(x, (h,)), (x, (h, c, c)), (x, (h, c[:, :4])), (x, (h, c[:2]))]
    with use_backend(backend):
        for args in calls:
            assert message(lambda args=args: ours(*args)) == message(
                lambda args=args: torchs(*args)
            )


def test_torchs_own_error_inputs(kind):
    module = KINDS[kind][0].__name__
    (info,) = (i for i in module_db if i.module_cls is getattr(nn, module))
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        given = sample.module_error_input
        args, options = given.constructor_input.args, given.constructor_input.kwargs
        with pytest.raises(sample.error_type, match=sample.error_regex):
            KINDS[kind][1](*args, **options)(
                *given.forward_input.args, **given.forward_input.kwargs
            )


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_another_cells_state_and_other_dtypes_are_one_sentence_each(kind, backend):
    _, ours = pair(kind, 4, 5)
    name = KINDS[kind][0].__name__
    x, (h, c) = torch.randn(3, 4), state_of("lstm", 3, 5)
    own = (h, c) if kind == "lstm" else h
    with use_backend(backend):
        if kind == "lstm":
            expected = f"{name}: expected hx to be a tuple (h_0, c_0), got a Tensor"
            assert message(lambda: ours(x, torch.stack([h, c]))) == (TypeError, expected)
            expected = f"{name}: expected hx[1] to be a tensor, got a NoneType"
            assert message(lambda: ours(x, (h, None))) == (TypeError, expected)
        else:
            expected = f"{name}: expected hx to be a tensor h_0, got a tuple"
            assert message(lambda: ours(x, (h, c))) == (TypeError, expected)
        for what, args in {
            "input": (x.double(), own),
            "h_0": (x, (h.double(), c) if kind == "lstm" else h.double()),
        }.items():
            expected = (
                f"{name}: expected {what} of dtype torch.float32, that of the weights, "
                "got torch.float64"
            )
            assert message(lambda args=args: ours(*args)) == (RuntimeError, expected)


def test_an_unknown_nonlinearity_is_refused_when_called():
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: foo"):
        ISSRNNCell(3, 5, nonlinearity="foo")(torch.randn(2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight_hh", "bias_ih"])
def test_a_parameter_that_is_computed_counts(kind, name):
    """Pruning takes its name from the cell's parameters, as bias=False does not."""
    theirs, ours, _, options = KINDS[kind]
    torch.manual_seed(0)
    whole, x = theirs(3, 4, **options), torch.randn(2, 3)
    cell = ours(3, 4, **options)
    cell.load_state_dict(whole.state_dict())
    for each in (whole, cell):
        prune.l1_unstructured(each, name, amount=2)
    for one, two in zip(tensors_in(whole(x)), tensors_in(cell(x)), strict=True):
        torch.testing.assert_close(one, two)
