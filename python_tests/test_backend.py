# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the ISA, the reference, and what happens without the extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iss_kernels as iss
from iss_kernels.backend import backend, build_info, supported_isas, use_backend, use_isa

PROGRAM = "import iss_kernels; print(iss_kernels.build_info()['isa'])"


def python(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_best_supported_isa_runs_by_default():
    result = python(PROGRAM, ISS_KERNELS_ISA="")
    assert result.stdout.strip() == supported_isas()[0], result.stderr


@pytest.mark.parametrize("isa", supported_isas())
def test_the_environment_forces_an_isa(isa):
    assert python(PROGRAM, ISS_KERNELS_ISA=isa).stdout.strip() == isa


def test_an_unknown_isa_in_the_environment_is_an_error():
    result = python(PROGRAM, ISS_KERNELS_ISA="avx9000")
    built = ", ".join(build_info()["isas_built"])
    assert result.returncode != 0
    assert f"ImportError: ISS_KERNELS_ISA: expected one of {built}, got avx9000" in result.stderr
    assert "plain torch" not in result.stderr  # which would hide it


def test_an_import_brings_no_compiler():
    """torch._dynamo takes longer than torch itself."""
    code = "import torch, sys; before = set(sys.modules); import iss_kernels; "
    code += "print({name.split('.')[1] for name in set(sys.modules) - before if 'torch.' in name})"
    assert "_dynamo" not in python(code).stdout


def test_use_isa_returns_to_the_former():
    before = build_info()["isa"]
    with use_isa("scalar"):
        assert build_info()["isa"] == "scalar"
    assert build_info()["isa"] == before


def test_use_backend_forces_the_reference_and_returns():
    with use_backend("reference"):
        assert backend() == build_info()["backend"] == "reference"
    assert backend() == "extension"


def test_the_same_object_may_be_entered_again():
    reference = use_backend("reference")
    for _ in range(2):
        with reference, reference:
            assert backend() == "reference"
        assert backend() == "extension"


def test_without_the_extension_one_warning_says_why_and_what_to_type():
    code = (
        "import sys; sys.modules['iss_kernels._C'] = None\n"
        "import torch, iss_kernels as iss\n"
        "y, _ = iss.ISSLSTM(3, 4)(torch.randn(5, 2, 3)); y.sum().backward()\n"
        "print(iss.build_info()['backend'], y.shape)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "reference torch.Size([5, 2, 4])"
    assert result.stderr.count("Warning") == 1
    assert "its extension did not load (import of iss_kernels._C halted" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


HERE = torch.__version__
MINOR = ".".join(HERE.split(".")[:2])


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a process started in `tmp_path` imports: (tmp_path, its files)."""
    source, copy = Path(iss.__file__).parent, tmp_path / "iss_kernels"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_C*", "demo", "__pycache__"))
    extension = Path(iss.backend.native().__file__)
    (copy / extension.name).symlink_to(extension)
    return tmp_path, copy


def imported(folder, **environment):
    """Import the copy; prints which implementation runs."""
    code = "import iss_kernels as iss; print(iss.build_info()['backend'])"
    return python(code, cwd=folder, **{"PYTHONPATH": str(folder), **environment})


@pytest.mark.parametrize("record", [None, f"{HERE}\n", f"{MINOR}.99\n"])
def test_an_extension_for_the_same_minor_version_of_torch_runs(package, record):
    folder, files = package
    if record is not None:
        (files / "_C.torch_version").write_text(record)
    result = imported(folder, ISS_KERNELS_REQUIRE="1")
    assert (result.stdout, result.stderr) == ("extension\n", "")


REMEDY = "; to build it: pip install --no-build-isolation . in its source directory\n"


@pytest.mark.parametrize("built", ["2.9.0+cpu", "3.13.0", "2.130.0"])
def test_an_extension_for_another_torch_is_refused_in_one_sentence(package, built):
    folder, files = package
    (files / "_C.torch_version").write_text(built)
    sentence = f"its extension did not load (it was built for torch {built}, not {HERE}){REMEDY}"
    result = imported(folder)
    assert result.stdout == "reference\n"
    assert result.stderr.count("Warning") == 1
    assert sentence in result.stderr
    result = imported(folder, ISS_KERNELS_REQUIRE="1")
    assert result.returncode == 1
    assert result.stderr.splitlines(True)[-1] == "ImportError: iss_kernels: " + sentence.replace(
        "its", "the", 1
    )


def test_an_extension_that_does_not_load_names_both_versions_of_torch(package):
    folder, files = package
    (extension,) = files.glob("_C*.so")
    extension.unlink()
    extension.write_bytes(b"not a library")
    (files / "_C.torch_version").write_text(f"{MINOR}.99")
    result = imported(folder)
    assert result.stdout == "reference\n"
    assert f"; it was built for torch {MINOR}.99, not {HERE}){REMEDY}" in result.stderr
    (files / "_C.torch_version").write_text(HERE)
    assert "it was built for" not in imported(folder).stderr


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ("1", "iss_kernels: the extension did not load (import of iss_kernels._C halted; None in "
              f"sys.modules){REMEDY}"),
        ("yes", "ISS_KERNELS_REQUIRE: expected 0, 1 or unset, got 'yes'\n"),
    ],
)  # fmt: skip
def test_a_required_extension_that_is_missing_is_an_import_error(choice, error):
    code = "import sys; sys.modules['iss_kernels._C'] = None; import iss_kernels"
    result = python(code, ISS_KERNELS_REQUIRE=choice)
    assert result.returncode == 1
    assert result.stderr.splitlines(True)[-1] == f"ImportError: {error}"
    assert python(code, ISS_KERNELS_REQUIRE="0").returncode == 0


def test_two_python_threads_may_run_one_model():
    from concurrent.futures import ThreadPoolExecutor

    lstm = iss.ISSLSTM(8, 32)
    xs = [torch.randn(20, 4, 8) for _ in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [lstm(x)[0] for x in xs]
        for _ in range(5):
            results = pool.map(lambda x: lstm(x)[0].detach(), xs)
            assert all(map(torch.equal, results, expected))
