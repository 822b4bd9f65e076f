# SPDX-License-Identifier: Apache-2.0
"""Fewer cores than threads: results stay the same, threads are counted on only where cores are."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from iss_kernels import ISSLSTM, prepare
from iss_kernels.backend import native
from iss_kernels.cores import quota


def endless():
    while True:
        pass


@contextlib.contextmanager
def busy_processes(count):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=endless, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def until_all_are_free():
    deadline = time.monotonic() + 30
    while native().free_threads() < 8:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def many_threads():
    """Eight threads, and as many cores as the library is to believe in."""
    torch.set_num_threads(8)
    native().pretend_cores(8)
    until_all_are_free()
    yield
    until_all_are_free()  # so that no hold is left to other tests
    native().pretend_cores(0)
    torch.set_num_threads(1)


# H, B, T, layers, bidirectional, P: one for each way to divide the work, with projections too.
PROBLEMS = {
    "rows": (64, 64, 12, 2, False, 0),
    "units": (256, 1, 25, 2, False, 0),
    "units, projected": (256, 2, 20, 1, False, 100),
    "directions": (160, 1, 25, 2, True, 0),
    "directions, projected": (160, 3, 15, 2, True, 70),
    "layers": (32, 4, 150, 4, False, 0),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_bits_stay_the_same_where_threads_come_late(problem, many_threads):
    hidden, batch, steps, layers, bidirectional, proj = problem
    lstm = ISSLSTM(hidden, hidden, layers, bidirectional=bidirectional, proj_size=proj)
    fast = {weights: prepare(lstm, weights) for weights in ("float32", "int8")}
    x = torch.randn(steps, batch, hidden, requires_grad=True)

    def results():
        lstm.zero_grad()
        x.grad = None
        y, state = lstm(x)
        y.sum().backward()
        tensors = [y.detach(), *(s.detach() for s in state), x.grad.clone()]
        tensors += [p.grad.clone() for p in lstm.parameters()]
        with torch.no_grad():
            for model in fast.values():
                y, state = model(x.detach())
                tensors += [y, *state]
        return tensors

    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(8)
    with busy_processes(2):
        for _ in range(10):
            assert all(map(torch.equal, results(), alone))


def test_a_thread_that_comes_late_is_not_counted_on_for_a_while(many_threads):
    lstm = prepare(ISSLSTM(256, 256))
    x = torch.randn(50, 1, 256)
    with torch.no_grad(), busy_processes(2 * (os.cpu_count() or 1)):
        deadline = time.monotonic() + 30
        while native().free_threads() == 8:
            assert time.monotonic() < deadline
            lstm(x)
    until_all_are_free()


@pytest.mark.parametrize("by", [0.005, 0.084])  # seconds, the second on a busy host
def test_a_thread_that_slept_may_be_late_once(by, many_threads):
    native().note_on_time(0.0)
    assert not native().note_late(8, by, True)
    assert native().free_threads() == 8
    native().note_on_time(1.0)  # the end of the very region: no proof that the thread has a core
    assert native().note_late(8, 0.005, True)
    assert native().free_threads() == 4
    until_all_are_free()
    assert not native().note_late(8, 0.005, True)  # it slept meanwhile
    native().note_on_time(0.0)
    assert not native().note_late(8, 0.005, True)
    assert native().free_threads() == 8


@pytest.mark.parametrize("by, slept", [(0.005, False), (0.2, True)])
def test_a_thread_that_is_late_and_not_just_waking_counts_at_once(by, slept, many_threads):
    native().note_on_time(0.0)
    assert native().note_late(8, by, slept)
    assert native().free_threads() == 4


def test_calls_from_several_threads_share_the_cores(many_threads):
    lstm = prepare(ISSLSTM(128, 128))
    x = torch.randn(200, 8, 128)
    least = [8]

    def call():
        torch.set_num_threads(8)
        with torch.no_grad():
            for _ in range(20):
                lstm(x)
                least.append(native().free_threads())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(least) <= 4


def test_no_more_threads_than_cores_are_counted_on():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    code = """
import os, time, torch
from iss_kernels.backend import native
torch.set_num_threads(8)
native().limit_cores(1)
print(native().free_threads())
native().limit_cores(8)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
time.sleep(0.2)
print(native().free_threads())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1"]


def test_a_quota_is_the_least_of_its_cgroup_and_those_above(tmp_path):
    process, root = tmp_path / "cgroup", tmp_path / "fs"

    def write(path, text):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert quota(process, root) == float("inf")  # no such file: no Linux
    process.write_text("0::/pod/container\n")
    assert quota(process, root) == float("inf")
    write("pod/container/cpu.max", "max 100000\n")
    assert quota(process, root) == float("inf")
    write("pod/cpu.max", "350000 100000\n")
    assert quota(process, root) == 3.5
    write("pod/container/cpu.max", "50000 100000\n")
    assert quota(process, root) == 0.5


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_cgroups_version_1(tmp_path, mount):
    process, group = tmp_path / "cgroup", tmp_path / "fs" / mount
    group.mkdir(parents=True)
    process.write_text("5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota(process, tmp_path / "fs") == float("inf")
    (group / "cpu.cfs_quota_us").write_text("200000\n")  # a container's own cgroup, at the root
    assert quota(process, tmp_path / "fs") == 2
