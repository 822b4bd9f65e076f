# SPDX-License-Identifier: Apache-2.0
"""Finds where a model's code asks for the class of a module, as isinstance(m, nn.LSTM) does.

A module that takes the place of torch's is of another class, so such code may go another way.
"""

from __future__ import annotations

import bisect
import dis
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_ASKING = ("isinstance", "issubclass", "type", "__class__")


def warn_of_type_checks(function: str, model: nn.Module, new: Mapping[nn.Module, Any]) -> None:
    """Warn where `model` asks for a class that modules had and those in their place have not.

    function: who takes them; new: {a module of `model`: the one in its place}.
    """
    classes = {
        kind for old, its in new.items() for kind in set(type(old).__mro__) - {*type(its).__mro__}
    }
    places = list(dict.fromkeys(_places(model, classes))) if classes else []
    if places:
        names = ", ".join(sorted(kind.__name__ for kind in classes))
        warnings.warn(
            f"{function}: code of {type(model).__name__} asks for the class of modules that are no "
            f"{names} any more ({', '.join(places)}): see that its answers are still the same",
            stacklevel=3,
        )


def _places(model: nn.Module, classes: set[type]) -> Iterator[str]:
    """file:line of each question in code that `forward` of the model's own classes reaches."""
    seen: set[types.CodeType] = set()
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        yield from _asked_by(getattr(kind, "forward", None), kind, classes, seen)


def _asked_by(
    function: Any, kind: type, classes: set[type], seen: set[types.CodeType]
) -> Iterator[str]:
    if isinstance(function, property):
        function = function.fget
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, types.FunctionType) or function.__code__ in seen:
        return
    if f"{function.__module__}.".startswith(("torch.", "iss_kernels.")):
        return
    seen.add(function.__code__)
    known, codes = function.__globals__, [function.__code__]
    for code in codes:  # which gets longer
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        if any(name in code.co_names for name in _ASKING):
            starts = [*dis.findlinestarts(code)]
            for offset, value in _loaded(code, known, kind):
                values = value if isinstance(value, tuple) else (value,)
                if any(isinstance(one, type) and one in classes for one in values):
                    at = bisect.bisect_right([start for start, _ in starts], offset)
                    yield f"{code.co_filename.rpartition('/')[2]}:{starts[at - 1][1]}"
        for name in code.co_names:
            yield from _asked_by(getattr(kind, name, None), kind, classes, seen)
            yield from _asked_by(known.get(name), kind, classes, seen)


def _loaded(
    code: types.CodeType, known: Mapping[str, Any], kind: type
) -> Iterator[tuple[int, Any]]:
    """Offset and value of what code loads by a global name, or from the class of self."""
    value: Any = None
    for step in dis.get_instructions(code):
        name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
        if step.opname == "LOAD_GLOBAL":
            value = known.get(str(name))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            holds = isinstance(value, (types.ModuleType, type))
            value = getattr(value, str(name), None) if holds else None
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and name == "self":
            value = kind
        else:
            value = None
        yield step.offset, value
