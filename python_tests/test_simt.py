# SPDX-License-Identifier: Apache-2.0
"""The simulator itself (csrc/simt): right kernels run, wrong ones are reported, in every order."""

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import simt
import torch

SAMPLES = simt.ROOT / "python_tests/simt/sample_kernels.cu"
SIZE = 256  # elements of a sample's input and output

# Each kernel of sample_kernels.cu that can be wrong, and what must be said of it.
WRONG = {
    "skipped_barrier": r"deadlock: 64 threads wait in __syncthreads at sample_kernels.cu:\d+, "
    r"the first block \(0, 0, 0\) thread \(0, 0, 0\); 64 of their blocks' threads have ended",
    "exited_lane": r"deadlock: 31 threads wait in a warp's barrier or shuffle at sample_kernels",
    "shuffle_as_barrier": "race: (read|write) of static shared memory of block 0",
    "two_blocks_one_output": r"race: write of byte \d+ of a tensor of 1024 at sample_kernels.cu:\d+"
    r", and a write by thread \d+ of block (0|1) at sample_kernels.cu:\d+",
    "misaligned_vector": "misaligned: access",
    "beyond_dynamic_shared": "out of bounds: read of 4 bytes at byte 512 of 512 of the dynamic",
    "beyond_static_shared": "out of bounds: write of 4 bytes at static shared memory of block 0",
    "beyond_tensor": "out of bounds: .* a tensor of 1024",
    "before_tensor": "out of bounds: write of 4 bytes at byte -4 of a tensor of 1024",
    "two_barriers": r"divergent barrier: __syncthreads at sample_kernels.cu:\d+ meets the one at",
    "atomic_and_plain": "race: .* byte 0 of a tensor of 4",
    "lane_outside_mask": "wrong mask: a shuffle reads lane 20",
    "uninitialised_shared": "uninitialised: read of static shared memory of block 0",
    "uninitialised_tensor": r"uninitialised: read of byte \d+ of a tensor of 1024",
    "neighbouring_elements": "race: write of byte",
    "write_after_reads": "race: (read|write) of static shared memory of block 0",
    "copy_in_flight": "in flight: read of static shared memory of block 0",
    "copy_of_another": "race|uninitialised",
    "copy_left_behind": "cp.async: .* ends with copies that it has not waited for",
    "exchange_unready": "touched before its block is known to have started",
    "exchange_and_leave": "touched after its block has ended|may have ended before thread",
    "split_cluster_barrier": "race: .* static shared memory of block",
    "diverged_lanes": r"diverged: lanes came to sample_kernels.cu:\d+ by different ways",
    "neighbour_through_grid": "race|uninitialised",
    "relaxed_release": "race",
    "relaxed_acquire": "race",
    "endless_spin": "deadlock: spinning at sample_kernels.cu",
    "read_only_but_written": "__ldg of byte .* which this launch writes|race",
}
ORDERS = [(*order, preempt) for order in simt.ORDERS for preempt in (0, 20)]


@functools.cache
def samples(checked, flags=()):
    name = f"samples-{'check' if checked else 'plain'}{''.join(flags)}"
    return simt.Simulator(simt.build(name, [SAMPLES], checked=checked, flags=flags), checked)


def call(simulator, name, *args):
    """-> error code of a C function of the samples, with tensors as pointers."""
    pointers = [
        ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else arg for arg in args
    ]
    return getattr(simulator.library, name)(*pointers)


def run_sample(simulator, name, wrong):
    """-> (error code, text, input, output)"""
    with simulator.guarded_tensors():
        x, out = torch.randn(SIZE), torch.empty(SIZE)
        flag = torch.zeros(1, dtype=torch.int32)
        code = call(simulator, name, wrong, x, out, flag, ctypes.c_int64(SIZE))
    return code, simulator.last_error, x, out


@pytest.fixture(params=ORDERS, ids=lambda order: "-".join(map(str, order)))
def checked(request):
    simulator = samples(checked=True)
    policy, seed, preempt = request.param
    simulator.configure(policy, seed, preempt)
    return simulator


@pytest.fixture(params=[*simt.ORDERS, "ucontext"], ids=str)
def plain(request):
    """Unchecked, in each order; and with the C library's way to switch between threads."""
    portable = request.param == "ucontext"
    simulator = samples(checked=False, flags=("-DSIMT_UCONTEXT",) if portable else ())
    simulator.configure(*(("fifo", 0) if portable else request.param))
    return simulator


def test_every_sample_is_tested():
    assert set(re.findall(r"^SAMPLE\((\w+),", SAMPLES.read_text(), re.M)) == set(WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernel_is_reported(checked, name):
    code, text, _, _ = run_sample(checked, name, wrong=True)
    assert code == 719
    assert re.search(WRONG[name], text), text


@pytest.mark.parametrize("name", WRONG)
def test_right_kernel_is_not_reported(checked, name):
    code, text, _, _ = run_sample(checked, name, wrong=False)
    assert (code, text) == (0, "")


def test_launch_after_a_failed_one_is_right(checked):
    for name in WRONG:
        run_sample(checked, name, wrong=True)
        code, text, x, out = run_sample(checked, "exchange_unready", wrong=False)
        assert (code, text) == (0, "")
        assert torch.equal(out, x.view(2, -1).flip(0).flatten())


@pytest.mark.parametrize("name", ["exchange_unready", "neighbour_through_grid", "relaxed_release"])
def test_blocks_exchange(plain, name):
    """Through a cluster's shared memory, grid_sync, and a counter of arrivals."""
    code, text, x, out = run_sample(plain, name, wrong=False)
    assert (code, text) == (0, "")
    assert torch.equal(out, x.view(2, -1).flip(0).flatten())


def test_copy_lands_when_it_is_waited_for(plain):
    _, _, x, out = run_sample(plain, "copy_in_flight", wrong=False)
    assert torch.equal(out[:32], x[:128:4])
    _, _, _, out = run_sample(plain, "copy_in_flight", wrong=True)
    assert out[:32].isnan().all()


def test_memory_is_nan_until_written(plain):
    with plain.guarded_tensors():
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert torch.empty(33, dtype=dtype).isnan().all()
    _, _, _, out = run_sample(plain, "uninitialised_shared", wrong=True)
    assert out[9].isnan() and not out[:9].isnan().any()


@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [("bfloat16", torch.bfloat16, 16), ("float16", torch.float16, 16), ("tf32", torch.float32, 8)],
)
def test_matrix_product_is_exact(plain, name, dtype, k):
    """Small whole numbers, so that every order of summing gives the same; ldmatrix loads them."""
    a = torch.randint(-8, 9, (16, k)).to(dtype)
    b = torch.randint(-8, 9, (8, k)).to(dtype)
    d = torch.empty(16, 8)
    assert call(plain, f"product_{name}", a, b, d) == 0
    assert torch.equal(d, a.float() @ b.float().T)


def test_matrix_product_widens_float16():
    """Subnormal, infinite and not a number too: each times one and zeros."""
    numbers = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32)
    a, b, d = torch.zeros(16, 16).half(), torch.eye(8, 16).half(), torch.empty(16, 8)
    for column in numbers[: len(numbers) // 16 * 16].short().view(torch.float16).view(-1, 16):
        a[:, 3] = column
        assert call(samples(checked=False), "product_float16", a, b, d) == 0
        torch.testing.assert_close(d[:, 3], column.float(), rtol=0, atol=0, equal_nan=True)


def test_matrix_product_of_every_kind_is_checked(checked):
    for name, dtype, k in (("bfloat16", torch.bfloat16, 16), ("tf32", torch.float32, 8)):
        with checked.guarded_tensors():
            a, b = torch.ones(16, k, dtype=dtype), torch.ones(8, k, dtype=dtype)
            d = torch.empty(16, 8)
            assert call(checked, f"product_{name}", a, b, d) == 0, checked.last_error
            assert (d == k).all()
            too_few = torch.ones(8, k, dtype=dtype)
            assert call(checked, f"product_{name}", too_few, b, d) == 719
            assert "out of bounds" in checked.last_error


@pytest.mark.parametrize("size", [1.0, 2.0**-20, 2.0**100])
def test_tf32_rounds_to_nearest(size):
    round_to_tf32 = samples(checked=False).library.round_to_tf32
    round_to_tf32.argtypes, round_to_tf32.restype = [ctypes.c_float], ctypes.c_uint32
    for x in np.random.default_rng(0).standard_normal(500).astype(np.float32) * np.float32(size):
        rounded = np.uint32(round_to_tf32(float(x))).view(np.float32)
        mantissa, exponent = np.frexp(x)
        assert rounded == np.ldexp(np.float32(np.round(mantissa * 2**11) / 2**11), exponent)
    assert np.isinf(np.uint32(round_to_tf32(float("inf"))).view(np.float32))


def test_functions_of_a_warp(plain):
    x = torch.randint(0, 100, (32,), dtype=torch.int32)
    out = torch.empty(6, 32, dtype=torch.int32)
    assert call(plain, "warp_functions", x, out) == 0
    lanes = torch.arange(32)
    votes = sum(1 << lane for lane in range(32) if x[lane] % 3 == 0)
    expected = [
        x[3].expand(32),
        x[lanes // 8 * 8 + 3],
        x[lanes ^ 5],
        x[torch.where(lanes + 2 < 32, lanes + 2, lanes)],
        x[torch.where(lanes % 16 >= 2, lanes - 2, lanes)],
        torch.tensor(votes - (votes >> 31 << 32), dtype=torch.int32).expand(32),
    ]
    assert torch.equal(out, torch.stack(expected))


def test_every_thread_knows_where_it_is(plain):
    out = torch.empty(24, 30, dtype=torch.int32)
    assert call(plain, "coordinates", out, 2) == 0
    ranks = torch.arange(24).view(-1, 1) % 2
    assert torch.equal(out, (torch.arange(30) + 1000 * ranks).int())


def test_a_deterministic_kernel_gives_the_same_bits_in_every_order():
    x, results = torch.randn(6 * 128), set()
    for order in simt.ORDERS:
        samples(checked=False).configure(*order)
        out = sum_in_order(samples(checked=False), x)
        results.add(out.item())
    assert len(results) == 1
    assert results.pop() == pytest.approx(x.double().sum().item(), abs=1e-4)


def sum_in_order(simulator, x):
    blocks = len(x) // 128
    sums, out, flag = torch.empty(blocks), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    assert call(simulator, "ordered_sum", x, sums, flag, out, blocks) == 0
    return out


def test_python_threads_may_launch_at_the_same_time(checked):
    """Each gets its own result and its own error, while others make and free tensors."""
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(10):
            x = torch.randn(4 * 128, generator=generator)
            out = sum_in_order(checked, x)
            if abs(out.item() - x.double().sum().item()) > 1e-4:
                failures.append(("sum", seed))
            out, flag = torch.empty(SIZE), torch.zeros(1, dtype=torch.int32)
            args = x, out, flag, ctypes.c_int64(SIZE)
            if call(checked, "before_tensor", True, *args) != 719:
                failures.append(("code", seed))
            if "out of bounds" not in checked.last_error:
                failures.append(("text", seed, checked.last_error))

    with checked.guarded_tensors():
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_tensors_may_outlive_the_guard(checked):
    with checked.guarded_tensors():
        guarded = torch.ones(1000)
    plain = torch.ones(1000)
    assert torch.equal(guarded, plain)
    del guarded
    with checked.guarded_tensors():
        del plain
        resized = torch.ones(3).resize_(5000)
    assert resized[:3].eq(1).all()


def test_unguarded_memory_is_refused_by_a_checked_launch(checked):
    x, out = torch.randn(SIZE), torch.empty(SIZE)
    flag = torch.zeros(1, dtype=torch.int32)
    assert call(checked, "skipped_barrier", False, x, out, flag, ctypes.c_int64(SIZE)) == 719
    assert "no tensor's memory" in checked.last_error


@pytest.mark.parametrize(
    ("geometry", "device", "code", "text"),
    [
        ((1, 0, 0, False, 1), {}, 9, "invalid configuration"),
        ((1, 1025, 0, False, 1), {}, 9, "1025 threads"),
        ((1, 32, 228 * 1024, False, 1), {}, 9, "bytes of shared memory"),
        ((1, 32, 200 * 1024, False, 1), {"shared_bytes": 164 * 1024}, 9, "shared memory"),
        ((3, 32, 0, False, 2), {}, 9, "in clusters of 2"),
        ((2, 32, 0, False, 2), {"major": 8}, 9, "in clusters of 2"),
        ((9, 32, 200 * 1024, True, 1), {}, 720, "9 blocks, of which 8 fit"),
        ((3, 1024, 0, True, 1), {"multiprocessors": 1}, 720, "3 blocks, of which 2 fit"),
        ((8, 32, 200 * 1024, True, 1), {}, 0, ""),
        ((8, 32, 200 * 1024, True, 1), {"left": 7}, 720, "8 blocks, of which 7 fit"),
        ((32, 32, 0, False, 16), {}, 0, ""),
        ((17, 32, 0, False, 17), {}, 9, "in clusters of 17"),
    ],
)
def test_launches_that_the_device_cannot_hold(geometry, device, code, text):
    """And none of them leaves an error behind that the next launch would be blamed for."""
    simulator = samples(checked=False)
    simulator.pretend(**device)
    try:
        assert launch_as(simulator, *geometry) == code
        assert text in simulator.last_error
        assert simulator.pending_error == 0
    finally:
        simulator.pretend()


def launch_as(simulator, blocks, threads, shared_bytes, cooperative=False, cluster=1):
    out = torch.empty(max(blocks * threads, 1), dtype=torch.int32)
    args = blocks, threads, ctypes.c_size_t(shared_bytes), cooperative, cluster, out
    return call(simulator, "launch_as", *args)


def test_limits_of_a_kernel_are_raised_once_for_each_device():
    """As far as they go: a limit set to what one launch needs is too low for another thread's."""
    simulator = samples(checked=False)
    try:
        for device in ({"shared_bytes": 201 * 1024}, {"shared_bytes": 225 * 1024}):
            simulator.pretend(**device)
            before = simulator.limits_set
            for kilobytes in (60, 200, 100):
                assert launch_as(simulator, 1, 32, kilobytes * 1024) == 0
            for cluster in (9, 16):
                assert launch_as(simulator, cluster, 32, 0, cluster=cluster) == 0
            assert simulator.limits_set == before + 2
    finally:
        simulator.pretend()


def test_threads_may_launch_with_other_sizes_at_the_same_time():
    simulator, codes = samples(checked=False), []

    def work(kilobytes):
        codes.extend(launch_as(simulator, 1, 32, kilobytes * 1024) for _ in range(300))

    threads = [threading.Thread(target=work, args=(kilobytes,)) for kilobytes in (60, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 900


def test_a_grid_has_at_most_65535_blocks_along_y_and_z():
    simulator = samples(checked=False)
    out = torch.empty(32, dtype=torch.int32)
    for grid in ((1, 65536, 1), (1, 1, 65536)):
        assert call(simulator, "launch_grid", *grid, out) == 9
        assert "invalid configuration" in simulator.last_error


def test_calls_can_be_left_out(checked):
    with checked.recorded_calls() as places:
        assert run_sample(checked, "exchange_unready", wrong=False)[0] == 0
    assert len(places) == 2
    for place, offsets in places.items():
        line = r"sample_kernels.cu:\d+"
        assert re.fullmatch(f"cluster_sync {line} called at {line}", place)
        with checked.left_out(offsets):
            assert run_sample(checked, "exchange_unready", wrong=False)[0] == 719
    assert run_sample(checked, "exchange_unready", wrong=False)[0] == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other way is the only one here")
def test_both_ways_to_switch_are_built():
    symbols = [
        simt.build("samples-plain", [SAMPLES]).read_bytes(),
        simt.build(
            "samples-plain-DSIMT_UCONTEXT", [SAMPLES], flags=("-DSIMT_UCONTEXT",)
        ).read_bytes(),
    ]
    assert [b"swapcontext" in text for text in symbols] == [False, True]


def test_on_arm_under_an_emulator(tmp_path):
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    flags = ["-std=c++20", "-O1", "-g1", f"-I{simt.ROOT / 'csrc'}", "-c", "-x", "c++"]
    jobs = [(SAMPLES, simt.CHECKED), (SAMPLES.with_name("without_torch.cpp"), [])]
    jobs += [(source, []) for source in simt.SIMULATOR if "guarded" not in source.name]
    objects = [tmp_path / f"{source.stem}.o" for source, _ in jobs]
    for (source, checked), target in zip(jobs, objects, strict=True):
        subprocess.run([compiler, *flags, *checked, source, "-o", target], check=True)
    program = tmp_path / "program"
    subprocess.run([compiler, *objects, "-o", program, "-ldl"], check=True)
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("passed\n", "")
