# SPDX-License-Identifier: Apache-2.0
"""examples.ptb and the training loop of the examples, on a text of some thousand words."""

import dataclasses
import importlib
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from examples.ptb.command import _start, main
from examples.ptb.recipes import CONFIGS, METHODS, Recipe, recipe
from examples.ptb.report import main as report
from examples.ptb.train import LanguageTrainer, build
from examples.training import LOG, DataError, load, save
from iss_kernels.demo.text import load as load_text

ROOT = Path(__file__).parent.parent
TINY = ["--hidden", "12", "10", "--embedding", "8", "--epochs", "2", "--steps", "10",
        "--batch", "6", "--every", "5", "--any-text"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A zip of sentences in which the next word depends on the last one."""
    drawn = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part, lines in (("train", 300), ("valid", 40), ("test", 40)):
            text = []
            for _ in range(lines):
                word, words = drawn.randrange(30), []
                for _ in range(8):
                    words.append(f"w{word}")
                    word = (word * 7 + drawn.choice((1, 2))) % 30
                text.append(" ".join(words))
            archive.writestr(f"ptb.{part}.txt", "\n".join(text) + "\n")
    return path


def run(data, output, *more, status=0):
    args = ["--data", str(data), "--output", str(output), *TINY, *more]
    assert main(args) == status


def trainer(data, **changes):
    text = load_text(data)
    chosen = dataclasses.replace(
        Recipe(), hidden=(12, 10), embedding=8, epochs=3, steps=10, batch=6, keep=1.0, init=0.1,
        clip=1e9, every=5, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    # In float64, where rounding moves no element over the threshold.
    return LanguageTrainer(build(chosen, len(text.vocabulary)).double(), chosen, text)


def test_the_paper_s_recipe():
    large = recipe("large", "iss")
    assert (large.hidden, large.epochs, large.steps, large.batch) == ((1500, 1500), 55, 35, 20)
    assert (large.keep, large.strength, large.threshold, large.clip) == (0.6, 0.00245, 1e-4, 10)
    rates = [large.learning_rate(epoch) for epoch in (0, 17, 18, 35, 36, 53, 54)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001])
    baseline = recipe("large", "baseline")
    assert baseline.keep == 0.35
    assert [baseline.learning_rate(e) for e in (0, 13, 14, 15)] == pytest.approx(
        [1, 1, 1 / 1.15, 1 / 1.15**2]
    )
    # The tutorial's: decay ** max(epoch + 1 - hold, 0).
    assert recipe("small", "baseline").learning_rate(4) == 0.5
    assert all(recipe(config, method) for config in CONFIGS for method in METHODS)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_units_leave_and_the_perplexities_stay(data, average):
    """Removing dead units gives the path of holding them at zero."""
    options = {"strength": 0.1, "threshold": 3e-3, "average": average}
    runs = [trainer(data, **options, remove=remove) for remove in (True, False)]
    for one in runs:
        for _ in range(one.batches):
            one.batch()
            if one.done % one.batches_per_epoch == 0:
                one.end_epoch()
    small, whole = runs
    assert small.model.lstm.hidden_size != (12, 10)
    assert small.history[-1]["parameters"] < whole.history[-1]["parameters"]
    for ours, theirs in zip(small.history, whole.history, strict=True):
        assert ours["units"] == theirs["units"]
        for name in ("train", "valid"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9)


@pytest.mark.parametrize("relax", [0.0, 0.5])
@pytest.mark.parametrize("proximal", [False, True])
def test_the_penalties_end_or_become_less(data, proximal, relax):
    """After `until` epochs the gradients are those of what is left of them alone."""
    options = {"threshold": 3e-3, "proximal": proximal}
    penalised = trainer(data, strength=0.1, l1=1e-4, until=2, relax=relax, **options)
    plain = trainer(data, strength=0.1 * relax, l1=1e-4 * relax, **options)
    while penalised.done < penalised.batches_per_epoch * 2:
        penalised.batch()
    penalised.end_epoch()
    units = penalised.units()
    assert sum(units.values()) < 22
    plain.load_state_dict(penalised.state_dict())
    for one in (penalised, plain):
        while one.done < one.batches:
            one.batch()
    assert penalised.units() == units
    assert [*penalised.model.state_dict()] == [*plain.model.state_dict()]
    for ours, theirs in zip(penalised.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "penalty",
    [
        ["--strength", "0.1", "--threshold", "3e-3"],
        [
            "--strength",
            "0.01",
            "--proximal",
            "--target",
            "0.5",
            "--horizon",
            "50",
            "--warmup",
            "10",
            "--average",
            "0.9",
        ],
    ],
)
def test_resume_gives_the_same_bits(data, tmp_path, penalty):
    # A process of its own may have another number of threads.
    threads = ["--threads", str(torch.get_num_threads())]
    options = ["--method", "iss", "--keep", "0.8", *threads, *penalty]
    run(data, tmp_path / "whole", *options)
    whole = load(tmp_path / "whole" / "checkpoint.pt")["trainer"]
    text = load_text(data)
    args = ["--data", str(data), "--output", str(tmp_path / "cut"), *TINY, *options]
    code = f"""
import signal
from examples.ptb.command import main
from examples.training import Trainer
batch = Trainer.batch
def stopping(self):
    batch(self)
    if self.done == 33:
        signal.raise_signal(signal.SIGINT)
Trainer.batch = stopping
raise SystemExit(main({args!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "examples.ptb: stopped; --resume goes on\n"
    assert load(tmp_path / "cut" / "checkpoint.pt")["trainer"]["done"] == 33
    run(data, tmp_path / "cut", *options, "--resume")
    again = load(tmp_path / "cut" / "checkpoint.pt")["trainer"]
    assert len(text.vocabulary) == len(whole["model"]["embedding.weight"])
    assert whole["kept"].keys() == again["kept"].keys()
    for part in ("model", "average") if "--average" in penalty else ("model",):
        for name, value in whole[part].items():
            assert torch.equal(value, again[part][name])
    results = [json.loads((tmp_path / f / "result.json").read_text()) for f in ("whole", "cut")]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["sizes"] == results[1]["sizes"]
    if "--target" in penalty:
        assert whole["lasso"]["target"]["left"] == again["lasso"]["target"]["left"] <= 0.5
        assert sum(results[0]["sizes"][1:]) == 11
    assert (tmp_path / "cut" / LOG).read_text().startswith("epoch,rate,loss,train,valid,units/")


@pytest.mark.parametrize("average", ["0", "0.9"])
def test_fine_tuning_starts_from_the_baseline(data, tmp_path, average):
    """From its moving average where it has one."""
    run(data, tmp_path / "baseline", "--average", average)
    text, trained = load_text(data), load(tmp_path / "baseline" / "checkpoint.pt")["trainer"]
    model = trainer(data).model
    _start(model, tmp_path / "baseline", text)
    assert (trained["average"] is None) == (average == "0")
    for name, value in (trained["average"] or trained["model"]).items():
        assert torch.equal(model.state_dict()[name], value.double())
    for method in ("iss-finetune", "l1"):
        run(data, tmp_path / method, "--method", method, "--start", str(tmp_path / "baseline"))
    whole, tuned, sparse = (
        json.loads((tmp_path / name / "result.json").read_text())
        for name in ("baseline", "iss-finetune", "l1")
    )
    assert tuned["epochs"][0]["train"] < whole["epochs"][0]["train"]
    assert sparse["sizes"] == whole["sizes"] and sparse["lstm_zeros"] > whole["lstm_zeros"] == 0


def test_dimensions_of_the_embedding_leave_too(data, tmp_path):
    run(data, tmp_path / "run", "--method", "iss", "--strength", "0.1", "--threshold", "1e-2",
        "--groups", "lstm+embedding", "--embedding", "10", "--tied")  # fmt: skip
    sizes = json.loads((tmp_path / "run" / "result.json").read_text())["sizes"]
    assert sizes[0] == sizes[2] < 10


def test_families_have_a_lambda_of_their_own(data, tmp_path, capsys):
    options = ["--method", "iss", "--strength", "0.03", "--proximal"]
    sizes = {}
    for spared in ("lstm.l0", "lstm.l1"):
        run(data, tmp_path / spared, *options, "--factors", f"{spared}=0")
        result = json.loads((tmp_path / spared / "result.json").read_text())
        sizes[spared] = result["sizes"][1:]
    assert sizes == {"lstm.l0": [12, 1], "lstm.l1": [1, 10]}
    run(data, tmp_path / "run", *options, "--factors", "lstm.l2=2", status=2)
    expected = "expected --factors of the families lstm.l0, lstm.l1, got lstm.l2"
    assert expected in capsys.readouterr().err
    for bad in ("lstm.l0", "lstm.l0=-1", "=1", "lstm.l0=nan", "lstm.l0=inf"):
        with pytest.raises(SystemExit):
            run(data, tmp_path / "run", "--factors", bad)
        sentence = f"expected NAME=FACTOR with a factor in [0, inf), got {bad}"
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_today(data, tmp_path):
    """AdamW, dropped weights, a tied softmax, a lasso in the optimiser's metric."""
    options = ["--config", "modern", "--method", "iss", "--embedding", "10", "--rate", "0.02"]
    run(data, tmp_path / "run", *options, "--strength", "0.1", "--warmup", "10")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["sizes"][0] == result["sizes"][2] < 10
    assert result["epochs"][1]["rate"] == pytest.approx(0.01)
    target = ["--strength", "1", "--target", "0.4", "--horizon", "50"]
    whole = ["--warmup", "0", "--until", "0", "--relax", "0"]
    run(data, tmp_path / "target", *options, *target, *whole)
    result = json.loads((tmp_path / "target" / "result.json").read_text())
    assert result["sizes"][0] == result["sizes"][2] < 10
    assert sum(result["sizes"][1:]) == 8  # 40 % of 22


def test_the_table_and_the_pictures_of_a_run(data, tmp_path, capsys):
    for seed in ("1", "2"):
        run(data, tmp_path / seed, "--seed", seed)
    run(data, tmp_path / "iss", "--method", "iss", "--strength", "0.1", "--threshold", "3e-3",
        "--label", "ISS")  # fmt: skip
    run(data, tmp_path / "short", "--epochs", "1")
    earlier = json.loads((tmp_path / "2" / "result.json").read_text())
    del earlier["options"]["average"]  # of a run before there was this option
    (tmp_path / "2" / "result.json").write_text(json.dumps(earlier))
    capsys.readouterr()
    runs = ("1", "2", "iss", "short")
    assert report([str(tmp_path / name / "result.json") for name in runs]) == 0
    heading, line, baseline, iss, short = capsys.readouterr().out.splitlines()
    assert short.startswith("| small | baseline | 8, 12, 10 | ")
    assert baseline.startswith("| small | baseline, 2 seeds | 8, 12, 10; 8, 12, 10 | ")
    assert "| 100%; 100% |" in baseline
    assert iss.startswith("| small | ISS | 8, ") and iss.count("|") == heading.count("|")
    assert report(["--pictures", str(tmp_path / "iss")]) == 0
    assert (tmp_path / "iss" / "curves.svg").stat().st_size > 1000
    assert (tmp_path / "iss" / "weights.png").stat().st_size > 1000


def test_two_processes_train_the_same_model(data, tmp_path):
    options = ["--method", "iss", "--strength", "0.05", "--threshold", "3e-3", "--keep", "1"]
    run(data, tmp_path / "one", *options)
    args = ["--data", str(data), "--output", str(tmp_path / "two"), *TINY, *options]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              "2", "-m", "examples.ptb", *args]  # fmt: skip
    results = []
    for more in ([], ["--resume"]):  # a run that is at its end goes on there
        done = subprocess.run([*launch, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "two" / "result.json").read_text()))
    assert results[0]["test"] == results[1]["test"]
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert one["sizes"] == two["sizes"]
    assert two["epochs"][0]["loss"] == pytest.approx(one["epochs"][0]["loss"], rel=1e-4)
    assert two["machine"]["processes"] == 2
    for ours, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert ours["valid"] == pytest.approx(theirs["valid"], rel=1e-3)


def launched(data, output, *more):
    """Two processes of torchrun."""
    args = ["--data", str(data), "--output", str(output), *TINY, *more]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              "2", "-m", "examples.ptb", *args]  # fmt: skip
    return subprocess.Popen(launch, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_two_processes_need_a_batch_of_two_equal_parts(data, tmp_path):
    _, error = launched(data, tmp_path / "run", "--batch", "5").communicate()
    assert b"expected --batch of a multiple of the 2 processes, got 5" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_is_saved_by_all_processes(data, tmp_path, number):
    both = launched(data, tmp_path, "--epochs", "100000")
    while not (tmp_path / LOG).exists():
        assert both.poll() is None, both.communicate()
        time.sleep(0.1)
    both.send_signal(number)
    _, error = both.communicate(timeout=60)
    assert b"examples.ptb: stopped; --resume goes on" in error
    state = load(tmp_path / "checkpoint.pt")["trainer"]
    assert len(state["parts"]) == 2 and state["done"] > 0


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--method", "l1"], "expected --method l1 with --start, the baseline's run"),
        (["--start", "x"], "expected --method baseline without --start, the baseline's run"),
        (["--tied"], "expected an embedding of the last layer's size, 10, with --tied, got 8"),
        (["--keep", "0"], "expected --keep in (0, 1], got 0.0"),
        (["--epochs", "0"], "expected --epochs in [1, inf), got 0"),
        (["--hidden", "4", "-1"], "expected --hidden in [1, inf), got -1"),
        (["--until", "-1"], "expected --until in [0, inf), got -1"),
        (["--strength", "-0.1"], "expected --strength in [0, inf), got -0.1"),
        (["--clip", "nan"], "expected --clip in [0, inf), got nan"),
        (["--relax", "0.1"], "expected --relax with --until, after which it counts"),
        (["--target", "1", "--strength", "1"], "expected --target in [0, 1), got 1.0"),
        (["--average", "1"], "expected --average in [0, 1), got 1.0"),
        (["--target", "0.5"], "expected --target with --strength > 0, where it starts, got 0"),
        (
            ["--target", "0.5", "--strength", "1", "--until", "1"],
            "expected --target without --until: the penalty ends once it is reached",
        ),
        (["--strength", "0.1"], "expected --method baseline without the penalty of --strength"),
        (["--method", "direct", "--l1", "1"], "expected --method direct without the penalty of"),
        (["--proximal"], "expected --proximal with --strength > 0, without which it is idle"),
        (["--factors", "lstm.l0=2"], "expected --factors with --strength > 0"),
        (
            ["--method", "iss", "--factors", "lstm.l0=2", "lstm.l0=3"],
            "expected --factors with each family once, got lstm.l0 twice",
        ),
        (["--warmup", "3"], "expected --warmup with --strength > 0"),
        (["--until", "3"], "expected --until with --strength or --l1 > 0"),
        (["--method", "iss", "--horizon", "3"], "expected --horizon with --target > 0"),
        (["--weight-decay", "0.1"], "expected --weight-decay with --optimizer adamw, got sgd"),
        (["--hidden", "1"], "expected --hidden with a layer of 2 units or more, of which some can"),
        (["--weight-drop", "1"], "expected --weight-drop in [0, 1), got 1.0"),
        (["--average", "nan"], "expected --average in [0, 1), got nan"),
        (["--init", "inf"], "expected --init in [0, inf), got inf"),
        (["--rate", "1e39"], "expected --rate of at most 1e+37, got 1e+39"),
        (["--threads", "0"], "expected --threads in [1, 1025), got 0"),
        (["--seed", "-1"], "expected --seed in [0, 9223372036854775808), got -1"),
        (["--seed", str(2**64)], "expected --seed in [0, 9223372036854775808), got 18446744"),
        (["--batch", "5000"], "expected --batch and --steps of less than the text, got 5000"),
        (["--steps", "5000"], "expected --batch and --steps of less than the text, got 6"),
        (
            ["--method", "l1", "--start", str(ROOT)],
            f"expected --start of a run's folder, got {ROOT} without checkpoint.pt",
        ),
        (["--groups", "all"], "expected --groups lstm or lstm+embedding, got all"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_bad_options_are_one_sentence(data, tmp_path, capsys, more, sentence):
    run(data, tmp_path / "run", *more, status=2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


RESULTS = sorted(ROOT.glob("examples/*/results/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_commands_of_the_results_are_taken(path):
    """By the checks of the options; the files that they name are not here."""
    if path.stem in ("sweep", "modern-iss-target"):
        pytest.skip("it is an earlier commit's")
    command = shlex.split(json.loads(path.read_text())["command"])
    example = importlib.import_module(f"{command[2]}.command")
    args = example.arguments().parse_args(command[3:])
    with pytest.raises(DataError, match=r"cannot read ptb\.zip|json\.gz: expected a file"):
        example.run(args)


def test_an_earlier_or_another_checkpoint_is_one_sentence(data, tmp_path, capsys):
    run(data, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    whole = load(path)
    options, state = whole["options"], whole["trainer"]
    another = "is of another version of this example"
    less = {name: value for name, value in options.items() if name != "threads"}
    for content, sentence in (
        ({"options": options}, "is not a checkpoint of an example"),
        (whole | {"options": []}, "is not a checkpoint of an example"),
        (whole | {"options": less}, f"{another}: only one of the two knows the option threads"),
        (whole | {"trainer": state | {"lasso": 3}}, another),
        (whole | {"trainer": {"done": 3}}, another),
        (whole | {"options": options | {"seed": 2, "rate": 2.0}}, "with seed 1, got one with 2"),
        (
            whole | {"options": options | {"method": "l1", "decay": 2.0, "seed": 2}},
            "of a run with method baseline, got one with l1",
        ),
        (
            whole | {"options": options | {"matmul_precision": "high"}},
            "with matmul_precision highest, got one with high",
        ),
    ):
        save(path, content)
        run(data, tmp_path / "run", "--resume", status=2)
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    for content, sentence in (
        ({"options": options}, "is not a checkpoint of an example"),
        ({"options": options, "trainer": {}}, "expected --start with "),
    ):
        save(path, content)
        run(data, tmp_path / "more", "--method", "l1", "--start", str(path.parent), status=2)
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "cannot read {}: no such file or directory"),
        ("{", "expected {} of JSON, as a run writes it"),
        ("[]", "expected the result of a run in {}, got other JSON"),
        (
            '{"options": {"example": "rhn"}}',
            "expected a result of examples.ptb in {}, got one of rhn",
        ),
        (
            '{"options": {"example": "ptb"}, "config": "huge"}',
            "expected a config of small, medium, large, modern in {}, got huge",
        ),
    ],
)
def test_the_table_of_what_is_no_result_is_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert report([str(path)]) == 2
    assert capsys.readouterr().err == f"examples.ptb.report: {sentence.format(path)}\n"


def test_a_table_or_pictures_of_nothing_are_one_sentence(tmp_path, capsys):
    assert report([]) == 2
    expected = "expected copies of result.json, or --pictures, got neither\n"
    assert capsys.readouterr().err == f"examples.ptb.report: {expected}"
    assert report(["--pictures", str(tmp_path)]) == 2
    assert f"--pictures of a run's folder, got {tmp_path} without" in capsys.readouterr().err
    committed = str(ROOT / "examples" / "ptb" / "results" / "small-iss.json")
    assert report([committed, committed]) == 2
    assert "got two of small, iss with seed 1\n" in capsys.readouterr().err
    assert report([str(path) for path in RESULTS if path.parts[-3] == "ptb"]) == 0


@pytest.mark.parametrize(
    "package, example, args",
    [
        ("rich", "ptb", "--data {data} --output {output} --any-text"),
        ("matplotlib", "automaton", "--output {output}"),
        ("matplotlib", "ptb.report", "--pictures {run}"),
    ],
)
def test_a_missing_package_is_one_sentence(data, tmp_path, package, example, args):
    """And the help needs none."""
    run(data, tmp_path / "run")
    args = args.format(data=data, output=tmp_path / "output", run=tmp_path / "run").split()
    code = f"""
import runpy, sys
sys.modules[{package!r}] = None
runpy.run_module("examples.{example}", run_name="__main__")
"""
    for given, status in ((args, 2), (["--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        if status:
            assert done.stderr == (
                f"examples.{example}: needs the package {package}; "
                "type: pip install 'iss_kernels[examples]'\n"
            )
    assert not (tmp_path / "output" / "log.csv").exists()


@pytest.mark.parametrize("example", ["ptb", "rhn", "squad", "automaton"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, example):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == f"examples.{example}: stopped before there was anything to save\n"


def test_ctrl_c_says_what_is_there_to_go_on_with(data, tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.ptb.command.read", stopped)
    run(data, tmp_path, status=130)
    expected = "examples.ptb: stopped before there was anything to save\n"
    assert capsys.readouterr().err == expected


def test_another_text_is_refused(data, tmp_path, capsys):
    assert main(["--data", str(data), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("examples.ptb: expected the Penn Treebank, 929,589 train, 73,760 valid")
    assert main(["--data", str(tmp_path / "none"), "--output", str(tmp_path / "run")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_run_is_not_overwritten(data, tmp_path, capsys):
    run(data, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    run(data, tmp_path / "run", status=2)
    assert "expected a folder without a run, or --resume" in capsys.readouterr().err
    run(data, tmp_path / "run", "--resume", "--rate", "0.5", status=2)
    assert "of a run with rate 0.5, got one with 1.0" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    run(data, tmp_path / "more", "--method", "l1", "--start", str(tmp_path / "run"),
        "--hidden", "12", "11", status=2)  # fmt: skip
    assert "expected --start with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "log.csv", "result.json", "model.safetensors", "vocabulary.json"]
)
def test_any_file_of_a_run_is_not_overwritten(data, tmp_path, capsys, name):
    (tmp_path / name).write_text("another")
    run(data, tmp_path, status=2)
    assert capsys.readouterr().err == (
        f"examples.ptb: expected a folder without a run, or --resume, got {tmp_path}, "
        f"which has {name}\n"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another"]


def test_a_rate_that_is_too_high_is_one_sentence(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--rate", "1e37", "--clip", "1e30", status=2)
    error = capsys.readouterr().err
    assert error.startswith("examples.ptb: expected a finite loss, got ")
    assert "with a learning rate of 1e+37 and a gradient of at most 1e+30" in error
    assert error.endswith(": give a lower --rate\n") and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_refused_at_the_end_of_an_epoch(data):
    one = trainer(data)
    one.done = one.batches_per_epoch
    with torch.no_grad():
        one.model.decoder.bias[0] = torch.nan
    with pytest.raises(DataError, match="expected finite weights, got others in batch"):
        one.end_epoch()


def test_a_perplexity_beyond_all_floats_is_infinite(data):
    one = trainer(data)
    with torch.no_grad():
        one.model.decoder.bias[0] = 1e6
    one.total = 1e9
    assert one.evaluate() == {"train": math.inf, "valid": math.inf}


@pytest.mark.parametrize("case", ["a file", "below a file", "a long name", "a link to nothing"])
def test_an_output_that_cannot_be_made_is_one_sentence(data, tmp_path, capsys, case):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    name, reason = {
        "a file": ("file", "file exists"),
        "below a file": ("file/run", "not a directory"),
        "a long name": ("x" * 300, "file name too long"),
        "a link to nothing": ("link", "file exists"),
    }[case]
    run(data, tmp_path / name, status=1)
    expected = f"examples.ptb: cannot write {tmp_path / name}: {reason}\n"
    assert capsys.readouterr().err == expected


def test_a_folder_without_permission_is_one_sentence(data, tmp_path, capsys, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied", os.fsencode(dir))

    monkeypatch.setattr("examples.training.tempfile.TemporaryFile", refused)
    run(data, tmp_path, status=1)
    error = capsys.readouterr().err
    assert error == f"examples.ptb: cannot write {tmp_path}: permission denied\n"
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_one_sentence(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "checkpoint.pt"))

    monkeypatch.setattr("iss_kernels.demo.checkpoint.os.replace", full)
    run(data, tmp_path / "run", status=1)
    error = capsys.readouterr().err
    assert error.endswith("checkpoint.pt: no space left on device\n")
    assert not list((tmp_path / "run").glob("*.pt*"))
