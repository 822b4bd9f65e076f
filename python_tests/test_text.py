# SPDX-License-Identifier: Apache-2.0
"""The demo's text: what is read, how it is split, and what is refused."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iss_kernels.demo import text

SENTENCES = ["the cat sat on the mat", "a dog ate the <unk>", "no cat is a dog"] * 200
PARTS = {"train": SENTENCES, "valid": SENTENCES[:60], "test": SENTENCES[60:120]}


def ptb_files(prefix: str = "") -> dict[str, str]:
    return {f"{prefix}ptb.{part}.txt": "\n".join(PARTS[part]) + "\n" for part in PARTS}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def zipped(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def words(loaded: text.Text, part: str) -> list[str]:
    return [loaded.vocabulary[number] for number in getattr(loaded, part)]


def sentences(loaded: text.Text, part: str) -> set[str]:
    return set(" ".join(words(loaded, part)).split(" <eos>"))


def test_default_text_is_large_and_always_the_same() -> None:
    loaded = text.load()
    assert len(loaded.train) > 50_000
    assert len(loaded.valid) > 5_000
    assert len(loaded.test) > 5_000
    assert text.load().fingerprint == loaded.fingerprint
    assert loaded.description.startswith("the language reference inside Python 3.")


def test_default_text_does_not_leak_training_passages() -> None:
    loaded = text.load()
    train = sentences(loaded, "train")
    for part in ("valid", "test"):
        held_out = {s for s in sentences(loaded, part) if len(s.split()) > 12}
        # Passages that differ in capitals or numbers alone may meet once.
        assert len(held_out & train) <= 0.02 * len(held_out)


def test_vocabulary_is_of_the_training_part_alone() -> None:
    loaded = text.load()
    assert loaded.vocabulary[0] == "<unk>"
    assert set(loaded.train.tolist()) == set(range(len(loaded.vocabulary)))
    assert max(loaded.valid.max(), loaded.test.max()) < len(loaded.vocabulary)
    assert (loaded.test == 0).any()


def test_directory_in_penn_treebank_form(tmp_path: Path) -> None:
    loaded = text.load(write(tmp_path, ptb_files("simple/data/")))
    assert words(loaded, "train")[:8] == [*SENTENCES[0].split(), "<eos>", "a"]
    # <unk> in the text: rare words were replaced before, so every word is known.
    known = {"<unk>", "<eos>", *" ".join(SENTENCES).split()}
    assert set(loaded.vocabulary) == known
    assert loaded.train.dtype == torch.int64


def test_zip_is_the_same_as_its_directory(tmp_path: Path) -> None:
    shadows = {f"__MACOSX/._ptb.{part}.txt": "\x00\x05" for part in PARTS}
    archive = zipped(tmp_path / "ptb.zip", shadows | ptb_files())
    folder = write(tmp_path / "folder", ptb_files())
    assert text.load(archive).fingerprint == text.load(folder).fingerprint


def test_plainest_name_wins(tmp_path: Path) -> None:
    others = {f"ptb.char.{part}.txt": "t h e _ c a t\n" * 999 for part in PARTS}
    alone, both = tmp_path / "alone", tmp_path / "both"
    write(alone, ptb_files())
    write(both, ptb_files() | others)
    assert text.load(both).fingerprint == text.load(alone).fingerprint


@pytest.mark.parametrize("form", ["file", "zip", "directory"])
def test_single_file_is_split_by_lines(tmp_path: Path, form: str) -> None:
    lines = [f"line {n} of many words" for n in range(1000)]
    files = {"book.txt": "\n".join(lines)}
    folder = write(tmp_path / "folder", files)
    path = {
        "file": folder / "book.txt",
        "zip": zipped(tmp_path / "book.zip", files),
        "directory": folder,
    }[form]
    loaded = text.load(path)
    assert [len(loaded.train), len(loaded.valid), len(loaded.test)] == [840 * 6, 80 * 6, 80 * 6]
    # A number that occurs once is no word to learn.
    assert set(loaded.vocabulary) == {"<unk>", "<eos>", "line", "of", "many", "words"}


def damaged_zip(tmp_path: Path) -> Path:
    path = zipped(tmp_path / "cut.zip", ptb_files())
    path.write_bytes(path.read_bytes()[:200])
    return path


def binary(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such path": (
        lambda p: p / "none.txt",
        "cannot read {p}/none.txt: no such file or directory",
    ),
    "empty file": (lambda p: binary(p, b""), "{p}/data.txt is empty"),
    "blank file": (lambda p: binary(p, b" \n\n"), "{p}/data.txt is empty"),
    "picture": (lambda p: binary(p, b"\x89PNG\r\n\xff"), "{p}/data.txt is not text in UTF-8"),
    "zeros": (lambda p: binary(p, bytes(5000)), "{p}/data.txt is not text in UTF-8"),
    "no zip": (damaged_zip, "{p}/cut.zip is not a zip file that can be read"),
    "empty zip": (
        lambda p: zipped(p / "a.zip", {}),
        "expected a file with 'train' in its name in {p}/a.zip, found none",
    ),
    "no validation part": (
        lambda p: write(p, {"train.txt": "a\n", "test.txt": "a\n"}),
        "expected a file with 'valid' in its name in {p}, found none",
    ),
    "empty part": (
        lambda p: write(p, ptb_files() | {"ptb.valid.txt": ""}),
        "ptb.valid.txt in {p} is empty",
    ),
    "too little to train": (
        lambda p: binary(p, b"few words\n" * 3),
        "expected at least 2000 words to train on, got 9 in {p}/data.txt",
    ),
    "too little to test": (
        lambda p: write(p, ptb_files() | {"ptb.test.txt": "few words\n"}),
        "expected at least 200 words to test on, got 3 in {p}",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text_gets_one_sentence(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(text.TextError) as error:
        text.load(make(tmp_path))
    assert str(error.value) == message.format(p=tmp_path)
