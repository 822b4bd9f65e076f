# SPDX-License-Identifier: Apache-2.0
"""Runs a model and follows the units of its recurrent modules, for find_groups.

Every output of a recurrent module carries labels, which name the unit of each element; so does
every parameter, whose rows and columns are units too until it shows whether they leave with
recurrent ones. While the model runs, each torch function does to labels what the table of rules.py
says, or keeps their units whole: nothing passes unseen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from iss_kernels.arguments import Path, fresh, tensors
from iss_kernels.cells import Cell
from iss_kernels.copying import copied
from iss_kernels.groups import cell_of
from iss_kernels.recurrent_cell import PARAMETERS
from iss_kernels.rules import (
    ANY,
    COPIES,
    JOINS,
    METADATA,
    NONE,
    SIZES,
    Call,
    Labels,
    apply,
    compact,
    in_columns,
    is_any,
    varies,
    words,
)
from iss_kernels.units import Units, none
from iss_kernels.verify import call

# Frames of these are not the user's code.
LIBRARIES = tuple(os.path.join(FilePath(of).parent, "") for of in (torch.__file__, __file__))


# Why units stay whole, whatever is done outside of their module.
OWN_OUTPUT = "its outputs are the model's own"


@dataclass(frozen=True)
class Layout:
    """One layer and direction: the names of its parameters, and the ids of its units.

    Ids of cells [H] and of outputs [P], the same where nothing projects.
    """

    parameters: list[str]
    cells: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Stay:
    """Units that cannot leave: which, why, and whether for want of a rule."""

    units: Tensor
    operation: str
    why: str
    unknown: bool

    def __str__(self) -> str:
        through = f"it reaches {self.operation}, and " * bool(self.operation)
        return through + self.why


class Tracer(TorchFunctionMode):
    """Runs a model and keeps the labels of its tensors; a `rules.Trace`."""

    def __init__(
        self,
        model: nn.Module,
        recurrent: list[str],
        inputs: Any,
        full: dict[str, str],
        embedding: bool,
    ) -> None:
        super().__init__()
        self.model, self.full = model, full  # modules that keep their width outside, and why
        self.inputs = fresh(inputs)  # the model may write into them
        self.shapes = {tensor.shape for tensor in tensors(self.inputs)}
        self.units = Units()
        # The places of outputs and states of full width have ids of their own, which stay: by the
        # first unit of a layer; and {id of such a place: the unit that it is the value of}.
        self.places: dict[int, Tensor] = {}
        self.unit_at: dict[int, int] = {}
        self.layouts = {name: self._number_units(name) for name in recurrent}
        # Holding the tensors, which the model may replace, keeps their ids from others.
        self.named = [*model.named_buffers(remove_duplicate=False),
                      *model.named_parameters(remove_duplicate=False)]  # fmt: skip
        self.names = {id(tensor): name for name, tensor in reversed(self.named)}
        self.dims: dict[str, list[Tensor]] = {}  # parameter or buffer -> the units along each
        self.embeddings = self._number_embeddings() if embedding else {}  # parameter -> its module
        self.read_dims: set[tuple[str, int]] = set()  # dimensions that units are multiplied with
        # id -> (tensor, labels); holding the tensor keeps its id from being given to another.
        self.known: dict[int, tuple[Tensor, Labels]] = {}
        self.elements: dict[Any, int] = {}  # where the elements of a known tensor are -> its id
        self.weights: dict[int, Tensor] = {}  # what is computed from parameters alone
        self.stays: list[Stay] = []
        self.values: list[Tensor] = []  # units read by their value
        self.summed: list[Tensor] = []  # places of parameters that are multiplied with units
        self.states: dict[int, str] = {}  # id of a final state -> its module
        self.moved: dict[int, str] = {}  # id of a final state in another shape -> its module
        self.fed: set[str] = set()  # modules whose initial state is data
        self.looked_into: set[str] = set()  # modules whose final states some function reads
        self.stacked: dict[str, bool] = {}  # modules that ran -> whether h_n is one tensor
        self.inside = False
        self.operation = ""
        self.returned: list[Path] = []  # where the model returns final states
        self.by_position: list[tuple[str, Tensor]] = []  # functions that rearranged these units
        self.by_size: list[tuple[str, Tensor]] = []  # functions that told the size of these
        self.beside: list[Tensor] = []  # labels of tensors that a function put side by side
        self.called: set[nn.Module] = set()
        self.looked_up: set[str] = set()  # parameters that were used as embeddings
        self.eps = 0.0  # of the least precise floating dtype that was seen

    # -- Units

    def _number_units(self, name: str) -> list[list[Layout]]:
        """Give ids to the units of a module: a layout for each [layer][direction]."""
        module: Any = self.model.get_submodule(name)
        if isinstance(module, nn.RNNCellBase):
            units = self.units.new_family(name, name, module.hidden_size)
            names = [*PARAMETERS[: 4 if module.bias else 2]]
            return [[Layout(names, units, units)]]
        cell, directions = cell_of(module), 1 + module.bidirectional
        layouts: list[list[Layout]] = [[] for _ in range(module.num_layers)]
        for index, parameters in enumerate(module._all_weights):
            layer, direction = divmod(index, directions)
            shapes = [getattr(module, parameter).shape for parameter in parameters]
            projects = sum(len(shape) == 2 for shape in shapes) > 2  # w_ih, w_hh and w_hr
            family = f"{name}.l{layer}{'_reverse' * direction}".removeprefix(".")
            (rows, _), (_, width), *_ = shapes
            outputs = cells = self.units.new_family(
                family + ".cell" * projects, name, rows // cell.gates
            )
            if projects:
                outputs = self.units.new_family(family + ".output", name, width)
            layouts[layer].append(Layout(parameters, cells, outputs))
        return layouts

    def _number_embeddings(self) -> dict[str, str]:
        """Give ids to the dimensions of the embeddings: {parameter: module}."""
        found: dict[str, tuple[str, Tensor]] = {}
        for name, module in self.model.named_modules():
            if type(module) is nn.Embedding and module.max_norm is None:
                weight = self.names.get(id(module.weight))
                if weight is not None and weight not in found:
                    found[weight] = (name, self.units.new_family(name, name, module.embedding_dim))
        for weight, (_, units) in found.items():
            rows = self.model.get_parameter(weight).size(0)
            self.dims[weight] = [self.units.new(rows) if rows > 1 else none(rows), units]
        return {weight: name for weight, (name, _) in found.items()}

    def _outside(self, name: str, index: int, which: int, units: Tensor) -> Tensor:
        """Labels of the output or state of a layer and direction of a module."""
        if name not in self.full or len(units) == 0:
            return units
        start = int(units[0])
        if start not in self.places:
            kept = self._kept_inside(name)
            at = (
                torch.arange(len(units), device="cpu")
                if kept is None
                else kept[index][which].units.cpu()
            )
            width = len(units) if kept is None else kept[index][which].before
            self.places[start] = self.units.new(width)
            self.unit_at |= zip(self.places[start][at].tolist(), units.tolist(), strict=True)
            why = f"it meets the output of {name or 'the model'}, which keeps its width"
            self.stays.append(Stay(self.places[start], "", why, False))
        return self.places[start]

    def _kept_inside(self, name: str) -> Any:
        """Which units of a module stayed, if it kept its width when the others left."""
        module: Any = self.model.get_submodule(name)
        return module.kept if getattr(module, "full_width", False) else None

    def _inside(self, labels: Tensor) -> Tensor:
        """Labels with units for the places of full width."""
        flat = [self.unit_at.get(unit, unit) for unit in labels.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int32, device="cpu").view(labels.shape)

    def _dims(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Ids along each dimension of a parameter or buffer; none along one of size 1."""
        if name not in self.dims:
            self.dims[name] = [
                self.units.new(size) if size > 1 else none(size) for size in tensor.shape
            ]
        return self.dims[name]

    # -- What rules ask and tell

    def labels(self, tensor: Any) -> Labels:
        """The labels of a tensor; none for data."""
        if not isinstance(tensor, Tensor):
            return []
        same = self.elements.get(_elements(tensor))  # as Variable(tensor) makes one
        for one in (id(tensor), same):
            if one in self.known:
                return self.known[one][1]
        name = self.names.get(id(tensor))
        if name is None or not tensor.is_floating_point():
            return []
        count = tensor.dim()
        return [
            units.view(-1, *[1] * (count - 1 - dim)).expand(*[1] * dim, *[-1] * (count - dim))
            for dim, units in enumerate(self._dims(name, tensor))
            if len(units) > 1
        ]

    def label(self, tensor: Tensor, labels: Iterable[Tensor]) -> None:
        """Give a tensor its labels, with as many dimensions as it has."""
        own = [one.reshape((1,) * (tensor.dim() - one.dim()) + one.shape) for one in labels]
        own = [one for one in own if bool((one != NONE).any())]
        if tensor.numel() > 0:
            for one in own:
                one.expand(tensor.shape)  # RuntimeError for a rule whose labels do not fit
        if own or id(tensor) in self.known:
            self.known[id(tensor)] = (tensor, own)
            self.elements[_elements(tensor)] = id(tensor)

    def unite(self, one: Tensor, two: Tensor, why: str) -> Tensor:
        """Join units place by place."""
        one, two = torch.broadcast_tensors(one, two)  # type: ignore[no-untyped-call]
        result = torch.maximum(one, two)
        pairs = torch.stack([one.flatten(), two.flatten()])
        both = (pairs >= 0).all(0)
        alone = ((pairs >= 0).any(0)) & (pairs == NONE).any(0)
        if bool(alone.any()):
            self.keep_whole(pairs[:, alone].amax(0), why)
        self.units.unite(*pairs[:, both])
        return result

    def read(self, labels: Tensor) -> None:
        """These units are read by their value."""
        self.values.append(labels.flatten())

    def multiplied(self, labels: Tensor) -> None:
        """These places of a parameter are multiplied with units."""
        self.summed.append(labels.flatten())

    def keep_whole(self, labels: Tensor, why: str, unknown: bool = False) -> None:
        """These units cannot leave."""
        units = labels.flatten()
        units = units[units >= 0]
        if len(units):
            self.stays.append(Stay(units, self._place(), why, unknown))

    def is_weight(self, tensor: Any) -> bool:
        """Whether a tensor is computed from parameters alone."""
        return id(tensor) in self.weights or id(tensor) in self.names

    def _place(self) -> str:
        """The operation, and the line of the user's code that called it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(LIBRARIES) and not file.startswith("<"):
                return f"{self.operation} ({FilePath(file).name}:{frame.f_lineno})"
            frame = frame.f_back
        return self.operation

    # -- The run

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
        for name in self.layouts:
            del self.model.get_submodule(name).forward  # which holds this tracer
        self.operation = ""
        for path, tensor in output.items():
            # One that came in as data goes out to come in again, in whatever shape.
            of, moved = self.states.get(id(tensor)), self.moved.get(id(tensor))
            if of in self.full:
                self.looked_into.add(of)
            elif of is not None or moved in self.fed - self.full.keys():
                self.returned.append(path)
                continue
            for labels in self.labels(tensor):
                units = labels[labels >= 0]
                self.stays.append(Stay(units, "", OWN_OUTPUT, False))
        for held in (self.known, self.elements, self.weights):  # all that the run computed
            held.clear()

    def returned_in(self, training: bool, model: nn.Module, inputs: Any) -> list[Path]:
        """Where the model returns final states in a mode, in which it may return more or less."""
        if not self.returned or training == model.training:
            return self.returned
        other = copied(model)
        other.train(training)
        tracer = Tracer(other, [*self.layouts], inputs, self.full, False)
        try:
            tracer.run()
        except Exception:  # the experiments say so where it matters
            return self.returned
        return tracer.returned

    # -- Recurrent modules

    def _run_recurrent(
        self, name: str, module: Any, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The module's forward, between labels for its weights and labels for what it returns."""
        if self.inside:  # a module may call itself, as for `lengths`
            return forward(*args, **kwargs)
        self.inside = True
        self.operation = name or f"the {type(module).__name__}"
        try:
            self._enter(name, module, *args, **kwargs)
            result = forward(*args, **kwargs)
            if isinstance(module, nn.RNNCellBase):
                ((layout,),) = self.layouts[name]
                for which, state in enumerate(tensors(result)):
                    self.label(state, [self._outside(name, 0, which, layout.cells)])
                    if name in self.fed:
                        self.states[id(state)] = name
                self.stacked[name] = True
            else:
                self._leave(name, cell_of(module), result)
        finally:
            self.inside = False
        return result

    def _enter(
        self, name: str, module: Any, input: Any, hx: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        layouts = [layout for layer in self.layouts[name] for layout in layer]
        if hx is not None:
            if all(not self.labels(state) for state in tensors(hx)):
                self.fed.add(name)
            for which, state in enumerate(hx if len(cell_of(module).states) > 1 else (hx,)):
                self._enter_state(
                    name, which, state,
                    [layout.cells if which else layout.outputs for layout in layouts],
                )  # fmt: skip
        for option in tensors((args, kwargs)):  # lengths and resets
            for one in self.labels(option):
                self.keep_whole(one, "it says there which steps are taken", unknown=True)
        x = input[0] if isinstance(input, PackedSequence) else input
        columns = self._columns(x)
        for layer in self.layouts[name]:
            for layout in layer:
                w_ih, w_hh, *others = [
                    (f"{name}.{parameter}".removeprefix("."), getattr(module, parameter))
                    for parameter in layout.parameters
                ]
                self._tie(w_ih, _repeated(layout.cells, len(w_ih[1])), columns)
                self._tie(w_hh, _repeated(layout.cells, len(w_hh[1])), layout.outputs)
                for other in others:  # biases, and a projection
                    if other[1].dim() == 1:
                        self._tie(other, _repeated(layout.cells, len(other[1])))
                    else:
                        self._tie(other, layout.outputs, layout.cells)
            columns = torch.cat([layout.outputs for layout in layer])
        self.called.add(module)

    def _tie(self, parameter: tuple[str, Tensor], *units: Tensor) -> None:
        """Join the dimensions of a parameter with these units."""
        name = self.names.get(id(parameter[1]), parameter[0])
        if name not in self.dims:
            # Columns of the input alone get ids of their own, as do those of zeros.
            self.dims[name] = [
                self.units.new(len(one))
                if bool((one == NONE).all())
                else torch.where(one == ANY, self.units.new(len(one)), one)
                for one in units
            ]
        if len(units) > 1:
            self.read_dims.add((name, 1))
        for own, one in zip(self.dims[name], units, strict=True):
            self.unite(own, one, "it is multiplied there with what does not leave")

    def _enter_state(self, name: str, which: int, state: Any, units: list[Tensor]) -> None:
        """A state that is handed over has the units of its module; others are cut there.

        Where the module keeps its width outside, and its cell carries the state on, it has to be
        zero in the places of the units that leave: another's that are, or made of zeros.
        """
        module: Any = self.model.get_submodule(name)
        cell = cell_of(module)
        zero = name in self.full and cell.states[which] == cell.carries
        parts = [state] if isinstance(state, Tensor) else tensors(state)
        rows: list[Tensor] = []
        for part in parts:
            labels = self.labels(part)
            if zero and (is_any(labels) and bool(part.any()) or not labels):
                for own in units:
                    self.keep_whole(own, f"{cell.carries}_0 need not be zero")
            labels = [one for one in labels if not bool((one == ANY).all())]
            if not labels:
                return
            if zero:
                labels = [self._inside(one) for one in labels]
            elif any(unit in self.unit_at for one in labels for unit in one.flatten().tolist()):
                return  # of full width: it is cut there
            for one in labels:
                if varies(one) & {-2} or varies(one) - {-1, -3}:
                    for each in (one, *units * zero):
                        self.keep_whole(each, "it is an initial state there")
                    return
            one = labels[-1].expand(*labels[-1].shape[:-1], part.shape[-1])
            one = one.reshape(-1, part.shape[-1])
            rows += [*one.expand(part.size(0) if part.dim() == 3 else 1, -1)]
        recurrent = sum(family.size for family in self.units.families)
        roots = [self.units.roots(row) for row in rows]
        if len(rows) > 1 and len({tuple(own.tolist()) for own in roots}) < len(rows):
            soft = all(bool((own >= recurrent).all()) for own in roots)
            if soft:  # one source for all layers, which each cuts its own way
                for row in rows:
                    self.keep_whole(row, "it is the initial state of several layers")
                return
        kept = self._kept_inside(name) if zero else None
        if kept is not None:
            stayed = [states[which] for states in kept]
            if [*map(len, rows)] == [its.before for its in stayed]:
                rows = [row[its.units.cpu()] for row, its in zip(rows, stayed, strict=True)]
        for row, own in zip(rows, units, strict=False):
            if len(row) == len(own):
                self.unite(row, own, "it is an initial state there")
        fits = list(map(len, rows)) == list(map(len, units))
        if zero and not fits:
            for own in units:
                self.keep_whole(own, "its initial state is of another form")

    def _columns(self, tensor: Tensor) -> Tensor:
        """Labels of the last dimension, [C] int32."""
        for one in in_columns(self, self.labels(tensor)):
            if varies(one):
                return one.flatten()
            if bool((one == ANY).all()):
                return torch.full((tensor.shape[-1],), ANY, dtype=torch.int32, device="cpu")
        return none(tensor.shape[-1])

    def _leave(self, name: str, cell: Cell, result: Any) -> None:
        y, final = result
        y = y[0] if isinstance(y, PackedSequence) else y
        layouts = [layout for layer in self.layouts[name] for layout in layer]
        outputs = [self._outside(name, i, 0, each.outputs) for i, each in enumerate(layouts)]
        self.label(y, [torch.cat(outputs[-len(self.layouts[name][-1]) :])])
        h_n, *others = final if len(cell.states) > 1 else (final,)
        self._set_state(h_n, outputs)
        for state in others:
            cells = [self._outside(name, i, 1, each.cells) for i, each in enumerate(layouts)]
            self._set_state(state, cells)
        self.states |= {id(state): name for state in tensors(final)}
        self.stacked[name] = isinstance(h_n, Tensor)

    def _set_state(self, state: Any, units: list[Tensor]) -> None:
        """Label one tensor [L * D, B, H], or as many of [B, H]."""
        if isinstance(state, Tensor):
            rows = torch.stack(units)
            self.label(state, [compact(rows.view(len(rows), *[1] * (state.dim() - 2), -1))])
            return
        for part, own in zip(state, units, strict=True):
            self.label(part, [own])

    # -- Torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and label what it returns."""
        name, kwargs = _name(func), kwargs or {}
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        result = func(*args, **kwargs)
        if name not in METADATA:
            dtypes = {tensor.dtype for tensor in tensors(result) if tensor.is_floating_point()}
            self.eps = max([self.eps, *(torch.finfo(dtype).eps for dtype in dtypes)])
        if self.inside:
            return result
        given = tensors((args, kwargs))
        if name in METADATA:
            self.looked_into.update(self.states[id(t)] for t in given if id(t) in self.states)
            if name in SIZES:
                self.by_size += [(name, labels) for labels in self.labels(given[0])]
            return result
        if name == "embedding":
            used = {self.names[id(t)] for t in given if id(t) in self.names}
            self.looked_up |= used
            self.stacked |= {self.embeddings[name]: True for name in used & self.embeddings.keys()}
        for tensor in given:
            of = self.states.get(id(tensor))
            hidden = name in COPIES if of in self.full else _takes_one(name, args)
            if of is not None and not hidden:
                self.looked_into.add(of)
        before = [self.labels(tensor) for tensor in given]
        self.operation = name
        one = Call(name, func, args, kwargs, result)
        try:
            apply(self, one)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:
            for tensor in given:
                for labels in self.labels(tensor):
                    self.keep_whole(labels, f"its rule failed ({error})", unknown=True)
        if given and all(self.is_weight(tensor) for tensor in given):
            self.weights |= {id(tensor): tensor for tensor in tensors(result)}
        if before and before[0] and name in _BY_POSITION:
            self._note_position(name, before[0], result)
        if name in JOINS and sum(map(bool, before)) > 1:
            self.beside.append(torch.cat([one.flatten() for labels in before for one in labels]))
        parts = tensors(result) if given else []
        if len(parts) == 1 and id(parts[0]) not in self.states:
            (part,) = parts
            of = self.states.get(id(given[0]), self.moved.get(id(given[0])))
            # h and c of a cell in one tensor, like the one that they came in.
            as_given = name in ("cat", "stack") and part.shape in self.shapes
            # The state of the only layer, taken out of all.
            as_given |= name in _PARTS and part.numel() == given[0].numel()
            if of is not None and (name in _SHAPES or as_given):
                self.moved[id(part)] = of
                self.known.setdefault(id(part), (part, []))
        if name in COPIES and id(given[0]) in self.states:
            self.states[id(result)] = self.states[id(given[0])]
            self.known.setdefault(id(result), (result, []))
        return result

    def _note_position(self, name: str, before: Labels, result: Any) -> None:
        """Note a function that took some units, or put them elsewhere."""
        for tensor in tensors(result):
            for labels in before:
                for after in self.labels(tensor):
                    if varies(labels) and not _same_rows(labels, after):
                        self.by_position.append((name, labels))
                        return


_BY_POSITION = words(
    """T __getitem__ chunk dsplit flatten flip gather hsplit index_select mT masked_select moveaxis
    movedim narrow permute repeat repeat_interleave reshape roll select split split_with_sizes
    swapaxes swapdims t take tensor_split tile transpose unflatten unfold unsafe_chunk unsafe_split
    view"""
)


# What may be done to a final state before the model returns it.
_SHAPES = words("clone contiguous detach permute reshape squeeze transpose unsqueeze view")
_PARTS = words("__getitem__ select unbind")


def _elements(tensor: Tensor) -> Any:
    """What tensors share that are the same elements in the same layout."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a tensor of vmap has no storage
        return id(tensor)
    return tensor.device, start, tensor.shape, tensor.stride(), tensor.dtype


def _takes_one(name: str, args: Any) -> bool:
    """Whether a function takes one layer's state out of all, as h_n[-1] does."""
    index = args[1] if len(args) > 1 else None
    return name == "__getitem__" and isinstance(index, int) and not isinstance(index, bool)


def _name(function: Any) -> str:
    """Short name of a torch function; for a property, the property's."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function)
    name: str = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


def _repeated(units: Tensor, rows: int) -> Tensor:
    """The units of rows that come in blocks: of gates, and of the micro-steps of a deep cell."""
    return units.repeat(rows // len(units))


def _same_rows(one: Tensor, two: Tensor) -> bool:
    """Whether both labels are one row of units, and the same."""
    return one.shape[-1:] == two.shape[-1:] and torch.equal(
        one.reshape(-1, one.shape[-1])[:1], two.reshape(-1, two.shape[-1])[:1]
    )
