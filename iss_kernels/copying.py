# SPDX-License-Identifier: Apache-2.0
"""Copies a model, also one whose modules hold computed tensors.

torch refuses to deep-copy a tensor with a gradient history. nn.utils.prune, weight_norm and
spectral_norm leave such a tensor on a module: the weight that they compute before each call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """copy.deepcopy(model, memo), where tensors with a gradient history are copied without it.

    memo: what stands for objects that are not to be copied, by their id, as for copy.deepcopy; it
    is filled. Parameters, buffers, hooks and the sharing of tensors and modules are copied as
    deepcopy does. The copy's hooks compute its weights anew, from its own parameters, when it is
    called; until then it holds their present values.
    """
    memo = {} if memo is None else memo
    for tensor in _tensors_within(model, memo):
        if not tensor.is_leaf:
            memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo)
    return copy.deepcopy(model, memo)


def _tensors_within(model: nn.Module, memo: Mapping[int, Any]) -> Iterator[Tensor]:
    """Every tensor that deepcopy would meet in the model, and the gradients of these."""
    seen: dict[int, Any] = dict(memo)  # holds what it names, so that no id is given twice
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        # Functions, classes and Python modules are not copied: none is searched.
        if id(item) in seen or isinstance(item, (str, type, FunctionType, ModuleType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
            stack.append(item.grad if item.is_leaf else None)
        elif isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, (tuple, list, set, frozenset)):
            stack += item
        elif isinstance(item, partial):
            stack += [item.func, item.args, item.keywords]
        elif isinstance(item, MethodType):
            stack.append(item.__self__)
        stack += getattr(item, "__dict__", {}).values()
