# SPDX-License-Identifier: Apache-2.0
"""save and load: a model in one safetensors file that knows the model's sizes.

The file holds every parameter and buffer by its name, and as metadata the class and sizes of each
recurrent module. All else that a shrunken model differs in follows from the shapes of its tensors.
The user's class builds the rest of the model, so that a file holds no code.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from iss_kernels import __version__, widths
from iss_kernels.accelerate import (
    _REFERENCES,
    HOOK_TABLES,
    _contents,
    _holdings,
    _name,
    added,
    check_plain,
    take_over,
)
from iss_kernels.arguments import Model, check_module
from iss_kernels.linear import PreparedLinear, is_plain_linear
from iss_kernels.prepare import Prepared, PreparedCell, prepared_type
from iss_kernels.recurrent import CELL_MODULES, MODULES, Recurrent
from iss_kernels.recurrent_cell import options_of_cell
from iss_kernels.shrink import fit
from iss_kernels.states import Shrinkable
from iss_kernels.stored import FORMATS, Snapshot

FORMAT = 1
_KEY = "iss_kernels"  # of the metadata; its value is JSON
_LINEAR = "Linear"  # the kind of a Linear layer that `prepare` made
_KEPT = "iss_kernels.kept."  # before the name of a module whose units have left in part
_SIZES = ("input_size", "hidden_size", "proj_size")  # the options that shrinking changes
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """A module as the file describes it: a recurrent one, or a Linear that `prepare` made.

    kind: the name of its class, torch's or ours. options: the arguments by which the class makes
    one. weights: the format of a prepared module, "" for others. before: the width of each state
    before units left, for each layer and direction; empty where none did. The file then holds, as
    one bool tensor, which of these units stayed. full_width: see `Shrinkable`.
    """

    kind: str
    options: dict[str, Any]
    weights: str
    before: list[list[int]]
    full_width: bool = False

    def __post_init__(self) -> None:
        plain = isinstance(self.kind, str) and isinstance(self.options, dict)
        if not plain or self.weights not in ("", *FORMATS):
            raise ValueError(f"unknown: {self}")

    def masks(self, stayed: Any) -> list[list[Tensor]]:
        """What `Shrinkable.remember` takes, out of the tensor of the file."""
        parts = iter(stayed.split(sum(self.before, [])))
        return [[next(parts) for _ in states] for states in self.before]


@dataclass(frozen=True)
class _Metadata:
    """What the file says beside its tensors.

    modules: {name: recurrent or prepared module}. shared: the names of each tensor that has
    several; the file holds it under the first. transient: names of the buffers that a state_dict
    leaves out. widths: numbers in the model's own modules that shrinking changed: module, place
    there, number.
    """

    modules: dict[str, _Entry]
    shared: list[list[str]]
    transient: list[str]
    widths: list[tuple[str, widths.Place, int]]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a safetensors file that `load` reads, whatever sizes the model has.

    The file holds all parameters and buffers (also those that a state_dict leaves out, which
    shrinking cuts too), the sizes of the recurrent modules, and no code. What `prepare` made is
    saved in its format. The file takes the place of an older one in the last step, so that an error
    leaves the older one as it was.

    Raises ValueError for a model with state that is no plain tensor; OSError where the file cannot
    be written.

    >>> import tempfile, iss_kernels as iss
    >>> from torch import nn
    >>> small = nn.Sequential(nn.Embedding(9, 4), iss.ISSLSTM(4, [3, 5], num_layers=2))
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> iss.save(small, path)
    >>> fresh = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 8, num_layers=2))
    >>> iss.load(path, fresh)
    Sequential(
      (0): Embedding(9, 4)
      (1): ISSLSTM(4, [3, 5], num_layers=2)
    )
    """
    check_module("save", model)
    tensors, transient = _tensors_of(model)
    for name, tensor in tensors.items():
        _check_tensor("save", name, tensor)
        if tensor.is_meta or tensor.dtype not in _DTYPES:
            got = "one on the meta device" if tensor.is_meta else str(tensor.dtype)
            raise ValueError(f"save: expected {name} with values that a file can hold, got {got}")
    others = [name for name in model.state_dict() if name not in tensors]
    if others:
        raise ValueError(
            "save: expected a model whose state is its parameters and buffers, got other state "
            f"under {others[0]}"
        )
    _check_held(model, tensors)
    modules = {path: _entry(path, module) for path, module in model.named_modules()}
    metadata = _Metadata(
        {path: entry for path, entry in modules.items() if entry is not None},
        [names for names in _shared(tensors) if len(names) > 1],
        [name for name in tensors if name in transient],
        [*widths.changed(model)],
    )
    text = json.dumps({"format": FORMAT, "version": __version__, **asdict(metadata)})
    values = {name: _copy_of(tensors[name]) for name, *_ in _shared(tensors)}
    for name, module in model.named_modules():
        if name in metadata.modules and metadata.modules[name].before:
            values[_KEPT + name] = _stayed(cast(Shrinkable, module))
    _write(safetensors.torch.save(values, {_KEY: text}), path)


def _check_held(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model that holds parameters which have no name in it."""
    named = set(map(id, tensors.values()))
    for path, holder, held in _holdings(model):
        if isinstance(holder, _REFERENCES) or isinstance(held, _REFERENCES):
            continue  # to what may be another's
        if held is getattr(holder, "_flat_weights", None):
            continue  # torch's list of weights, some of which other code may have replaced
        inside = (
            held.parameters() if isinstance(held, nn.Module) else dict(_contents(held)).values()
        )
        if any(isinstance(p, nn.Parameter) and id(p) not in named for p in inside):
            raise ValueError(
                "save: expected a model that registers all parameters it holds (nn.ModuleList and "
                f"nn.ParameterList do), got others in {path}"
            )


def _stayed(module: Shrinkable) -> Tensor:
    """bool: for each layer and direction, and each state, which units stayed, one after another."""
    masks = []
    for units, before in itertools.chain(*(module.kept or ())):
        masks.append(torch.zeros(before, dtype=torch.bool, device="cpu"))
        masks[-1][units.cpu()] = True
    return torch.cat(masks)


def _write(data: bytes, path: str | os.PathLike[str]) -> None:
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _copy_of(tensor: Tensor) -> Tensor:
    """Its values alone, in memory of their own on the CPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


@torch.inference_mode(False)
@torch.no_grad()
def load(path: str | os.PathLike[str], model: Model) -> Model:
    """Give a model the sizes and values of a file that `save` wrote; returns the model.

    model: of the class that made the saved one, with any sizes and values; what is on the meta
    device comes to the CPU. It is changed in place: recurrent modules get the class and sizes of
    the file, parameters and buffers its shapes, dtypes and values, on the devices that they are on.
    Hooks, the training mode and requires_grad stay as they are. An optimizer is to be made
    afterwards.

    Raises ValueError, and changes nothing, for a file that `save` did not write, that is damaged or
    of a newer format, and for a model of another structure; OSError where the file cannot be read.
    See `save` for an example.
    """
    check_module("load", model)
    metadata, stored = _read(path)
    new = _replacements(model, metadata, stored)
    tensors, transient = _tensors_of(model, new)
    _check_names(metadata, tensors, transient, stored)
    for name, place, number in metadata.widths:
        if not widths.has_number(model, name, place):
            raise ValueError(
                f"load: expected a model with the number {number} at "
                f"{'.'.join(map(str, (name, *place))).lstrip('.')}, got one without"
            )
    resized = [
        module
        for path, module in model.named_modules(remove_duplicate=False)
        if _check_shapes(path, module, new.get(module, module), stored)
    ]
    shared = _shared({name: tensor for name, tensor in tensors.items() if name in stored})
    values = [
        stored[first].to("cpu" if own.is_meta else own.device, copy=True)
        for first, own in ((names[0], tensors[names[0]]) for names in shared)
    ]
    # Nothing below fails.
    for old, made in new.items():
        # In place, so that whatever refers to the module, a hook's handle too, goes on to do so.
        vars(made).update({table: vars(old)[table] for table in HOOK_TABLES})
        old.__dict__, old.__class__ = vars(made), type(made)
    for names, value in zip(shared, values, strict=True):
        _fill(model, names, tensors[names[0]], value)
    for module in resized:
        fit(module)
    for name, place, number in metadata.widths:
        widths.set_number(model, name, place, number)
    for module in model.modules():
        if type(module) in MODULES:  # torch keeps a list of the weights, and cuDNN's form of them
            cast(nn.RNNBase, module)._init_flat_weights()
    return model


def _read(path: str | os.PathLike[str]) -> tuple[_Metadata, dict[str, Tensor]]:
    """The metadata of a file and its tensors, by all of their names."""
    with open(path, "rb"):
        pass  # which says what is wrong with a path better than safetensors does
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load: expected a whole safetensors file, got {os.fspath(path)!r}: {error}"
        ) from error
    if text is None:
        raise ValueError(
            f"load: expected a file that save wrote, got {os.fspath(path)!r} without its metadata"
        )
    try:
        found = json.loads(text)
        number, version = int(found["format"]), found["version"]
        if number <= FORMAT:
            modules = {path: _Entry(**entry) for path, entry in found["modules"].items()}
            shared = [list(map(str, names)) for names in found["shared"]]
            for first, *others in shared:
                stored |= dict.fromkeys(others, stored[first])
            numbers = [(str(m), tuple(place), int(n)) for m, place, n in found["widths"]]
            transient = list(map(str, found["transient"]))
            return _Metadata(modules, shared, transient, numbers), stored
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: expected metadata as save writes it, got others in {os.fspath(path)!r}"
        ) from error
    raise ValueError(
        f"load: expected a file of format {FORMAT}, got {os.fspath(path)!r} of format {number}, "
        f"which iss_kernels {version} wrote"
    )


# -------------------------------------------------------------------------------------------------
# Tensors


def _tensors_of(
    model: nn.Module, new: Mapping[nn.Module, nn.Module] | None = None
) -> tuple[dict[str, Tensor], set[str]]:
    """Parameters and buffers by all of their names; names of buffers that no state_dict has.

    new: modules that are to take the place of others.
    """
    tensors: dict[str, Tensor] = {}
    transient = set()
    for path, old in model.named_modules(remove_duplicate=False):
        module, prefix = (new or {}).get(old, old), path and f"{path}."
        for held in (module._parameters, module._buffers):
            tensors |= {prefix + name: t for name, t in held.items() if t is not None}
        transient |= {prefix + name for name in module._non_persistent_buffers_set}
    return tensors, transient


def _shared(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _check_tensor(function: str, name: str, tensor: Tensor) -> None:
    """Refuse what is not a dense tensor of torch's own classes."""
    got = ""
    if is_lazy(tensor):
        got = "one without a shape; call the model once before"
    elif type(tensor) not in (Tensor, nn.Parameter):
        got = f"a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        got = f"one of {tensor.layout if tensor.layout != torch.strided else tensor.dtype}"
    if got:
        raise ValueError(f"{function}: expected {name} to be a dense tensor, got {got}")


def _check_names(
    metadata: _Metadata, tensors: Mapping[str, Tensor], transient: set[str], stored: dict[str, Any]
) -> None:
    """Refuse a model that does not have the tensors of the file, shared as there."""
    # The code of a model may make a buffer of its own in a call, which a state_dict leaves out.
    missing = [n for n in stored if n not in tensors and n not in metadata.transient]
    further = [
        n for n, t in tensors.items() if n not in stored and (n not in transient or t.is_meta)
    ]
    for names, which in ((missing, "without"), (further, "with a further")):
        if names:
            more = f" and {len(names) - 3} others" if len(names) > 3 else ""
            raise ValueError(
                "load: expected a model with the parameters and buffers of the file, got one "
                f"{which} {', '.join(names[:3])}{more}"
            )
    shared = {name: names for names in metadata.shared for name in names}
    for names in _shared({name: t for name, t in tensors.items() if name in stored}):
        expected = [n for n in shared.get(names[0], names[:1]) if n in tensors]
        if set(names) != set(expected):
            raise ValueError(
                f"load: expected one tensor under {', '.join(expected)}, as in the file, "
                f"got one under {', '.join(names)}"
            )


def _check_shapes(
    path: str, module: nn.Module, made: nn.Module, stored: Mapping[str, Tensor]
) -> bool:
    """Refuse what `load` cannot put into a module; return whether that changes a shape.

    made: what takes the place of the module, or the module itself.
    """
    prefix, differs = path and f"{path}.", False
    for name, own in [*made._parameters.items(), *made._buffers.items()]:
        value = stored.get(prefix + name)
        if own is None or value is None:
            continue
        _check_tensor("load", prefix + name, own)
        if own.requires_grad and not (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"load: expected {prefix}{name} without requires_grad, as {value.dtype} has no "
                "gradient, got one with it"
            )
        fixed = 2 if isinstance(made, _ConvNd) else own.dim()  # a kernel keeps its size
        if own.dim() != value.dim() or own.shape[fixed:] != value.shape[fixed:]:
            raise ValueError(
                f"load: expected {prefix}{name} of a shape like {list(value.shape)}, as in the "
                f"file, got {list(own.shape)}"
            )
        differs |= own.shape != value.shape
    if made is module and isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        for name, own in _tensors_of(module)[0].items():
            value = stored.get(prefix + name, own)
            if own.shape != value.shape:
                raise ValueError(
                    f"load: expected {prefix}{name} of shape {list(value.shape)}, which a "
                    f"{type(module).__name__} cannot be given later, got {list(own.shape)}"
                )
    return differs


def _fill(model: nn.Module, names: list[str], own: Tensor, value: Tensor) -> None:
    """Give a tensor of the model, which has these names, other values, a dtype and a shape."""
    if own.is_meta or own.is_inference():  # which cannot hold the memory of another
        new = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
        for name in names:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, new)
    elif (own.shape, own.dtype) == (value.shape, value.dtype) and 0 not in own.stride():
        own.copy_(value)  # into its memory, which another tensor may share
    else:
        own.data = value  # the tensor stays, for all that refer to it
        own.grad = None


# -------------------------------------------------------------------------------------------------
# Modules


def _kinds() -> dict[str, tuple[Any, Any, Any]]:
    """{name of a class that a file may name: the class; torch's and ours of that kind}."""
    pairs = (MODULES | CELL_MODULES).items()
    return {kind.__name__: (kind, *pair) for pair in pairs for kind in pair}


def _options(module: Any, ours: Any) -> dict[str, Any]:
    """The arguments by which its class makes such a module, as JSON gives them back."""
    options = ours.options_of if issubclass(ours, Recurrent) else options_of_cell
    return json.loads(json.dumps(options(module), default=int))  # type: ignore[no-any-return]


def _entry(path: str, module: nn.Module) -> _Entry | None:
    """What the file says of a module; None for most, and where weights are computed."""
    if isinstance(module, PreparedLinear):
        return _Entry(_LINEAR, {}, module.weights, [])
    if isinstance(module, (Prepared, PreparedCell)):
        kinds = (*MODULES.values(), *CELL_MODULES.values())
        ours: Any = next(kind for kind in kinds if isinstance(module, kind))
        options = _options(module, ours)
        return _Entry(ours.__name__, options, module.weights, _before(module), module.full_width)
    kind, _, ours = _kinds().get(type(module).__name__, (None, None, None))
    if type(module) is not kind:
        return None
    options = _options(module, ours)
    for name, expected in kind(**options, device="meta").named_parameters():
        own = module._parameters.get(name)
        if own is None:
            return None
        if own.shape != expected.shape:
            raise ValueError(
                f"save: expected {path and f'{path}.'}{name} of shape {list(expected.shape)}, as "
                f"the sizes of its {kind.__name__} say, got {list(own.shape)}"
            )
    full_width = getattr(module, "full_width", False)
    return _Entry(kind.__name__, options, "", _before(module), full_width)


def _before(module: Any) -> list[list[int]]:
    """The width of each state before units left, for each layer and direction."""
    return [[k.before for k in states] for states in getattr(module, "kept", None) or ()]


def _replacements(
    model: nn.Module, metadata: _Metadata, stored: dict[str, Tensor]
) -> dict[nn.Module, nn.Module]:
    """{recurrent module of the model: one of the class and sizes of the file, where they differ}.

    Takes out of `stored` what is no tensor of the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, Snapshot):
            raise ValueError(
                f"load: expected a model that is not prepared, got {path or 'one'} as a "
                f"{type(module).__name__}; load first, then prepare"
            )
    new = {}
    for path, entry in metadata.modules.items():
        label, old = path or "the model", cast(Any, modules.get(path))
        prefix = path and f"{path}."
        values = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        if entry.kind == _LINEAR:
            new[old] = _made_linear(label, entry.weights, old, values)
            continue
        stayed = stored.pop(_KEPT + path, None)
        kind, options, differ = _wanted(label, entry, old)
        if not (differ or type(old) is not kind or entry.weights or entry.before or _before(old)):
            continue
        check_plain(old, "load", label)
        made = _made(label, kind, options, entry.weights, old, values)
        if isinstance(made, Shrinkable):
            made.kept, made.full_width = None, entry.full_width  # not those of the old module
        if entry.before:
            try:
                made.remember(entry.masks(stayed))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"load: expected units of {label} that fit its sizes, got others in the file"
                ) from error
        new[old] = made
    return new


def _wanted(label: str, entry: _Entry, old: Any) -> tuple[Any, dict[str, Any], bool]:
    """The class and options of what takes the place of a module; whether the options differ."""
    if entry.kind not in _kinds():
        raise ValueError(
            f"load: expected {label} of a class that this version has, got {entry.kind!r}"
        )
    kind, torchs, ours = _kinds()[entry.kind]
    if not isinstance(old, (torchs, ours)):
        names = " or ".join(map(_name, dict.fromkeys((torchs, ours))))
        got = "none" if old is None else f"a {type(old).__name__}"
        raise ValueError(f"load: expected {label} to be an {names}, as in the file, got {got}")
    options = _options(old, ours)
    for option, value in entry.options.items():
        own = options.get(option)
        resized = option in _SIZES and value and own
        if value != own and not resized and not option.startswith("dropout"):
            raise ValueError(
                f"load: expected {label} with {option}={value!r}, as in the file, got {own!r}"
            )
    sizes = {option: entry.options.get(option) for option in _SIZES if option in options}
    # A module of torch's that has become ours stays ours.
    kind = ours if entry.weights or kind is ours else type(old)
    return kind, options | sizes, options | sizes != options


def _made(
    label: str,
    kind: Any,
    options: dict[str, Any],
    weights: str,
    old: Any,
    values: dict[str, Tensor],
) -> Any:
    """A module of a class with these options, which has all else that `old` has.

    Its parameters are those of `old`, to be resized; values: what they will hold.
    """
    try:
        made = kind(**options, device="meta")
        made = _prepared(made, old, weights) if weights else made
    except (RuntimeError, TypeError, ValueError) as error:
        sizes = {option: value for option, value in options.items() if option in _SIZES}
        raise ValueError(
            f"load: expected {label} of sizes that an {kind.__name__} can have, got {sizes}"
        ) from error
    _check_values(label, made, values, weights)
    return made if weights else take_over(made, old, old._parameters)


def _check_values(label: str, made: Any, values: Mapping[str, Tensor], weights: str) -> None:
    """Refuse values of other shapes than a module has, or of other dtypes where it is prepared."""
    for name, expected in _tensors_of(made)[0].items():
        value = values.get(name, expected)
        held = weights and name != "like"
        if value.shape != expected.shape or (held and value.dtype != expected.dtype):
            raise ValueError(
                f"load: expected {name} of shape {list(expected.shape)}, as the sizes of {label} "
                f"say, got {list(value.shape)} of {value.dtype} in the file"
            )


def _made_linear(label: str, weights: str, old: Any, values: Mapping[str, Tensor]) -> nn.Module:
    """A prepared Linear of the sizes that these values have, with all else that `old` has."""
    if not is_plain_linear(old):
        got = "none" if old is None else f"a {type(old).__name__}"
        computed = " with a weight or forward of its own" * (type(old) is nn.Linear)
        raise ValueError(
            f"load: expected {label} to be an nn.Linear, as in the file, got {got}{computed}"
        )
    weight = values.get("weight")
    if weight is None or weight.dim() != 2 or not weights:
        raise ValueError(f"load: expected a weight of two dimensions for {label} in the file")
    source = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in values, device="meta")
    made = PreparedLinear(_zeros(source), weights)
    _check_values(label, made, values, weights)
    return _with_rest(made, old, old.weight)


def _zeros(module: nn.Module) -> Any:
    """A module, on the CPU in float32, with zeros."""
    source = module.to_empty(device="cpu").float()
    for parameter in source.parameters():
        parameter.detach().zero_()
    return source


@torch.no_grad()
def _prepared(made: Any, old: Any, weights: str) -> nn.Module:
    """What `prepare` makes of a module, whose values are to follow, with all that `old` has."""
    like = next(iter(old._parameters.values()))
    return _with_rest(prepared_type(type(made))(_zeros(made), weights), old, like)


def _with_rest(fast: nn.Module, old: Any, like: Tensor) -> nn.Module:
    """A prepared module on the device of `like`, with all but the weights that `old` has."""
    fast = fast.to("cpu" if like.is_meta else like.device, like.dtype)
    for table in ("_parameters", "_buffers", "_modules"):
        others = {k: v for k, v in vars(old)[table].items() if k not in fast._buffers}
        vars(fast)[table].update(others)
    vars(fast).update({name: vars(old)[name] for name in added(old)}, training=old.training)
    return fast
