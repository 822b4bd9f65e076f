# SPDX-License-Identifier: Apache-2.0
"""What all recurrent modules share: torch.nn's constructor, parameters, inputs, outputs and errors.

One call of ops.recurrent for each layer and direction. What is a cell's own stands in lstm.py,
gru.py, rnn.py and rhn.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from iss_kernels import backend, ops
from iss_kernels.cells import CELLS, Cell
from iss_kernels.states import Shrinkable, State, States, stacked

# One int for all layers; or per layer an int, or a (forward, backward) pair.
Sizes: TypeAlias = int | Sequence[int | Sequence[int]]

_Module = TypeVar("_Module", bound="Recurrent")

_CELLS_BY_MODE = {name.upper(): cell for name, cell in CELLS.items()}

# {a module of torch: ours in its place}; a module that torch does not have stands for itself.
MODULES: dict[type[nn.Module], type[Recurrent]] = {}
CELL_MODULES: dict[type[nn.Module], type[nn.Module]] = {}  # the same for nn.LSTMCell and its like


def class_of(module: nn.Module) -> type[Recurrent] | None:
    """Our class for a module that is exactly one of `MODULES`, torch's or ours; None for others."""
    kind = type(module)
    if kind in MODULES:
        return MODULES[kind]
    return kind if kind in MODULES.values() else None  # type: ignore[return-value]


def refuse_projections(other: dict[str, Any]) -> None:
    """Raise what torch raises for constructor arguments that nn.GRU and nn.RNN do not have."""
    if "proj_size" in other:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    if other:
        raise TypeError(f"__init__() got an unexpected keyword argument {next(iter(other))!r}")


def _per_layer(
    name: str, sizes: Sizes, module: str, num_layers: int, directions: int
) -> list[list[int]]:
    """Spell a size argument out: per layer, one int per direction."""
    if not isinstance(sizes, Sequence):
        return [[sizes] * directions for _ in range(num_layers)]
    if len(sizes) != num_layers:
        raise ValueError(
            f"{module}: expected {name} with one entry for each of {num_layers} layers, "
            f"got {len(sizes)}: {sizes}"
        )
    spelled = [list(s) if isinstance(s, Sequence) else [s] * directions for s in sizes]
    if any(len(layer) != directions for layer in spelled):
        wanted = "ints or (forward, backward) pairs" if directions == 2 else "ints"
        raise ValueError(f"{module}: expected {name} to hold {wanted}, got {sizes}")
    return spelled


def _shortest(sizes: list[list[int]]) -> Sizes:
    """Undo `_per_layer`: one int where all are equal, one per layer where its directions are."""
    flat = {size for layer in sizes for size in layer}
    if len(flat) == 1:
        return flat.pop()
    return [layer[0] if len(set(layer)) == 1 else tuple(layer) for layer in sizes]


class Recurrent(Shrinkable, nn.RNNBase):
    """Base of ISSLSTM, ISSGRU and ISSRNN: torch's module, with sizes by layer and direction.

    Arguments, parameters (`weight_ih_l0`, ..., gates in torch's order), initialisation, input and
    output shapes and errors are those of torch's module, and a state_dict loads either way. Beyond
    it, hidden_size (and an LSTM's proj_size) may be a list with one entry per layer: an int, or
    with bidirectional=True a (forward, backward) pair. Where its sizes differ, h_n (and an LSTM's
    c_n) is a tuple of L * D tensors [B, size], in the order of the rows of torch's; hx takes both
    forms. Where units have left (`shrink`), hx of the width before is cut to those that stayed. If
    the attribute full_width is True, which `shrink` sets for `Groups.full_width`, outputs and
    states come in that width too, with zeros in the places of the others.

    Weights are float32, float64, or bfloat16 (on a CUDA device also float16), which is summed in
    float32. Under autocast, layers with float32 weights compute in autocast's dtype where the
    device has units for it: a CUDA device, or in bfloat16 a CPU that multiplies it
    (`explain_plan`); elsewhere in the weights'. Results come in autocast's, but a GRU's on the CPU
    in that of hx where it is the wider, as torch's. On a CUDA device, products of float32 use
    TF32 where torch.backends.cuda.matmul lets torch's own, which by default it does not.

    For the gradient, each layer and direction saves what `cells.Cell` says beside its input and
    output. recompute=True, also as an attribute, saves none of it: the backward runs the layer
    forward again.

    It is an nn.RNNBase, so that code which looks for one (an initialiser) finds it, but none of
    torch's classes: torch.ao.quantization.quantize_dynamic leaves it as it is; `prepare` has
    weights in 8 bits.
    """

    mode: str  # torch's name of the cell: "LSTM", "GRU", "RNN_TANH", ...
    hidden_size: Any
    proj_size: Any
    torch_class: ClassVar[type[nn.RNNBase] | None] = None  # what it stands in for

    # nn.RNNBase keeps a second list of its weights, which here is the property `_flat_weights`.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __getstate__ = nn.Module.__getstate__
    __setstate__ = nn.Module.__setstate__
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __init__(
        self,
        input_size: int,
        hidden_size: Sizes,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Sizes = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.kept, self.full_width = None, False
        if isinstance(dropout, bool) or not 0 <= float(dropout) <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an "
                "element being zeroed"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={num_layers}",
                stacklevel=3,
            )
        flags = {"bias": bias, "batch_first": batch_first, "recompute": recompute}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        if not isinstance(input_size, int):
            raise TypeError(f"input_size should be of type int, got: {type(input_size).__name__}")
        if input_size <= 0:
            raise ValueError("input_size must be greater than zero")
        if num_layers <= 0:
            raise ValueError("num_layers must be greater than zero")
        directions = 2 if bidirectional else 1
        layers = type(self).__name__, num_layers, directions
        hidden_sizes = _per_layer("hidden_size", hidden_size, *layers)
        proj_sizes = _per_layer("proj_size", proj_size, *layers)
        for hidden, proj in zip(sum(hidden_sizes, []), sum(proj_sizes, []), strict=True):
            if not isinstance(hidden, int):
                raise TypeError(f"hidden_size should be of type int, got: {type(hidden).__name__}")
            if hidden <= 0:
                raise ValueError("hidden_size must be greater than zero")
            if not isinstance(proj, int):
                raise TypeError(f"proj_size should be of type int, got: {type(proj).__name__}")
            if proj < 0:
                raise ValueError(
                    "proj_size should be a positive integer or zero to disable projections"
                )
            # A shrunken layer may have lost all the cells that made it wider than its projection.
            if proj >= hidden and isinstance(proj_size, int) and isinstance(hidden_size, int):
                raise ValueError("proj_size has to be smaller than hidden_size")

        self.input_size = input_size
        self.hidden_size = _shortest(hidden_sizes)
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.proj_size = _shortest(proj_sizes)
        self.recompute = recompute
        # Per layer, per direction: (H, P), the sizes of the cell and of the output.
        self.sizes = [
            [(h, p or h) for h, p in zip(hs, ps, strict=True)]
            for hs, ps in zip(hidden_sizes, proj_sizes, strict=True)
        ]
        self._uniform = all(isinstance(s, int) for s in (self.hidden_size, self.proj_size))
        # The widths of each state by layer and direction, and whether these are equal.
        self._widths = list(map(list, zip(*self._state_sizes(), strict=True)))
        self._equal = [len(set(widths)) == 1 for widths in self._widths]

        self._all_weights: list[list[str]] = []
        layer_input = input_size
        for layer, layer_sizes in enumerate(self.sizes):
            for direction, (h, p) in enumerate(layer_sizes):
                projects = proj_sizes[layer][direction] > 0
                shapes = self._shapes(layer_input, h, p, projects)
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, name + suffix, parameter)
                self._all_weights.append([name + suffix for name in shapes])
            layer_input = sum(p for _, p in layer_sizes)
        self.reset_parameters()

    def _shapes(
        self, layer_input: int, h: int, p: int, projects: bool
    ) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer and direction, in torch's order."""
        rows = self.cell.gates * h
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, layer_input), "weight_hh": (rows, p),
        }  # fmt: skip
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if projects:
            shapes["weight_hr"] = (p, h)
        return shapes

    def _state_sizes(self) -> list[tuple[int, ...]]:
        return [(p, h)[: len(self.cell.states)] for h, p in sum(self.sizes, [])]

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(H), 1/sqrt(H)), in torch's order."""
        flat_sizes = sum(self.sizes, [])
        for (h, _), names in zip(flat_sizes, self._all_weights, strict=True):
            for name in names:
                nn.init.uniform_(getattr(self, name), -1 / math.sqrt(h), 1 / math.sqrt(h))

    def flatten_parameters(self) -> None:
        """Do nothing: torch's method prepares cuDNN's memory layout, which is not used here."""

    _init_flat_weights = _update_flat_weights = flatten_parameters

    @property
    def cell(self) -> Cell:
        """The row of the registry."""
        return _CELLS_BY_MODE.get(self.mode) or CELLS[self.mode.lower()]

    @property
    def _kind(self) -> str:
        """What torch calls the module in errors: LSTM, GRU, RNN."""
        return self.mode.partition("_")[0]

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        return sum(self._all_weights, [])

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Parameters by layer and direction, as nn.RNNBase.all_weights."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def extra_repr(self) -> str:
        """torch's line."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False,
            "recompute": False,
        }  # fmt: skip
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    @classmethod
    def options_of(cls, module: Any) -> dict[str, Any]:
        """Arguments by which `cls`, or torch's class, makes a module like this one of either.

        Without dropout, of which constructors warn over a single layer, recompute, device, dtype.
        """
        return {
            name: getattr(module, name)
            for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first",
                         "bidirectional")
        }  # fmt: skip

    @classmethod
    def from_torch(cls: type[_Module], module: nn.RNNBase) -> _Module:
        """One with the very parameters of torch's `module` (shared, not copied), hooks and mode."""
        from iss_kernels.accelerate import converted

        if cls.torch_class is None:
            raise TypeError(f"from_torch: expected a class that torch has, got {cls.__name__}")
        if not isinstance(module, cls.torch_class):
            raise TypeError(
                f"from_torch: expected a torch.nn.{cls.torch_class.__name__}, "
                f"got {type(module).__name__}"
            )
        return cast(_Module, converted("from_torch", module, cls, **cls.options_of(module)))

    def to_torch(self) -> nn.Module:
        """torch's module with the same parameters; a `TorchLayers` where sizes differ by layer.

        It has no `kept`: it takes hx of its present width alone.
        """
        from iss_kernels.accelerate import converted

        if self.torch_class is None:
            raise TypeError(f"to_torch: expected a module that torch has, got {self._kind}")
        if self.full_width:
            raise ValueError(
                f"to_torch: expected an {type(self).__name__} whose outputs have the width of its "
                "units, got one with full_width"
            )
        if not self._uniform:
            from iss_kernels.torch_layers import TorchLayers

            return TorchLayers(self)
        options = self.options_of(self)
        new = cast(nn.RNNBase, converted("to_torch", self, self.torch_class, **options))
        new._init_flat_weights()
        return new

    def __prepare_scriptable__(self) -> NoReturn:
        backend.refuse_script(self)

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """Apply the layers; shapes as in torch's forward.

        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: h_0, or (h_0, c_0) of an LSTM; zeros by default. lengths: B ints in 1..T, the steps that
        each row of a batch has; output is 0 past a row's length, and the final state is that of its
        last step. resets: bool in the layout of input without its last dimension, or a
        PackedSequence like it. Where True, the row's state is zero before that step, whatever came
        earlier or in hx; a reverse direction is cut at the same place, and no gradient flows
        across. mask: lengths in another form, as TorchRL gives them: bool in the layout of input
        without its last dimension, True for the steps that a row has, which come first (an
        exported program does not look whether they do).
        Returns output and the final state in the form of hx; output has the form of input with the
        sum of the last layer's P as its last dimension.

        Equivalent to torch's forward; with lengths to pack_padded_sequence(enforce_sorted=False),
        torch's forward, pad_packed_sequence; with resets to one call for each stretch of a row
        between them.
        """
        if mask is not None:
            lengths = self._lengths_of(mask, input, lengths)
        if backend.exporting_onnx():
            from iss_kernels import onnx_nodes

            return onnx_nodes.forward(self, input, hx, lengths, resets)
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths, resets)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, resets)
        if input.dim() not in (2, 3):
            raise ValueError(self._not_a_sequence(input.dim()))
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        self._check_input(x, 3)
        states = self._initial(hx, x.size(1), x, None, batched)
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        cuts = None if resets is None else self._padded_resets(resets, input)
        y, states = self._run(x, None, cuts, states)
        y = self._output(y)
        if not batched:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, self._final(states, None, batched)

    def _not_a_sequence(self, dim: int) -> str:
        return f"{self._kind}: Expected input to be 2D or 3D, got {dim}D instead"

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: States | None,
        resets: Tensor | PackedSequence | None,
        batch: Any = None,
    ) -> tuple[PackedSequence, States]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_input(data, 2)
        if batch is None:
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    f"torch.export: expected {self._kind} to get the padded input and its lengths, "
                    "got a PackedSequence, whose sizes torch.export does not follow"
                )
            batch = batch_sizes[0]
            if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                batch = int(batch)  # a number, which a trace would keep
        states = self._initial(hx, batch, data, sorted_indices, batched=True, packed=True)
        cuts = None if resets is None else self._packed_resets(resets, input)
        y, states = self._run(data, batch_sizes, cuts, states)
        packed = PackedSequence(self._output(y), batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._final(states, unsorted_indices, batched=True)

    def _lengths_of(self, mask: Any, input: Tensor | PackedSequence, lengths: Any) -> Tensor:
        """int64 [B], the steps that each row of a mask has."""
        if lengths is not None:
            raise ValueError(f"{self._kind}: expected lengths or mask, got both")
        shape = None if isinstance(input, PackedSequence) else input.shape[:-1]
        expected = "bool, in the layout of an input of rows [T, B, I] or [B, T, I]"
        if not isinstance(mask, Tensor):
            raise TypeError(f"{self._kind}: expected mask {expected}, got a {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != shape or mask.is_meta:
            got = f"{list(mask.shape)} of {mask.dtype}" + " on meta" * mask.is_meta
            raise ValueError(f"{self._kind}: expected mask {expected}, got {got}")
        steps = mask if self.batch_first else mask.t()
        if not backend.exporting():
            wrong = ""
            if bool((steps[:, 1:] & ~steps[:, :-1]).any()):
                wrong = "one with gaps"
            elif steps.numel() > 0 and not bool(steps[:, 0].all()):
                wrong = "one with a row of no steps"
            if wrong:
                raise ValueError(
                    f"{self._kind}: expected mask to be True for the first steps of each row, got "
                    + wrong
                )
        return steps.sum(1)

    def _forward_lengths(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | Sequence[int],
        resets: Tensor | PackedSequence | None,
    ) -> tuple[Tensor, States]:
        """Forward of a padded batch: the rows that have ended take no part in a step."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            form = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D"
            raise ValueError(
                f"{self._kind}: expected input of shape [T, B, I] or [B, T, I] with lengths, "
                f"got {form}"
            )
        steps, batch = input.shape[:2][:: -1 if self.batch_first else 1]
        counts = lengths
        if not isinstance(counts, Tensor):
            try:
                counts = torch.as_tensor(lengths, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                got = f"a {type(lengths).__name__} of other things"
                raise ValueError(
                    f"{self._kind}: expected lengths to be B = {batch} ints, got {got}"
                ) from None
        whole = not (
            counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool
        )
        none = batch == counts.numel() == 0  # [] is of floats
        if counts.is_meta or not (whole or none) or counts.shape != (batch,):
            raise ValueError(
                f"{self._kind}: expected lengths to be B = {batch} ints, "
                f"got {tuple(counts.shape)} of {counts.dtype}" + " on meta" * counts.is_meta
            )
        if none:
            return cast(tuple[Tensor, States], self.forward(input, hx, resets=resets))
        counts = counts.to("cpu", torch.int64)
        padded = None if resets is None else self._padded_resets(resets, input)
        if torch.compiler.is_exporting():
            return self._exported_lengths(input, counts, hx, padded)
        wrong = counts[(counts < 1) | (counts > steps)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{self._kind}: expected lengths from 1 to T = {steps}, got {int(wrong[0])}"
            )
        if ops.is_transformed():  # torch.func does not see into _pack_padded_sequence
            return self._exported_lengths(input, counts, hx, padded)
        packed = pack_padded_sequence(input, counts, self.batch_first, enforce_sorted=False)
        cuts: PackedSequence | None = None
        if padded is not None:
            cuts = packed._replace(
                data=pack_padded_sequence(padded, counts, enforce_sorted=False).data
            )
        packed_y, states = self._forward_packed(packed, hx, cuts)
        y, _ = pad_packed_sequence(packed_y, self.batch_first, total_length=steps)
        return y, states

    def _exported_lengths(
        self, input: Tensor, counts: Tensor, hx: States | None, resets: Tensor | None
    ) -> tuple[Tensor, States]:
        """`_forward_lengths` by operations that torch.export and torch.func follow; resets: [T, B].

        The program checks that no row is longer than T, and the op that none is empty.
        """
        x = input.transpose(0, 1) if self.batch_first else input
        steps, batch = x.shape[:2]
        order = counts.argsort(descending=True)
        running = torch.arange(steps, device="cpu")[:, None] < counts[order]
        longest = counts.max().item()
        torch._check(longest >= 1)  # type: ignore[no-untyped-call]
        torch._check(longest <= steps)  # type: ignore[no-untyped-call]
        batch_sizes, back = running.sum(1)[:longest], order.argsort().to(x.device)
        order, running = order.to(x.device), running.to(x.device)

        def packed(t: Tensor) -> PackedSequence:
            return PackedSequence(t.index_select(1, order)[running], batch_sizes, order, back)

        cuts = None if resets is None else packed(resets)
        packed_y, states = self._forward_packed(packed(x), hx, cuts, batch)
        y = packed_y.data
        y = y.new_zeros(steps, batch, y.shape[-1]).masked_scatter(running.unsqueeze(-1), y)
        y = y.index_select(1, back)
        return (y.transpose(0, 1) if self.batch_first else y), states

    def _padded_resets(self, resets: Tensor | PackedSequence, input: Tensor) -> Tensor:
        """[T, B], from the layout of the input."""
        letters = "T" if input.dim() == 2 else "B, T" if self.batch_first else "T, B"
        mask = self._checked_resets(resets, input, letters)
        if input.dim() == 2:
            return mask.unsqueeze(1)
        return mask.transpose(0, 1) if self.batch_first else mask

    def _packed_resets(self, resets: Tensor | PackedSequence, input: PackedSequence) -> Tensor:
        """[N], from a PackedSequence whose rows are those of the input."""
        if not isinstance(resets, PackedSequence):
            raise ValueError(
                f"{self._kind}: expected resets to be a PackedSequence like the input, "
                f"got a {type(resets).__name__}"
            )
        for name in ("batch_sizes", "sorted_indices"):
            got, expected = getattr(resets, name), getattr(input, name)
            if got is expected:
                continue
            if got is None or expected is None or not torch.equal(got, expected):
                lists = [None if t is None else t.tolist() for t in (expected, got)]
                raise ValueError(
                    f"{self._kind}: expected resets with the {name} of the input, {lists[0]}, "
                    f"got {lists[1]}"
                )
        return self._checked_resets(resets.data, input.data, "N")

    def _checked_resets(
        self, resets: Tensor | PackedSequence, like: Tensor, letters: str
    ) -> Tensor:
        """A mask of the shape, but for its last dimension, and on the device of `like`."""
        shape = like.shape[:-1]
        if not isinstance(resets, Tensor):
            got = f"a {type(resets).__name__}"
        elif resets.dtype != torch.bool:
            got = str(resets.dtype).removeprefix("torch.")
        elif resets.shape != shape:
            got = str(list(resets.shape))
        elif resets.device != like.device:
            got = f"one on {resets.device}"
        else:
            return resets
        raise ValueError(
            f"{self._kind}: expected resets to be a bool tensor [{letters}] = {list(shape)} on "
            f"{like.device}, got {got}"
        )

    def _run(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        states: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """All layers. resets: [T, B] or [N]; states: (h [B, P]) or (h, c [B, H]) for each layer
        and direction."""
        kind = x.device.type
        if _autocast_enabled(kind):
            dtype, autocast = self._dtype(), torch.get_autocast_dtype(kind)
            on_cuda, cast_to = backend.on_cuda(x.device), autocast
            if dtype == torch.float64:  # which no autocast converts
                cast_to = dtype
            elif not on_cuda:
                packed = batch_sizes is not None
                cast_to = self._autocast_result(autocast, states[0][0].dtype, packed)
            fast = on_cuda or (autocast == torch.bfloat16 and backend.multiplies_bfloat16())
            if dtype == torch.float32 and fast:
                dtype = autocast
            with torch.autocast(kind, enabled=False):
                states = [tuple(s.to(dtype) for s in state) for state in states]
                y, states = self._run(x.to(dtype), batch_sizes, resets, states)
            return y.to(cast_to), [tuple(s.to(cast_to) for s in state) for state in states]
        x, masks = self._dropped(x, batch_sizes, states)
        cell, directions = self.cell.name, len(self.sizes[0])
        final: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = dropout(x, self.dropout)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                h0, c0 = states[index] if len(states[index]) == 2 else (states[index][0], None)
                w_ih, w_hh, b_ih, b_hh, w_hr = self._parameters_of(index, x.dtype)
                y, h, c = ops.recurrent(
                    cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks,
                    direction == 1, self.recompute,
                )  # fmt: skip
                outputs.append(y)
                final.append((h,) if c is None else (h, c))
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return x, final

    def _autocast_result(
        self, autocast: torch.dtype, state: torch.dtype, packed: bool
    ) -> torch.dtype:
        """The dtype of torch's results under CPU autocast, where hx is of dtype `state`."""
        return autocast

    def _dropped(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        """x, of which a cell may drop a part, and the `masks` that it gives to ops.recurrent."""
        return x, None

    def _parameters_of(
        self, index: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh, w_hr of one layer and direction, in the dtype to compute in."""
        names = self._all_weights[index]
        w = [self._weight(name, dtype) for name in names]
        w_hr = w.pop() if names[-1].startswith("weight_hr") else None
        b_ih, b_hh = (None, None, *w[2:])[-2:]  # a deep cell has b_hh alone
        return w[0], w[1], b_ih, b_hh, w_hr

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as the ops take it."""
        parameter = self._parameter(name)
        return parameter if parameter.dtype == dtype else parameter.to(dtype)

    def _parameter(self, name: str) -> Tensor:
        """A parameter, or what a parametrisation has put in its place."""
        own = self._parameters.get(name)  # nn.Module's own lookup takes 0.4 us
        return own if own is not None else cast(Tensor, getattr(self, name))

    def _dtype(self) -> torch.dtype:
        return self._parameter("weight_ih_l0").dtype

    def _check_input(self, x: Tensor, dim: int) -> None:
        dtype = self._dtype()
        if x.dtype != dtype and not _autocast_enabled(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). Convert "
                f"input: input.to({dtype}), or convert model: model.to({x.dtype})"
            )
        if x.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {x.dim()}")
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {x.size(-1)}"
            )

    def _initial(
        self,
        hx: States | None,
        batch: int,
        x: Tensor,
        permutation: Tensor | None,
        batched: bool,
        packed: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """hx, checked and taken apart: (h [B, P],) or (h, c [B, H]) by layer and direction."""
        sizes = sum(self.sizes, [])
        count = len(self.cell.states)
        if hx is None:
            zeros = {size: x.new_zeros(batch, size) for size in {s for pair in sizes for s in pair}}
            return [(zeros[p], zeros[h])[:count] for h, p in sizes]
        given: Any = [hx]
        if count > 1:
            if not hasattr(hx, "__len__") or len(hx) != count:
                raise RuntimeError(f"{self.cell.name} expects two hidden states")
            given = hx
        parts = [self._rows(given, which, batch, batched, packed) for which in range(count)]
        if permutation is not None:
            parts = [[s.index_select(0, permutation) for s in part] for part in parts]
        return list(zip(*parts, strict=True))

    def _rows(
        self, given: Any, which: int, batch: int, batched: bool, packed: bool
    ) -> Sequence[Tensor]:
        """One state of hx by layer and direction, [B, size], without the units that have left."""
        state, widths = given[which], self._widths[which]
        rows: Sequence[Tensor] = ()
        dim = 3 if batched else 2
        if isinstance(state, Tensor):
            if state.dim() == dim:
                state = state if batched else state.unsqueeze(1)
                rows = state.unbind(0)
                if self._equal[which] and state.shape == (len(widths), batch, widths[0]):
                    return rows
        elif _are_rows(state, dim - 1):
            rows = state if batched else [s.unsqueeze(0) for s in state]
        if len(rows) == len(widths):
            if self.kept is not None:
                rows = [self._cut(row, index, which) for index, row in enumerate(rows)]
            if all(row.shape == (batch, w) for row, w in zip(rows, widths, strict=True)):
                return rows
        raise self._misfit(given, which, batch, batched, packed)

    def _misfit(self, given: Any, which: int, batch: int, batched: bool, packed: bool) -> Exception:
        """The error for a state that `_rows` cannot take: torch's, where it has one."""
        state, name = given[which], f"hidden[{which}]" if len(given) > 1 else "hidden"
        is_tensor, dim = isinstance(state, Tensor), 3 if batched else 2
        if self._equal[which]:
            fits = state.dim() == dim or packed if is_tensor else _are_rows(state, dim - 1)
            if len(given) == 1 and not (is_tensor or fits):
                got = type(state).__name__
                return TypeError(f"{self._kind}: expected hx to be a tensor h_0, got a {got}")
            if not fits:  # any tensor does where the input is packed, as for torch
                return RuntimeError(_wrong_dimensions(given, batched))
        expected = _form(self._widths[which], batch, batched)
        if self.kept is not None:
            before = _form([k[which].before for k in self.kept], batch, batched)
            expected += f", or, from before shrinking, {before}"
        if is_tensor:
            state = state.unsqueeze(1) if state.dim() == dim and not batched else state
            got = str(list(state.shape))
            got = got if self._equal[which] else f"a tensor of size {got}"
        elif isinstance(state, (tuple, list)):
            shapes = (tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in state)
            got = str(list(shapes))
        else:
            got = type(state).__name__
        return RuntimeError(f"Expected {name} {expected}, got {got}")

    def _output(self, y: Tensor) -> Tensor:
        """y of the last layer as the module returns it."""
        if self.kept is None or not self.full_width:
            return y
        sizes = [p for _, p in self.sizes[-1]]
        first = len(self.kept) - len(sizes)
        rows = enumerate(torch.split(y, sizes, -1))
        parts = [self._widened(part, first + i, 0) for i, part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _final(
        self, states: list[tuple[Tensor, ...]], permutation: Tensor | None, batched: bool
    ) -> States:
        """Put the states together again, in the form that hx takes."""
        parts: list[State] = []
        for which, part in enumerate(zip(*states, strict=True)):
            rows: Sequence[Tensor] = part
            equal = self._equal[which]  # and not by the rows, whose sizes a trace makes tensors of
            if self.full_width and self.kept is not None:
                rows = [self._widened(row, index, which) for index, row in enumerate(part)]
                equal = len({kept[which].before for kept in self.kept}) == 1
            if permutation is not None:
                rows = [s.index_select(0, permutation) for s in rows]
            if not batched:
                rows = [s.squeeze(0) for s in rows]
            parts.append(stacked(rows) if equal else tuple(rows))
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _form(widths: list[int], batch: int, batched: bool) -> str:
    """The size of a state of these widths, as error messages write it."""
    if len(set(widths)) == 1:
        return f"size {(len(widths), batch, widths[0])}"
    sizes = [(batch, width) if batched else (width,) for width in widths]
    return f"to be a tuple of {len(widths)} tensors of sizes {sizes}"


def _are_rows(state: Any, dim: int) -> bool:
    """Whether a state is given as tensors of so many dimensions, one by one."""
    rows = isinstance(state, (tuple, list))
    return rows and all(isinstance(s, Tensor) and s.dim() == dim for s in state)


def _wrong_dimensions(states: Sequence[Any], batched: bool) -> str:
    """torch's message for states that do not have the dimensions of the input."""
    form, dim = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
    dims = [f"{s.dim()}-D" if isinstance(s, Tensor) else type(s).__name__ for s in states]
    if len(dims) == 1:
        return f"For {form} input, hx should also be {dim}-D but got {dims[0]} tensor"
    return f"For {form} input, hx and cx should also be {dim}-D but got ({', '.join(dims)}) tensors"


def _autocast_enabled(device_type: str) -> bool:
    # Not by torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
