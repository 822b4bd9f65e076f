# SPDX-License-Identifier: Apache-2.0
"""What the README tells a person to type does what it says."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_quickstart_runs_and_prints_its_table():
    code, printed = re.search(
        r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.S
    ).groups()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    got, shown = output.getvalue().splitlines(), printed.splitlines()
    # 400 steps of Adam amplify rounding: how many units stay may differ a little between machines.
    assert [line.split()[0] for line in got] == [line.split()[0] for line in shown]
    left = [float(line.split()[-1].rstrip("%")) for line in got[3:5]]
    assert all(value < 40 for value in left)
    assert float(got[-1].split(":")[1]) <= 1e-5
