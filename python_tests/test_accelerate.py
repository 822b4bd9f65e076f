# SPDX-License-Identifier: Apache-2.0
"""accelerate: all that an LSTM has comes along, or is refused before anything changes."""

import collections
import copy
import functools
import pickle
import weakref
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from iss_kernels import ISSLSTM, accelerate

X = torch.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3)


def model():
    return nn.Sequential(collections.OrderedDict(lstm=nn.LSTM(3, 4)))


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


@pytest.mark.parametrize("replace", ["accelerate", "from_torch and to_torch"])
@pytest.mark.parametrize("kind", list(HOOKS))
def test_every_hook_comes_along(kind, replace):
    calls = []
    method, options = HOOKS[kind]

    def hook(module, *args):
        calls.append((module, len(args)))

    net = model()
    old = net.lstm
    handle = getattr(old, method)(hook, **options)
    run(net)
    expected = [count for _, count in calls]
    calls.clear()
    if replace == "accelerate":
        accelerate(net)
    else:
        net.lstm = ISSLSTM.from_torch(old)
        run(nn.Sequential(net.lstm.to_torch()))
        assert [count for _, count in calls] == expected
        calls.clear()
    run(net)
    assert calls == [(net.lstm, count) for count in expected] and expected
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
    net.lstm.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    accelerate(net)
    with pytest.raises(RuntimeError):
        net(X[..., :2])
    assert calls


def test_buffers_submodules_parameters_and_attributes_come_along():
    net = model()
    lstm = net.lstm
    lstm.register_buffer("scale", torch.ones(1))
    lstm.register_buffer("draft", torch.ones(1), persistent=False)
    lstm.register_buffer("none", None)
    lstm.head = nn.Linear(2, 2).eval()
    lstm.extra = nn.Parameter(torch.zeros(1))
    lstm.bias_hh_l0 = lstm.bias_ih_l0
    lstm.note = {"name": "encoder"}
    lstm.flatten_parameters = lambda: None
    state, names = net.state_dict(), [name for name, _ in net.named_parameters()]
    accelerate(net)
    new, y = net.lstm, net(X)[0]
    assert type(new) is ISSLSTM
    torch.testing.assert_close(y, lstm(X)[0])
    assert list(net.state_dict()) == list(state)
    assert [name for name, _ in net.named_parameters()] == names
    assert new.scale is lstm.scale and new.draft is lstm.draft and new.none is None
    assert new.head is lstm.head and not new.head.training and new.training
    assert new.extra is lstm.extra and new.note is lstm.note
    assert new.bias_hh_l0 is new.bias_ih_l0 is lstm.bias_ih_l0
    back = new.to_torch()
    assert back.head is lstm.head and back.note is lstm.note
    torch.testing.assert_close(back(X)[0], y)


def test_parameters_that_two_lstms_share_stay_shared():
    net = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4)])
    net[1].weight_hh_l0 = net[0].weight_hh_l0
    accelerate(net)
    assert net[1].weight_hh_l0 is net[0].weight_hh_l0 and len(list(net.parameters())) == 7


def test_a_second_call_changes_nothing():
    net = accelerate(model())
    before = net.lstm
    assert accelerate(net).lstm is before and accelerate(before) is before


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


Pair = collections.namedtuple("Pair", "first second")


def test_aliases_in_plain_attributes_and_containers_are_replaced():
    net = model()
    old = net.lstm
    object.__setattr__(net, "alias", old)
    net.layers = [old, {"a": (old, 1)}, Pair(old, frozenset([old]))]
    net.queue, net.set, net.plain = collections.deque([old]), {old}, [nn.Sequential(nn.LSTM(3, 4))]
    old.itself = [old]
    layers = net.layers
    new = accelerate(net).lstm
    assert type(new) is ISSLSTM and net.alias is new and net.layers is layers
    assert layers == [new, {"a": (new, 1)}, Pair(new, frozenset([new]))]
    assert type(layers[2]) is Pair
    assert net.queue[0] is new and net.set == {new} and new.itself == [new]
    assert type(net.plain[0][0]) is ISSLSTM


def test_a_model_that_is_only_referred_to_is_left_alone():
    outer, inner = model(), model()
    inner.outer, inner.call = weakref.ref(outer), outer.forward
    accelerate(inner)
    assert type(inner.lstm) is ISSLSTM and type(outer.lstm) is nn.LSTM


def test_what_is_no_lstm_of_torch_is_left_alone():
    class Own(nn.LSTM):
        pass

    net = nn.Sequential(Own(3, 4), torch.jit.script(nn.LSTM(3, 4)))
    net.proxy = weakref.proxy(net[0])
    kinds = [type(m) for m in accelerate(net)]
    assert kinds[0] is Own and kinds[1] is torch.jit.RecursiveScriptModule


def test_a_compiled_model_goes_on_with_the_new_lstm():
    torch.compiler.reset()
    net = model()
    compiled = torch.compile(net, backend="eager")
    y = compiled(X)[0]
    accelerate(compiled)
    assert type(net.lstm) is ISSLSTM
    torch.testing.assert_close(compiled(X)[0], y)
    torch.compiler.reset()


def set_forward(net, lstm):
    lstm.forward = MethodType(lambda self, x: x, lstm)


def delete_weight(net, lstm):
    lstm._parameters.pop("weight_hh_l0")
    lstm.weight_hh_l0 = torch.zeros(16, 4)


def contents(net):
    """Names and identities of all that the modules hold."""
    dicts = [d for m in net.modules() for d in (vars(m), m._modules, m._parameters, m._buffers)]
    return [{name: id(value) for name, value in d.items()} for d in dicts]


CANNOT_COME = {
    "forward": (set_forward, "without an attribute 'forward' of its own"),
    "method": (lambda net, lstm: setattr(lstm, "extra_repr", str), "attribute 'extra_repr'"),
    "name taken": (lambda net, lstm: setattr(lstm, "sizes", 3), "attribute 'sizes'"),
    "compile": (lambda net, lstm: lstm.compile(), "attribute '_compiled_call_impl'"),
    "torch.compile": (lambda net, lstm: setattr(net, "fast", torch.compile(lstm)), "no method"),
    "weight_norm": (
        lambda net, lstm: parametrizations.weight_norm(lstm, "weight_hh_l0"),
        "weight_hh_l0 computed by _WeightNorm; remove that parametrization first",
    ),
    "old weight_norm": (
        lambda net, lstm: weight_norm(lstm, "weight_hh_l0"), "weight_hh_l0 computed by WeightNorm",
    ),
    "spectral_norm": (
        lambda net, lstm: spectral_norm(lstm, "weight_ih_l0"),
        "weight_ih_l0 computed by SpectralNorm",
    ),
    "pruned": (
        lambda net, lstm: prune.l1_unstructured(lstm, "bias_hh_l0", 0.5),
        "bias_hh_l0 computed by L1Unstructured",
    ),
    "weight dropped": (delete_weight, "weight_hh_l0 computed by other code"),
    "other weights in use": (
        lambda net, lstm: lstm._flat_weights.__setitem__(0, torch.zeros(16, 3)),
        "weight_ih_l0 computed by other code",
    ),
    "bound method": (lambda net, lstm: setattr(net, "f", lstm.forward), "got f.__self__"),
    "partial": (lambda net, lstm: setattr(net, "f", functools.partial(lstm)), "got f.func"),
    "argument of a partial": (
        lambda net, lstm: setattr(net, "f", functools.partial(print, 1, (lstm, 2))), "got f.1",
    ),
    "key": (lambda net, lstm: setattr(net, "names", {lstm: "second"}), "got names"),
    "weak reference": (lambda net, lstm: setattr(net, "f", [weakref.ref(lstm)]), "got f.0.()"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old weight_norm
@pytest.mark.parametrize("kind", list(CANNOT_COME))
def test_what_cannot_come_along_is_refused_and_nothing_changes(kind):
    change, message = CANNOT_COME[kind]
    net = nn.Sequential(collections.OrderedDict(first=nn.LSTM(3, 3), second=nn.LSTM(3, 4)))
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
@pytest.mark.parametrize("kind", ["forward", "weight_norm", "old weight_norm", "pruned"])
def test_from_torch_and_to_torch_refuse_it_too(kind):
    change, message = CANNOT_COME[kind]
    for cls, convert in ((nn.LSTM, ISSLSTM.from_torch), (ISSLSTM, ISSLSTM.to_torch)):
        lstm = cls(3, 4)
        change(None, lstm)
        with pytest.raises(ValueError) as got:
            convert(lstm)
        assert str(got.value).startswith(f"{convert.__name__}: expected the LSTM ")
        assert message in str(got.value)


def test_a_subclass_would_lose_its_methods():
    class Own(nn.LSTM):
        pass

    class Ours(ISSLSTM):
        pass

    with pytest.raises(ValueError, match="from_torch: .* nn.LSTM or ISSLSTM itself, got a Own"):
        ISSLSTM.from_torch(Own(3, 4))
    with pytest.raises(ValueError, match="to_torch: .* nn.LSTM or ISSLSTM itself, got a Ours"):
        Ours(3, 4).to_torch()
    assert type(Ours.from_torch(nn.LSTM(3, 4))) is Ours


# -- code that looks for an RNN --------------------------------------------------------------------


def test_initialisers_find_an_rnn_base():
    lstm = ISSLSTM(3, 4, num_layers=2, bidirectional=True)
    torchs = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    assert isinstance(lstm, nn.RNNBase) and not isinstance(lstm, nn.LSTM)
    assert lstm.mode == torchs.mode and lstm._flat_weights_names == torchs._flat_weights_names
    assert [w.shape for w in lstm._flat_weights] == [w.shape for w in torchs._flat_weights]
    with torch.no_grad():
        for weight in lstm._flat_weights:
            weight.fill_(0.5)
    assert all((p == 0.5).all() for p in lstm.parameters())
    replacement = nn.Parameter(torch.zeros(16, 3))
    lstm.weight_ih_l0 = replacement
    assert lstm._flat_weights[0] is replacement and lstm.all_weights[0][0] is replacement


def test_nothing_inherited_keeps_old_weights():
    lstm = ISSLSTM(3, [4, 2], num_layers=2)
    lstm(X)
    lstm._init_flat_weights()
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), copy.copy(lstm)):
        twin.double()
        assert {w.dtype for w in twin._flat_weights} == {torch.float64}
        assert twin(X.double())[0].dtype == torch.float64
    replica = lstm._replicate_for_data_parallel()
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
