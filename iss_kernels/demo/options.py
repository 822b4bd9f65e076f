# SPDX-License-Identifier: Apache-2.0
"""Values of options: types for argparse, whose errors are one sentence."""

from __future__ import annotations

import argparse
import contextlib
import math


def whole(text: str) -> int:
    """A whole number from 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number in (0, inf)."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in (0, inf), got {text!r}")
