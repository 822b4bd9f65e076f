# SPDX-License-Identifier: Apache-2.0
"""accelerate, and what it is made of: one module takes over all that another has."""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from iss_kernels.arguments import Model, check_module
from iss_kernels.copying import bound, is_empty, is_found_by_name
from iss_kernels.recurrent import CELL_MODULES, MODULES
from iss_kernels.type_checks import warn_of_type_checks

HOOK_TABLES = [name for name in vars(nn.Module()) if "hook" in name]


def _ours(module: Any) -> type[nn.Module] | None:
    """Our class for a module that is exactly one of torch's; None for all else, ours included."""
    kind = MODULES.get(type(module)) or CELL_MODULES.get(type(module))
    return None if kind is type(module) else kind


def _family(module: Any) -> tuple[Any, ...]:
    """torch's class and ours that the module is one of, or a subclass of; empty for no such."""
    for torchs, ours in (MODULES | CELL_MODULES).items():
        if isinstance(module, (torchs, ours)):
            return (ours,) if torchs is ours else (torchs, ours)
    return ()


def _name(kind: Any) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


def _kind(module: nn.Module) -> str:
    """torch's word for the module: LSTM, GRU, ..."""
    return next(iter(_family(module)), type(module)).__name__.removeprefix("ISS")


@functools.cache
def _fresh(kind: Any) -> nn.Module:
    """A module as its constructor leaves it."""
    return cast(nn.Module, kind(1, 2, device="meta"))


def added(module: Any) -> list[str]:
    """Names of the attributes that a user has put on a recurrent module."""
    return [name for name in vars(module) if name not in vars(_fresh(cast(Any, type(module))))]


def check_plain(module: Any, function: str, name: str) -> None:
    """Refuse a module that does something that another in its place would not do.

    module: one of `recurrent.MODULES` or `CELL_MODULES`, torch's or ours. function, name: who asks,
    and what the module is called there, for the ValueError.
    """
    if is_parametrized(module):
        weight, makers = next(iter(module.parametrizations.items()))
        raise ValueError(
            f"{function}: expected {name} with its own parameters, got {weight} computed by "
            f"{type(makers[0]).__name__}; remove that parametrization first, or add it afterwards"
        )
    family = _family(module)
    if type(module) not in family:
        raise ValueError(
            f"{function}: expected {name} to be an {' or '.join(map(_name, family))} itself, got a "
            f"{type(module).__name__}, whose own methods would be lost"
        )
    for weight, used in _weights(module).items():
        own = module._parameters.get(weight)
        # torch looks for new parameters in forward; other tensors that it has were put there.
        if own is None or (own is not used and not module._weights_have_changed()):
            by = [
                type(hook).__name__
                for hook in module._forward_pre_hooks.values()
                if weight in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
            ]
            raise ValueError(
                f"{function}: expected {name} with its own parameters, got {weight} computed by "
                f"{by[0] if by else 'other code'}; remove that first, or add it afterwards"
            )
    for attribute in added(module):
        taken = any(hasattr(_fresh(kind), attribute) for kind in family)
        if taken and attribute != "flatten_parameters":  # which some replace by a no-op
            raise ValueError(
                f"{function}: expected {name} without an attribute {attribute!r} of its own, which "
                f"a new {_kind(module)} cannot take over, "
                f"got {type(vars(module)[attribute]).__name__}"
            )


def _weights(module: Any) -> dict[str, Any]:
    """{name of a parameter that the module's class makes: the tensor that forward uses}."""
    if isinstance(module, nn.RNNBase):
        return dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    names = [
        name
        for name in _fresh(cast(Any, type(module)))._parameters
        if module.bias or "bias" not in name
    ]
    return {name: module._parameters.get(name) for name in names}


def take_over(new: nn.Module, old: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Give a new module these parameters, by name, and all else that `old` has.

    dropout, recompute, kept units and full_width, mode, hooks, buffers, submodules and attributes.
    Raises ValueError for what cannot come along: see `check_plain`.
    """
    check_plain(old, type(new).__name__, f"the {_kind(old)}")
    target, source = vars(new), vars(old)
    # The constructor warns of dropout over a single layer.
    for name in ("dropout", "recompute", "kept", "full_width"):
        if name in target:
            target[name] = source.get(name, target[name])
    missing = [name for name, p in new._parameters.items() if p is not None]
    missing = [name for name in missing if parameters.get(name) is None]
    if missing:
        raise ValueError(f"{type(new).__name__}: expected a parameter for {missing[0]}, got none")
    new._parameters.clear()
    new._parameters.update(parameters)
    new._modules.update(old._modules)
    new._buffers.update(old._buffers)
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
    for name in HOOK_TABLES:
        target[name] = copy.copy(source[name])
    load_hooks: dict[int, Any] = target["_load_state_dict_pre_hooks"]
    for key, hook in load_hooks.items():
        if hook.with_module:  # it passes on the module that it was registered with
            load_hooks[key] = type(hook)(hook.hook, new)
    target.update({name: source[name] for name in added(old)})
    new.training = old.training
    return new


def converted(function: str, old: nn.Module, kind: type[nn.Module], **options: Any) -> nn.Module:
    """A module of class `kind`, made with these options, that takes over all that `old` has."""
    check_plain(old, function, f"the {_kind(old)}")
    parameters = cast(dict[str, nn.Parameter], old._parameters)
    return take_over(kind(**options, device="meta"), old, parameters)


# -------------------------------------------------------------------------------------------------
# accelerate


_CONTAINERS = (list, deque, dict, set, tuple, frozenset)
_REFERENCES = (MethodType, functools.partial, weakref.ref)  # cannot be given another module


def _contents(holder: Any) -> Iterable[tuple[Any, Any]]:
    """What a module, a container, a function or a reference holds, each with a name."""
    if isinstance(holder, torch.jit.ScriptModule):
        return ()
    if isinstance(holder, nn.Module):
        return [*holder._modules.items(), *vars(holder).items()]
    if isinstance(holder, dict):
        return holder.items()
    if isinstance(holder, MethodType):
        return [("__self__", holder.__self__)]
    if isinstance(holder, FunctionType):
        return [] if is_found_by_name(holder) else enumerate(bound(holder))
    if isinstance(holder, functools.partial):
        return [("func", holder.func), *enumerate(holder.args), *holder.keywords.items()]
    if isinstance(holder, weakref.ref):
        return [("()", holder())]
    return enumerate(holder)


def _holdings(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """All that `model` and what is in reach of it holds: path, holder, what is held."""
    seen, queue = {id(model)}, deque([("", cast(Any, model))])
    while queue:
        path, holder = queue.popleft()
        for name, held in _contents(holder):
            kinds = (nn.Module, FunctionType, *_CONTAINERS, *_REFERENCES)
            if issubclass(type(held), kinds):  # not a proxy
                inner = path if name == "_modules" else f"{path}.{name}" if path else str(name)
                yield inner, holder, held
                looks_elsewhere = isinstance(holder, (FunctionType, *_REFERENCES))
                inside = not (looks_elsewhere and isinstance(held, nn.Module))
                if inside and id(held) not in seen:
                    seen.add(id(held))
                    queue.append((inner, held))


def _replaced(value: Any, new: Mapping[nn.Module, Any]) -> Any:
    """The new module for an old one, also in tuples and frozen sets."""
    if _ours(value) is not None:
        return new.get(value, value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_replaced(part, new) for part in value]
        if not all(map(operator.is_, parts, value)):
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def _replace_in(holder: Any, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones in a module, list, dict, set or function."""
    if isinstance(holder, nn.Module):
        holder = vars(holder)
    if isinstance(holder, FunctionType) and not is_found_by_name(holder):
        for cell in holder.__closure__ or ():
            if not is_empty(cell):
                cell.cell_contents = _replaced(cell.cell_contents, new)
        holder.__defaults__ = _replaced(holder.__defaults__, new)
        _replace_in(holder.__kwdefaults__, new)
    if isinstance(holder, set):
        for held in [held for held in holder if _replaced(held, new) is not held]:
            holder.remove(held)
            holder.add(_replaced(held, new))
    elif isinstance(holder, (dict, list, deque)):
        for key, held in list(_contents(holder)):
            if (replacement := _replaced(held, new)) is not held:
                holder[key] = replacement


def accelerate(model: Model) -> Model:
    """Replace every nn.LSTM, nn.GRU, nn.RNN and their cells in `model`, in place, by ours.

    The state_dict stays as it is.

    Returns the model (the new module, where the model is itself one). Parameters are shared with
    the old modules, so an optimizer goes on working; hooks, buffers, submodules and attributes come
    along. Found are also those that modules hold in plain attributes, lists, dicts, sets and
    tuples; closures over one that is found hold the new one then. Subclasses of torch's classes,
    and scripted modules, are left alone. Ours are an nn.RNNBase but no nn.LSTM: a warning names
    code of the model that asks for that.

    Raises ValueError, and changes nothing, where something cannot come along: a forward or another
    method that was set on a module (torch.compile does), a weight that is computed (weight_norm,
    pruning, a parametrization), and one of these modules inside a bound method, functools.partial,
    weak reference or key of a dict that a module holds.
    """
    check_module("accelerate", model)
    holdings = [("", None, model), *_holdings(model)]
    names: dict[Any, str] = {}
    for path, holder, held in holdings:
        recurrent = isinstance(held, (nn.RNNBase, nn.RNNCellBase))
        parametrized = recurrent and is_parametrized(held)
        bases = MODULES.keys() | CELL_MODULES.keys()
        elsewhere = isinstance(holder, FunctionType)  # another model's, unless it is found too
        ours = _ours(held) is not None or (parametrized and type(held).__base__ in bases)
        if ours and not elsewhere:
            names.setdefault(held, path or f"the {_kind(held)}")
    for old, name in names.items():
        check_plain(old, "accelerate", name)
    probe = dict.fromkeys(names)
    for path, holder, held in holdings:
        fixed = [*(held if isinstance(held, dict) else ())]  # a key cannot change its hash
        fixed += [held] if isinstance(holder, _REFERENCES) else []
        if any(_replaced(value, probe) is not value for value in fixed):
            raise ValueError(
                "accelerate: expected no method, partial, weak reference or key of a dict that "
                "holds a recurrent module, since it would stay with the old one, "
                f"got {path}"
            )
    new: dict[nn.Module, nn.Module] = {old: cast(Any, _ours(old)).from_torch(old) for old in names}
    for old in new:  # a hook's handle refers to the table that the hook is in
        for name, table in vars(old).items():
            if name in HOOK_TABLES and isinstance(table, dict):
                table.update(vars(new[old])[name])
                vars(new[old])[name] = table
    warn_of_type_checks("accelerate", model, new)
    for holder in [*(held for _, _, held in holdings), *new.values()]:
        if _ours(holder) is None:
            _replace_in(holder, new)
    return cast(Model, _replaced(model, new))
