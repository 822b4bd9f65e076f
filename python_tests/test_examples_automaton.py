# SPDX-License-Identifier: Apache-2.0
"""examples.automaton, with few steps."""

import json

import pytest
import torch

from examples.automaton.command import main, sequences


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


@pytest.mark.parametrize("name", ["sweep.json", "units.svg", "checkpoint.pt"])
def test_a_sweep_is_not_overwritten(tmp_path, capsys, name):
    (tmp_path / name).write_text("another")
    assert main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"examples.automaton: expected a folder without a run, got {tmp_path}, which has {name}\n"
    )
    with pytest.raises(SystemExit):  # without --output
        main(["--bits", "0"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another"]


def test_a_rate_that_is_too_high_is_one_sentence(tmp_path, capsys):
    tiny = ["--bits", "1", "--seeds", "1", "--cells", "gru", "--width", "4", "--rate", "1e30"]
    assert main([*tiny, "--lasso-steps", "4", "--heal-steps", "4", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "learning rate of 1e+30 and a gradient of at most 1: give a lower --rate\n" in error
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_promises_nothing(tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.automaton.command.train", stopped)
    assert main(["--output", str(tmp_path)]) == 130
    expected = "examples.automaton: stopped before there was anything to save\n"
    assert capsys.readouterr().err == expected


def test_bad_options_are_one_sentence(tmp_path, capsys):
    assert main(["--bits", "0", "--output", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == "examples.automaton: expected --bits in [1, inf), got 0\n"
    assert not (tmp_path / "none").exists()
