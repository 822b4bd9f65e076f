# SPDX-License-Identifier: Apache-2.0
"""What the README tells a person to type does what it says, and the pages are kept in form."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import iss_kernels as iss

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
EXAMPLES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples").rglob("README.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "csrc/README.md", *DOCS]


def test_the_quickstart_runs_and_prints_its_table():
    quickstart, printed = re.search(
        r"## Quickstart\n(.*?)\nprints[^\n]*\n\n```\n(.*?)```", README, re.S
    ).groups()
    code = "\n".join(re.findall(r"```python\n(.*?)```", quickstart, re.S))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    got, shown = output.getvalue().splitlines(), printed.splitlines()
    # Hundreds of steps of Adam amplify rounding: which units stay may differ between machines.
    assert [line.split()[0] for line in got] == [line.split()[0] for line in shown]
    units = sum(int(line.split()[2]) for line in got[1:3])
    assert units <= 0.3 * 128
    assert float(got[-1].split(":")[1]) <= 1e-5


def test_the_reason_is_what_the_groups_print():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = torch.nn.LSTM(3, 4, 2), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.out(torch.fft.rfft(self.lstm(x)[0], dim=0).abs())

    lines = str(iss.find_groups(Model(), torch.randn(2, 1, 3))).splitlines()
    (line,) = (line for line in lines if line.startswith("of full width"))
    assert re.sub(r"test_readme.py:\d+", "model.py:7", line) in " ".join(README.split())


def prose(page):
    """(number, line) of the lines outside code blocks."""
    in_code = False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def is_table(line):
    return line.lstrip().startswith("|")


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES, "CHANGELOG.md"])
def test_lines_have_at_most_100_characters(page):
    without_targets = ((n, re.sub(r"\]\([^)]*\)", "]", line)) for n, line in prose(page))
    assert [n for n, line in without_targets if len(line) > 100 and not is_table(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_at_most_8_columns(page):
    rows = ((n, re.sub(r"\\\|", "", line)) for n, line in prose(page) if is_table(line))
    assert [n for n, row in rows if row.strip().strip("|").count("|") >= 8] == []


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", "\n".join(line for _, line in prose(page)))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", DOCS)
def test_a_page_of_docs_begins_with_its_question_and_is_linked(page):
    title, question, *_ = (ROOT / page).read_text().split("\n\n")
    assert title.startswith("# ") and question.endswith("?") and question.count("?") == 1
    assert f"({page})" in README
