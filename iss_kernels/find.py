# SPDX-License-Identifier: Apache-2.0
"""Finds which weights leave together with each recurrent unit, by running the model.

Every output of a recurrent module carries labels: an int32 tensor of its shape that names each
element's unit, -1 for none. While a copy of the model runs, a torch function that receives a
labelled tensor either has a rule that says how its result is labelled, or is an error: nothing
passes unseen. Labels that arrive at a linear layer or a recurrent module become the labels of that
weight's columns. What was found is verified by removing units from copies (verify.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from iss_kernels.cells import Cell
from iss_kernels.copying import copied
from iss_kernels.groups import (
    Family,
    GroupError,
    Groups,
    LabelledVector,
    LabelledWeight,
    cell_of,
    kinds,
    plain_recurrent,
)
from iss_kernels.shrink import names_of_parameters
from iss_kernels.verify import Experiment, Path, call, replaced, tensors


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
# These tell a model's code how many units there are.
_SIZES = _words("__len__ nelement numel shape size")
# A final state copied by one of these is still that state when the model returns it.
_COPIES = _words("clone contiguous data detach")


def find_groups(model: nn.Module, example_inputs: Any) -> Groups:
    """Find every recurrent module in a model and every weight that reads their units.

    Recurrent modules are nn.LSTM, nn.GRU, nn.RNN and this package's own, ISSLSTM and the like.

    example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of
    keyword arguments; any values that take the model's usual path. A copy of the model runs on
    them, to follow the units; then copies in eval mode that have lost units must give the answers
    that a whole one gives where these units are dead, on the example, and with one row more along
    its first two dimensions if the model takes that. The model stays as it is.

    Families keep one common size (`Groups.tied`) where the answers change otherwise, as with
    y.chunk(2, -1) of both directions. Left out are modules that the example does not run, and
    families whose outputs reach the model's own output. (Final states may: they get as small as the
    units.)

    That takes some 15 forward passes, more where code rearranges units: a short example will do.

    Raises GroupError where a unit cannot be followed to all that reads it, where the answers change
    with a removal, as with sizes written into the model's own code, or where no unit can leave; and
    for recurrent modules whose weights are computed (pruning, weight_norm) or whose forward was
    replaced.
    """
    recurrent = plain_recurrent("find_groups", model)
    if not recurrent:
        others = [n for n, m in model.named_modules() if isinstance(m, nn.RNNBase)]
        raise GroupError(
            f"find_groups: expected a model with an {kinds()}, found none"
            + f" but {', '.join(others)}, of a subclass with its own forward" * bool(others)
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise GroupError(
                "find_groups: expected a model that is neither scripted nor compiled, "
                f"but {name or 'it'} is"
            )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise GroupError(
            f"find_groups: expected parameters that have a shape, got {lazy[0]} without one: "
            "call the model once"
        )
    tracer = _Tracer(copied(model), list(recurrent), example_inputs)
    tracer.run()
    groups = tracer.groups(model)
    experiment = Experiment(model, example_inputs, tracer.returned, tracer.eps)
    failure = experiment.failure(groups)
    for tied in tracer.ties(groups) if failure else ():
        candidate = replace(groups, tied=tied)
        if experiment.failure(candidate) is None:
            groups, failure = candidate, None
            break
    if failure:
        raise tracer.refusal(experiment.culprits(groups), failure)
    return replace(groups, verified=str(experiment))


class _Layout(NamedTuple):
    """One layer and direction: the names of its parameters, and the ids of its units.

    Ids of cells [H] and of outputs [P], the same where nothing projects. families: the name of the
    family of each state, h first.
    """

    parameters: list[str]
    families: tuple[str, ...]
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
    """Runs a model and keeps the labels of every tensor that comes from a recurrent module."""

    def __init__(self, model: nn.Module, recurrent: list[str], inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.inputs = replaced(inputs, torch.clone)  # the model may write into them
        self.given = {id(tensor) for tensor in tensors(self.inputs)}
        self.families: list[Family] = []
        self.layouts = {name: self._number_units(name) for name in recurrent}
        named = reversed(list(model.named_parameters(remove_duplicate=False)))
        self.names = {id(parameter): name for name, parameter in named}
        self.weights: dict[str, list[Tensor]] = {}  # name -> units of rows (and columns)
        self.other_uses: dict[str, str] = {}  # parameter name -> a function that has no rule for it
        # id -> (tensor, labels); holding the tensor keeps its id from being given to another.
        self.labels: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, str] = {}  # id of a final state -> its module
        self.looked_into: set[str] = set()  # modules whose final states some function reads
        self.stacked: dict[str, bool] = {}  # modules that ran -> whether h_n is one tensor
        self.inside = False
        self.answer: set[int] = set()  # units that reach the model's own output
        self.returned: list[Path] = []  # where the model returns final states
        self.by_position: list[tuple[str, Tensor]] = []  # functions that rearranged these units
        self.by_size: list[tuple[str, Tensor]] = []  # functions that told the size of these
        self.called: set[nn.Module] = set()
        self.eps = 0.0  # of the least precise floating dtype that was seen

    def _number_units(self, name: str) -> list[list[_Layout]]:
        """Give ids to the units of a module: a layout for each [layer][direction]."""
        module: Any = self.model.get_submodule(name)
        cell, directions = cell_of(module), 1 + module.bidirectional
        layouts: list[list[_Layout]] = [[] for _ in range(module.num_layers)]
        for index, parameters in enumerate(module._all_weights):
            layer, direction = divmod(index, directions)
            shapes = [getattr(module, parameter).shape for parameter in parameters]
            projects = sum(len(shape) == 2 for shape in shapes) > 2  # w_ih, w_hh and w_hr
            family = f"{name}.l{layer}{'_reverse' * direction}".removeprefix(".")
            (rows, _), (_, width), *_ = shapes
            names = [family + ".cell" * projects, family + ".output" * projects]
            outputs = cells = self._add_family(names[0], name, rows // cell.gates)
            if projects:
                outputs = self._add_family(names[1], name, width)
            families = (names[1], *[names[0]] * (len(cell.states) - 1))
            layouts[layer].append(_Layout(parameters, families, cells, outputs))
        return layouts

    def _add_family(self, name: str, module: str, size: int) -> Tensor:
        start = self.families[-1].units.stop if self.families else 0
        self.families.append(Family(name, module, start, size))
        return _ids(self.families[-1])

    def run(self) -> None:
        """Run the model on the example inputs and note which units its own output holds."""
        for name in self.layouts:
            # Within the user's own hooks, so that these are followed like the rest of the model;
            # in the place of forward, which a wrapper may call without hooks.
            module: Any = self.model.get_submodule(name)
            module.forward = partial(self._run_recurrent, name, module, module.forward)
        for module in self.model.modules():
            module.register_forward_pre_hook(lambda module, _: self.called.add(module))
        with self:
            output = call(self.model, self.inputs)
        for path, tensor in output.items():
            if id(tensor) in self.states:
                self.returned.append(path)
            elif id(tensor) in self.labels:
                self.answer.update(self.labels[id(tensor)][1].flatten().tolist())

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
            owner = next(f.module for f in self.families if f.name == names[0])
            # States that are apart since sizes differ would become one tensor if these got equal.
            if fixed & set(names) or not self.stacked[owner]:
                fixed |= set(names)
            else:
                tied.append(names)
        families: list[Family] = []
        renumber = _none(self.families[-1].units.stop + 1)
        for family in self.families:
            if family.module in self.stacked and family.name not in fixed:
                start = families[-1].units.stop if families else 0
                families.append(replace(family, start=start))
                renumber[family.start : family.units.stop] = _ids(families[-1])
        if not families:
            raise GroupError(
                "find_groups: expected units that can leave, but the outputs of "
                + ", ".join(family.name for family in self.families)
                + " are the model's own or not computed"
            )
        weights, vectors = [], []
        shared = names_of_parameters(model)
        for name in [name for name, _ in model.named_parameters() if name in self.weights]:
            # The last place of renumber is -1, and so are units that cannot leave.
            units = [renumber[units.long()] for units in self.weights[name]]
            if (torch.cat(units) < 0).all():
                continue
            self._check_sharing(name, shared[name])
            if len(units) == 2:
                weights.append(LabelledWeight(name, *units))
            else:
                vectors.append(LabelledVector(name, *units))
        return Groups(model, families, weights, tied, vectors)

    def _check_sharing(self, name: str, names: list[str]) -> None:
        """All modules that share a weight which leaves in part must have run, to be followed."""
        for other in names if len(names) > 1 else ():
            if self.model.get_submodule(other.rpartition(".")[0]) not in self.called:
                raise self._error(
                    torch.cat(self.weights[name]), name,
                    f"it is also {other}, in a module that the example does not run",
                )  # fmt: skip

    @property
    def rows(self) -> dict[str, list[tuple[str, ...]]]:
        """Of every module, by layer and direction: the name of the family of each state."""
        return {
            name: [layout.families for layer in layers for layout in layer]
            for name, layers in self.layouts.items()
        }

    def ties(self, groups: Groups) -> Iterator[list[list[str]]]:
        """Ties that code may need which takes sizes to be alike: ever more of them.

        At first of the parts of a tensor, as chunk makes them; then of all layers and directions,
        as code does that reads rnn.hidden_size.
        """
        sets = [set(self._names_of(labels)) for _, labels in self.by_position]
        yield _tied(groups, sets)
        for rows in self.rows.values():
            sets += [set(names) for names in zip(*rows, strict=True)]
        yield _tied(groups, sets)

    def refusal(self, families: list[str], failure: str) -> GroupError:
        """What to say where a copy without units of these families fails."""
        labels = torch.cat([_ids(f) for f in self.families if f.name in families])
        rearranged, measured = (
            ", ".join(
                dict.fromkeys(name for name, units in calls if torch.isin(units, labels).any())
            )
            for calls in (self.by_position, self.by_size)
        )
        copy = f"a copy without some of its units {failure}"
        if rearranged:
            return self._error(labels, rearranged, f"{copy}, as where code picks units by position")
        hint = f"a number computed from its {measured}, " * bool(measured)
        return GroupError(
            f"find_groups: some output of {', '.join(families)} reaches the model's answers in a "
            f"way that no torch function shows ({hint}a width written into the code, vmap, a C++ "
            f"extension, random numbers of its own?): {copy}"
        )

    def _read_as_one(self) -> Iterator[list[str]]:
        """Names of families whose states are rows of one tensor that the model's code reads."""
        for module in sorted(self.looked_into):
            rows = self.rows[module]
            by_state = zip(*rows, strict=True) if len(rows) > 1 else ()
            yield from map(list, sorted(set(by_state)))  # "l0.cell", then "l0.output"

    def _names_of(self, labels: Tensor) -> list[str]:
        units = set(labels.flatten().tolist())
        return [family.name for family in self.families if units & set(family.units)]

    def _error(self, labels: Tensor, operation: str, why: str) -> GroupError:
        families = ", ".join(self._names_of(labels))
        return GroupError(
            f"find_groups: cannot follow the output of {families} through {operation}: {why}"
        )

    # -- Labels of tensors and weights

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        """Label a tensor, in its own layout: what can be done to it can be done to its labels."""
        laid_out = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=torch.int32, device=tensor.device
        )
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.size(dim) > 1:  # expanded, so alike along it
                laid_out, labels = laid_out.narrow(dim, 0, 1), labels.narrow(dim, 0, 1)
        laid_out.copy_(labels)
        self.labels[id(tensor)] = (tensor, laid_out.expand(tensor.shape))

    def _columns(self, tensor: Tensor, operation: str) -> Tensor:
        """Labels of the last dimension, [C] int32."""
        if id(tensor) not in self.labels:
            return _none(tensor.shape[-1])
        labels = self.labels[id(tensor)][1].cpu()
        columns = labels.reshape(-1, labels.shape[-1])[0]
        if (labels != columns).any():
            raise self._error(labels, operation, "its units are not in the last dimension alone")
        return columns

    def _label_weight(self, weight: Tensor, operation: str, *units: Tensor) -> None:
        """Label the rows of a vector, or the rows and the columns of a weight."""
        labels, name = torch.cat(units), self.names.get(id(weight))
        if name is None:
            if (labels >= 0).any():
                raise self._error(labels, operation, "its weight is not a parameter of the model")
            return
        before = torch.cat(self.weights.setdefault(name, list(units)))
        if not torch.equal(before, labels):
            labels = torch.cat([labels, before])
            raise self._error(labels, operation, f"{name} is used twice and reads other units")

    # -- Recurrent modules

    def _run_recurrent(
        self, name: str, module: Any, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The module's forward, between labels for its weights and labels for what it returns."""
        if self.inside:  # a module may call itself, as for `lengths`
            return forward(*args, **kwargs)
        self.inside = True
        try:
            self._enter(name, module, *args, **kwargs)
            result = forward(*args, **kwargs)
            self._leave(name, cell_of(module), result)
        finally:
            self.inside = False
        return result

    def _enter(
        self, name: str, module: Any, input: Any, hx: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        operation = name or f"the {type(module).__name__}"
        for state in tensors(hx):
            if id(state) in self.labels and self.states.get(id(state)) != name:
                units = self.labels[id(state)][1]
                raise self._error(units, operation, "it is an initial state there")
            if id(state) not in self.labels and id(state) not in self.given:
                raise GroupError(
                    f"find_groups: expected the initial state of {operation} from the model's "
                    "inputs or none (zeros), got one made inside, whose size cannot follow"
                )
        for option in tensors((args, kwargs)):  # lengths and resets
            if id(option) in self.labels:
                units = self.labels[id(option)][1].flatten()
                raise self._error(units, operation, "it says there which steps are taken")
        columns = self._columns(input[0] if isinstance(input, PackedSequence) else input, operation)
        for layer in self.layouts[name]:
            for names, _, cells, outputs in layer:
                w_ih, w_hh, *others = [getattr(module, parameter) for parameter in names]
                self._label_weight(w_ih, operation, _repeated(cells, len(w_ih)), columns)
                self._label_weight(w_hh, operation, _repeated(cells, len(w_hh)), outputs)
                for other in others:  # biases, and a projection
                    if other.dim() == 1:
                        self._label_weight(other, operation, _repeated(cells, len(other)))
                    else:
                        self._label_weight(other, operation, outputs, cells)
            columns = torch.cat([layout.outputs for layout in layer])
        self.called.add(module)

    def _leave(self, name: str, cell: Cell, result: Any) -> None:
        y, final = result
        y = y[0] if isinstance(y, PackedSequence) else y
        layers = self.layouts[name]
        self._set(y, torch.cat([layout.outputs for layout in layers[-1]]).expand(y.shape))
        h_n, *others = final if len(cell.states) > 1 else (final,)
        self._set_state(h_n, [layout.outputs for layer in layers for layout in layer])
        for state in others:
            self._set_state(state, [layout.cells for layer in layers for layout in layer])
        self.states |= {id(state): name for state in tensors(final)}
        self.stacked[name] = isinstance(h_n, Tensor)

    def _set_state(self, state: Any, units: list[Tensor]) -> None:
        """Label one tensor [L * D, B, H], or L * D tensors [B, H]."""
        if not isinstance(state, Tensor):
            for row, its_units in zip(state, units, strict=True):
                self._set(row, its_units.expand(row.shape))
            return
        labels = torch.stack(units).view(len(units), *[1] * (state.dim() - 2), -1)
        self._set(state, labels.expand(state.shape))

    # -- Torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and label what it returns."""
        name, kwargs = _name(func), kwargs or {}
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        result = func(*args, **kwargs)
        if name not in _METADATA:
            dtypes = {tensor.dtype for tensor in tensors(result) if tensor.is_floating_point()}
            self.eps = max([self.eps, *(torch.finfo(dtype).eps for dtype in dtypes)])
        if self.inside:
            return result
        given = list(tensors((args, kwargs)))
        self.looked_into.update(self.states[id(t)] for t in given if id(t) in self.states)
        if name in _METADATA:
            if name in _SIZES and id(args[0]) in self.labels:
                self.by_size.append((name, self.labels[id(args[0])][1].cpu()))
            return result
        call = _Call(name, func, args, kwargs, given[:1] if name in _LIKES else given, result)
        weight = (args[1] if len(args) > 1 else kwargs["weight"]) if name == "linear" else None
        for tensor in given:
            if id(tensor) in self.names and tensor is not weight:
                self.other_uses.setdefault(self.names[id(tensor)], name)
        if weight is not None and weight.dim() == 2:
            columns = self._columns(args[0] if args else kwargs["input"], name)
            self._label_weight(weight, name, _none(len(weight)), columns)
        elif any(id(tensor) in self.labels for tensor in call.tensors):
            self._label_result(call)
        if name in _COPIES and id(args[0]) in self.states:
            self.states[id(result)] = self.states[id(args[0])]
        return result

    def _label_result(self, call: _Call) -> None:
        """Apply the rule of a function that received labelled tensors."""
        labelled = [tensor for tensor in call.tensors if id(tensor) in self.labels]
        in_place = call.name.rstrip("_") + "_" == call.name or call.name.startswith("__i")
        first = labelled[0] is next(tensors((call.args, call.kwargs)))
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
        args, kwargs = replaced((call.args, call.kwargs), labels_of)
        moved = call.function(*args, **kwargs)
        for result, labels in zip(tensors(call.result), tensors(moved), strict=True):
            # What is not int32 are no labels, but the sizes of a packed batch.
            if labels.dtype == torch.int32 and (labels >= 0).any():
                self._set(result, labels)
            before = self.labels.get(id(call.tensors[0]))
            if call.name in _MOVES and before and not _same_rows(before[1], labels):
                self.by_position.append((call.name, before[1].cpu()))

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
        for result in tensors(call.result):
            self._set(result, reduced)


def _name(function: Any) -> str:
    """Short name of a torch function; for a property, the property's."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function)
    name: str = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


def _tied(groups: Groups, sets: list[set[str]]) -> list[list[str]]:
    """The groups' ties and these sets of families, where equal in size, joined where they meet."""
    sizes = {family.name: family.size for family in groups.families}
    tied = [set(names) for names in groups.tied]
    for names in (names & sizes.keys() for names in sets):
        if len({sizes[name] for name in names}) == 1:
            joined = names.union(*(others for others in tied if others & names))
            tied = [*(others for others in tied if not others & names), joined]
    return [[name for name in sizes if name in names] for names in tied if len(names) > 1]


def _repeated(units: Tensor, rows: int) -> Tensor:
    """The units of rows that come in blocks: of gates, and of the micro-steps of a deep cell."""
    return units.repeat(rows // len(units))


def _none(size: int) -> Tensor:
    """Labels of what is of no unit."""
    return torch.full((size,), -1, dtype=torch.int32, device="cpu")


def _ids(family: Family) -> Tensor:
    return torch.tensor(family.units, dtype=torch.int32, device="cpu")


def _same_rows(one: Tensor, two: Tensor) -> bool:
    """Whether both labels are one row of units, and the same."""
    rows = [labels.reshape(-1, labels.shape[-1]) for labels in (one, two) if labels.dim() > 0]
    shapes = {row.shape[-1] for row in rows}
    return len(rows) == 2 and len(shapes) == 1 and all(bool((r == rows[0][0]).all()) for r in rows)
