# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: a progress bar on a terminal, a line for each epoch elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.training import Trainer


class Lines:
    """A line for each epoch: for logs."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console

    def batch(self) -> None:
        """Say nothing."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        seconds = self.trainer.epochs - row["epoch"], row["seconds"]
        self.console.print(
            f"epoch {row['epoch']}/{self.trainer.epochs}  {self.described(row)}  "
            f"{row['seconds']:.0f} s, {math.prod(seconds) / 60:.0f} min to go",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    @staticmethod
    def described(row: Mapping[str, Any]) -> str:
        """What an epoch reached."""
        left = ("epoch", "rate", "loss", "units", "parameters", "seconds", "cpu_seconds")
        measured = " ".join(f"{k} {v:.2f}" for k, v in row.items() if k not in left)
        return f"{measured}  units {'+'.join(map(str, row['units'].values()))}"

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class Bar(Lines):
    """A progress bar: for a terminal."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        super().__init__(trainer, console)
        self.progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        text = self.described(trainer.history[-1]) if trainer.history else ""
        self.task = self.progress.add_task(text, total=trainer.batches, completed=trainer.done)

    def batch(self) -> None:
        self.progress.update(self.task, completed=self.trainer.done)

    def epoch(self, row: Mapping[str, Any]) -> None:
        text = f"epoch {row['epoch']}/{self.trainer.epochs} {self.described(row)}"
        self.progress.update(self.task, description=text)

    def __enter__(self) -> Lines:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def progress(trainer: Trainer, first: bool) -> Lines:
    """Of a trainer; nothing where the process is not the first one."""
    console = Console(quiet=not first)
    return Bar(trainer, console) if console.is_terminal else Lines(trainer, console)
