# SPDX-License-Identifier: Apache-2.0
"""accelerate and prepare warn of code that asks for a class which modules no longer have."""

import copy
import functools
import re
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import LSTM as Aliased

import iss_kernels as iss

X = torch.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3)
KINDS = (nn.GRU, nn.LSTM)
SET, PLACES = {nn.LSTM}, {nn.LSTM: 0}


class Model(nn.Module):
    """A subclass says how `hidden` finds h among the states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """What forward does not reach may ask."""
        if isinstance(module, nn.LSTM):
            nn.init.uniform_(module.weight_hh_l0, -1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, states = self.rnn(x)
        return self.out(y) + self.out(self.hidden(states)[-1])

    def hidden(self, states: Any) -> torch.Tensor:
        raise NotImplementedError


class InAMethod(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.rnn, nn.LSTM) else states[1]


class OfATuple(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.rnn, KINDS) else states[1]


class InALambda(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return (lambda rnn: states[0] if type(rnn) is Aliased else states[1])(self.rnn)


class OfAnAttribute(Model):
    kinds = (nn.LSTM, nn.GRU)

    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.rnn, self.kinds) else states[1]


class ByItsWholeName(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.rnn, torch.nn.LSTM) else states[1]


class InAFunction(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return of(self.rnn, states)


class InAProperty(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[self.which]

    @property
    def which(self) -> int:
        return 0 if issubclass(type(self.rnn), nn.LSTM) else 1


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


class Wrapped(Model):
    @wrapped
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.rnn, nn.LSTM) else states[1]


class InAClassMethod(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[self.which(self.rnn)]

    @classmethod
    def which(cls, rnn: nn.Module) -> int:
        return 0 if isinstance(rnn, nn.LSTM) else 1


def of(rnn: nn.Module, states: Any) -> torch.Tensor:
    h: torch.Tensor = states[0] if rnn.__class__ == nn.LSTM else states[1]
    return h


class OfASet(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if type(self.rnn) in {*KINDS} & SET else states[1]


class OfADict(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[PLACES.get(type(self.rnn), 1)]


class Imported(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        from torch.nn import LSTM

        return states[0] if isinstance(self.rnn, LSTM) else states[1]


class Matched(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        match self.rnn:
            case nn.LSTM():
                return states[0]  # type: ignore[no-any-return]
        return states[1]  # type: ignore[no-any-return]


def over(kind: type) -> Any:
    def hidden(self: Any, states: Any) -> Any:
        return states[0] if isinstance(self.rnn, kind) else states[1]

    return hidden


class OfAClosure(Model):
    hidden = over(nn.LSTM)


ASKS = [
    InAMethod,
    OfASet,
    OfADict,
    Imported,
    Matched,
    OfAClosure,
    OfATuple,
    OfAnAttribute,
    ByItsWholeName,
    InALambda,
    InAFunction,
    InAProperty,
    InAClassMethod,
    Wrapped,
]


lazy = types.ModuleType("lazy")
lazy.__getattr__ = lambda name: 1 // 0  # type: ignore[assignment, method-assign]
# A chain of calls that is longer than the limit of a recursion.
exec("\n".join(f"def f{i}(x): return isinstance(x, int) or f{i + 1}(x)" for i in range(2000)))
first: Any = globals()["f0"]


class Odd(type):
    @property
    def other(cls) -> int:
        raise RuntimeError


class OfOddParts(Model, metaclass=Odd):
    """Code that must not run only because it is looked at."""

    other = 0

    def hidden(self, states: Any) -> torch.Tensor:
        if states is None:
            return first(lazy.other)  # type: ignore[no-any-return]
        others = isinstance(states, ()) or self.other
        return states[0] if isinstance(self.rnn, nn.LSTM) and not others else states[1]


ASKS.append(OfOddParts)


@pytest.mark.parametrize("kind", ASKS)
@pytest.mark.parametrize("take", [iss.accelerate, iss.prepare])
def test_the_line_that_asks_is_named(take: Any, kind: Any) -> None:
    model = kind().eval()
    with pytest.warns(UserWarning) as caught:
        other = take(copy.deepcopy(model))
    assert not torch.allclose(other(X), model(X))  # what the warning is about
    (message,) = [str(one.message) for one in caught]
    name = re.escape(f"{take.__name__}: code of {kind.__name__} asks for the class of modules")
    assert re.match(rf"{name} that are no .*LSTM.* any more \(test_type_checks.py:\d+\)", message)
    assert caught[0].filename == __file__


class AsksOthers(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(states, tuple) and isinstance(self.rnn, nn.RNNBase) else None


class HasItAsAName(Model):
    """An attribute that is called LSTM is no class."""

    def __init__(self) -> None:
        super().__init__()
        self.LSTM = self.rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, states = self.LSTM(x)
        return self.out(y) if isinstance(states, tuple) else y


class AsksForLinear(Model):
    def hidden(self, states: Any) -> torch.Tensor:
        return states[0] if isinstance(self.out, nn.Linear) else states[1]


def test_other_questions_are_none() -> None:
    """Ours are an nn.RNNBase; accelerate leaves a Linear as it is, prepare does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iss.accelerate(AsksOthers())
        iss.accelerate(AsksForLinear())
        iss.accelerate(HasItAsAName())
        iss.accelerate(iss.accelerate(nn.LSTM(3, 4)))
    with pytest.warns(UserWarning, match="that are no .*Linear"):
        iss.prepare(AsksForLinear())
