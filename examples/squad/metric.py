# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 of answers, as SQuAD 1.1 defines them (Rajpurkar et al. 2016, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text in lower case, without punctuation, articles and more than one space.

    >>> normalised("The  U.S. dollar!")
    'us dollar'
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, right: Iterable[str]) -> float:
    """1 where the answer is one of the right ones, else 0."""
    return float(normalised(answer) in {normalised(one) for one in right})


def f1(answer: str, right: Iterable[str]) -> float:
    """The overlap of words with the right answer that is nearest, from 0 to 1.

    >>> f1("the red fox", ["fox", "a quick red fox"])
    0.8
    """
    return max(_overlap(normalised(answer).split(), normalised(one).split()) for one in right)


def _overlap(one: list[str], two: list[str]) -> float:
    common = sum((Counter(one) & Counter(two)).values())
    return 2 * common / (len(one) + len(two)) if common else 0.0
