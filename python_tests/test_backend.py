# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the ISA, the reference, and what happens without the extension."""

import os
import subprocess
import sys

import pytest
import torch

import iss_kernels as iss
from iss_kernels.backend import backend, build_info, supported_isas, use_backend, use_isa

PROGRAM = "import iss_kernels; print(iss_kernels.build_info()['isa'])"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
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
    assert f"ISS_KERNELS_ISA: expected one of {built}, got avx9000" in result.stderr


def test_use_isa_returns_to_the_former():
    before = build_info()["isa"]
    with use_isa("scalar"):
        assert build_info()["isa"] == "scalar"
    assert build_info()["isa"] == before


def test_use_backend_forces_the_reference_and_returns():
    with use_backend("reference"):
        assert backend() == build_info()["backend"] == "reference"
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


def test_two_python_threads_may_run_one_model():
    from concurrent.futures import ThreadPoolExecutor

    lstm = iss.ISSLSTM(8, 32)
    xs = [torch.randn(20, 4, 8) for _ in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [lstm(x)[0] for x in xs]
        for _ in range(5):
            results = pool.map(lambda x: lstm(x)[0].detach(), xs)
            assert all(map(torch.equal, results, expected))
