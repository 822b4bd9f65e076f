# SPDX-License-Identifier: Apache-2.0
"""What a person sees in the terminal: a progress bar for each stage, then the table of results.

Where the output is no terminal, as in CI, one plain line per epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from iss_kernels.demo.training import Trainer

TITLES = {
    "baseline": "baseline, no lasso",
    "iss": "ISS, with the lasso",
    "tune": "fine-tuning the small one",
}


def units(sizes: list[int]) -> str:
    """[384, 384] -> 384+384."""
    return "+".join(map(str, sizes))


class PlainWatcher:
    """One line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.trainer: Trainer

    def stage(self, name: str, trainer: Trainer) -> None:
        """Begin a stage."""
        self.name, self.trainer = name, trainer
        if 0 < trainer.done < trainer.batches:
            self.note(f"{TITLES[name]}: goes on at batch {trainer.done} of {trainer.batches}")

    def batch(self, trainer: Trainer) -> None:
        """Say nothing."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Print a line."""
        self.note(
            f"{self.name:8} epoch {row['epoch']}/{self.trainer.stage.epochs}"
            f"  perplexity: train {row['train']:.1f}, valid {row['valid']:.1f}"
            f"  units {units(row['alive'])}  {row['seconds']:.0f} s"
        )

    def note(self, text: str) -> None:
        """Print a line."""
        # No markup: paths may hold brackets. No wrapping: a line stays a line in a log.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> PlainWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class BarWatcher(PlainWatcher):
    """A progress bar per stage, with the last epoch's perplexity and units."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description:25}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> PlainWatcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        self.progress.stop()

    def stage(self, name: str, trainer: Trainer) -> None:
        """Add a bar."""
        self.trainer = trainer
        self.task = self.progress.add_task(
            TITLES[name], total=trainer.batches, completed=trainer.done, measured=""
        )
        if trainer.history:
            self.epoch(trainer.history[-1])

    def batch(self, trainer: Trainer) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=trainer.done)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show what the epoch reached."""
        text = (
            f"epoch {row['epoch']}/{self.trainer.stage.epochs} perplexity {row['valid']:.1f} "
            f"units {units(row['alive'])}"
        )
        self.progress.update(self.task, measured=text)


def watcher() -> PlainWatcher:
    """Bars on a terminal, lines elsewhere."""
    console = Console()
    return BarWatcher(console) if console.is_terminal else PlainWatcher(console)


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The results as (what, before, after, comparison), for the terminal and the report."""
    r = result
    better = r["perplexity_after"] / r["perplexity_before"] - 1
    table = [
        ("LSTM units", units(r["hidden_before"]), units(r["hidden_after"]),
         f"{sum(r['hidden_after']) / sum(r['hidden_before']):.0%}"),
        ("LSTM parameters", f"{r['params_before']:,}", f"{r['params_after']:,}",
         f"{r['params_after'] / r['params_before']:.0%}"),
        ("test perplexity", f"{r['perplexity_before']:.2f}", f"{r['perplexity_after']:.2f}",
         f"{better:+.1%}"),
    ]  # fmt: skip
    for batch, speedup in r["speedup"].items():
        one, other = r["torch_ms"][batch], r["iss_ms"][batch]
        table.append(
            (f"30 steps, batch {batch}", f"{one:.2f} ms", f"{other:.2f} ms",
             f"{speedup:.1f}x as fast")
        )  # fmt: skip
    return table


def print_result(result: dict[str, Any], output: Path) -> None:
    """The table, and where the files are."""
    console = Console()
    table = Table(title="One LSTM language model, before and after", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("baseline, nn.LSTM", justify="right")
    table.add_column("after ISS, ISSLSTM", justify="right")
    table.add_column("", justify="right")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    difference = result["max_abs_diff"]
    same = f"by more than {difference:.0e}" if difference else "in a single bit"
    PlainWatcher(console).note(
        f"Taking the dead units out changed no answer {same}."
        f"\nPictures: {output / 'report.html'}   numbers: {output / 'result.json'}"
    )
