# SPDX-License-Identifier: Apache-2.0
"""An LSTM layer and the group Lasso on a GPU against cuDNN and others; check, then time.

python bench/bench_cuda.py [--quick] [--only SERIES ...] [--output CSV] [--plot SVG] ...

    layer   one layer, I = H, over a grid of hidden sizes, batches and steps, forward and training
            (forward and backward), in float32, TF32, bfloat16 and float16, each engine called
            plainly and replayed from a CUDA graph
    lasso   norms and gradient of a language model's weights, beside w.sum(): bandwidth

cuDNN runs behind nn.LSTM, also through torch.compile; FlashRNN and haste where they are installed.
An engine is first held to nn.LSTM in float64: its error may be twice cuDNN's in the same dtype,
plus a floor, or it is reported and not timed. Calls are timed in turn by CUDA events. A row says
which tier the planner chose (csrc/cuda/plan.h): `steps` is the fall-back, a GEMM and a cell a step.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_lasso import Model, Problem
from harness import RESULTS, Row, add_output, machine, output_of, percentiles, write_csv
from roofline import flops
from torch import Tensor, nn

from iss_kernels import ISSLSTM, build_info, explain_plan
from iss_kernels.demo.options import positive, whole
from iss_kernels.testing import assert_no_worse_than_torch

SERIES = ("layer", "lasso")
HIDDEN = (32, 64, 100, 128, 160, 192, 256, 315, 373, 512, 768, 1024, 1500)
BATCH = (1, 8, 16, 32, 64, 128)
STEPS = (1, 128, 1024)
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COMPILED = (64, 256, 1024)  # hidden sizes at which torch.compile is measured: it takes seconds each
LARGE = 2e13  # flops of a call: longer ones are left out

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Point:
    """One line of the grid."""

    H: int
    B: int
    T: int
    precision: str
    training: bool

    @property
    def flops(self) -> int:
        """Of one call: backward has two more products with every weight."""
        return flops((self.H, self.H), self.T, self.B) * (3 if self.training else 1)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def __str__(self) -> str:
        mode = "training" if self.training else "forward"
        return f"{mode} {self.precision} H{self.H} B{self.B} T{self.T}"


def points(options: argparse.Namespace) -> list[Point]:
    """What was asked for, from small to large."""
    if options.quick:
        grid = [(32, 1, 8), (100, 8, 16)]
    else:
        grid = list(itertools.product(options.hidden, options.batch, options.steps))
    every = [Point(*g, p, t) for g in grid for p in options.precisions for t in (False, True)]
    return sorted((p for p in every if p.flops <= LARGE), key=lambda p: p.flops)


# -- engines: what a point's layer becomes


def _cudnn(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    lstm.flatten_parameters()
    return lambda x: lstm(x)[0]


def _ours(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    ours = ISSLSTM.from_torch(lstm)
    return lambda x: ours(x)[0]


def _compiled(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(lstm)
    return lambda x: compiled(x)[0]


def _haste(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    haste = importlib.import_module("haste_pytorch")
    weights = [p.detach() for p in lstm.parameters()]
    layer = haste.LSTM(lstm.input_size, lstm.hidden_size).to(weights[0].device)
    layer.from_native_weights(*weights)
    return lambda x: layer(x)[0]


def _flashrnn(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    """Its recurrence, between torch's product with w_ih and nothing: one head, B first."""
    flashrnn = importlib.import_module("flashrnn").flashrnn
    hidden = lstm.hidden_size
    w_ih, w_hh, b_ih, b_hh = lstm.parameters()
    recurrent, bias = w_hh.view(4, 1, hidden, hidden), torch.zeros_like(b_hh).view(4, 1, hidden)

    def run(x: Tensor) -> Tensor:
        gates = nn.functional.linear(x, w_ih, b_ih + b_hh)
        steps, batch = x.shape[:2]
        gates = gates.transpose(0, 1).reshape(batch, steps, 4, 1, hidden)
        states, _ = flashrnn(gates, recurrent, bias, function="lstm", backend="cuda_fused")
        y: Tensor = states[0].view(batch, steps, hidden).transpose(0, 1)
        return y

    return run


@dataclass(frozen=True)
class Engine:
    """build(lstm) -> x to y; needs: a package; graphs: whether it can be captured."""

    build: Callable[[nn.LSTM], Callable[[Tensor], Tensor]]
    needs: str = "torch"
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    hidden: tuple[int, ...] = ()
    graphs: bool = True

    def runs(self, point: Point) -> bool:
        """Whether it is there, and made for this point."""
        return (
            importlib.util.find_spec(self.needs) is not None
            and point.precision in self.precisions
            and (not self.hidden or point.H in self.hidden)
        )


ENGINES = {
    "nn.LSTM": Engine(_cudnn),
    "ISSLSTM": Engine(_ours),
    "torch.compile": Engine(_compiled, hidden=COMPILED, graphs=False),
    "haste": Engine(_haste, "haste_pytorch", ("float32",), graphs=False),
    "FlashRNN": Engine(_flashrnn, "flashrnn", ("bfloat16", "float16"), graphs=False),
}


# -- measuring a point


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """For torch's products and for cuDNN, which has a switch of its own."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def call_of(
    run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, weights: Sequence[Tensor]
) -> Call:
    """What is timed: y, and where x asks for a gradient those of x and the weights."""

    def call() -> Sequence[Tensor]:
        if not x.requires_grad:
            with torch.no_grad():
                return [run(x)]
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]

    return call


def replayed(call: Call) -> Call:
    """The same from a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return results

    return replay


def calls_of(point: Point, engines: Sequence[str], device: str) -> dict[tuple[str, bool], Call]:
    """Those that compute the right thing, plainly and from a graph; the others are named."""
    # Numbers of a generator of their own: a capture that fails leaves torch's unusable.
    numbers = torch.Generator(device).manual_seed(0)
    both = torch.randn(2, point.T, point.B, point.H, device=device, generator=numbers)
    x64, dy64 = both.to(point.dtype).double()

    def empty(dtype: torch.dtype) -> nn.LSTM:
        return nn.LSTM(point.H, point.H, device="meta", dtype=dtype).to_empty(device=device)

    double = empty(torch.float64)
    with torch.no_grad():  # the same numbers in every dtype
        for p in double.parameters():
            p.uniform_(-(point.H**-0.5), point.H**-0.5, generator=numbers)
            p.copy_(p.to(point.dtype))

    def built(build: Callable[[nn.LSTM], Callable[[Tensor], Tensor]], dtype: torch.dtype) -> Call:
        lstm = empty(dtype)
        lstm.load_state_dict(double.state_dict())
        x = x64.to(dtype).requires_grad_(point.training)
        return call_of(build(lstm), x, dy64.to(dtype), list(lstm.parameters()))

    truth = built(_cudnn, torch.float64)()
    theirs = built(_cudnn, point.dtype)()
    result: dict[tuple[str, bool], Call] = {}
    for name in engines:
        engine = ENGINES[name]
        if not engine.runs(point):
            continue
        for graph in (False, True) if engine.graphs and device == "cuda" else (False,):
            try:
                call = built(engine.build, point.dtype)
                call = replayed(call) if graph else call
                for a, b, t in zip(call(), theirs, truth, strict=True):
                    assert_no_worse_than_torch(a, b, t, floor_eps=64)
            except Exception as reason:  # a peer may fail in any way
                print(f"{name}{' graph' * graph} left out of {point}: {reason}".splitlines()[0])
            else:
                result[name, graph] = call
    return result


def interleaved_ms(
    calls: Mapping[Any, Callable[[], object]], seconds: float, device: str, rounds: int = 5
) -> dict[Any, list[float]]:
    """Milliseconds per call, `rounds` medians each, taken in turn.

    A timing is of so many calls back to back that it lasts a millisecond: what a launch costs the
    host shows where the GPU waits for it.
    """
    result: dict[Any, list[float]] = {name: [] for name in calls}
    repeats = {name: max(1, int(1 / timed(call, 1, device))) for name, call in calls.items()}
    share = 1e3 * seconds / rounds / len(calls)
    for _ in range(rounds):
        for name, call in calls.items():
            timed(call, 1, device)  # warm
            times: list[float] = []
            while sum(times) * repeats[name] < share:
                times.append(timed(call, repeats[name], device))
            result[name].append(statistics.median(times))
    return result


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Milliseconds of a call."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - begin) / repeats
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measure(point: Point, engines: Sequence[str], seconds: float, device: str) -> list[Row]:
    """A row per engine, plainly called and from a graph."""
    with tf32(point.precision == "tf32"):
        calls = calls_of(point, engines, device)
        times = interleaved_ms(calls, seconds * max(1, len(calls)), device)
    plan = explain_plan(
        point.H,
        point.B,
        point.dtype,
        backward=point.training,
        steps=point.T,
        tf32=point.precision == "tf32",
    )
    return [
        row("layer", name, values, precision=point.precision, H=point.H, B=point.B, T=point.T,
            mode="training" if point.training else "forward", graph=int(graph),
            tier=getattr(plan, "tier", "") if name == "ISSLSTM" else "", device=device,
            gflops=f"{point.flops / percentiles(values)[1] / 1e6:.1f}")
        for (name, graph), values in times.items()
    ]  # fmt: skip


def measure_lasso(model: Model, dtype: torch.dtype, seconds: float, device: str) -> list[Any]:
    """Norms and gradient; gbps counts every weight (and gradient) once each way."""
    problem = Problem.of(model, dtype, device)
    problem.check()
    calls: dict[str, Callable[[], object]] = {
        "w.sum()": lambda: [w.sum() for w in problem.weights],
        "norms": problem.our_norms,
        "norms, torch": problem.torch_norms,
        "gradient": lambda: problem.our_gradient(problem.factors),
        "gradient, torch": lambda: problem.torch_gradient(problem.factors),
    }
    moved = {"gradient": 3, "gradient, torch": 3}
    precision = str(dtype).removeprefix("torch.")
    return [
        row("lasso", name, values, precision=precision, H=model.hidden, device=device,
            gbps=f"{moved.get(name, 1) * problem.bytes / percentiles(values)[1] / 1e6:.1f}")
        for name, values in interleaved_ms(calls, seconds * len(calls), device).items()
    ]  # fmt: skip


def row(series: str, engine: str, values: list[float], device: str, **given: object) -> Any:
    """With every column, empty where it says nothing."""
    columns = ("mode", "precision", "H", "B", "T", "graph", "tier", "gflops", "gbps")
    p20, p50, p80 = percentiles(values)
    about = {**machine(), "device": build_info()["gpu"] if device == "cuda" else "cpu"}
    return {
        "series": series, "engine": engine, **{name: given.get(name, "") for name in columns},
        "ms_p50": f"{p50:.5f}", "ms_p20": f"{p20:.5f}", "ms_p80": f"{p80:.5f}",
        **{name: about[name] for name in ("device", "torch", "git", "date")},
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ours and the best of the others at a point, however called."""
    ms = {(r["engine"], int(r["graph"])): float(r["ms_p50"]) for r in rows}
    ours = {k: v for k, v in ms.items() if k[0] == "ISSLSTM"}
    others = {k: v for k, v in ms.items() if k[0] != "ISSLSTM"}
    text = ""
    for times in (ours, others):
        if times:
            name, graph = min(times, key=lambda key: times[key])
            text += f"{name + ' graph' * graph:>20} {times[name, graph]:9.4f} ms"
    if ours and others:
        text += f"{min(others.values()) / min(ours.values()):7.2f}x"
    return text


def speed_ups(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, ...], float]:
    """{(mode, precision, H, B, T): the best other engine's time over ours}, like with like.

    The better of plain calls and calls from a graph, where both sides have them.
    """
    times: dict[tuple[str, ...], dict[tuple[str, bool], float]] = {}
    for r in rows:
        if r["series"] == "layer":
            key = tuple(r[name] for name in ("mode", "precision", "H", "B", "T"))
            way = r["graph"], r["engine"] == "ISSLSTM"
            of_key = times.setdefault(key, {})
            of_key[way] = min(of_key.get(way, float("inf")), float(r["ms_p50"]))
    result = {}
    for key, t in times.items():
        both = [graph for graph in ("0", "1") if (graph, True) in t and (graph, False) in t]
        if both:
            result[key] = min(t[g, False] for g in both) / min(t[g, True] for g in both)
    return result


def report(path: Path, plot: Path | None) -> None:
    """Geometric means by mode and precision, and by steps; how often we lose; and the plot."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ratios = speed_ups(rows)
    groups = sorted({key[:2] for key in ratios})
    for group in groups:
        of_group = {key: value for key, value in ratios.items() if key[:2] == group}
        print(f"{' '.join(group)}: {in_words(of_group)}")
        steps = sorted({int(key[4]) for key in of_group})
        for T in steps if len(steps) > 1 else []:
            of_steps = {key: value for key, value in of_group.items() if int(key[4]) == T}
            print(f"    T{T}: {in_words(of_steps)}")
    if plot is not None and ratios:
        draw(ratios, groups, plot)
        print(f"wrote {plot}")


def in_words(ratios: Mapping[tuple[str, ...], float]) -> str:
    """Of some of the speed-ups."""
    least = min(ratios, key=lambda key: ratios[key])
    behind = sum(value < 0.97 for value in ratios.values())
    return (
        f"geometric mean {statistics.geometric_mean(ratios.values()):.2f}, {behind} of "
        f"{len(ratios)} points below 0.97, least {ratios[least]:.2f} at "
        f"H{least[2]} B{least[3]} T{least[4]}"
    )


def draw(
    ratios: Mapping[tuple[str, ...], float], groups: Sequence[tuple[str, ...]], plot: Path
) -> None:
    """A panel per mode and precision: speed-up over hidden size, a line per batch, longest T."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bench_cuda"  # the same bytes from the same CSV
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(3.2 * len(groups), 3), sharey=True, squeeze=False
    )
    for axis, group in zip(axes[0], groups, strict=True):
        longest = max(int(key[4]) for key in ratios if key[:2] == group)
        of_group = {k: v for k, v in ratios.items() if k[:2] == group and int(k[4]) == longest}
        for batch in sorted({int(key[3]) for key in of_group}):
            line = sorted((int(k[2]), v) for k, v in of_group.items() if int(k[3]) == batch)
            axis.plot(*zip(*line, strict=True), marker=".", label=f"B {batch}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{' '.join(group)}, T {longest}", xscale="log", xlabel="H")
    axes[0][0].set_ylabel("best other engine / ISSLSTM")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(plot, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two shapes, a few seconds")
    add("--only", nargs="+", metavar="SERIES", choices=SERIES, default=SERIES)
    add("--hidden", type=whole, nargs="+", metavar="H", default=HIDDEN)
    add("--batch", type=whole, nargs="+", metavar="B", default=BATCH)
    add("--steps", type=whole, nargs="+", metavar="T", default=STEPS)
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add(
        "--seconds", type=positive, default=0.05, metavar="S", help="per engine and point, at least"
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    add_output(parser)
    add("--plot", type=Path, metavar="SVG", help="default: beside the CSV; needs matplotlib")
    add("--report", action="store_true", help="of a CSV that is there: measures nothing")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not options.report:
        if not torch.cuda.is_available():
            sys.exit("bench_cuda: needs a CUDA device; there is none here")
        if not build_info().get("cuda_built"):
            sys.exit("bench_cuda: needs iss_kernels built with CUDA kernels: make build-cuda")
    name = build_info()["gpu"] if device == "cuda" else "cpu"
    path = output_of(parser, options, RESULTS / f"cuda-{name.replace(' ', '_')}.csv")
    drawable = importlib.util.find_spec("matplotlib") is not None
    plot = (options.plot or path.with_suffix(".svg")) if drawable else None
    if not options.report:
        rows: list[Row] = []
        print(*(f"{key}: {value}" for key, value in build_info().items()), sep="\n")
        with contextlib.suppress(KeyboardInterrupt):  # what is measured so far is written
            for point in points(options) if "layer" in options.only else []:
                new = measure(point, options.engines, options.seconds, device)
                rows += new
                print(f"{point!s:<38}{summary(new)}", flush=True)
            models = [Model(50, 64)] if options.quick else [Model(10_000, 1500), Model(10_000, 650)]
            for model in models if "lasso" in options.only else []:
                for dtype in (torch.float32, torch.bfloat16):
                    rows += measure_lasso(model, dtype, options.seconds, device)
                    print(*(f"{r['engine']} {r['gbps']} GB/s" for r in rows[-5:]), sep=", ")
        if not rows:
            sys.exit("bench_cuda: nothing measured")
        write_csv(path, rows)
        print(f"wrote {path}")
    report(path, plot)


if __name__ == "__main__":
    main()
