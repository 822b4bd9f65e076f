# SPDX-License-Identifier: Apache-2.0
"""Inference beside busy neighbours: other processes, other threads, fewer cores than threads.

python bench/bench_contention.py [--seconds S] [--setting NAME ...] [--output CSV] [--docs PATH]

Every engine is checked against float64, then called without a pause in blocks of half a second that
take turns. A row gives the times of single calls; what counts is how they compare with those of
`prepared` on one thread in the same setting, since a second thread should never cost time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, Row, add_output, machine, output_of, rest, write_csv
from peers import Build, Call, as_iss, ort, prepared, torch_layers
from report import digits, replace_block, wrapped
from torch import nn

from iss_kernels.demo.options import positive

PROBLEMS = ((512, 1, 30), (64, 64, 30))  # H, B, T; I = H
ENGINES = ("prepared", "nn.LSTM", "ONNX Runtime")
BLOCK = 0.5  # seconds
PAUSE = 0.1  # between blocks: some engines keep their threads spinning


@dataclass(frozen=True)
class Setting:
    """What goes on at once. cores: the worker may use so many; quota: of its cgroup, in cores."""

    neighbours: int = 0
    callers: int = 1  # Python threads of a process
    processes: int = 1
    threads: tuple[int, ...] = (1, 2)
    cores: int | None = None
    quota: int | None = None


SETTINGS = {
    "alone": Setting(),
    "1 busy process": Setting(neighbours=1),
    "2 busy processes": Setting(neighbours=2),
    "4 calling threads": Setting(callers=4),
    "3 processes": Setting(processes=3),
    "8 threads": Setting(threads=(1, 8)),
    "taskset to 1 core": Setting(cores=1),
    "cgroup of 1 core": Setting(quota=1),
}


# -- A worker: a process that calls each engine in the same blocks of time as the other workers


def engines(hidden: int, batch: int, steps: int, threads: int) -> dict[str, Call]:
    """Each engine's call, checked."""
    torch.manual_seed(0)
    layers, x = [nn.LSTM(hidden, hidden)], torch.randn(steps, batch, hidden)
    truth = as_iss(layers).double()(x.double())[0]
    builds: dict[str, Build] = {
        "prepared": functools.partial(prepared, weights="float32"),
        "nn.LSTM": torch_layers,
        "ONNX Runtime": ort,
    }
    calls = {name: builds[name](layers, x, threads) for name in ENGINES}
    for name, call in calls.items():
        y = call()
        got = y if isinstance(y, torch.Tensor) else torch.from_numpy(y.numpy())
        error = float((got.double() - truth).abs().max())
        if not error <= 1e-4:
            raise SystemExit(f"bench_contention: {name}: error {error:.2g}")
    return calls


def times_until(call: Call, threads: int, end: float) -> list[float]:
    """Seconds of each call. torch counts its threads for each calling thread."""
    torch.set_num_threads(threads)
    times = []
    start = time.perf_counter()
    while time.time() < end:
        call()
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


@torch.inference_mode()
def work(problem: tuple[int, int, int], setting: Setting, blocks: int) -> dict[str, list[float]]:
    """{"engine/threads": seconds of every call}; says "ready", begins at the time it is told."""
    if setting.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.cores])
    variants: dict[str, tuple[Call, int]] = {}
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for name, call in engines(*problem, threads).items():
            variants[f"{name}/{threads}"] = (call, threads)
    print("ready", flush=True)
    begin = float(sys.stdin.readline())
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = itertools.islice(itertools.cycle(variants), blocks * len(variants))
    for number, name in enumerate(order):
        call, threads = variants[name]
        time.sleep(max(0.0, begin + number * (BLOCK + PAUSE) - time.time()))
        end = begin + number * (BLOCK + PAUSE) + BLOCK

        def run(call: Call = call, threads: int = threads, end: float = end) -> list[float]:
            with torch.inference_mode():
                return times_until(call, threads, end)

        if setting.callers == 1:
            times[name] += run()
        else:
            callers = [
                threading.Thread(target=lambda run=run, to=times[name]: to.extend(run()))
                for _ in range(setting.callers)
            ]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
        if setting.neighbours == 0 and setting.processes == 1:
            rest()
    return times


# -- The whole


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.contextmanager
def cgroup(cores: int | None) -> Iterator[Path | None]:
    """The tasks file of a new cgroup with a quota; None where none can be made."""
    if cores is None:
        yield None
        return
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup") / ("" if v2 else "cpu") / f"bench_contention_{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        if v2:
            (group / "cpu.max").write_text(f"{cores * 100_000} 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(cores * 100_000))
        yield group / "cgroup.procs"
    except OSError:
        yield None
    finally:
        group.rmdir()


def measure(name: str, problem: tuple[int, int, int], blocks: int) -> list[Row]:
    """The rows of one setting."""
    setting = SETTINGS[name]
    with busy(setting.neighbours), cgroup(setting.quota) as tasks:
        if setting.quota is not None and tasks is None:
            print(f"{name}: left out, no cgroup can be made here")
            return []

        def enter() -> None:
            if tasks is not None:
                tasks.write_text(str(os.getpid()))

        command = [sys.executable, __file__, "--worker", json.dumps([problem, name, blocks])]
        pipe = subprocess.PIPE
        workers = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, preexec_fn=enter)
            for _ in range(setting.processes)
        ]
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise SystemExit(f"bench_contention: a worker failed: {name}")
        begin = time.time() + 1
        outputs = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{begin}\n")
            worker.stdin.flush()
        for worker in workers:
            outputs.append(json.loads(worker.communicate()[0]))
    seconds = blocks * BLOCK
    rows: list[Row] = []
    of_variant = {key: sorted(itertools.chain(*(o[key] for o in outputs))) for key in outputs[0]}
    one = of_variant["prepared/1"]
    for key, times in of_variant.items():
        engine, threads = key.split("/")
        rows.append(
            {
                "setting": name,
                **dict(zip("HBT", problem, strict=True)),
                "engine": engine,
                "threads": threads,
                "calls_per_s": f"{len(times) / seconds:.1f}",
                "mean_ms": f"{1e3 * mean(times):.4g}",
                "p50_ms": f"{1e3 * quantile(times, 0.5):.4g}",
                "p99_ms": f"{1e3 * quantile(times, 0.99):.4g}",
                "max_ms": f"{1e3 * times[-1]:.4g}",
                "mean_over_one": f"{mean(times) / mean(one):.3f}",
                "p99_over_one": f"{quantile(times, 0.99) / quantile(one, 0.99):.3f}",
                **machine(),
            }
        )
        print(*(f"{value!s:>12}" for value in list(rows[-1].values())[:13]), flush=True)
    return rows


def mean(times: list[float]) -> float:
    """Of calls, not of time."""
    return sum(times) / len(times)


def quantile(times: list[float], share: float) -> float:
    """Of sorted times."""
    return times[min(len(times) - 1, int(share * len(times)))]


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """For docs/servers.md: mean and 99th percentile beside prepared's own on one thread."""
    yield "| setting | H, B, T | prepared, 1 thread | prepared | nn.LSTM | ONNX Runtime |"
    yield "|:--|:--|--:|--:|--:|--:|"
    points: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        by_engine = points.setdefault((row["setting"], row["H"], row["B"], row["T"]), {})
        by_engine[row["engine"] + (" one" if row["threads"] == "1" else "")] = row

    def cell(row: dict[str, str]) -> str:
        return f"{digits(float(row['mean_ms']))}, {digits(float(row['p99_ms']))}"

    for (setting, *problem), by_engine in points.items():
        cells = [cell(by_engine[name]) for name in ("prepared one", *ENGINES)]
        yield f"| {setting} | {', '.join(problem)} | {' | '.join(cells)} |"
    first = rows[0]
    yield ""
    yield wrapped(
        f"Milliseconds of a call, mean and 99th percentile; two threads (eight in the row that "
        f"says so) but in the first column ({first['device']}, {first['isa']}, 2 cores; torch "
        f"{first['torch']})."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=positive, default=5, help="of each engine and setting (default: 5)")
    add("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    add_output(parser)
    add("--docs", type=Path, metavar="PATH", help="write the table between its markers there, from "
        "the CSV as it is")  # fmt: skip
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        problem, name, blocks = json.loads(options.worker)
        print(json.dumps(work(tuple(problem), SETTINGS[name], blocks)))
        return
    output = output_of(parser, options, RESULTS / "contention.csv")
    if options.docs:
        with output.open(newline="") as file:
            block = "\n".join(table(list(csv.DictReader(file))))
        print(block)
        replace_block(options.docs, "contention", block)
        return
    blocks = max(1, round(options.seconds / BLOCK))
    rows = []
    for name in options.setting:
        for problem in PROBLEMS:
            rows += measure(name, problem, blocks)
    write_csv(output, rows)


if __name__ == "__main__":
    main()
