# SPDX-License-Identifier: Apache-2.0
"""ISSGRU: torch.nn.GRU over this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iss_kernels.recurrent import MODULES, Recurrent, Sizes, refuse_projections


class ISSGRU(Recurrent):
    """Drop-in for torch.nn.GRU whose hidden size may differ by layer and direction.

    Arguments, parameters (gates in the order r, z, n), inputs and outputs as torch.nn.GRU; beyond
    it, hidden_size by layer and direction, `lengths` and `resets`: see `Recurrent`. hx and the
    final state are one tensor h [L * D, B, H], where sizes differ a tuple of L * D tensors [B, H].
    Raises what nn.GRU raises for the same mistakes.

    For the gradient, each layer and direction saves 4 H elements per step and row (gates, and the
    recurrent part of n; 4 bytes each, 8 in float64), with recompute=True none.

    >>> gru = ISSGRU(3, [4, 2], num_layers=2)
    >>> y, h = gru(torch.zeros(7, 1, 3))
    >>> y.shape, [tuple(state.shape) for state in h]
    (torch.Size([7, 1, 2]), [(1, 4), (1, 2)])
    """

    mode = "GRU"
    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: Sizes,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        **other: Any,
    ) -> None:
        refuse_projections(other)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype, recompute,
        )  # fmt: skip

    def _autocast_result(
        self, autocast: torch.dtype, state: torch.dtype, packed: bool
    ) -> torch.dtype:
        """torch's GRU adds to the state, which no autocast converts."""
        return torch.promote_types(autocast, state)


MODULES[nn.GRU] = ISSGRU
