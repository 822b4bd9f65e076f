# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile for every GPU we support, and take what they are meant to take."""

import re
import subprocess

import pytest
from cuda_compile import (
    ARCHITECTURES,
    JOBS,
    QUICK_JOBS,
    committed,
    compile_all,
    compiled,
    table,
    tool,
    version,
)

from iss_kernels.cells import CELLS

needs_nvcc = pytest.mark.skipif(
    tool("nvcc") is None, reason="no nvcc: pip install --no-build-isolation -e '.[cuda]'"
)
needs_cuobjdump = pytest.mark.skipif(
    tool("nvcc") is None or tool("cuobjdump") is None,
    reason="no nvcc and cuobjdump: pip install --no-build-isolation -e '.[cuda]'",
)


by_jobs = pytest.mark.parametrize(
    "jobs", [QUICK_JOBS, pytest.param(JOBS, marks=pytest.mark.slow)], ids=["quick", "all"]
)
by_job = pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(
            *job,
            marks=[] if job in QUICK_JOBS else [pytest.mark.slow],
            id=f"{job[0].stem}-{job[1]}",
        )
        for job in JOBS
        if job[0].stem in CELLS
    ],
)


@needs_nvcc
@by_jobs
def test_every_kernel_compiles_without_a_warning_and_none_spills(jobs):
    assert len(compile_all(jobs)) == len(jobs) > 0
    assert {key: spilled for key, (_, _, spilled) in table(jobs).items() if spilled} == {}


@needs_nvcc
@by_jobs
def test_registers_and_shared_memory_are_those_of_the_table(jobs):
    """cuda_resources.csv; `python python_tests/cuda_compile.py` writes it anew."""
    if version() != "13.0":
        pytest.skip(f"the table is nvcc 13.0's, this is {version()}")
    found = {key: numbers[:2] for key, numbers in table(jobs).items()}
    expected = committed()
    assert found == {key: expected.get(key) for key in (expected if jobs == JOBS else found)}


def instructions(source, architecture):
    """{kernel: its instructions}, from the machine code."""
    cubin, _ = compiled(source, architecture)
    command = [tool("cuobjdump"), "-sass", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        kernels[name] = set(re.findall(r"\s([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)\s", code))
    return kernels


def uses(code, instruction):
    return any(found.startswith(instruction) for found in code)


# Math as in csrc/cuda/plan.h: of the five, those for tensor cores.
TENSOR_CORES = "|".join(f"LNS_4MathE{i}E" for i in (2, 3, 4))


@needs_cuobjdump
@by_job
def test_tensor_cores_do_the_products_of_the_low_precisions(source, architecture):
    kernels = {k: v for k, v in instructions(source, architecture).items() if "resident" in k}
    low = {k for k in kernels if re.search(TENSOR_CORES, k)}
    assert low and low != set(kernels)
    for kernel, code in kernels.items():
        if architecture == "sm_80" and "LNS_4TierE1E" in kernel:  # of clusters, which it has none
            assert uses(code, "BPT.TRAP"), kernel
            continue
        assert uses(code, "HMMA") == (kernel in low), kernel
        assert uses(code, "LDSM") or kernel not in low, kernel


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_group_lasso_loads_as_many_bytes_at_a_time_as_rows_allow(architecture):
    """16 or 8, of every dtype; 4 and 2 are what a label or an element takes anyway."""
    source = next(s for s, _ in JOBS if s.stem == "group_lasso")
    kernels = instructions(source, architecture)
    assert kernels and all({"LDG.E.128", "LDG.E.64"} <= code for code in kernels.values())
