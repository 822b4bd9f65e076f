# SPDX-License-Identifier: Apache-2.0
"""Fixtures: `isa` runs a test once for every instruction set this machine can run, `gpu` on the
emulated and the real GPU; --slow."""

import pytest
import torch
from gpu import Gpu

from iss_kernels.backend import build_info, is_built, supported_isas, use_backend, use_isa


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the large cases")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a large case, run with --slow")
    config.addinivalue_line("markers", "gpu: on a real GPU, run with -m gpu (make test-gpu)")


def pytest_collection_modifyitems(config, items):
    removed = [item for item in items if not _differs(item.nodeid)]
    config.hook.pytest_deselected(items=removed)
    items[:] = [item for item in items if _differs(item.nodeid)]
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="large case: --slow runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


# ISAs that share the kernels of another one but for some formats: only tests of these run on them.
SHARED = {
    "amx": ("bfloat16", "int8"),
    "avx2_vnni": ("int8",),
    "avx512_bf16": ("bfloat16",),
    "neon_bf16": ("bfloat16", "int8"),
    "scalar_bf16": ("bfloat16",),
}


def _differs(nodeid):
    """Whether a test does not run on such an ISA, or is one of its formats."""
    test, _, parameters = nodeid.partition("[")
    isa = next((name for name in SHARED if name in parameters.rstrip("]").split("-")), None)
    return isa is None or any(format in test + parameters for format in SHARED[isa])


@pytest.fixture(scope="session", autouse=True)
def the_extension_is_built():
    assert is_built(), "the tests test the extension: make build"


@pytest.fixture(autouse=True)
def seed_and_one_thread():
    """One thread, which is faster for problems this small; a test of threads asks for more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=supported_isas())
def isa(request):
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=[*supported_isas(), "reference"])
def implementation(request):
    """Every ISA of the extension, and the reference."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
    else:
        with use_isa(request.param):
            yield request.param


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A `Gpu` that runs the package's ops: the emulated one, then the real one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: make test-gpu on a machine that has one")
        if not build_info().get("cuda_built"):
            pytest.skip("built without CUDA kernels: make build-cuda")
    with Gpu(request.param).in_use(monkeypatch) as gpu:
        yield gpu


@pytest.fixture
def checked_gpu(monkeypatch):
    """An emulated `Gpu` that checks every access, also to tensors."""
    gpu = Gpu("check")
    with gpu.in_use(monkeypatch), gpu.simulator.guarded_tensors():
        yield gpu


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param
