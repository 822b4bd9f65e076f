# SPDX-License-Identifier: Apache-2.0
"""Finds which weights leave together with each LSTM unit, by running the model.

Every LSTM output carries labels: an int32 tensor of its shape that names each element's unit, -1
for none. While a copy of the model runs, a torch function that receives a labelled tensor either
has a rule that says how its result is labelled, or is an error: nothing passes unseen. Labels that
arrive at a linear layer or an LSTM become the labels of that weight's columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from iss_kernels.groups import Family, GroupError, Groups, LabelledWeight
from iss_kernels.lstm import ISSLSTM


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions by what they do to labels. Joins and moves do the same to the labels as to the data.
_JOINS = _words("cat concat concatenate dstack hstack stack vstack")
_MOVES = _words(
    """T __getitem__ _pack_padded_sequence chunk expand expand_as flatten flip gather
    index_select mT moveaxis movedim narrow permute ravel repeat repeat_interleave reshape
    reshape_as roll select split squeeze swapaxes swapdims t tensor_split tile transpose unbind
    unflatten unsqueeze view view_as"""
)
_ELEMENTWISE = _words(
    """__add__ __iadd__ __imul__ __isub__ __itruediv__ __mul__ __neg__ __radd__ __rmul__ __rsub__
    __sub__ __truediv__ abs add add_ alpha_dropout bfloat16 celu clamp clamp_ clip clone contiguous
    cos cpu cuda data detach div div_ double dropout dropout_ elu elu_ erf exp float gelu half
    hardshrink hardsigmoid hardswish hardtanh hardtanh_ leaky_relu leaky_relu_ logsigmoid
    masked_fill masked_fill_ maximum minimum mish mul mul_ multiply nan_to_num neg negative relu
    relu6 relu_ rsub selu sigmoid sigmoid_ silu sin softplus softshrink softsign square sub sub_
    subtract tanh tanh_ tanhshrink to true_divide type type_as where"""
)
_REDUCTIONS = _words("amax amin logsumexp max mean median min prod sum")
# These take shape, dtype or device alone: from their later arguments, or from all of them.
_LIKES = _words("expand_as reshape_as to type_as view_as")
_METADATA = _words(
    """__len__ __repr__ device dim dtype get_device is_contiguous is_cpu is_cuda is_floating_point
    is_nested layout ndim nelement new_empty new_full new_ones new_tensor new_zeros numel
    requires_grad shape size stride"""
)
# A final state copied by one of these is still that state when the model returns it.
_COPIES = _words("clone contiguous data detach")


def find_groups(model: nn.Module, example_inputs: Any) -> Groups:
    """Find every nn.LSTM and ISSLSTM in a model and every weight that reads their units.

    example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of
    keyword arguments; any values that take the model's usual path. A copy of the model runs on
    them, to follow the units and then to verify the result, so the model stays as it is.

    Left out are LSTMs that the example does not run, and families whose outputs reach the model's
    own output. (h_n and c_n may: they get as small as the units.) Sizes written into the model's
    own code, as in y.view(-1, 256), cannot be seen from here: write y.shape[-1] or -1.

    Raises GroupError where a unit cannot be followed to all that reads it, or none can leave.
    """
    lstms = [n for n, m in model.named_modules() if type(m) is nn.LSTM or isinstance(m, ISSLSTM)]
    if not lstms:
        raise GroupError("find_groups: expected a model with an nn.LSTM or ISSLSTM, found none")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise GroupError(
                "find_groups: expected a model that is neither scripted nor compiled, "
                f"but {name or 'it'} is"
            )
    tracer = _Tracer(copy.deepcopy(model), lstms, example_inputs)
    tracer.run()
    groups = tracer.groups(model)
    tracer.verify(groups)
    return groups


class _Layout(NamedTuple):
    """Ids of one layer and direction: cells [H], outputs [P]; the same where nothing projects."""

    suffix: str
    cells: Tensor
    outputs: Tensor


class _Call(NamedTuple):
    """A call of a torch function, and what it returned."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]  # arguments whose elements count
    result: Any


class _Tracer(TorchFunctionMode):
    """Runs a model and keeps the labels of every tensor that comes from an LSTM."""

    def __init__(self, model: nn.Module, lstms: list[str], inputs: Any) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.given = {id(tensor) for tensor in _tensors(inputs)}
        self.families: list[Family] = []
        self.layouts = {name: self._number_units(name) for name in lstms}
        named = reversed(list(model.named_parameters(remove_duplicate=False)))
        self.names = {id(parameter): name for name, parameter in named}
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # name -> row units, column units
        self.other_uses: dict[str, str] = {}  # parameter name -> a function that has no rule for it
        # id -> (tensor, labels); holding the tensor keeps its id from being given to another.
        self.labels: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, str] = {}  # id of a final state -> its LSTM
        self.looked_into: set[str] = set()  # LSTMs whose final states some function reads
        self.stacked: dict[str, bool] = {}  # LSTMs that ran -> whether h_n is one tensor
        self.inside_lstm = False
        self.answer: set[int] = set()  # units that reach the model's own output
        self.is_answer: list[bool] = []  # of each tensor that the model returns: else a final state

    def _number_units(self, name: str) -> list[list[_Layout]]:
        """Give ids to the units of an LSTM: a layout for each [layer][direction]."""
        lstm: Any = self.model.get_submodule(name)
        layouts: list[list[_Layout]] = []
        for layer in range(lstm.num_layers):
            layouts.append([])
            for direction in ("", "_reverse")[: 1 + lstm.bidirectional]:
                suffix = f"l{layer}{direction}"
                rows, width = getattr(lstm, f"weight_hh_{suffix}").shape
                projected = hasattr(lstm, f"weight_hr_{suffix}")
                family = f"{name}.{suffix}".removeprefix(".")
                outputs = cells = self._add_family(family + ".cell" * projected, name, rows // 4)
                if projected:
                    outputs = self._add_family(f"{family}.output", name, width)
                layouts[-1].append(_Layout(suffix, cells, outputs))
        return layouts

    def _add_family(self, name: str, lstm: str, size: int) -> Tensor:
        start = self.families[-1].units.stop if self.families else 0
        self.families.append(Family(name, lstm, start, size))
        return torch.arange(start, start + size, dtype=torch.int32)

    def run(self) -> None:
        """Run the model on the example inputs and note which units its own output holds."""
        handles = []
        for name in self.layouts:
            lstm = self.model.get_submodule(name)
            # Within the user's own hooks, so that these are followed like the rest of the model.
            enter, leave = partial(self._enter_lstm, name), partial(self._leave_lstm, name)
            handles.append(lstm.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(lstm.register_forward_hook(leave, prepend=True))
        with self:
            output = self._call_model()
        for tensor in output:
            if id(tensor) in self.labels and id(tensor) not in self.states:
                self.answer.update(self.labels[id(tensor)][1].flatten().tolist())
        self.is_answer = [id(tensor) not in self.states for tensor in output]
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def _call_model(self) -> list[Tensor]:
        """The tensors that the model returns, from the same random state every time."""
        cuda = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(cuda):
            if isinstance(self.inputs, Mapping):
                return list(_tensors(self.model(**self.inputs)))
            if isinstance(self.inputs, tuple) and not isinstance(self.inputs, PackedSequence):
                return list(_tensors(self.model(*self.inputs)))
            return list(_tensors(self.model(self.inputs)))

    @torch.no_grad()
    def verify(self, groups: Groups) -> None:
        """Look for a missed path by experiment: one through vmap, say, or a C++ extension.

        With zeros in all weights that read units, their values must not change the answers.
        """
        answers: list[list[Tensor]] = []
        for shift in (0, 1):
            for weight in groups.weights:
                parameter = self.model.get_parameter(weight.name)
                rows, columns = weight.row_units >= 0, weight.column_units >= 0
                parameter[rows] += shift
                # Where cells and outputs both leave, outputs must not be zero for lack of cells.
                if not ("weight_hr_" in weight.name and rows.any()):
                    parameter[:, columns] = 0
            output = zip(self._call_model(), self.is_answer, strict=True)
            answers.append([tensor for tensor, is_answer in output if is_answer])
        for one, two in zip(*answers, strict=True):
            if one.shape == two.shape and torch.allclose(
                one.double(), two.double(), equal_nan=True
            ):
                continue
            raise GroupError(
                "find_groups: some output of "
                + ", ".join(family.name for family in groups.families)
                + " reaches the model's answers in a way that no torch function shows "
                "(vmap, a C++ extension, random numbers of its own?)"
            )

    def groups(self, model: nn.Module) -> Groups:
        """What was found, with new ids for the units that can leave."""
        for name, function in self.other_uses.items():
            if name in self.weights:
                labels = torch.cat(self.weights[name])
                if (labels >= 0).any():
                    raise self._error(labels, function, f"it uses {name}, which leaves in part")
        fixed = {f.name for f in self.families if self.answer & set(f.units)}
        tied = []
        for names in self._read_as_one():
            lstm = next(f.lstm for f in self.families if f.name == names[0])
            # States that are apart since sizes differ would become one tensor if these got equal.
            if fixed & set(names) or not self.stacked[lstm]:
                fixed |= set(names)
            else:
                tied.append(names)
        families: list[Family] = []
        renumber = torch.full((self.families[-1].units.stop + 1,), -1, dtype=torch.int32)
        for family in self.families:
            if family.lstm in self.stacked and family.name not in fixed:
                start = families[-1].units.stop if families else 0
                families.append(replace(family, start=start))
                renumber[family.start : family.units.stop] = torch.tensor(families[-1].units)
        if not families:
            raise GroupError(
                "find_groups: expected units that can leave, but the outputs of "
                + ", ".join(family.name for family in self.families)
                + " are the model's own or not computed"
            )
        weights = []
        for name in [name for name, _ in model.named_parameters() if name in self.weights]:
            # The last place of renumber is -1, and so are units that cannot leave.
            rows, columns = (renumber[units.long()] for units in self.weights[name])
            if (rows >= 0).any() or (columns >= 0).any():
                weights.append(LabelledWeight(name, rows, columns))
        return Groups(model, families, weights, tied)

    def _read_as_one(self) -> Iterator[list[str]]:
        """Names of families whose states are rows of one tensor that the model's code reads."""
        for lstm in sorted(self.looked_into):
            own = [family.name for family in self.families if family.lstm == lstm]
            rows = sum(len(layer) for layer in self.layouts[lstm])
            kinds = len(own) // rows  # 2 with a projection, where cells and outputs alternate
            if rows > 1:
                yield from (own[kind::kinds] for kind in range(kinds))

    def _error(self, labels: Tensor, operation: str, why: str) -> GroupError:
        units = set(labels.flatten().tolist())
        families = ", ".join(family.name for family in self.families if units & set(family.units))
        return GroupError(
            f"find_groups: cannot follow the output of {families} through {operation}: {why}"
        )

    # -- Labels of tensors and weights

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        self.labels[id(tensor)] = (tensor, labels.to(tensor.device))

    def _columns(self, tensor: Tensor, operation: str) -> Tensor:
        """Labels of the last dimension, [C] int32."""
        if id(tensor) not in self.labels:
            return torch.full(tensor.shape[-1:], -1, dtype=torch.int32)
        labels = self.labels[id(tensor)][1].cpu()
        columns = labels.reshape(-1, labels.shape[-1])[0]
        if (labels != columns).any():
            raise self._error(labels, operation, "its units are not in the last dimension alone")
        return columns

    def _label_weight(self, weight: Tensor, rows: Tensor, columns: Tensor, operation: str) -> None:
        labels, name = torch.cat([rows, columns]), self.names.get(id(weight))
        if name is None:
            if (labels >= 0).any():
                raise self._error(labels, operation, "its weight is not a parameter of the model")
            return
        before = torch.cat(self.weights.setdefault(name, (rows, columns)))
        if not torch.equal(before, labels):
            labels = torch.cat([labels, before])
            raise self._error(labels, operation, f"{name} is used twice and reads other units")

    # -- LSTM modules

    def _enter_lstm(self, name: str, lstm: Any, args: Any, kwargs: Any) -> None:
        operation = name or "the LSTM"
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        for state in _tensors(given.get("hx")):
            if id(state) in self.labels and self.states.get(id(state)) != name:
                units = self.labels[id(state)][1]
                raise self._error(units, operation, "it is an initial state there")
            if id(state) not in self.labels and id(state) not in self.given:
                raise GroupError(
                    f"find_groups: expected the initial state of {operation} from the model's "
                    "inputs or none (zeros), got one made inside, whose size cannot follow"
                )
        x = given["input"][0] if isinstance(given["input"], PackedSequence) else given["input"]
        columns = self._columns(x, operation)
        for layer in self.layouts[name]:
            for suffix, cells, outputs in layer:
                gates = cells.repeat(4)
                labelled = {"ih": (gates, columns), "hh": (gates, outputs), "hr": (outputs, cells)}
                for kind, labels in list(labelled.items())[: 2 + (outputs is not cells)]:
                    self._label_weight(getattr(lstm, f"weight_{kind}_{suffix}"), *labels, operation)
            columns = torch.cat([layout.outputs for layout in layer])
        self.inside_lstm = True

    def _leave_lstm(self, name: str, lstm: Any, args: Any, result: Any) -> None:
        self.inside_lstm = False
        y, (h_n, c_n) = result
        y = y[0] if isinstance(y, PackedSequence) else y
        layers = self.layouts[name]
        self._set(y, torch.cat([layout.outputs for layout in layers[-1]]).expand(y.shape))
        self._set_state(h_n, [[layout.outputs for layout in layer] for layer in layers])
        self._set_state(c_n, [[layout.cells for layout in layer] for layer in layers])
        self.states |= {id(state): name for state in _tensors((h_n, c_n))}
        self.stacked[name] = isinstance(h_n, Tensor)

    def _set_state(self, state: Any, units: Any) -> None:
        """Label one tensor [L * D, B, H], or per layer [D, B, H], or per direction too [B, H]."""
        if not isinstance(state, Tensor):
            for part, its_units in zip(state, units, strict=True):
                self._set_state(part, its_units)
            return
        if not isinstance(units, Tensor):
            units = torch.stack(list(_tensors(units)))
            units = units.view(len(units), *[1] * (state.dim() - 2), -1)
        self._set(state, units.expand(state.shape))

    # -- Torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and label what it returns."""
        name, kwargs = _name(func), kwargs or {}
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        result = func(*args, **kwargs)
        if self.inside_lstm:
            return result
        tensors = list(_tensors((args, kwargs)))
        self.looked_into.update(self.states[id(t)] for t in tensors if id(t) in self.states)
        if name in _METADATA:
            return result
        call = _Call(name, func, args, kwargs, tensors[:1] if name in _LIKES else tensors, result)
        weight = (args[1] if len(args) > 1 else kwargs["weight"]) if name == "linear" else None
        for tensor in tensors:
            if id(tensor) in self.names and tensor is not weight:
                self.other_uses.setdefault(self.names[id(tensor)], name)
        if weight is not None and weight.dim() == 2:
            columns = self._columns(args[0] if args else kwargs["input"], name)
            rows = torch.full((len(weight),), -1, dtype=torch.int32)
            self._label_weight(weight, rows, columns, name)
        elif any(id(tensor) in self.labels for tensor in call.tensors):
            self._label_result(call)
        if name in _COPIES and id(args[0]) in self.states:
            self.states[id(result)] = self.states[id(args[0])]
        return result

    def _label_result(self, call: _Call) -> None:
        """Apply the rule of a function that received labelled tensors."""
        labelled = [tensor for tensor in call.tensors if id(tensor) in self.labels]
        in_place = call.name.rstrip("_") + "_" == call.name or call.name.startswith("__i")
        first = labelled[0] is next(_tensors((call.args, call.kwargs)))
        if "out" in call.kwargs or (in_place and not first):
            self._fail(call)
        elif call.name in _JOINS or (call.name in _MOVES and first and len(labelled) == 1):
            self._move(call)
        elif call.name in _ELEMENTWISE:
            self._keep(call, labelled)
        elif call.name in _REDUCTIONS:
            self._reduce(call)
        elif call.name == "_pad_packed_sequence":
            # The padding gets labels too: it is as wide as the units, and constant.
            columns = self._columns(labelled[0], call.name)
            self._set(call.result[0], columns.expand(call.result[0].shape))
        else:
            self._fail(call)

    def _fail(self, call: _Call, why: str = "no rule says what happens to its units there") -> None:
        labels = [self.labels[id(t)][1].flatten() for t in call.tensors if id(t) in self.labels]
        raise self._error(torch.cat(labels), call.name, why)

    def _move(self, call: _Call) -> None:
        """Do to the labels what was done to the data; what a join adds has no unit."""

        def labels_of(tensor: Tensor) -> Tensor:
            if id(tensor) in self.labels:
                return self.labels[id(tensor)][1]
            return torch.full_like(tensor, -1, dtype=torch.int32) if call.name in _JOINS else tensor

        if any(isinstance(argument, torch.dtype) for argument in call.args):
            self._fail(call)  # view(dtype) reinterprets the bits
        args, kwargs = _replaced((call.args, call.kwargs), labels_of)
        moved = call.function(*args, **kwargs)
        for result, labels in zip(_tensors(call.result), _tensors(moved), strict=True):
            # What is not int32 are no labels, but the sizes of a packed batch.
            if labels.dtype == torch.int32 and (labels >= 0).any():
                self._set(result, labels)

    def _keep(self, call: _Call, labelled: list[Tensor]) -> None:
        """Elementwise: labels stay where everything mixed in is cut alike, or need not be cut."""
        every = [self.labels[id(t)][1].broadcast_to(call.result.shape) for t in labelled]
        if any(not torch.equal(every[0], labels) for labels in every):
            self._fail(call, "it mixes different units")
        for dim in range(-every[0].dim(), 0):
            if torch.equal(every[0], every[0].narrow(dim, 0, 1).expand_as(every[0])):
                continue
            for other in call.tensors:
                varies = other.dim() >= -dim and other.size(dim) > 1 and other.stride(dim) != 0
                if id(other) not in self.labels and varies:
                    self._fail(call, "it mixes its units with elements that do not leave with them")
        self._set(call.result, every[0])

    def _reduce(self, call: _Call) -> None:
        """Labels stay where each reduced slice lies within one unit."""
        labels = self.labels[id(call.tensors[0])][1]
        options = dict(zip(("dim", "keepdim"), call.args[1:], strict=False)) | call.kwargs
        dim, keepdim = options.get("dim"), options.get("keepdim", False)
        if len(call.tensors) > 1:
            self._fail(call)  # max(h, other)
        dim = tuple(range(labels.dim())) if dim is None else dim
        reduced = labels.amax(dim, keepdim)
        if not torch.equal(reduced, labels.amin(dim, keepdim)):
            self._fail(call, "it reduces over the units")
        for result in _tensors(call.result):
            self._set(result, reduced)


def _name(function: Any) -> str:
    """Short name of a torch function; for a property, the property's."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function)
    name: str = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and plain objects (as a model may take or return)."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif hasattr(tree, "__dict__") and not callable(tree):
        yield from _tensors(vars(tree))


def _replaced(tree: Any, function: Any) -> Any:
    """A copy of nested arguments with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _replaced(value, function) for key, value in tree.items()}
    return type(tree)(_replaced(t, function) for t in tree) if type(tree) in (tuple, list) else tree
