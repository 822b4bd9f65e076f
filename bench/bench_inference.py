# SPDX-License-Identifier: Apache-2.0
"""Inference against torch's modules, ONNX Runtime and OpenVINO; check, then time.

python -m iss_kernels bench [--cell lstm|gru|rnn] [--quick] [--only SERIES ...] [--threads N ...]

Every engine of peers.py runs the same stack on the same input. It is first checked against torch's
module in float64 (an engine that fails is reported and not timed), then all are timed in turn.
Series:

    stream    one step per call with the state kept, I = H, B = 1
    cliff     ours alone at neighbouring hidden sizes
    issue     shapes of the paper's shrunken language models
    headline  that model shrunken and run by us against the full one run by nn.LSTM (LSTM only)
    layer     one layer, I = H, over a grid of hidden sizes, batches and steps

Some engines are left out of some points, and so of the CSV: above 2e10 flops per call the slow
engines (nn.LSTM without oneDNN, torch.compile, torch int8); and at hidden sizes other than 64, 256
and 1024 torch.compile, which takes seconds to compile each shape and then calls the same kernel as
nn.LSTM. A row is written as soon as it is measured, to a file beside the CSV which takes its name
at the end; --resume goes on from there. bench/report.py reads the CSV.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import (
    Row,
    add_output,
    machine,
    output_of,
    p50,
    record,
    timed_rows,
    unfinished,
)
from peers import GATES, MODULES, Call, Engine, Layer, Unavailable, engines, streams
from roofline import flops, roofline
from torch import Tensor

from iss_kernels.demo.options import positive, whole
from iss_kernels.testing import max_error

LARGE = 2e10  # flops of a call: no slow engines above
LONG = 2e9  # fewer rounds above
COMPILED = (64, 256, 1024)  # hidden sizes at which torch.compile is measured

ALL = torch.get_num_threads()
SERIES = ("stream", "cliff", "issue", "headline", "layer")
HIDDEN = (32, 64, 100, 128, 200, 256, 315, 373, 512, 650, 1024, 1500)
BATCH = (1, 4, 10, 64)
STEPS = (1, 30, 100)
STREAM_HIDDEN = (64, 128, 256, 512, 1024)
CLIFF = range(312, 321)
ISSUE = ((100, 64), (1500, 373, 315), (1500, 1500, 1500))
FULL, SHRUNKEN = (1500, 1500, 1500), (1500, 373, 315)
FIELDS = (
    "series", "engine", "weights", "layers", "T", "B", "threads", "ms_p50", "ms_p20", "ms_p80",
    "gflops", "roofline", "device", "isa", "torch", "git", "date", "onnxruntime", "openvino",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One line of the benchmark: layers = (inputs, hidden units of each layer ...).

    Where the engines run different layers (cliff, headline), those of the first.
    """

    series: str
    layers: tuple[int, ...]
    T: int
    B: int
    threads: int
    cell: str = "lstm"

    @property
    def flops(self) -> int:
        """Of one call."""
        return flops(self.layers, self.T, self.B, GATES[self.cell])

    @property
    def key(self) -> tuple[str, ...]:
        """As in the CSV, which is that of one cell."""
        return (self.series, dashed(self.layers), str(self.T), str(self.B), str(self.threads))

    def __str__(self) -> str:
        return f"{self.series} {dashed(self.layers)} T{self.T} B{self.B} x{self.threads}"

    def contenders(self) -> dict[tuple[str, tuple[int, ...]], Engine]:
        """What is timed in turn here: engines by name and layers, which may differ."""
        ours = engines(self.cell)["prepared float32"]
        if self.series == "headline":
            return {
                ("nn.LSTM", FULL): engines("lstm")["nn.LSTM"],
                ("prepared float32", SHRUNKEN): ours,
            }
        if self.series == "cliff":
            return {("prepared float32", (h, h)): ours for h in CLIFF}
        return {
            (name, self.layers): engine
            for name, engine in (streams if self.series == "stream" else engines)(self.cell).items()
            if engine.installed
            and not (engine.slow and self.flops > LARGE)
            and not (name == "torch.compile" and self.layers[-1] not in COMPILED)
        }


def dashed(layers: Sequence[int]) -> str:
    return "-".join(map(str, layers))


def points(options: argparse.Namespace) -> list[Point]:
    """What was asked for: series in turn, each from small to large."""
    shapes: list[tuple[str, tuple[int, ...], int, int]] = []
    if options.quick:
        shapes += [("layer", (32, 32), 1, 1), ("layer", (100, 100), 30, 10)]
        shapes += [("stream", (64, 64), 1, 1)]
    else:
        hidden = options.hidden or HIDDEN
        batch, steps = options.batch or BATCH, options.steps or STEPS
        shapes += [("stream", (h, h), 1, 1) for h in options.hidden or STREAM_HIDDEN]
        shapes += [("cliff", (CLIFF[0], CLIFF[0]), 30, b) for b in (1, 10)]
        shapes += [("issue", layers, t, b) for layers in ISSUE for t, b in ((1, 1), (30, 10))]
        shapes += [("headline", FULL, 30, 10)] if options.cell == "lstm" else []
        shapes += [("layer", (h, h), t, b) for h, t, b in itertools.product(hidden, steps, batch)]
    threads = dict.fromkeys(options.threads)
    result = [Point(*shape, n, options.cell) for shape in shapes for n in threads]
    result.sort(key=lambda p: (SERIES.index(p.series), p.flops))
    return [p for p in result if not options.only or p.series in options.only]


# -- measuring a point


@functools.lru_cache(len(CLIFF))  # a point's own, for every number of threads
def problem(
    cell: str, layers: tuple[int, ...], steps: int, batch: int, calls: int
) -> tuple[list[Layer], Tensor, Tensor]:
    """Layers, x [T, B, I], and by float64 the y [T, B, H] of the last of so many calls."""
    torch.manual_seed(0)
    torch.set_num_threads(ALL)
    module = MODULES[cell]
    stack = [module(i, h).eval() for i, h in itertools.pairwise(layers)]
    x = torch.randn(steps, batch, layers[0])
    truth = x.double().repeat(calls, 1, 1)
    for layer in stack:
        double = module(layer.input_size, layer.hidden_size).double()
        double.load_state_dict(layer.state_dict())
        with torch.no_grad():
            truth = double(truth)[0]
    return stack, x, truth[-steps:]


def checked(point: Point) -> Iterator[tuple[tuple[str, tuple[int, ...]], Call]]:
    """The contenders that compute the right thing; what keeps the others out is printed."""
    calls = 5 if point.series == "stream" else 1  # so that the state counts
    for (name, layers), engine in point.contenders().items():
        stack, x, truth = problem(point.cell, layers, point.T, point.B, calls)
        torch.set_num_threads(point.threads)
        try:
            call = engine.build(stack, x, point.threads)
            for _ in range(calls):
                y = call()
        except Unavailable as reason:
            print(f"{name} left out of {point}: {reason}")
            continue
        if not isinstance(y, Tensor):
            y = torch.as_tensor(y.numpy() if hasattr(y, "numpy") else y)
        error = max_error(y.reshape(truth.shape), truth)
        if error <= engine.tolerance:
            yield (name, layers), call
        else:
            print(f"{name} left out of {point}: error {error:.2g} > {engine.tolerance:.2g}")


def measure(point: Point, seconds: float) -> list[Row]:
    """A row per contender."""
    roof = roofline(point.threads)
    contenders = point.contenders()
    with torch.inference_mode():
        calls = dict(checked(point))
        rounds = 7 if point.flops < LONG else 3
        about = {"series": point.series, "T": point.T, "B": point.B, "threads": point.threads}
        rows = timed_rows(calls, seconds * len(calls), ("engine", "layers"), about, rounds)
    for (name, layers), row in zip(calls, rows, strict=True):
        weights, gates = contenders[name, layers].weights, GATES[point.cell]
        gflops = flops(layers, point.T, point.B, gates) / p50(row) / 1e6
        fraction = roof.ms(layers, point.T, point.B, weights, gates) / p50(row)
        row |= {"layers": dashed(layers), "weights": weights, "gflops": f"{gflops:.3f}"}
        row |= {"roofline": f"{fraction:.4f}", **peers()}
    return rows


@functools.cache
def peers() -> dict[str, str]:
    """Versions of what is compared beyond torch; empty where it is not installed."""
    versions = dict.fromkeys(("onnxruntime", "openvino"), "")
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def summary(point: Point, rows: Sequence[Mapping[str, object]]) -> str:
    """Ours in float32 against the best of the others in float32."""
    ms: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for row in rows:
        if row["weights"] == "float32":
            name = str(row["engine"])
            ours = {**engines(point.cell), **streams(point.cell)}[name].ours
            where = "" if row["layers"] == dashed(point.layers) else f" {row['layers']}"
            ms[ours][name + where] = p50(row)
    text = f"{point!s:<36}"
    for times in (ms[True], ms[False]):
        if times:
            best = min(times, key=lambda name: times[name])
            text += f"{best:>20} {times[best]:10.4f} ms"
    if all(ms.values()):
        text += f"{min(ms[False].values()) / min(ms[True].values()):7.2f}x"
    return text


# -- command line


def done(path: Path) -> set[tuple[str, ...]]:
    """The points that a CSV has. Raises ValueError for one of another benchmark."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"expected a CSV of this benchmark to resume, got {path}")
        names = ("series", "layers", "T", "B", "threads")
        return {tuple(row[name] for name in names) for row in reader}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="iss_kernels bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", choices=tuple(MODULES), default="lstm")
    add("--quick", action="store_true", help="three points, a few seconds")
    add("--only", nargs="+", metavar="SERIES", choices=SERIES, help=", ".join(SERIES))
    add("--threads", type=whole, nargs="+", metavar="N", default=[1, ALL])
    add("--hidden", type=whole, nargs="+", metavar="H", help="hidden sizes of layer and stream")
    add("--batch", type=whole, nargs="+", metavar="B", help="batches of layer")
    add("--steps", type=whole, nargs="+", metavar="T", help="steps of layer")
    add("--seconds", type=positive, default=0.1, metavar="S", help="per engine and point, at least")
    add_output(parser)
    add("--resume", action="store_true", help="skip the points that the CSV has already")
    options = parser.parse_args()
    output = output_of(parser, options, record("inference", options.cell), free=["cell"])

    print(*(f"{key}: {value}" for key, value in {**machine(), **peers()}.items()), sep="\n")
    for name, engine in {**engines(options.cell), **streams(options.cell)}.items():
        if not engine.installed:
            print(f"{name} left out: needs {', '.join(engine.packages)}")
    begun = unfinished(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = begun if begun.exists() else output
    resumed = options.resume and source.exists()
    try:
        skip = done(source) if resumed else set()
    except ValueError as error:
        parser.error(str(error))
    if resumed and source is output:
        shutil.copyfile(output, begun)
    with begun.open("a" if resumed else "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not resumed:
            writer.writeheader()
        try:
            for point in points(options):
                if point.key in skip:
                    continue
                rows = measure(point, options.seconds)
                writer.writerows(rows)
                file.flush()
                print(summary(point, rows), flush=True)
        except KeyboardInterrupt:
            print(f"interrupted; --resume goes on with {begun}")
            return
    os.replace(begun, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
