# SPDX-License-Identifier: Apache-2.0
"""Words to train on: the text that ships inside Python, or the user's in the Penn Treebank form.

Both become three tensors of word numbers. The vocabulary comes from the training part alone; every
other word is <unk>.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import platform
import random
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

PARTS = ("train", "valid", "test")
UNKNOWN, END = "<unk>", "<eos>"
# A word seen once or twice in training cannot be learned: it becomes <unk>.
MIN_COUNT = 3
# Valid and test get this share each; about 7k words of the default text, enough for a perplexity
# that is stable to a few per cent.
HELD_OUT = 0.08
# The training loop cuts its text into 20 strips and the evaluation into 10: less is no text.
MIN_TOKENS = {"train": 2000, "valid": 200, "test": 200}
# Ten times the Penn Treebank. Words take some 20 times the memory of their text.
MAX_BYTES = 64 << 20  # of each file, unpacked
MAX_FILES = 100_000  # in a directory

# Names, numbers, and runs of one sign, such as ** and ...; those that only draw a line are dropped.
_WORD = re.compile(r"[A-Za-z_]+|\d+|([^\w\s])\1*")
_RULER = re.compile(r"([*=~^+-])\1{3,}")


class TextError(ValueError):
    """The text cannot be used; the message is one sentence for the person who gave it."""


@dataclass(frozen=True)
class Text:
    """Word numbers of three parts, int64 [N] each, and the words they stand for."""

    description: str
    vocabulary: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def fingerprint(self) -> str:
        """Differs where any word of the text differs: what a checkpoint is compared by."""
        digest = hashlib.sha256("\n".join(self.vocabulary).encode())
        for part in (self.train, self.valid, self.test):
            digest.update(f"\n{len(part)}\n".encode() + part.numpy().tobytes())
        return digest.hexdigest()[:16]


def load(path: Path | None = None) -> Text:
    """The text at `path`, or without one the English text of the Python language reference.

    path: a directory or zip with one file for each of train, valid and test in its name (at any
    depth), or one text file, whose lines are split 84 : 8 : 8. Words stand between spaces, a line
    is a sentence. A file may have MAX_BYTES. Raises TextError with one sentence where there is no
    such text.
    """
    if path is None:
        return _text(
            f"the language reference inside Python {platform.python_version()}", *_topics()
        )
    try:
        parts = _read(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TextError(f"cannot read {path}: {reason}") from None
    words = [[w for line in part for w in (*line.split(), END)] for part in parts]
    return _text(printable(path), *words)


def printable(path: Path) -> str:
    """A path as text in UTF-8, which a file's name need not be."""
    return os.fsencode(path).decode(errors="replace")


def _text(description: str, train: list[str], valid: list[str], test: list[str]) -> Text:
    for name, words in zip(PARTS, (train, valid, test), strict=True):
        if len(words) < MIN_TOKENS[name]:
            raise TextError(
                f"expected at least {MIN_TOKENS[name]} words to {_PURPOSE[name]}, "
                f"got {len(words)} in {description}"
            )
    counts = collections.Counter(train)
    # Text that already has <unk> went through this choice before, as the Penn Treebank did.
    least = 1 if UNKNOWN in counts else MIN_COUNT
    known = sorted(word for word, count in counts.items() if count >= least and word != UNKNOWN)
    vocabulary = [UNKNOWN, *known]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    encoded = (torch.tensor([numbers.get(w, 0) for w in part]) for part in (train, valid, test))
    return Text(description, vocabulary, *encoded)


_PURPOSE = {"train": "train on", "valid": "validate on", "test": "test on"}


# -- the default text


def _topics() -> tuple[list[str], list[str], list[str]]:
    """pydoc_data.topics by topic: train, valid, test.

    Topics repeat whole passages of each other, which would leak training text into the test: a
    paragraph counts only where it comes first.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            "this Python comes without pydoc_data, the default text: give another with --data"
        ) from None
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        document: list[str] = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key not in seen and re.search(r"\w", key):
                seen.add(key)
                document += [*_words(key.lower()), END]
        documents.append(document)
    random.Random(0).shuffle(documents)
    total = sum(map(len, documents))
    train: list[str] = []
    valid: list[str] = []
    test: list[str] = []
    for document in documents:
        # One long topic must not be all of a held-out part.
        short = len(document) < total * HELD_OUT / 2
        for part in (test, valid):
            if short and len(part) + len(document) <= total * HELD_OUT:
                part += document
                break
        else:
            train += document
    return train, valid, test


def _words(paragraph: str) -> list[str]:
    return [match[0] for match in _WORD.finditer(paragraph) if not _RULER.fullmatch(match[0])]


# -- the user's text


# A file's content; called with the name that an error gives the file.
_Reader = Callable[[str], bytes]


def _read(path: Path) -> list[list[str]]:
    """Lines of train, valid and test."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        inside = list(itertools.islice(path.rglob("*"), MAX_FILES + 1))
        if len(inside) > MAX_FILES:
            raise TextError(f"expected at most {MAX_FILES} files in {path}, got more")
        return _choose(
            path, {str(f.relative_to(path)): partial(_from_disk, f) for f in inside if f.is_file()}
        )
    # To read a device, pipe or socket may never end.
    if not stat.S_ISREG(mode):
        raise TextError(f"expected a text file, zip or directory, got another kind of file: {path}")
    if path.suffix.lower() != ".zip":
        return _split(_lines(str(path), _from_disk(path, str(path))))
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                return _choose(
                    path, {info.filename: partial(_unzip, archive, info) for info in members}
                )
        except TextError:
            raise
        # zipfile, zlib, bz2 and lzma have no common error for what is damaged or encrypted.
        except Exception:
            raise TextError(f"{path} is not a zip file that can be read") from None


def _from_disk(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        return _all(file, name)


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> bytes:
    if info.file_size > MAX_BYTES:
        raise _too_large(name)
    with archive.open(info) as file:
        if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return _all(file, name)
        # Only those two are unpacked no further than asked for. 45 bytes of bzip2 can hold 46 MB,
        # whatever the header says: take few at a time.
        file.MIN_READ_SIZE = 64  # type: ignore[attr-defined]
        return _all(file, name, step=64)


def _all(file: IO[bytes], name: str, step: int = 1 << 16) -> bytes:
    """What is left in a file, in steps: its size may be unknown or wrong."""
    content = bytearray()
    while piece := file.read(step):
        content += piece
        if len(content) > MAX_BYTES:
            raise _too_large(name)
    return bytes(content)


def _too_large(name: str) -> TextError:
    return TextError(f"expected at most {MAX_BYTES >> 20} MiB of text, got more in {name}")


def _choose(path: Path, files: Mapping[str, _Reader]) -> list[list[str]]:
    """Find the three parts by file name, or split the only file."""
    # Archives made on a Mac carry a hidden shadow of every file.
    visible = {
        name: read for name, read in files.items()
        if not any(part.startswith((".", "__")) for part in Path(name).parts)
    }  # fmt: skip
    parts = []
    for part in PARTS:
        # The plainest name: ptb.train.txt rather than ptb.char.train.txt beside it.
        names = sorted(
            (n for n in visible if part in Path(n).name.lower()), key=lambda n: (len(n), n)
        )
        if names:
            name = f"{names[0]} in {path}"
            parts.append(_lines(name, visible[names[0]](name)))
        elif len(visible) == 1:
            ((only, read),) = visible.items()
            return _split(_lines(f"{only} in {path}", read(f"{only} in {path}")))
        else:
            raise TextError(f"expected a file with {part!r} in its name in {path}, found none")
    return parts


def _lines(name: str, content: bytes) -> list[str]:
    """Lines that are not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TextError(f"{name} is not text in UTF-8") from None
    if "\0" in text:
        raise TextError(f"{name} is not text in UTF-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise TextError(f"{name} is empty")
    return lines


def _split(lines: list[str]) -> list[list[str]]:
    """Cut lines into train, valid and test, in this order, so that neighbours stay together."""
    held_out = int(len(lines) * HELD_OUT)
    end = len(lines) - 2 * held_out
    return [lines[:end], lines[end : end + held_out], lines[end + held_out :]]
