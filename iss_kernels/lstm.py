# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM: torch.nn.LSTM over this package's kernels, with a size per layer and direction.

Same constructor, parameters, state_dict, inputs, outputs and errors as nn.LSTM; one call of
ops.recurrent per layer and direction.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.parametrize import is_parametrized
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


class ISSLSTM(nn.RNNBase):
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

    It is an nn.RNNBase, so that code which looks for one (an initialiser) finds it, but no nn.LSTM:
    torch.ao.quantization.quantize_dynamic leaves it as it is; `prepare` has weights in 8 bits.
    """

    mode = "LSTM"
    hidden_size: Any
    proj_size: Any

    # nn.RNNBase keeps a second list of its weights, which here is the property `_flat_weights`.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __getstate__ = nn.Module.__getstate__
    __setstate__ = nn.Module.__setstate__
    _apply = nn.Module._apply
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

    _init_flat_weights = _update_flat_weights = flatten_parameters

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        return sum(self._all_weights, [])

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]
        return [getattr(self, name, None) for name in self._flat_weights_names]

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
        counts = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
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
                y, h, c = ops.recurrent(
                    "lstm", x, batch_sizes, None, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                    direction == 1, self.recompute,
                )  # fmt: skip
                outputs.append(y)
                final.append((h, cast(Tensor, c)))
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
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
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
            same = len({s.size(-1) for s in of_layer}) == 1  # B may be symbolic, with no hash
            layers.append(_stacked(of_layer) if same else tuple(of_layer))
        return tuple(layers)


def _stacked(states: list[Tensor]) -> Tensor:
    """torch.stack, which would copy a single one."""
    return torch.stack(states) if len(states) > 1 else states[0].unsqueeze(0)


def _autocast_enabled(device_type: str) -> bool:
    # Not by torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def take_over(new: nn.Module, old: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Give a new LSTM these parameters, by name, and all else that `old` has.

    dropout and recompute, mode, hooks, buffers, submodules and attributes. Raises ValueError for
    what cannot come along: see `check_plain`.
    """
    check_plain(old, "ISSLSTM", "the LSTM")
    lstm, source = vars(new), vars(old)
    new.dropout = old.dropout  # not by the constructor, which warns of it over a single layer
    if isinstance(new, ISSLSTM):
        new.recompute = getattr(old, "recompute", False)
    missing = [name for name in new._parameters if parameters.get(name) is None]
    if missing:
        raise ValueError(f"ISSLSTM: expected a parameter for {missing[0]}, got none")
    new._parameters.clear()
    new._parameters.update(parameters)
    new._modules.update(old._modules)
    new._buffers.update(old._buffers)
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
    for name in HOOK_TABLES:
        lstm[name] = copy.copy(source[name])
    load_hooks: dict[int, Any] = lstm["_load_state_dict_pre_hooks"]
    for key, hook in load_hooks.items():
        if hook.with_module:  # it passes on the module that it was registered with
            load_hooks[key] = type(hook)(hook.hook, new)
    lstm.update({name: source[name] for name in added(old)})
    new.training = old.training
    return new


HOOK_TABLES = [name for name in vars(nn.Module()) if "hook" in name]


@functools.cache
def _fresh() -> dict[type[nn.Module], nn.Module]:
    """An LSTM of either class, as its constructor leaves it."""
    return {cls: cls(1, 2, device="meta") for cls in (nn.LSTM, ISSLSTM)}


def added(lstm: Any) -> list[str]:
    """Names of the attributes that a user has put on an LSTM."""
    return [name for name in vars(lstm) if name not in vars(_fresh()[type(lstm)])]


def check_plain(lstm: Any, function: str, name: str) -> None:
    """Refuse an LSTM that does something that another module in its place would not do."""
    if is_parametrized(lstm):
        weight, makers = next(iter(lstm.parametrizations.items()))
        raise ValueError(
            f"{function}: expected {name} with its own parameters, got {weight} computed by "
            f"{type(makers[0]).__name__}; remove that parametrization first, or add it afterwards"
        )
    if type(lstm) not in (nn.LSTM, ISSLSTM):
        raise ValueError(
            f"{function}: expected {name} to be an nn.LSTM or ISSLSTM itself, got a "
            f"{type(lstm).__name__}, whose own methods would be lost"
        )
    for weight, used in zip(lstm._flat_weights_names, lstm._flat_weights, strict=True):
        own = lstm._parameters.get(weight)
        # nn.LSTM looks for new parameters in forward; other tensors that it has were put there.
        if own is None or (own is not used and not lstm._weights_have_changed()):
            by = [
                type(hook).__name__
                for hook in lstm._forward_pre_hooks.values()
                if weight in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
            ]
            raise ValueError(
                f"{function}: expected {name} with its own parameters, got {weight} computed by "
                f"{by[0] if by else 'other code'}; remove that first, or add it afterwards"
            )
    for attribute in added(lstm):
        taken = any(hasattr(other, attribute) for other in _fresh().values())
        if taken and attribute != "flatten_parameters":  # which some replace by a no-op
            raise ValueError(
                f"{function}: expected {name} without an attribute {attribute!r} of its own, which "
                f"a new LSTM cannot take over, got {type(vars(lstm)[attribute]).__name__}"
            )


def _converted(old: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An LSTM of class `cls` that takes over the parameters of `old` and all else it has."""
    options = {
        name: getattr(old, name)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first",
                     "bidirectional", "proj_size")
    }  # fmt: skip
    check_plain(old, "from_torch" if issubclass(cls, ISSLSTM) else "to_torch", "the LSTM")
    parameters = cast(dict[str, nn.Parameter], old._parameters)
    return take_over(cls(**options, device="meta"), old, parameters)


# -------------------------------------------------------------------------------------------------
# accelerate


_CONTAINERS = (list, deque, dict, set, tuple, frozenset)
_REFERENCES = (MethodType, functools.partial, weakref.ref)  # cannot be given another module


def _contents(holder: Any) -> Iterable[tuple[Any, Any]]:
    """What a module, a container or a reference holds, each with a name."""
    if isinstance(holder, torch.jit.ScriptModule):
        return ()
    if isinstance(holder, nn.Module):
        return [*holder._modules.items(), *vars(holder).items()]
    if isinstance(holder, dict):
        return holder.items()
    if isinstance(holder, MethodType):
        return [("__self__", holder.__self__)]
    if isinstance(holder, functools.partial):
        return [("func", holder.func), *enumerate(holder.args), *holder.keywords.items()]
    if isinstance(holder, weakref.ref):
        return [("()", holder())]
    return enumerate(holder)


def _holdings(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """All that `model` and what is in reach of it holds: path, holder, what is held."""
    seen, queue = {id(model)}, deque([("", cast(Any, model))])
    while queue:
        path, holder = queue.popleft()
        for name, held in _contents(holder):
            if issubclass(type(held), (nn.Module, *_CONTAINERS, *_REFERENCES)):  # not a proxy
                inner = path if name == "_modules" else f"{path}.{name}" if path else str(name)
                yield inner, holder, held
                inside = not isinstance(holder, _REFERENCES) or not isinstance(held, nn.Module)
                if inside and id(held) not in seen:
                    seen.add(id(held))
                    queue.append((inner, held))


def _replaced(value: Any, new: Mapping[nn.Module, Any]) -> Any:
    """The new module for an old one, also in tuples and frozen sets."""
    if type(value) is nn.LSTM:
        return new.get(value, value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_replaced(part, new) for part in value]
        if not all(map(operator.is_, parts, value)):
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def _replace_in(holder: Any, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones in a module, list, dict or set."""
    if isinstance(holder, nn.Module):
        holder = vars(holder)
    if isinstance(holder, set):
        for held in [held for held in holder if _replaced(held, new) is not held]:
            holder.remove(held)
            holder.add(_replaced(held, new))
    elif isinstance(holder, (dict, list, deque)):
        for key, held in list(_contents(holder)):
            if (replacement := _replaced(held, new)) is not held:
                holder[key] = replacement


def accelerate(model: nn.Module) -> nn.Module:
    """Replace every torch.nn.LSTM in `model`, in place, by an ISSLSTM; state_dict stays as it is.

    Returns the model (the new module, where the model is itself an LSTM). Parameters are shared
    with the old modules, so an optimizer goes on working; hooks, buffers, submodules and attributes
    come along. Found are also LSTMs that modules hold in plain attributes, lists, dicts, sets and
    tuples. Subclasses of nn.LSTM, and scripted modules, are left alone.

    Raises ValueError, and changes nothing, where something cannot come along: a forward or another
    method that was set on an LSTM (torch.compile does), a weight that is computed (weight_norm,
    pruning, a parametrization), and an LSTM inside a bound method, functools.partial, weak
    reference or key of a dict that a module holds.
    """
    holdings = [("", None, model), *_holdings(model)]
    names: dict[Any, str] = {}
    for path, _, held in holdings:
        parametrized = isinstance(held, nn.LSTM) and is_parametrized(held)
        if type(held) is nn.LSTM or (parametrized and type(held).__base__ is nn.LSTM):
            names.setdefault(held, path or "the LSTM")
    for lstm, name in names.items():
        check_plain(lstm, "accelerate", name)
    probe = dict.fromkeys(names)
    for path, holder, held in holdings:
        fixed = [*(held if isinstance(held, dict) else ())]  # a key cannot change its hash
        fixed += [held] if isinstance(holder, _REFERENCES) else []
        if any(_replaced(value, probe) is not value for value in fixed):
            raise ValueError(
                "accelerate: expected no method, partial, weak reference or key of a dict that "
                f"holds an LSTM, since it would stay with the old one, got {path}"
            )
    new: dict[nn.Module, nn.Module] = {lstm: ISSLSTM.from_torch(lstm) for lstm in names}
    for lstm in new:  # a hook's handle refers to the table that the hook is in
        for name, table in vars(lstm).items():
            if name in HOOK_TABLES and isinstance(table, dict):
                table.update(vars(new[lstm])[name])
                vars(new[lstm])[name] = table
    for holder in [*(held for _, _, held in holdings), *new.values()]:
        if type(holder) is not nn.LSTM:
            _replace_in(holder, new)
    return cast(nn.Module, _replaced(model, new))
