# SPDX-License-Identifier: Apache-2.0
"""The command lines of the examples: every field of a recipe is an option."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from examples.training import CHECKPOINT, DataError, processes
from iss_kernels.demo.checkpoint import ResumeError
from iss_kernels.demo.options import needed

Recipe = TypeVar("Recipe")
MAY_BE_ZERO = ("hold", "after", "until", "warmup")  # of a recipe's whole numbers
MAY_BE_NEGATIVE = ("bias", "phrase_strength")  # of its other numbers
SHARES = (  # in [0, 1)
    "average", "ema", "momentum", "target", "weight_drop", "drop_word", "drop_input", "drop_state",
    "drop_output",
)  # fmt: skip
LARGEST = 1e37  # Adam's first step is ten times the rate, and float32 ends at 3.4e38
UNPENALISED = ("baseline", "direct")  # methods
# {option: those of which it needs one to have an effect}
NEEDS = {
    "factors": ("strength",), "proximal": ("strength",), "warmup": ("strength",),
    "phrase_strength": ("strength",), "until": ("strength", "l1"), "horizon": ("target",),
}  # fmt: skip
INTERRUPTED, USAGE, FAILED = 130, 2, 1
# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, line by line."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Options of every run."""
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --output")
    add("--seed", type=int, default=1, metavar="N", help="of all random numbers (default: 1)")
    add_torch(parser)


def add_torch(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Options of torch, which `main` sets."""
    add = parser.add_argument
    default = "its own choice" if threads is None else threads
    add(
        "--threads", type=int, default=threads, metavar="N",
        help=f"threads of torch (default: {default})",
    )  # fmt: skip
    add(
        "--matmul-precision", choices=("highest", "high", "medium"), default="highest",
        help="of torch.set_float32_matmul_precision (default: %(default)s)",
    )  # fmt: skip


def add_recipe(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """An option for each field of a dataclass; those not given are None."""
    hints = get_type_hints(kind)
    group = parser.add_argument_group("recipe", "each number of it, in the place of the config's")
    for field in dataclasses.fields(kind):
        option, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        text = field.metadata.get("help")
        if hint is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        elif hint in (int, float, str):
            group.add_argument(option, type=hint, help=text, metavar=hint.__name__.upper())
        elif hint == tuple[int, ...]:
            group.add_argument(option, type=int, nargs="+", help=text, metavar="INT")
        else:  # tuple[tuple[str, float], ...]
            group.add_argument(option, type=_factor, nargs="+", help=text, metavar="NAME=FACTOR")


def _factor(text: str) -> tuple[str, float]:
    name, _, factor = text.rpartition("=")
    with contextlib.suppress(ValueError):
        if name and 0 <= float(factor) < math.inf:
            return name, float(factor)
    raise argparse.ArgumentTypeError(f"expected NAME=FACTOR with a factor in [0, inf), got {text}")


def changed(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the options that were given.

    Raises DataError for numbers outside their interval, and for options that have no effect or the
    opposite one beside the others.
    """
    names = [field.name for field in dataclasses.fields(recipe)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(name, number)
    new = dataclasses.replace(recipe, **given)  # type: ignore[type-var]
    if getattr(new, "relax", 0) and not getattr(new, "until", 0):
        raise DataError("expected --relax with --until, after which it counts")
    if getattr(new, "target", 0):
        if not new.strength:  # type: ignore[attr-defined]
            raise DataError("expected --target with --strength > 0, where it starts, got 0")
        if new.until:  # type: ignore[attr-defined]
            raise DataError(
                "expected --target without --until: the penalty ends once it is reached"
            )
    _check_effects(new, given, getattr(args, "method", None))
    return new


def _check(name: str, number: float) -> None:
    """Raises DataError for a number of a recipe outside its interval."""
    least = 0 if name in MAY_BE_ZERO or isinstance(number, float) else 1
    interval, inside = f"[{least}, inf)", least <= number < math.inf
    if name == "keep":
        interval, inside = "(0, 1]", 0 < number <= 1
    elif name in SHARES:
        interval, inside = "[0, 1)", 0 <= number < 1
    elif name in MAY_BE_NEGATIVE:
        interval, inside = "(-inf, inf)", math.isfinite(number)
    if not inside:
        raise DataError(f"expected {_option(name)} in {interval}, got {number}")
    if isinstance(number, float) and abs(number) > LARGEST:
        raise DataError(f"expected {_option(name)} of at most {LARGEST:g}, got {number:g}")


def _check_effects(new: Any, given: dict[str, Any], method: str | None) -> None:
    """Raises DataError for an option that was given and has no effect beside the others."""
    families = [family for family, _ in getattr(new, "factors", ())]
    for family in families:
        if families.count(family) > 1:
            raise DataError(f"expected --factors with each family once, got {family} twice")
    for name in ("strength", "l1"):
        if method in UNPENALISED and getattr(new, name, None):
            raise DataError(
                f"expected --method {method} without the penalty of {_option(name)}, "
                f"got {getattr(new, name)}"
            )
    for name, others in NEEDS.items():
        value = given.get(name)
        # A negative --phrase-strength is none.
        effective = value is not None and (value > 0 if isinstance(value, float) else bool(value))
        if effective and not any(getattr(new, other, None) for other in others):
            those = " or ".join(map(_option, others))
            raise DataError(f"expected {_option(name)} with {those} > 0, without which it is idle")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_range(option: str, number: int, least: int, end: int) -> None:
    """Raises DataError for a whole number outside [least, end)."""
    if not least <= number < end:
        raise DataError(f"expected {option} in [{least}, {end}), got {number}")


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bits of a run beside its recipe and its data.

    The numbers of a product depend on the number of threads.
    """
    return {
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "matmul_precision": args.matmul_precision,
    }


def main(name: str, run: Callable[[], None], args: argparse.Namespace) -> int:
    """Run an example; what a person can mend is one sentence on stderr.

    args: those of `add_run` and `add_torch` have their effect here.
    """
    keep_freed_memory()
    try:
        if "matmul_precision" in args:
            torch.set_float32_matmul_precision(args.matmul_precision)
            if args.threads is not None:
                check_range("--threads", args.threads, 1, 1025)
                torch.set_num_threads(args.threads)
        for seed in [args.seed] if "seed" in args else getattr(args, "seeds", []):
            check_range("--seed", seed, 0, 2**63)
        with processes():
            run()
    except (DataError, ResumeError) as error:
        return _complain(name, str(error), USAGE)
    except OSError as error:
        named = isinstance(error.filename, (str, bytes, os.PathLike))
        where = os.fsdecode(error.filename if named else getattr(args, "output", "the output"))
        reason = (error.strerror or str(error)).lower()
        return _complain(name, f"cannot write {where}: {reason}", FAILED)
    except KeyboardInterrupt:
        return _complain(name, _stopped(args), INTERRUPTED)
    except ModuleNotFoundError as error:
        return _complain(name, needed(error, "examples"), USAGE)
    return 0


def _stopped(args: argparse.Namespace) -> str:
    if "resume" in args and (args.output / CHECKPOINT).exists():
        return "stopped; --resume goes on"
    return "stopped before there was anything to save"


def results(paths: Sequence[Path], example: str) -> list[dict[str, Any]]:
    """The results of runs of an example. Raises DataError where a file is none."""
    read = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise DataError(f"cannot read {path}: {why}") from None
        except (ValueError, RecursionError):
            raise DataError(f"expected {path} of JSON, as a run writes it") from None
        try:
            its = result["options"]["example"]
        except (TypeError, KeyError):
            raise DataError(f"expected the result of a run in {path}, got other JSON") from None
        if its != example:
            raise DataError(f"expected a result of examples.{example} in {path}, got one of {its}")
        read.append(result)
    return read


def keep_freed_memory() -> None:
    """Have glibc keep the memory of large tensors that are freed, for the next batch.

    By default it goes back to the system. For 400 x 10000 logits, forward and backward, fresh pages
    cost a fifth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _complain(name: str, sentence: str, code: int) -> int:
    print(f"{name}: {sentence}", file=sys.stderr)
    return code
