# SPDX-License-Identifier: Apache-2.0
"""ISSRNN: torch.nn.RNN over this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iss_kernels.recurrent import MODULES, Recurrent, Sizes, refuse_projections


class ISSRNN(Recurrent):
    """Drop-in for torch.nn.RNN whose hidden size may differ by layer and direction.

    Arguments (nonlinearity "tanh" or "relu" among them), parameters, inputs and outputs as
    torch.nn.RNN; beyond it, hidden_size by layer and direction, `lengths` and `resets`: see
    `Recurrent`. hx and the final state are one tensor h [L * D, B, H], where sizes differ a tuple
    of L * D tensors [B, H]. Raises what nn.RNN raises for the same mistakes. For the gradient it
    saves nothing beside its input and output.

    >>> rnn = ISSRNN(3, 4, nonlinearity="relu", bidirectional=True)
    >>> y, h = rnn(torch.zeros(7, 1, 3))
    >>> y.shape, h.shape
    (torch.Size([7, 1, 8]), torch.Size([2, 1, 4]))
    """

    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: Sizes,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        self.mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype, recompute,
        )  # fmt: skip

    @classmethod
    def options_of(cls, module: Any) -> dict[str, Any]:
        """As `Recurrent.options_of`; by the mode, which torch's forward looks at."""
        nonlinearity = module.mode.removeprefix("RNN_").lower()
        return super().options_of(module) | {"nonlinearity": nonlinearity}

    def _not_a_sequence(self, dim: int) -> str:
        return f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead"


MODULES[nn.RNN] = ISSRNN
