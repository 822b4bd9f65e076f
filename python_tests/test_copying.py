# SPDX-License-Identifier: Apache-2.0
"""A copy of a model is independent of it, whatever its modules hold."""

import copy
import functools
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
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


class Hooked(nn.Module):
    """Answers with what a hook keeps; `hook` makes one that holds the model."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6), nn.Linear(6, 2)
        self.kept: dict[str, torch.Tensor] = {}
        self.lstm.register_forward_hook(hook(self))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lstm(x)
        return self.out(self.kept["y"])


def decorated(hook: Any) -> Any:
    @functools.wraps(hook)
    def around(*args: Any) -> None:
        hook(*args)

    return around


HOOKS: dict[str, Callable[[Any], Any]] = {
    "a closure": lambda model: lambda m, i, o: model.kept.update(y=o[0]),
    "a closure over a part": lambda model: (lambda kept: lambda m, i, o: kept.update(y=o[0]))(
        model.kept
    ),
    "a default": lambda model: lambda m, i, o, model=model: model.kept.update(y=o[0]),
    "a decorated closure": lambda model: decorated(lambda m, i, o: model.kept.update(y=o[0])),
    "a partial": lambda model: partial(lambda who, m, i, o: who.kept.update(y=o[0]), model),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copied": copied,
    "prepare": iss.prepare,
    "shrink": lambda model: iss.shrink(
        model, iss.find_groups(model, X), keep={"lstm.l0": range(6)}
    )[0],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_holds_the_model_acts_on_the_copy(name: str, way: str) -> None:
    model = Hooked(HOOKS[name]).eval()
    with torch.no_grad():
        model(torch.zeros_like(X))
        before = model.kept["y"]
        other = COPIES[way](model)
        y = other(X)
        assert model.kept["y"] is before
        torch.testing.assert_close(y, model(X), rtol=0, atol=1e-6)


def test_a_function_that_holds_nothing_of_the_model_stays_itself() -> None:
    model, seen = nn.Linear(4, 2), []
    model.act, model.note = (lambda x, dtype=torch.float32: x), (lambda x: seen.append(x))
    model.dtype = torch.float32
    other = copied(model)
    assert other.act is model.act and other.note is model.note


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
