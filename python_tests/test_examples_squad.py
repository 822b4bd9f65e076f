# SPDX-License-Identifier: Apache-2.0
"""examples/squad: the metric, tokens that give back the text, groups, exact shrink, runs."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import iss_kernels as iss
from examples.squad import report, training
from examples.squad.answers import best_spans, score
from examples.squad.command import main
from examples.squad.data import (
    DataError,
    Encoder,
    Vocabulary,
    batches,
    read_questions,
    read_vectors,
    short_enough,
    tokenise,
)
from examples.squad.metric import exact_match, f1, normalised
from examples.squad.model import FAMILIES, BiDAF, example, parameters

ROOT = Path(__file__).parent.parent

# -- Metric


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat's  hat!", "cats hat"),
        ("an apple a day", "apple day"),
        ("a", ""),
        ("Theatre", "theatre"),
        ("12,000 km", "12000 km"),
        ("U.S. the", "us"),
    ],
)
def test_answers_are_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_an_exact_match_is_one_with_any_right_answer() -> None:
    assert exact_match("the Broncos.", ["Denver Broncos", "Broncos"]) == 1
    assert exact_match("Broncos of Denver", ["Denver Broncos", "Broncos"]) == 0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("the red fox", ["red fox"], 1.0),
        ("red fox", ["fox", "blue"], 2 / 3),
        ("fox", ["bear"], 0.0),
        ("fox fox", ["fox"], 2 / 3),  # a word counts as often as both have it
        ("the", ["a cat"], 0.0),
    ],
)
def test_f1_is_the_overlap_with_the_nearest_answer(
    answer: str, right: list[str], expected: float
) -> None:
    assert f1(answer, right) == pytest.approx(expected)


# -- Data

TEXTS = {
    "Mia sold 3,000 apples in May. She didn't sell pears.": [
        ("How many apples did Mia sell?", ["3,000", "3,000 apples", "3,000"]),
        ("What did she not sell?", ["pears"]),
    ],
    "The old mill stands by the river Aare, near Thun.": [
        ("Where does the mill stand?", ["by the river Aare", "near Thun"]),
        ("Which river is it?", ["Aare"]),
        ("How is the mill?", ["old"]),
    ],
}


def squad(texts: dict[str, list[tuple[str, list[str]]]] = TEXTS) -> dict[str, Any]:
    """Questions in SQuAD's format."""
    paragraphs = [
        {
            "context": text,
            "qas": [
                {
                    "id": f"{text[:3]}{i}",
                    "question": question,
                    "answers": [{"text": a, "answer_start": text.index(a)} for a in answers],
                }
                for i, (question, answers) in enumerate(asked)
            ],
        }
        for text, asked in texts.items()
    ]
    return {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}


WORDS = ["the", "river", "mill", "apples", "how", "what", "sell", "?", ".", ","]
WIDTH = 6


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Training questions, gzipped, and vectors of 6 numbers."""
    questions, vectors = tmp_path / "questions.json.gz", tmp_path / "vectors.txt"
    questions.write_bytes(gzip.compress(json.dumps(squad()).encode()))
    generator = np.random.default_rng(0)
    lines = [" ".join([w, *(f"{v:.3f}" for v in generator.normal(size=WIDTH))]) for w in WORDS]
    vectors.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"questions": questions, "vectors": vectors}


def test_tokens_keep_their_places() -> None:
    text = "Don't pay $3,000.50 (or 12%) for the U.K.'s naïve co-op."
    tokens = [text[start:end] for start, end in tokenise(text)]
    assert tokens == [
        "Do", "n't", "pay", "$", "3,000.50", "(", "or", "12", "%", ")", "for", "the", "U", ".", "K",
        ".", "'s", "naïve", "co", "-", "op", ".",
    ]  # fmt: skip
    assert "".join(tokens) == text.replace(" ", "")


def test_spans_of_tokens_give_back_the_answers(files: dict[str, Path]) -> None:
    """The answer that most people gave, the text from its first to its last token."""
    questions = read_questions([files["questions"]])
    found = [question.context.between(*question.answer) for question in questions]
    assert found == ["3,000", "pears", "by the river Aare", "Aare", "old"]


def test_a_batch_names_each_distinct_token_once(files: dict[str, Path]) -> None:
    questions = read_questions([files["questions"]])
    vectors = read_vectors(files["vectors"], set(WORDS), WIDTH)
    vocabulary = Vocabulary.of(questions, questions, vectors, least=3, least_letter=1)
    encoder = Encoder(vocabulary, letters_of_token=5)
    context, lengths, question, question_lengths, words, letters = encoder.inputs(questions[1:3])
    assert lengths.tolist() == [13, 12] and question_lengths.tolist() == [6, 6]
    assert (
        len(words)
        == len(letters)
        == 1 + len({t for q in questions[1:3] for t in q.context.tokens + q.question.tokens})
    )
    names = [*vocabulary.known, *vocabulary.own]
    spelled = [
        "".join(vocabulary.letters[c] for c in letters[token].tolist())
        for token in context[1, :12].tolist()
    ]
    assert spelled == [token[:5] for token in questions[2].context.tokens]
    assert names[int(words[context[1, 2]])] == "mill"
    assert names[int(words[context[1, 0]])] == "the"  # "The", whose letters are its own
    assert int(words[context[0, 0]]) == 1  # "Mia" has no vector and is too rare for its own


def test_batches_hold_every_question_once(files: dict[str, Path]) -> None:
    questions = read_questions([files["questions"]])
    order = torch.Generator().manual_seed(0)
    drawn = batches(questions, 2, order)
    assert [len(batch) for batch in drawn] == [2, 2]  # what is left of a last one is left out
    assert len({q.id for batch in drawn for q in batch}) == 4
    assert sum(map(len, batches(questions, 2))) == 5


def test_long_texts_and_questions_are_left_out(files: dict[str, Path]) -> None:
    questions = read_questions([files["questions"]])  # on texts of 13 and 12 tokens
    assert short_enough(questions, 13, 7) == questions
    assert short_enough(questions, 12, 7) == questions[2:]
    assert short_enough(questions, 13, 5) == questions[3:]


def test_the_best_span_ends_where_it_starts_or_later() -> None:
    start = torch.tensor([[0.0, 5.0, 1.0, 4.0], [3.0, 0.0, 0.0, -torch.inf]])
    end = torch.tensor([[7.0, 0.0, 1.0, 4.0], [0.0, 0.0, 9.0, -torch.inf]])
    assert [s.tolist() for s in best_spans(start, end, 9)] == [[1, 0], [3, 2]]
    assert [s.tolist() for s in best_spans(start, end, 2)] == [[3, 1], [3, 2]]


class Knows(torch.nn.Module):
    """Answers with the first token of every text."""

    def forward(self, context: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.zeros(context.shape)
        scores[:, 0] = 1
        return scores, scores


def test_a_model_is_scored_over_all_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    asked = [("What?", ["The fox"]), ("Which?", ["Foxes live", "fox"])]
    path.write_text(json.dumps(squad({"The fox, not foxes: Foxes live.": asked})))
    encoder = Encoder(Vocabulary(["", "?"], [], ["", "?"]), 4)
    questions = read_questions([path])
    # "the" is nothing once normalised.
    assert score(Knows(), encoder, questions, 2, 9) == {"em": 0.0, "f1": 0.0}
    path.write_text(json.dumps(squad({"Foxes, the fox.": [("What?", ["Foxes, the fox", "fox"])]})))
    questions = read_questions([path])
    assert score(Knows(), encoder, questions, 2, 9) == {"em": 0.0, "f1": pytest.approx(200 / 3)}


# -- Bad input


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = squad()
    change(data["data"][0]["paragraphs"][0])
    return json.dumps(data).encode()


def moved(paragraph: dict[str, Any]) -> None:
    paragraph["qas"][0]["answers"][0]["answer_start"] += 1


def blank(paragraph: dict[str, Any]) -> None:
    paragraph["context"] += " "
    place = len(paragraph["context"]) - 1
    paragraph["qas"][1]["answers"] = [{"text": " ", "answer_start": place}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04", "expected JSON in the format of SQuAD 1.1, plain or gzipped"),
        (b"\x1f\x8bno", "expected JSON in the format of SQuAD 1.1, plain or gzipped"),
        (b'{"data": 3}', "expected JSON in the format of SQuAD 1.1, plain or gzipped"),
        (b'{"data": []}', "expected questions, got none"),
        (
            changed(moved),
            "expected the answer '3,000' of question Mia0 at character 10 of its text, got ',000 '",
        ),
        (changed(blank), "expected an answer of at least a token to question Mia1"),
        (changed(lambda p: p["qas"][0].update(id=3)), "expected JSON in the format of SQuAD 1.1"),
        (b"[" * 100_000, "expected JSON in the format of SQuAD 1.1"),
        (changed(lambda p: p["qas"][0].pop("id")), "expected JSON in the format of SQuAD 1.1"),
    ],
)
def test_wrong_questions_are_refused_in_a_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_questions([path])
    assert str(caught.value).startswith(f"{path}: {sentence}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"the 1 2 3\n", "expected a word and 6 numbers in line 1, got 3 numbers"),
        (b"the 1 2 3 4 5 six\n", "expected lines of a word and 6 numbers"),
        (b"the 1 2 3 nan 5 6\n", "expected finite numbers in line 1, got 1 2 3 nan 5 6"),
        (b"zebra 1 2 3 4 5 6\n", "expected vectors of words in the questions, got none of them"),
        (b"\x1f\x8bno", "expected lines of a word and 6 numbers"),
    ],
)
def test_wrong_vectors_are_refused_in_a_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_vectors(path, {"the"}, WIDTH)
    assert str(caught.value).startswith(f"{path}: {sentence}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a file to read, got: No such file"):
        read_questions([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"nowhere: expected a file to read, got: No such file"):
        read_vectors(tmp_path / "nowhere", {"the"}, WIDTH)


# -- Model


def small_model() -> BiDAF:
    torch.manual_seed(0)
    return BiDAF(torch.randn(4, 6), 3, 5, hidden_size=5, letter_size=3, channels=4, width=3)


def longer() -> tuple[Tensor, ...]:
    """Other sizes than the example's: three questions."""
    numbers = torch.arange(27).view(3, 9) % 5, torch.arange(18).view(3, 6) % 4
    lengths = torch.tensor([6, 9, 1]), torch.tensor([6, 1, 4])
    words, letters = torch.tensor([0, 3, 6, 2, 5]), torch.arange(35).view(5, 7) % 5
    return numbers[0], lengths[0], numbers[1], lengths[1], words, letters


def test_padding_changes_no_answer() -> None:
    model = small_model().eval()
    inputs = longer()
    together = model(*inputs)
    for row, (tokens, asked) in enumerate(zip(inputs[1].tolist(), inputs[3].tolist(), strict=True)):
        alone = model(
            inputs[0][row : row + 1, :tokens], inputs[1][row : row + 1],
            inputs[2][row : row + 1, :asked], inputs[3][row : row + 1], *inputs[4:],
        )  # fmt: skip
        for scores, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(scores[row, :tokens], expected[0])
            assert bool((scores[row, tokens:] == -torch.inf).all())


def test_find_groups_follows_the_whole_model() -> None:
    """Each direction of each layer is a family, and all columns that read a unit are labelled."""
    groups = iss.find_groups(small_model(), example())
    assert not groups.kept_whole and not groups.tied and groups.by_value is None
    start = {family.name: family.start for family in groups.families}
    assert {*start} == {*FAMILIES.values()}

    def both(layer: str) -> list[int]:
        first, second = start[f"{layer}.l0"], start[f"{layer}.l0_reverse"]
        return [*range(first, first + 5), *range(second, second + 5)]

    columns = {weight.name: weight.column_units.tolist() for weight in groups.weights}
    phrase, m2 = both("phrase"), both("modelling2")
    for direction in ("", "_reverse"):
        assert columns[f"modelling1.weight_ih_l0{direction}"] == phrase * 4
        assert columns[f"modelling2.weight_ih_l0{direction}"] == both("modelling1")
        # The text and the question, then the unit, its share of the likely start, the product.
        assert columns[f"output.weight_ih_l0{direction}"] == phrase * 4 + m2 * 3
        assert columns[f"phrase.weight_ih_l0{direction}"] == [-1] * 10
    assert columns["start.weight"] == m2 + phrase * 4
    assert columns["end.weight"] == both("output") + phrase * 4
    for part in ("context", "question", "product"):
        assert columns[f"of_{part}.weight"] == phrase


@torch.no_grad()
def test_a_model_without_its_dead_units_gives_the_same_answers(tmp_path: Path) -> None:
    model = small_model().eval()
    groups = iss.find_groups(model, example())
    generator = torch.Generator().manual_seed(0)
    dead = {f.name: torch.rand(f.size, generator=generator) < 0.4 for f in groups.families}
    groups.zero_units_(dead)
    small, report = iss.shrink(model, groups)
    assert {n: after for n, (_, after) in report.sizes.items()} == {
        n: int((~mask).sum()) for n, mask in dead.items()
    }
    assert parameters(small) < parameters(model)
    iss.save(small, tmp_path / "small.safetensors")
    loaded = iss.load(tmp_path / "small.safetensors", small_model()).eval()
    fast = iss.prepare(small)
    for inputs in (example(), longer()):
        expected = model(*inputs)
        for other in (small, loaded, fast):
            torch.testing.assert_close(other(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_paper_counts_parameters_without_words() -> None:
    """Every weight and bias at the sizes of the paper's figure; torch has two biases a gate."""
    model = BiDAF(torch.randn(4, 100), 3, 5)
    lstms = sum(2 * 400 * (inputs + 100 + 2) for inputs in (200, 800, 200, 1400))
    highway, letters = 4 * (200 * 200 + 200), 5 * 8 + 100 * (8 * 5 + 1)
    assert parameters(model) == lstms + highway + letters + 3 * 200 + 2 * (1000 + 1)


# -- Runs

TINY = (
    "--hidden-size 4 --letter-size 2 --channels 3 --width 3 --letters 6 --least-word 1 --batch 2 "
    f"--least-letter 1 --steps 6 --evaluate-every 2 --every 2 --vector-size {WIDTH}"
).split()


def options(files: dict[str, Path], output: Path, *more: str) -> list[str]:
    data = str(files["questions"]), "--dev", str(files["questions"])
    vectors = "--vectors", str(files["vectors"])
    return [*TINY, "--train", *data, *vectors, "--output", str(output), *more]


class Stop(Exception):
    """Something ends a run."""


def run(arguments: list[str], stop_after: int = 0) -> int:
    """A run, which ends after a batch as if power had failed; 0: not at all."""
    with pytest.MonkeyPatch.context() as patch:
        steps = training.Reader._average

        def averaging(self: training.Reader) -> None:
            steps(self)
            if stop_after and self.done + 1 == stop_after:
                raise Stop

        patch.setattr(training.Reader, "_average", averaging)
        return main(arguments)


# So strong that units die in a few steps, not all at once.
ISS = ["--method", "iss", "--strength", "0.5", "--threshold", "0.45", "--ema", "0.5"]
ISS += ["--after", "0"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_resumed_run_has_the_same_bits(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(options(files, whole, *ISS)) == 0
    with pytest.raises(Stop):
        run(options(files, broken, *ISS), stop_after=5)
    assert run(options(files, broken, *ISS, "--resume")) == 0
    capsys.readouterr()
    expected, got = weights(whole), weights(broken)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (whole, broken))
    assert one["small"] == two["small"]
    assert sum(one["small"][column] for column in FAMILIES) < 32  # units left during training
    assert [row["em"] for row in one["epochs"]] == [row["em"] for row in two["epochs"]]


def test_units_that_are_held_at_zero_make_the_same_model(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """Without dropout, whose masks depend on the widths."""
    plain = [*ISS, "--keep", "1"]
    assert run(options(files, tmp_path / "gone", *plain)) == 0
    assert run(options(files, tmp_path / "held", *plain, "--no-remove")) == 0
    (gone, encoder, result), (held, *_) = (opened(tmp_path / name) for name in ("gone", "held"))
    assert sum(result["small"][column] for column in FAMILIES) < 32
    inputs = encoder.inputs(read_questions([files["questions"]]))
    torch.testing.assert_close(gone(*inputs), held(*inputs), rtol=1e-4, atol=1e-4)


def test_two_processes_train_the_same_model(files: dict[str, Path], tmp_path: Path) -> None:
    plain = [*ISS, "--keep", "1"]
    assert run(options(files, tmp_path / "one", *plain)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              "2", "-m", "examples.squad"]  # fmt: skip
    command = [*launch, *options(files, tmp_path / "two", *plain)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (one, encoder, alone), (two, _, result) = (opened(tmp_path / name) for name in ("one", "two"))
    inputs = encoder.inputs(read_questions([files["questions"]]))
    # Adam steps by the sign of a gradient near zero, which rounding can turn.
    torch.testing.assert_close(one(*inputs), two(*inputs), rtol=2e-2, atol=2e-2)
    assert result["machine"]["processes"] == 2
    for ours, theirs in zip(alone["epochs"], result["epochs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_rate_that_is_too_high_is_one_sentence(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options(files, tmp_path / "run", "--rate", "1e10")) == 2
    error = capsys.readouterr().err
    assert "with a learning rate of 1e+10: give a lower --rate\n" in error
    assert error.startswith("examples.squad: expected ") and error.count("\n") == 1


def opened(folder: Path) -> tuple[BiDAF, Encoder, dict[str, Any]]:
    """The model of a finished run, what makes its inputs, and result.json."""
    result = json.loads((folder / "result.json").read_text())
    vocabulary = Vocabulary(**json.loads((folder / "vocabulary.json").read_text()))
    names = training.Recipe.__dataclass_fields__
    recipe = training.Recipe(**{k: v for k, v in result["options"].items() if k in names})
    vectors = torch.zeros(len(vocabulary.known), recipe.vector_size)
    model = training.new_model(recipe, vocabulary, vectors)
    iss.load(folder / "model.safetensors", model)
    return model.eval(), Encoder(vocabulary, recipe.letters), result


def test_the_report_has_a_row_for_a_run(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options(files, tmp_path / "run", *ISS)) == 0
    capsys.readouterr()
    assert report.main([str(tmp_path / "run" / "result.json")]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| iss, 0.5 | ")
    assert report.main([str(tmp_path / "none")]) == 2
    expected = f"examples.squad.report: cannot read {tmp_path / 'none'}: no such file or directory"
    assert capsys.readouterr().err == f"{expected}\n"


def test_fine_tuning_starts_from_a_baseline(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert run(options(files, base, "--method", "baseline")) == 0
    fine = ["--method", "iss-finetune", "--start", str(base)]
    assert run(options(files, tuned, *fine, "--rate", "0", "--threshold", "0")) == 0
    before, after = weights(base), weights(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert run(options(files, tmp_path / "3", *fine, "--hidden-size", "5")) == 2
    assert "expected a model of sizes" in capsys.readouterr().err
    assert run(options(files, tmp_path / "4", *fine, "--least-word", "3")) == 2
    assert "to be the vocabulary of these questions" in capsys.readouterr().err
    assert run(options(files, tmp_path / "5", *fine[:3], str(tmp_path / "none"))) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--batch 9", "expected at least 9 questions for a batch, got 5"),
        ("--vector-size 5", "expected a word and 5 numbers in line 1, got 6"),
        ("--resume", "no checkpoint to resume from"),
        ("--method iss-finetune", "expected --method iss-finetune with --start"),
        ("--start x", "expected --method baseline without --start"),
        ("--steps 5", "expected --steps of a multiple of --evaluate-every 2, got 5"),
        ("--steps 0", "expected --steps in [1, inf), got 0"),
        ("--after -1", "expected --after in [0, inf), got -1"),
        ("--keep 0", "expected --keep in (0, 1], got 0.0"),
        ("--ema 1", "expected --ema in [0, 1), got 1.0"),
        ("--phrase-strength 1", "expected --phrase-strength with --strength > 0"),
        ("--strength 1", "expected --method baseline without the penalty of --strength, got 1.0"),
        ("--letters 2", "expected --letters of at least --width 3"),
    ],
)
def test_wrong_arguments_get_a_sentence(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    sentence: str,
) -> None:
    assert run(options(files, tmp_path / "run", *more.split())) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_data_is_refused(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(options(files, folder, *ISS)) == 0
    before = (folder / "checkpoint.pt").read_bytes()
    vectors = files["vectors"].read_text(encoding="utf-8")
    files["vectors"].write_text(vectors.replace("the ", "The ", 1), encoding="utf-8")
    capsys.readouterr()
    assert run(options(files, folder, *ISS, "--resume")) == 2
    assert "of a run with data" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").read_bytes() == before
