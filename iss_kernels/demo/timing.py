# SPDX-License-Identifier: Apache-2.0
"""Times nn.LSTM of the old size against ISSLSTM of the new one, after checking their answers.

The two take turns, so that whatever else the machine does falls on both; the median of the turns
counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iss_kernels import ISSLSTM
from iss_kernels.demo.check import TOLERANCE, CheckError

# The paper's setting, table 1: 30 unrolled steps at batch 10; and batch 1, what a user waits for.
BATCHES, STEPS = (1, 10), 30
ROUNDS = 30
SECONDS_PER_TURN = 0.02  # many calls per turn, to see past the clock and the other's cache contents


@torch.inference_mode()
def compare(big: ISSLSTM, small: ISSLSTM, kept: Tensor, x: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds per call by batch size: {"torch_ms": ..., "iss_ms": ..., "speedup": ...}.

    big runs as nn.LSTM; kept: the units of its last layer that small has; x: [STEPS, B, I] with at
    least max(BATCHES) columns. Raises CheckError where the two give different answers.
    """
    torch_lstm = big.to_torch().eval()
    small = small.eval()
    columns: dict[str, dict[str, float]] = {"torch_ms": {}, "iss_ms": {}, "speedup": {}}
    for batch in BATCHES:
        inputs = x[:, :batch].contiguous()
        difference = (torch_lstm(inputs)[0][..., kept] - small(inputs)[0]).abs().max().item()
        if not difference <= TOLERANCE:  # outputs are below 1
            raise CheckError(f"nn.LSTM and ISSLSTM differ by {difference:.2g} at batch {batch}")
        torch_ms, iss_ms = _take_turns(torch_lstm, small, inputs)
        for name, value in zip(columns, (torch_ms, iss_ms, torch_ms / iss_ms), strict=True):
            columns[name][str(batch)] = round(value, 4)
    return columns


def _take_turns(one: Callable[..., Any], other: Callable[..., Any], x: Tensor) -> list[float]:
    """Median milliseconds per call of both."""
    calls = [max(1, round(SECONDS_PER_TURN / _seconds(lstm, x, 3))) for lstm in (one, other)]
    turns = [
        [_seconds(lstm, x, n) for lstm, n in zip((one, other), calls, strict=True)]
        for _ in range(ROUNDS)
    ]
    return [1e3 * statistics.median(column) for column in zip(*turns, strict=True)]


def _seconds(lstm: Callable[..., Any], x: Tensor, calls: int) -> float:
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        lstm(x)
    return (time.perf_counter() - begin) / calls
