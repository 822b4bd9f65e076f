# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: command line, interleaved timing, the machine's description, the CSV."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import io
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

import iss_kernels
from iss_kernels.demo.checkpoint import write
from iss_kernels.demo.options import whole

Name = TypeVar("Name")
Row = dict[str, object]  # of a CSV

RESULTS = Path(__file__).parent / "results"
TRIED = Path(__file__).parents[1] / "build" / "bench"  # where a part of a benchmark goes
# Options that leave the points as they are.
FREE = ("output", "plot", "docs", "csv", "resume", "report", "worker")


def command_line(about: str, quick: str) -> argparse.ArgumentParser:
    """The parser of a benchmark: --quick, --threads, --output.

    about: the module's docstring; quick: the help of --quick.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    add = parser.add_argument
    add("--threads", type=whole, nargs="+", metavar="N", default=[1, torch.get_num_threads()])
    add_output(parser)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, whose default is what `output_of` says."""
    help = "default: the CSV of record in bench/results; of a part of the benchmark, in build/bench"
    parser.add_argument("--output", type=Path, metavar="CSV", help=help)


def output_of(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    record: Path,
    free: Sequence[str] = (),
) -> Path:
    """--output; without it the CSV of record, where the options ask for the whole benchmark.

    free: options beside FREE that are not a part of it. A part goes to a file of the same name.
    """
    if options.output is not None:
        return Path(options.output)
    asked = {name: value for name, value in vars(options).items() if name not in (*FREE, *free)}
    if all(_same(value, parser.get_default(name)) for name, value in asked.items()):
        return record
    return TRIED / record.name


def _same(one: object, other: object) -> bool:
    """Whether two values of an option are, a list and a tuple too."""
    if isinstance(one, (list, tuple, range)) and isinstance(other, (list, tuple, range)):
        return [*one] == [*other]
    return one == other


def each(threads: Iterable[int]) -> Iterator[int]:
    """Each number of threads once, after torch has taken it."""
    for count in dict.fromkeys(threads):
        torch.set_num_threads(count)
        yield count


@contextlib.contextmanager
def recording(output: Path) -> Iterator[list[Row]]:
    """Print what machine this is; write the rows that were added to the list.

    After Ctrl-C they go to a file beside it: what was there stays.
    """
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    rows: list[Row] = []
    try:
        yield rows
    except KeyboardInterrupt:
        output = unfinished(output)
    if rows:
        write_csv(output, rows)
        print(f"wrote {output}")


def unfinished(output: Path) -> Path:
    """Where the rows lie until a CSV is whole."""
    return output.with_name(output.name + ".part")


def record(benchmark: str, cell: str) -> Path:
    """The CSV of record: that of the LSTM has the benchmark's own name."""
    return RESULTS / f"{benchmark}{'' if cell == 'lstm' else f'_{cell}'}.csv"


def record_here(benchmark: str) -> Path:
    """The CSV of record of a benchmark that has one for each processor.

    Named by the processor's generation where that is known, "AMD EPYC (Zen 4)", else by its ISA.
    """
    generation = re.search(r"\((\w+(?: \w+)*)\)$", machine()["device"])
    processor = generation[1].lower().replace(" ", "-") if generation else machine()["isa"]
    return RESULTS / f"{benchmark}-{processor}.csv"


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


def timed_rows(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    columns: Sequence[str],
    about: Mapping[str, object],
    rounds: int = 7,
) -> list[Row]:
    """A row for each call: its name, `about`, the percentiles of its milliseconds, the machine.

    columns: of the name, or of its parts where it is a tuple; seconds, rounds: as interleaved_ms.
    """
    rows: list[Row] = []
    for name, values in interleaved_ms(calls, seconds, rounds).items():
        parts = name if isinstance(name, tuple) else (name,)
        low, middle, high = (f"{ms:.5f}" for ms in percentiles(values))
        times = {"ms_p50": middle, "ms_p20": low, "ms_p80": high}
        rows.append({**dict(zip(columns, parts, strict=True)), **about, **times, **machine()})
    return rows


def p50(row: Mapping[str, object]) -> float:
    """The median of a row, in milliseconds."""
    return float(str(row["ms_p50"]))


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


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write rows that all have the same keys, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())
