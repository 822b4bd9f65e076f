# SPDX-License-Identifier: Apache-2.0
"""Everything built on the ops, on a GPU: modules, lasso, shrink, prepared models, streams."""

import copy
import functools

import pytest
import torch
from test_bfloat16 import tensors_in
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from iss_kernels import (
    ISSLSTM,
    GroupLasso,
    Stream,
    accelerate,
    backend,
    find_groups,
    ops,
    prepare,
    shrink,
    use_backend,
)
from iss_kernels.testing import assert_no_worse_than_torch, max_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, whenever oneDNN is switched
]

by_name = functools.partial(pytest.mark.parametrize, ids=lambda v: str(v).removeprefix("torch."))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 3, "bias": False, "num_layers": 2},
]


def on_cpu(result):
    return [t.cpu() for t in tensors_in(result)]


def gradients(module, x, *rest):
    """Outputs of module(x), then the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    outputs = [t for t in tensors_in(module(x, *rest)) if t.is_floating_point()]
    torch.manual_seed(7)
    loss = sum((y * torch.randn(y.shape).bfloat16().to(y)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, [x, *module.parameters()])
    return [t.detach().cpu() for t in (*outputs, *grads)]


# -- ISSLSTM ---------------------------------------------------------------------------------------


@by_name("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_isslstm_is_no_worse_than_nn_lstm(gpu, options, dtype):
    theirs = nn.LSTM(5, 12, **options, dtype=dtype)
    module = ISSLSTM(5, 12, **options, dtype=dtype)
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5).to(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        same = gradients(theirs, x)
        truth = gradients(copy.deepcopy(theirs).double(), x.double())
    results = gradients(module.to(gpu.device), gpu.to(x))
    module.recompute = True
    for a, again, b, t in zip(results, gradients(module, gpu.to(x)), same, truth, strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, again)
        assert_no_worse_than_torch(a, b, t)


def test_every_form_of_input(gpu):
    lstm = ISSLSTM(3, [7, (4, 5)], 2, bidirectional=True)
    x = torch.randn(6, 4, 3)
    _, state = lstm(x)
    ragged = [torch.randn(n, 3) for n in (2, 5, 4)]
    calls = {
        "state": lambda m, to: m(to(x), to(state)),
        "unbatched": lambda m, to: m(to(x[:, 0])),
        "lengths": lambda m, to: m(to(x), None, [6, 1, 3, 6]),
        "packed": lambda m, to: m(pack_sequence(to(ragged), enforce_sorted=False))[1],
    }
    with use_backend("reference"):
        expected = {name: tensors_in(call(lstm, lambda t: t)) for name, call in calls.items()}
    on_gpu = copy.deepcopy(lstm).to(gpu.device)
    for name, call in calls.items():
        for a, b in zip(on_cpu(call(on_gpu, gpu.to)), expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@by_name("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_trains_float32_weights(gpu, dtype):
    theirs = nn.LSTM(5, 12, 2)
    module = ISSLSTM.from_torch(copy.deepcopy(theirs)).to(gpu.device)
    x = torch.randn(4, 3, 5).to(dtype).float()
    kinds = []
    original = ops.recurrent

    def noting(cell, x, *rest):
        kinds.append(x.dtype)
        return original(cell, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "recurrent", noting)
        with torch.autocast(gpu.device.type, dtype):
            results = gradients(module, gpu.to(x))
    assert kinds == [dtype] * 2
    assert [t.dtype for t in results] == [dtype] * 3 + [torch.float32] * 9
    narrow = copy.deepcopy(theirs).to(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        same = gradients(narrow, x.to(dtype))
        truth = gradients(theirs.double(), x.double())
    for a, b, t in zip(results, same, truth, strict=True):
        assert_no_worse_than_torch(a.to(dtype), b, t)
    wide = copy.deepcopy(module).double()  # which no autocast converts
    with torch.autocast(gpu.device.type, dtype):
        assert wide(gpu.to(x).double())[0].dtype == torch.float64
    assert kinds == [dtype] * 2


@by_name("options", OPTIONS)
def test_a_module_compiles_as_one_graph(gpu, options):
    module = ISSLSTM(4, 7, **options).to(gpu.device)
    x = gpu.to(torch.randn(5, 3, 4))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x), gradients(module, x))
    torch._dynamo.reset()


# -- GroupLasso, shrink ----------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, *lstm, **options):
        super().__init__()
        self.lstm, self.out = nn.LSTM(*lstm, **options), nn.Linear(lstm[1], 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


@by_name("dtype", DTYPES[:3])
def test_the_lasso_does_what_the_reference_does(gpu, dtype):
    x = torch.randn(3, 2, 5).to(dtype)
    results = []
    for device, by in ((torch.device("cpu"), "reference"), (gpu.device, "extension")):
        torch.manual_seed(0)
        model = accelerate(Model(5, 9, num_layers=2)).to(device, dtype)
        with use_backend(by):
            lasso = GroupLasso(find_groups(model, x.to(device)), 0.05, warmup=2)
            found = []
            for _step in range(3):
                found.append(lasso.add_gradients_())
                found += lasso.norms().values()
                found += [p.grad.clone() for p in lasso.groups.parameters()]
                lasso.proximal_(0.1)
                lasso.threshold_(0.02)
            penalty = lasso()
            model.zero_grad()
            penalty.backward()
            found += [p.grad for p in lasso.groups.parameters()]
            found += [p.detach() for p in lasso.groups.parameters()]
        results.append([t.detach().cpu() for t in found])
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-3}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


def test_a_target_is_reached_and_the_model_shrinks(gpu):
    model = accelerate(Model(4, 8)).to(gpu.device)
    x = gpu.to(torch.randn(4, 3, 4))
    groups = find_groups(model, x)
    lasso = GroupLasso(groups, 0.05, target=0.5, horizon=60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        lasso.add_gradients_()
        optimizer.step()
        if lasso.reached:
            break
    lasso.threshold_(0.0)
    assert lasso.reached and lasso.left <= 0.5
    small, report = shrink(model, groups)
    assert report.sizes["lstm.l0"][1] <= 4
    assert next(small.parameters()).device.type == gpu.device.type
    assert max_error(small(x).cpu(), model(x).cpu()) <= 1e-5


# -- prepare ---------------------------------------------------------------------------------------

# Of steps from unit-scale inputs against float64, as the tests of the CPU hold theirs.
FORMATS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prepared_models_err_little(gpu, weights, options):
    model = nn.LSTM(5, 12, **options)
    x = torch.randn(6, 4, 5)
    truth = tensors_in(copy.deepcopy(model).double()(x.double()))
    fast = prepare(model, weights).to(gpu.device)
    for given in (x, x.bfloat16()):
        for a, t in zip(on_cpu(fast(gpu.to(given))), truth, strict=True):
            assert a.dtype == given.dtype
            assert max_error(a, t) <= max(FORMATS[weights], 2e-2 * (given is not x))
    with torch.no_grad(), torch.autocast(gpu.device.type, torch.bfloat16):
        assert fast(gpu.to(x))[0].dtype == torch.float32


def test_a_prepared_model_converts_its_weights_once(gpu):
    fast = prepare(nn.LSTM(5, 12), "int8").to(gpu.device)
    x = gpu.to(torch.randn(6, 4, 5))
    first, held = fast(x)[0], dict(fast._converted)
    assert torch.equal(fast(x)[0], first)
    assert set(held) == {"weight_ih_l0", "weight_hh_l0"}  # biases are float32 already
    assert all(fast._converted[name] is entry for name, entry in held.items())
    fast.weight_hh_l0_scale.mul_(2)
    assert not torch.equal(fast(x)[0], first)
    fast.load_state_dict(prepare(nn.LSTM(5, 12), "int8").state_dict())
    assert not torch.equal(fast(x)[0], first)


# -- Stream ----------------------------------------------------------------------------------------


class Chained(nn.Module):
    def __init__(self, **options):
        super().__init__()
        size = options.get("proj_size") or 12
        self.into, self.first = nn.Linear(5, 9), nn.LSTM(9, 12, **options)
        self.norm, self.second, self.out = nn.LayerNorm(size), nn.LSTM(size, 7), nn.Linear(7, 4)

    def forward(self, x):
        y, _ = self.first(self.into(x).tanh())
        y, _ = self.second(self.norm(y))
        return self.out(y)


@pytest.mark.parametrize("weights", FORMATS)
@by_name("options", [{}, {"num_layers": 2}, {"proj_size": 3}, {"bias": False}])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_is_the_sequence_step_by_step(gpu, weights, options, batch):
    model = Chained(**options).to(gpu.device)
    x = gpu.to(torch.randn(6, batch, 5))
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    step = Stream(prepare(model, weights), batch)
    for _round in range(2):
        for x_t, y_t in zip(x, truth, strict=True):
            assert max_error(step(x_t).cpu(), y_t.cpu()) <= FORMATS[weights]
        step.reset()


def test_a_stream_writes_where_it_is_told_and_keeps_its_buffers(gpu):
    step = Stream(nn.LSTM(5, 12).to(gpu.device), 3)
    x = gpu.to(torch.randn(3, 5))
    places = [(cell.h.data_ptr(), cell.c.data_ptr()) for cell in step._engine._cells]
    y = step(x).clone()
    step.reset()
    out = gpu.to(torch.empty(3, 12))
    assert step(x, out=out) is out and torch.equal(out, y)
    h, c = step.state
    assert torch.equal(h[0], y) and h.shape == c.shape == (1, 3, 12)
    after = step(x).clone()
    step.state = (h, c)
    assert torch.equal(step(x), after)
    step.state = (torch.zeros(1, 3, 12), torch.zeros(1, 3, 12))
    assert torch.equal(step(x), y)
    assert places == [(cell.h.data_ptr(), cell.c.data_ptr()) for cell in step._engine._cells]


def test_a_stream_made_in_inference_mode_runs_outside(gpu):
    x = gpu.to(torch.randn(1, 5))
    with torch.inference_mode():
        step = Stream(nn.LSTM(5, 12).to(gpu.device))
        first = step(x).clone()
    step.reset()
    assert torch.equal(step(x), first)


@by_name("dtype", [torch.float64, torch.bfloat16])
def test_a_stream_is_float32_whatever_the_default_is(gpu, dtype):
    lstm, x = nn.LSTM(5, 12, 2).to(gpu.device), gpu.to(torch.randn(2, 1, 5))
    expected = [Stream(lstm)(x[0]).clone(), *Stream(lstm).state]
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        step = Stream(lstm)
        got = [*step.state, step(x[0])]
    finally:
        torch.set_default_dtype(former)
    assert torch.equal(got[-1], expected[0])
    assert all(t.dtype == torch.float32 for t in got)


def test_a_function_in_place_leaves_the_state_alone(gpu):
    lstm = nn.LSTM(5, 12).to(gpu.device)
    x = gpu.to(torch.randn(6, 3, 5))
    step, plain = Stream(nn.Sequential(Only(lstm), nn.ReLU(inplace=True)), 3), Stream(lstm, 3)
    for x_t in x:
        assert torch.equal(step(x_t), plain(x_t).relu())


class Only(nn.Module):
    """Of an LSTM's result, the output."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


def test_a_streams_output_may_be_its_next_input(gpu):
    lstm, x = nn.LSTM(12, 12).to(gpu.device), gpu.to(torch.randn(3, 12))
    step, apart = Stream(lstm, 3), Stream(lstm, 3)
    y, expected = step(x), apart(x).clone()
    for _ in range(3):
        y, expected = step(y), apart(expected.clone()).clone()
        assert torch.equal(y, expected)
    x, expected = expected, apart(expected.clone())
    assert torch.equal(step(x, out=x), expected)


def test_a_step_of_a_stream_is_a_new_version_of_what_it_writes(gpu):
    x, w = gpu.to(torch.randn(2, 1, 5)), gpu.to(torch.ones(1, 12)).requires_grad_()
    for options in ({}, {"proj_size": 4, "num_layers": 2}):
        step = Stream(nn.LSTM(5, 12, **options).to(gpu.device))
        loss = sum((step(x_t) * w[:, : options.get("proj_size", 12)]).sum() for x_t in x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    out = gpu.to(torch.zeros(1, 4))
    step(x[0], out=out)
    assert out._version == 1
    with pytest.raises(ValueError, match="expected out to ask for no gradient"):
        step(x[0], out=out.clone().requires_grad_())


def test_a_state_that_does_not_fit_leaves_a_stream_alone(gpu):
    step, x = Stream(nn.LSTM(5, 12, 2).to(gpu.device)), gpu.to(torch.randn(1, 5))
    step(x)
    h, c = before = step.state
    for wrong in ((h, c.to(torch.complex64)), (h, c[:1]), (h, None), (h, c.to("meta"))):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            step.state = wrong
        assert all(map(torch.equal, step.state, before))


STREAM_MISTAKES = {
    "a vector": (lambda s, x: s(x[0]), ValueError, "got [5] and float32 on {device}"),
    "float64": (lambda s, x: s(x.double()), ValueError, "got [3, 5] and float64 on {device}"),
    "an array": (lambda s, x: s(x.cpu().numpy()), TypeError, "got ndarray"),
}


@pytest.mark.parametrize("mistake", STREAM_MISTAKES)
def test_a_stream_says_what_is_wrong(gpu, mistake):
    step, x = Stream(nn.LSTM(5, 12).to(gpu.device), 3), gpu.to(torch.randn(3, 5))
    call, error, got = STREAM_MISTAKES[mistake]
    device = step._engine._device
    with pytest.raises(error) as raised:
        call(step, x)
    assert str(raised.value) == (
        f"Stream: expected x of shape [B, I] = [3, 5] and dtype float32 on {device}, "
        + got.format(device=device)
    )
    with pytest.raises(ValueError, match=r"expected out of shape \[B, O\] = \[3, 12\]"):
        step(x, out=x)
    with pytest.raises(ValueError, match="expected out to be contiguous"):
        step(x, out=gpu.to(torch.empty(12, 3)).t())


def test_a_stream_wants_its_model_on_one_device():
    model = Chained()
    model.out.to("meta")
    with pytest.raises(ValueError, match="expected a model on one device, got cpu, meta"):
        Stream(model)


def test_a_stream_can_be_captured_in_a_graph(gpu):
    if gpu.simulator:
        pytest.skip("the emulator has no CUDA graphs")
    model, x = Chained().to(gpu.device), gpu.to(torch.randn(6, 3, 5))
    step = Stream(model, 3)
    expected = [step(x_t).clone() for x_t in x]
    step.reset()
    static, graph = x[0].clone(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = step(static)
    step.reset()
    for x_t, y_t in zip(x, expected, strict=True):
        static.copy_(x_t)
        graph.replay()
        assert torch.equal(y, y_t)


def test_training_and_inference_can_be_captured_in_a_graph(gpu):
    if gpu.simulator:
        pytest.skip("the emulator has no CUDA graphs")
    module, x = ISSLSTM(5, 33, 2).to(gpu.device), gpu.to(torch.randn(6, 3, 5)).requires_grad_()
    expected = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    graph.replay()
    torch.testing.assert_close(grads, expected)


def test_the_cpu_takes_its_own_kernels():
    assert not backend.on_cuda(torch.device("cpu")) and backend.on_cuda(torch.device("cuda"))
