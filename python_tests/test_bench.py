# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, checks before it times, and writes the columns it promises."""

import csv

from iss_kernels.__main__ import main

COLUMNS = (
    "kernel provider mode T B I H dtype threads ms_p50 ms_p20 ms_p80 gflops "
    "device isa torch git date"
)


def test_bench_writes_a_row_for_every_provider(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["iss_kernels"])
    path = tmp_path / "new" / "lstm.csv"
    assert main(["bench", "--quick", "--threads", "1", "--output", str(path)]) == 0
    text = path.read_text()
    assert text.splitlines()[0].split(",") == COLUMNS.split()
    rows = list(csv.DictReader(text.splitlines()))
    kinds = {(row["provider"], row["mode"]) for row in rows}
    assert len(kinds) == 6 and len(rows) == 12
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    assert "ISSLSTM" in capsys.readouterr().out
