# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM: torch.nn.LSTM over this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iss_kernels.recurrent import MODULES, Recurrent, Sizes


class ISSLSTM(Recurrent):
    """Drop-in for torch.nn.LSTM whose hidden size may differ by layer and direction.

    Arguments, parameters (gates in the order i, f, g, o), inputs and outputs as torch.nn.LSTM;
    beyond it, hidden_size and proj_size by layer and direction, `lengths` and `resets`: see
    `Recurrent`. hx and the final state are (h, c), each one tensor [L * D, B, size], where sizes
    differ a tuple of L * D tensors [B, size]. Raises what nn.LSTM raises for the same mistakes.

    For the gradient, each layer and direction saves 5 H elements per step and row (gates and cells;
    4 bytes each, 8 in float64), with recompute=True none.

    >>> lstm = ISSLSTM(3, [4, (2, 5)], num_layers=2, bidirectional=True)
    >>> y, (h, c) = lstm(torch.zeros(7, 1, 3))
    >>> y.shape, [tuple(state.shape) for state in h]
    (torch.Size([7, 1, 7]), [(1, 4), (1, 4), (1, 2), (1, 5)])
    """

    mode = "LSTM"
    torch_class = nn.LSTM

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
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, recompute,
        )  # fmt: skip

    @classmethod
    def options_of(cls, module: Any) -> dict[str, Any]:
        """As `Recurrent.options_of`."""
        return super().options_of(module) | {"proj_size": module.proj_size}

    def _autocast_result(
        self, autocast: torch.dtype, state: torch.dtype, packed: bool
    ) -> torch.dtype:
        """torch's LSTM takes packed input past autocast."""
        return torch.promote_types(autocast, state) if packed else autocast


MODULES[nn.LSTM] = ISSLSTM
