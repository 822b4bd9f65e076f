# SPDX-License-Identifier: Apache-2.0
"""Calls of recurrent modules while torch.onnx exports: an LSTM, GRU or RNN node for each layer.

`Recurrent.forward` and the cells hand their calls to this file then, which writes the nodes of
ONNX's standard in place of our kernels; both exporters of torch get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from iss_kernels.recurrent import Recurrent
from iss_kernels.recurrent_cell import PARAMETERS, RecurrentCell
from iss_kernels.reference import STEPS

# Blocks of rows of a weight in the order of ONNX: LSTM i, o, f, c; GRU z, r, h.
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
_INT8 = "com.microsoft::DynamicQuantizeLSTM"
_Inputs: TypeAlias = Sequence[Tensor | None]


# -------------------------------------------------------------------------------------------------
# nodes


class _Node(torch.autograd.Function):
    """One ONNX node for the legacy exporter, which asks `symbolic`; a trace needs shapes alone."""

    @staticmethod
    def forward(
        ctx: Any, op: str, attributes: Any, shapes: Any, like: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(like.new_zeros(shape) for shape in shapes)

    @staticmethod
    def symbolic(g: Any, op: str, attributes: Any, shapes: Any, like: Any, *inputs: Any) -> Any:
        def absent() -> Any:
            value = g.op("prim::Constant")
            value.setType(torch._C.OptionalType.ofTensor())
            return value

        given = [absent() if value is None else value for value in inputs]
        return g.op(op, *given, **attributes, outputs=len(shapes))


def _node(
    op: str, inputs: _Inputs, attributes: dict[str, Any], shapes: Sequence[Any], dtype: torch.dtype
) -> Sequence[Tensor]:
    """The outputs, of these shapes, of an ONNX node over `inputs` (None: left out)."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        kinds = {int: "_i", str: "_s", list: "_s"}
        typed = {name + kinds[type(value)]: value for name, value in attributes.items()}
        sizes = [[int(size) for size in shape] for shape in shapes]
        outputs: tuple[Tensor, ...] = _Node.apply(op, typed, sizes, inputs[0], *inputs)  # type: ignore[no-untyped-call]
        return outputs
    version = 1 if "::" in op else None
    return torch.onnx.ops.symbolic_multi_out(
        op, inputs, attributes, dtypes=[dtype] * len(shapes), shapes=shapes, version=version
    )


def _recurrent_node(
    cell: str,
    x: Tensor,
    weights: _Inputs,
    lengths: Tensor | None,
    states: list[tuple[Tensor | None, ...]],
    hidden: int,
    reverse: bool,
) -> Sequence[Tensor]:
    """x: [T, B, I], weights: see `_operands`, lengths: [B], states: by direction, each [B, H].

    Returns Y [T, D, B, H] and the final states, each [D, B, H].
    """
    directions = len(states)
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    elif reverse:
        attributes["direction"] = "reverse"
    op, _, activation = cell.upper().partition("_")
    if activation:
        attributes["activations"] = [activation.capitalize()] * directions
    if op == "GRU":
        attributes["linear_before_reset"] = 1  # torch's: r scales W_hn h + b_hn
    w, r, b, *scales = weights
    initial = [None if part[0] is None else torch.stack(part) for part in zip(*states, strict=True)]
    inputs = [x, w, r, b, None if lengths is None else lengths.to(torch.int32), *initial]
    if scales:
        op, inputs = _INT8, [*inputs, None, *scales]  # None: peepholes
    steps, batch = x.shape[:2]
    shapes = [(steps, directions, batch, hidden)] + [(directions, batch, hidden)] * len(initial)
    outputs = _node(op, inputs, attributes, shapes, x.dtype)
    return [t if t.device == x.device else t.to(x.device) for t in outputs]  # a placeholder's: cpu


# -------------------------------------------------------------------------------------------------
# weights


def _operands(parts: Sequence[Sequence[Tensor | None]], cell: str) -> dict[str, Tensor]:
    """W [D, G H, I], R [D, G H, H], B [D, 2 G H] of a node, gates in the order of ONNX.

    parts: w_ih, w_hh, b_ih, b_hh, w_hr of each direction. A projected h is w_hr m, so that a layer
    without projection over m whose w_hh is w_hh w_hr has the same gates.
    """
    columns: dict[str, list[Tensor]] = {"W": [], "R": [], "B": []}
    for w_ih, w_hh, b_ih, b_hh, w_hr in parts:
        assert w_ih is not None and w_hh is not None
        if w_hr is not None:
            w_hh = (w_hh.double() @ w_hr.double()).to(w_hh.dtype)
        columns["W"].append(_in_order(w_ih, cell))
        columns["R"].append(_in_order(w_hh, cell))
        if b_ih is not None and b_hh is not None:
            columns["B"].append(torch.cat([_in_order(b_ih, cell), _in_order(b_hh, cell)]))
    return {name: torch.stack(column) for name, column in columns.items() if column}


def _in_order(weight: Tensor, cell: str) -> Tensor:
    order = _ORDER[cell]
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[gate] for gate in order]) if len(order) > 1 else weight


def _quantised(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DynamicQuantizeLSTM takes them: int8 [D, I, 4H], with a scale for each row of a gate.

    7 bits: with 8, products saturate on a CPU without VNNI, and results are wrong.
    """
    result = dict(operands)
    for name in ("W", "R"):
        weight = operands[name].float()
        scale = weight.abs().amax(2) / 63
        scale = scale.where(scale > 0, 1)
        steps = (weight / scale[..., None]).round().to(torch.int8)
        result[name] = steps.transpose(1, 2).contiguous()
        result[f"{name}_scale"] = scale
        result[f"{name}_zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    return result


_OPERANDS = ("W", "R", "B", *(f"{w}_{part}" for w in "WR" for part in ("scale", "zero_point")))


def _parts(module: Any, index: int) -> Sequence[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh, w_hr of a layer and direction, or of a cell."""
    if isinstance(module, RecurrentCell):
        return *module._weights(module._dtype()), None
    return module._parameters_of(index, module._dtype())  # type: ignore[no-any-return]


def _groups(module: Any) -> Iterator[tuple[str, list[int]]]:
    """A suffix of names, and the layers and directions (by index), of each node of a module."""
    if isinstance(module, RecurrentCell):
        yield "", [0]
        return
    for layer, sizes in enumerate(module.sizes):
        first = layer * len(sizes)
        indices = list(range(first, first + len(sizes)))
        projects = {len(module._all_weights[index]) for index in indices}
        if len({h for h, _ in sizes}) == len(projects) == 1:
            yield f"_l{layer}", indices
        else:
            yield f"_l{layer}", [first]
            yield f"_l{layer}_reverse", [first + 1]


def _cell_name(module: Any) -> str:
    return module._step if isinstance(module, RecurrentCell) else module.cell.name


def _weights(module: Any, suffix: str, indices: Sequence[int]) -> list[Tensor | None]:
    """The operands of a node in the order of its inputs: the module's own, or made in the graph."""
    operands = {name: module._buffers.get(name + suffix) for name in _OPERANDS}
    if operands["W"] is None:
        operands |= _operands([_parts(module, i) for i in indices], _cell_name(module))
    return [operands[name] for name in _OPERANDS[: 7 if operands["W_scale"] is not None else 3]]


def _is_computed(module: Any) -> bool:
    """Whether a weight is none of the module's own, as a pruned one."""
    own = (
        module._all_weights
        if isinstance(module, Recurrent)
        else [PARAMETERS[: 4 if module.bias else 2]]
    )
    names = [name for those in own for name in those]
    return any(name not in module._parameters | module._buffers for name in names)


def check_int8(module: Any) -> None:
    """Raise ValueError for a module that ONNX Runtime does not have in 8 bits."""
    if _cell_name(module) != "lstm":
        raise ValueError(
            "export_onnx: expected LSTMs, the only layers that ONNX Runtime has in 8 bits, got "
            f"{type(module).__name__}"
        )
    if _is_computed(module):
        raise ValueError(
            f"export_onnx: expected an {type(module).__name__} with its own parameters for int8, "
            "got computed ones"
        )


@torch.no_grad()
def store_operands(module: Any, int8: bool) -> None:
    """Put the operands of the nodes on the module as buffers, whose names the file takes.

    They take the place of those that were put there before.
    """
    served = not _is_computed(module) and _cell_name(module) in _ORDER
    for suffix, indices in _groups(module) if served else []:
        parts = [_parts(module, index) for index in indices]
        operands = _operands(parts, _cell_name(module))
        for name in _OPERANDS:
            module._buffers.pop(name + suffix, None)
        for name, value in (_quantised(operands) if int8 else operands).items():
            module.register_buffer(name + suffix, value.detach().clone())
        for index, (*_, w_hr) in zip(indices, parts, strict=True):
            # m with w_hr m = h, for a given state h.
            if w_hr is None or w_hr.shape[0] > w_hr.shape[1]:
                continue
            if torch.linalg.cond(w_hr.double()) < 1e4:
                inverse = torch.linalg.pinv(w_hr.double()).to(w_hr.dtype)
                module.register_buffer(f"inverse_hr_{index}", inverse)


# -------------------------------------------------------------------------------------------------
# calls of modules during an export


# What was refused in this export: torch's exporter tries another way, whose error it raises.
refused: ContextVar[list[str]] = ContextVar("refused")


def _refusal(message: str) -> RuntimeError:
    refused.get([]).append(message)
    return RuntimeError(message)


def forward(
    module: Recurrent,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Any,
    resets: Any,
) -> tuple[Tensor | PackedSequence, Any]:
    """`Recurrent.forward` while torch.onnx exports."""
    kind = type(module).__name__
    stepwise = module.cell.name not in _ORDER or resets is not None
    if stepwise and (lengths is not None or isinstance(input, PackedSequence)):
        raise _refusal(
            "export_onnx: expected rows of one length where ONNX has no node (resets, and an "
            f"ISSRHN), got several for {kind}"
        )
    if isinstance(input, PackedSequence):
        counts = getattr(input.batch_sizes, "lengths", None)
        if counts is None:
            raise _refusal(
                f"torch.onnx.export: expected no packed sequences around {kind}, got some; "
                "iss_kernels.export_onnx takes them"
            )
        x, batched = _padded(input.data, input.batch_sizes), True
        order, back = input.sorted_indices, input.unsorted_indices
    else:
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and module.batch_first else x
        counts = None if lengths is None else torch.as_tensor(lengths, device="cpu")
        order = back = None
    module._check_input(x, 3)
    if hx is None and not stepwise:
        states: Any = [(None,) * len(module.cell.states)] * len(module._all_weights)
    else:
        states = module._initial(hx, x.size(1), x, order, batched, order is not None)
    if stepwise:
        cuts = None if resets is None else module._padded_resets(resets, input.data)
        y, final = _stepwise(module, x, cuts, states)
    else:
        y, final = _layers(module, x, counts, states)
    y, after = module._output(y), module._final(final, back, batched)
    if isinstance(input, PackedSequence):
        return input._replace(data=_packed(y, input.batch_sizes)), after
    if not batched:
        return y.squeeze(1), after
    return (y.transpose(0, 1) if module.batch_first else y), after


def _layers(
    module: Recurrent,
    x: Tensor,
    lengths: Tensor | None,
    states: list[tuple[Tensor | None, ...]],
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """All layers over x [T, B, I]: y, and the final states by layer and direction."""
    final: list[tuple[Tensor, ...]] = []
    outputs: list[Tensor] = []
    for suffix, indices in _groups(module):
        layer, direction = divmod(indices[0], len(module.sizes[0]))
        if layer > 0 and direction == 0:
            x, outputs = _joined(outputs), []
            x = dropout(x, module.dropout, module.training)
        h = module.sizes[layer][direction][0]
        projections = [_parts(module, index)[4] for index in indices]
        given = [
            states[index] if w is None else _unprojected(module, index, states[index])
            for index, w in zip(indices, projections, strict=True)
        ]
        weights = _weights(module, suffix, indices)
        y, *after = _recurrent_node(module.cell.name, x, weights, lengths, given, h, direction == 1)
        rows = list(zip(*(state.unbind(0) for state in after), strict=True))
        if projections[0] is None:
            final += rows
            wide = y.transpose(1, 2).flatten(2) if len(indices) == 2 else y.squeeze(1)
            outputs.append(wide)
        else:
            for m, w, (m_n, c_n) in zip(y.unbind(1), projections, rows, strict=True):
                outputs.append(linear(m, w))  # type: ignore[arg-type]
                final.append((linear(m_n, w), c_n))  # type: ignore[arg-type]
    return _joined(outputs), final


def _stepwise(
    module: Recurrent, x: Tensor, cuts: Tensor | None, states: list[tuple[Tensor, ...]]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """`_layers` by the equations of each step, for what ONNX has no node for. cuts: [T, B]."""
    x, masks = module._dropped(x, None, states)
    step = partial(STEPS[module.cell.name], **({} if masks is None else {"masks": masks}))
    final: list[tuple[Tensor, ...]] = []
    order = list(range(x.shape[0]))  # which fixes their number
    for layer, sizes in enumerate(module.sizes):
        x = dropout(x, module.dropout, module.training) if layer > 0 else x
        outputs = []
        for direction in range(len(sizes)):
            index = layer * len(sizes) + direction
            w_ih, w_hh, b_ih, b_hh, w_hr = _parts(module, index)
            gates = linear(x, w_ih, b_ih)  # type: ignore[arg-type]
            state, rows = states[index], [x] * len(order)
            for t in reversed(order) if direction else order:
                # Forward the cut before step t; in reverse the one between steps t + 1 and t.
                if cuts is not None and t + direction < len(order):
                    among = cuts[t + direction].unsqueeze(1)
                    state = tuple(s.masked_fill(among, 0) for s in state)
                state = step(gates[t], *state, w_hh=w_hh, b_hh=b_hh, w_hr=w_hr)
                rows[t] = state[0]
            outputs.append(torch.stack(rows))
            final.append(state)
        x = _joined(outputs)
    return x, final


def _joined(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _unprojected(
    module: Recurrent, index: int, state: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """(m, c) for a state (h, c) of a projected layer, with w_hr m = h."""
    h, c = state
    if h is None:
        return state
    inverse = module._buffers.get(f"inverse_hr_{index}")
    if inverse is None:
        raise _refusal(
            "export_onnx: expected no hx for a layer whose projection cannot be inverted, "
            f"got one for {type(module).__name__}"
        )
    return linear(h, inverse), c


def cell_forward(cell: RecurrentCell, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`RecurrentCell` while torch.onnx exports: a node of one step. x: [B, I], states: [B, H]."""
    weights = _weights(cell, "", [0])
    _, *after = _recurrent_node(
        cell._step, x.unsqueeze(0), weights, None, [states], cell.hidden_size, False
    )
    return tuple(state.squeeze(0) for state in after)


class Packing(TorchFunctionMode):
    """Packed sequences remember their padded form, which nodes read with the lengths of rows.

    What a packed sequence holds beside its tensors is an attribute of these: of batch_sizes the
    lengths, and of data the padded form. Nothing but pad_packed_sequence and recurrent modules of
    ours may read batch_sizes, since a trace would keep its values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]  # the same without gradients, and exporters see what is written to it
        if name == "_pack_padded_sequence":
            x, lengths, batch_first = args
            x = x.transpose(0, 1) if batch_first else x
            running = torch.arange(x.shape[0], device=lengths.device)[:, None] < lengths
            batch_sizes: Any = running.sum(1)
            batch_sizes.lengths, batch_sizes.running = lengths, running
            batch_sizes.longest = _longest(lengths, x.shape[0])
            return _packed(x, batch_sizes), batch_sizes
        given = pytree.tree_leaves((args, kwargs))
        read = [a for a in given if isinstance(a, Tensor) and hasattr(a, "lengths")]
        if read and name == "_pad_packed_sequence":
            return _pad(*args)
        if read and name == "size":  # by pad_packed_sequence
            return read[0].longest  # type: ignore[attr-defined]
        if read and name != "__get__":
            raise _refusal(
                "export_onnx: expected packed sequences that nothing but recurrent modules and "
                f"pad_packed_sequence reads, got {name} of batch_sizes"
            )
        return func(*args, **(kwargs or {}))


def _longest(lengths: Tensor, steps: int) -> Any:
    """max(lengths), from 1 to steps, as a size."""
    longest: Any = lengths.max()
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return longest
    longest = longest.item()
    torch._check(longest >= 1)  # type: ignore[no-untyped-call]
    torch._check(longest <= steps)  # type: ignore[no-untyped-call]
    return longest


def _packed(y: Tensor, batch_sizes: Any) -> Tensor:
    """[N, size], the rows of y [T, B, size] that take part in each step."""
    data: Any = y[batch_sizes.running.to(y.device)]
    data.padded = y, data._version
    return data  # type: ignore[no-any-return]


def _padded(data: Any, batch_sizes: Any) -> Tensor:
    """y for _packed(y); zeros where a row takes no part."""
    y, version = getattr(data, "padded", (None, 0))
    if y is not None and data._version == version:
        return y  # type: ignore[no-any-return]
    running: Tensor = batch_sizes.running.to(data.device)
    for _ in range(data.dim() - 1):
        running = running.unsqueeze(-1)
    whole: Tensor = data.new_zeros(*running.shape[:2], *data.shape[1:])
    return whole.masked_scatter(running, data)


def _pad(
    data: Tensor, batch_sizes: Any, batch_first: bool, padding: float, total: Any
) -> tuple[Tensor, Tensor]:
    """torch's _pad_packed_sequence, to `total` steps."""
    y = _padded(data, batch_sizes)
    past = batch_sizes.running.to(y.device).logical_not()
    for _ in range(y.dim() - 2):
        past = past.unsqueeze(-1)
    y = y.masked_fill(past, padding)
    if total is not batch_sizes.longest and total > y.shape[0]:
        y = torch.cat([y, y.new_full((total - y.shape[0], *y.shape[1:]), padding)])
    y = y[:total]
    return (y.transpose(0, 1) if batch_first else y), batch_sizes.lengths
