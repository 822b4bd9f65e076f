# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, the machine's description, the CSV."""

from __future__ import annotations

import csv
import datetime
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

import iss_kernels

Name = TypeVar("Name")

RESULTS = Path(__file__).parent / "results"


def record(benchmark: str, cell: str) -> Path:
    """The CSV of record: that of the LSTM has the benchmark's own name."""
    return RESULTS / f"{benchmark}{'' if cell == 'lstm' else f'_{cell}'}.csv"


def rest() -> None:
    """Wait until this process is idle.

    After a call the threads of a pool spin for a while, in case another call follows: OpenMP's for
    10 ms, ONNX Runtime's for 60 ms. They would take the cores from the next engine.
    """
    for _ in range(40):
        start = time.process_time()
        time.sleep(0.005)
        if time.process_time() - start < 0.001:
            return


def interleaved_ms(
    functions: Mapping[Name, Callable[[], object]], seconds: float, rounds: int = 7
) -> dict[Name, list[float]]:
    """Milliseconds per call by function: `rounds` medians each, taken in turn.

    The functions take turns so that whatever else the machine does hits all of them alike. A round
    of one function lasts about seconds / rounds / len(functions), or one call where that is longer.
    The first call of a round warms the caches and does not count, unless it is the only one.
    """
    share = seconds / rounds / len(functions)
    result: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            rest()
            times: list[float] = []
            while sum(times) < share:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            result[name].append(1e3 * statistics.median(times[1:] or times))
    return result


def percentiles(values: list[float]) -> list[float]:
    """The 20th, 50th and 80th."""
    return torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


@functools.cache  # called for every row, and the machine does not change
def machine() -> dict[str, str]:
    """What a row says of the machine: device, ISA, versions, date."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    info = iss_kernels.build_info()
    return {
        "device": info["cpu"],
        "isa": info.get("isa", "none"),
        "torch": torch.__version__,
        "git": git.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows that all have the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
