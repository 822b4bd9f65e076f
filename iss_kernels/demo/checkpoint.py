# SPDX-License-Identifier: Apache-2.0
"""Files that are whole at any moment, checkpoints that are checked, and a Ctrl-C that can wait."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# A checkpoint ends with the SHA-256 of what comes before, which torch.load leaves aside: by itself
# it accepts changed bytes, and what it read may lack a key or have another shape.
_DIGEST_BYTES = 32


class ResumeError(ValueError):
    """There is no checkpoint to go on from, or not one of this run; or a run is in the way."""


def expect_no_run(folder: Path, names: Iterable[str], otherwise: str = "") -> None:
    """Raises ResumeError where a folder has one of the files that a run writes.

    otherwise: the options that take such a folder, ", or --resume".
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise ResumeError(
                f"expected a folder without a run{otherwise}, got {folder}, which has {name}"
            )


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; the former one stays until it is whole."""
    file = io.BytesIO()
    torch.save(content, file)
    write(path, file.getvalue() + _digest(file.getvalue()))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises ResumeError, one sentence, where that is not what is there."""
    try:
        if not path.exists():
            raise ResumeError(f"no checkpoint to resume from: {path}")
        # A directory cannot be read, and a pipe may never end.
        found = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ResumeError(f"cannot read {path}: {reason}") from None
    saved, digest = found[:-_DIGEST_BYTES], found[-_DIGEST_BYTES:]
    if _digest(saved) != digest:
        raise ResumeError(f"{path} is not a whole checkpoint")
    content: dict[str, Any] = torch.load(io.BytesIO(saved), weights_only=True)
    return content


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, whatever stops the program or the machine."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    # The new name lasts when the directory is on the disk; not every system can ask for that.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def interrupts(patient: bool = False) -> Iterator[list[int]]:
    """Collect the first Ctrl-C in a list instead of raising it; a second one does not wait.

    patient: a second one waits too, and SIGTERM: torchrun sends its processes what it gets itself,
    after the terminal did.
    """
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        if not patient:
            signal.signal(number, former[number])

    numbers = (signal.SIGINT, signal.SIGTERM) if patient else (signal.SIGINT,)
    former = {int(number): signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
