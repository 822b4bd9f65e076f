# SPDX-License-Identifier: Apache-2.0
"""Copies a model, also one whose modules hold computed tensors; finds where it holds a tensor.

torch refuses to deep-copy a tensor with a gradient history. nn.utils.prune, weight_norm and
spectral_norm leave such a tensor on a module: the weight that they compute before each call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from iss_kernels.arguments import Model


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """copy.deepcopy(model, memo), where tensors with a gradient history are copied without it.

    memo: what stands for objects that are not to be copied, by their id, as for copy.deepcopy; it
    is filled. Parameters, buffers, hooks and the sharing of tensors and modules are copied as
    deepcopy does. The copy's hooks compute its weights anew, from its own parameters, when it is
    called; until then it holds their present values. Where a module makes its copy anew, from its
    own __getstate__, say, so that what stands for its parts would not arrive, all that it holds is
    copied instead. Functions that hold what is copied, as a hook that is a lambda over `self` does,
    are copied with it: deepcopy would leave them to act on the original.

    Raises ValueError for such a module that holds what cannot be copied.
    """
    memo = {} if memo is None else memo
    parts = list(_parts(model, memo))
    instead = [memo[id(part)] for part in parts if id(part) in memo]
    modules = (part for part in parts if isinstance(part, nn.Module) and id(part) not in memo)
    makers = [module for module in modules if _own_copier(type(module))]
    for tensor in _tensors_within(model, memo):
        if not tensor.is_leaf:
            memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo)
    rebound = _rebound(model, memo)
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
                _bind(rebound, memo)
                return result
    own = "".join(f" ({type(m).__name__}.{_own_copier(type(m))})" for m in makers[:1])
    raise ValueError(
        f"expected a model that can be copied part by part, got a {type(model).__name__} that "
        f"makes parts of itself anew{own}"
    ) from failure


def copied_along(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what belongs to a model that `copied` copied with this memo."""
    rebound = _rebound(value, memo)
    result = copy.deepcopy(value, memo)
    _bind(rebound, memo)
    return result


def _rebound(value: Any, memo: dict[int, Any]) -> list[FunctionType]:
    """The functions that hold, in their closures or defaults, what a copy of `value` copies.

    Puts a copy of each, with empty cells until `_bind` fills them, into the memo.
    """
    seen: dict[int, Any] = dict(memo)  # holds what it names, so that no id is given twice
    holders: dict[FunctionType, list[Any]] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):
            holders[item] = _bound(item)
            stack += [held for held in holders[item] if isinstance(held, FunctionType)]
        else:
            inside, fixed = _held(item)
            stack += [*(held for _, held in inside), *fixed]
    found: list[FunctionType] = []
    copies = {key for key, each in seen.items() if _is_copied(each)}
    while more := [
        each for each, held in holders.items()
        if each not in found and any(id(one) in copies for one in held)
    ]:  # fmt: skip
        found += more
        copies |= {id(each) for each in more}
    for old in found:
        cells = tuple(CellType() for _ in old.__closure__ or ())
        new = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells or None)
        memo[id(old)] = functools.update_wrapper(new, old)
    return found


def _bind(functions: Sequence[FunctionType], memo: Mapping[int, Any]) -> None:
    """Let the copies of functions hold the copies of what the functions hold."""

    def copy_of(held: Any) -> Any:
        return memo.get(id(held), held)

    for old in functions:
        new = memo[id(old)]
        for cell, its in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                its.cell_contents = copy_of(cell.cell_contents)
        new.__defaults__ = old.__defaults__ and tuple(map(copy_of, old.__defaults__))
        if old.__kwdefaults__:
            new.__kwdefaults__ = {k: copy_of(v) for k, v in old.__kwdefaults__.items()}
        new.__dict__.clear()  # of __wrapped__, which update_wrapper adds
        new.__dict__.update({name: copy_of(held) for name, held in vars(old).items()})


def _is_copied(item: Any) -> bool:
    """Whether deepcopy makes another of it."""
    if isinstance(item, (type, FunctionType, ModuleType)):
        return False
    return isinstance(item, (dict, list, set, deque)) or hasattr(item, "__dict__")


def _bound(function: FunctionType) -> list[Any]:
    """What a function holds in its closure, defaults and attributes."""
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return [*held, *vars(function).values()]


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
            fixed = [held for held in _bound(item) if isinstance(held, Tensor)]
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
