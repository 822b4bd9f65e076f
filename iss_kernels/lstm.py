# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM: torch.nn.LSTM over this package's kernels, with a size per layer and direction.

Same constructor, parameters, state_dict, inputs, outputs and errors as nn.LSTM; one call of
ops.lstm per layer and direction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from iss_kernels import backend, ops

# One int for all layers; or per layer an int, or a (forward, backward) pair.
Sizes: TypeAlias = int | Sequence[int | Sequence[int]]
# [layers * D, B, size] where all sizes are equal; else per layer [D, B, size] or D times [B, size].
State: TypeAlias = Tensor | tuple[Any, ...]


def _per_layer(name: str, sizes: Sizes, num_layers: int, directions: int) -> list[list[int]]:
    """Spell a size argument out: per layer, one int per direction."""
    if not isinstance(sizes, Sequence):
        return [[sizes] * directions for _ in range(num_layers)]
    if len(sizes) != num_layers:
        raise ValueError(
            f"ISSLSTM: expected {name} with one entry for each of {num_layers} layers, "
            f"got {len(sizes)}: {sizes}"
        )
    spelled = [list(s) if isinstance(s, Sequence) else [s] * directions for s in sizes]
    if any(len(layer) != directions for layer in spelled):
        wanted = "ints or (forward, backward) pairs" if directions == 2 else "ints"
        raise ValueError(f"ISSLSTM: expected {name} to hold {wanted}, got {sizes}")
    return spelled


def _shortest(sizes: list[list[int]]) -> Sizes:
    """Undo `_per_layer`: one int where all are equal, one per layer where its directions are."""
    flat = {size for layer in sizes for size in layer}
    if len(flat) == 1:
        return flat.pop()
    return [layer[0] if len(set(layer)) == 1 else tuple(layer) for layer in sizes]


class ISSLSTM(nn.Module):
    """Drop-in for torch.nn.LSTM whose hidden size may differ by layer and direction.

    Arguments, parameters (`weight_ih_l0`, ..., gates in the order i, f, g, o), initialisation,
    input and output shapes are those of torch.nn.LSTM, and a state_dict loads either way. Beyond
    it, hidden_size (and proj_size) may be a list with one entry per layer: an int, or with
    bidirectional=True a (forward, backward) pair. Where sizes differ, h_n and c_n are tuples with
    one tensor [D, B, size] per layer (where a layer's directions differ, a tuple of D tensors
    [B, size]), and hx takes the same form.

    Weights are float32, float64, or bfloat16 (on a CUDA device also float16), which is summed in
    float32. Under autocast the results come in autocast's dtype; the layers compute in the weights'
    dtype, but on a CUDA device with float32 weights in autocast's, as nn.LSTM. There, products of
    float32 use TF32 where torch.backends.cuda.matmul lets torch's own, which by default it does
    not. Raises what nn.LSTM raises for the same mistakes.

    For the gradient, each layer and direction saves 5 H elements per step and row (gates and cells;
    4 bytes each, 8 in float64) beside its input and output. recompute=True, also as an attribute,
    saves none of them: the backward runs the layer forward again.
    """

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
        super().__init__()
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
                stacklevel=2,
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
        hidden_sizes = _per_layer("hidden_size", hidden_size, num_layers, directions)
        proj_sizes = _per_layer("proj_size", proj_size, num_layers, directions)
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
        self._projected = any(any(ps) for ps in proj_sizes)
        self._uniform = all(isinstance(s, int) for s in (self.hidden_size, self.proj_size))

        self._all_weights: list[list[str]] = []
        layer_input = input_size
        for layer, layer_sizes in enumerate(self.sizes):
            for direction, (h, p) in enumerate(layer_sizes):
                shapes = {"weight_ih": (4 * h, layer_input), "weight_hh": (4 * h, p)}
                if bias:
                    shapes |= {"bias_ih": (4 * h,), "bias_hh": (4 * h,)}  # type: ignore[dict-item]
                if proj_sizes[layer][direction]:
                    shapes["weight_hr"] = (p, h)
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, name + suffix, parameter)
                self._all_weights.append([name + suffix for name in shapes])
            layer_input = sum(p for _, p in layer_sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(H), 1/sqrt(H)), in nn.LSTM's order."""
        flat_sizes = sum(self.sizes, [])
        for (h, _), names in zip(flat_sizes, self._all_weights, strict=True):
            for name in names:
                nn.init.uniform_(getattr(self, name), -1 / math.sqrt(h), 1 / math.sqrt(h))

    def flatten_parameters(self) -> None:
        """Do nothing: nn.LSTM's method prepares cuDNN's memory layout, which is not used here."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Parameters by layer and direction, as nn.LSTM.all_weights."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def extra_repr(self) -> str:
        """nn.LSTM's line."""
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
    def from_torch(cls, lstm: nn.LSTM) -> ISSLSTM:
        """An ISSLSTM with the very parameters of `lstm` (shared, not copied), hooks and mode."""
        if not isinstance(lstm, nn.LSTM):
            raise TypeError(f"from_torch: expected a torch.nn.LSTM, got {type(lstm).__name__}")
        return cast(ISSLSTM, _converted(lstm, cls))

    def to_torch(self) -> nn.LSTM:
        """A torch.nn.LSTM that shares the parameters; ValueError where sizes differ by layer."""
        if not self._uniform:
            raise ValueError(
                f"to_torch: expected equal sizes in all layers, all that nn.LSTM can hold, "
                f"got hidden_size={self.hidden_size}, proj_size={self.proj_size}"
            )
        new = cast(nn.LSTM, _converted(self, nn.LSTM))
        new._init_flat_weights()
        return new

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[State, State] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[State, State]]:
        """Apply the layers; shapes as torch.nn.LSTM.forward.

        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: (h_0, c_0), zeros by default. lengths: B ints in 1..T, the steps that each row of a
        batch has; output is 0 past a row's length, and h_n, c_n are those of its last step.
        Returns output, (h_n, c_n); output has the form of input with the sum of the last layer's P
        as its last dimension. Equivalent to nn.LSTM.forward, and with lengths to
        pack_padded_sequence(enforce_sorted=False), nn.LSTM.forward, pad_packed_sequence.
        """
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths)
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            self._check_input(data, 2)
            batch = int(batch_sizes[0])
            states = self._initial(hx, batch, data, sorted_indices, batched=True)
            y, states = self._run(data, batch_sizes, states)
            packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self._final(states, unsorted_indices, batched=True)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        self._check_input(x, 3)
        states = self._initial(hx, x.size(1), x, None, batched)
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, states = self._run(x, None, states)
        if not batched:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, self._final(states, None, batched)

    def _forward_lengths(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[State, State] | None,
        lengths: Tensor | Sequence[int],
    ) -> tuple[Tensor, tuple[State, State]]:
        """Forward of a padded batch: the rows that have ended take no part in a step."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            form = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D"
            raise ValueError(
                f"LSTM: expected input of shape [T, B, I] or [B, T, I] with lengths, got {form}"
            )
        steps, batch = input.shape[:2][:: -1 if self.batch_first else 1]
        counts = torch.as_tensor(lengths)
        whole = not (
            counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool
        )
        if not whole or counts.shape != (batch,):
            raise ValueError(
                f"LSTM: expected lengths to be B = {batch} ints, got {tuple(counts.shape)} of "
                f"{counts.dtype}"
            )
        counts = counts.to("cpu", torch.int64)
        wrong = counts[(counts < 1) | (counts > steps)]
        if wrong.numel() > 0:
            raise ValueError(f"LSTM: expected lengths from 1 to T = {steps}, got {int(wrong[0])}")
        packed = pack_padded_sequence(input, counts, self.batch_first, enforce_sorted=False)
        packed_y, states = self.forward(packed, hx)
        y, _ = pad_packed_sequence(
            cast(PackedSequence, packed_y), self.batch_first, total_length=steps
        )
        return y, states

    def _run(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All layers; states: (h [B, P], c [B, H]) by layer and direction."""
        kind = x.device.type
        if _autocast_enabled(kind):
            dtype, cast_to = self._dtype(), torch.get_autocast_dtype(kind)
            if backend.on_cuda(x.device) and dtype == torch.float32:
                dtype = cast_to  # where there are tensor cores for it
            with torch.autocast(kind, enabled=False):
                states = [(h.to(dtype), c.to(dtype)) for h, c in states]
                y, states = self._run(x.to(dtype), batch_sizes, states)
            return y.to(cast_to), [(h.to(cast_to), c.to(cast_to)) for h, c in states]
        directions = len(self.sizes[0])
        final = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = dropout(x, self.dropout)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                h0, c0 = states[index]
                w_ih, w_hh, b_ih, b_hh, w_hr = self._parameters_of(index, x.dtype)
                y, h, c = ops.lstm(
                    x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, direction == 1,
                    self.recompute,
                )  # fmt: skip
                outputs.append(y)
                final.append((h, c))
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return x, final

    def _parameters_of(
        self, index: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh, w_hr of one layer and direction, in the dtype to compute in."""
        names = self._all_weights[index]
        w = [self._weight(name, dtype) for name in names]
        w_hr = w.pop() if names[-1].startswith("weight_hr") else None
        b_ih, b_hh = w[2:] if self.bias else (None, None)
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
        hx: tuple[State, State] | None,
        batch: int,
        x: Tensor,
        permutation: Tensor | None,
        batched: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """hx, checked and taken apart: (h [B, P], c [B, H]) by layer and direction."""
        sizes = sum(self.sizes, [])
        if hx is None:
            zeros = {size: x.new_zeros(batch, size) for size in {s for pair in sizes for s in pair}}
            return [(zeros[p], zeros[h]) for h, p in sizes]
        parts = [
            self._taken_apart(state, [size[1 - which] for size in sizes], batch, which, batched, hx)
            for which, state in enumerate(hx)
        ]
        if permutation is not None:
            parts = [[s.index_select(0, permutation) for s in part] for part in parts]
        return list(zip(*parts, strict=True))

    def _taken_apart(
        self,
        state: State,
        sizes: list[int],
        batch: int,
        which: int,
        batched: bool,
        hx: tuple[State, State],
    ) -> list[Tensor]:
        """h_0 (which = 0) or c_0 (which = 1) as a list of [B, size] by layer and direction."""
        if self._uniform:
            if isinstance(state, Tensor) and state.dim() == (3 if batched else 2):
                state = state if batched else state.unsqueeze(1)
                expected = (len(sizes), batch, sizes[0])
                if state.shape != expected:
                    raise RuntimeError(
                        f"Expected hidden[{which}] size {expected}, got {list(state.shape)}"
                    )
                return list(state.unbind(0))
            dims = ", ".join(
                f"{s.dim()}-D" if isinstance(s, Tensor) else type(s).__name__ for s in hx
            )
            raise RuntimeError(
                f"For batched 3-D input, hx and cx should also be 3-D but got ({dims}) tensors"
                if batched
                else "For unbatched 2-D input, hx and cx should also be 2-D but got "
                f"({dims}) tensors"
            )
        flat: list[Tensor] = []
        if not isinstance(state, Tensor) and len(state) == self.num_layers:
            for layer in state:
                flat += layer.unbind(0) if isinstance(layer, Tensor) else layer
        if not batched:
            flat = [s.unsqueeze(0) for s in flat]
        expected_shapes = [(batch, size) for size in sizes]
        shapes = [tuple(s.shape) for s in flat]
        if shapes != expected_shapes:
            if isinstance(state, Tensor):
                got = f"a tensor of size {list(state.shape)}"
            else:
                got = str(shapes) if shapes else f"{len(state)} entries"
            raise RuntimeError(
                f"Expected hidden[{which}] to be a tuple of {self.num_layers} layers with "
                f"{len(self.sizes[0])} states of sizes {expected_shapes}, got {got}"
            )
        return flat

    def _final(
        self, states: list[tuple[Tensor, Tensor]], permutation: Tensor | None, batched: bool
    ) -> tuple[State, State]:
        """Put the states together again, in the form that hx takes."""
        if permutation is not None:
            states = [
                (h.index_select(0, permutation), c.index_select(0, permutation)) for h, c in states
            ]
        if not batched:
            states = [(h.squeeze(0), c.squeeze(0)) for h, c in states]
        h_n, c_n = ([state[which] for state in states] for which in (0, 1))
        if self._uniform:
            return _stacked(h_n), _stacked(c_n)
        return self._by_layer(h_n), self._by_layer(c_n)

    def _by_layer(self, states: list[Tensor]) -> tuple[State, ...]:
        directions = len(self.sizes[0])
        layers = []
        for layer in range(self.num_layers):
            of_layer = states[layer * directions : (layer + 1) * directions]
            same = len({s.shape for s in of_layer}) == 1
            layers.append(_stacked(of_layer) if same else tuple(of_layer))
        return tuple(layers)


def _stacked(states: list[Tensor]) -> Tensor:
    """torch.stack, which would copy a single one."""
    return torch.stack(states) if len(states) > 1 else states[0].unsqueeze(0)


def _autocast_enabled(device_type: str) -> bool:
    # Not by torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def take_over(new: nn.Module, old: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Give a new LSTM these parameters, and the dropout, recompute, hooks and mode of `old`.

    dropout is set here, since the constructor warns of it over a single layer.
    """
    new.dropout = old.dropout
    if isinstance(new, ISSLSTM):
        new.recompute = getattr(old, "recompute", False)
    for name, value in old.__dict__.items():
        if name.endswith("_hooks"):
            setattr(new, name, value)
    for name, parameter in parameters.items():
        setattr(new, name, parameter)
    return new.train(old.training)


def _converted(old: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An LSTM of class `cls` that takes over the parameters, hooks and mode of `old`."""
    options = {
        name: getattr(old, name)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first",
                     "bidirectional", "proj_size")
    }  # fmt: skip
    new = take_over(cls(**options, device="meta"), old, dict(old.named_parameters(recurse=False)))
    missing = [name for name, parameter in new.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"from_torch: expected an LSTM with its own parameters, but {missing[0]} is not one "
            "(a parametrisation such as weight_norm?); remove it first"
        )
    return new


def accelerate(model: nn.Module) -> nn.Module:
    """Replace every torch.nn.LSTM in `model`, in place, by an ISSLSTM; state_dict stays as it is.

    Returns the model (the new module, where the model is itself an LSTM). Parameters are shared
    with the old modules, so an optimizer goes on working. Subclasses of nn.LSTM are left alone.
    """
    new = {m: ISSLSTM.from_torch(m) for m in model.modules() if type(m) is nn.LSTM}
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children() skips what it has seen
            if type(child) is nn.LSTM:
                setattr(module, name, new[child])
    return new[model] if type(model) is nn.LSTM else model
