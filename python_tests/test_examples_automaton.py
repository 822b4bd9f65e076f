# SPDX-License-Identifier: Apache-2.0
"""examples.automaton, with few steps."""

import json

import torch

from examples.automaton.__main__ import main, sequences


def test_the_output_is_the_bit_written_last():
    torch.manual_seed(0)
    x, wanted = sequences(3, 20, 5)
    assert x.shape == wanted.shape == (20, 5, 3)
    last = torch.zeros(5, 3)
    for step in range(20):
        last = torch.where(x[step] == 0, last, x[step])
        assert torch.equal(last > 0, wanted[step] == 1)


def test_two_bits_need_two_units(tmp_path, capsys):
    args = ["--bits", "2", "--seeds", "1", "2", "--cells", "gru", "--width", "8"]
    args += ["--warmup", "300", "--lasso-steps", "500", "--heal-steps", "100"]
    assert main([*args, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    for run in result["runs"]:
        assert run["left"][0] == 8 and run["left"][-1] == run["units"]
        assert (run["units"], run["wrong"]) == (2, 0)
    assert "gru 2 bits, seed 2: 8 -> 2 units, 0 of 100,000 answers wrong" in capsys.readouterr().out
    assert (tmp_path / "units.svg").stat().st_size < 100_000


def test_bad_options_are_one_sentence(tmp_path, capsys):
    assert main(["--bits", "0", "--output", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == "examples.automaton: expected --bits in [1, inf), got 0\n"
    assert not (tmp_path / "none").exists()
