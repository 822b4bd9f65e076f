# SPDX-License-Identifier: Apache-2.0
"""Fixtures: `isa` runs a test once for every instruction set this machine can run; --slow."""

import pytest
import torch

from iss_kernels.backend import is_built, supported_isas, use_backend, use_isa


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the large cases")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a large case, run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="large case: --slow runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


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


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param
