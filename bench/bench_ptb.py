# SPDX-License-Identifier: Apache-2.0
"""The language model of the paper's table 1 in its sizes; check, then time.

python bench/bench_ptb.py [--sizes 373,315 ...] [--quick] [--threads N ...] [--output CSV]

Wen et al. (2018, table 1) time the two LSTM layers and the softmax layer over 30 steps of 10 rows:
157.0 ms with 1500 and 1500 units, 14.82 ms with 373 and 315, 22.11 ms with 381 and 535, by Intel
MKL on 24 cores of two Xeon E5-2673 v3. The words' vectors have 1500 numbers in all three. Timed
here in turn: nn.LSTM and nn.Linear, and our prepared model in each format of the weights. float32
is checked against torch's in float64; what is rounded must come near.

Multiply-adds of one step, in million: 4 H1 (1500 + H1) + 4 H2 (H1 + H2) + 10000 H2, 51.0 at 1500
and 1500, 6.8 at 373 and 315.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path

import torch
from harness import RESULTS, interleaved_ms, machine, percentiles, write_csv
from torch import Tensor, nn

import iss_kernels
from iss_kernels.testing import assert_no_worse_than_torch

SIZES = ((1500, 1500), (381, 535), (373, 315))
QUICK = ((40, 30),)
PAPER = {(1500, 1500): 157.0, (381, 535): 22.11, (373, 315): 14.82}  # ms
STEPS, BATCHES, VOCABULARY, EMBEDDING = 30, (10, 1, 64), 10_000, 1500
# Largest error of an answer, which is of the order of 0.3, with rounded weights.
ROUNDED = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}


class Plain(nn.Module):
    """An nn.LSTM for each layer, and the softmax layer."""

    def __init__(self, sizes: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        widths = [EMBEDDING, *sizes]
        self.layers = nn.ModuleList(nn.LSTM(*pair) for pair in zip(widths, sizes, strict=False))
        self.softmax = nn.Linear(sizes[-1], vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, E], the words' vectors. Returns [T, B, V]."""
        for layer in self.layers:
            x = layer(x)[0]
        y: Tensor = self.softmax(x)
        return y


class Ours(nn.Module):
    """One ISSLSTM of several sizes, and the softmax layer, with the weights of a Plain."""

    def __init__(self, plain: Plain, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.lstm, self.softmax = iss_kernels.ISSLSTM(EMBEDDING, sizes, len(sizes)), plain.softmax
        weights = {
            name.replace("_l0", f"_l{i}"): weight
            for i, layer in enumerate(plain.layers)
            for name, weight in layer.state_dict().items()
        }
        self.lstm.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        """As Plain."""
        y: Tensor = self.softmax(self.lstm(x)[0])
        return y


@torch.inference_mode()
def measure(
    sizes: tuple[int, ...], batch: int, threads: int, seconds: float, vocabulary: int
) -> list[dict[str, object]]:
    """A row per engine."""
    torch.manual_seed(0)
    plain = Plain(sizes, vocabulary).eval()
    ours = Ours(plain, sizes).eval()
    x = torch.randn(STEPS, batch, EMBEDDING)
    formats = ("float32", *ROUNDED)
    engines: dict[str, nn.Module] = {"nn.LSTM": plain}
    engines |= {weights: iss_kernels.prepare(ours, weights) for weights in formats}
    double = Plain(sizes, vocabulary).double().eval()
    double.load_state_dict(plain.state_dict())
    truth = double(x.double())
    assert_no_worse_than_torch(engines["float32"](x), plain(x), truth)
    for weights, bound in ROUNDED.items():
        error = (engines[weights](x) - truth).abs().max().item()
        assert error <= bound, f"{weights}: an error of {error:.2g}"
    calls = {name: partial(engine, x) for name, engine in engines.items()}
    rows: list[dict[str, object]] = []
    for name, values in interleaved_ms(calls, seconds).items():
        p20, p50, p80 = percentiles(values)
        rows.append(
            {
                "provider": "torch" if name == "nn.LSTM" else "iss_kernels",
                "weights": "float32" if name == "nn.LSTM" else name,
                "H1": sizes[0], "H2": sizes[-1], "T": STEPS, "B": batch, "threads": threads,
                "ms_p50": f"{p50:.3f}", "ms_p20": f"{p20:.3f}", "ms_p80": f"{p80:.3f}",
                **machine(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", type=lambda s: tuple(map(int, s.split(","))), default=SIZES)
    add("--batch", nargs="+", type=int, default=BATCHES)
    add("--quick", action="store_true", help="one small size, a few seconds")
    add("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    add("--output", type=Path, default=RESULTS / "ptb.csv")
    options = parser.parse_args()
    sizes, batches = (QUICK, (2,)) if options.quick else (options.sizes, options.batch)
    rows: list[dict[str, object]] = []
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    print(f"{'ms, p50':<24}{'nn.LSTM':>9}{'ours':>9}" + "".join(f"{w:>10}" for w in ROUNDED))
    with contextlib.suppress(KeyboardInterrupt):
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            for batch in batches:
                for size in sizes:
                    seconds, vocabulary = (0.3, 50) if options.quick else (10, VOCABULARY)
                    new = measure(size, batch, threads, seconds, vocabulary)
                    rows += new
                    times = "".join(f"{float(str(row['ms_p50'])):10.2f}" for row in new)
                    paper = f"   (paper: {PAPER[size]})" if batch == 10 and size in PAPER else ""
                    print(f"{f'{size} x{threads} B{batch}':<23}{times}{paper}", flush=True)
    if rows:
        write_csv(options.output, rows)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
