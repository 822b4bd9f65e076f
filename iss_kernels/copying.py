# SPDX-License-Identifier: Apache-2.0
"""Copies a model, also one whose modules hold computed tensors; finds where it holds a tensor.

torch refuses to deep-copy a tensor with a gradient history. nn.utils.prune, weight_norm and
spectral_norm leave such a tensor on a module: the weight that they compute before each call.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from iss_kernels.arguments import Model


def copied(
    model: Model,
    memo: dict[int, Any] | None = None,
    carry: Callable[[], Iterable[nn.Module]] = lambda: (),
) -> Model:
    """copy.deepcopy(model, memo), where tensors with a gradient history are copied without it.

    memo: what stands for objects that are not to be copied, by their id, as for copy.deepcopy; it
    is filled. carry: called after the copy, to copy with the same memo what else these are to hold;
    returns those that it changed.
    Parameters, buffers, hooks and the sharing of tensors and modules are copied as deepcopy does.
    The copy's hooks compute its weights anew, from its own parameters, when it is called; until
    then it holds their present values. Where a module makes its copy anew, from its own
    __getstate__, say, so that what stands for its parts would not arrive, all that it holds is
    copied instead. deepcopy shares functions. Here one that holds what is copied, as a hook that is
    a lambda over `self` does, is copied too, and acts on the copy; see `_Functions`.

    Raises ValueError for such a module that holds what cannot be copied.
    """
    memo = {} if memo is None else memo
    parts = list(_parts(model, memo))
    instead = [memo[id(part)] for part in parts if id(part) in memo]
    own = (part for part in parts if isinstance(part, nn.Module) and id(part) not in memo)
    makers = [module for module in own if _own_copier(type(module))]
    for tensor in _tensors_within(model, memo):
        if not tensor.is_leaf:
            memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo)
    known, failure = dict(memo), None
    for by_parts in ([], makers):
        memo.clear()
        memo.update(known)
        try:
            memo.update((id(module), type(module).__new__(type(module))) for module in by_parts)
            for module in by_parts:
                vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
            result = copy.deepcopy(model, memo)
        except Exception as error:
            if not makers:
                raise
            failure = error
        else:
            if _arrived(instead, result):
                given = {*map(id, known.values())}
                new = [result] if id(result) not in given else []
                _Functions(memo).replace_in([*new, *carry()], given)
                return result
    maker = "".join(f" ({type(m).__name__}.{_own_copier(type(m))})" for m in makers[:1])
    raise ValueError(
        f"expected a model that can be copied part by part, got a {type(model).__name__} that "
        f"makes parts of itself anew{maker}"
    ) from failure


_HOLDERS = (FunctionType, MethodType, partial, tuple)


class _Functions:
    """Copies of the functions of a model that hold something which was copied.

    Held is what is in a function's closure, defaults and attributes, also within functions,
    methods, partials, containers and handles of hooks there. Other objects are not looked into: a
    hook and its copy share the logger, say, that both write to. Functions that are found by their
    name are no closures, and stay.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.copies = memo  # by the id of the original
        self.cells: dict[int, CellType] = {}  # the same; functions go on to share a variable
        self.alive: list[Any] = []  # whose ids are keys

    def replace_in(self, modules: Sequence[nn.Module], given: Set[int]) -> None:
        """Put the copies in the places of these modules that hold such functions.

        given: ids of objects in them that are no copies.
        """
        made = {*map(id, self.copies.values())} - given | {*map(id, modules)}
        found: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        stack: list[Any] = [*modules]
        while stack:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            inside, fixed = _held(item)
            found += [(item, key) for key, held in inside if isinstance(held, _HOLDERS)]
            held = [*(one for _, one in inside), *fixed]
            within = (MethodType, partial, tuple)
            stack += [one for one in held if id(one) in made or isinstance(one, within)]
            if id(item) in made and hasattr(item, "__dict__"):
                stack.append(vars(item))
        for container, key in found:
            if (new := self.copy_of(container[key])) is not container[key]:
                container[key] = new

    def copy_of(self, held: Any) -> Any:
        """What stands for an object in the copy; itself where it holds nothing that was copied."""
        if id(held) in self.copies or not self._leads_to_a_copy(held):
            return self.copies.get(id(held), held)
        self.alive.append(held)
        if isinstance(held, FunctionType):
            return self._copy_of_function(held)
        if isinstance(held, MethodType):
            return MethodType(self.copy_of(held.__func__), self.copy_of(held.__self__))
        if isinstance(held, partial):
            keywords = {name: self.copy_of(value) for name, value in held.keywords.items()}
            return partial(self.copy_of(held.func), *map(self.copy_of, held.args), **keywords)
        if isinstance(held, RemovableHandle):
            return copy.deepcopy(held, self.copies)  # refers to the copied table
        if isinstance(held, (tuple, frozenset)):
            parts = map(self.copy_of, held)
            return held._make(parts) if hasattr(held, "_make") else type(held)(parts)
        new = self.copies[id(held)] = copy.copy(held)
        new.clear()
        if isinstance(held, dict):
            new.update({self.copy_of(key): self.copy_of(value) for key, value in held.items()})
        else:  # a list, set or deque
            (new.update if isinstance(held, set) else new.extend)(map(self.copy_of, held))
        return new

    def _copy_of_function(self, old: FunctionType) -> FunctionType:
        cells = tuple(map(self._cell_of, old.__closure__ or ())) or None
        new = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
        self.copies[id(old)] = functools.update_wrapper(new, old)
        for cell, its in zip(old.__closure__ or (), cells or (), strict=True):
            if its is not cell and is_empty(its):
                its.cell_contents = self.copy_of(cell.cell_contents)
        new.__defaults__ = self.copy_of(old.__defaults__)
        new.__kwdefaults__ = self.copy_of(old.__kwdefaults__)
        vars(new).clear()  # of __wrapped__, which update_wrapper adds
        vars(new).update({name: self.copy_of(held) for name, held in vars(old).items()})
        return new

    def _cell_of(self, cell: CellType) -> CellType:
        """A variable of closures: another one, for all of them, where it holds what is copied."""
        if is_empty(cell) or not self._leads_to_a_copy(cell.cell_contents):
            return cell
        self.alive.append(cell)
        return self.cells.setdefault(id(cell), CellType())

    def _leads_to_a_copy(self, held: Any) -> bool:
        seen: dict[int, Any] = {}
        stack = [held]
        while stack:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen[id(item)] = item
            if self.copies.get(id(item), item) is not item:
                return True
            stack += _linked(item)
        return False


def _linked(item: Any) -> list[Any]:
    """What is held where `_Functions` looks."""
    if isinstance(item, FunctionType):
        return [] if is_found_by_name(item) else bound(item)
    if isinstance(item, MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, RemovableHandle):
        return [item.hooks_dict_ref()]
    if isinstance(item, dict):
        return [*item, *item.values()]
    return [*item] if isinstance(item, (list, tuple, set, frozenset, deque)) else []


def is_found_by_name(function: FunctionType) -> bool:
    """Whether its module has it under its name."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def is_empty(cell: CellType) -> bool:
    """Whether a variable of a closure has no value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def bound(function: FunctionType) -> list[Any]:
    """What a function holds in its closure, defaults and attributes."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if not is_empty(cell)]
    keywords = (function.__kwdefaults__ or {}).values()
    return [*cells, *(function.__defaults__ or ()), *keywords, *vars(function).values()]


def _arrived(parts: Sequence[Any], model: nn.Module) -> bool:
    """Whether a model has all these parts."""
    there = {id(part) for part in _parts(model, {})}
    return all(id(part) in there for part in parts)


_COPIERS = ("__deepcopy__", "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__")


def _own_copier(kind: type) -> str:
    """The method by which a class of others' modules is copied otherwise than nn.Module, or ""."""
    if f"{kind.__module__}.".startswith(("torch.", "iss_kernels.")):
        return ""
    own = (n for n in _COPIERS if getattr(kind, n, None) is not getattr(nn.Module, n, None))
    return next(own, "")


def _parts(module: nn.Module, memo: Mapping[int, Any]) -> Iterator[Any]:
    """Modules, parameters and buffers, but not what is in a module that another stands for."""
    seen, stack = {id(module)}, [module]
    while stack:
        module = stack.pop()
        yield module
        if id(module) not in memo:
            yield from module._parameters.values()
            yield from module._buffers.values()
            inner = [m for m in module._modules.values() if m is not None and id(m) not in seen]
            seen |= {id(m) for m in inner}
            stack += inner


def _tensors_within(model: nn.Module, memo: Mapping[int, Any]) -> Iterator[Tensor]:
    """Every tensor that deepcopy would meet in the model, and the gradients of these."""
    seen: dict[int, Any] = dict(memo)  # holds what it names, so that no id is given twice
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
            stack.append(item.grad if item.is_leaf else None)
        inside, fixed = _held(item)
        stack += [*(held for _, held in inside), *fixed]


def _held(item: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """What deepcopy meets in an object: (key or index, what can be replaced there), and the rest.

    It copies no functions, classes and Python modules.
    """
    if isinstance(item, (str, type, FunctionType, ModuleType)):
        return [], []
    inside: list[tuple[Any, Any]] = []
    fixed: list[Any] = []
    if isinstance(item, dict):
        inside, fixed = list(item.items()), list(item)
    elif isinstance(item, (list, deque)):
        inside = list(enumerate(item))
    elif isinstance(item, (tuple, set, frozenset)):
        fixed = list(item)
    elif isinstance(item, partial):
        fixed = [item.func, *item.args, *item.keywords.values()]
    elif isinstance(item, MethodType):
        fixed = [item.__self__]
    return inside, [*fixed, getattr(item, "__dict__", None)]


def places(
    model: nn.Module, tensors: Set[Tensor], but: Sequence[Any] = ()
) -> list[tuple[Any, Any]]:
    """Where a model holds any of these tensors: (a dict or list, key or index).

    In its modules, their attributes, and containers and objects in reach of these, as deepcopy sees
    them; objects in `but` are not searched. Raises ValueError where another tensor could not be put
    in the place: in tuples, sets, functions, arguments of a functools.partial and keys of a dict,
    such as the state of an optimiser.
    """
    found: list[tuple[Any, Any]] = []
    # Holds what it names, so that no id is given twice.
    seen: dict[int, Any] = {id(each): each for each in but}
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, Tensor):
            continue
        seen[id(item)] = item
        inside, fixed = _held(item)
        if isinstance(item, FunctionType):
            fixed = [held for held in bound(item) if isinstance(held, Tensor)]
        for held in fixed:
            if isinstance(held, Tensor) and held in tensors:
                raise ValueError(
                    "shrink_: expected a model with its parameters in modules, lists and dicts, "
                    f"got one of shape {list(held.shape)} in a {type(item).__name__}"
                    + " as a key"
                    * isinstance(item, dict)
                )
        for key, held in inside:
            if isinstance(held, Tensor) and held in tensors:
                try:
                    item[key] = held  # as it is
                except Exception as error:
                    raise ValueError(
                        "shrink_: expected a model with its parameters in modules, lists and "
                        f"dicts, got one of shape {list(held.shape)} in a {type(item).__name__} "
                        "that takes no other"
                    ) from error
                found.append((item, key))
            else:
                stack.append(held)
        stack += fixed
    return found
