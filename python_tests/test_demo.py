# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end on a tiny recipe; its checkpoints, its checks and its command line."""

import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iss_kernels import __main__ as cli
from iss_kernels import backend, find_groups, shrink
from iss_kernels.demo import check, figures, report, show, text, timing, training
from iss_kernels.demo.checkpoint import ResumeError, write
from iss_kernels.demo.model import LanguageModel, detach
from iss_kernels.demo.run import Demo
from iss_kernels.demo.training import Recipe, Stage, Trainer

# 12 units of which some die within two short epochs of 5 batches.
TINY = Recipe(
    name="tiny",
    embedding=8,
    hidden=12,
    layers=2,
    baseline=Stage(epochs=2, learning_rate=1e-2, dropout=0.2),
    iss=Stage(epochs=2, learning_rate=1e-2, dropout=0.2, strength=0.1),
    tune=Stage(epochs=1, learning_rate=1e-2, dropout=0.2),
    ramp=0.2,
    method="gradient",
    unit_threshold=1.7,
    batch=20,
)


def tiny_text() -> text.Text:
    # Counts up, mostly: something to learn.
    steps = torch.randint(1, 3, (4000,), generator=torch.Generator().manual_seed(0))
    numbers = steps.cumsum(0) % 30
    names = [f"w{n}" for n in range(30)]
    return text.Text("counting", names, numbers[:3500], numbers[3500:3750], numbers[3750:])


class Silent:
    """A watcher that presses Ctrl-C after a number of batches."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.left = interrupt_after

    def stage(self, name: str, trainer: Trainer) -> None:
        pass

    def batch(self, trainer: Trainer) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def epoch(self, row: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 2)
        patch.setattr(timing, "SECONDS_PER_TURN", 0.0)
        yield


def demo(output: Path, interrupt_after: int = 0, seed: int = 1, recipe: Recipe = TINY) -> Demo:
    return Demo(recipe, tiny_text(), seed, output, Silent(interrupt_after))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    whole = demo(tmp_path_factory.mktemp("whole"))
    whole.run()
    return whole


@pytest.mark.parametrize("recipe", [training.FULL, training.QUICK], ids=lambda r: r.name)
def test_baseline_trains_as_long_as_iss_and_tuning(recipe: Recipe) -> None:
    assert recipe.baseline.epochs == recipe.iss.epochs + recipe.tune.epochs


# -- results


def test_result_has_its_keys(uninterrupted: Demo) -> None:
    result = json.loads((uninterrupted.output / "result.json").read_text())
    assert result["hidden_before"] == [12, 12]
    assert sum(result["hidden_after"]) < 24
    assert result["params_after"] < result["params_before"] == 4 * 12 * (8 + 12 + 2 + 24 + 2)
    assert result["perplexity_before"] > 1
    assert result["perplexity_after"] > 1
    assert result["max_abs_diff"] <= check.TOLERANCE
    assert result["perplexity_int8"] == pytest.approx(result["perplexity_after"], rel=0.05)
    for key in ("torch_ms", "small_torch_ms", "iss_ms", "int8_ms", "speedup"):
        assert list(result[key]) == ["1", "10"]
    for batch, speedup in result["speedup"].items():
        assert speedup == pytest.approx(
            result["torch_ms"][batch] / result["iss_ms"][batch], rel=1e-2
        )
    assert isinstance(result["noisy"], bool)
    assert [row["stage"] for row in result["history"]] == 2 * ["baseline"] + 2 * ["iss"] + ["tune"]
    assert {"seconds", "seed", "text", "words", "recipe", "machine"} <= set(result)
    assert {"torch", "threads", "backend"} <= set(result["machine"])


def test_report_is_self_contained(uninterrupted: Demo) -> None:
    html = (uninterrupted.output / "report.html").read_text(encoding="utf-8")
    assert "://" not in html
    assert not re.search(r"<(script|link|iframe)|@import", html)
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', html)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert html.count("<svg") == 4
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_dead_units_stay_dead(uninterrupted: Demo) -> None:
    alive = [row["alive"] for row in uninterrupted.finished["iss"]["history"]]
    assert all(later <= earlier for earlier, later in zip(alive[0], alive[1], strict=True))


def test_units_leave_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser goes on, and the check sees each removal."""
    torch.manual_seed(0)
    model = LanguageModel(30, 8, 12, 2, 0.0)
    groups = find_groups(model, torch.zeros(2, 1, dtype=torch.long))
    trainer = Trainer(model, groups, TINY, TINY.iss, tiny_text())
    sizes = []
    for _ in range(2):
        for _ in range(trainer.batches_per_epoch):
            trainer.batch()
        trainer.end_epoch()
        sizes.append([hidden for ((hidden, _),) in model.lstm.sizes])
        assert [len(units) for units in trainer.kept.values()] == sizes[-1]
    assert 24 > sum(sizes[0]) > sum(sizes[1])
    assert trainer.optimizer.state.keys() == set(model.parameters())
    monkeypatch.setattr(check, "TOLERANCE", -1.0)
    groups = trainer.groups
    groups.zero_units_(
        {
            name: torch.arange(n) == 0
            for name, n in zip(("lstm.l0", "lstm.l1"), sizes[1], strict=True)
        }
    )
    with pytest.raises(check.CheckError):
        trainer.end_epoch()


def test_a_layer_without_units_alive_keeps_one_at_zero() -> None:
    torch.manual_seed(0)
    model = LanguageModel(30, 8, 12, 2, 0.0)
    groups = find_groups(model, torch.zeros(2, 1, dtype=torch.long))
    recipe = replace(TINY, unit_threshold=100.0)
    trainer = Trainer(model, groups, recipe, TINY.iss, tiny_text())
    training.train(trainer, Silent(), lambda: None)
    assert [hidden for ((hidden, _),) in model.lstm.sizes] == [1, 1]
    assert trainer.history[-1]["alive"] == [0, 0]
    assert not model.lstm.weight_hh_l0.any()


def sparse_and_small() -> tuple[LanguageModel, LanguageModel, list[torch.Tensor]]:
    torch.manual_seed(0)
    big = LanguageModel(30, 8, 12, 2, dropout=0.0)
    groups = find_groups(big, torch.zeros(2, 1, dtype=torch.long))
    groups.zero_units_(groups.by_family(torch.arange(24) % 5 == 0))
    small, report = shrink(big, groups)
    assert isinstance(small, LanguageModel)
    return big, small, list(report.kept.values())


def test_check_passes_equal_models() -> None:
    big, small, kept = sparse_and_small()
    assert [len(units) for units in kept] == [9, 10]
    assert check.compare(big, small, kept, tiny_text().test) <= check.TOLERANCE


@pytest.mark.parametrize("parameter", ["lstm.bias_hh_l0", "decoder.bias"])
def test_check_fails_different_models(parameter: str) -> None:
    big, small, kept = sparse_and_small()
    with torch.no_grad():
        small.get_parameter(parameter)[0] += 0.1
    with pytest.raises(check.CheckError, match="the small model's answers differ from the big one"):
        check.compare(big, small, kept, tiny_text().test)


def test_check_notices_nan() -> None:
    big, small, kept = sparse_and_small()
    with torch.no_grad():
        small.decoder.bias[0] = float("nan")
    with pytest.raises(check.CheckError):
        check.compare(big, small, kept, tiny_text().test)


def test_a_chain_of_torch_lstms_shares_the_weights_of_layers_that_differ() -> None:
    _, small, _ = sparse_and_small()
    chain = timing.Chain(small.lstm)
    assert {id(p) for p in chain.parameters()} == {id(p) for p in small.lstm.parameters()}
    assert [type(layer) for layer in chain.layers] == [torch.nn.LSTM] * 2
    x = torch.randn(7, 3, 8)
    torch.testing.assert_close(chain(x)[0], small.lstm(x)[0])


@pytest.mark.parametrize("parameter", ["weight_ih_l1", "bias_hh_l0"])
def test_timing_compares_the_answers_first(parameter: str) -> None:
    big, small, kept = sparse_and_small()
    with torch.no_grad():
        small.lstm.get_parameter(parameter)[0] += 0.1
    with pytest.raises(check.CheckError, match="the small nn.LSTM differs from the big nn.LSTM by"):
        timing.compare(big.lstm, small.lstm, kept[-1], torch.randn(30, 10, 8))


def timed(monkeypatch: pytest.MonkeyPatch, *attempts: tuple[list[float], float]) -> dict[str, Any]:
    """What timing.compare says of these turns, the same for every engine, and waits."""
    left = iter(attempts)

    def take_turns(lstms: list[Any], x: torch.Tensor) -> tuple[list[list[float]], float]:
        turns, waited = next(left)
        return [turns] * len(lstms), waited

    monkeypatch.setattr(timing, "BATCHES", (1,))
    monkeypatch.setattr(timing, "_take_turns", take_turns)
    big, small, kept = sparse_and_small()
    return timing.compare(big.lstm, small.lstm, kept[-1], torch.randn(30, 10, 8))


STEADY, WILD, WILDER = [1.0, 1.0, 1.2], [1.0, 2.0, 2.0], [1.0, 5.0, 9.0]


@pytest.mark.parametrize("first", [(WILD, 1.0), ([3.0, 3.0, 3.0], 2.0)], ids=["spread", "waiting"])
def test_timing_is_repeated_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, first: tuple[list[float], float]
) -> None:
    result = timed(monkeypatch, first, (STEADY, 1.1))
    assert result["iss_ms"] == result["torch_ms"] == result["int8_ms"] == {"1": 1000.0}
    assert result["noisy"] is False


def test_timing_that_stays_unsteady_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, (WILDER, 1.0), (WILD, 1.0), (STEADY, 4.0))
    assert result["iss_ms"] == {"1": 2000.0}
    assert result["noisy"] is True


def test_timing_knows_how_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "thread_time", lambda: 0.0)
    assert timing._take_turns([torch.neg], torch.ones(1))[1] > timing.STEADY


@pytest.mark.parametrize("noisy", [False, True])
def test_a_warning_stands_beside_unsteady_numbers(
    uninterrupted: Demo, capsys: pytest.CaptureFixture[str], noisy: bool
) -> None:
    result = json.loads((uninterrupted.output / "result.json").read_text()) | {"noisy": noisy}
    show.print_result(result, uninterrupted.output)
    big, _, _ = sparse_and_small()
    weights = figures.weight_pictures(find_groups(big, torch.zeros(2, 1, dtype=torch.long)))
    norms = [[1.0], [1.0]]
    pictures = report.Pictures(norms, norms, norms, weights)
    for shown in (capsys.readouterr().out, report.html(result, pictures, "")):
        # A narrow terminal breaks the headings.
        assert all(engine.split()[-1] in shown for engine in timing.ENGINES.values())
        assert ("speed-up, batch 1 (noisy)" in shown) == noisy
        assert (show.NOISY in shown) == noisy


def test_detach_keeps_the_form_of_unequal_states() -> None:
    _, small, _ = sparse_and_small()
    _, state = small(torch.zeros(3, 2, dtype=torch.long))
    detached = detach(state)
    assert [[t.shape for t in part] for part in detached] == [[t.shape for t in p] for p in state]
    assert not detached[0][0].requires_grad


# -- interruption


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even in a shell's background job, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "batches", [1, 5, 13, 20, 23], ids=["start", "epoch-end", "iss-middle", "iss-end", "tune"]
)
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, uninterrupted: Demo, batches: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, interrupt_after=batches).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = demo(tmp_path)
    resumed.resume()
    resumed.run()
    for stage, whole in uninterrupted.finished.items():
        for name, value in whole["model"].items():
            assert torch.equal(resumed.finished[stage]["model"][name], value), (stage, name)
        for row, expected in zip(resumed.finished[stage]["history"], whole["history"], strict=True):
            assert {**row, "seconds": 0} == {**expected, "seconds": 0}


def test_resume_of_a_finished_run_trains_nothing(uninterrupted: Demo) -> None:
    again = demo(uninterrupted.output, interrupt_after=1)
    again.resume()
    assert again.run()["perplexity_after"] > 1


RESUME_ERRORS: dict[str, tuple[Callable[[Path], Demo], str]] = {
    "none": (demo, "no checkpoint to resume from: {p}/checkpoint.pt"),
    "seed": (
        lambda p: demo(p, seed=2),
        "{p}/checkpoint.pt was made with other options (seed: 1; now 2): resume with the same "
        "ones, or start anew with --fresh",
    ),
    "recipe": (
        lambda p: demo(p, recipe=training.QUICK),
        "{p}/checkpoint.pt was made with other options (recipe: tiny; now quick): resume with the "
        "same ones, or start anew with --fresh",
    ),
    "version": (
        lambda p: demo(p, recipe=replace(TINY, clip=2.0)),
        "{p}/checkpoint.pt was made with other options (recipe: another version's; now this "
        "one's): resume with the same ones, or start anew with --fresh",
    ),
    "damaged": (demo, "{p}/checkpoint.pt is not a whole checkpoint"),
    "directory": (demo, "{p}/checkpoint.pt is not a whole checkpoint"),
    "pipe": (demo, "{p}/checkpoint.pt is not a whole checkpoint"),
    "link to itself": (demo, "no checkpoint to resume from: {p}/checkpoint.pt"),
    "text": (
        lambda p: Demo(TINY, other_text(), 1, p, Silent()),
        "{p}/checkpoint.pt was made with other options (text: counting ({0}); now counting ({1})): "
        "resume with the same ones, or start anew with --fresh",
    ),
}


def other_text() -> text.Text:
    whole = tiny_text()
    return replace(whole, train=whole.train.flip(0))


@pytest.mark.parametrize("case", RESUME_ERRORS)
def test_resume_errors(tmp_path: Path, case: str) -> None:
    make, message = RESUME_ERRORS[case]
    checkpoint = tmp_path / "checkpoint.pt"
    if case == "damaged":
        checkpoint.write_bytes(b"no")
    elif case == "directory":
        checkpoint.mkdir()
    elif case == "pipe":
        os.mkfifo(checkpoint)
    elif case == "link to itself":
        checkpoint.symlink_to(checkpoint)
    elif case != "none":
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, interrupt_after=1).run()
    with pytest.raises(ResumeError) as error:
        make(tmp_path).resume()
    fingerprints = tiny_text().fingerprint, other_text().fingerprint
    assert str(error.value) == message.format(*fingerprints, p=tmp_path)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, interrupt_after=13).run()
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    cut = [whole[:n] for n in (0, 1, 31, 32, 33, *range(100, len(whole), len(whole) // 50))]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (*cut, whole[:-1], whole + b" ", bytes(flipped)):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ResumeError, match="is not a whole checkpoint"):
            demo(tmp_path).resume()


def _no_model(content: dict[str, Any]) -> None:
    del content["finished"]["baseline"]["model"]


def _no_baseline(content: dict[str, Any]) -> None:
    del content["finished"]["baseline"]


def _no_trainer(content: dict[str, Any]) -> None:
    del content["trainer"]


def _other_shape(content: dict[str, Any]) -> None:
    content["trainer"]["zeroed"] = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize("change", [_no_model, _no_baseline, _no_trainer, _other_shape])
def test_a_changed_checkpoint_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, interrupt_after=13).run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ResumeError, match="is not a whole checkpoint"):
        demo(tmp_path).resume()


# -- command line


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("one two three four five six seven eight nine\n" * 400)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "QUICK", TINY)


def test_demo_command(
    tiny: None, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    code = cli.main(["demo", "--quick", "--data", str(book), "--output", str(output)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.count("epoch") == 5  # one line each
    assert "LSTM parameters" in out
    assert re.search(r"s of the baseline over as much text: \d+% (sooner|later)\.", out)
    assert str(output / "report.html") in out
    names = {file.name for file in output.iterdir()}
    assert names == {"checkpoint.pt", "report.html", "result.json"}


def test_ctrl_c_says_how_to_resume(
    tiny: None,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["demo", "--quick", "--data", str(book), "--output", str(tmp_path / "my report")]
    with monkeypatch.context() as patch:
        patch.setattr(show, "watcher", lambda: nullcontext(Silent(7)))
        assert cli.main(arguments) == 130
    assert capsys.readouterr().err == (
        "iss_kernels demo: interrupted; to go on: python -m iss_kernels demo --quick "
        f"--data {book} --output '{tmp_path}/my report' --resume\n"
    )
    assert cli.main([*arguments, "--resume"]) == 0
    assert "goes on at batch 7 of" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint.pt", "result.json", "report.html"])
def test_a_run_is_not_overwritten(
    tiny: None, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output = tmp_path / "out"
    arguments = ["demo", "--quick", "--data", str(book), "--output", str(output)]
    output.mkdir()
    (output / name).write_text("another run")
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        "iss_kernels demo: expected a folder without a run, or --resume or --fresh, "
        f"got {output}, which has {name}\n"
    )
    assert [file.read_text() for file in output.iterdir()] == ["another run"]
    assert cli.main([*arguments, "--fresh"]) == 0
    assert cli.main([*arguments, "--resume"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--resume", "--fresh"])


def test_resume_finds_the_same_text_under_another_path(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Demo(TINY, text.load(book), 1, tmp_path / "out", Silent(1)).run()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.TXT").symlink_to(book)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(book, folder)
    for spelling in ("book.txt", "./book.txt", "folder/../book.txt", "link.TXT", "folder/"):
        again = Demo(TINY, text.load(Path(spelling)), 1, tmp_path / "out", Silent())
        again.resume()
        assert again.saved


@pytest.mark.parametrize("name", ["checkpoint.pt", "result.json", "report.html"])
def test_a_full_disk_gets_one_sentence_and_loses_nothing(
    tiny: None,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    output = tmp_path / "out"
    arguments = ["demo", "--quick", "--data", str(book), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(show, "watcher", lambda: nullcontext(Silent(7)))
        assert cli.main(arguments) == 130
    before = (output / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    (output / f"{name}.tmp").symlink_to("/dev/full")
    assert cli.main([*arguments, "--resume"]) == 2
    assert capsys.readouterr().err == (
        f"iss_kernels demo: cannot write to {output}: no space left on device\n"
    )
    assert not list(output.glob("*.tmp"))
    assert ((output / "checkpoint.pt").read_bytes() == before) == (name == "checkpoint.pt")
    Demo(TINY, text.load(book), 1, output, Silent()).resume()


def test_a_full_disk_under_the_log_gets_one_sentence(
    tiny: None,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def print_result(*_: Any) -> None:
        Path("/dev/full").write_text("table")

    monkeypatch.setattr(show, "print_result", print_result)
    assert cli.main(["demo", "--quick", "--data", str(book), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(": no space left on device\n")


def test_files_are_on_the_disk_before_they_take_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace_file = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def noted_replace(one: Path, other: Path) -> None:
        done.append("replace")
        replace_file(one, other)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path / "a", b"text")
    assert done == ["file", "replace", "directory"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"text"]


def test_failed_check_exits_1(
    tiny: None,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "TOLERANCE", -1.0)
    assert cli.main(["demo", "--quick", "--data", str(book), "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "iss_kernels demo: the small model's answers differ from the big one's by"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


USAGE_ERRORS = {
    "no data": (
        ["--data", "{p}/none"],
        "iss_kernels demo: cannot read {p}/none: no such file or directory\n",
    ),
    "no checkpoint": (
        ["--data", "{p}/book.txt", "--output", "{p}/out", "--resume"],
        "iss_kernels demo: no checkpoint to resume from: {p}/out/checkpoint.pt\n",
    ),
    "output is a file": (
        ["--data", "{p}/book.txt", "--output", "{p}/book.txt"],
        "iss_kernels demo: cannot write to {p}/book.txt: file exists\n",
    ),
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors_exit_2(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = USAGE_ERRORS[case]
    assert cli.main(["demo", *(a.format(p=tmp_path) for a in arguments)]) == 2
    assert capsys.readouterr().err == message.format(p=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--threads", "0"], "argument --threads: expected a whole number from 1, got '0'"),
        (["demo", "--threads", "x"], "argument --threads: expected a whole number from 1, got 'x'"),
        (["demon"], "argument command: invalid choice: 'demon'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_wrong_arguments_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib", "jinja2"])
def test_missing_demo_package_says_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    import iss_kernels.demo

    for name in ("show", "run", "report", "figures"):
        monkeypatch.delitem(sys.modules, f"iss_kernels.demo.{name}", raising=False)
        monkeypatch.delattr(iss_kernels.demo, name, raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"iss_kernels demo: needs the package {package}; type: pip install 'iss_kernels[demo]'\n"
    )


def test_info_tells_what_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for built, said in (
        ("unknown", "unknown"),
        (torch.__version__, f"{torch.__version__}, as now"),
        ("2.9.0+cpu", "2.9.0+cpu, another than now"),
    ):
        monkeypatch.setattr(backend, "_torch_at_build", lambda built=built: built)
        assert cli.main(["info"]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert lines["torch"].strip() == torch.__version__
        assert lines["torch at build"].strip() == said
        assert lines["backend"].strip() in ("extension", "reference")


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_both_methods_kill_units(method: str) -> None:
    torch.manual_seed(0)
    loaded = tiny_text()
    # A proximal step is learning rate * strength: the same strength in other units.
    strength = {"gradient": 0.1, "proximal": 60.0}[method]
    threshold = {"gradient": 1.7, "proximal": 0.0}[method]
    recipe = replace(TINY, method=method, unit_threshold=threshold)
    model = LanguageModel(30, 8, 12, 2, 0.0)
    groups = find_groups(model, torch.zeros(2, 1, dtype=torch.long))
    stage = replace(TINY.iss, strength=strength)
    trainer = Trainer(model, groups, recipe, stage, loaded)
    training.train(trainer, Silent(), lambda: None)
    assert all(alive < 12 for alive in trainer.history[-1]["alive"])


def test_bars_on_a_terminal() -> None:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    watcher = show.BarWatcher(console)
    model = LanguageModel(30, 8, 12, 2, 0.0)
    groups = find_groups(model, torch.zeros(2, 1, dtype=torch.long))
    trainer = Trainer(model, groups, TINY, replace(TINY.tune, epochs=1), tiny_text())
    with watcher:
        watcher.stage("tune", trainer)
        training.train(trainer, watcher, lambda: None)
    assert "units 12+12" in console.file.getvalue()  # type: ignore[attr-defined]
