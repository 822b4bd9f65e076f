# SPDX-License-Identifier: Apache-2.0
"""What command lines share: types of options, whose errors are one sentence, and packages."""

from __future__ import annotations

import argparse
import contextlib
import math


def needed(error: ModuleNotFoundError, extra: str) -> str:
    """What to type where a package of an extra is not there. Raises the error of another one."""
    package = (error.name or "").partition(".")[0]
    if package not in ("rich", "matplotlib", "jinja2"):
        raise error
    return f"needs the package {package}; type: pip install 'iss_kernels[{extra}]'"


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
