# SPDX-License-Identifier: Apache-2.0
"""What is packed into the sdist, and how setup.py chooses what to build for."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cuda_compile import ARCHITECTURES

ROOT = Path(__file__).parents[1]
KEPT = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"}


def test_the_sdist_holds_every_source(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        tree,
        ignore=lambda folder, names: (
            set(names) - {"csrc", "iss_kernels", *KEPT}
            if Path(folder) == ROOT
            else {n for n in names if n == "__pycache__" or n.startswith("_C.")}
        ),
    )
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "ISS_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {
        str(path.relative_to(tree))
        for folder in ("csrc", "iss_kernels")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    assert len(sources) > 80
    assert sources | KEPT <= names


# Runs setup.py with a torch that was built for a version of CUDA and sees a number of GPUs, and
# prints what torch's own build would compile for.
PROGRAM = """
import logging, os, runpy, sys
logging.disable()
import torch
torch.version.cuda = {torch_cuda!r}
torch.cuda.device_count = lambda: {gpus}
torch.cuda.get_device_capability = lambda index: (8, 6)
torch.cuda.get_arch_list = lambda: ["sm_80", "sm_90"]
import torch.utils.cpp_extension as cpp
cpp.CUDA_HOME = os.environ["CUDA_HOME"]
sys.argv = ["setup.py", "--quiet", "--name"]
cuda = runpy.run_path("setup.py")["cuda"]
print(sorted({{flag.rpartition("=")[2] for flag in cpp._get_cuda_arch_flags()}}) if cuda else "cpu")
"""
ALL = str(sorted([*ARCHITECTURES, "compute_120"]))


@pytest.fixture
def chosen(tmp_path):
    """What setup.py builds for, or its error: (what nvcc says, PROGRAM's values, environment)."""

    def run(nvcc, environment, **values):
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        if nvcc is not None:
            (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'release {nvcc}, V{nvcc}.1'\n")
            (home / "bin" / "nvcc").chmod(0o755)
        variables = {k: v for k, v in os.environ.items() if "CUDA" not in k}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(**{"torch_cuda": "13.0", "gpus": 0, **values})],
            cwd=ROOT,
            env={**variables, "CUDA_HOME": str(home), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            return result.stderr.replace(str(home), "HOME").strip()
        return result.stdout.splitlines()[-1]

    return run


@pytest.mark.parametrize("unset", [{}, {"TORCH_CUDA_ARCH_LIST": "native"}])
def test_without_a_gpu_every_architecture_of_the_kernels_is_built(chosen, unset):
    assert chosen("13.0", unset) == ALL


@pytest.mark.parametrize(
    ("nvcc", "environment", "values", "expected"),
    [
        ("13.0", {}, {"gpus": 1}, "['compute_86', 'sm_86']"),
        ("13.0", {"TORCH_CUDA_ARCH_LIST": "9.0a"}, {}, "['sm_90a']"),
        ("13.1", {}, {}, ALL),
        ("12.6", {"TORCH_CUDA_ARCH_LIST": "8.0"}, {"torch_cuda": "12.6"}, "['sm_80']"),
        (None, {}, {}, "cpu"),
        ("13.0", {}, {"torch_cuda": None}, "cpu"),
        ("13.0", {"ISS_KERNELS_CUDA": "0"}, {}, "cpu"),
    ],
)
def test_what_is_built_for(chosen, nvcc, environment, values, expected):
    assert chosen(nvcc, environment, **values) == expected


ERRORS = {
    "old nvcc": (
        "12.6", {}, {"torch_cuda": "12.6"},
        "iss_kernels: expected nvcc 12.8 or newer to build for 8.0;9.0a;10.0a;12.0+PTX, got 12.6: "
        "set TORCH_CUDA_ARCH_LIST to the GPUs wanted, such as '8.0;9.0a'",
    ),
    "another major version": (
        "12.8", {}, {},
        "iss_kernels: expected nvcc of torch's CUDA 13.0, got 12.8 in HOME: set CUDA_HOME to a "
        "toolkit of that version, or ISS_KERNELS_CUDA=0 to build without CUDA kernels",
    ),
    "no nvcc": (
        None, {"ISS_KERNELS_CUDA": "1"}, {},
        "iss_kernels: ISS_KERNELS_CUDA=1 needs a CUDA build of torch and nvcc; not found",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_build_that_cannot_be_stops_with_one_sentence(chosen, case):
    nvcc, environment, values, message = ERRORS[case]
    assert chosen(nvcc, environment, **values) == message
