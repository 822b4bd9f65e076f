# SPDX-License-Identifier: Apache-2.0
"""The kernels with a synchronisation left out: the checker must complain, for every one of them.

It shows two things: the tests below would see a missing barrier, and no barrier is there for
nothing. Nothing is compiled again: the simulator makes a call do nothing (`Simulator.left_out`),
and for add_release and load_acquire, order nothing.
"""

import itertools
import re

import pytest
import simt
import torch
from gpu import Gpu

from iss_kernels import explain_plan
from iss_kernels.testing import Case, make_inputs

CALL = re.compile(
    r"\b(__syncthreads|__syncwarp|cluster_sync|cluster_arrive|cluster_wait|grid_sync"
    r"|cp_async_wait<\w+>|add_release|load_acquire)\("
)


def small_gpu(cell, tier, hidden, batch, dtype, steps, backward):
    """Limits that make the planner choose this tier, and, if there are any such, several tiles of
    rows for each group of blocks."""
    choices = itertools.product((9, 8), (1, 2, 3, 4, 6, 8, 16, 32, 64), range(40))
    found = []
    for major, multiprocessors, step in choices:
        limits = (major, 0, multiprocessors, int(227 * 1024 * 0.85**step))
        plan = explain_plan(
            hidden, batch, dtype, backward=backward, steps=steps, device=limits, cell=cell
        )
        if plan.tier == tier:
            found.append(limits)
            if plan.rows * plan.groups < batch:
                return limits
    assert found, (
        f"no GPU is small enough for {cell}, {tier}, {hidden} units, {batch} rows, {dtype}"
    )
    return found[0]


def layer(cell, tier, dtype, batch, steps):
    """A training step of a layer of 64 units, whose rows are reset now and then."""
    case = Case("layer", steps, batch, 3, 64)

    def run(gpu):
        inputs = make_inputs(case, dtype, cell=cell, resets="few")
        *tensors, reverse = inputs.values()
        gpu.pretend(small_gpu(cell, tier, case.H, batch, dtype, steps, backward=False))
        ops = torch.ops.iss_kernels
        y, h_n, c_n, *saved = ops.recurrent_forward(*tensors, reverse, True)
        d = [torch.randn_like(y), torch.randn_like(h_n)]
        d.append(torch.randn_like(c_n) if inputs["c0"] is not None else None)
        gpu.pretend(small_gpu(cell, tier, case.H, batch, dtype, steps, backward=True))
        ops.recurrent_backward(*d, *tensors, y, *saved, reverse, True, True, True)

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


# Few and small: every one runs once for each of its calls. Steps odd and even, for what is used in
# turns; one row, where blocks have threads to spare.
CASES = {
    f"{cell}-{tier}-{str(dtype)[6:]}-{batch}-{steps}": layer(cell, tier, dtype, batch, steps)
    for tier in ("block", "cluster", "grid")
    for cell, dtype, batch, steps in (
        ("lstm", torch.float32, 20, 4),
        ("lstm", torch.float32, 1, 2),
        ("lstm", torch.bfloat16, 20, 3),
        ("lstm", torch.bfloat16, 20, 4),
        ("gru", torch.float32, 20, 3),
        ("rnn_tanh", torch.bfloat16, 20, 3),
    )
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


@pytest.mark.slow
def test_every_call_is_needed(gpu, calls_of_cases):
    """By somebody: a call may be there for one of the cases alone, and one in a function that
    several places call, for one of these. So there is one that is needed for every line: that of a
    call, and those where the function around it is called."""
    lines = {
        line for calls in calls_of_cases.values() for place in calls for line in lines_of(place)
    }
    reported = set()
    for case, calls in calls_of_cases.items():
        with gpu.simulator.recorded_calls():
            run_case(gpu, case)
        for place in sorted(set(calls) - reported):
            if is_reported(gpu, case, calls[place]):
                reported.add(place)
    assert lines - {line for place in reported for line in lines_of(place)} == set()


def lines_of(place):
    """["file:line", ...] of a place as `recorded_calls` writes it."""
    return place.split(" ", 1)[1].split(" called at ")


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
