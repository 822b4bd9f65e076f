# SPDX-License-Identifier: Apache-2.0
"""Finds where a model's code asks for the class of a module, as isinstance(m, nn.LSTM) does.

A module that takes the place of torch's is of another class, so such code may go another way.
"""

from __future__ import annotations

import bisect
import dis
import inspect
import sys
import types
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from iss_kernels.copying import is_empty

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
    kinds = dict.fromkeys(type(module) for module in model.modules())
    todo = [(_held(kind, "forward"), kind) for kind in kinds]
    while todo:  # not by recursion: chains of calls may be longer than its limit
        function, kind = todo.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        if isinstance(function, property):
            function = function.fget
        while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        if f"{function.__module__}.".startswith(("torch.", "iss_kernels.")):
            continue
        seen.add(function.__code__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = {name: cell.cell_contents for name, cell in cells if not is_empty(cell)}
        known, codes = ChainMap(closure, function.__globals__), [function.__code__]
        for code in codes:  # which gets longer
            codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
            if any(name in code.co_names for name in _ASKING) or any(
                step.opname == "MATCH_CLASS" for step in dis.get_instructions(code)
            ):
                yield from _asking(code, known, kind, classes)
            for name in code.co_names:
                todo += [(_held(kind, name), kind), (known.get(name), kind)]


def _asking(
    code: types.CodeType, known: Mapping[str, Any], kind: type, classes: set[type]
) -> Iterator[str]:
    starts = [*dis.findlinestarts(code)]
    for offset, value in _loaded(code, known, kind):
        values = [value]
        if type(value) in (tuple, list, set, frozenset, dict):
            values = [*value]
        if any(isinstance(one, type) and one in classes for one in values):
            at = bisect.bisect_right([start for start, _ in starts], offset)
            yield f"{code.co_filename.rpartition('/')[2]}:{starts[at - 1][1]}"


def _loaded(
    code: types.CodeType, known: Mapping[str, Any], kind: type
) -> Iterator[tuple[int, Any]]:
    """Offset and value of what code loads by a name, or from the class of self, or imports."""
    value: Any = None
    module: Any = None
    for step in dis.get_instructions(code):
        given = step.argval
        if step.opname == "LOAD_GLOBAL" or (step.opname == "LOAD_DEREF" and given in known):
            value = known.get(given)
        elif step.opname == "IMPORT_NAME":
            value, module = None, sys.modules.get(given)
        elif step.opname == "IMPORT_FROM":
            value = _held(module, given)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            value = _held(value, given)
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):  # one name, or two
            value = kind if (given[-1] if isinstance(given, tuple) else given) == "self" else None
        else:
            value = None
        yield step.offset, value


def _held(holder: Any, name: str) -> Any:
    """What a module or a class has under a name, without running any code of theirs."""
    if not isinstance(holder, (types.ModuleType, type)):
        return None
    return inspect.getattr_static(holder, name, None)
