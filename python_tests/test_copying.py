# SPDX-License-Identifier: Apache-2.0
"""A copy of a model is independent of it, whatever its modules hold."""

import copy
import enum
import functools
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from kinds import Kind, every_kind
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import iss_kernels as iss
from iss_kernels.copying import copied

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


class Recorder:
    """Neither a module nor a container, as a trainer or a hook may be."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, *_: Any) -> None:
        pass


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


def holding(wrap: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer, "held", wrap(layer.weight * 2))


def with_a_graph(layer: nn.Module) -> None:
    loss = layer(X).square().sum()
    layer.weight.grad = torch.autograd.grad(loss, layer.weight, create_graph=True)[0]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda layer: None,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "weight_norm": old_weight_norm,
    "weight_norm as a parametrisation": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "a list of tensors": holding(lambda y: [y, {"again": (y, {y})}]),
    "an object": holding(Recorder),
    "a partial": holding(lambda y: partial(torch.add, y, other=y)),
    "a method": holding(lambda y: Recorder(y).__call__),
    "a hook": lambda layer: layer.register_forward_hook(Recorder(layer.weight * 2)),
    "a buffer": lambda layer: layer.register_buffer("scaled", layer.weight * 2),
    "a gradient with a graph": with_a_graph,
    "itself": lambda layer: layer.__dict__.update(owner=[layer]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_answers_alike_and_shares_nothing(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    CHANGES[name](model[0])
    expected = model.eval()(X)
    other = copied(model)
    assert torch.equal(other(X), expected)
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if key.startswith("0."):
                parameter.add_(1)
    assert torch.equal(model(X), expected)
    assert (other(X) - expected).abs().min() > 0  # computed anew, from the copy's own parameters


@every_kind
def test_a_pruned_recurrent_module_is_copied(kind: Kind) -> None:
    for model in kind.pair(4, 3, bidirectional=True):
        prune.l1_unstructured(model, "weight_hh_l0_reverse", 0.4)
        expected = model(X)[0]
        other = copied(model)
        assert torch.equal(other(X)[0], expected)
        with torch.no_grad():
            other.get_parameter("weight_hh_l0_reverse_orig").add_(1)
        assert torch.equal(model(X)[0], expected) and not torch.equal(other(X)[0], expected)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(self.lstm(x)[0])
        return self.kept.pop("y", 1) * y

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.scale


def decorated(hook: Any) -> Any:
    @functools.wraps(hook)
    def around(*args: Any) -> Any:
        return hook(*args)

    return around


def two_with_a_variable(model: Any) -> None:
    before: Any = None

    def first(module: Any, args: Any) -> None:
        nonlocal before
        before = len(args[0])

    def second(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        return model.scale * y + before

    model.out.register_forward_pre_hook(first)
    model.out.register_forward_hook(second)


def by_name(model: Any) -> None:
    names = {module: name for name, module in model.named_modules()}
    model.out.register_forward_hook(lambda m, i, y: y * model.scale * len(names[m]))


def shared_with_an_attribute(model: Any) -> None:
    def scaled(y: torch.Tensor) -> torch.Tensor:
        return y * model.scale.sum()

    model.scaled = scaled
    model.lstm.register_forward_hook(lambda m, i, o: (scaled(o[0]), o[1]))


def over_a_forward(model: Any) -> None:
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


def over_a_method(model: Any) -> None:
    model.forward = MethodType(lambda self, x: type(model).forward(model, x) * 2, model)


def hook_on_out(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: model.out.register_forward_hook(make(model))


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a closure": hook_on_out(lambda model: lambda m, i, y: y * model.scale),
    "a closure that keeps": hook_on_out(lambda model: lambda m, i, y: model.kept.update(y=y)),
    "a closure over a part": hook_on_out(
        lambda model: (lambda kept: lambda m, i, y: kept.update(y=y))(model.kept)
    ),
    "a default": hook_on_out(lambda model: lambda m, i, y, model=model: y * model.scale),
    "a decorator": hook_on_out(lambda model: decorated(lambda m, i, y: y * model.scale)),
    "a partial": hook_on_out(lambda model: partial(lambda who, m, i, y: y * who.scale, model)),
    "a list": hook_on_out(lambda model: (lambda s: lambda m, i, y: y * s[0])([model.scale])),
    "a tuple": hook_on_out(lambda model: (lambda s: lambda m, i, y: y * s[0])((model.scale,))),
    "a method": hook_on_out(lambda model: (lambda s: lambda m, i, y: s(y))(model.scaled)),
    "a partial in a closure": hook_on_out(
        lambda model: (lambda s: lambda m, i, y: s(y))(partial(model.scaled))
    ),
    "a dict of modules": by_name,
    "two functions": two_with_a_variable,
    "an attribute and a hook": shared_with_an_attribute,
    "a wrapped forward": lambda model: setattr(model, "forward", torch.no_grad()(model.forward)),
    "a forward around forward": over_a_forward,
    "a method over the model": over_a_method,
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copied": copied,
    "prepare": iss.prepare,
    "shrink": lambda m: iss.shrink(m, iss.find_groups(m, X), keep={"lstm.l0": range(6)})[0],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", HOLDERS)
def test_a_function_that_holds_the_model_acts_on_the_copy(name: str, way: str) -> None:
    model = Model().eval()
    HOLDERS[name](model)
    other = COPIES[way](model)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(other(X), expected, rtol=0, atol=1e-5)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(X), expected, rtol=0, atol=1e-5)
        assert not model.kept


def test_a_hook_that_removes_itself_leaves_the_copy_alone() -> None:
    model = Model()

    def once(module: Any, args: Any) -> None:
        model.scale.data.fill_(3)
        handle.remove()

    handle = model.register_forward_pre_hook(once)
    iss.find_groups(model, X)
    other = iss.prepare(model)
    assert len(model._forward_pre_hooks) == len(other._forward_pre_hooks) == 1
    other(X)
    assert len(other._forward_pre_hooks) == 0 and bool((other.scale == 3).all())
    assert len(model._forward_pre_hooks) == 1 and bool((model.scale == 2).all())


def test_what_a_layer_and_a_hook_of_it_share_is_one_in_the_copy() -> None:
    model, seen = Model().eval(), []
    model.lstm.seen = seen
    model.lstm.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    other = iss.prepare(model)
    other(X)
    assert len(other.lstm.seen) == 1 and not seen


class Mode(enum.Enum):
    ONE = 1


def by_mode(y: torch.Tensor, mode: Mode = Mode.ONE) -> torch.Tensor:
    return y.tanh()


def test_a_function_that_holds_nothing_of_the_model_stays_itself() -> None:
    model, seen = nn.Linear(4, 2), []
    model.act, model.note = (lambda x, dtype=torch.float32: x), (lambda x: seen.append(x))
    model.dtype, model.mode, model.by_mode = torch.float32, Mode.ONE, by_mode
    other = copied(model)
    assert all(getattr(other, n) is getattr(model, n) for n in ("act", "note", "by_mode"))


def test_tensors_that_are_one_stay_one() -> None:
    model = nn.Linear(4, 2)
    model.first = model.weight * 2
    model.second, model.row = [model.first], model.first[0]
    other = copied(model)
    assert other.second[0] is other.first is not model.first
    other.first[0] = 7
    assert other.row.tolist() == [7] * 4


def test_what_the_memo_names_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.4)
    stand_in = nn.Identity()
    assert copied(model, {id(model[0]): stand_in})[0] is stand_in


def test_what_cannot_be_copied_is_deepcopys_error() -> None:
    model = nn.Linear(4, 2)
    model.held = (step for step in range(3))
    with pytest.raises(TypeError) as expected:
        copy.deepcopy(model)
    with pytest.raises(TypeError) as error:
        copied(model)
    assert str(error.value) == str(expected.value)


class MakesItself(nn.Module):
    """Is copied as its arguments and its state_dict."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.rnn, self.out = size, nn.LSTM(4, size), nn.Linear(size, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.rnn(x)[0])

    def __getstate__(self) -> Any:
        return {"size": self.size, "state": self.state_dict()}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
        self.load_state_dict(state["state"])


MAKES_COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "prepare": lambda model: iss.prepare(model, "float32"),
    "shrink": lambda model: iss.shrink(model, iss.find_groups(model, X[:, None]), ratio=0.0)[0],
    "less": lambda model: iss.shrink(model, iss.find_groups(model, X[:, None]))[0],
}


@pytest.mark.parametrize("name", MAKES_COPIES)
def test_a_model_that_makes_its_copies_anew_is_copied_part_by_part(name: str) -> None:
    """deepcopy would make parts of the first sizes and classes, in the place of others."""
    model = nn.Sequential(nn.Identity(), MakesItself(5)).eval()
    with torch.no_grad():
        model[1].out.weight[:, 2] = model[1].rnn.weight_hh_l0[:, 2] = 0  # a unit that leaves
        other = MAKES_COPIES[name](model)
        torch.testing.assert_close(other(X[:, None]), model(X[:, None]))
    assert not isinstance(other[1].rnn, nn.LSTM)
    assert isinstance(copied(model)[1].rnn, nn.LSTM)


@pytest.mark.parametrize("name", MAKES_COPIES)
def test_one_that_holds_what_cannot_be_copied_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Identity(), MakesItself(5))
    model[1].lock = threading.Lock()
    with pytest.raises(ValueError, match="that can be copied part by part, got a Seq") as caught:
        MAKES_COPIES[name](model)
    assert str(caught.value).endswith("makes parts of itself anew (MakesItself.__setstate__)")


class NeedsASize(nn.Linear):
    """Cannot be made without an argument, and says how it is copied."""

    def __new__(cls, size: int) -> Any:
        return super().__new__(cls)

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = NeedsASize(self.in_features)
        other.load_state_dict(self.state_dict())
        return other


def test_a_way_of_copying_that_works_is_all_that_is_tried() -> None:
    model = nn.Sequential(nn.Identity(), NeedsASize(4))
    assert torch.equal(copied(model)(X), model(X))
    with pytest.raises(ValueError, match=r"anew \(NeedsASize.__deepcopy__\)"):
        copied(model, {id(model[1].weight): nn.Parameter(torch.zeros(2, 4))})


class Remembering(nn.Module):
    """Keeps what it computed, with its gradient history."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.past = nn.Linear(4, 4), kind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.past.append(self.layer(x))
        return torch.stack(tuple(self.past)).sum(0)


@pytest.mark.parametrize("kind", [list, lambda: deque(maxlen=2)], ids=["list", "deque"])
def test_containers_of_computed_tensors_are_copied(kind: Callable[[], Any]) -> None:
    model = Remembering(kind)
    model(X)
    made = copied(model)
    assert isinstance(made, Remembering)
    assert type(made.past) is type(model.past)
    assert torch.equal(made.past[0], model.past[0])
    assert made.past[0] is not model.past[0]
