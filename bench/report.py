# SPDX-License-Identifier: Apache-2.0
"""What bench_inference.py measured: a summary, a plot, and the tables of docs/benchmarks.md.

python bench/report.py [CSV ...] [--plots DIRECTORY] [--docs PATH]

Without a CSV it takes the CSV of record of every cell that has one. A speed-up is the time of
another engine over ours: above 1 we are faster. "Best" is the fastest float32 engine that is not
ours, chosen at each point anew.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, TypeAlias

from harness import RESULTS, record

MODULES = {"lstm": "nn.LSTM", "gru": "nn.GRU", "rnn": "nn.RNN"}
PEERS = (*MODULES.values(), "nn.LSTM no oneDNN", "torch.compile", "ONNX Runtime", "OpenVINO")
OURS = "prepared float32"
BELOW = 0.97  # points under this speed-up are listed

TABLE_HIDDEN = (64, 128, 256, 512, 1024)
TABLE_CALLS = ((1, 1), (1, 30), (10, 30), (64, 30))  # B, T
COLUMNS = {"ONNX Runtime": "ONNX Runtime", "OpenVINO": "OpenVINO", OURS: "ours"}
FORMATS = {f"prepared {w}": w for w in ("float32", "float16", "bfloat16", "int8")}
INT8 = {"lstm": "ONNX Runtime int8", "gru": "torch int8"}  # the best int8 of others; none for RNN


@dataclass(frozen=True)
class Row:
    """One engine at one point."""

    ms: float
    gflops: float
    roofline: float
    layers: str


@dataclass(frozen=True)
class Point:
    """Where: H is the last layer's."""

    series: str
    layers: str
    T: int
    B: int
    threads: int

    @property
    def H(self) -> int:
        """Hidden size."""
        return int(self.layers.rpartition("-")[2])

    def __str__(self) -> str:
        return f"{self.layers:<14} T {self.T:<3} B {self.B:<2} x{self.threads}"


Results: TypeAlias = dict[Point, dict[str, Row]]


def load(path: Path) -> tuple[Results, dict[str, str]]:
    """Rows by point and engine, and what the last row says of the machine."""
    results: Results = {}
    raw: dict[str, str] = {}
    with path.open(newline="") as file:
        for raw in csv.DictReader(file):
            layers = "headline" if raw["series"] == "headline" else raw["layers"]
            point = Point(raw["series"], layers, int(raw["T"]), int(raw["B"]), int(raw["threads"]))
            results.setdefault(point, {})[raw["engine"]] = Row(
                float(raw["ms_p50"]), float(raw["gflops"]), float(raw["roofline"]), raw["layers"]
            )
    return results, raw


def cell_of(results: Results) -> str:
    """The cell that a CSV is about."""
    names = {name for rows in results.values() for name in rows}
    return next(cell for cell, module in MODULES.items() if module in names)


def select(results: Results, series: str, **where: int) -> Results:
    """The points of a series with these T, B or threads."""
    wanted = {"series": series, **where}.items()
    return {
        point: rows
        for point, rows in results.items()
        if all(getattr(point, name) == value for name, value in wanted)
    }


def best_peer(rows: Mapping[str, Row]) -> str | None:
    """The fastest float32 engine that is not ours."""
    there = [name for name in PEERS if name in rows]
    return min(there, key=lambda name: rows[name].ms) if there else None


def ratio(rows: Mapping[str, Row], other: str | None, ours: str) -> float | None:
    """How many times faster `ours` is; None where one of them is missing."""
    if other is None or other not in rows or ours not in rows:
        return None
    return rows[other].ms / rows[ours].ms


def ratios(points: Results, other: str | None, ours: str) -> dict[Point, float]:
    """The speed-up by point; other = None: over the best."""
    found = {p: ratio(rows, other or best_peer(rows), ours) for p, rows in points.items()}
    return {p: value for p, value in found.items() if value is not None}


def mean(values: Iterable[float]) -> str:
    """Their geometric mean."""
    values = list(values)
    return f"{geometric_mean(values):5.2f}x of {len(values)}" if values else "    -"


# -- summary


def summary(results: Results) -> Iterable[str]:
    """Lines to steer by."""
    cell = cell_of(results)
    threads = sorted({point.threads for point in results})
    steps = sorted({point.T for point in select(results, "layer")})
    yield f"{OURS}, one layer: geometric mean of the speed-up"
    for n in threads:
        yield from speed_up_lines(select(results, "layer", threads=n), MODULES[cell], n)
    yield from slow_lines(select(results, "layer") | select(results, "issue"))
    for n, t in itertools.product(threads, steps):
        points = select(results, "layer", threads=n, T=t, B=1)
        yield from format_lines(points, INT8.get(cell), f"T {t:<3} x{n}")
    for n in threads:
        large = {p: r for p, r in select(results, "layer", threads=n).items() if p.H >= 256}
        int8 = ratios(large, OURS, "prepared int8").values()
        if int8:
            yield f"int8 over our float32, H >= 256, x{n}: {mean(int8)}, least {min(int8):.2f}"
    yield f"fraction of the roof, {OURS}: least, median, most"
    for n, t, b in itertools.product(threads, steps, (1, 64)):
        points = select(results, "layer", threads=n, T=t, B=b)
        yield from roof_lines(points, f"T {t:<3} B {b:<2} x{n}", all_sizes=b > 1)
    yield from stream_lines(select(results, "stream"), MODULES[cell])
    yield from cliff_lines(select(results, "cliff"))
    for point, rows in (select(results, "issue") | select(results, "headline")).items():
        best = best_peer(rows)
        over = ratio(rows, best, OURS)
        if over is not None:
            yield f"{point.series}: {point}  {over:.2f}x over {best}, {rows[OURS].ms:.3f} ms"


def speed_up_lines(points: Results, torchs: str, threads: int) -> Iterable[str]:
    """Over the best and over torch's module, and what is left to gain: the roof over the best."""
    over_best, over_torch = ratios(points, None, OURS), ratios(points, torchs, OURS)
    if over_best:
        at = min(over_best, key=lambda point: over_best[point])
        yield f"  x{threads}  over {torchs}  {mean(over_torch.values())}"
        yield (
            f"  x{threads}  over the best {mean(over_best.values())}, least {over_best[at]:.2f} "
            f"at {at}"
        )
        for batch in sorted({point.B for point in over_best}):
            values = {point: value for point, value in over_best.items() if batch == point.B}
            yield (
                f"  x{threads}    B {batch:<4} {mean(values.values())}, least "
                f"{min(values.values()):.2f}; the roof over the best "
                f"{roof_over_best(points, values):.2f}x"
            )


def slow_lines(points: Results) -> Iterable[str]:
    """Every point where another engine is the faster one."""
    over_best = ratios(points, None, OURS)
    slow = [point for point, value in over_best.items() if value < BELOW]
    yield f"points below {BELOW}: {len(slow)} of {len(over_best)}"
    for point in sorted(slow, key=lambda point: over_best[point]):
        rows = points[point]
        best = best_peer(rows) or ""
        yield (
            f"  {over_best[point]:.2f}  {point}  {best} {rows[best].ms:.4f} ms, "
            f"ours {rows[OURS].ms:.4f} ms"
        )


def format_lines(points: Results, their_int8: str | None, where: str) -> Iterable[str]:
    """int8 over theirs, 16 bits over our own float32."""
    int8 = ratios(points, their_int8, "prepared int8") if their_int8 else {}
    large = {point: rows for point, rows in points.items() if point.H >= 256}
    half = ratios(large, OURS, "prepared float16")
    brain = ratios(large, OURS, "prepared bfloat16")
    if points:
        yield (
            f"B 1, {where}: int8 over {their_int8 or 'others'} {mean(int8.values())}; float16 over "
            f"our float32, H >= 256 {mean(half.values())}; bfloat16 {mean(brain.values())}"
        )


def roof_lines(points: Results, where: str, all_sizes: bool) -> Iterable[str]:
    """How near the roof."""
    fractions = [
        rows[OURS].roofline
        for point, rows in points.items()
        if OURS in rows and (all_sizes or 128 <= point.H <= 512)
    ]
    if fractions:
        yield (
            f"  {where}  {min(fractions):.2f}  {median(fractions):.2f}  {max(fractions):.2f}"
            f"{'' if all_sizes else '  (H 128 to 512)'}"
        )


def stream_lines(points: Results, torchs: str) -> Iterable[str]:
    """Per size: how much faster, how near the roof, and what a step costs beyond it."""
    if points:
        yield f"Stream float32: over {torchs}, over ONNX Runtime; int8 over theirs; us, of the roof"
    for point, rows in points.items():
        ours = rows.get("Stream float32")
        if ours is None:
            continue
        values = [
            ratio(rows, torchs, "Stream float32"),
            ratio(rows, "ONNX Runtime", "Stream float32"),
            ratio(rows, "ONNX Runtime int8", "Stream int8"),
        ]
        text = "  ".join("    -" if v is None else f"{v:5.2f}" for v in values)
        beyond = 1e3 * ours.ms * (1 - ours.roofline)
        yield (
            f"  H {point.H:<4} x{point.threads}  {text}  {1e3 * ours.ms:8.1f} us, "
            f"{ours.roofline:.2f}, {beyond:.1f} us beyond it"
        )


def cliff_lines(points: Results) -> Iterable[str]:
    """Time per multiply-add at neighbouring sizes."""
    groups: dict[tuple[int, int], dict[int, float]] = {}
    for point, rows in points.items():
        if OURS in rows:
            groups.setdefault((point.B, point.threads), {})[point.H] = 2 / rows[OURS].gflops
    for (batch, threads), costs in sorted(groups.items()):
        spread = max(costs.values()) / min(costs.values()) - 1
        worst = max(costs, key=lambda h: costs[h])
        yield (
            f"cliff: H {min(costs)} to {max(costs)}, B {batch} x{threads}: "
            f"{median(costs.values()):.4f} ns per multiply-add, spread {100 * spread:.0f} % "
            f"(most at {worst})"
        )


# -- tables


def digits(ms: float) -> str:
    """Three of them, and no exponent."""
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterable[str]:
    """A Markdown table of numbers."""
    names = list(header)
    yield f"| {' | '.join(names)} |"
    yield "|--:" * len(names) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def markdown(results: Results, machine: Mapping[str, str]) -> str:
    """Times of the engines, times by format, speed-ups by batch, and the headline."""
    cell = cell_of(results)
    module = MODULES[cell]
    engines, formats = {module: module, **COLUMNS}, dict(FORMATS)
    if cell in INT8:
        formats[INT8[cell]] = INT8[cell]
    also = ", nn.LSTM without oneDNN and torch.compile included" if cell == "lstm" else ""
    about = (
        f"{machine['device']}, {machine['isa']}, 1 thread; torch {machine['torch']}, ONNX Runtime "
        f"{machine['onnxruntime'] or '-'}, OpenVINO {machine['openvino'] or '-'}"
    )
    lines = [
        *table(["H", "B", "T", *engines.values(), "speed-up"], time_rows(results, engines, True)),
        "",
        wrapped(
            f"Milliseconds per call in float32, I = H ({about}). Speed-up: ours over the fastest "
            f"other engine{also}."
        ),
        "",
    ]
    if cell != "lstm":  # whose formats are bench_precision.py's
        lines += [
            *table(["H", "B", "T", *formats.values()], time_rows(results, formats, False)),
            "",
            wrapped("Milliseconds per call of ours by format of the weights, same machine."),
            "",
        ]
    lines += [
        *table(
            ["threads", "B", "speed-up", "least", "at the roof"],
            batch_rows(select(results, "layer")),
        ),
        "",
        wrapped(
            "Speed-up over the fastest other engine: geometric mean and least over all H and T, "
            "and the mean that a kernel at the roof would reach."
        ),
    ]
    for point, rows in select(results, "headline", threads=1).items():
        over = ratio(rows, "nn.LSTM", OURS)
        if over is not None:
            text = (
                f"nn.LSTM {rows['nn.LSTM'].layers} takes {digits(rows['nn.LSTM'].ms)} ms, ours "
                f"shrunken to {rows[OURS].layers} takes {digits(rows[OURS].ms)} ms "
                f"(B {point.B}, T {point.T}): {over:.1f} times as fast."
            )
            lines += ["", wrapped(text)]
    return "\n".join(lines)


def time_rows(results: Results, engines: Iterable[str], with_speed_up: bool) -> Iterable[list[str]]:
    """A row for each size and call."""
    for h, (b, t) in itertools.product(TABLE_HIDDEN, TABLE_CALLS):
        rows = results.get(Point("layer", f"{h}-{h}", t, b, 1))
        if rows is None:
            continue
        cells = [digits(rows[name].ms) if name in rows else "-" for name in engines]
        if with_speed_up:
            over = ratio(rows, best_peer(rows), OURS)
            cells.append("-" if over is None else f"{over:.2f}")
        yield [str(h), str(b), str(t), *cells]


def batch_rows(points: Results) -> Iterable[list[str]]:
    """Speed-up over the best by threads and batch."""
    over_best = ratios(points, None, OURS)
    for threads, batch in sorted({(point.threads, point.B) for point in over_best}):
        here = {p: v for p, v in over_best.items() if (p.threads, p.B) == (threads, batch)}
        mean = geometric_mean(here.values())
        roof = roof_over_best(points, here)
        yield [str(threads), str(batch), f"{mean:.2f}", f"{min(here.values()):.2f}", f"{roof:.2f}"]


def roof_over_best(points: Results, at: Iterable[Point]) -> float:
    """Speed-up over the best of a kernel at the roof, geometric mean."""
    best = [points[point][best_peer(points[point]) or ""] for point in at]
    return geometric_mean(1 / row.roofline for row in best)


def by_engine(
    rows: Iterable[Mapping[str, str]], *point: str, by: tuple[str, str] = ("provider", "weights")
) -> Iterable[tuple[tuple[str, ...], dict[tuple[str, str], float]]]:
    """(values of the columns `point`, {values of `by`: milliseconds}) for each such point."""
    points: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        times = points.setdefault(tuple(row[name] for name in point), {})
        times[row[by[0]], row[by[1]]] = float(row["ms_p50"])
    return points.items()


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 100."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def replace_block(path: Path, name: str, block: str) -> None:
    """Put the block between the markers <!-- name:begin --> and <!-- name:end -->."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text()
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"report: expected {marker} once in {path}, got {text.count(marker)}")
    head, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"report: expected {end} after {begin} in {path}")
    path.write_text(f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}")


# -- plot


def plot(results: Results, path: Path) -> None:
    """Speed-up and fraction of the roof by hidden size: T = 30, 1 thread, a line per batch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "iss_kernels"  # ids that do not change from run to run
    from matplotlib import pyplot

    points = select(results, "layer", T=30, threads=1)
    fractions = {p: rows[OURS].roofline for p, rows in points.items() if OURS in rows}
    panels: list[tuple[str, dict[Point, float]]] = [
        ("speed-up over the fastest other engine", ratios(points, None, OURS)),
        ("fraction of the roof", fractions),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        draw(axis, values)
        axis.set_title(f"{title}, float32, T = 30, 1 thread", fontsize=9)
    axes[0].axhline(1, color="gray", linewidth=0.8)
    if points:
        axes[0].legend(title="rows (B)", fontsize=8, title_fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw(axis: Any, values: Mapping[Point, float]) -> None:
    """One panel: a line per batch."""
    for batch in sorted({point.B for point in values}):
        line = sorted((point.H, value) for point, value in values.items() if batch == point.B)
        axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=str(batch))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("hidden size (I = H)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="*")
    parser.add_argument("--plots", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--docs", type=Path, metavar="PATH", help="between its bench markers")
    options = parser.parse_args()
    every = (record("inference", cell) for cell in MODULES)
    for path in options.csv or [path for path in every if path.exists()]:
        results, machine = load(path)
        if not results:
            print(f"report: no rows in {path}", file=sys.stderr)
            return 1
        print("\n".join(summary(results)))
        plot(results, options.plots / f"{path.stem}.svg")
        if options.docs:
            cell = cell_of(results)
            try:
                block = "bench" if cell == "lstm" else f"bench_{cell}"
                replace_block(options.docs, block, markdown(results, machine))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
