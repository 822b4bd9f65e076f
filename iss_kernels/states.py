# SPDX-License-Identifier: Apache-2.0
"""The forms of a recurrent state, and what stays of one when units have left.

Code round a shrunken module may go on making states of the width before: zeros, a learned h_0, a
stored state. Column k of a state is read by unit k alone, so such a state is cut to the columns of
the units that stayed, and no answer changes.

Code may also need outputs of the width before (`Shrinkable.full_width`): then they and the states
have zeros in the places of the units that left, which were zero before too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from iss_kernels import backend
from iss_kernels.cells import Cell

# [L * D, B, size] where all sizes are equal, else L * D times [B, size]; unbatched without B.
State: TypeAlias = Tensor | tuple[Tensor, ...]
# What users give and get: h, or (h, c) of an LSTM.
States: TypeAlias = State | tuple[State, State]


class Kept(NamedTuple):
    """The units of a state that stayed: their indices, int64 [size], among `before`."""

    units: Tensor
    before: int

    def _on(self, device: torch.device) -> Kept:
        """The same on a device, but for "meta", where it would lose its values."""
        return self if device.type == "meta" else self._replace(units=self.units.to(device))


def joined(rows: Sequence[Tensor]) -> State:
    """The state of these rows, [B, size] or [size] each, in order of layers and directions."""
    if len({row.size(-1) for row in rows}) > 1:
        return tuple(rows)
    return stacked(rows)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """torch.stack, which would copy a single one."""
    if len(rows) > 1:
        return torch.stack(list(rows))
    (row,) = rows
    if not row.requires_grad or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return row.unsqueeze(0)
    # No view for autograd: states are detached in place (truncated backpropagation through time).
    return cast(Tensor, torch.ops.aten._unsafe_view.default(row, (1, *row.shape)))


def cut(state: Tensor, kept: Kept) -> Tensor:
    """[..., before] -> [..., size]; a tensor of another width is returned as it is."""
    units, before = kept
    if state.dim() == 0 or state.size(-1) != before or units.size(0) == before:
        return state
    return state.index_select(-1, units.to(state.device))


def widened(values: Tensor, kept: Kept) -> Tensor:
    """[..., size] -> [..., before], with zeros in the places of the units that left."""
    units, before = kept
    if units.size(0) == before:
        return values
    zeros = values.new_zeros(*values.shape[:-1], before)
    return zeros.index_copy(-1, units.to(values.device), values)


def cut_state(hx: States, stayed: Sequence[Sequence[Tensor]]) -> States:
    """A state of the width before units left, cut to those that stayed.

    hx: in any form that the module took before: one tensor [L * D, B, size] or L * D tensors
    [B, size], of an LSTM a pair of these; unbatched without B; of a cell [B, H] or [H], or a pair.
    stayed: as in `Shrinkable.remember`. Returns the state in the form in which the shrunken module
    returns it. Raises ValueError for another form or width.

    >>> h, masks = torch.zeros(2, 1, 3), [[torch.tensor([True, False, True])]] * 2
    >>> cut_state(h, masks).shape
    torch.Size([2, 1, 2])
    """
    several = len(stayed[0]) > 1
    parts: Any = hx if several else [hx]
    if several and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise ValueError(f"cut_state: expected hx to be (h, c), got a {type(hx).__name__}")
    result: list[State] = []
    for name, state, masks in zip("hc", parts, zip(*stayed, strict=True), strict=False):
        # A single layer and direction: its tensor is cut as it is, since it may be a cell's.
        alone = len(masks) == 1 and isinstance(state, Tensor)
        rows = [state] if alone else list(state)
        widths = [row.size(-1) for row in rows]
        if widths != list(map(len, masks)):
            raise ValueError(
                f"cut_state: expected {name} of the widths before, {list(map(len, masks))}, "
                f"got {widths}"
            )
        rows = [row[..., m.to(row.device)] for row, m in zip(rows, masks, strict=True)]
        result.append(rows[0] if alone else joined(rows))
    return (result[0], result[1]) if several else result[0]


class Shrinkable(nn.Module):
    """Base of modules with a recurrent state that know which of their units stayed.

    kept: for each layer and direction, for each state, h first; None where no unit ever left. It
    moves with the module and is copied and pickled with it, but is not in its state_dict.

    full_width: whether outputs and states come in the width before, with zeros in the places of the
    units that left. An initial state has to be zero there where its cell carries it on, c of an
    LSTM and h of a GRU; others raise ValueError, but where torch.compile or another transform
    follows the call.
    """

    kept: list[tuple[Kept, ...]] | None
    full_width: bool = False

    @property
    def cell(self) -> Cell:
        """The row of the registry."""
        raise NotImplementedError

    def _cut(self, state: Tensor, index: int, which: int) -> Tensor:
        """A state without the units that have left of a layer and direction, h first."""
        if self.kept is None:
            return state
        stayed = cut(state, self.kept[index][which])
        carried = self.full_width and self.cell.states[which] == self.cell.carries
        looked_at = carried and stayed is not state and backend.nobody_watches()
        if looked_at and int(state.count_nonzero()) != int(stayed.count_nonzero()):
            raise ValueError(
                f"{type(self).__name__}: expected {self.cell.carries}_0 to be zero in the places "
                "of the units that have left, got others"
            )
        return stayed

    def _widened(self, state: Tensor, index: int, which: int) -> Tensor:
        """A state as the module returns it; also an output, which is like h."""
        if self.kept is None or not self.full_width:
            return state
        return widened(state, self.kept[index][which])

    def _state_sizes(self) -> list[tuple[int, ...]]:
        """The width of each state, h first, for each layer and direction."""
        raise NotImplementedError

    def remember(self, stayed: Sequence[Sequence[Tensor]]) -> None:
        """Note which units stayed, so that hx of the width before is cut to them.

        stayed: for each layer and direction, for each state (h, of an LSTM c too): bool [width
        before], True for the units that the module has. Where the module remembers an earlier
        removal, the width before is that before the first. Raises ValueError for masks that do not
        fit the module.

        >>> import iss_kernels as iss
        >>> gru = iss.ISSGRU(3, 2)
        >>> gru.remember([[torch.tensor([True, False, True, False])]])
        >>> y, h_n = gru(torch.zeros(5, 1, 3), torch.zeros(1, 1, 4))
        >>> h_n.shape
        torch.Size([1, 1, 2])
        """
        masks = list(map(tuple, stayed))
        # Inference tensors could not be saved for the gradient of a learned h_0.
        with torch.inference_mode(False):
            known = self.kept or [tuple(map(_all_of, of_layer)) for of_layer in masks]
            expected = [tuple(len(k.units) for k in of_layer) for of_layer in known]
            given = [tuple(map(len, of_layer)) for of_layer in masks]
            sizes, left = self._state_sizes(), [tuple(int(m.sum()) for m in of) for of in masks]
            are_masks = all(m.dtype == torch.bool for of_layer in masks for m in of_layer)
            if not are_masks or (given, left) != (expected, sizes):
                raise ValueError(
                    f"remember: expected bool masks of {expected} units that keep {sizes}, by "
                    f"layer and direction, got masks of {given} that keep {left}"
                )
            if given == left:
                return
            device = next(itertools.chain(self.parameters(), self.buffers())).device
            self.kept = [
                tuple(
                    Kept(k.units[mask.to(k.units.device)], k.before)._on(device)
                    for k, mask in zip(of_layer, its_masks, strict=True)
                )
                for of_layer, its_masks in zip(known, masks, strict=True)
            ]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move what is kept, whose values no to_empty or move to the meta device loses."""
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        if self.kept is not None:
            device = fn(self.kept[0][0].units.new_empty(0)).device
            self.kept = [tuple(k._on(device) for k in of_layer) for of_layer in self.kept]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """As torch's, which lists every parameter of another size and names no way out."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        for name, own in self._parameters.items():
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and given.shape != own.shape:
                raise RuntimeError(
                    f"load_state_dict: expected {prefix}{name} of shape {list(own.shape)}, got "
                    f"{list(given.shape)}; a state_dict says no sizes: iss.save writes and "
                    "iss.load reads a model of any"
                )


def _all_of(mask: Tensor) -> Kept:
    """All units that a mask speaks of."""
    return Kept(torch.arange(len(mask), device="cpu"), len(mask))
