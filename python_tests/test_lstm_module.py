# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM is nn.LSTM: torch's module inputs, ONNX's cases, every input form; and what it adds."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db

from iss_kernels import ISSLSTM, accelerate, find_groups, shrink
from iss_kernels.backend import is_built, use_backend
from iss_kernels.testing import assert_no_worse_than_torch

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

(LSTM_INFO,) = (info for info in module_db if info.module_cls is nn.LSTM)


def module_inputs(dtype, training):
    return LSTM_INFO.module_inputs_func(
        LSTM_INFO, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


class Outputs(nn.Module):
    """Of an LSTM's results, y."""

    def forward(self, result):
        return result[0]


def pair(*args, dtype=torch.float32, **kwargs):
    """nn.LSTM and an ISSLSTM with the same parameters."""
    torch.manual_seed(3)
    torchs = nn.LSTM(*args, dtype=dtype, **kwargs)
    ours = ISSLSTM(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def tensors_in(result):
    """All tensors of an LSTM's result or arguments, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if torch.is_tensor(result):
        return [result]
    return [t for part in result or () for t in tensors_in(part)]


def with_gradients(module, args, dtype=None):
    """Outputs of module(*args), then the gradients of args and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors_in(args)]
    leaves = leaves if dtype is None else [t.to(dtype).detach().requires_grad_() for t in leaves]
    new = iter(leaves)

    def rebuilt(a):
        if torch.is_tensor(a):
            return next(new)
        if isinstance(a, PackedSequence):
            return PackedSequence(next(new), *a[1:])
        return tuple(map(rebuilt, a))

    module.zero_grad()
    torch.manual_seed(5)
    outputs = tensors_in(module(*map(rebuilt, args)))
    torch.manual_seed(7)
    sum((y * torch.randn(y.shape).to(y.dtype)).sum() for y in outputs).backward()
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("index", range(len(module_inputs(torch.float32, True))))
def test_torchs_own_module_inputs(implementation, dtype, training, index):
    """Outputs and all gradients: error at most twice nn.LSTM's; float64 to rounding."""
    given = module_inputs(dtype, training)[index]
    options = given.constructor_input
    torchs, ours = pair(*options.args, dtype=dtype, **options.kwargs)
    torchs.train(training), ours.train(training)
    args = given.forward_input.args
    results = with_gradients(ours, args), with_gradients(torchs, args)
    if dtype == torch.float64:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        return
    truth = with_gradients(copy.deepcopy(torchs).double(), args, torch.float64)
    for a, b, t in zip(*results, truth, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse_than_torch(a, b, t)


FORMS = list(itertools.product([False, True], [False, True], [0, 3], [1, 2]))


@pytest.mark.parametrize(("batch_first", "bidirectional", "proj_size", "num_layers"), FORMS)
def test_every_batched_input_form(batch_first, bidirectional, proj_size, num_layers):
    torchs, ours = pair(
        5, 6, num_layers, batch_first=batch_first, bidirectional=bidirectional, proj_size=proj_size,
        dtype=torch.float64,
    )  # fmt: skip
    directions = 2 if bidirectional else 1

    def states(batch):
        shape = (num_layers * directions, batch)
        return (torch.randn(*shape, proj_size or 6).double(), torch.randn(*shape, 6).double())

    def batch_of(t, b):
        return torch.randn(*((b, t) if batch_first else (t, b)), 5).double()

    ragged = [torch.randn(n, 5).double() for n in (2, 7, 4)]
    sorted_ = sorted(ragged, key=len, reverse=True)
    for args in (
        (batch_of(4, 3),),
        (batch_of(4, 3), states(3)),
        (batch_of(1, 3), list(states(3))),  # hx as a list
        (batch_of(5, 0), states(0)),
        (batch_of(5, 0),),
        (pack_sequence(ragged, enforce_sorted=False),),
        (pack_sequence(ragged, enforce_sorted=False), states(3)),
        (pack_sequence(sorted_), states(3)),
        (pack_padded_sequence(batch_of(4, 2), torch.tensor([4, 1]), batch_first), states(2)),
        (batch_of(4, 6)[:, ::2] if not batch_first else batch_of(6, 4)[:, ::2],),  # strided
    ):
        for a, b in zip(with_gradients(ours, args), with_gradients(torchs, args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        if isinstance(args[0], PackedSequence):
            for a, b in zip(ours(*args)[0][1:], torchs(*args)[0][1:], strict=True):
                assert a is b is None or torch.equal(a, b)


def test_dropout_between_layers_draws_the_same_masks_as_nn_lstm():
    torchs, ours = pair(5, 6, 3, dropout=0.5, dtype=torch.float64)
    x = torch.randn(4, 3, 5).double()
    for a, b in zip(with_gradients(ours, (x,)), with_gradients(torchs, (x,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torchs.eval(), ours.eval()
    torch.testing.assert_close(ours(x)[0], torchs(x)[0], rtol=1e-12, atol=1e-12)


def test_the_same_seed_initialises_the_same_parameters():
    for options in ({}, {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False}):
        torch.manual_seed(11)
        torchs = nn.LSTM(3, 5, **options)
        torch.manual_seed(11)
        ours = ISSLSTM(3, 5, **options)
        a, b = dict(ours.named_parameters()), dict(torchs.named_parameters())
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
        assert [[p.shape for p in layer] for layer in ours.all_weights] == [
            [p.shape for p in layer] for layer in torchs.all_weights
        ]
        assert ours.extra_repr() == torchs.extra_repr()


def test_state_dicts_load_both_ways():
    torchs, ours = nn.LSTM(3, 4, 2), ISSLSTM(3, 4, 2)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), torchs(x))
    ours.load_state_dict(nn.LSTM(3, 4, 2).state_dict())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 2, "bidirectional": True}])
def test_from_torch_and_to_torch_share_the_parameters(options):
    torchs = nn.LSTM(3, 4, num_layers=2, dropout=0.25, batch_first=True, **options).eval()
    ours = ISSLSTM.from_torch(torchs)
    back = ours.to_torch()
    assert type(back) is nn.LSTM and not ours.training and not back.training
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(back(x), torchs(x))
    for name, parameter in torchs.named_parameters():
        assert ours.get_parameter(name) is parameter and back.get_parameter(name) is parameter


def test_accelerate_replaces_every_nn_lstm_and_keeps_the_state_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.LSTM(3, 4)
            self.inner = nn.ModuleList([nn.LSTM(4, 4), nn.Linear(4, 2)])
            self.again = self.first  # one module in two places stays one

        def forward(self, x):
            return self.inner[1](self.inner[0](self.first(x)[0])[0])

    model = Model()
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    x, before = torch.randn(5, 2, 3), copy.deepcopy(model.state_dict())
    expected = model(x)
    assert accelerate(model) is model
    assert type(model.first) is ISSLSTM and model.again is model.first
    assert type(model.inner[0]) is ISSLSTM
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert type(accelerate(nn.LSTM(2, 3))) is ISSLSTM


def test_deepcopy_and_pickle():
    ours = ISSLSTM(3, [4, 2], num_layers=2)
    x = torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x)[0], ours(x)[0])
        assert twin.weight_ih_l0 is not ours.weight_ih_l0 and twin.sizes == ours.sizes


def test_device_dtype_and_flatten_parameters():
    ours = ISSLSTM(3, 4, device="meta", dtype=torch.float64)
    assert ours.weight_ih_l0.is_meta and ours.weight_ih_l0.dtype == torch.float64
    ISSLSTM(3, 4).flatten_parameters()
    y, (h, c) = ours(torch.empty(5, 2, 3, device="meta", dtype=torch.float64))
    assert y.shape == (5, 2, 4) and h.shape == c.shape == (1, 2, 4)


@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_one_tensor_left_on_meta_is_named(backend, training):
    """torch takes a mix with meta for a question about shapes; the answer would be garbage."""
    letters = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    x, state = torch.randn(5, 2, 3), torch.zeros(2, 2, 4)
    with use_backend(backend), torch.set_grad_enabled(training):
        for name, letter in letters.items():
            lstm = ISSLSTM(3, 4, num_layers=2)
            weights = lstm.state_dict()
            with torch.device("meta"):
                lstm = ISSLSTM(3, 4, num_layers=2)
            del weights[name + "_l1"]
            lstm.load_state_dict(weights, strict=False, assign=True)
            with pytest.raises(RuntimeError, match=f"expected {letter} on cpu, got meta"):
                lstm(x)
        lstm = ISSLSTM(3, 4, num_layers=2)
        for hx, letter in (((state.to("meta"), state), "h0"), ((state, state.to("meta")), "c0")):
            with pytest.raises(RuntimeError, match=f"expected {letter} on cpu, got meta"):
                lstm(x, hx)
        with pytest.raises(RuntimeError, match="expected w_ih on meta, got cpu"):
            lstm(x.to("meta"))


class Wrapped(torch.Tensor):
    """A subclass without a behaviour of its own."""


def inputs_of_every_kind():
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    imaginary = torch.complex(torch.zeros(5, 2, 3), x).conj().imag  # stored without its sign
    packed = pack_padded_sequence(x, [5, 3], enforce_sorted=False)
    return {
        "negative bit": (imaginary, (torch.complex(h, h).conj().imag, c)),
        "subclass": (x.as_subclass(Wrapped), (h.as_subclass(Wrapped), c)),
        "parameter": (nn.Parameter(x), (nn.Parameter(h), c)),
        "expanded": (x[:1].expand(5, 2, 3), (h[:, :1].expand(1, 2, 4), c)),
        "list": (x, [h, c]),
        "indices twice": (packed._replace(sorted_indices=torch.tensor([1, 1])), (h, c)),
    }


@pytest.mark.parametrize("kind", list(inputs_of_every_kind()))
def test_inputs_of_every_kind(implementation, kind):
    torchs, ours = pair(3, 4)
    args = inputs_of_every_kind()[kind]
    for a, b in zip(tensors_in(ours(*args)), tensors_in(torchs(*args)), strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(a, b)


def refused_inputs():
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    packed = pack_padded_sequence(x, [5, 3], enforce_sorted=False)
    return {
        "conjugate": (torch.complex(x, x).conj(), None),
        "sparse": (x.to_sparse(), None),
        "nested": (torch.nested.nested_tensor([x[:, 0], x[:3, 1]], layout=torch.jagged), None),
        "three states": (x, (h, c, c)),
        "one state": (x, (h,)),
        "no state": (x, ()),
        "None": (x, (h, None)),
        "integers": (x, (h.long(), c.long())),
        "another dtype": (x, (h, c.double())),
        "index too large": (packed._replace(sorted_indices=torch.tensor([0, 7])), (h, c)),
        "one index": (packed._replace(sorted_indices=torch.tensor([0])), (h, c)),
        "float indices": (packed._replace(sorted_indices=torch.tensor([0.0, 1.0])), (h, c)),
        "too few rows": (packed._replace(data=packed.data[:-1]), None),
        "growing": (packed._replace(batch_sizes=torch.tensor([1, 2, 2, 2, 1])), None),
        "negative": (packed._replace(batch_sizes=torch.tensor([2, -2, 8])), None),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", list(refused_inputs()))
def test_inputs_that_nn_lstm_refuses_are_refused(implementation, kind):
    torchs, ours = pair(3, 4)
    args = refused_inputs()[kind]
    for module in (torchs, ours):
        with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError)):
            module(*args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_no_call(implementation, dtype):
    lstm, x = ISSLSTM(3, [4, 2], num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [5, 3])
    calls = (lambda: lstm(x), lambda: lstm(packed), lambda: lstm(x, lengths=[3, 4]))
    expected = [call() for call in calls]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = [call() for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(tensors_in(got), tensors_in(expected), strict=True):
        assert torch.equal(a, b)


def test_a_graph_serves_as_often_as_torchs_own():
    lstm, x = ISSLSTM(3, 4, num_layers=2), torch.randn(5, 2, 3, requires_grad=True)
    y, _ = lstm(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    for changed in ("y", "x", "weight_hh_l0"):
        leaf = torch.randn(5, 2, 3, requires_grad=True)
        x = leaf * 1
        y, _ = lstm(x)
        loss = y.sum()
        with torch.no_grad():
            {"y": y, "x": x}.get(changed, lstm.weight_hh_l0).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autocast_returns_its_dtype(implementation):
    # What nn.LSTM does where oneDNN has a bfloat16 LSTM (AVX-512); elsewhere it fails.
    torchs, ours = pair(3, 4, 2)
    for x in (torch.randn(5, 2, 3), torch.randn(5, 2, 3).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = tensors_in(ours(x))
        for a, b in zip(result, tensors_in(torchs(x.float())), strict=True):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a.float(), b, rtol=0, atol=2**-8)
        sum(t.float().sum() for t in result).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


# -- beyond nn.LSTM --------------------------------------------------------------------------------


def chained(ours, x, hx):
    """The same network out of one-layer, one-direction nn.LSTMs."""
    h_n, c_n = [], []
    for layer, sizes in enumerate(ours.sizes):
        outputs = []
        for direction, (h, p) in enumerate(sizes):
            suffix = f"_l{layer}" + "_reverse" * direction
            single = nn.LSTM(x.shape[-1], h, proj_size=p if p != h else 0, dtype=x.dtype)
            for name in dict(single.named_parameters()):
                setattr(single, name, ours.get_parameter(name.replace("_l0", suffix)))
            state = None if hx is None else tuple(part[layer][direction][None] for part in hx)
            y, (h_last, c_last) = single(x.flip(0) if direction else x, state)
            outputs.append(y.flip(0) if direction else y)
            h_n.append(h_last[0])
            c_n.append(c_last[0])
        x = torch.cat(outputs, -1)
    return [x, *h_n, *c_n]


@pytest.mark.parametrize(
    ("hidden", "proj", "bidirectional"),
    [([5, 3], 0, False), ([4, (2, 6)], 0, True), ([(5, 4), 6], [(2, 3), 2], True),
     (4, [2, 3], False)],
)  # fmt: skip
def test_a_size_per_layer_and_direction(hidden, proj, bidirectional):
    ours = ISSLSTM(
        3, hidden, num_layers=2, proj_size=proj, bidirectional=bidirectional, dtype=torch.float64
    )
    x = torch.randn(6, 4, 3).double()
    y, (h, c) = ours(x)
    assert isinstance(h, tuple) and isinstance(c, tuple)
    for a, b in zip(
        tensors_in((y, (h, c))), _stacked_as(chained(ours, x, None), y, h, c), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    again = ours(x, (h, c))  # hx takes the form that h_n, c_n come in
    for a, b in zip(tensors_in(again), _stacked_as(chained(ours, x, (h, c)), y, h, c), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    alone, (h_1, _) = ours(x[:, 1])
    torch.testing.assert_close(alone, y[:, 1], rtol=1e-12, atol=1e-12)
    for a, b in zip(tensors_in(h_1), tensors_in(h), strict=True):
        torch.testing.assert_close(a, b[..., 1, :], rtol=1e-12, atol=1e-12)


def _stacked_as(flat, y, h, c):
    """`chained`'s flat list, stacked where ISSLSTM stacks the directions of a layer."""
    states, result = iter(flat[1:]), [flat[0]]
    for part in (h, c):
        for layer in part:
            if torch.is_tensor(layer):
                result.append(torch.stack([next(states) for _ in layer]))
            else:
                result += [next(states) for _ in layer]
    return result


def test_equal_sizes_in_a_list_are_nn_lstms():
    ours = ISSLSTM(3, [4, 4], num_layers=2)
    assert ours.hidden_size == 4 and isinstance(ours.to_torch(), nn.LSTM)
    assert repr(ours) == "ISSLSTM(3, 4, num_layers=2)"
    assert repr(ISSLSTM(3, [4, 2], num_layers=2)) == "ISSLSTM(3, [4, 2], num_layers=2)"


def test_packed_and_unequal_sizes_together():
    ours = ISSLSTM(3, [4, 2], num_layers=2, dtype=torch.float64)
    ragged = [torch.randn(n, 3).double() for n in (2, 5, 3)]
    packed, (h, _) = ours(pack_sequence(ragged, enforce_sorted=False))
    for i, x in enumerate(ragged):
        y, (h_one, _) = ours(x)
        for a, b in zip(h_one, h, strict=True):
            torch.testing.assert_close(a, b[:, i])


# -- ONNX ------------------------------------------------------------------------------------------


def onnx_cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes the cases of every operator, casts included
        cases = collect_testcases("LSTM")
    return [c for c in cases if c.name.startswith("test_lstm")]


@pytest.mark.parametrize("case", onnx_cases(), ids=lambda c: c.name)
def test_onnxs_lstm_cases(implementation, case):
    from onnx import helper

    node = case.model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    (inputs, outputs), *_ = case.data_sets
    named = {k: torch.tensor(v) for k, v in zip(filter(None, node.input), inputs, strict=True)}
    if "P" in named:
        pytest.skip("peepholes: nn.LSTM has none")
    x, w, r = named["X"], named["W"], named["R"]
    batch_first = attributes.get("layout", 0) == 1
    hidden = attributes["hidden_size"]

    def reordered(t):  # ONNX's gates are i, o, f, c
        i, o, f, c = t.chunk(4)
        return torch.cat([i, f, c, o])

    direction = attributes.get("direction", b"forward").decode()
    bidirectional = direction == "bidirectional"
    lstm = ISSLSTM(x.shape[-1], hidden, batch_first=batch_first, bidirectional=bidirectional)
    biases = named.get("B", torch.zeros(len(w), 8 * hidden))
    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")[: len(w)]):
            tensors = (w[d], r[d], *biases[d].chunk(2))
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), tensors):  # noqa: B905
                lstm.get_parameter(f"{name}_l0{suffix}").copy_(reordered(value))
        time = 1 if batch_first else 0
        y, (h, c) = lstm(x.flip(time) if direction == "reverse" else x)
    y = y.flip(time) if direction == "reverse" else y
    # ONNX: Y [T, D, B, H], or [B, T, D, H] with layout 1; Y_h [D, B, H] or [B, D, H].
    y = y.unflatten(-1, (len(w), hidden))
    got = {
        "Y": y if batch_first else y.transpose(1, 2),
        "Y_h": h.transpose(0, 1) if batch_first else h,
        "Y_c": c.transpose(0, 1) if batch_first else c,
    }
    for name, expected in zip(filter(None, node.output), outputs, strict=True):
        torch.testing.assert_close(got[name], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_recompute_saves_no_gates_and_changes_no_bit(backend):
    if backend == "extension" and not is_built():
        pytest.skip("the extension is not built")

    def train(recompute):
        torch.manual_seed(0)
        module = ISSLSTM(5, [6, 4], num_layers=2, bidirectional=True, recompute=recompute)
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(7, 3, 5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, (_, c) = module(x)
        (y.sum() + c[0].square().sum()).backward()
        return sum(saved.values()), [y, *c, *(p.grad for p in module.parameters())]

    with use_backend(backend):
        (whole, expected), (less, result) = train(False), train(True)
    assert all(map(torch.equal, result, expected))
    if backend == "extension":  # gates and cells of 7 * 3 rows in either direction
        assert whole - less == 7 * 3 * 2 * (5 * 6 + 5 * 4) * 4
    else:
        assert less < whole


def test_recompute_goes_where_the_module_goes():
    module = ISSLSTM(3, 4, recompute=True)
    assert "recompute=True" in repr(module)
    assert copy.deepcopy(module).recompute and pickle.loads(pickle.dumps(module)).recompute
    assert not hasattr(module.to_torch(), "recompute")
    assert not ISSLSTM.from_torch(module.to_torch()).recompute
    tagger = accelerate(nn.Sequential(module, Outputs(), nn.Linear(4, 2)))
    small, _ = shrink(tagger, find_groups(tagger, torch.randn(2, 3)), ratio=0.5)
    assert small[0].recompute and small[0].hidden_size == 2
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        ISSLSTM(3, 4, recompute=1)
