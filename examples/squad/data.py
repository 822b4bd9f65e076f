# SPDX-License-Identifier: Apache-2.0
"""Questions in SQuAD's format, as numbers: tokens with their places in the text, words, letters.

Letters: B questions.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from examples.training import DataError

# Words with what is written together but said apart ("n't", "'s"), as vectors of words have them;
# numbers with their points and commas; every other sign alone.
_TOKEN = re.compile(
    r"[^\W\d_]+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s]|_",
    re.IGNORECASE,
)


def tokenise(text: str) -> list[tuple[int, int]]:
    """Where each token of a text starts and ends.

    >>> [text[a:b] for text in ["It isn't 3,000.5."] for a, b in tokenise(text)]
    ['It', 'is', "n't", '3,000.5', '.']
    """
    return [match.span() for match in _TOKEN.finditer(text)]


@dataclass(frozen=True)
class Text:
    """A text and its tokens."""

    text: str
    spans: list[tuple[int, int]]

    @property
    def tokens(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans]

    def between(self, first: int, last: int) -> str:
        """What stands from one token to another, both included."""
        return self.text[self.spans[first][0] : self.spans[last][1]]

    def covering(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and last token of a part of the text; None where it has none."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < end and b > start]
        return (inside[0], inside[-1]) if inside else None


@dataclass(frozen=True)
class Question:
    """A question on a text, and the answers that count as right.

    answer: the first and the last token of the answer that most people gave.
    """

    id: str
    context: Text
    question: Text
    answers: list[str]
    answer: tuple[int, int]


def read_questions(paths: Iterable[Path], exact: bool = True) -> list[Question]:
    """All questions of files in SQuAD's format (version 1.1), plain or gzipped.

    exact: whether every answer must stand where the file says. Raises DataError.
    """
    questions: list[Question] = []
    for path in paths:
        before = len(questions)
        try:
            for context, qa in _paragraphs(path):
                questions.append(_question(path, context, qa, exact))
        except OSError as error:
            why = error.strerror or str(error)
            raise DataError(f"{path}: expected a file to read, got: {why}") from None
        except (EOFError, KeyError, RecursionError, TypeError, ValueError, zlib.error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: expected JSON in the format of SQuAD 1.1, plain or gzipped"
            ) from None
        if len(questions) == before:
            raise DataError(f"{path}: expected questions, got none")
    return questions


def _paragraphs(path: Path) -> Iterator[tuple[Text, Any]]:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    for article in json.loads(raw)["data"]:
        for paragraph in article["paragraphs"]:
            text = _text(paragraph["context"])
            for qa in paragraph["qas"]:
                yield text, qa


def _text(text: str) -> Text:
    return Text(text, tokenise(text))


def _question(path: Path, context: Text, qa: Any, exact: bool) -> Question:
    name, places = qa["id"], Counter[tuple[int, int]]()
    if not isinstance(name, str):
        raise TypeError("an id is text")
    for answer in qa["answers"]:
        start, text = answer["answer_start"], answer["text"]
        stands = context.text[start : start + len(text)]
        if exact and stands != text:
            raise DataError(
                f"{path}: expected the answer {text!r} of question {name} at character {start} "
                f"of its text, got {stands!r}"
            )
        place = context.covering(start, start + len(text))
        if place is not None:
            places[place] += 1
    if not places:
        raise DataError(f"{path}: expected an answer of at least a token to question {name}")
    answers = [answer["text"] for answer in qa["answers"]]
    (place, _), *_ = places.most_common(1)
    return Question(name, context, _text(qa["question"]), answers, place)


def read_vectors(path: Path, words: set[str], width: int) -> dict[str, np.ndarray[Any, Any]]:
    """Vectors of those words that a file in GloVe's format has, plain or gzipped.

    Raises DataError, also where the vectors are not of this width.
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    try:
        with _lines(path) as lines:
            for number, line in enumerate(lines, 1):
                word, _, values = line.rstrip().partition(" ")
                count = values.count(" ") + 1 if values else 0
                if count != width:
                    raise DataError(
                        f"{path}: expected a word and {width} numbers in line {number}, "
                        f"got {count} numbers"
                    )
                if word in words:
                    found[word] = np.array(values.split(" "), dtype=np.float32)
                    if not np.isfinite(found[word]).all():
                        raise DataError(
                            f"{path}: expected finite numbers in line {number}, got {values}"
                        )
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"{path}: expected a file to read, got: {why}") from None
    except (EOFError, UnicodeError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected lines of a word and {width} numbers") from None
    if not found:
        raise DataError(f"{path}: expected vectors of words in the questions, got none of them")
    return found


def _lines(path: Path) -> TextIO:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if gzipped else path.open(encoding="utf-8")


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of words and letters.

    known: words with a vector; own: words that learn theirs. The first two of `known` are padding
    and, with a vector of zeros as well, any other word. Letters 0 and 1 are the same of letters.
    """

    known: list[str]
    own: list[str]
    letters: list[str]

    @classmethod
    def of(
        cls,
        training: Sequence[Question],
        others: Sequence[Question],
        vectors: Iterable[str],
        least: int,
        least_letter: int,
    ) -> Vocabulary:
        """What all questions need: words with vectors, and frequent ones of the training set."""
        counts, letters = Counter[str](), Counter[str]()
        for token, count in _count(training).items():
            counts[token.lower()] += count
            for letter in token:
                letters[letter] += count
        known = sorted((counts.keys() | words_of(others)) & {*vectors})
        own = sorted({word for word, n in counts.items() if n >= least} - {*known})
        seen = sorted(letter for letter, n in letters.items() if n >= least_letter)
        return cls(["", "?", *known], own, ["", "?", *seen])

    def matrix(self, vectors: dict[str, np.ndarray[Any, Any]], width: int) -> Tensor:
        """The vectors of the known words, [N, width]."""
        rows = [vectors[word] for word in self.known[2:]]
        return torch.from_numpy(np.stack([np.zeros((width,), np.float32)] * 2 + rows))


def fingerprint(questions: Sequence[Question], vectors: Tensor) -> str:
    """What tells these questions and vectors from others."""
    told = hashlib.sha256(vectors.numpy().tobytes())
    for q in questions:
        parts = (q.id, q.question.text, q.context.text, *q.answers, str(q.answer))
        told.update("\0".join(parts).encode("utf-8", "surrogatepass"))
    return told.hexdigest()


def words_of(questions: Sequence[Question]) -> set[str]:
    """The words that the questions and their texts hold."""
    return {token.lower() for token in _count(questions)}


def _count(questions: Sequence[Question]) -> Counter[str]:
    """How often each token stands in the questions and in their texts, each text once."""
    texts = {id(q.context): q.context for q in questions}
    return Counter(
        token
        for text in (*texts.values(), *(q.question for q in questions))
        for token in text.tokens
    )


class Encoder:
    """Makes batches of questions."""

    def __init__(self, vocabulary: Vocabulary, letters_of_token: int) -> None:
        both = [*vocabulary.known, *vocabulary.own]
        self.words = {word: i for i, word in enumerate(both) if i > 1}
        self.letters = {letter: i for i, letter in enumerate(vocabulary.letters) if i > 1}
        self.letters_of_token = letters_of_token

    def inputs(self, questions: Sequence[Question]) -> tuple[Tensor, ...]:
        """What the model takes: see BiDAF.forward."""
        numbers = {"": 0}  # of tokens, in the order in which they come; the first is padding
        sides = []
        for texts in ([q.context for q in questions], [q.question for q in questions]):
            lengths = [len(text.spans) for text in texts]
            side = np.zeros((len(texts), max(lengths)), dtype=np.int64)
            for row, text in zip(side, texts, strict=True):
                tokens = text.tokens
                row[: len(tokens)] = [numbers.setdefault(token, len(numbers)) for token in tokens]
            sides += [torch.from_numpy(side), torch.tensor(lengths)]
        words = [self.words.get(token.lower(), 1) for token in numbers]
        letters = np.zeros((len(numbers), self.letters_of_token), dtype=np.int64)
        for row, token in zip(letters, numbers, strict=True):
            seen = [self.letters.get(letter, 1) for letter in token[: self.letters_of_token]]
            row[: len(seen)] = seen
        return (*sides, torch.tensor(words), torch.from_numpy(letters))

    def targets(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """First and last tokens of the answers, [B] each."""
        first, last = zip(*(q.answer for q in questions), strict=True)
        return torch.tensor(first), torch.tensor(last)


def short_enough(
    questions: Sequence[Question], context_tokens: int, question_tokens: int
) -> list[Question]:
    """The questions whose text and own tokens are at most so many."""
    return [
        q for q in questions
        if len(q.context.spans) <= context_tokens and 0 < len(q.question.spans) <= question_tokens
    ]  # fmt: skip


def batches(
    questions: Sequence[Question], size: int, order: torch.Generator | None = None
) -> list[list[Question]]:
    """Batches of questions with texts of similar lengths, in an order that is drawn.

    Without `order` all questions, the longest texts first. With it, what does not fill a batch is
    left out, another part every time.
    """
    keys = (
        torch.zeros(len(questions))
        if order is None
        else torch.rand(len(questions), generator=order)
    )
    lengths = torch.tensor([float(len(q.context.spans)) for q in questions])
    # Texts of almost one length are mixed, so that no batch comes twice.
    ranked = (-(lengths + 16 * keys)).argsort(stable=True).tolist()
    made = [[questions[i] for i in ranked[at : at + size]] for at in range(0, len(ranked), size)]
    if order is None:
        return made
    full = [batch for batch in made if len(batch) == size]
    return [full[i] for i in torch.randperm(len(full), generator=order).tolist()]
