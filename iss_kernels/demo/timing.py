# SPDX-License-Identifier: Apache-2.0
"""Times the LSTM of the old size against the new one in three engines, after checking answers.

The engines take turns, so that whatever else the machine does falls on all of them; the median of
the turns counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iss_kernels import ISSLSTM, prepare
from iss_kernels.demo.check import TOLERANCE, CheckError

# The paper's setting, table 1: 30 unrolled steps at batch 10; and batch 1, what a user waits for.
BATCHES, STEPS = (1, 10), 30
ROUNDS = 30
SECONDS_PER_TURN = 0.02  # many calls per turn, to see past the clock and the other's cache contents
# On an idle machine turns differ by some 10 % and this thread always runs. A busy neighbour makes
# the ratio of the turns' ninth decile to the first, or of the time that passes to the time this
# thread runs, larger than STEADY. Then all turns are taken again, ATTEMPTS times in all at most.
STEADY, ATTEMPTS = 1.5, 3

# The columns of milliseconds, and what runs.
ENGINES = {
    "torch_ms": "big nn.LSTM",
    "small_torch_ms": "small nn.LSTM",
    "iss_ms": "small ISSLSTM",
    "int8_ms": "small int8",
}


class Chain(nn.Module):
    """An ISSLSTM as one nn.LSTM for each layer, which may differ in size; shares the weights."""

    def __init__(self, lstm: ISSLSTM) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        width = lstm.input_size
        for index, ((hidden, _),) in enumerate(lstm.sizes):
            layer = nn.LSTM(width, hidden, device="meta")
            for name, _ in list(layer.named_parameters()):
                setattr(layer, name, lstm.get_parameter(name.replace("_l0", f"_l{index}")))
            self.layers.append(layer)
            width = hidden

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """x: [T, B, I]. Returns (y,), y: [T, B, H]."""
        for layer in self.layers:
            x = layer(x)[0]
        return (x,)


@torch.inference_mode()
def compare(big: ISSLSTM, small: ISSLSTM, kept: Tensor, x: Tensor) -> dict[str, Any]:
    """Milliseconds per call of each of ENGINES by batch size: {"torch_ms": {"1": ...}, ...}.

    Also "speedup", of torch_ms over iss_ms, and "noisy": whether the machine was too busy for the
    times to say much. kept: the units of big's last layer that small has; x: [STEPS, B, I] with at
    least max(BATCHES) columns. Raises CheckError where answers differ; int8's are rounded, and not
    compared.
    """
    small = small.eval()
    lstms = [big.to_torch().eval(), Chain(small).eval(), small, prepare(small, "int8")]
    columns: dict[str, dict[str, float]] = {name: {} for name in (*ENGINES, "speedup")}
    noisy = False
    for batch in BATCHES:
        inputs = x[:, :batch].contiguous()
        expected = lstms[0](inputs)[0][..., kept]
        for name, lstm in zip(("nn.LSTM", "ISSLSTM"), lstms[1:3], strict=True):
            difference = (lstm(inputs)[0] - expected).abs().max().item()
            if not difference <= TOLERANCE:  # outputs are below 1
                raise CheckError(
                    f"the small {name} differs from the big nn.LSTM by {difference:.2g} at batch "
                    f"{batch}"
                )
        times, steady = _time(lstms, inputs)
        noisy |= not steady
        for column, value in zip(columns.values(), (*times, times[0] / times[2]), strict=True):
            column[str(batch)] = round(value, 4)
    return {**columns, "noisy": noisy}


def _time(lstms: Sequence[Callable[..., Any]], x: Tensor) -> tuple[list[float], bool]:
    """Median milliseconds per call of each, and whether they are steady; the best of ATTEMPTS."""
    best = float("inf"), [0.0]
    for _ in range(ATTEMPTS):
        turns, waited = _take_turns(lstms, x)
        spread = max(column[len(column) * 9 // 10] / column[len(column) // 10] for column in turns)
        medians = [1e3 * statistics.median(column) for column in turns]
        best = min(best, (max(spread, waited), medians))
        if best[0] <= STEADY:
            break
    return best[1], best[0] <= STEADY


def _take_turns(lstms: Sequence[Callable[..., Any]], x: Tensor) -> tuple[list[list[float]], float]:
    """Sorted seconds per call of each in its ROUNDS turns; time that passed over time we ran."""
    calls = [max(1, round(SECONDS_PER_TURN / _seconds(lstm, x, 3))) for lstm in lstms]
    begin, ran = time.perf_counter(), time.thread_time()
    turns = [
        [_seconds(lstm, x, n) for lstm, n in zip(lstms, calls, strict=True)] for _ in range(ROUNDS)
    ]
    waited = (time.perf_counter() - begin) / max(time.thread_time() - ran, 1e-9)
    return [sorted(column) for column in zip(*turns, strict=True)], waited


def _seconds(lstm: Callable[..., Any], x: Tensor, calls: int) -> float:
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        lstm(x)
    return (time.perf_counter() - begin) / calls
