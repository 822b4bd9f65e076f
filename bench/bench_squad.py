# SPDX-License-Identifier: Apache-2.0
"""The reader of the paper's tables 3 and 4 in its sizes, one question a call; check, then time.

python bench/bench_squad.py [--quick] [--threads N ...] [--output CSV]
python bench/bench_squad.py --docs examples/squad/README.md    # the table of all machines

Wen et al. (2018) time BiDAF for one question: 6.20 ms with 100 units in each of six LSTM
directions, 2.74 to 5.83 ms with what ISS left. Here it is examples/squad's, with random weights,
for a text of 132 tokens and a question of 11, 88 of them distinct: the medians of SQuAD's dev set.
Timed in turn: torch's LSTMs (two nn.LSTM for the directions of a layer where their sizes differ),
ISSLSTM, and the reader prepared in each format of the weights. float32 is checked against torch's
in float64; what is rounded must come near.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from harness import (
    RESULTS,
    Row,
    command_line,
    each,
    output_of,
    p50,
    record_here,
    recording,
    timed_rows,
)
from report import by_engine, replace_block, wrapped
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import iss_kernels as iss
from examples.squad.model import FAMILIES, BiDAF, example, parameters
from iss_kernels.testing import assert_no_worse_than_torch, max_error

# Units of ModFwd1, ModBwd1, ModFwd2, ModBwd2, OutFwd, OutBwd, and the paper's ms.
PAPER: dict[tuple[int, ...], float] = {
    (100, 100, 100, 100, 100, 100): 6.20,
    (100, 95, 78, 82, 71, 52): 5.79, (84, 90, 38, 46, 34, 21): 4.52,
    (54, 47, 22, 30, 18, 12): 3.54, (52, 50, 19, 26, 15, 12): 3.51,
    (87, 81, 87, 92, 74, 96): 5.83, (51, 33, 42, 58, 37, 26): 4.46,
    (20, 33, 40, 38, 31, 16): 3.59, (23, 22, 35, 35, 25, 14): 2.74,
}  # fmt: skip
HIDDEN, TEXT, QUESTION, DISTINCT = 100, 132, 11, 88
# Largest error of a score relative to the largest score, with rounded weights.
ROUNDED = {"bfloat16": 2e-2, "int8": 5e-2}
# Columns of the table: provider and weights.
COLUMNS = {
    "nn.LSTM": ("nn.LSTM", "float32"),
    "ISSLSTM": ("ISSLSTM", "float32"),
    "float32": ("prepared", "float32"),
    "bfloat16": ("prepared", "bfloat16"),
    "int8": ("prepared", "int8"),
}


class OfTorch(nn.Module):
    """torch's modules with the weights of an ISSLSTM, for calls of one row."""

    def __init__(self, lstm: iss.ISSLSTM) -> None:
        super().__init__()
        self.lstm = lstm.to_torch()

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, object]:
        """As ISSLSTM where the row has all steps."""
        y, state = self.lstm(x)
        return y, state


def plain(reader: BiDAF) -> BiDAF:
    """The same reader on torch's LSTMs."""
    theirs = copy.deepcopy(reader)
    for name, module in reader.named_children():
        if isinstance(module, iss.ISSLSTM):
            setattr(theirs, name, OfTorch(module))
    return theirs


def reader_of(sizes: tuple[int, ...]) -> BiDAF:
    """A reader of these sizes; the phrase layer has all its units, as in the paper."""
    torch.manual_seed(0)
    reader = BiDAF(torch.randn(1000, 100), 1000, 100, HIDDEN).eval()
    groups = iss.find_groups(reader, example())
    # The families of the paper's tables come first.
    keep = {
        family: torch.arange(HIDDEN) < size
        for family, size in zip(FAMILIES.values(), sizes, strict=False)
    }
    keep |= {f.name: torch.ones(f.size).bool() for f in groups.families if f.name not in keep}
    small = iss.shrink(reader, groups, keep=keep)[0]
    assert isinstance(small, BiDAF)
    return small


def question() -> tuple[Tensor, ...]:
    """Inputs of one question: see BiDAF.forward."""
    generator = torch.Generator().manual_seed(1)

    def drawn(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    text = drawn(DISTINCT, 1, TEXT), torch.tensor([TEXT])
    asked = drawn(DISTINCT, 1, QUESTION), torch.tensor([QUESTION])
    return (*text, *asked, drawn(2000, DISTINCT), drawn(100, DISTINCT, 16))


@torch.inference_mode()
def measure(sizes: tuple[int, ...], threads: int, seconds: float) -> list[Row]:
    """A row per engine."""
    reader, inputs = reader_of(sizes), question()
    theirs = plain(reader)
    models: dict[tuple[str, str], nn.Module] = {
        ("nn.LSTM", "float32"): theirs,
        ("ISSLSTM", "float32"): reader,
    }
    models |= {("prepared", w): iss.prepare(reader, w) for w in ("float32", *ROUNDED)}
    calls = {key: partial(model, *inputs) for key, model in models.items()}
    scores = {key: call() for key, call in calls.items()}
    for i, truth in enumerate(copy.deepcopy(theirs).double()(*inputs)):
        for provider in ("ISSLSTM", "prepared"):
            ours, torchs = scores[provider, "float32"][i], scores["nn.LSTM", "float32"][i]
            assert_no_worse_than_torch(ours, torchs, truth)
        for weights, bound in ROUNDED.items():
            error = max_error(scores["prepared", weights][i], truth) / truth.abs().max().item()
            assert error <= bound, f"{weights}: an error of {error:.2g}"
    about = {"sizes": " ".join(map(str, sizes)), "parameters": parameters(reader)}
    about["threads"] = threads
    return timed_rows(calls, seconds, ("provider", "weights"), about)


def table(paths: Iterable[Path]) -> str:
    """One table of all machines, with one thread, and what its columns are."""
    lines = [f"| machine | sizes | parameters | paper | {' | '.join(COLUMNS)} |"]
    lines.append("|:--|:--|" + "--:|" * (len(COLUMNS) + 2))
    for path in paths:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["threads"] == "1"]
        name = f"{rows[0]['device']}, {rows[0]['isa']}"
        for (sizes, count), times in by_engine(rows, "sizes", "parameters"):
            paper = PAPER[tuple(map(int, sizes.split()))]
            cells = (f"{times[key]:.2f}" for key in COLUMNS.values())
            lines.append(
                f"| {name} | {sizes.replace(' ', ', ')} | {int(count) / 1e6:.2f} M "
                f"| {paper:.2f} | {' | '.join(cells)} |"
            )
    about = (
        f"Milliseconds for one question of {QUESTION} tokens on a text of {TEXT}, one thread. The "
        "last three columns are the reader prepared with weights in a format. "
        "`python bench/bench_squad.py`, `bench/results/squad-*.csv`."
    )
    return "\n".join([*lines, "", wrapped(about)])


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one small size, a few seconds")
    parser.set_defaults(threads=[1])
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the table there instead")
    options = parser.parse_args()
    if options.docs:
        replace_block(options.docs, "squad", table(sorted(RESULTS.glob("squad-*.csv"))))
        return
    with recording(output_of(parser, options, record_here("squad"))) as rows:
        for threads in each(options.threads):
            for sizes in [(5, 4, 3, 6, 2, 1)] if options.quick else PAPER:
                new = measure(sizes, threads, 0.3 if options.quick else 4)
                rows += new
                times = ", ".join(f"{r['provider']} {r['weights']} {p50(r):.2f}" for r in new)
                print(f"{sizes} x{threads}: {times} (paper: {PAPER.get(sizes)})", flush=True)


if __name__ == "__main__":
    main()
