# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM, ISSGRU and ISSRNN are torch's: torch's module inputs, ONNX's cases, every input form;
and what they add."""

import copy
import functools
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from kinds import GRU, KINDS, LSTM, assert_same, every_kind, tensors_in, with_gradients
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db

from iss_kernels import ISSLSTM, ISSRNN, accelerate, find_groups, shrink
from iss_kernels.backend import is_built, use_backend
from iss_kernels.testing import assert_no_worse_than_torch

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

INFOS = {info.module_cls: info for info in module_db}


def module_inputs(kind, dtype, training):
    """torch's own for the module; nn.RNN's have both nonlinearities."""
    info = INFOS[kind.torchs]
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    return [i for i in inputs if kind.options.items() <= i.constructor_input.kwargs.items()]


MODULE_INPUTS = [
    pytest.param(kind, index, id=f"{name}-{index}")
    for name, kind in KINDS.items()
    for index in range(len(module_inputs(kind, torch.float32, True)))
]


class Outputs(nn.Module):
    """Of a recurrent module's results, y."""

    def forward(self, result):
        return result[0]


@pytest.mark.parametrize(("kind", "index"), MODULE_INPUTS)
def test_torchs_own_module_inputs(implementation, dtype, kind, index):
    """Outputs and all gradients: error at most twice torch's; float64 to rounding."""
    training = index % 2 == 0  # nothing but dropout differs, and these have none
    given = module_inputs(kind, dtype, training)[index]
    options = given.constructor_input.kwargs
    torchs, ours = kind.pair(dtype=dtype, **{k: options[k] for k in options.keys() - kind.options})
    torchs.train(training), ours.train(training)
    args = given.forward_input.args
    results = with_gradients(ours, args), with_gradients(torchs, args)
    if dtype == torch.float64:
        assert_same(*results)
        return
    truth = with_gradients(copy.deepcopy(torchs).double(), args, torch.float64)
    largest = max(1.0, *(t.abs().max().item() for t in tensors_in(args)))
    for a, b, t in zip(*results, truth, strict=True):
        assert a.dtype == b.dtype
        # The inputs go up to 7, by which a gradient multiplies an error of a saturated gate.
        assert_no_worse_than_torch(a, b, t, floor_eps=8 * largest)


FORMS = [
    pytest.param(kind, *form, id="-".join(map(str, (name, *form))))
    for name, kind in KINDS.items()
    for form in itertools.product([False, True], [False, True], [0, 3], [1, 2])
    if kind.projects or form[2] == 0
]


@pytest.mark.parametrize(("kind", "batch_first", "bidirectional", "proj", "num_layers"), FORMS)
def test_every_batched_input_form(kind, batch_first, bidirectional, proj, num_layers):
    options = {"proj_size": proj} if proj else {}
    torchs, ours = kind.pair(
        5, 6, num_layers, batch_first=batch_first, bidirectional=bidirectional, **options,
        dtype=torch.float64,
    )  # fmt: skip
    directions = 2 if bidirectional else 1

    def states(batch):
        return kind.random_hx(num_layers * directions, batch, hidden=6, proj=proj)

    def batch_of(t, b):
        return torch.randn(*((b, t) if batch_first else (t, b)), 5).double()

    ragged = [torch.randn(n, 5).double() for n in (2, 7, 4)]
    sorted_ = sorted(ragged, key=len, reverse=True)
    for args in (
        (batch_of(4, 3),),
        (batch_of(4, 3), states(3)),
        (batch_of(5, 0), states(0)),
        (batch_of(5, 0),),
        (torch.randn(4, 5).double(), kind.random_hx(num_layers * directions, hidden=6, proj=proj)),
        (pack_sequence(ragged, enforce_sorted=False),),
        (pack_sequence(ragged, enforce_sorted=False), states(3)),
        (pack_sequence(sorted_), states(3)),
        (pack_padded_sequence(batch_of(4, 2), torch.tensor([4, 1]), batch_first), states(2)),
        (batch_of(4, 6)[:, ::2] if not batch_first else batch_of(6, 4)[:, ::2],),  # strided
    ):
        assert_same(with_gradients(ours, args), with_gradients(torchs, args))
        if isinstance(args[0], PackedSequence):
            for a, b in zip(ours(*args)[0][1:], torchs(*args)[0][1:], strict=True):
                assert a is b is None or torch.equal(a, b)


@every_kind
def test_dropout_between_layers_draws_the_same_masks_as_torchs(kind):
    torchs, ours = kind.pair(5, 6, 3, dropout=0.5, dtype=torch.float64)
    x = torch.randn(4, 3, 5).double()
    assert_same(with_gradients(ours, (x,)), with_gradients(torchs, (x,)))
    torchs.eval(), ours.eval()
    torch.testing.assert_close(ours(x)[0], torchs(x)[0], rtol=1e-12, atol=1e-12)


@every_kind
def test_the_same_seed_initialises_the_same_parameters(kind):
    some = {"num_layers": 2, "bidirectional": True, "bias": False}
    some |= {"proj_size": 2} if kind.projects else {}
    for options in ({}, some):
        torch.manual_seed(11)
        torchs = kind.of_torch(3, 5, **options)
        torch.manual_seed(11)
        ours = kind(3, 5, **options)
        a, b = dict(ours.named_parameters()), dict(torchs.named_parameters())
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
        assert [[p.shape for p in layer] for layer in ours.all_weights] == [
            [p.shape for p in layer] for layer in torchs.all_weights
        ]
        assert ours.extra_repr() == torchs.extra_repr()


@every_kind
def test_attributes_are_torchs(kind):
    torchs = kind.of_torch(3, 4, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True)
    ours = kind.ours.from_torch(torchs)
    names = [n for n in vars(torchs) if not n.startswith("_") and n != "training"]
    assert {"mode", "input_size", "hidden_size", "proj_size", "bidirectional"} <= set(names)
    assert {n: getattr(ours, n) for n in names} == {n: getattr(torchs, n) for n in names}


def test_the_nonlinearity_is_that_of_the_mode_which_torch_goes_by():
    torchs = nn.RNN(3, 4)
    torchs.nonlinearity = "relu"  # too late: nothing reads it
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ISSRNN.from_torch(torchs)(x), torchs(x))


@every_kind
def test_state_dicts_load_both_ways(kind):
    torchs, ours = kind.of_torch(3, 4, 2), kind(3, 4, 2)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), torchs(x))
    ours.load_state_dict(kind.of_torch(3, 4, 2).state_dict())


@every_kind
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_from_torch_and_to_torch_share_the_parameters(kind, options):
    if kind.projects and "bidirectional" in options:
        options = options | {"proj_size": 2}
    torchs = kind.of_torch(3, 4, num_layers=2, dropout=0.25, batch_first=True, **options).eval()
    ours = kind.ours.from_torch(torchs)
    back = ours.to_torch()
    assert type(back) is kind.torchs and not ours.training and not back.training
    assert repr(back) == repr(torchs) == repr(ours).replace("ISS", "")
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(back(x), torchs(x))
    for name, parameter in torchs.named_parameters():
        assert ours.get_parameter(name) is parameter and back.get_parameter(name) is parameter


@every_kind
def test_deepcopy_and_pickle(kind):
    ours = kind(3, [4, 2], num_layers=2)
    x = torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x)[0], ours(x)[0])
        assert twin.weight_ih_l0 is not ours.weight_ih_l0 and twin.sizes == ours.sizes


@every_kind
def test_device_dtype_and_flatten_parameters(kind):
    ours = kind(3, 4, device="meta", dtype=torch.float64)
    assert ours.weight_ih_l0.is_meta and ours.weight_ih_l0.dtype == torch.float64
    kind(3, 4).flatten_parameters()
    y, states = ours(torch.empty(5, 2, 3, device="meta", dtype=torch.float64))
    assert y.shape == (5, 2, 4) and y.is_meta
    assert all(s.shape == (1, 2, 4) and s.is_meta for s in tensors_in(states))


@every_kind
@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_one_tensor_left_on_meta_is_named(kind, backend, training):
    """torch takes a mix with meta for a question about shapes; the answer would be garbage."""
    letters = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    x, state = torch.randn(5, 2, 3), torch.zeros(2, 2, 4)
    with use_backend(backend), torch.set_grad_enabled(training):
        for name, letter in letters.items():
            module = kind(3, 4, num_layers=2)
            weights = module.state_dict()
            with torch.device("meta"):
                module = kind(3, 4, num_layers=2)
            del weights[name + "_l1"]
            module.load_state_dict(weights, strict=False, assign=True)
            with pytest.raises(RuntimeError, match=f"expected {letter} on cpu, got meta"):
                module(x)
        module = kind(3, 4, num_layers=2)
        with pytest.raises(RuntimeError, match="expected h0 on cpu, got meta"):
            module(x, kind.hx(state.to("meta"), state))
        if kind is LSTM:
            with pytest.raises(RuntimeError, match="expected c0 on cpu, got meta"):
                module(x, (state, state.to("meta")))
        with pytest.raises(RuntimeError, match="expected w_ih on meta, got cpu"):
            module(x.to("meta"))


class Wrapped(torch.Tensor):
    """A subclass without a behaviour of its own."""


def inputs_of_every_kind(kind=LSTM):
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    imaginary = torch.complex(torch.zeros(5, 2, 3), x).conj().imag  # stored without its sign
    packed = pack_padded_sequence(x, [5, 3], enforce_sorted=False)
    inputs = {
        "negative bit": (imaginary, torch.complex(h, h).conj().imag),
        "subclass": (x.as_subclass(Wrapped), h.as_subclass(Wrapped)),
        "parameter": (nn.Parameter(x), nn.Parameter(h)),
        "expanded": (x[:1].expand(5, 2, 3), h[:, :1].expand(1, 2, 4)),
        "indices twice": (packed._replace(sorted_indices=torch.tensor([1, 1])), h),
    }
    inputs = {name: (x, kind.hx(h, c)) for name, (x, h) in inputs.items()}
    return inputs | {"list": (x, [h, c])} if kind is LSTM else inputs


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS.values() for name in inputs_of_every_kind(kind)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_inputs_of_every_kind(implementation, kind, name):
    torchs, ours = kind.pair(3, 4)
    args = inputs_of_every_kind(kind)[name]
    for a, b in zip(tensors_in(ours(*args)), tensors_in(torchs(*args)), strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(a, b)


def refused_inputs(kind=LSTM):
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    packed = pack_padded_sequence(x, [5, 3], enforce_sorted=False)
    state = kind.hx(h, c)
    inputs = {
        "conjugate": (torch.complex(x, x).conj(), None),
        "sparse": (x.to_sparse(), None),
        "nested": (torch.nested.nested_tensor([x[:, 0], x[:3, 1]], layout=torch.jagged), None),
        "three states": (x, (h, c, c)),
        "one state in a tuple": (x, (h,)),
        "no state": (x, ()),
        "None": (x, (h, None)),
        "integers": (x, kind.hx(h.long(), c.long())),
        "another dtype": (x, kind.hx(h.double(), c)),
        "index too large": (packed._replace(sorted_indices=torch.tensor([0, 7])), state),
        "one index": (packed._replace(sorted_indices=torch.tensor([0])), state),
        "float indices": (packed._replace(sorted_indices=torch.tensor([0.0, 1.0])), state),
        "too few rows": (packed._replace(data=packed.data[:-1]), None),
        "growing": (packed._replace(batch_sizes=torch.tensor([1, 2, 2, 2, 1])), None),
        "negative": (packed._replace(batch_sizes=torch.tensor([2, -2, 8])), None),
    }
    return inputs | {"two states": (x, (h, c))} if kind is not LSTM else inputs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS.values() for name in refused_inputs(kind)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_inputs_that_torch_refuses_are_refused(implementation, kind, name):
    for module in kind.pair(3, 4):
        args = refused_inputs(kind)[name]
        with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError, TypeError)):
            module(*args)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_no_call(implementation, kind, dtype):
    module, x = kind(3, [4, 2], num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [5, 3])
    calls = (
        lambda: module(x),
        lambda: module(packed),
        lambda: module(x, lengths=[3, 4], resets=x[..., 0] > 0),
    )
    expected = [call() for call in calls]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = [call() for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(tensors_in(got), tensors_in(expected), strict=True):
        assert torch.equal(a, b)


@every_kind
def test_a_graph_serves_as_often_as_torchs_own(kind):
    module, x = kind(3, 4, num_layers=2), torch.randn(5, 2, 3, requires_grad=True)
    y, _ = module(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    for changed in ("y", "x", "weight_hh_l0"):
        leaf = torch.randn(5, 2, 3, requires_grad=True)
        x = leaf * 1
        y, _ = module(x)
        loss = y.sum()
        with torch.no_grad():
            {"y": y, "x": x}.get(changed, module.weight_hh_l0).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_kind
def test_second_derivatives_are_torchs(implementation, kind):
    torchs, ours = kind.pair(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 3).double()
    results = []
    for module in (ours, torchs):
        x = x.detach().requires_grad_()
        y, states = module(x)
        loss = y.square().sum() + sum(s.sin().sum() for s in tensors_in(states))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, *module.parameters()])
        results.append([first, *second])
    assert_same(*results, rtol=1e-10, atol=1e-10)


@every_kind
def test_third_derivatives_are_torchs(implementation, kind):
    torchs, ours = kind.pair(3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3).double()
    results = []
    for module in (ours, torchs):
        at = x.detach().requires_grad_()
        value = module(at)[0].pow(3).sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        third = torch.autograd.grad(value.square().sum(), [at, *module.parameters()])
        vector = torch.ones_like(x)
        loss = lambda q, module=module: module(q)[0].square().sum()  # noqa: E731
        results.append([*third, torch.autograd.functional.hvp(loss, x, vector)[1]])
    assert_same(*results, rtol=1e-10, atol=1e-10)


@every_kind
def test_gradients_are_tensors_of_their_own(kind):
    """What changes one of them in place, as a hook may, leaves the others alone."""
    _, ours = kind.pair(3, 4)
    y, _ = ours(torch.randn(5, 2, 3))
    parameters = list(ours.parameters())
    grads = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    assert len({g.data_ptr() for g in grads}) == len(grads)
    for parameter in parameters:
        parameter.register_hook(lambda g: g.mul_(0.5))
    y.square().sum().backward()
    for parameter, whole in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, whole * 0.5)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
def test_states_are_detached_in_place(kind, layers):
    """As truncated backpropagation through time does it."""
    _, ours = kind.pair(3, 4, layers)
    _, states = ours(torch.randn(5, 2, 3))
    for state in tensors_in(states):
        assert state.requires_grad
        state.detach_()
        assert not state.requires_grad


def test_a_tangent_that_the_forward_did_not_see_is_refused():
    _, ours = GRU.pair(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    y, _ = ours(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="gru: expected gradients without a tangent"):
            torch.autograd.grad(y, x, dual)


@every_kind
@pytest.mark.parametrize("form", ["padded", "packed", "packed with a state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_returns_the_dtypes_of_torchs_for_every_form(implementation, kind, dtype, form):
    torchs, ours = kind.pair(3, 4, dtype=dtype)
    x, hx = torch.randn(5, 2, 3, dtype=dtype), kind.hx(*torch.zeros(2, 1, 2, 4, dtype=dtype))
    results = []
    for module in (ours, torchs):
        given = x if form == "padded" else pack_padded_sequence(x, [5, 3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                y, states = module(given, hx if "state" in form else None)
            except RuntimeError:  # nn.LSTM, where oneDNN has no bfloat16 LSTM
                pytest.skip("torch cannot")
        y = y if isinstance(y, torch.Tensor) else y.data
        results.append([t.dtype for t in (y, *tensors_in(states))])
    assert results[0] == results[1]


@every_kind
def test_autocast_returns_the_dtype_of_torchs(implementation, kind):
    torchs, ours = kind.pair(3, 4, 2)
    x = torch.randn(5, 2, 3)
    for given in (x, x.bfloat16()):
        resets = torch.zeros(5, 2, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = tensors_in(ours(given, resets=resets))
            # nn.LSTM fails where oneDNN has no bfloat16 LSTM (without AVX-512).
            expected = torch.bfloat16 if kind is LSTM else torchs(given)[0].dtype
        for a, b in zip(result, tensors_in(torchs(given.float())), strict=True):
            assert a.dtype == expected
            torch.testing.assert_close(a.float(), b, rtol=0, atol=2**-8)
        sum(t.float().sum() for t in result).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@every_kind
def test_parametrised_weights_are_used(implementation, kind):
    torchs, ours = kind.pair(3, 4, 2, dtype=torch.float64)
    for module in (torchs, ours):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l1")
    x = torch.randn(5, 2, 3).double()
    assert_same(with_gradients(ours, (x,)), with_gradients(torchs, (x,)))


# -- beyond torch's --------------------------------------------------------------------------------


def chained(kind, ours, x, hx):
    """The same network out of one-layer, one-direction modules of torch: y, then all h, all c."""
    finals = []
    for layer, sizes in enumerate(ours.sizes):
        outputs = []
        for direction, (h, p) in enumerate(sizes):
            suffix = f"_l{layer}" + "_reverse" * direction
            options = {"proj_size": p} if p != h else {}
            single = kind.of_torch(x.shape[-1], h, dtype=x.dtype, **options)
            for name in dict(single.named_parameters()):
                setattr(single, name, ours.get_parameter(name.replace("_l0", suffix)))
            state = hx and [part[len(finals)][None] for part in hx]
            state = state and kind.hx(*(state if len(state) == 2 else (state[0], None)))
            y, last = single(x.flip(0) if direction else x, state)
            outputs.append(y.flip(0) if direction else y)
            finals.append([s[0] for s in tensors_in(last)])
        x = torch.cat(outputs, -1)
    return [x, *(state for part in zip(*finals, strict=True) for state in part)]


SIZES = [
    pytest.param(kind, *sizes, id="-".join(map(str, (name, *sizes))))
    for name, kind in KINDS.items()
    for sizes in (
        ([5, 3], 0, False), ([4, (2, 6)], 0, True), ([(5, 4), 6], [(2, 3), 2], True),
        (4, [2, 3], False),
    )
    if kind.projects or not sizes[1]
]  # fmt: skip


@pytest.mark.parametrize(("kind", "hidden", "proj", "bidirectional"), SIZES)
def test_a_size_per_layer_and_direction(kind, hidden, proj, bidirectional):
    options = {"proj_size": proj} if proj else {}
    ours = kind(
        3, hidden, num_layers=2, bidirectional=bidirectional, dtype=torch.float64, **options
    )
    x = torch.randn(6, 4, 3).double()
    y, hx = ours(x)
    parts = hx if kind is LSTM else (hx,)
    assert any(isinstance(part, tuple) for part in parts)

    def flat(y, states):
        return [y, *(row for part in (states if kind is LSTM else (states,)) for row in part)]

    assert_same(flat(y, hx), chained(kind, ours, x, None))
    again = ours(x, hx)  # hx takes the form that final states come in
    assert_same(flat(*again), chained(kind, ours, x, parts))
    alone, one = ours(x[:, 1])
    torch.testing.assert_close(alone, y[:, 1], rtol=1e-12, atol=1e-12)
    for a, b in zip(tensors_in(one), tensors_in(hx), strict=True):
        torch.testing.assert_close(a, b[..., 1, :], rtol=1e-12, atol=1e-12)
    assert_same(tensors_in(ours(x[:, 1], one)), [t[..., 1, :] for t in tensors_in(again)])


@every_kind
def test_equal_sizes_in_a_list_are_torchs(kind):
    ours, name = kind(3, [4, 4], num_layers=2), kind.ours.__name__
    assert ours.hidden_size == 4 and isinstance(ours.to_torch(), kind.torchs)
    assert repr(ours) == f"{name}(3, 4, num_layers=2)"
    assert repr(kind(3, [4, 2], num_layers=2)) == f"{name}(3, [4, 2], num_layers=2)"


@every_kind
def test_packed_and_unequal_sizes_together(kind):
    ours = kind(3, [4, 2], num_layers=2, dtype=torch.float64)
    ragged = [torch.randn(n, 3).double() for n in (2, 5, 3)]
    packed, states = ours(pack_sequence(ragged, enforce_sorted=False))
    for i, x in enumerate(ragged):
        for a, b in zip(tensors_in(ours(x)[1]), tensors_in(states), strict=True):
            torch.testing.assert_close(a, b[i])


# -- ONNX ------------------------------------------------------------------------------------------


@functools.cache
def onnx_cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes the cases of every operator, casts included
        cases = collect_testcases()
    return [
        c
        for c in cases
        if c.name.startswith(("test_lstm", "test_gru", "test_simple_rnn", "test_rnn"))
    ]


ONNX_GATES = {  # where torch's gates stand among ONNX's: i, o, f, c and z, r, h
    "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,),
}  # fmt: skip


def run_onnx(operator, attributes, named):
    """{output: value} of an ONNX node by our module with its weights."""
    kind = KINDS[{"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[operator]]
    x, w, r = named["X"], named["W"], named["R"]
    batch_first, hidden = attributes.get("layout", 0) == 1, attributes["hidden_size"]
    direction = attributes.get("direction", b"forward").decode()
    module = kind(
        x.shape[-1], hidden, batch_first=batch_first, bidirectional=direction == "bidirectional"
    )

    def reordered(t):
        chunks = t.chunk(kind.gates)
        return torch.cat([chunks[gate] for gate in ONNX_GATES[operator]])

    biases = named.get("B", torch.zeros(len(w), 2 * kind.gates * hidden))
    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")[: len(w)]):
            tensors = (w[d], r[d], *biases[d].chunk(2))
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), tensors):  # noqa: B905
                module.get_parameter(f"{name}_l0{suffix}").copy_(reordered(value))
        time = 1 if batch_first else 0
        y, states = module(x.flip(time) if direction == "reverse" else x)
    y = y.flip(time) if direction == "reverse" else y
    # ONNX: Y [T, D, B, H], or [B, T, D, H] with layout 1; Y_h [D, B, H] or [B, D, H].
    y = y.unflatten(-1, (len(w), hidden))
    states = [s.transpose(0, 1) if batch_first else s for s in tensors_in(states)]
    return {"Y": y if batch_first else y.transpose(1, 2)} | dict(
        zip(("Y_h", "Y_c"), states, strict=False)
    )


@pytest.mark.parametrize("case", onnx_cases(), ids=lambda c: c.name)
def test_onnxs_cases(implementation, case):
    from onnx import helper

    node = case.model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    (inputs, outputs), *_ = case.data_sets
    named = {k: torch.tensor(v) for k, v in zip(filter(None, node.input), inputs, strict=True)}
    if "P" in named:
        pytest.skip("peepholes: nn.LSTM has none")
    # nn.GRU is linear_before_reset=1; 0 is the same where r is one number for all units of a row,
    # as it is where all units have the same weights.
    weights = (named["R"], named["W"])
    if node.op_type == "GRU" and any((t != t[:, :1, :1]).any() for t in weights):
        pytest.skip("linear_before_reset=0 with units that differ: nn.GRU has no such")
    got = run_onnx(node.op_type, attributes, named)
    for name, expected in zip(filter(None, node.output), outputs, strict=True):
        torch.testing.assert_close(got[name], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def onnx_gru(x, w, r, b, linear_before_reset):
    """ONNX's GRU of one direction by its specification: x [T, B, I] -> Y [T, B, H]."""
    (w_z, w_r, w_h), (r_z, r_r, r_h) = np.split(w, 3), np.split(r, 3)
    wb_z, wb_r, wb_h, rb_z, rb_r, rb_h = np.split(b, 6)
    h, outputs = np.zeros((x.shape[1], len(r_z))), []
    for x_t in x:
        z = 1 / (1 + np.exp(-(x_t @ w_z.T + h @ r_z.T + wb_z + rb_z)))
        reset = 1 / (1 + np.exp(-(x_t @ w_r.T + h @ r_r.T + wb_r + rb_r)))
        if linear_before_reset:
            n = np.tanh(x_t @ w_h.T + reset * (h @ r_h.T + rb_h) + wb_h)
        else:
            n = np.tanh(x_t @ w_h.T + (reset * h) @ r_h.T + rb_h + wb_h)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_onnxs_gru_with_linear_before_reset(implementation, direction):
    random = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1
    x = random.standard_normal((4, 3, 2))
    w, r, b = (random.standard_normal((directions, 15, n)) for n in (2, 5, 2))
    b = b.reshape(directions, 30)
    expected = []
    for d, turned in enumerate({"forward": [1], "reverse": [-1]}.get(direction, [1, -1])):
        expected.append(onnx_gru(x[::turned], w[d], r[d], b[d], linear_before_reset=1)[::turned])
        other = onnx_gru(x[::turned], w[d], r[d], b[d], linear_before_reset=0)[::turned]
        assert abs(other - expected[-1]).max() > 0.01
    named = {k: torch.tensor(v, dtype=torch.float32) for k, v in dict(X=x, W=w, R=r, B=b).items()}
    attributes = {"hidden_size": 5, "direction": direction.encode()}
    got = run_onnx("GRU", attributes, named)["Y"]
    torch.testing.assert_close(
        got.double(), torch.tensor(np.stack(expected, 1)), rtol=1e-5, atol=1e-5
    )


@every_kind
@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_recompute_saves_no_gates_and_changes_no_bit(kind, backend):
    if backend == "extension" and not is_built():
        pytest.skip("the extension is not built")

    def train(recompute):
        torch.manual_seed(0)
        module = kind(5, [6, 4], num_layers=2, bidirectional=True, recompute=recompute)
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(7, 3, 5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, states = module(x, resets=x[..., 0] > 1)
        last = tensors_in(states)
        (y.sum() + last[-2].square().sum()).backward()
        return sum(saved.values()), [y, *last, *(p.grad for p in module.parameters())]

    with use_backend(backend):
        (whole, expected), (less, result) = train(False), train(True)
    assert all(map(torch.equal, result, expected))
    if backend == "extension":  # what is saved of 7 * 3 rows in either direction
        row = kind(1, 1).cell.saved_gates + kind(1, 1).cell.saved_states
        assert whole - less == 7 * 3 * 2 * row * (6 + 4) * 4
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
