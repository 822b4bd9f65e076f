# SPDX-License-Identifier: Apache-2.0
"""accelerate: all that a module has comes along, or is refused before anything changes."""

import collections
import copy
import functools
import pickle
import weakref
from types import MethodType

import pytest
import torch
from kinds import GRU, KINDS, LSTM, every_kind
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from iss_kernels import ISSGRU, ISSLSTM, ISSRNN, accelerate

X = torch.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3)


def model(kind=LSTM):
    return nn.Sequential(collections.OrderedDict(rnn=kind.of_torch(3, 4)))


def run(module):
    """Forward, backward, state_dict out and in."""
    module(X.clone().requires_grad_())[0].sum().backward()
    module.load_state_dict(module.state_dict())


def keyword_hook(*args):
    assert isinstance(args[2], dict)


HOOKS = {
    "forward pre": ("register_forward_pre_hook", {}),
    "forward pre, with_kwargs": ("register_forward_pre_hook", {"with_kwargs": True}),
    "forward": ("register_forward_hook", {}),
    "forward, with_kwargs": ("register_forward_hook", {"with_kwargs": True}),
    "full backward": ("register_full_backward_hook", {}),
    "full backward pre": ("register_full_backward_pre_hook", {}),
    "state_dict pre": ("register_state_dict_pre_hook", {}),
    "state_dict post": ("register_state_dict_post_hook", {}),
    "load_state_dict pre": ("register_load_state_dict_pre_hook", {}),
    "load_state_dict post": ("register_load_state_dict_post_hook", {}),
}


@every_kind
@pytest.mark.parametrize("replace", ["accelerate", "from_torch and to_torch"])
@pytest.mark.parametrize("hooks", list(HOOKS))
def test_every_hook_comes_along(kind, hooks, replace):
    calls = []
    method, options = HOOKS[hooks]

    def hook(module, *args):
        calls.append((module, len(args)))

    net = model(kind)
    old = net.rnn
    handle = getattr(old, method)(hook, **options)
    run(net)
    expected = [count for _, count in calls]
    calls.clear()
    if replace == "accelerate":
        accelerate(net)
    else:
        net.rnn = kind.ours.from_torch(old)
        run(nn.Sequential(net.rnn.to_torch()))
        assert [count for _, count in calls] == expected
        calls.clear()
    run(net)
    assert calls == [(net.rnn, count) for count in expected] and expected
    if replace == "accelerate":
        handle.remove()
        calls.clear()
        run(net)
        assert not calls
    else:  # and the old one goes on with its own
        calls.clear()
        run(nn.Sequential(old))
        assert calls == [(old, count) for count in expected]


def test_a_hook_that_is_always_called_comes_along():
    calls = []
    net = model()
    net.rnn.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    accelerate(net)
    with pytest.raises(RuntimeError):
        net(X[..., :2])
    assert calls


@every_kind
def test_buffers_submodules_parameters_and_attributes_come_along(kind):
    net = model(kind)
    old = net.rnn
    old.register_buffer("scale", torch.ones(1))
    old.register_buffer("draft", torch.ones(1), persistent=False)
    old.register_buffer("none", None)
    old.head = nn.Linear(2, 2).eval()
    old.extra = nn.Parameter(torch.zeros(1))
    old.bias_hh_l0 = old.bias_ih_l0
    old.note = {"name": "encoder"}
    old.flatten_parameters = lambda: None
    state, names = net.state_dict(), [name for name, _ in net.named_parameters()]
    accelerate(net)
    new, y = net.rnn, net(X)[0]
    assert type(new) is kind.ours
    torch.testing.assert_close(y, old(X)[0])
    assert list(net.state_dict()) == list(state)
    assert [name for name, _ in net.named_parameters()] == names
    assert new.scale is old.scale and new.draft is old.draft and new.none is None
    assert new.head is old.head and not new.head.training and new.training
    assert new.extra is old.extra and new.note is old.note
    assert new.bias_hh_l0 is new.bias_ih_l0 is old.bias_ih_l0
    back = new.to_torch()
    assert back.head is old.head and back.note is old.note
    torch.testing.assert_close(back(X)[0], y)


def test_parameters_that_two_lstms_share_stay_shared():
    net = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4)])
    net[1].weight_hh_l0 = net[0].weight_hh_l0
    accelerate(net)
    assert net[1].weight_hh_l0 is net[0].weight_hh_l0 and len(list(net.parameters())) == 7


def test_a_second_call_changes_nothing():
    net = accelerate(model())
    before = net.rnn
    assert accelerate(net).rnn is before and accelerate(before) is before


@pytest.mark.parametrize(
    "container",
    [
        nn.DataParallel,
        nn.Sequential,
        lambda m: nn.ModuleDict({"a": m}),
        lambda m: nn.ModuleList([m]),
    ],
    ids=["DataParallel", "Sequential", "ModuleDict", "ModuleList"],
)
def test_every_container_is_entered(container):
    assert any(type(m) is ISSLSTM for m in accelerate(container(nn.LSTM(3, 4))).modules())


def test_a_model_on_meta_stays_there():
    net = accelerate(nn.Sequential(nn.LSTM(3, 4, device="meta")))
    assert type(net[0]) is ISSLSTM and all(p.is_meta for p in net.parameters())
    assert net(X.to("meta"))[0].shape == (5, 2, 4)
    net.to_empty(device="cpu").load_state_dict(nn.Sequential(nn.LSTM(3, 4)).state_dict())
    assert net(X)[0].isfinite().all()


def test_every_kind_is_replaced_and_the_state_dict_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds = nn.ModuleList(kind.of_torch(3, 3) for kind in KINDS.values())
            self.inner = nn.ModuleList([nn.LSTM(3, 4, 2, dropout=0.5), nn.Linear(4, 2)])
            self.again = self.kinds[1]  # one module in two places stays one

        def forward(self, x):
            for layer in self.kinds:
                x = layer(x)[0]
            return self.inner[1](self.inner[0](x)[0])

    net, calls = Model().eval(), []
    net.again.register_forward_hook(lambda *_: calls.append(1))
    expected, before = net(X), copy.deepcopy(net.state_dict())
    assert accelerate(net) is net
    assert [type(m) for m in net.kinds] == [ISSLSTM, ISSGRU, ISSRNN, ISSRNN]
    assert [m.cell.name for m in net.kinds] == list(KINDS)
    assert type(net.inner[0]) is ISSLSTM and net.inner[0].dropout == 0.5
    assert net.again is net.kinds[1]
    torch.testing.assert_close(net(X), expected)
    assert len(calls) == 2
    after = net.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    for kind in KINDS.values():
        assert type(accelerate(kind.of_torch(3, 4))) is kind.ours


Pair = collections.namedtuple("Pair", "first second")


def test_aliases_in_plain_attributes_and_containers_are_replaced():
    net = model()
    old = net.rnn
    object.__setattr__(net, "alias", old)
    net.layers = [old, {"a": (old, 1)}, Pair(old, frozenset([old]))]
    net.queue, net.set, net.plain = collections.deque([old]), {old}, [nn.Sequential(nn.LSTM(3, 4))]
    old.itself = [old]
    layers = net.layers
    new = accelerate(net).rnn
    assert type(new) is ISSLSTM and net.alias is new and net.layers is layers
    assert layers == [new, {"a": (new, 1)}, Pair(new, frozenset([new]))]
    assert type(layers[2]) is Pair
    assert net.queue[0] is new and net.set == {new} and new.itself == [new]
    assert type(net.plain[0][0]) is ISSLSTM


def test_a_model_that_is_only_referred_to_is_left_alone():
    outer, inner = model(), model()
    inner.outer, inner.call = weakref.ref(outer), outer.forward
    accelerate(inner)
    assert type(inner.rnn) is ISSLSTM and type(outer.rnn) is nn.LSTM


@every_kind
def test_what_is_no_module_of_torch_is_left_alone(kind):
    class Own(kind.torchs):
        pass

    own, base = Own(3, 4, **kind.options), nn.RNNBase("LSTM", 3, 4)
    net = nn.Sequential(own, torch.jit.script(kind.of_torch(3, 4)), base)
    net.proxy = weakref.proxy(net[0])
    kinds = [type(m) for m in accelerate(net)]
    assert kinds[:3] == [Own, torch.jit.RecursiveScriptModule, nn.RNNBase]


def test_a_compiled_model_goes_on_with_the_new_lstm():
    torch.compiler.reset()
    net = model()
    compiled = torch.compile(net, backend="eager")
    y = compiled(X)[0]
    accelerate(compiled)
    assert type(net.rnn) is ISSLSTM
    torch.testing.assert_close(compiled(X)[0], y)
    torch.compiler.reset()


def set_forward(net, rnn):
    rnn.forward = MethodType(lambda self, x: x, rnn)


def delete_weight(net, rnn):
    weight = rnn._parameters.pop("weight_hh_l0")
    rnn.weight_hh_l0 = torch.zeros_like(weight)


def contents(net):
    """Names and identities of all that the modules hold."""
    dicts = [d for m in net.modules() for d in (vars(m), m._modules, m._parameters, m._buffers)]
    return [{name: id(value) for name, value in d.items()} for d in dicts]


CANNOT_COME = {
    "forward": (set_forward, "without an attribute 'forward' of its own"),
    "method": (lambda net, rnn: setattr(rnn, "extra_repr", str), "attribute 'extra_repr'"),
    "name taken": (lambda net, rnn: setattr(rnn, "sizes", 3), "attribute 'sizes'"),
    "compile": (lambda net, rnn: rnn.compile(), "attribute '_compiled_call_impl'"),
    "torch.compile": (lambda net, rnn: setattr(net, "fast", torch.compile(rnn)), "no method"),
    "weight_norm": (
        lambda net, rnn: parametrizations.weight_norm(rnn, "weight_hh_l0"),
        "weight_hh_l0 computed by _WeightNorm; remove that parametrization first",
    ),
    "old weight_norm": (
        lambda net, rnn: weight_norm(rnn, "weight_hh_l0"), "weight_hh_l0 computed by WeightNorm",
    ),
    "spectral_norm": (
        lambda net, rnn: spectral_norm(rnn, "weight_ih_l0"),
        "weight_ih_l0 computed by SpectralNorm",
    ),
    "pruned": (
        lambda net, rnn: prune.l1_unstructured(rnn, "bias_hh_l0", 0.5),
        "bias_hh_l0 computed by L1Unstructured",
    ),
    "weight dropped": (delete_weight, "weight_hh_l0 computed by other code"),
    "other weights in use": (
        lambda net, rnn: rnn._flat_weights.__setitem__(0, torch.zeros(16, 3)),
        "weight_ih_l0 computed by other code",
    ),
    "bound method": (lambda net, rnn: setattr(net, "f", rnn.forward), "got f.__self__"),
    "partial": (lambda net, rnn: setattr(net, "f", functools.partial(rnn)), "got f.func"),
    "argument of a partial": (
        lambda net, rnn: setattr(net, "f", functools.partial(print, 1, (rnn, 2))), "got f.1",
    ),
    "key": (lambda net, rnn: setattr(net, "names", {rnn: "second"}), "got names"),
    "weak reference": (lambda net, rnn: setattr(net, "f", [weakref.ref(rnn)]), "got f.0.()"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old weight_norm
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
@pytest.mark.parametrize("change", list(CANNOT_COME))
def test_what_cannot_come_along_is_refused_and_nothing_changes(kind, change):
    change, message = CANNOT_COME[change]
    second = kind.of_torch(3, 4)
    net = nn.Sequential(collections.OrderedDict(first=nn.LSTM(3, 3), second=second))
    net.first.register_load_state_dict_pre_hook(lambda *_: None)
    net.aliases = [net.first, net.second]
    change(net, net.second)
    before = contents(net)
    with pytest.raises(ValueError) as got:
        accelerate(net)
    text = str(got.value)
    assert text.startswith("accelerate: expected ") and message in text
    assert "second" in text or "that holds a recurrent module" in text
    assert contents(net) == before
    assert net.aliases == [net.first, net.second]
    net.first.load_state_dict(net.first.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_kind
@pytest.mark.parametrize("change", ["forward", "weight_norm", "old weight_norm", "pruned"])
def test_from_torch_and_to_torch_refuse_it_too(kind, change):
    change, message = CANNOT_COME[change]
    convert = {kind.of_torch: kind.ours.from_torch, kind: kind.ours.to_torch}
    for make, function in convert.items():
        rnn = make(3, 4)
        change(None, rnn)
        with pytest.raises(ValueError) as got:
            function(rnn)
        name = kind.torchs.__name__
        assert str(got.value).startswith(f"{function.__name__}: expected the {name} ")
        assert message in str(got.value)


@every_kind
def test_a_subclass_would_lose_its_methods(kind):
    class Own(kind.torchs):
        pass

    class Ours(kind.ours):
        pass

    either = f"nn.{kind.torchs.__name__} or {kind.ours.__name__} itself, got a"
    with pytest.raises(ValueError, match=f"from_torch: .* {either} Own"):
        kind.ours.from_torch(Own(3, 4))
    with pytest.raises(ValueError, match=f"to_torch: .* {either} Ours"):
        Ours(3, 4).to_torch()
    assert type(Ours.from_torch(kind.of_torch(3, 4))) is Ours


# -- code that looks for an RNN --------------------------------------------------------------------


@every_kind
def test_initialisers_find_an_rnn_base(kind):
    ours = kind(3, 4, num_layers=2, bidirectional=True)
    torchs = kind.of_torch(3, 4, num_layers=2, bidirectional=True)
    assert isinstance(ours, nn.RNNBase) and not isinstance(ours, kind.torchs)
    assert ours.mode == torchs.mode and ours._flat_weights_names == torchs._flat_weights_names
    assert [w.shape for w in ours._flat_weights] == [w.shape for w in torchs._flat_weights]
    with torch.no_grad():
        for weight in ours._flat_weights:
            weight.fill_(0.5)
    assert all((p == 0.5).all() for p in ours.parameters())
    replacement = nn.Parameter(torch.zeros_like(ours.weight_ih_l0))
    ours.weight_ih_l0 = replacement
    assert ours._flat_weights[0] is replacement and ours.all_weights[0][0] is replacement


@every_kind
def test_nothing_inherited_keeps_old_weights(kind):
    rnn = kind(3, [4, 2], num_layers=2)
    rnn(X)
    rnn._init_flat_weights()
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), copy.copy(rnn)):
        twin.double()
        assert {w.dtype for w in twin._flat_weights} == {torch.float64}
        assert twin(X.double())[0].dtype == torch.float64
    replica = rnn._replicate_for_data_parallel()
    assert "_flat_weights" not in vars(replica)


def test_dynamic_quantisation_leaves_it_as_it_is():
    net = accelerate(nn.Sequential(nn.LSTM(3, 4)))
    with pytest.warns(DeprecationWarning):
        quantised = torch.ao.quantization.quantize_dynamic(net, {nn.LSTM, nn.Linear})
    assert type(quantised[0]) is ISSLSTM and torch.equal(quantised(X)[0], net(X)[0])


@pytest.mark.parametrize("called", [False, True])
def test_a_new_dtype_may_swap_the_parameters(called):
    lstm = ISSLSTM(3, 4)
    if called:
        lstm(X)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        before = lstm.weight_ih_l0
        lstm.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert lstm.weight_ih_l0 is before and before.dtype == torch.float64
    assert lstm(X.double())[0].dtype == torch.float64


def test_a_closure_over_a_module_holds_the_new_one_and_one_of_another_model_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            lstm = self.lstm = nn.LSTM(3, 4)
            self.run = lambda x: lstm(x)[0]
            self.again = lambda x, layers=(lstm,): layers[0](x)[0]

        def forward(self, x):
            return self.run(x) + self.again(x)

    model, other, x = Model(), Model(), torch.randn(5, 2, 3)
    teacher = nn.LSTM(3, 4)
    model.teach = lambda x: teacher(x)[0]
    accelerate(model)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-6)
    assert type(teacher) is nn.LSTM and torch.equal(model.teach(x), teacher(x)[0])
