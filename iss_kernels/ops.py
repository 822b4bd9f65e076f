# SPDX-License-Identifier: Apache-2.0
"""The operations: a typed wrapper each, with shape inference and derivatives where compiled.

The only file that names torch.ops. Each block has the same order: wrapper, fake, setup_context,
backward, registration (recurrent_forward's derivative is csrc/autograd.cpp). First derivatives are
ops of their own; second derivatives differentiate the reference, slowly but right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import register_autograd, register_fake
from torch.utils.checkpoint import checkpoint

from iss_kernels import backend, reference
from iss_kernels.cells import CELLS, cell_of

_Tensors = Sequence[Tensor]
_is_compiling = torch.compiler.is_compiling
_cell_step: Any = getattr(backend.native(), "cell_step", None)
_functorch_active = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation follows, which do not see into an op."""
    return _functorch_active() or forward_ad._current_level >= 0  # -1 outside of a dual_level


def _by_reference() -> bool:
    """Whether plain torch runs: on request, or where a transform has to see into it."""
    return backend.backend() == "reference" or is_transformed()


def _check_devices(op: str, x: Tensor, **arguments: Tensor | None | _Tensors) -> None:
    """Refuse a mix of devices: torch runs a fake kernel as soon as one tensor is on "meta"."""
    for name, argument in arguments.items():
        for t in [argument] if isinstance(argument, Tensor) else argument or ():
            if t.device != x.device and not (name == "batch_sizes" and t.device.type == "cpu"):
                raise RuntimeError(f"{op}: expected {name} on {x.device}, got {t.device}")


def _second_derivatives(
    vjp: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Derivatives of vjp (a first derivative written in plain torch) with respect to `inputs`.

    With create_graph=True, which torch's grad mode says here, they have derivatives in turn.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t if t is None
            else t.view_as(t) if again and t.requires_grad
            else t.detach().requires_grad_()
            for t in inputs
        ]  # fmt: skip
        outputs = vjp(*leaves)
        pairs = [
            (y, g)
            for y, g in zip(outputs, cotangents, strict=True)
            if y is not None and g is not None
        ]
        given = [t for t in leaves if t is not None]
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], given, [g for _, g in pairs], allow_unused=True,
                create_graph=again,
            )
        )  # fmt: skip
    return [None if t is None else next(grads) for t in leaves]


# -------------------------------------------------------------------------------------------------
# recurrent


def recurrent(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    masks: Tensor | None,
    reverse: bool,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of a cell in one direction over all time steps, as `reference.recurrent`.

    A single step, x [B, I], reads weights on the CPU in place; a sequence packs them first, which
    pays from a few steps on.
    For the gradient it saves what `cells.Cell` says (float32 for 16 bits) beside its arguments and
    y; with recompute=True nothing more, and the backward runs the forward again.

    Raises RuntimeError for a wrong shape, dtype or device, naming the argument.
    """
    arguments = (
        cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks, reverse,
    )  # fmt: skip
    if masks is not None and not CELLS[cell].deep:
        raise RuntimeError(f"{cell}: expected no masks, got some")
    if masks is not None and masks.requires_grad:
        raise RuntimeError(f"{cell}: expected masks without a gradient, got one that requires it")
    if x.dim() == 2 and batch_sizes is None and backend.on_cuda(x.device):
        _, h, c = recurrent(
            cell, x.unsqueeze(0), None, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks,
            reverse, recompute,
        )  # fmt: skip
        return h, h, c
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if _by_reference():
        cell_of(cell)
        _check_devices(
            cell, x, batch_sizes=batch_sizes, resets=resets, h0=h0, c0=c0, w_ih=w_ih, w_hh=w_hh,
            b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, masks=masks,
        )  # fmt: skip
        sizes = [] if batch_sizes is None else batch_sizes.tolist()
        if sizes and (sizes[0] != len(h0) or sizes != sorted(sizes, reverse=True)):
            raise RuntimeError(
                f"{cell}: expected batch_sizes to start at B = {len(h0)} and never grow, "
                f"got {sizes}"
            )
        # torch.func has no hooks on saved tensors, by which a checkpoint works.
        if not (recompute and trains) or _functorch_active():
            return reference.recurrent(*arguments)
        again: tuple[Tensor, Tensor, Tensor | None] = checkpoint(
            reference.recurrent, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return again
    # jit.trace writes `save` into its graph, which serves with and without gradients.
    save = trains and not recompute
    if save and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        save = False
    y, h_n, c_n, _, _ = torch.ops.iss_kernels.recurrent_forward.default(*arguments, save)
    return y, h_n, None if c0 is None else c_n


def cell_step(
    cell: str, parameters: Mapping[str, Tensor | None], x: Tensor, hx: Any
) -> Tensor | tuple[Tensor, Tensor] | None:
    """A step of a torch cell on the CPU: `recurrent` of x [B, I], without the cost of Python's ops.

    parameters: weight_ih [G H, I], weight_hh [G H, H], bias_ih and bias_hh [G H] or None.
    hx: h [B, H], of an LSTM (h, c), or None for zeros. Returns the state after the step in the form
    of hx; None, having done nothing, unless all of it is as expected and nobody else (a transform,
    a mode of torch, a tracer) takes part.
    """
    if _is_compiling() or backend.backend() == "reference":
        return None
    return _cell_step(cell, parameters, x, hx)  # type: ignore[no-any-return]


def _recurrent_forward_fake(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    masks: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    _check_devices(
        f"{cell}_forward", x, batch_sizes=batch_sizes, resets=resets, h0=h0, c0=c0, w_ih=w_ih,
        w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, masks=masks,
    )  # fmt: skip
    rows = math.prod(x.shape[:-1]) if save else 0  # Size.numel() would fix symbolic sizes
    wide = torch.promote_types(x.dtype, torch.float32)  # what the kernels compute in
    of, hidden = CELLS[cell], w_ih.shape[0] // CELLS[cell].gates
    saved_gates, saved_states = of.saved(w_hh.shape[0] // w_ih.shape[0] if of.deep else 1)
    return (
        x.new_empty((*x.shape[:-1], h0.shape[1])),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        x.new_empty(0 if c0 is None else c0.shape),
        x.new_empty((rows, saved_gates * hidden), dtype=wide),
        x.new_empty((rows, saved_states * hidden), dtype=wide),
    )


def _recurrent_backward_fake(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    masks: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    need_dx: bool,
    need_dh0: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:
    _check_devices(
        f"{cell}_backward", x, batch_sizes=batch_sizes, resets=resets, h0=h0, c0=c0, w_ih=w_ih,
        w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, masks=masks, dy=dy, dh_n=dh_n, dc_n=dc_n, y=y,
        gates=gates, cells=cells,
    )  # fmt: skip
    none = torch.Size([0])
    shapes = [x.shape if need_dx else none, h0.shape if need_dh0 else none]
    shapes += [none if c0 is None else c0.shape]
    rows = w_hh.shape[:1]
    weights = [w_ih.shape, w_hh.shape, w_ih.shape[:1], rows if CELLS[cell].bias_parts else none]
    weights += [none if w_hr is None else w_hr.shape]
    shapes += weights if need_dw else [none] * 5
    return tuple(x.new_empty(shape) for shape in shapes)


def _recurrent_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, _, _, reverse, _, _, _ = inputs  # y, gates and cells follow from the rest
    ctx.cell = tensors.pop(3)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.reverse = reverse


def _recurrent_double_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    *inputs, b_ih, b_hh, w_hr, masks = ctx.saved_tensors
    dy, dh_n, dc_n, x, batch_sizes, resets, h0, c0, w_ih, w_hh = inputs
    # The gradient of both biases is one output where the cell adds them up. A bias that is not
    # given is zero, so that each output of the first derivative has an input here.
    parts = CELLS[ctx.cell].bias_parts
    biases = [w.new_zeros(w.shape[0]) if b is None else b for b, w in ((b_ih, w_ih), (b_hh, w_hh))]
    if not parts:
        biases = [biases[0] + biases[1], None]

    def vjp(
        dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, *primals: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = primals
        outputs = reference.recurrent(
            ctx.cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks,  # type: ignore[arg-type]
            ctx.reverse,
        )  # fmt: skip
        given = [t for t in primals if t is not None]
        grads = iter(
            torch.autograd.grad(
                [t for t in outputs if t is not None],
                given,
                [t for t in (dy, dh_n, dc_n) if t is not None],
                create_graph=True,
                materialize_grads=True,
            )
        )
        return tuple(None if t is None else next(grads) for t in primals)

    second = _second_derivatives(
        vjp, (dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, *biases, w_hr), cotangents
    )
    ddy, ddh_n, ddc_n, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr = second
    if not parts:
        db_hh = db_ih
    db_ih, db_hh = (None if b is None else db for b, db in ((b_ih, db_ih), (b_hh, db_hh)))
    return (
        ddy, ddh_n, ddc_n, None, dx, None, None, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr,
        *[None] * 8,
    )  # fmt: skip


if backend.is_built():
    register_fake("iss_kernels::recurrent_forward", _recurrent_forward_fake)
    register_fake("iss_kernels::recurrent_backward", _recurrent_backward_fake)
    register_autograd(
        "iss_kernels::recurrent_backward",
        _recurrent_double_backward,
        setup_context=_recurrent_backward_setup_context,
    )


# -------------------------------------------------------------------------------------------------
# group_norms


def group_norms(
    weights: _Tensors,
    row_units: _Tensors,
    column_units: _Tensors,
    units: int,
    eps: float,
    paper_overlap: bool,
) -> Tensor:
    """Norm of every unit's group over all weights, [units]. Shapes: `reference.group_norms`.

    Raises RuntimeError for a wrong shape, dtype or label, naming the argument.
    """
    arguments = (list(weights), list(row_units), list(column_units), units, eps, paper_overlap)
    if _by_reference():
        return reference.group_norms(*arguments)
    norms: Tensor = torch.ops.iss_kernels.group_norms_forward.default(*arguments)
    return norms


def _group_norms_forward_fake(
    weights: _Tensors,
    row_units: _Tensors,
    column_units: _Tensors,
    units: int,
    eps: float,
    paper_overlap: bool,
) -> Tensor:
    labels = {"row_units": row_units, "column_units": column_units}
    _check_devices("group_norms_forward", weights[0], weights=weights, **labels)
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    return weights[0].new_empty(units, dtype=wide)


def _group_norms_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, row_units, column_units, _, ctx.eps, ctx.paper_overlap = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(output, *weights, *row_units, *column_units)


def _group_norms_backward(ctx: Any, dnorms: Tensor) -> tuple[Any, ...]:
    norms, *tensors = ctx.saved_tensors
    lists = [tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3)]
    dweights = torch.ops.iss_kernels.group_norms_backward.default(
        dnorms, norms, *lists, ctx.eps, ctx.paper_overlap
    )
    no_labels = [None] * ctx.count
    return dweights, no_labels, no_labels, None, None, None


def _group_norms_backward_fake(
    dnorms: Tensor,
    norms: Tensor,
    weights: _Tensors,
    row_units: _Tensors,
    column_units: _Tensors,
    eps: float,
    paper_overlap: bool,
) -> list[Tensor]:
    labels = {"row_units": row_units, "column_units": column_units}
    _check_devices(
        "group_norms_backward", weights[0], dnorms=dnorms, norms=norms, weights=weights, **labels
    )
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


def _group_norms_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dnorms, _, weights, row_units, column_units, ctx.eps, ctx.paper_overlap = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(dnorms, *weights, *row_units, *column_units)


def _group_norms_double_backward(ctx: Any, cotangents: _Tensors) -> tuple[Any, ...]:
    dnorms, *tensors = ctx.saved_tensors
    weights, rows, columns = (tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3))

    def vjp(dnorms: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        norms = reference.group_norms(
            weights, rows, columns, len(dnorms), ctx.eps, ctx.paper_overlap
        )
        return torch.autograd.grad(norms, weights, dnorms, create_graph=True)

    ddnorms, *dweights = _second_derivatives(vjp, (dnorms, *weights), cotangents)
    no_labels = [None] * ctx.count
    return ddnorms, None, dweights, no_labels, no_labels, None, None


if backend.is_built():
    register_fake("iss_kernels::group_norms_forward", _group_norms_forward_fake)
    register_fake("iss_kernels::group_norms_backward", _group_norms_backward_fake)
    register_autograd(
        "iss_kernels::group_norms_forward",
        _group_norms_backward,
        setup_context=_group_norms_setup_context,
    )
    register_autograd(
        "iss_kernels::group_norms_backward",
        _group_norms_double_backward,
        setup_context=_group_norms_backward_setup_context,
    )


# -------------------------------------------------------------------------------------------------
# In place, without derivatives: what a training loop does between steps, and a stream in one.


def _check_apart(name: str, tensors: _Tensors) -> None:
    """Raise unless each element of `tensors`, strided matrices, is memory of its own."""
    spans = []
    for t in tensors:
        (rows, columns), (down, right) = t.shape, t.stride()
        step = math.gcd(down, right) or 1  # i rows down may lead to where j columns right do
        if right // step < rows and down // step < columns and t.numel() > 1:
            raise RuntimeError(
                f"{name}: expected tensors to write whose elements share no memory, "
                f"got strides {list(t.stride())} for shape {list(t.shape)}"
            )
        length = (rows - 1) * down + (columns - 1) * right + 1 if t.numel() else 0
        spans.append((t.data_ptr(), t.data_ptr() + length * t.itemsize))
    for (_, end), (begin, _) in itertools.pairwise(sorted(spans)):
        if begin < end:
            raise RuntimeError(f"{name}: expected tensors to write that share no memory")


@torch.no_grad()
def _in_place(
    name: str,
    lists: Sequence[_Tensors],
    rest: tuple[Any, ...],
    by_reference: Callable[..., Tensor],
) -> None:
    """Run the op `name`(*lists, *rest), which changes lists[0].

    by_reference, of one tensor of each list and `rest`, is what the first of them becomes.
    The op writes contiguous tensors; others are copied to it and back.
    """
    if backend.backend() == "extension":
        written = [t.contiguous() for t in lists[0]]
        copied = [(t, copy) for t, copy in zip(lists[0], written, strict=True) if copy is not t]
        if copied and not torch.compiler.is_compiling():
            _check_apart(name, lists[0])
        getattr(torch.ops.iss_kernels, name).default(written, *map(list, lists[1:]), *rest)
        for t, copy in copied:
            t.copy_(copy)
        # Lets autograd refuse a graph that saved one of these before, as for torch's own.
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([t for t in lists[0] if not t.is_inference()])
        return
    for tensors in zip(*lists, strict=True):
        tensors[0].copy_(by_reference(*tensors, *rest))


def add_scaled_by_units_(
    outputs: _Tensors,
    weights: _Tensors,
    row_units: _Tensors,
    column_units: _Tensors,
    factors: Tensor,
    paper_overlap: bool,
) -> None:
    """outputs[i] += `reference.scaled_by_units`(weights[i], ..., factors), in one pass each.

    With factors = strength / norms this adds the penalty's gradient.
    """
    _in_place(
        "add_scaled_by_units_",
        (outputs, weights, row_units, column_units),
        (factors, paper_overlap),
        lambda output, *others: output + reference.scaled_by_units(*others),
    )


def scale_by_units_(
    weights: _Tensors, row_units: _Tensors, column_units: _Tensors, factors: Tensor
) -> None:
    """weights[i] = `reference.scaled`(weights[i], ..., factors), in place and in one pass each.

    With factors = max(0, 1 - step * strength / norms) this is a proximal step.
    """
    lists = (weights, row_units, column_units)
    _in_place("scale_by_units_", lists, (factors,), reference.scaled)


def threshold_(
    weights: _Tensors, row_units: _Tensors, column_units: _Tensors, threshold: float
) -> None:
    """weights[i] = `reference.thresholded`(weights[i], ..., threshold), in place."""
    lists = (weights, row_units, column_units)
    _in_place("threshold_", lists, (threshold,), reference.thresholded)


def recurrent_step_(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    out: Tensor,
) -> None:
    """One step of a cell on a CUDA device, in one launch: out is the next h, c moves on in place.

    x: [B, I], h: [B, P], c: [B, H] where the cell has one (float32 where x has 16 bits), w_ih:
    [G H, I], w_hh: [G H, P], b_ih and b_hh: [G H]; out: [B, H], not h: the next h, or what a w_hr
    is to project. Weights have the dtype of x, or 16 bits beside float32. Rows may be further apart
    than they are long; where each begins at a multiple of 16 bytes they are read faster.
    """
    torch.ops.iss_kernels.recurrent_step_.default(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, out)
