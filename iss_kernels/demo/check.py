# SPDX-License-Identifier: Apache-2.0
"""The proof that the small model gives the answers of the big one, outputs and states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iss_kernels.demo.model import LanguageModel, strips, windows

# What "the same answers" means in float32: sums of some hundred terms, taken in another order.
TOLERANCE = 1e-5


class CheckError(RuntimeError):
    """The small model does not give the answers of the big one."""


@torch.no_grad()
def compare(
    big: LanguageModel, small: LanguageModel, kept: Sequence[Tensor], words: Tensor
) -> float:
    """Largest difference between the models' outputs and final states over `words`.

    kept: indices of the units of big that small has, by layer. Both are put in evaluation mode.
    Raises CheckError beyond TOLERANCE times the largest value.
    """
    big.eval()
    small.eval()
    differences, sizes = [torch.zeros(())], [torch.ones(())]
    state: Any = None
    small_state: Any = None
    for tokens, _ in windows(strips(words, 10), 30):
        logits, state = big(tokens, state)
        small_logits, small_state = small(tokens, small_state)
        pairs = [(logits, small_logits)]
        for whole, parts in zip(state, small_state, strict=True):  # h_n, then c_n
            # One tensor for each layer, or one for all; of [B, H], or of [1, B, H].
            for layer, units in enumerate(kept):
                values, others = (part[layer].view(tokens.size(1), -1) for part in (whole, parts))
                pairs.append((values[:, units], others))
        for values, others in pairs:
            differences.append((values - others).abs().max())
            sizes.append(values.abs().max())
    # Tensors, because torch's maximum is NaN where there is one and Python's may not be.
    worst, largest = torch.stack(differences).max().item(), torch.stack(sizes).max().item()
    if not worst <= TOLERANCE * largest:
        raise CheckError(
            f"the small model's answers differ from the big one's by {worst:.2g}, more than "
            f"{TOLERANCE * largest:.2g}"
        )
    return worst
