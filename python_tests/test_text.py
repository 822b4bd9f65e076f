# SPDX-License-Identifier: Apache-2.0
"""The demo's text: what is read, how it is split, and what is refused."""

import os
import random
import socket
import struct
import tracemalloc
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


METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def zipped(path: Path, files: dict[str, str], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
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


@pytest.mark.parametrize("method", METHODS)
def test_zip_is_the_same_as_its_directory(tmp_path: Path, method: str) -> None:
    shadows = {f"__MACOSX/._ptb.{part}.txt": "\x00\x05" for part in PARTS}
    archive = zipped(tmp_path / "ptb.zip", shadows | ptb_files(), METHODS[method])
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


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def encrypted(tmp_path: Path) -> Path:
    path = zipped(tmp_path / "secret.zip", ptb_files())
    content = path.read_bytes()
    # Bit 0 of the flags of every member, in its own header and in the directory.
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(signature)
        while start >= 0:
            content = content[: start + offset] + b"\1" + content[start + offset + 1 :]
            start = content.find(signature, start + 1)
    path.write_bytes(content)
    return path


def damaged_zip(tmp_path: Path) -> Path:
    path = zipped(tmp_path / "cut.zip", ptb_files())
    path.write_bytes(path.read_bytes()[:200])
    return path


def binary(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    return path


KIND = "expected a text file, zip or directory, got another kind of file: "
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
    "null device": (lambda p: Path("/dev/null"), KIND + "/dev/null"),
    "endless device": (lambda p: Path("/dev/zero"), KIND + "/dev/zero"),
    "link to a device": (lambda p: link(p / "a.txt", "/dev/zero"), KIND + "{p}/a.txt"),
    "pipe": (lambda p: pipe(p / "a.txt"), KIND + "{p}/a.txt"),
    "zip pipe": (lambda p: pipe(p / "a.zip"), KIND + "{p}/a.zip"),
    "socket": (lambda p: listening(p / "a.txt"), KIND + "{p}/a.txt"),
    "pipe in a directory": (
        lambda p: pipe(p / "train.txt").parent,
        "expected a file with 'train' in its name in {p}, found none",
    ),
    "link to itself": (
        lambda p: link(p / "a.txt", "a.txt"),
        "cannot read {p}/a.txt: too many levels of symbolic links",
    ),
    "file as a directory": (
        lambda p: binary(p, b"a") / "b",
        "cannot read {p}/data.txt/b: not a directory",
    ),
    "UTF-16": (
        lambda p: binary(p, "some text".encode("utf-16")),
        "{p}/data.txt is not text in UTF-8",
    ),
    "one huge line": (
        lambda p: binary(p, b"word " * 200_000),
        "expected at least 200 words to validate on, got 0 in {p}/data.txt",
    ),
    "encrypted zip": (encrypted, "{p}/secret.zip is not a zip file that can be read"),
    "text named zip": (
        lambda p: binary(p, b"text").rename(p / "text.zip"),
        "{p}/text.zip is not a zip file that can be read",
    ),
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


@pytest.mark.parametrize("method", METHODS)
def test_any_damage_to_a_zip_gets_one_sentence(tmp_path: Path, method: str) -> None:
    path = zipped(tmp_path / "ptb.zip", ptb_files(), METHODS[method])
    whole, generator = path.read_bytes(), random.Random(0)
    for attempt in range(300):
        damaged = bytearray(whole)
        if attempt % 2:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            text.load(path)
        except text.TextError as error:
            assert str(tmp_path) in str(error)


def declare(path: Path, size: int) -> None:
    """Let a zip's directory say another size of its only member."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<L", content, content.rindex(b"PK\1\2") + 24, size)
    path.write_bytes(content)


@pytest.mark.parametrize("lies", [False, True], ids=["honest", "lying"])
@pytest.mark.parametrize("method", METHODS)
def test_a_zip_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, lies: bool
) -> None:
    monkeypatch.setattr(text, "MAX_BYTES", 1 << 20)
    path, piece = tmp_path / "bomb.zip", b" " * (1 << 20)
    pieces = 160 if method == "bzip2" else 40  # its smallest step unpacks to 46 MB or twice that
    with zipfile.ZipFile(path, "w", METHODS[method]) as archive, archive.open("a", "w") as file:
        for _ in range(pieces):
            file.write(piece)
    if lies:
        declare(path, 1000)
    tracemalloc.start()
    with pytest.raises(text.TextError) as error:
        text.load(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.75 * len(piece) * pieces
    assert str(error.value) == (
        f"{path} is not a zip file that can be read"
        if lies
        else f"expected at most 1 MiB of text, got more in a in {path}"
    )


@pytest.mark.parametrize("form", ["file", "directory"])
def test_a_file_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = binary(tmp_path, b"two words\n" * 110_000)
    given, name = (path, path) if form == "file" else (tmp_path, f"data.txt in {tmp_path}")
    assert len(text.load(given).vocabulary) == 4
    monkeypatch.setattr(text, "MAX_BYTES", 1 << 20)
    with pytest.raises(text.TextError) as error:
        text.load(given)
    assert str(error.value) == f"expected at most 1 MiB of text, got more in {name}"


def test_a_directory_of_too_many_files_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_FILES", 2)
    with pytest.raises(text.TextError, match="expected at most 2 files in .*, got more"):
        text.load(write(tmp_path, ptb_files()))


def test_a_name_that_is_not_text_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.txt")
    binary(tmp_path, b"two words\n" * 3000).rename(path)
    assert text.load(path).description == f"{tmp_path}/\ufffd.txt"


def test_the_fingerprint_tells_where_a_part_ends() -> None:
    words = torch.arange(10)
    parts = [text.Text("", ["a"], words[:n], words[n:8], words[8:]) for n in (5, 6)]
    assert parts[0].fingerprint != parts[1].fingerprint
