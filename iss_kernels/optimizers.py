# SPDX-License-Identifier: Apache-2.0
"""What training holds of a model's parameters goes on after a shrink: optimisers, gradients, hooks.

An optimiser keeps its state by parameter. Where a state is elementwise, as a momentum is, the state
of a parameter without some of its rows and columns is the state without these rows and columns.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import threshold

# Takes the units that left out of a tensor that has the shape of the parameter.
Cut: TypeAlias = Callable[[nn.Parameter, Tensor], Tensor]


def several(optimizer: Any) -> list[Any]:
    """The optimisers in what the user gave: None, one, or several, each once.

    Raises TypeError for others, and ValueError for a wrapper whose inner optimiser keeps a state or
    groups of its own, which would go on with the old parameters.
    """
    if optimizer is None:
        return []
    given = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for each in given:
        # Wrappers that are no torch.optim.Optimizer have these too.
        if not all(hasattr(each, name) for name in ("param_groups", "state")):
            got = type(each).__name__
            raise TypeError(f"shrink: expected an optimizer or several of them, got {got}")
    given = list({id(each): each for each in given}.values())
    for each in given:
        held = getattr(each, "__dict__", {}).values()
        for inner in (one for one in held if isinstance(one, torch.optim.Optimizer)):
            shared = inner.state is each.state and inner.param_groups is each.param_groups
            if not shared and not any(inner is one for one in given):
                kinds = type(each).__name__, type(inner).__name__
                raise ValueError(
                    f"shrink: expected the optimizer inside of {kinds[0]} too, which has a "
                    f"state of its own, got {kinds[0]} without its {kinds[1]}"
                )
    return given


def move(
    optimizers: Sequence[Any],
    model: nn.Module,
    new: Mapping[nn.Parameter, nn.Parameter],
    cut: Cut,
) -> None:
    """Let optimisers go on with new parameters in the place of the model's.

    new: {parameter of the model: the one that takes its place}; cut: gives the state that goes with
    it. The optimiser stays the same object, with its param_groups in their order and all that these
    hold but the parameters, so a learning rate scheduler and a GradScaler that know it go on too.
    Parameters of other models stay in it as they are.

    Raises ValueError before anything changes: where a state is neither of its parameter's shape nor
    a single number, and for an optimiser without a parameter of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = [_states(each, names, new, cut) for each in optimizers]
    for each, moved in zip(optimizers, states, strict=True):
        for group in each.param_groups:
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
        for parameter, state in moved.items():
            if parameter in each.state:  # a wrapper and the optimiser inside of it may share it
                del each.state[parameter]
                each.state[new[parameter]] = state


def _states(
    optimizer: Any,
    names: Mapping[nn.Parameter, str],
    new: Mapping[nn.Parameter, nn.Parameter],
    cut: Cut,
) -> dict[nn.Parameter, dict[str, Any]]:
    """{parameter that is replaced: the state of the one in its place}."""
    kind = type(optimizer).__name__
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter in names for parameter in held):
        raise ValueError(
            f"shrink: expected an optimizer of the model's parameters, "
            f"got {kind} with none of these"
        )
    states = {}
    # Those of parameters that lose nothing too: LBFGS keeps one state for all of them.
    for parameter in (parameter for parameter in held if parameter in optimizer.state):
        state = optimizer.state[parameter]
        for key, value in state.items():
            if not (_is_number(value) or _is_alike(parameter, value)):
                shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
                raise ValueError(
                    f"shrink: expected an optimizer whose state is of its parameter's shape, "
                    f"{list(parameter.shape)} for {names.get(parameter, 'another')}, "
                    f"got {kind} with {key}{shape or f', a {type(value).__name__}'}"
                )
        if parameter in new:
            states[parameter] = {
                key: cut(parameter, value) if _is_alike(parameter, value) else value
                for key, value in state.items()
            }
    return states


def _is_number(value: Any) -> bool:
    """Whether a state is one of the whole parameter, such as the number of steps."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return plain or (isinstance(value, Tensor) and value.numel() == 1)


def _is_alike(parameter: nn.Parameter, value: Any) -> bool:
    """Whether a state has an element for each of the parameter's."""
    dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return dense and value.shape == parameter.shape


def metric(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> list[Tensor | float | None]:
    """What the last step divided the gradient of each parameter by, elementwise or as a number.

    1 / learning rate for SGD, (sqrt(second moment) + eps) / learning rate for Adam and its kin,
    which is 0 here where the second moment is: such an element has not moved; None for parameters
    that have not moved yet. Raises TypeError for other optimisers, and ValueError for one that
    lacks a parameter or whose steps for one gradient do not add up to a number.
    """
    optimizer = _innermost(optimizer)
    if type(optimizer) not in _WITH_METRIC:
        *most, last = (kind.__name__ for kind in _WITH_METRIC)
        raise TypeError(
            "proximal_: expected a step size, or an optimizer of type "
            f"{', '.join(most)} or {last}, got {type(optimizer).__name__}"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    # All are None where a loop has set them so since the step.
    known = any(parameter.grad is not None for parameter in groups)
    found: list[Tensor | float | None] = []
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            found.append(None)
        elif parameter in groups:
            skipped = known and parameter.grad is None
            state = optimizer.state.get(parameter)
            found.append(_metric(optimizer, groups[parameter], state, skipped))
        else:
            raise ValueError(
                f"proximal_: expected an optimizer that has {name}, got one without it"
            )
    return found


def _innermost(optimizer: Any) -> Any:
    """What wrappers without a state of their own, such as Accelerate's and Lightning's, hold."""
    while True:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            return optimizer
        if inner.state is not optimizer.state or inner.param_groups is not optimizer.param_groups:
            return optimizer
        optimizer = inner


_WITH_METRIC = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad,
)  # fmt: skip


def _metric(
    optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any] | None, skipped: bool
) -> Tensor | float | None:
    """skipped: whether the last step passed over the parameter, as far as gradients tell."""
    rate = float(group["lr"])
    if rate == 0:
        return None
    if momentum := group.get("momentum", 0):  # the steps for one gradient add up to this
        for name in ("momentum", "dampening"):
            if group.get(name, 0) >= 1:
                raise ValueError(
                    f"proximal_: expected an optimizer of {name} below 1, got {group[name]}"
                )
        rate *= (1 - group.get("dampening", 0)) / (1 - momentum)
    if isinstance(optimizer, torch.optim.SGD):
        return None if (not state if momentum else skipped) else 1 / rate
    if not state or not state["step"]:  # a GradScaler skips a step whose gradient overflowed
        return None
    step, seen = float(state["step"]), 1.0  # share of the weights of the average that are in it
    if isinstance(optimizer, torch.optim.Adamax):
        return threshold(state["exp_inf"], group["eps"], 0.0).div_(rate)
    if isinstance(optimizer, torch.optim.Adagrad):
        squares = state["sum"]
        rate /= 1 + (step - 1) * group["lr_decay"]
    elif isinstance(optimizer, torch.optim.RMSprop):
        squares = state["square_avg"]
        if group["centered"]:
            squares = (squares - state["grad_avg"].square()).clamp_min(0)
    else:
        squares = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        seen = 1 - group["betas"][1] ** step
    root: Tensor = squares.sqrt()
    eps = root.new_tensor(group["eps"] / rate)
    torch.add(eps, root, alpha=1 / (rate * math.sqrt(seen)), out=root)
    return threshold(root, float(eps), 0.0, inplace=True)


def hand_over(new: Mapping[nn.Parameter, nn.Parameter], cut: Cut) -> None:
    """Give every new parameter what hangs on the one whose place it takes.

    Its gradient, cut as it is, so that a sum over several batches goes on; its hooks, with handles
    that still remove them; and attributes that a user put there.
    """
    for old, its in new.items():
        if old.grad is not None:
            its.grad = cut(old, old.grad)
        vars(its).update(vars(old))
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks: OrderedDict[int, Any] | None = getattr(old, table)
            if hooks is not None:
                setattr(its, table, hooks)
