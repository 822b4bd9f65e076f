# SPDX-License-Identifier: Apache-2.0
"""The least time a recurrent network can take on this machine, from peak and read bandwidth.

For a stack of LSTMs whose layer has I inputs and H hidden units, T steps and B rows (a GRU has 3
rows of weights for each unit where the LSTM has 4, an RNN 1):

    flops   = 2 T B 4H (I + H), summed over layers
    compute = flops / peak
    read    = weights / bandwidth(weights)                                           where T = 1
            = sum over layers of  w_ih / bandwidth(weights) + T w_hh / bandwidth(w_hh)    T > 1
    roof    = max(compute, read)

weights is the stack in bytes, w_ih = 4H I and w_hh = 4H H those of a layer; w_ih serves all steps
of a call, w_hh is read again in each. A training step (T > 1 or not) has three products with every
weight, so 3 flops; its backward reads w_hh again in each step, w_ih once more, and writes a
gradient of each:

    read    = sum over layers of  3 w_ih / bandwidth(weights) + (2 T + 1) w_hh / bandwidth(w_hh)

Where the input needs no gradient, the first layer has two products with w_ih, which is read once.

Every step counts, also a first one from zeros, whose product with w_hh may be left out.

bandwidth(n) is that of reading n bytes over and over: benchmarks call a function again and again,
so it is the bandwidth of the cache that holds them. peak is the rate of float32 FMA, also for
float16, which is widened; bfloat16 and int8 have their own where the CPU has units for them. An
int8 without one has `read` alone for a roof. Activations are left out: the roof is a bound from
below.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Roofline:
    """gflops: float32 FMA; reads: (working set in bytes, GB/s), from small to large; peaks: GFLOP/s
    of bfloat16 and int8, where there are units for them."""

    gflops: float
    reads: tuple[tuple[int, float], ...]
    peaks: Mapping[str, float]

    def peak(self, precision: str) -> float:
        """GFLOP/s of products in a precision."""
        return self.peaks.get(precision, math.inf if precision == "int8" else self.gflops)

    def gbytes_per_s(self, size: float) -> float:
        """Read bandwidth of a working set of so many bytes, interpolated in log2."""
        below = (self.reads[0][0], self.reads[0][1])
        for above in self.reads:
            if size <= above[0] and below != above:
                at = math.log2(max(size, below[0]) / below[0]) / math.log2(above[0] / below[0])
                return below[1] + at * (above[1] - below[1])
            below = above
        return below[1]

    def ms(
        self, layers: Sequence[int], steps: int, batch: int, weights: str, gates: int = 4
    ) -> float:
        """The roof of a stack: layers = (inputs, hidden units of each layer ...)."""
        item = ITEMSIZE[weights]
        sizes = list(zip(layers, layers[1:], strict=False))
        total = sum(gates * h * (i + h) for i, h in sizes) * item
        if steps == 1:
            read = total / self.gbytes_per_s(total)
        else:
            w_ih = sum(gates * h * i for i, h in sizes) * item
            read = w_ih / self.gbytes_per_s(total)
            for _, h in sizes:
                w_hh = gates * h * h * item
                read += steps * w_hh / self.gbytes_per_s(w_hh)
        compute = flops(layers, steps, batch, gates) / self.peak(weights)
        return max(compute, read) / 1e6

    def training_ms(
        self,
        layers: Sequence[int],
        steps: int,
        batch: int,
        input_gradient: bool = True,
        gates: int = 4,
        precision: str = "float32",
    ) -> float:
        """The roof of a forward and a backward pass."""
        item = ITEMSIZE[precision]
        sizes = list(zip(layers, layers[1:], strict=False))
        total = sum(gates * h * (i + h) for i, h in sizes) * item
        w_ih = 3 * sum(gates * h * i for i, h in sizes) * item
        if not input_gradient:
            w_ih -= gates * layers[1] * layers[0] * item
        read = w_ih / self.gbytes_per_s(total)
        for _, h in sizes:
            w_hh = gates * h * h * item
            read += (2 * steps + 1) * w_hh / self.gbytes_per_s(w_hh)
        operations = training_flops(layers, steps, batch, input_gradient, gates)
        arithmetic = operations / self.peak(precision)
        return max(arithmetic, read) / 1e6


def flops(layers: Sequence[int], steps: int, batch: int, gates: int = 4) -> int:
    """A multiply and an add for each weight, step and row."""
    weights = sum(gates * h * (i + h) for i, h in zip(layers, layers[1:], strict=False))
    return 2 * steps * batch * weights


def training_flops(
    layers: Sequence[int], steps: int, batch: int, input_gradient: bool, gates: int = 4
) -> int:
    """Of a forward and a backward pass: three products with each weight, step and row."""
    of_input = 0 if input_gradient else 2 * steps * batch * gates * layers[1] * layers[0]
    return 3 * flops(layers, steps, batch, gates) - of_input


@functools.cache
def roofline(threads: int) -> Roofline:
    """Measure this machine: a few seconds."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "roofline"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
        run = subprocess.run(
            [str(program), str(threads)], check=True, capture_output=True, text=True
        )
    lines = [line.split(",") for line in run.stdout.splitlines()]
    peaks = {kind: float(rate) for kind, _, rate in lines if kind != "read"}
    rates = [(int(size), float(rate)) for kind, size, rate in lines if kind == "read"]
    # A smaller set is never read slower: a dip is another process's doing.
    reads = [(size, max(rate for _, rate in rates[i:])) for i, (size, _) in enumerate(rates)]
    return Roofline(peaks.pop("fma"), tuple(reads), peaks)


if __name__ == "__main__":
    for count in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
        measured = roofline(count)
        peaks = {"float32": measured.gflops, **measured.peaks}
        print(f"{count} threads: " + ", ".join(f"{n:.0f} GFLOP/s {p}" for p, n in peaks.items()))
        for size, rate in measured.reads:
            print(f"{size / 1024:10.0f} KB {rate:8.1f} GB/s")
