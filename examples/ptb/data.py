# SPDX-License-Identifier: Apache-2.0
"""The Penn Treebank as Mikolov prepared it, checked by its counts."""

from __future__ import annotations

from pathlib import Path

from examples.training import DataError
from iss_kernels.demo.text import PARTS, Text, TextError, load

# Words with one <eos> a line (Mikolov et al. 2010; the files ptb.{train,valid,test}.txt).
WORDS = {"train": 929_589, "valid": 73_760, "test": 82_430}
VOCABULARY = 10_000


def read(path: Path, any_text: bool = False) -> Text:
    """The text in a zip or folder with the three files.

    any_text: whatever text it is. Raises DataError where it is none, or not the Penn Treebank.
    """
    try:
        text = load(path)
    except TextError as error:
        raise DataError(str(error)) from None
    found = {part: len(getattr(text, part)) for part in PARTS}
    if not any_text and (found != WORDS or len(text.vocabulary) != VOCABULARY):
        raise DataError(
            f"expected the Penn Treebank, {_counts(WORDS, VOCABULARY)}, "
            f"got {_counts(found, len(text.vocabulary))} in {path}: --any-text takes it"
        )
    return text


def _counts(words: dict[str, int], vocabulary: int) -> str:
    parts = ", ".join(f"{number:,} {part}" for part, number in words.items())
    return f"{parts} words, {vocabulary:,} different ones"
