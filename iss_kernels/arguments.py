# SPDX-License-Identifier: Apache-2.0
"""What a model of a stream is called with, and nested containers of tensors in general.

An example's arguments are kept by name, with which of their tensors are streamed. From these come
the arguments for a step, for fewer steps, and for another sequence that begins alike.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Model = TypeVar("Model", bound=nn.Module)  # what gives back a model, gives one of its class
Path: TypeAlias = tuple[Any, ...]  # names, keys and indices down to a tensor or a number


def check_module(function: str, model: Any) -> None:
    """TypeError for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")


def as_tensor(leaf: Any) -> Tensor:
    """A tensor as it is, a number as a tensor on the CPU."""
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device="cpu")


def call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a dict's keyword arguments, a tuple's, or the one argument."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if type(example) is tuple else (example,)), {}


def _is_leaf(tree: Any) -> bool:
    return isinstance(tree, (Tensor, bool, int, float, complex))


def mapped(
    tree: Any,
    function: Callable[[Path, Any], Any],
    path: Path = (),
    is_leaf: Callable[[Any], bool] = _is_leaf,
) -> Any:
    """Nested containers with function(path, leaf) for each leaf, by default tensors and numbers.

    What holds no leaf that changes is not copied.
    """
    if is_leaf(tree):
        return function(path, tree)
    if isinstance(tree, Mapping):
        old = dict(tree)
    elif isinstance(tree, (tuple, list)):
        old = dict(enumerate(tree))
    elif hasattr(tree, "__dict__") and not callable(tree):
        old = dict(vars(tree))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):  # one with slots
        old = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    else:
        return tree
    parts = {key: mapped(part, function, (*path, key), is_leaf) for key, part in old.items()}
    if all(parts[key] is part for key, part in old.items()):
        return tree
    if isinstance(tree, (tuple, list)):
        made = getattr(tree, "_make", type(tree))  # of a named tuple
        return made(parts.values())
    new: Any = copy.copy(tree)
    for key, part in parts.items():
        if isinstance(tree, Mapping):
            new[key] = part
        else:
            object.__setattr__(new, key, part)
    return new


def leaves(tree: Any) -> dict[Path, Any]:
    """The tensors and numbers of nested containers."""
    found: dict[Path, Any] = {}

    def note(path: Path, leaf: Any) -> Any:
        found[path] = leaf
        return leaf

    mapped(tree, note)
    return found


def tensors(tree: Any) -> list[Tensor]:
    """The tensors alone, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list):
        return [t for part in tree for t in tensors(part)]
    return [leaf for leaf in leaves(tree).values() if isinstance(leaf, Tensor)]


def named(path: Path) -> str:
    """A path as Python writes it: hidden[0]."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def cloned(_: Path, leaf: Any) -> Any:
    """A copy of a leaf, for `mapped`."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.copy(leaf)


def has_size(part: Any) -> bool:
    """Whether it is a tensor, or a list of numbers as lengths are."""
    numbers = isinstance(part, list) and all(isinstance(one, (int, float)) for one in part)
    return numbers or isinstance(part, Tensor)


def fresh(tree: Any) -> Any:
    """A copy of what a model is called with, which it may write into."""
    return mapped(tree, cloned, is_leaf=has_size)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Nested containers with function(tensor) for each tensor in them."""
    return mapped(tree, lambda _, leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, "" where it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def brief(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


class Arguments:
    """The example's arguments by name, and which of them are streamed.

    length: T, the steps of the example; None where the model takes one step per call.
    """

    def __init__(self, model: nn.Module, example: Any, fixed: Any) -> None:
        self.signature = inspect.signature(model.forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._in_order = [p.name for p in self.signature.parameters.values() if p.kind in kinds]
        args, kwargs = call_of(example)
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"Stream: expected example to fit {type(model).__name__}.forward, {error}"
            ) from error
        if any(isinstance(part, PackedSequence) for part in bound.arguments.values()):
            raise ValueError(
                "Stream: expected an example whose sequences are tensors, got a PackedSequence"
            )
        self.example: dict[str, Any] = mapped(bound.arguments, cloned)
        self.values: dict[str, Any] = self.example
        self.fixed = set(map(self._name, [fixed] if isinstance(fixed, (int, str)) else fixed))
        self.length: int | None = None
        self.dim = 0
        self.streamed: list[Path] = []

    def _name(self, key: Any) -> str:
        names: list[str] = list(self.values)
        if type(key) is int and -len(names) <= key < len(names):
            return names[key]
        if key not in names:
            raise ValueError(
                "Stream: expected fixed to hold names or positions of the example's arguments, "
                f"{', '.join(names)}, got {key!r}"
            )
        return str(key)

    def candidates(self) -> dict[Path, Tensor]:
        """The tensors that may be streamed."""
        return {
            path: leaf
            for path, leaf in leaves(self.values).items()
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and path[0] not in self.fixed
        }

    def stream(self, dim: int, steps: int | None) -> None:
        """Stream what has so many steps in dimension `dim`, by default as many as the first."""
        self.values = self.example
        found = self.candidates()
        first = next(iter(found.values()), None)
        if steps is None:
            if first is None or not -first.dim() <= dim < first.dim():
                got = "none" if first is None else f"{list(first.shape)}"
                raise ValueError(
                    f"Stream: expected time_dim={dim} to be a dimension of the first argument that "
                    f"is streamed, got one of shape {got}"
                )
            steps = first.size(dim)
        self.dim, self.length = dim, steps
        self.streamed = [
            path
            for path, leaf in found.items()
            if -leaf.dim() <= dim < leaf.dim() and leaf.size(dim) == self.length
        ]

    def fill(self) -> bool:
        """Take rows of up to T steps for rows of T, where the example has their lengths."""
        before = leaves(self.example)
        self.values = {
            name: part if name in self.fixed else _filled(part, self.length or 0)
            for name, part in self.example.items()
        }
        return any(
            leaf is not before[path]
            for path, leaf in leaves(self.values).items()
            if path not in self.streamed
        )

    def at(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """The arguments that a step of the stream is called with, of a whole sequence's."""

        def cut(path: Path, leaf: Any) -> Any:
            if self.length is not None and path in self.streamed:
                return leaf.select(self.dim, step)
            return self._counted(path, leaf, 1)

        return {
            name: mapped(values[name], cut, (name,))
            for name in dict.fromkeys(path[0] for path in self.streamed)
        }

    def shape(self) -> torch.Size:
        """The shape of a step of the first tensor that is streamed."""
        first = leaves(self.values)[self.streamed[0]]
        return torch.Size((first if self.length is None else first.select(self.dim, 0)).shape)

    def is_batch(self, batch: int) -> bool:
        """Whether a step has rows, `batch` of them, and is not the features of one row."""
        shape, first = self.shape(), leaves(self.values)[self.streamed[0]]
        features = batch == 1 and first.is_floating_point() and len(shape) == 1
        return shape[:1] == (batch,) and not (features and shape[0] > 1)

    def part(self, start: int, count: int, values: dict[str, Any] | None = None) -> dict[str, Any]:
        """Arguments for `count` steps of the example from `start` on; lengths follow."""

        def cut(path: Path, leaf: Any) -> Any:
            if self.length is not None and path in self.streamed:
                return leaf.narrow(self.dim, start, count).clone()
            return self._counted(path, leaf, count)

        return dict(mapped(self.values if values is None else values, cut))

    def _counted(self, path: Path, leaf: Any, count: int) -> Any:
        """A length that is T in the example: `count` there; all else as it is."""
        if self.length is None or path[0] in self.fixed:
            return cloned(path, leaf)
        if type(leaf) is int and leaf == self.length:
            return count
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.int32, torch.int64):
            same = leaf.numel() > 0 and bool((leaf == self.length).all())
            return torch.full_like(leaf, count) if same else leaf.clone()
        return cloned(path, leaf)

    def continued(self, start: int, seed: int) -> dict[str, Any]:
        """The example with other values from step `start` on."""
        random = torch.Generator("cpu").manual_seed(seed)

        def draw(path: Path, leaf: Any) -> Any:
            if path not in self.streamed:
                return cloned(path, leaf)
            rest = new = leaf.clone()
            if self.length is not None:
                rest = new.narrow(self.dim, start, self.length - start)
            if leaf.is_floating_point():
                finite = leaf[leaf.isfinite()].double().cpu()
                spread = float(finite.std(correction=0)) if finite.numel() > 0 else 0.0
                middle = float(finite.mean()) if finite.numel() > 0 else 0.0
                drawn = torch.randn(rest.shape, generator=random, device="cpu").double()
                rest.copy_(drawn * (spread or 1.0) + middle)
            else:  # what the model takes as an index stays one
                which = torch.randint(leaf.numel(), rest.shape, generator=random, device="cpu")
                rest.copy_(leaf.flatten()[which.to(leaf.device)])
            return new

        return dict(mapped(self.values, draw))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a step by name. Raises TypeError as the model's forward does."""
        if not kwargs and len(args) <= len(self._in_order):
            return dict(zip(self._in_order, args, strict=False))  # far sooner than binding
        return dict(self.signature.bind_partial(*args, **kwargs).arguments)

    def call(self, model: nn.Module, values: dict[str, Any]) -> Any:
        """The model's answer."""
        bound = inspect.BoundArguments(self.signature, values)
        return model(*bound.args, **bound.kwargs)


def _filled(tree: Any, length: int) -> Any:
    """`length` in the place of lengths: B integers from 1 to it, the largest of which it is."""
    if isinstance(tree, Tensor):
        whole = tree.dim() == 1 and tree.dtype in (torch.int32, torch.int64) and tree.numel() > 0
        fits = whole and int(tree.min()) >= 1 and int(tree.max()) == length
        return torch.full_like(tree, length) if fits and int(tree.min()) < length else tree
    if type(tree) in (list, tuple):
        if tree and all(type(n) is int and n >= 1 for n in tree) and max(tree) == length:
            return type(tree)([length] * len(tree))
        return type(tree)(_filled(part, length) for part in tree)
    return tree
