# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m iss_kernels demo | bench | info`, also installed as `iss-kernels`.

A wrong argument gets one sentence on stderr and exit code 2. A new command is one function and one
line in COMMANDS.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from iss_kernels import build_info
from iss_kernels.demo.options import needed, whole

Command: TypeAlias = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Any], int]]

# Exit codes: a failed check, wrong usage, and the shell's own for Ctrl-C (128 + SIGINT).
FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="iss_kernels",
        description="Learn which units an LSTM does not need, and take them out.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, (help_text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            allow_abbrev=False,
            add_help=name != "bench",
        )
        add_arguments(command)
        command.set_defaults(run=run, argv=argv)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    code: int = args.run(args)
    return code


# -- info


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def _info(_: argparse.Namespace) -> int:
    info = build_info()
    if info["torch_at_build"] != "unknown":
        same = info["torch_at_build"] == info["torch"]
        info["torch_at_build"] += ", as now" if same else ", another than now"
    width = max(map(len, info))
    for name, value in info.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        print(f"{name.replace('_', ' '):{width}}  {text}")
    return 0


# -- demo


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, 2 minutes instead of 10")
    add("--data", type=Path, metavar="PATH", help="text to learn, in the Penn Treebank form: a "
        "directory, text file or zip (default: the Python language reference)")  # fmt: skip
    add("--output", type=Path, metavar="DIR", default=Path("demo_report"),
        help="where the report goes (default: demo_report)")  # fmt: skip
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on with the run in the output directory")
    either("--fresh", action="store_true", help="begin anew in its place")
    add("--seed", type=int, default=1, metavar="N", help="another start (default: 1)")
    add("--threads", type=whole, metavar="N", help="CPU threads (default: as torch chooses)")


def _demo(args: argparse.Namespace) -> int:
    # Imported here: info must work without the demo's packages.
    try:
        from iss_kernels.demo import show
        from iss_kernels.demo.check import CheckError
        from iss_kernels.demo.checkpoint import ResumeError
        from iss_kernels.demo.run import Demo
    except ModuleNotFoundError as error:
        return _complain(needed(error, "demo"), USAGE)
    import torch

    from iss_kernels.demo import text, training

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = training.QUICK if args.quick else training.FULL
    demo = None
    try:
        # The watcher is off the screen before anything is said below.
        with show.watcher() as watcher:
            demo = Demo(recipe, text.load(args.data), args.seed, args.output, watcher)
            if args.resume:
                demo.resume()
            elif not args.fresh:
                demo.expect_no_run()
            result = demo.run()
        show.print_result(result, args.output)
    except (text.TextError, ResumeError) as error:
        return _complain(str(error), USAGE)
    except OSError as error:
        return _complain(
            f"cannot write to {args.output}: {(error.strerror or str(error)).lower()}", USAGE
        )
    except CheckError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain(_how_to_resume(args, demo is not None and demo.saved), INTERRUPTED)
    return 0


def _how_to_resume(args: argparse.Namespace, saved: bool) -> str:
    if not saved:
        return "interrupted before there was anything to save"
    options = [a for a in args.argv if a not in ("--resume", "--fresh")]
    return f"interrupted; to go on: python -m iss_kernels {shlex.join([*options, '--resume'])}"


def _complain(sentence: str, code: int) -> int:
    print(f"iss_kernels demo: {sentence}", file=sys.stderr)
    return code


# -- bench


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The script has its own, --help among them."""


def _bench(args: argparse.Namespace) -> int:
    script = Path(__file__).parents[1] / "bench" / "bench_inference.py"
    if not script.exists():
        print(f"iss_kernels bench: runs in a source checkout; no {script}", file=sys.stderr)
        return USAGE
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *args.rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0


COMMANDS: dict[str, Command] = {
    "demo": ("do the whole job on real text and write a report", _demo_arguments, _demo),
    "bench": ("check, then time inference against other engines", _bench_arguments, _bench),
    "info": ("tell what was built and what runs", _info_arguments, _info),
}

if __name__ == "__main__":
    sys.exit(main())
