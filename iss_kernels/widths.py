# SPDX-License-Identifier: Apache-2.0
"""Widths that a model's own code keeps as numbers, such as self.hidden_size.

Code makes states or takes tensors apart by such a number. Where experiments show that a number is a
width (find.py), `shrink` changes it together with the units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# What a module or an object in it may hold numbers by: attributes, keys, indices.
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Width:
    """A number that is `factor` times the size of a family.

    module: the name of the module that holds it; place: the way there, attribute first.
    """

    module: str
    place: Place
    family: str
    factor: int = 1

    def __str__(self) -> str:
        return ".".join(map(str, (self.module, *self.place))).removeprefix(".")


def numbers(model: nn.Module) -> Iterator[tuple[str, Place, int]]:
    """The numbers in the modules that are no library's, and in the plain objects these hold."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("torch.", "iss_kernels.")):
            for place, value in _numbers_in(vars(module), (), seen):
                yield name, place, value


def _numbers_in(holder: Any, place: Place, seen: set[int]) -> Iterator[tuple[Place, int]]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in items:
        at = (*place, key)
        if isinstance(value, bool) or not isinstance(key, (str, int)):
            continue
        if isinstance(value, int):
            yield at, value
        elif isinstance(value, (nn.Module, Tensor, type)) or callable(value) or len(at) > 3:
            continue
        elif id(value) not in seen and not (place == () and str(key).startswith("_")):
            seen.add(id(value))
            if isinstance(value, (dict, list)):
                yield from _numbers_in(value, at, seen)
            elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
                yield from _numbers_in(vars(value), at, seen)


def set_number(model: nn.Module, name: str, place: Place, value: int) -> None:
    """Change the number at a place of a module, which remembers it in `changed`.

    Objects on the way to it, which other models may hold too, are copied; a copy is put wherever a
    module of the model holds the object.
    """
    module = model.get_submodule(name)
    holder: Any = vars(module)
    for key in place[:-1]:
        shared = holder[key]
        own = holder[key] = copy.copy(shared)
        for other in model.modules():
            its = vars(other)
            its.update({at: own for at, held in its.items() if held is shared})
        holder = own if isinstance(own, (dict, list)) else vars(own)
    holder[place[-1]] = value
    vars(module)[_CHANGED] = vars(module).get(_CHANGED, {}) | {place: value}


def changed(model: nn.Module) -> Iterator[tuple[str, Place, int]]:
    """The numbers that `set_number` changed: module, place, and what they are now."""
    for name, module in model.named_modules():
        for place in vars(module).get(_CHANGED, {}):
            holder, key = _holder(module, place)
            yield name, place, holder[key]


def has_number(model: nn.Module, name: str, place: Place) -> bool:
    """Whether a model has a number at a place."""
    try:
        holder, key = _holder(model.get_submodule(name), place)
        return isinstance(holder[key], int)
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def _holder(module: Any, place: Place) -> tuple[Any, Any]:
    """The dict or list that holds the number, and its key there."""
    holder = vars(module)
    for key in place[:-1]:
        item = holder[key]
        holder = item if isinstance(item, (dict, list)) else vars(item)
    return holder, place[-1]


_CHANGED = "_iss_widths"
