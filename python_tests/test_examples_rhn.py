# SPDX-License-Identifier: Apache-2.0
"""examples.rhn, on a text of some thousand words."""

import dataclasses
import json
import math
import signal

import pytest
import torch

import iss_kernels as iss
from examples.rhn.command import main
from examples.rhn.recipes import CONFIGS, DROPS, METHODS, recipe
from examples.rhn.train import HighwayTrainer, build
from examples.training import Trainer, load
from iss_kernels.demo.text import load as load_text

TINY = ["--width", "12", "--depth", "3", "--epochs", "2", "--steps", "10", "--batch", "6",
        "--every", "5", "--any-text"]  # fmt: skip
LASSO = ["--method", "iss", "--strength", "0.13", "--threshold", "1e-2", "--init", "0.3",
         "--after", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of sentences in which the next word depends on the last one."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    for part, lines in (("train", 300), ("valid", 40), ("test", 40)):
        text = []
        for _ in range(lines):
            word, *steps = torch.randint(1, 3, (9,), generator=generator).tolist()
            for step in steps:
                text.append(f"w{word}")
                word = (word * 7 + step) % 30
            text.append("\n")
        (folder / f"ptb.{part}.txt").write_text(" ".join(text))
    return folder


def run(data, output, *more, status=0):
    assert main(["--data", str(data), "--output", str(output), *TINY, *more]) == status


def trainer(data, **changes):
    text = load_text(data)
    tiny = dict(width=12, depth=3, epochs=2, steps=10, batch=6, every=5)
    chosen = dataclasses.replace(recipe("small", "baseline"), **(tiny | changes))
    torch.manual_seed(0)
    return HighwayTrainer(build(chosen, len(text.vocabulary)), chosen, text)


def test_the_paper_s_recipe():
    paper = recipe("paper", "iss")
    assert (paper.width, paper.depth, paper.epochs, paper.batch, paper.steps) == (
        830, 10, 500, 20, 35,
    )  # fmt: skip
    assert (paper.clip, paper.init, paper.bias, paper.l2) == (10, 0.04, -2, 1e-7)
    assert (paper.strength, paper.threshold) == (0.005, 4e-4)
    assert [getattr(paper, name) for name in DROPS] == [0.15, 0.45, 0.15, 0.45]
    baseline = recipe("paper", "baseline")
    assert [getattr(baseline, name) for name in DROPS] == [0.25, 0.75, 0.25, 0.75]
    assert [baseline.learning_rate(e) for e in (0, 19, 20, 21)] == pytest.approx(
        [0.2, 0.2, 0.2 / 1.02, 0.2 / 1.02**2]
    )
    assert all(recipe(config, method) for config in CONFIGS for method in METHODS)


def test_the_paper_s_sizes(data):
    """Parameters of table 2, in millions, as the paper prints them: 10,000 words."""
    for width, millions in ((830, 23.5), (726, 18.9), (517, 11.1), (403, 7.6), (328, 5.7)):
        with torch.device("meta"):
            model = build(dataclasses.replace(CONFIGS["paper"], width=width), 10_000)
        number = sum(p.numel() for p in model.parameters())
        assert number / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_unit_is_its_word_vectors_inputs_and_states(data):
    """The paper's group: one family; 48 elements and a row more in the vectors, for 12 units."""
    one = trainer(data)
    (family,) = one.groups.families
    assert family.size == 12
    assert {weight.name for weight in one.groups.weights} == {
        "embedding.weight", "rhn.weight_ih_l0", "rhn.weight_hh_l0",
    }  # fmt: skip
    with torch.no_grad():
        for weight in one.model.parameters():
            weight.fill_(1.0)
    # An element that is in a row and in a column of the unit counts twice, as in the paper's code.
    vectors, inputs = len(one.model.embedding.weight), 2 * 12 + 2 * 12
    states = 3 * (2 * 12 + 2 * 12)
    norms = one.lasso.norms()[family.name]
    assert norms.tolist() == pytest.approx([math.sqrt(vectors + inputs + states)] * 12)


def test_masks_are_held_for_a_window(data):
    one = trainer(data, drop_word=0.5, drop_input=0.0, drop_state=0.0, drop_output=0.0)
    seen = []
    one.model.rhn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    one.model.train()
    tokens = torch.tensor([[1, 2, 1, 3, 2, 1]] * 4).t()  # [T, B]
    one.model(tokens)
    dropped = (seen[0] == 0).all(-1)
    assert dropped.any() and not dropped.all()
    for row in range(4):
        for word in (1, 2, 3):
            assert len(set(dropped[tokens[:, row] == word, row].tolist())) == 1
    one.model.eval()
    one.model(tokens)
    assert not (seen[1] == 0).all(-1).any()


def test_units_leave_and_the_perplexities_stay(data):
    """Removing dead units gives the path of holding them at zero."""
    drops = dict.fromkeys(DROPS, 0.0)
    runs = [
        trainer(
            data,
            strength=0.13,
            threshold=1e-2,
            init=0.3,
            bias=0.0,
            rate=0.3,
            clip=1e9,
            remove=remove,
            **drops,
        )  # fmt: skip
        for remove in (True, False)
    ]
    for one in runs:
        for _ in range(one.batches):
            one.batch()
            if one.done % one.batches_per_epoch == 0:
                one.end_epoch()
    small, whole = runs
    assert 1 < small.model.rhn.hidden_size < 12
    assert small.model.embedding.weight is small.model.decoder.weight
    assert small.model.embedding.weight.shape[1] == small.model.rhn.input_size
    for ours, theirs in zip(small.history, whole.history, strict=True):
        assert ours["units"] == theirs["units"]
        for name in ("train", "valid"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_the_lasso_can_be_a_proximal_step(data):
    """It follows the step of the optimiser, by the learning rate."""
    changes = dict(proximal=True, rate=0.3, **dict.fromkeys(DROPS, 0.0))
    plain, shrunk = (trainer(data, strength=strength, **changes) for strength in (0.0, 0.1))
    for one in (plain, shrunk):
        one.batch()
    iss.GroupLasso(plain.groups, 0.1).proximal_(0.3)
    for ours, theirs in zip(shrunk.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resume_gives_the_same_bits(data, tmp_path, monkeypatch):
    run(data, tmp_path / "whole", *LASSO)
    batch = Trainer.batch

    def stopping(self):
        batch(self)
        if self.done == 23:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "batch", stopping)
        run(data, tmp_path / "cut", *LASSO, status=130)
    run(data, tmp_path / "cut", *LASSO, "--resume")
    whole, again = (load(tmp_path / f / "checkpoint.pt")["trainer"] for f in ("whole", "cut"))
    assert whole["kept"].keys() == again["kept"].keys()
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name])
    results = [json.loads((tmp_path / f / "result.json").read_text()) for f in ("whole", "cut")]
    assert results[0]["width"] < 12
    for name in ("test", "valid", "width"):
        assert results[0][name] == results[1][name]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--epochs", "0"], "expected --epochs in [1, inf), got 0"),
        (["--drop-input", "1"], "expected --drop-input in [0, 1), got 1.0"),
        (["--bias", "inf"], "expected --bias in (-inf, inf), got inf"),
        (["--l2", "inf"], "expected --l2 in [0, inf), got inf"),
        (["--strength", "1"], "expected --method baseline without the penalty of --strength"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_bad_options_are_one_sentence(data, tmp_path, capsys, more, sentence):
    run(data, tmp_path / "run", *more, status=2)
    error = capsys.readouterr().err
    assert error.startswith("examples.rhn: ") and sentence in error
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_width_is_refused(data, tmp_path, capsys):
    run(data, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    run(data, tmp_path / "run", "--resume", "--width", "13", status=2)
    assert "of a run with width 13, got one with 12" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
