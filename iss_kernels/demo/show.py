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

from iss_kernels.demo.text import printable
from iss_kernels.demo.timing import ENGINES
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


HEADINGS = ("", *ENGINES.values())


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The results in the columns of HEADINGS, for the terminal and the report."""
    r = result
    before, after = units(r["hidden_before"]), units(r["hidden_after"])
    perplexities = [r[f"perplexity_{name}"] for name in ("before", "after", "after", "int8")]
    table: list[tuple[str, ...]] = [
        ("LSTM units", before, after, after, after),
        ("LSTM parameters", f"{r['params_before']:,}", *[f"{r['params_after']:,}"] * 3),
        ("test perplexity", *(f"{value:.2f}" for value in perplexities)),
    ]
    noisy = " (noisy)" if r["noisy"] else ""
    for batch in r["speedup"]:
        times = [r[engine][batch] for engine in ENGINES]
        table += [
            (f"30 steps, batch {batch}", *(f"{ms:.2f} ms" for ms in times)),
            (f"speed-up, batch {batch}{noisy}", *(f"{times[0] / ms:.1f}x" for ms in times)),
        ]
    return table


NOISY = (
    "The machine was busy while the models were timed, so the speed-ups above may mislead; run "
    "again when it is idle (with --resume nothing is trained)."
)


def sooner(result: dict[str, Any]) -> str:
    """How long the model that shrinks learned, against the one that does not."""
    before, after = result["seconds_before"], result["seconds_after"]
    share = 1 - after / before if before else 0.0
    when = "sooner" if share >= 0 else "later"
    return (
        f"Learning took {after:.0f} s, as units that die leave on the way, against {before:.0f} s "
        f"of the baseline over as much text: {abs(share):.0%} {when}."
    )


def print_result(result: dict[str, Any], output: Path) -> None:
    """The table, and where the files are."""
    console = Console()
    table = Table(title="One LSTM language model, before and after", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    difference = result["max_abs_diff"]
    same = f"by more than {difference:.0e}" if difference else "in a single bit"
    say = PlainWatcher(console).note
    if result["noisy"]:
        say(NOISY)
    say(sooner(result))
    folder = printable(output)
    say(
        f"Taking the dead units out changed no answer {same}."
        f"\nPictures: {folder}/report.html   numbers: {folder}/result.json"
    )
