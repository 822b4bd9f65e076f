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

import torch

import iss_kernels

RESULTS = Path(__file__).parent / "results"


def interleaved_ms(
    functions: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 7
) -> dict[str, list[float]]:
    """Milliseconds per call by function: `rounds` medians each, taken in turn.

    In turn, so that what else the machine does hits all alike; a round of each lasts about
    seconds / rounds / len(functions). Warm: every function ran just before it is timed.
    """
    share = seconds / rounds / len(functions)
    result: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            times: list[float] = []
            while len(times) < 3 or sum(times) < share:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            result[name].append(1e3 * statistics.median(times))
    return result


@functools.cache  # one process measures one machine: asked for every row
def machine() -> dict[str, str]:
    """What a row has to say to be comparable: device, ISA, versions, date."""
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
