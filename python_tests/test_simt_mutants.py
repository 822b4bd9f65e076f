# SPDX-License-Identifier: Apache-2.0
"""The kernels with a synchronisation left out: the checker must complain, for every one of them.

It shows two things: the tests below would see a missing barrier, and no barrier is there for
nothing. Nothing is compiled again: the simulator makes a call do nothing (`Simulator.left_out`),
and for add_release and load_acquire, order nothing.
"""

import re

import pytest
import simt
import torch
from gpu import Gpu, limits_for

CALL = re.compile(
    r"\b(__syncthreads|__syncwarp|cluster_sync|cluster_arrive|cluster_wait|grid_sync"
    r"|cp_async_wait<\w+>|add_release|load_acquire)\("
)


def lstm(tier, dtype, hidden, batch, steps, packed=False):
    """A training step of one layer. A small GPU: each group of blocks has several tiles of rows."""

    def run(gpu):
        gpu.pretend(limits_for(tier, hidden, batch, dtype))
        batch_sizes = torch.tensor([batch] + [batch - batch // 3] * (steps - 1)) if packed else None
        rows = batch * steps if batch_sizes is None else int(batch_sizes.sum())
        x = torch.randn(rows, 3, dtype=dtype)
        x = x if packed else x.view(steps, batch, 3)
        h0, c0 = torch.randn(2, batch, hidden, dtype=dtype)
        w_ih, w_hh = torch.randn(4 * hidden, 3).to(dtype), torch.randn(4 * hidden, hidden).to(dtype)
        ops = torch.ops.iss_kernels
        weights = w_ih, w_hh, None, None, None
        y, h_n, c_n, gates, cells = ops.lstm_forward(x, batch_sizes, h0, c0, *weights, False, True)
        d = [torch.randn_like(t) for t in (y, h_n, c_n)]
        ops.lstm_backward(*d, x, batch_sizes, h0, c0, *weights, y, gates, cells, False)

    return run


def norms(rows, columns):
    """More tiles and more units than the one multiprocessor has blocks for."""

    def run(gpu):
        gpu.pretend((9, 0, 1, 227 * 1024))
        weights = [torch.randn(rows, columns)]
        labels = torch.arange(rows, dtype=torch.int32), torch.arange(columns, dtype=torch.int32)
        units = max(rows, columns)
        torch.ops.iss_kernels.group_norms_forward(
            weights, [labels[0]], [labels[1]], units, 1e-8, False
        )

    return run


# Few and small: every one runs once for each of its calls.
CASES = {
    f"lstm-{tier}-{str(dtype)[6:]}": lstm(tier, dtype, hidden=40, batch=20, steps=3)
    for tier in ("block", "cluster", "grid")
    for dtype in (torch.float32, torch.bfloat16)
} | {"norms": norms(300, 300)}


def run_case(gpu, case):
    torch.manual_seed(0)
    with gpu.simulator.guarded_tensors():
        CASES[case](gpu)


def calls_of_the_source():
    """{"file:line"} of every call of synchronisation in csrc/cuda."""
    calls = set()
    for path in [*(simt.ROOT / "csrc/cuda").glob("*.cu"), *(simt.ROOT / "csrc/cuda").glob("*.h")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if CALL.search(line.split("//")[0]):
                calls.add(f"{path.name}:{number}")
    return calls


@pytest.fixture(scope="module")
def gpu():
    gpu = Gpu("check")
    with pytest.MonkeyPatch.context() as monkeypatch, gpu.in_use(monkeypatch):
        yield gpu


@pytest.fixture(scope="module")
def calls_of_cases(gpu):
    """{case: {place: offsets}}, and nothing is wrong with the kernels as they are."""
    calls = {}
    for case in CASES:
        with gpu.simulator.recorded_calls() as calls[case]:
            run_case(gpu, case)
    return calls


def test_every_call_is_made(calls_of_cases):
    made = {place.split()[1] for calls in calls_of_cases.values() for place in calls}
    assert calls_of_the_source() - made == set()


def test_every_call_is_needed(gpu, calls_of_cases):
    """By somebody: a call may be there for one of the cases alone."""
    unneeded = {place for calls in calls_of_cases.values() for place in calls}
    for case, calls in calls_of_cases.items():
        with gpu.simulator.recorded_calls():
            run_case(gpu, case)
        for place in sorted(set(calls) & unneeded):
            if is_reported(gpu, case, calls[place]):
                unneeded.discard(place)
    assert unneeded == set()


def is_reported(gpu, case, offsets):
    with gpu.simulator.left_out(offsets):
        for order in simt.ORDERS:
            gpu.simulator.configure(*order)
            try:
                run_case(gpu, case)
            except RuntimeError as error:
                assert "expected the kernel to start, got" in str(error)
                return True
            finally:
                gpu.simulator.configure()
    return False
