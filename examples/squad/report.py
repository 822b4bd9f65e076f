# SPDX-License-Identifier: Apache-2.0
"""The rows of the README's table: python -m examples.squad.report examples/squad/results/*.json"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import command_line
from examples.squad.model import FAMILIES

HEADINGS = (
    "run", "EM", "F1", "ModFwd1, ModBwd1, ModFwd2, ModBwd2, OutFwd, OutBwd", "phrases",
    "parameters", "minutes",
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each run; minutes are those of the processor, for training."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for result in results:
        small, options = result["small"], result["options"]
        units = [str(small[column]) for column in FAMILIES]
        strength = options["strength"]
        lines.append(
            (
                options["method"] + f", {strength:g}" * bool(strength),
                f"{small['em']:.2f}",
                f"{small['f1']:.2f}",
                ", ".join(units[:6]),
                ", ".join(units[6:]),
                f"{small['parameters'] / 1e6:.2f} M",
                f"{result['cpu_seconds'] / 60:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_line.parser("examples.squad.report", __doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="result.json of runs")
    args = parser.parse_args(argv)

    def run() -> None:
        print(table(command_line.results(args.results, "squad")))

    return command_line.main("examples.squad.report", run, args)


if __name__ == "__main__":
    sys.exit(main())
