# SPDX-License-Identifier: Apache-2.0
"""export_onnx: a model as an ONNX file, one LSTM, GRU or RNN node for each layer.

torch's exporters make the file, and onnx_nodes.py what stands in it for a recurrent module. What is
here: which sizes may differ from call to call, and whether the file gives the model's answers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from iss_kernels import onnx_nodes
from iss_kernels.arguments import brief, call_of, first_line
from iss_kernels.copying import copied
from iss_kernels.recurrent import CELL_MODULES, MODULES, Recurrent
from iss_kernels.recurrent_cell import RecurrentCell
from iss_kernels.steps import widened
from iss_kernels.stored import Snapshot
from iss_kernels.tracer import LIBRARIES


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    weights: str | None = None,
    dynamo: bool | None = None,
) -> None:
    """Write `model` to `path` as ONNX, with a standard LSTM, GRU or RNN node for each layer.

    model: any module, with recurrent modules of torch or of this package, shrunken or prepared ones
    too; it is exported in eval mode, on the CPU, and stays as it is.
    example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword
    arguments. Tensors become inputs, numbers and the like stay in the file as they are. The file's
    outputs are the tensors that the model returns, in order.
    dynamic: {input: {dimension: name}}, the sizes that may differ from call to call. By default
    those that the model lets differ, batch and time as a rule, as calls with longer examples show;
    a warning says which of them the file fixes, as a loop over steps in Python makes it.
    input_names: of the tensors in `example`, in order; by default the names of forward's arguments,
    with _0, _1, ... where one holds several tensors.
    opset: the version of ONNX's operators; by default that of torch's exporter.
    weights: "int8" stores the weights of LSTMs in 8 bits, in DynamicQuantizeLSTM nodes that ONNX
    Runtime has. A model of `prepare` with int8 weights is exported so by default.
    dynamo: which of torch's exporters, True for the one by torch.export, False for the one by
    torch.jit.trace; by default the first and, where that refuses, the second.

    Where both directions of a layer have one size they are one node, else a node each. A projection
    becomes a product after the layer. A model's pack_padded_sequence, and `lengths`, become
    sequence_lens, which OpenVINO (2026.4) reads in a model of fixed sizes alone. What ONNX has no
    node for, an ISSRHN and `resets`, is written step by step, which fixes the number of steps.
    Weights are named as the module that holds them, "lstm.W_l0".

    Where ONNX Runtime is installed the file is run before it is kept, on the example, on longer
    ones, on sizes of 1 and 2 and on other values, and compared with the model, unless its own
    answers differ from call to call. What 16 or 8 bits round is not compared: a prepared model
    answers with the float32 values of its weights then, and a file of int8 is compared in its
    float32 form. A trace holds as a constant what code computed from the example's values: a
    warning names the lines that did, and without ONNX Runtime dynamo=False is never a default. A
    warning also says where ONNX Runtime cannot run the file, as with some operators of float64.

    Equivalent to torch.onnx.export(model, example, path), which serves modules of this package too,
    but for packed sequences. It needs the packages onnx and, but with dynamo=False, onnxscript.

    Raises ImportError for a package that is missing, TypeError or ValueError for an argument that
    does not fit, and RuntimeError for what torch's exporter or ONNX cannot express, a size that the
    model fixes though `dynamic` has it, and a file with other answers. No file is left then.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, torch.zeros(7, 1, 3), f"{folder}/model.onnx")
    """
    ways = [dynamo]
    if dynamo is None:
        ways = [True, False] if _is_installed("onnxruntime") else [True]
    for package in ("onnx", *["onnxscript"] * bool(ways[0])):
        if not _is_installed(package):
            raise ImportError(
                f"export_onnx: expected the package {package} to be installed "
                "(pip install iss_kernels[export])"
            )
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "export_onnx: expected a torch.nn.Module, neither traced nor scripted, got "
            f"{type(model).__name__}"
        )
    if weights not in (None, "float32", "int8"):
        raise ValueError(
            f"export_onnx: expected weights to be 'float32' or 'int8', got {weights!r}"
        )
    if weights is None:
        prepared = [m for m in model.modules() if isinstance(m, Snapshot)]
        weights = "int8" if any(m.weights == "int8" for m in prepared) else "float32"
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > _LARGEST:
        raise ValueError(
            f"export_onnx: expected parameters of at most {_LARGEST} bytes, which is what one file "
            f"of ONNX holds, got {size}"
        )
    small = copied(model).eval().cpu()
    recurrent = _recurrent(small)
    args = _Arguments(small, example, input_names)
    sizes = args.found_sizes() if dynamic is None else args.given_sizes(dynamic)
    for module in recurrent if weights == "int8" else []:
        onnx_nodes.check_int8(module)
    errors: list[RuntimeError] = []
    for way in ways:
        try:
            content, inputs, dropped, was_run = _content(
                small,
                recurrent,
                args,
                sizes,
                output_names,
                opset,
                bool(way),
                dynamic is None,
                weights == "int8",
            )
            break
        except RuntimeError as error:
            errors.append(error)
    else:  # what the first one refuses, or how the file of the second one is wrong
        worst = next((error for error in errors if isinstance(error, _WrongFile)), errors[0])
        raise RuntimeError(str(worst)) from worst
    absent = [name for name in args.tensors if name not in inputs]
    if absent:
        warnings.warn(
            f"export_onnx: the file has no input for {absent}, which change no answer to the "
            "example",
            stacklevel=2,
        )
    if args.numbers and sizes:
        warnings.warn(
            f"export_onnx: the file holds the numbers that {args.numbers} have in the example; a "
            "tensor in their place is an input",
            stacklevel=2,
        )
    decided = [] if way else _decisions(small, args)
    if decided:
        warnings.warn(
            "export_onnx: the file answers all inputs with what the model's code decided on the "
            f"values of the example ({', '.join(decided)})",
            stacklevel=2,
        )
    if dropped:
        warnings.warn(
            f"export_onnx: the file takes inputs of the example's size alone in {dropped}, "
            "which the exported model fixes (a loop over steps in Python does, or its arithmetic)",
            stacklevel=2,
        )
    if not was_run and _is_installed("onnxruntime"):
        warnings.warn(
            "export_onnx: the file was not compared with the model, since ONNX Runtime lacks one "
            "of its operators in its dtype",
            stacklevel=2,
        )
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _content(
    model: nn.Module,
    recurrent: Sequence[nn.Module],
    args: _Arguments,
    sizes: dict[str, dict[int, str]],
    output_names: Sequence[str] | None,
    opset: int | None,
    dynamo: bool,
    may_fix: bool,
    int8: bool,
) -> tuple[bytes, set[str], list[str], bool]:
    """The checked file, its inputs, which of `sizes` it fixes, where it may, and if it was run.

    What 8 bits round would hide other differences: the file without them is compared.
    """

    def written(int8: bool) -> tuple[Any, bytes, dict[str, list[int]]]:
        import onnx

        for module in recurrent:
            onnx_nodes.store_operands(module, int8)
        proto, ends = _exported(model, args, sizes, output_names, opset, dynamo, may_fix)
        onnx.checker.check_model(proto)
        return proto, proto.SerializeToString(), ends

    dropped: list[str] = []
    prepared = any(isinstance(module, Snapshot) for module in model.modules())
    exact = widened(model) if prepared else model
    while True:
        proto, content, ends = written(int8=False)
        session = _session(content)
        fixed = _fixed(session, exact, proto, args, sizes, ends)
        if not fixed:
            break
        if not may_fix:
            label, why = next(iter(fixed.items()))
            raise RuntimeError(f"{_differ(label)}, got {why}")
        dropped += fixed
        sizes = _without(sizes, fixed)
    if int8:
        proto, content, _ = written(int8=True)
        eight = _session(content)
        for example in () if eight is None else (args.longer(sizes), args.longer({})):
            _, wrong = _run(eight, _answers(exact, example), example, args)
            if wrong is not None:
                raise _WrongFile(f"{_ANSWERS}, got {wrong}")
    return content, {given.name for given in proto.graph.input}, dropped, session is not None


class _WrongFile(RuntimeError):
    """An exporter took the model, and its file gives other answers."""


_ANSWERS = "export_onnx: expected a file with the answers of the model"
_LARGEST = 2**31 - 1  # a message of protobuf
_WHOLE = (torch.int64, torch.int32)
# What of an example stays in the file as it is.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, np.ndarray)


class _Arguments:
    """What a model is called with, its tensors by name."""

    def __init__(self, model: nn.Module, example: Any, names: Sequence[str] | None) -> None:
        self.model = model
        signature = inspect.signature(model.forward)
        given, named = call_of(example)
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise TypeError(
                f"export_onnx: expected an example that forward takes, got TypeError: {error}"
            ) from error
        if named:
            bound.apply_defaults()
        by_name = [name for name in bound.kwargs if name in named]  # others have their defaults
        if by_name:
            raise ValueError(
                f"export_onnx: expected arguments that can be given by position, got {by_name[0]!r}"
            )
        if any(isinstance(value, PackedSequence) for value in bound.args):
            raise ValueError(
                "export_onnx: expected a padded batch and its lengths, for the model to pack, got "
                "a PackedSequence"
            )
        leaves = pytree.tree_leaves(bound.args)
        other = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))]
        if other or not any(isinstance(leaf, Tensor) for leaf in leaves):
            got = f"a {type(other[0]).__name__}" if other else "no tensor"
            raise ValueError(
                "export_onnx: expected an example of tensors, which become the file's inputs, and "
                f"of plain constants, got {got}"
            )
        values = bound.args
        parameters = list(signature.parameters.values())
        leaves, self.form = pytree.tree_flatten(values)
        self.leaves = [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors: dict[str, int] = {}  # the place in leaves of each
        self.numbers: list[str] = []  # arguments that are lists of numbers, such as lengths
        self.growth: dict[str, int] = {}  # of each name of a size
        self.counting: dict[str, list[str]] = {}  # lengths of rows that grow with a size
        found: list[tuple[str, int]] = []
        place = 0
        for number, value in enumerate(values):
            parameter = parameters[min(number, len(parameters) - 1)]
            leaves = pytree.tree_leaves(value)
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            many = len(leaves) > 1 or several
            count = number - len(parameters) + 1 if several else 0
            if isinstance(value, (tuple, list)) and any(type(leaf) is int for leaf in leaves):
                self.numbers.append(parameter.name)
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    found.append((f"{parameter.name}_{count}" if many else parameter.name, place))
                    count += 1
                place += 1
        if names is None:
            names = [name for name, _ in found]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(
                    "export_onnx: expected input_names where two tensors of the example would have "
                    f"one name, got {twice!r} twice"
                )
        elif len(names) != len(found) or len(set(names)) != len(names):
            raise ValueError(
                f"export_onnx: expected input_names for {len(found)} tensors, got {list(names)}"
            )
        self.tensors = {name: place for name, (_, place) in zip(names, found, strict=True)}

    def longer(
        self, sizes: Mapping[str, Mapping[int, str]], to: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        """The arguments, where each size of a name in `sizes` has grown by as much of its own.

        Lengths of rows that a size bounds go with it.

        to: names of sizes that become this instead.
        """
        leaves = list(self.leaves)
        for name, dims in sizes.items():
            for dim, label in dims.items():
                tensor = leaves[self.tensors[name]]
                size, more = tensor.shape[dim], self.growth.setdefault(label, 3 + len(self.growth))
                more = (to or {}).get(label, size + more) - size
                index = torch.arange(size + more, device=tensor.device).clamp(max=size - 1)
                leaves[self.tensors[name]] = tensor.index_select(dim, index)  # sorted ones stay so
                for other in self.counting.get(label, ()):
                    counts = leaves[self.tensors[other]]
                    counts = counts.where(counts != size, size + more).clamp(max=size + more)
                    leaves[self.tensors[other]] = counts
        return pytree.tree_unflatten(leaves, self.form)  # type: ignore[no-any-return]

    def size(self, sizes: Mapping[str, Mapping[int, str]], label: str) -> int:
        """What has this name, in the example."""
        named = ((name, d) for name, dims in sizes.items() for d in dims if dims[d] == label)
        name, dim = next(named)
        return int(self.leaves[self.tensors[name]].shape[dim])

    def other(self, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Arguments with other values: all floating ones, then all others, twice."""
        draw = torch.Generator("cpu").manual_seed(0)
        for floating, sign in ((True, 0), (False, -1), (False, 1)):
            leaves = pytree.tree_leaves(arguments)
            places = self.tensors.values()
            change = [i for i in places if leaves[i].is_floating_point() == floating]
            for place in change:
                leaves[place] = _other(leaves[place], draw, sign)
            if change:
                yield pytree.tree_unflatten(leaves, self.form)

    def counts_of(self, size: int) -> list[str]:
        """Inputs that may be lengths of rows, of which the longest has `size` steps."""
        tensors = {name: self.leaves[place] for name, place in self.tensors.items()}
        whole = {n: t for n, t in tensors.items() if t.dim() == 1 and t.dtype in _WHOLE}
        return [name for name, t in whole.items() if t.numel() and t.max() == size]

    def error(self, sizes: Mapping[str, Mapping[int, str]]) -> Exception | None:
        """What the model raises over longer arguments."""
        return self.error_of(self.longer(sizes))

    def error_of(self, arguments: tuple[Any, ...]) -> Exception | None:
        """What the model raises over these."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outputs = _fresh(self.model)(*copy.deepcopy(arguments))
            leaves = pytree.tree_leaves(outputs, lambda part: isinstance(part, PackedSequence))
            other = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))]
            if other or not any(isinstance(leaf, Tensor) for leaf in leaves):
                got = f"a {type(other[0]).__name__}" if other else "no tensor"
                return TypeError(f"it returns {got}")
        except Exception as error:
            return error
        return None

    def given_sizes(self, dynamic: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
        """`dynamic`, checked."""
        sizes: dict[str, dict[int, str]] = {}
        if not isinstance(dynamic, Mapping) or not all(
            isinstance(dims, Mapping) for dims in dynamic.values()
        ):
            raise TypeError(
                "export_onnx: expected dynamic to be {input: {dimension: name}}, got "
                f"{dynamic!r}"
            )
        for name, dims in dynamic.items():
            if name not in self.tensors:
                raise ValueError(
                    f"export_onnx: expected dynamic to name inputs among {list(self.tensors)}, "
                    f"got {name!r}"
                )
            count = self.leaves[self.tensors[name]].dim()
            sizes[name] = {}
            for dim, label in dims.items():
                if not isinstance(dim, int) or not -count <= dim < count:
                    raise ValueError(
                        f"export_onnx: expected dynamic[{name!r}] to hold dimensions of a "
                        f"{count}-D tensor, got {dim!r}"
                    )
                sizes[name][dim % count] = str(label)
        error = self.error(sizes)
        if error is not None:
            for name, dims in sizes.items():
                shape = self.leaves[self.tensors[name]].shape
                self.counting |= {label: self.counts_of(shape[d]) for d, label in dims.items()}
            error = self.error(sizes)
        if error is not None:
            raise ValueError(
                "export_onnx: expected sizes in dynamic that the model lets differ, got "
                f"{type(error).__name__} where they do: {first_line(error)}"
            ) from error
        return sizes

    def found_sizes(self) -> dict[str, dict[int, str]]:
        """The sizes that the model lets differ: each by itself, or several that are equal."""
        if (error := self.error({})) is not None:
            raise ValueError(
                "export_onnx: expected a model that takes the example and returns tensors, got "
                f"{brief(error)}"
            ) from error
        shapes = {name: self.leaves[place].shape for name, place in self.tensors.items()}
        found: dict[str, dict[int, str]] = {}

        def try_out(dims: list[tuple[str, int]], counting: list[str]) -> None:
            known = [found[name][dim] for name, dim in dims if dim in found.get(name, {})]
            label = known[0] if known else "_".join(map(str, dims[0]))
            together: dict[str, dict[int, str]] = {}
            for name, dim in dims:
                together.setdefault(name, {})[dim] = label
            if counting:
                self.counting[label] = counting
            if self.error(together) is None:
                for name in together:
                    found[name] = found.get(name, {}) | together[name]
            elif not known:
                self.counting.pop(label, None)

        every = [(n, d) for n, shape in shapes.items() for d, size in enumerate(shape) if size > 0]
        for name, dim in every:
            try_out([(name, dim)], [])
            if dim not in found.get(name, {}) and (counts := self.counts_of(shapes[name][dim])):
                try_out([(name, dim)], counts)
        for name, dim in every:
            size = shapes[name][dim]
            others = [
                [*((n, d) for n, d in every if n == other and shapes[n][d] == size), None]
                for other in shapes
                if other != name
            ]
            for chosen in itertools.islice(itertools.product(*others), 1000):
                if dim not in found.get(name, {}) and any(chosen):
                    try_out([(name, dim), *(pair for pair in chosen if pair is not None)], [])
        # Some may differ alone and not together: the first of them stay.
        dropped: list[str] = []
        for number, label in enumerate(_labels(found)):
            later = _labels(found)[number + 1 :]
            if self.error(_without(found, [*dropped, *later])) is not None:
                dropped.append(label)
        return _without(found, dropped)


class _Decisions(TorchFunctionMode):
    """Notes where code takes a number out of a tensor, which a trace holds as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        file, name = frame.f_code.co_filename, getattr(func, "__name__", "")
        if name in _NUMBERS and not file.startswith(LIBRARIES):
            self.places.append(f"{os.path.basename(file)}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


_NUMBERS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "__contains__")


def _decisions(model: nn.Module, args: _Arguments) -> list[str]:
    """Where the model's code goes by the values of the example: file:line."""
    noted = _Decisions()
    with torch.no_grad(), warnings.catch_warnings(), noted:
        warnings.simplefilter("ignore")
        _fresh(model)(*copy.deepcopy(args.longer({})))
    return list(dict.fromkeys(noted.places))


def _other(tensor: Tensor, draw: torch.Generator, sign: int) -> Tensor:
    """Of this shape and kind with other values; whole numbers that are alike go up or down."""
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=draw, device="cpu").to(tensor.dtype)
        spread = tensor.std() if tensor.numel() > 1 else 0
        return tensor + noise * (spread if spread > 0 else 1)
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.dtype in _WHOLE and tensor.numel():
        if tensor.min() < tensor.max():
            return tensor.flip(tuple(range(tensor.dim())))  # indices stay in range
        others = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) % 2 == 0
        return tensor + sign * others.to(tensor.dtype)
    return tensor


def _bake(module: Any) -> None:
    """Keep the values of parametrised weights alone."""
    if is_parametrized(module):
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = type(module).__base__  # torch's own removal changes the class, for all
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)


def _recurrent(model: nn.Module) -> list[nn.Module]:
    """The modules of this package in `model`, and one behind each of torch's, which calls it.

    torch's module stays in its place, where code may ask for its class; what cannot be taken over
    (a subclass, weights that are computed) is left to torch's exporter.
    """
    found: list[nn.Module] = []
    for module in list(model.modules()):
        if isinstance(module, (Recurrent, RecurrentCell)):
            found.append(module)
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            _bake(module)
            ours: Any = (MODULES | CELL_MODULES).get(type(module))
            with contextlib.suppress(ValueError):
                if ours is not None:
                    behind = ours.from_torch(module)
                    behind._parameters, behind._buffers = module._parameters, module._buffers
                    module.forward = behind.forward
                    found.append(behind)
    return found


def _fresh(model: nn.Module) -> nn.Module:
    """The model as it stands, since a call may leave states on it; parameters are shared."""
    return copied(model, {id(parameter): parameter for parameter in model.parameters()})


# What torch.export says where a model fixes a size.
_FIXES = ("onstraints violated", "conflicts between user-specified ranges")


def _differ(label: str) -> str:
    return (
        f"export_onnx: expected a model that lets {label} in dynamic differ (a loop over steps in "
        "Python does not)"
    )


def _labels(sizes: Mapping[str, Mapping[int, str]]) -> list[str]:
    return list(dict.fromkeys(label for dims in sizes.values() for label in dims.values()))


def _without(
    sizes: Mapping[str, Mapping[int, str]], labels: Collection[str]
) -> dict[str, dict[int, str]]:
    return {
        name: {dim: label for dim, label in dims.items() if label not in labels}
        for name, dims in sizes.items()
    }


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield (error := cause)


def _exported(
    model: nn.Module,
    args: _Arguments,
    sizes: dict[str, dict[int, str]],
    output_names: Sequence[str] | None,
    opset: int | None,
    dynamo: bool,
    may_fix: bool,
) -> tuple[Any, dict[str, list[int]]]:
    """The ModelProto that torch's exporter makes; may_fix: some of `sizes` may stay fixed in it.

    And sizes next to those for which the exporter saw the code do the same, {name: sizes}.
    """
    import onnx

    # From the longer arguments: torch.export takes a size of 1 for a fixed one.
    leaves, places = pytree.tree_leaves(args.longer(sizes)), list(args.tensors.values())
    model, given = _fresh(model), tuple(leaves[place] for place in places)
    whole = model.forward

    def forward(*tensors: Tensor) -> Any:
        """From tensors alone to tensors alone; what else it takes is that of the example."""
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        with onnx_nodes.Packing():
            outputs = whole(*pytree.tree_unflatten(leaves, args.form))
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))

    model.forward = forward
    options: dict[str, Any] = {"input_names": list(args.tensors), "output_names": output_names}
    options["opset_version"] = opset
    refused: list[str] = []
    ends: dict[str, list[int]] = {}
    token = onnx_nodes.refused.set(refused)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                shapes = tuple(dict(sizes.get(name, {})) for name in args.tensors)
                if may_fix:
                    shapes = tuple(dict.fromkeys(dims, Dim.AUTO) for dims in shapes)
                # torch prints the graph of a model that it refuses.
                with contextlib.redirect_stderr(io.StringIO()):
                    program: Any = torch.onnx.export(
                        model,
                        given,
                        dynamo=True,
                        dynamic_shapes=(shapes,),
                        verbose=False,
                        **options,
                    )
                ends = _ends(program, sizes)
                _rename(program.model.graph)
                proto = _named(program.model_proto, sizes)
            else:
                file: Any = io.BytesIO()
                torch.onnx.export(model, given, file, dynamo=False, dynamic_axes=sizes, **options)
                proto = onnx.load_from_string(file.getvalue())
    except Exception as error:
        if refused:
            raise RuntimeError(refused[0]) from error
        causes = [error, *_causes(error)]
        if any(text in str(cause) for cause in causes for text in _FIXES):
            every = " and ".join(_labels(sizes))
            raise RuntimeError(f"{_differ(every)}, got one that fixes some of them") from error
        raise RuntimeError(
            f"export_onnx: expected a model that torch.onnx.export takes, got {brief(causes[-1])}"
        ) from error
    finally:
        onnx_nodes.refused.reset(token)
    got = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise RuntimeError(
            f"export_onnx: expected a model that torch.onnx.export can write with opset {opset}, "
            f"got opset {got}"
        )
    return proto, ends


def _ends(program: Any, sizes: Mapping[str, Mapping[int, str]]) -> dict[str, list[int]]:
    """The sizes just outside of the ranges that torch.export found, as from a branch, by name."""
    ranges = {str(s): r for s, r in program.exported_program.range_constraints.items()}
    found: dict[str, list[int]] = {}
    for given in program.model.graph.inputs:
        for dim, label in sizes.get(given.name, {}).items():
            of = ranges.get(str(getattr(given.shape[dim], "value", None)))
            if of is not None:  # it is not fixed
                ends = [of.lower - 1, of.upper + 1]
                # Larger ones may take too much memory; most are those of integers, not of code.
                found[label] = [int(end) for end in ends if 2 < end <= 2**12]
    return found


def _rename(graph: Any) -> None:
    """Give values of nodes that have the name of an input another one."""
    taken = {value.name for value in graph.inputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_of_node"


def _named(proto: Any, sizes: Mapping[str, Mapping[int, str]]) -> Any:
    """The sizes of inputs by their names in place of torch.export's."""
    names: dict[str, str] = {}
    for given in proto.graph.input:
        for dim, label in sizes.get(given.name, {}).items():
            names.setdefault(given.type.tensor_type.shape.dim[dim].dim_param, label)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r"\w+", lambda found: names.get(found[0], found[0]), size.dim_param
                )
    return proto


def _fixed(
    session: Any,
    model: nn.Module,
    proto: Any,
    args: _Arguments,
    sizes: Mapping[str, Mapping[int, str]],
    ends: Mapping[str, list[int]],
) -> dict[str, str]:
    """Which of `sizes`, by name, the file fixes, and how it shows; RuntimeError for wrong answers.

    session: the file in ONNX Runtime, or None; ends: sizes to be tried beside others.
    """
    fixed = {}
    for given in proto.graph.input:
        for dim, label in sizes.get(given.name, {}).items():
            size = given.type.tensor_type.shape.dim[dim]
            if not size.dim_param:
                fixed[label] = f"{size.dim_value} for dimension {dim} of {given.name}"
    if session is None or fixed:
        return fixed
    labels = _labels(sizes)
    # The exporter saw the longer arguments; the example's own sizes come last.
    for fewer in ([], *([label] for label in labels), labels):
        example = args.longer(_without(sizes, fewer))
        why = _difference(session, model, example, args)
        if why is not None and len(fewer) == 1:
            fixed[fewer[0]] = why
        elif why is not None and not fixed:
            raise _WrongFile(f"{_ANSWERS}, got {why}")
    for label in labels:
        # Where code rounds a size up, a little more of it may change nothing.
        own = args.size(sizes, label)
        twice = 2 * own + args.growth[label]
        for size in {twice, 1, 2, *ends.get(label, ())} - {own}:
            example = args.longer(sizes, {label: size})
            if label not in fixed and args.error_of(example) is None:
                why = _difference(session, model, example, args)
                fixed |= {} if why is None else {label: why}
    for example in () if fixed else args.other(args.longer({})):
        if args.error_of(example) is not None:
            continue
        why = _difference(session, model, example, args)
        if why is not None:
            raise _WrongFile(
                "export_onnx: expected a model whose code does not depend on the values that it is "
                f"given, got a file that has other answers to values beside the example's, {why}"
            )
    return fixed


def _session(content: bytes) -> Any:
    """The file in ONNX Runtime; None where that is not installed, or has not this dtype."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:
        if type(error).__name__ == "NotImplemented":
            return None
        raise RuntimeError(
            f"export_onnx: expected a file that ONNX Runtime loads, got {first_line(error)}"
        ) from error


def _difference(session: Any, model: nn.Module, example: Any, args: _Arguments) -> str | None:
    """How the answers of a file to `example` differ from the model's."""
    wanted = _answers(model, example)
    got, why = _run(session, wanted, example, args)
    if why is not None:
        return why
    scales = _scales(model, example, args, wanted)
    coarse = any(t.dtype == torch.bfloat16 for t in (*model.parameters(), *model.buffers()))

    def same(answers: list[Tensor], rough: bool) -> bool:
        pairs = zip(wanted, answers, scales, strict=True)
        return all(_close(w, a, scale, rough) for w, a, scale in pairs)

    if same(got, coarse) or not same(_answers(model, example), False):
        return None
    pairs = zip(wanted, got, strict=True)
    far = max((w.double() - g.double()).abs().max().item() for w, g in pairs if w.numel())
    return f"some that differ by up to {far:.1g}"


def _run(
    session: Any, wanted: list[Tensor], example: Any, args: _Arguments
) -> tuple[list[Tensor], str | None]:
    """The answers of a file to `example`, and why these are none in the form of the model's."""
    leaves = pytree.tree_leaves(example)
    read = {given.name for given in session.get_inputs()}
    given = {n: leaves[i].detach().cpu() for n, i in args.tensors.items() if n in read}
    for name, value in given.items():
        if value.dtype == torch.bfloat16:
            raise RuntimeError(
                "export_onnx: expected an example of dtypes that NumPy has, for ONNX Runtime to "
                f"run the file, got bfloat16 in {name}"
            )
    feeds = {name: value.numpy() for name, value in given.items()}
    try:
        got = [torch.from_numpy(array) for array in session.run(None, feeds)]
    except Exception as error:
        return [], first_line(error)
    shapes = [[list(t.shape) for t in tensors] for tensors in (wanted, got)]
    if shapes[0] != shapes[1]:
        return got, f"outputs of shapes {shapes[1]} where it gives {shapes[0]}"
    return got, None


def _answers(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = _fresh(model)(*copy.deepcopy(example))
    return [leaf.cpu() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _scales(
    model: nn.Module, example: tuple[Any, ...], args: _Arguments, answers: list[Tensor]
) -> list[float]:
    """By what the errors of each answer are measured: the size of its elements that vary.

    What stays the same whatever the values are, such as the score of an action that is never
    allowed, says nothing of the others, however large it is; nor does a large sum of which little
    varies.
    """
    found: list[float | None] = [None for _ in answers]
    for other in args.other(example):
        try:
            others = _answers(model, other)
        except Exception:
            continue
        for place, (a, b) in enumerate(zip(answers, others, strict=False)):
            if found[place] is None and a.shape == b.shape:
                found[place] = _scale(a.double(), b.double())
        if None not in found:
            break
    sizes = (a.where(a.isfinite(), 0).double().abs() for a in answers)
    return [
        (size.max().item() if size.numel() else 1.0) if scale is None else scale
        for scale, size in zip(found, sizes, strict=True)
    ]


def _scale(a: Tensor, b: Tensor) -> float | None:
    """The size of the elements of `a` that are others in `b`; None without any."""
    varies = (a != b) & a.isfinite() & b.isfinite()
    if not varies.any():
        return None
    size, change = a[varies].abs().max().item(), (a - b)[varies].abs().max().item()
    return min(size, max(100 * change, size / 100))


def _close(a: Tensor, b: Tensor, scale: float, coarse: bool) -> bool:
    rtol, atol = (0.0, 2e-2) if coarse else (1e-4, 5e-5)
    atol *= max(scale, 1e-3)
    return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
