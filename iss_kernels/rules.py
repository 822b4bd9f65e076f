# SPDX-License-Identifier: Apache-2.0
"""What each torch function does to labels: the table that `find_groups` follows a model by.

A tensor has a list of labels: each an int32 tensor that says which unit every element belongs to.
Most have one. A matrix of parameters has two, by its rows and by its columns. Labels have as many
dimensions as the tensor, of size 1 where they are alike; so most functions that change the length
of a sequence need not change them.

A rule may join units (`Trace.unite`: both leave together), say that a unit is read by its value
(`Trace.read`: it leaves only once that is zero), or that units stay whole (`Trace.keep_whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from iss_kernels.arguments import map_tensors, tensors

NONE = -1  # of no unit
ANY = -2  # an element of a constant tensor, which is made as wide as it has to be

Labels: TypeAlias = list[Tensor]


class Trace(Protocol):
    """What rules ask of the tracer and tell it."""

    def labels(self, tensor: Any) -> Labels:
        """The labels of a tensor; none for data that no unit is part of."""

    def label(self, tensor: Tensor, labels: Iterable[Tensor]) -> None:
        """Give a tensor its labels."""

    def unite(self, one: Tensor, two: Tensor, why: str) -> Tensor:
        """Join the units of two broadcastable labels, place by place; the labels of both.

        `why`: what to say of a unit that meets an element of no unit, and stays for it.
        """

    def read(self, labels: Tensor) -> None:
        """These units are read by their value, with no weight that could be zero."""

    def multiplied(self, labels: Tensor) -> None:
        """These places of a parameter are multiplied with units and summed over."""

    def keep_whole(self, labels: Tensor, why: str, unknown: bool = False) -> None:
        """These units cannot leave; `unknown`: no rule says so, but none is there."""

    def is_weight(self, tensor: Any) -> bool:
        """Whether a tensor is computed from parameters alone."""


# NumPy's names of arguments, which torch takes too.
_ALIASES = {"axis": "dim", "keepdims": "keepdim"}
# Names of first arguments, in the order in which they are first.
_FIRST = ("condition", "input", "tensors", "sequences", "input1", "query", "x", "x1", "a", "A")


class Call:
    """A call of a torch function: its arguments by torch's names, and what it returned.

    The first argument is always in its place.
    """

    def __init__(
        self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        kwargs = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
        if first := next((key for key in _FIRST if not args and key in kwargs), None):
            args = (kwargs.pop(first),)
        self.name, self.function, self.args, self.kwargs = name, function, args, kwargs
        self.result = result

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def dims(self, place: int = 1, name: str = "dim") -> set[int]:
        """Dimensions that the call names, counted from the right (-1 is the last); all for None."""
        return from_right(self.get(place, name), self.input.dim())


def from_right(dims: Any, count: int) -> set[int]:
    """Dimensions out of `count`, given as torch takes them, counted from the right."""
    if dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return set(range(-count, 0))
    dims = [dims] if isinstance(dims, int) else dims
    return {dim - count if dim >= 0 else dim for dim in dims}


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


Rule: TypeAlias = Callable[[Trace, Call], None]
RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table under these names of functions."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return enter


# -- Labels


def compact(labels: Tensor) -> Tensor:
    """Labels with size 1 along each dimension where they are alike, but for ANY.

    In the last dimension, ANY beside NONE is where units may follow, and stays apart.
    """
    last = labels.dim() - 1
    for dim in range(labels.dim()):
        if labels.size(dim) > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
        elif labels.size(dim) > 1:
            highest = labels.amax(dim, keepdim=True)
            merged = (labels == ANY) & ((highest != NONE) | (dim < last))
            if bool(((labels == highest) | merged).all()):
                labels = highest
    return labels


def varies(labels: Tensor) -> frozenset[int]:
    """The dimensions along which units differ, counted from the right."""
    return frozenset(d - labels.dim() for d, size in enumerate(labels.shape) if size > 1)


def fill(shape: Sequence[int], value: int = NONE) -> Tensor:
    """Labels of one value."""
    return torch.full((), value, dtype=torch.int32, device="cpu").expand(tuple(shape))


def is_any(labels: Labels) -> bool:
    """Whether these are the labels of a constant tensor of any width."""
    return any(bool((one == ANY).all()) for one in labels)


MIXES = "it mixes its units with elements that do not leave with them"
REDUCES = "it reduces over the units"
WIDE = "it reads all units at once"


@dataclass
class Operand:
    """A tensor and its labels, in a space that all operands of a product or sum broadcast to.

    weight: whether it is computed from parameters alone.
    """

    tensor: Tensor
    labels: Labels
    weight: bool = False


def united(trace: Trace, operands: Sequence[Operand]) -> Labels:
    """The labels of what is computed from operands element by element."""
    joined: Labels = []
    for operand in operands:
        for labels in operand.labels:
            if is_any([labels]):
                continue
            for i, other in enumerate(joined):
                if varies(labels) & varies(other):
                    joined[i] = trace.unite(labels, other, MIXES)
                    break
            else:
                joined.append(labels)
    kept = []
    for labels in joined:
        for tensor, own in ((operand.tensor, operand.labels) for operand in operands):
            if is_any(own) or any(varies(one) & varies(labels) for one in own):
                continue
            # The last of several dimensions is that of the units; the others are layers, say.
            dim = max(varies(labels), default=0)
            if dim and tensor.dim() >= -dim and tensor.size(dim) > 1 and tensor.stride(dim) != 0:
                trace.keep_whole(labels, MIXES)
                break
        else:
            kept.append(labels)
    wide = [operand for operand in operands if not _is_alike(operand.tensor)]
    constant = [operand for operand in operands if is_any(operand.labels)]
    # Data that is alike along the last dimension leaves a constant as wide as it has to be.
    if not joined and constant and all(is_any(operand.labels) for operand in wide or operands):
        return [fill((), ANY)]
    return kept


def _is_alike(tensor: Tensor) -> bool:
    """Whether the elements along the last dimension are one."""
    return tensor.dim() == 0 or tensor.size(-1) == 1 or tensor.stride(-1) == 0


def _operands(trace: Trace, values: Iterable[Any]) -> list[Operand]:
    """Tensors among the values, as operands."""
    return [Operand(value, trace.labels(value)) for value in values if isinstance(value, Tensor)]


def _label_all(trace: Trace, result: Any, labels: Labels) -> None:
    """Label every tensor of a result; labels with fewer dimensions broadcast."""
    for tensor in tensors(result):
        own = [one.reshape((1,) * (tensor.dim() - one.dim()) + one.shape) for one in labels]
        trace.label(tensor, own)


def along(trace: Trace, labels: Labels, dims: set[int] | frozenset[int], why: str) -> Labels:
    """The labels that do not vary along dims; the units of the others stay whole."""
    kept = []
    for one in labels:
        if varies(one) & dims:
            trace.keep_whole(one, why)
        else:
            kept.append(one)
    return kept


def merged(trace: Trace, labels: Tensor, dims: set[int] | frozenset[int]) -> Tensor:
    """Labels that do not vary along dims: units that are at one place there become one."""
    for dim in dims & varies(labels):
        highest = labels.amax(dim, keepdim=True)
        trace.unite(labels, highest, MIXES)
        labels = highest
    return labels


def in_columns(trace: Trace, labels: Labels) -> Labels:
    """Labels along the last dimension alone, for what reads all rows by the same columns."""
    kept = []
    for one in labels:
        others = varies(one) - {-1}
        if others and -1 not in varies(one):
            trace.keep_whole(one, "its units are not in the last dimension")
        else:
            kept.append(merged(trace, one, others))
    return kept


# -- Element by element

# They drop elements, channels or features.
DROPOUTS = words(
    """alpha_dropout alpha_dropout_ dropout dropout1d dropout2d dropout3d dropout_
    feature_alpha_dropout feature_alpha_dropout_ feature_dropout feature_dropout_"""
)
_ELEMENTWISE = """__add__ __and__ __eq__ __floordiv__ __ge__ __gt__ __iadd__ __iand__ __idiv__
    __ifloordiv__ __imul__ __invert__ __ior__ __ipow__ __isub__ __itruediv__ __le__ __lt__ __mod__
    __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rand__ __rdiv__ __rmul__ __ror__ __rpow__
    __rsub__ __rtruediv__ __sub__ __truediv__ __xor__ _copy_from abs absolute acos add
    add_ addcdiv addcdiv_ addcmul addcmul_ asin atan atan2 bernoulli bfloat16 bool ceil celu clamp
    clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clip_ clone complex contiguous copy_ cos
    cosh cpu cuda data deg2rad detach detach_ div div_ divide double elu elu_ eq erf erfc exp exp_
    expm1 fill fix float float_power floor fmax fmin fmod frac ge gelu gt half hardshrink
    hardsigmoid hardswish hardtanh hardtanh_ heaviside hypot imag int isfinite isinf isnan le
    leaky_relu leaky_relu_ lerp lerp_ log log10 log1p log2 log_ logaddexp logical_and logical_not
    logical_or logical_xor logit logsigmoid long lt masked_fill masked_fill_ maximum minimum mish
    mul mul_ multiply multiply_ nan_to_num ne neg negative pin_memory polar pow pow_ real reciprocal
    relu relu6 relu_ remainder requires_grad_ round rrelu rsqrt rsub selu sgn sigmoid sigmoid_ sign
    silu sin sinh softplus softshrink softsign sqrt square sub sub_ subtract tan tanh tanh_
    tanhshrink threshold to true_divide trunc type type_as view_as_complex_ where xlogy"""


@_rule(_ELEMENTWISE)
@_rule(" ".join(DROPOUTS))
def _elementwise(trace: Trace, call: Call) -> None:
    likes = call.name in ("to", "type", "type_as")  # their later arguments tell a dtype alone
    values = call.args[:1] if likes else [*call.args, *call.kwargs.values()]
    operands = _operands(trace, values)
    if call.name in ("copy_", "fill"):
        operands = operands[1:]
    _label_all(trace, call.result, united(trace, operands))


@_rule("__set__")
def _set(trace: Trace, call: Call) -> None:
    """tensor.data = value; a parameter keeps the labels of its name."""
    if len(call.args) > 1 and isinstance(call.args[1], Tensor) and not trace.is_weight(call.input):
        trace.label(call.input, trace.labels(call.args[1]))


@_rule("bernoulli_ exponential_ fill_ normal_ uniform_ zero_")
def _constant(trace: Trace, call: Call) -> None:
    """What is drawn anew counts as constant: what it does to answers shows when units leave."""
    trace.label(call.result, [fill((1,) * call.result.dim(), ANY)])


@_rule(
    """empty empty_like full full_like new new_empty new_full new_ones new_zeros ones ones_like
    rand_like randn_like zeros zeros_like"""
)
def _made(trace: Trace, call: Call) -> None:
    if isinstance(call.result, Tensor):
        trace.label(call.result, [fill((1,) * call.result.dim(), ANY)])


@_rule("glu")
def _glu(trace: Trace, call: Call) -> None:
    dim, kept = call.get(1, "dim", -1), []
    for one in trace.labels(call.input):
        halves = one.expand(call.input.shape).chunk(2, dim)
        kept.append(compact(trace.unite(halves[0], halves[1], MIXES)))
    trace.label(call.result, kept)


@_rule("prelu")
def _prelu(trace: Trace, call: Call) -> None:
    weight = call.get(1, "weight")
    vectors = [weight] if weight.numel() > 1 else []
    _by_channel(trace, call, trace.labels(call.input), vectors)


# -- Moves

_MOVES = """T __getitem__ adjoint chunk diagonal diff_ dsplit expand expand_as flatten
    flip fliplr flipud gather hsplit index_select mH mT masked_select moveaxis movedim narrow
    permute ravel repeat repeat_interleave reshape reshape_as roll rot90 select split squeeze
    swapaxes swapdims t take take_along_dim tensor_split tile transpose triu tril unbind unflatten
    unfold unsafe_chunk unsafe_split unsqueeze unsqueeze_ squeeze_ view view_as vsplit
    broadcast_to permute_copy transpose_ t_ split_with_sizes view_as_real"""
_WIDENS = words("broadcast_to expand expand_as repeat repeat_interleave tile")
JOINS = words("cat concat concatenate dstack hstack stack vstack column_stack row_stack block_diag")


def _slots(labels: Labels) -> dict[int, Tensor]:
    """Labels by the last dimension along which they vary, counted from the right (0: none)."""
    return {max(varies(one), default=0): one for one in labels}


def _moved(call: Call, labels: dict[int, Tensor]) -> list[Tensor]:
    """What the call returns for {id of an argument: labels} in the place of the data.

    Zeros that the function puts in (triu, block_diag) are of no unit, so labels are above 0 there.
    """
    above = {key: one + 3 for key, one in labels.items()}
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: above.get(id(t), t.cpu()))
    moved = tensors(call.function(*args, **kwargs))
    return [torch.where(one == 0, NONE, one - 3) for one in moved]


def _laid_out(labels: Tensor, tensor: Tensor) -> Tensor:
    """Labels in a tensor's own layout: what can be done to it can be done to its labels."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int32, device="cpu")
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:  # expanded, so alike along it
            out, labels = out.narrow(dim, 0, 1), labels.narrow(dim, 0, 1)
    return out.copy_(labels).expand(tensor.shape)


@_rule(_MOVES)
def _move(trace: Trace, call: Call) -> None:
    data = call.input
    if any(isinstance(one, torch.dtype) for one in (*call.args, *call.kwargs.values())):
        for one in trace.labels(data):  # view(dtype) reinterprets the bits
            trace.keep_whole(one, "it reinterprets their bits", unknown=True)
        return
    widened = call.name in _WIDENS and _is_alike(data) and call.result.shape[-1:] > (1,)
    # repeat_interleave without a dimension flattens what it repeats.
    if widened and call.result.dim() >= data.dim() and not trace.labels(data):
        _made(trace, call)  # as wide as it has to be
        return
    results: list[Labels] = [[] for _ in tensors(call.result)]
    for one in trace.labels(data):
        whole = one.expand(data.shape)
        try:
            moved = _moved(call, {id(data): whole})
        except RuntimeError:  # a view that the layout of the data allows, and this does not
            moved = _moved(call, {id(data): _laid_out(whole, data)})
        for labels, after in zip(results, moved, strict=True):
            labels.append(compact(after))
    for tensor, labels in zip(tensors(call.result), results, strict=True):
        trace.label(tensor, labels)


@_rule(" ".join(JOINS))
def _join(trace: Trace, call: Call) -> None:
    operands = tensors((call.args, call.kwargs))
    slots = [_slots(trace.labels(tensor)) for tensor in operands]
    joined: Labels = []
    for slot in sorted({slot for own in slots for slot in own if slot < 0}):
        labels = {}
        for tensor, of in zip(operands, slots, strict=True):
            other = fill((1,) * tensor.dim(), ANY if is_any([*of.values()]) else NONE)
            labels[id(tensor)] = of.get(slot, other).expand(tensor.shape)
        joined.append(compact(*_moved(call, labels)))
    constant = [is_any([*of.values()]) for of in slots]
    if not joined and all(constant):
        joined = [fill((1,) * call.result.dim(), ANY)]
    elif not joined and any(constant) and _along_last(call, operands[0].dim()):
        # Zeros beside data, in whose place there are units later: input feeding begins so.
        kinds = [ANY if one else NONE for one in constant]
        parts = zip(operands, kinds, strict=True)
        joined = [torch.cat([fill((1,) * (t.dim() - 1) + t.shape[-1:], k) for t, k in parts], -1)]
    trace.label(call.result, joined)


def _along_last(call: Call, count: int) -> bool:
    """Whether a call joins tensors of so many dimensions along their last one."""
    return "cat" in call.name and from_right(call.get(1, "dim", 0), count) == {-1}


@_rule("__setitem__ index_put index_put_ masked_scatter masked_scatter_")
def _write(trace: Trace, call: Call) -> None:
    masked = call.name.startswith("masked")
    target, index = call.input, call.get(1, "mask" if masked else "indices")
    value = call.get(2, "source" if masked else "values")
    shape = call.result.shape if isinstance(call.result, Tensor) else target.shape
    before, after = _slots(trace.labels(target)), {}
    written = _slots(trace.labels(value)) if isinstance(value, Tensor) else {0: fill((), ANY)}
    for slot in {*before, *written} - {0} or {0}:
        base = ANY if is_any([*before.values()]) else NONE
        labels = before.get(slot, fill((), base)).expand(shape).clone()
        new = written.get(slot, fill((), ANY if is_any([*written.values()]) else NONE))
        new = new.expand(value.shape) if isinstance(value, Tensor) else new
        cpu = map_tensors(index, Tensor.cpu)
        if masked:
            labels.masked_scatter_(cpu, new)
        else:
            labels[cpu] = new
        after[slot] = compact(labels)
    if call.name.endswith("_"):
        trace.label(target, after.values())
    if isinstance(call.result, Tensor):
        trace.label(call.result, after.values())


@_rule(
    """index_add index_add_ index_copy index_copy_ index_fill index_fill_ scatter scatter_
    scatter_add scatter_add_ scatter_reduce select_scatter slice_scatter"""
)
def _write_along(trace: Trace, call: Call) -> None:
    """Write some places along one dimension, along which units do not differ."""
    dims = call.dims()
    sources = [value for value in (*call.args[1:], *call.kwargs.values())
               if isinstance(value, Tensor) and value.is_floating_point()]  # fmt: skip
    why = "it writes at places that are counted along its units"
    operands = [
        Operand(tensor, along(trace, trace.labels(tensor), dims, why))
        for tensor in (call.input, *sources)
    ]
    if call.name.startswith("select"):
        operands = [operands[0], *(_unsqueezed(one, min(dims)) for one in operands[1:])]
    _label_all(trace, call.result, united(trace, operands))


def _unsqueezed(operand: Operand, dim: int) -> Operand:
    return Operand(
        operand.tensor.unsqueeze(dim), [labels.unsqueeze(dim) for labels in operand.labels]
    )


@_rule("pad constant_pad_nd")
def _pad(trace: Trace, call: Call) -> None:
    pads = call.get(1, "pad")
    padded = {-1 - i // 2 for i, n in enumerate(pads) if n != 0}
    kept = []
    for one in trace.labels(call.input):
        if varies(one) & padded:
            one = F.pad(one.expand(call.input.shape), list(pads), value=NONE)
        kept.append(compact(one))
    trace.label(call.result, kept)


@_rule("pad_sequence")
def _pad_sequence(trace: Trace, call: Call) -> None:
    """Stack sequences, padded along time: [T_i, *] each."""
    operands = []
    for tensor in tensors(call.input):
        labels = along(trace, trace.labels(tensor), {-tensor.dim()}, "it stacks sequences of units")
        operands.append(Operand(tensor[:1], labels))
    trace.label(call.result, united(trace, operands))


@_rule("_pack_padded_sequence")
def _pack(trace: Trace, call: Call) -> None:
    labels = in_columns(trace, trace.labels(call.input))
    trace.label(call.result[0], [one.reshape(1, -1) for one in labels if one.dim() == 3])


@_rule("_pad_packed_sequence")
def _pad_packed(trace: Trace, call: Call) -> None:
    # The padding gets labels too: it is as wide as the units, and constant.
    labels = along(trace, trace.labels(call.input), {-2}, "its units are not in the last dim")
    trace.label(call.result[0], [one.unsqueeze(0) for one in labels])


# -- Over a dimension

_SUMS = words("""linalg_norm linalg_vector_norm nansum norm sum sum_to_size vector_norm""")


@_rule(
    """amax amin all any argmax argmin count_nonzero linalg_norm linalg_vector_norm logsumexp max
    mean median min nanmean nansum norm prod quantile std std_mean sum var var_mean aminmax"""
)
def _reduce(trace: Trace, call: Call) -> None:
    if len(tensors((call.args, call.kwargs))) > 1:  # max(h, other)
        return _elementwise(trace, call)
    place = {"norm": 2, "linalg_norm": 2, "linalg_vector_norm": 2, "quantile": 2}.get(call.name, 1)
    given = call.get(place, "dim")
    given = None if isinstance(given, bool) else given  # std(unbiased)
    dims = from_right(given, call.input.dim())
    kept: Labels = []
    for one in trace.labels(call.input):
        inside = varies(one) & dims
        if inside == varies(one) and inside:
            if call.name in _SUMS:
                trace.read(one)
            elif call.name not in ("all", "any"):
                trace.keep_whole(one, REDUCES)
            continue
        kept.append(merged(trace, one, inside))  # over directions, say
    for tensor in tensors(call.result):
        dropped = sorted(dims) if tensor.dim() < call.input.dim() else []
        trace.label(tensor, [_without(one, dropped) for one in kept])


def _without(labels: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in dims:  # from the left on, so that the others keep their number from the right
        labels = labels.squeeze(dim)
    return labels


@_rule(
    """argsort cummax cummin cumprod cumsum diff kthvalue log_softmax logcumsumexp mode msort
    softmax softmin sort topk gumbel_softmax"""
)
def _along_one(trace: Trace, call: Call) -> None:
    place = {"topk": 2, "kthvalue": 2, "diff": 2, "gumbel_softmax": 4}.get(call.name, 1)
    dim = call.get(place, "dim", -1)
    dims = from_right(-1 if dim is None or isinstance(dim, bool) else dim, call.input.dim())
    kept = along(trace, trace.labels(call.input), dims, WIDE)
    for tensor in tensors(call.result):
        trace.label(tensor, kept if tensor.dim() == call.input.dim() else
                    [_without(one, sorted(dims)) for one in kept])  # fmt: skip


@_rule("normalize")
def _normalize(trace: Trace, call: Call) -> None:
    dims = call.dims(2) if call.get(2, "dim") is not None else {1 - call.input.dim()}
    for one in trace.labels(call.input):
        if varies(one) & dims:
            trace.read(one)
    trace.label(call.result, trace.labels(call.input))


@_rule("cosine_similarity")
def _cosine(trace: Trace, call: Call) -> None:
    one, two = call.get(0, "x1"), call.get(1, "x2")
    count = max(one.dim(), two.dim())
    dims = from_right(call.get(2, "dim", 1), count)
    kept = []
    for labels in united(trace, _operands(trace, (one, two))):
        if varies(labels) & dims:
            trace.read(labels)
        else:
            kept.append(_without(labels, dims))
    trace.label(call.result, kept)


@_rule(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices avg_pool1d avg_pool2d
    lp_pool1d max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices interpolate
    upsample boolean_dispatch fn"""
)
def _pool(trace: Trace, call: Call) -> None:
    """Pool or resample along the last dimensions, in which units do not differ."""
    dims = {-1} if "1d" in call.name else {-1, -2}
    if not any(number in call.name for number in ("1d", "2d")):
        dims = set(range(2 - call.input.dim(), 0)) if call.input.dim() > 2 else {-1}
    kept = along(trace, trace.labels(call.input), dims, "it pools over the units")
    for tensor in tensors(call.result):
        trace.label(tensor, kept)


# -- Norms


def _by_channel(trace: Trace, call: Call, labels: Labels, vectors: Iterable[Any]) -> None:
    """Treat each channel, dimension 1, on its own, with these parameters of each."""
    count = call.input.dim()
    channel = 1 - count if count > 1 else -1
    operands = [Operand(call.input, labels)]
    operands += [_vector(trace, one, channel) for one in vectors if isinstance(one, Tensor)]
    trace.label(call.result, united(trace, operands))


def _vector(trace: Trace, vector: Tensor, dim: int) -> Operand:
    """A vector that lies along a dimension, counted from the right."""
    shape = (-1, *[1] * (-1 - dim))
    labels = [one.reshape(shape) for one in trace.labels(vector)]
    return Operand(vector.detach().reshape(shape), labels)


def _in_channels(trace: Trace, call: Call) -> Labels:
    """The labels of units that are channels; statistics of a channel would count the others."""
    return along(trace, trace.labels(call.input), set(range(2 - call.input.dim(), 0)), WIDE)


@_rule("batch_norm instance_norm")
def _batch_norm(trace: Trace, call: Call) -> None:
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = [call.get(1 + i, name) for i, name in enumerate(names)]
    _by_channel(trace, call, _in_channels(trace, call), vectors)


@_rule("group_norm")
def _group_norm(trace: Trace, call: Call) -> None:
    if call.get(1, "num_groups") != call.input.size(1):
        return keep_all(trace, call, WIDE)
    vectors = [call.get(2, "weight"), call.get(3, "bias")]
    _by_channel(trace, call, _in_channels(trace, call), vectors)


@_rule("_weight_norm")
def _weight_norm(trace: Trace, call: Call) -> None:
    """Divide by the norm at each place along one dimension, -1 for none: it must not be zero."""
    dim = call.get(2, "dim", 0)
    dims = from_right(dim, call.input.dim()) if dim >= 0 else set()
    why = "it divides by the norm of each unit's weights"
    along(trace, trace.labels(call.input), dims, why)
    trace.label(call.result, trace.labels(call.input))


@_rule("layer_norm rms_norm native_layer_norm")
def _layer_norm(trace: Trace, call: Call) -> None:
    dims = set(range(-len(call.get(1, "normalized_shape")), 0))
    kept = along(trace, trace.labels(call.input), dims, "it normalises over the units")
    for parameter in (call.get(2, "weight"), call.get(3, "bias")):
        if isinstance(parameter, Tensor):
            for one in trace.labels(parameter):
                trace.keep_whole(one, WIDE)
    trace.label(call.result, kept)


def keep_all(trace: Trace, call: Call, why: str, unknown: bool = False) -> None:
    """Keep the units of all arguments whole."""
    for tensor in tensors((call.args, call.kwargs)):
        for one in trace.labels(tensor):
            trace.keep_whole(one, why, unknown)


# -- Products


def _aligned(value: Tensor, letters: str, space: str) -> Tensor:
    """A tensor with a dimension for each letter of the space."""
    order = [letters.index(letter) for letter in space if letter in letters]
    value = value.permute(order)
    for place, letter in enumerate(space):
        if letter not in letters:
            value = value.unsqueeze(place)
    return value


def contract(trace: Trace, factors: Sequence[tuple[Any, str]], out: str) -> Labels:
    """Labels of the sum of products of factors, with a letter for each dimension, as in einsum.

    Units that are summed over are read by their value, if no factor is a weight.
    """
    space = "".join(dict.fromkeys(out + "".join(letters for _, letters in factors)))
    operands = []
    for factor, letters in factors:
        if not isinstance(factor, Operand):
            factor = Operand(factor.detach(), trace.labels(factor), trace.is_weight(factor))
        labels = [_aligned(one, letters, space) for one in factor.labels]
        operands.append(Operand(_aligned(factor.tensor, letters, space), labels, factor.weight))
    summed = frozenset(range(len(out) - len(space), 0))
    kept = []
    weights = [operand for operand in operands if operand.weight]
    for one in (labels for weight in weights for labels in weight.labels):
        if varies(one) & summed:
            trace.multiplied(one)
    for one in united(trace, operands):
        if varies(one) & summed:
            if not weights:
                trace.read(one)
        elif not is_any([one]):
            kept.append(one.reshape(one.shape[: len(out)]))
    return kept


def _letters(count: int, start: int = 0) -> str:
    return "".join(chr(ord("a") + start + i) for i in range(count))


@_rule("linear")
def _linear(trace: Trace, call: Call) -> None:
    x, weight, bias = (call.get(i, n) for i, n in enumerate(("input", "weight", "bias")))
    batch = _letters(x.dim() - 1)
    rows = "" if weight.dim() == 1 else "y"
    labels = contract(trace, [(x, batch + "z"), (weight, rows + "z")], batch + rows)
    _with_bias(trace, call, labels, bias)


def _with_bias(trace: Trace, call: Call, labels: Labels, bias: Any, dim: int = -1) -> None:
    """Label a product to which a bias was added along dim."""
    operands = [Operand(call.result, labels)]
    operands += [_vector(trace, bias, dim)] if isinstance(bias, Tensor) else []
    trace.label(call.result, united(trace, operands))


@_rule("__matmul__ __rmatmul__ bmm dot inner matmul mm mv vdot")
def _matmul(trace: Trace, call: Call) -> None:
    one, two = tensors((call.args, call.kwargs))
    if call.name == "__rmatmul__":
        one, two = two, one
    trace.label(call.result, _product(trace, one, two))


def _product(trace: Trace, one: Tensor, two: Tensor) -> Labels:
    """Labels of one @ two."""
    batch = _letters(max(one.dim(), two.dim(), 2) - 2)
    of_one = batch[len(batch) + 2 - one.dim() :] + "xz" if one.dim() > 1 else "z"
    of_two = batch[len(batch) + 2 - two.dim() :] + "zy" if two.dim() > 1 else "z"
    out = batch + "x" * (one.dim() > 1) + "y" * (two.dim() > 1)
    return contract(trace, [(one, of_one), (two, of_two)], out)


@_rule("addbmm addmm addmv baddbmm addr")
def _add_product(trace: Trace, call: Call) -> None:
    added, one, two = call.args[:3]
    if call.name in ("addbmm", "addr"):
        return keep_all(trace, call, "no rule says what happens to its units there", unknown=True)
    labels = _product(trace, one, two)
    operands = [Operand(call.result, labels), Operand(added, trace.labels(added))]
    trace.label(call.result, united(trace, operands))


@_rule("einsum")
def _einsum(trace: Trace, call: Call) -> None:
    equation, *factors = call.args
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    if not isinstance(equation, str):
        return keep_all(trace, call, "its equation is not a string", unknown=True)
    left, arrow, out = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    counts = [f.dim() - len(i.replace("...", "")) for f, i in zip(factors, inputs, strict=True)]
    free = [c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in equation]
    dots = "".join(free[: max(counts, default=0)])
    inputs = [
        i.replace("...", dots[len(dots) - n :] if n else "")
        for i, n in zip(inputs, counts, strict=True)
    ]
    if not arrow:
        every = "".join(inputs)
        out = dots * ("..." in equation) + "".join(
            sorted(c for c in set(every) if every.count(c) == 1 and c not in dots)
        )
    if any(len(set(i)) < len(i) for i in inputs):
        return keep_all(trace, call, "it takes a diagonal", unknown=True)
    out = out.replace("...", dots)
    trace.label(call.result, contract(trace, list(zip(factors, inputs, strict=True)), out))


@_rule("tensordot")
def _tensordot(trace: Trace, call: Call) -> None:
    one, two, dims = call.get(0, "a"), call.get(1, "b"), call.get(2, "dims", 2)
    if isinstance(dims, int):
        dims = [[*range(one.dim() - dims, one.dim())], [*range(dims)]]
    of_one = [*_letters(one.dim())]
    of_two = [*_letters(two.dim(), one.dim())]
    for i, j in zip(*dims, strict=True):
        of_two[j] = of_one[i]
    out = [c for c in of_one if c not in of_two] + [c for c in of_two if c not in of_one]
    factors = [(one, "".join(of_one)), (two, "".join(of_two))]
    trace.label(call.result, contract(trace, factors, "".join(out)))


@_rule("outer ger")
def _outer(trace: Trace, call: Call) -> None:
    trace.label(call.result, contract(trace, [(call.args[0], "a"), (call.args[1], "b")], "ab"))


@_rule("bilinear")
def _bilinear(trace: Trace, call: Call) -> None:
    names = ("input1", "input2", "weight", "bias")
    one, two, weight, bias = (call.get(i, name) for i, name in enumerate(names))
    batch = _letters(one.dim() - 1)
    factors = [(one, batch + "x"), (two, batch + "y"), (weight, "zxy")]
    _with_bias(trace, call, contract(trace, factors, batch + "z"), bias)


@_rule("scaled_dot_product_attention")
def _attention(trace: Trace, call: Call) -> None:
    query, key, value = (call.get(i, name) for i, name in enumerate(("query", "key", "value")))
    if call.kwargs.get("scale") is None:  # it divides by the root of the width
        for tensor in (query, key):
            along(trace, trace.labels(tensor), {-1}, "its scale depends on the number of units")
    batch = _letters(query.dim() - 2)
    contract(trace, [(query, batch + "xz"), (key, batch + "yz")], batch + "xy")
    kept = along(trace, trace.labels(value), {-2}, WIDE)
    trace.label(call.result, kept)


@_rule("multi_head_attention_forward")
def _multi_head(trace: Trace, call: Call) -> None:
    keep_all(trace, call, "its width is divided among heads")


@_rule("embedding embedding_bag")
def _embedding(trace: Trace, call: Call) -> None:
    first, second = call.get(0, "input"), call.get(1, "weight")
    weight = first if first.is_floating_point() else second
    for tensor in tensors(call.result):
        if tensor.is_floating_point():
            columns = [one for one in trace.labels(weight) if varies(one) == {-1}]
            trace.label(tensor, [one.view((1,) * (tensor.dim() - 1) + (-1,)) for one in columns])
            break


@_rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv(trace: Trace, call: Call) -> None:
    """Multiply the channels at every place by one matrix, which is the kernel there."""
    x, weight, bias = (call.get(i, n) for i, n in enumerate(("input", "weight", "bias")))
    transposed = call.name.startswith("conv_t")
    groups, space = call.get(6, "groups", 1), weight.dim() - 2
    kernel = set(range(-space, 0))
    first: Any = (..., *[0] * space)  # what holds at one place holds at all
    given = along(trace, trace.labels(x), kernel, "it slides over the units")
    own = along(trace, trace.labels(weight), kernel, MIXES)
    at_x = Operand(x.detach()[first], [one[first] for one in given])
    at_weight = Operand(
        weight.detach()[first], [one[first] for one in own], trace.is_weight(weight)
    )
    batch = _letters(x.dim() - space - 1)
    channel = -1 - space
    if groups == 1:
        letters = "zy" if transposed else "yz"
        labels = contract(trace, [(at_x, batch + "z"), (at_weight, letters)], batch + "y")
    elif groups == x.size(channel) == weight.size(0) and not transposed:
        rows = Operand(at_weight.tensor[:, 0], [one[:, 0] for one in at_weight.labels], True)
        labels = contract(trace, [(at_x, batch + "y"), (rows, "y")], batch + "y")
    else:
        for one in (*given, *own):
            trace.keep_whole(one, "its channels are in groups")
        labels = []
    labels = [one.reshape(*one.shape, *[1] * space) for one in labels]
    _with_bias(trace, call, labels, bias, channel)


# -- What tells nothing of the units

METADATA = words(
    """__format__ __hash__ __len__ __repr__ __str__ _backward_hooks _base _is_view _version backward
    device dim dtype element_size get_device grad grad_fn has_names is_complex is_contiguous
    is_cpu is_cuda is_floating_point is_leaf is_meta is_mps is_nested is_pinned is_quantized
    is_sparse is_xla itemsize layout name names nbytes ndim ndimension nelement new_tensor numel
    output_nr register_hook requires_grad retain_grad retains_grad shape size storage_offset
    stride __cuda_array_interface__ __dlpack_device__ _has_compatible_shallow_copy_type is_signed
    result_type set_grad_enabled
    __get__ is_same_size can_cast get_default_dtype"""
)
# These tell a model's code how many units there are.
SIZES = words("""__len__ nelement numel shape size""")
# A final state copied by one of these is still that state when the model returns it.
COPIES = words("""clone contiguous data detach""")


def apply(trace: Trace, call: Call) -> None:
    """Label what a call returned by its rule; units of what has no rule stay whole."""
    rule = RULES.get(call.name)
    if rule is None:
        keep_all(trace, call, "no rule says what happens to its units there", unknown=True)
        return
    if call.kwargs.get("out") is not None:
        keep_all(trace, call, "it writes to `out`", unknown=True)
        return
    rule(trace, call)
