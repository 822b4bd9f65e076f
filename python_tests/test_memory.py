# SPDX-License-Identifier: Apache-2.0
"""Memory of tensors that are gone is used again (csrc/memory.h)."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from iss_kernels import ISSLSTM


def train(lstm, steps, batch):
    """Output and gradients of one step, in new tensors."""
    lstm.zero_grad()
    x = torch.randn(steps, batch, lstm.input_size, requires_grad=True)
    y, _ = lstm(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in lstm.parameters())]


def test_what_is_still_held_is_not_written_over():
    choose = random.Random(0)
    layers = [ISSLSTM(size, size) for size in (16, 130, 200)]
    held = []
    for _ in range(60):
        results = train(choose.choice(layers), choose.randint(1, 60), choose.choice((1, 20)))
        held.append((results, [t.clone() for t in results]))
        if len(held) > 8:
            held.pop(choose.randrange(len(held)))
        for tensors, copies in held:
            assert all(map(torch.equal, tensors, copies))


def test_a_training_step_uses_the_memory_of_the_last_one():
    lstm = ISSLSTM(200, 200)

    def addresses():
        return {t.data_ptr() for t in train(lstm, 35, 20) if t.nbytes > 1 << 17}

    known = set().union(*(addresses() for _ in range(5)))
    for _ in range(5):
        assert addresses() <= known


def test_threads_do_not_share_memory():
    def run(_):
        lstm, x = ISSLSTM(130, 130), torch.randn(30, 20, 130)
        first, _ = lstm(x)
        for _ in range(20):
            y, _ = lstm(x)
            y.sum().backward()
            lstm.zero_grad()
            assert torch.equal(y, first)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def test_memory_may_be_resized():
    y, _ = ISSLSTM(130, 130)(torch.randn(30, 20, 130))
    kept = y.detach().clone()
    grown = y.detach().resize_(100, 20, 130)
    assert torch.equal(grown[:30], kept)


def test_a_tensor_too_large_to_be_kept_leaves_the_others_kept():
    def address(steps):
        with torch.no_grad():
            return lstm(torch.ones(steps, 100, 1))[0].data_ptr()

    lstm = ISSLSTM(1, 16)
    first = address(50)
    assert address(50) == first
    address(25_000)  # 160 MB
    assert address(50) == first


# Calls `call(large)` with little memory left, where nn.LSTM's error is known, then `call(small)`.
SHORT_OF_MEMORY = """
import resource, torch, iss_kernels
from iss_kernels import ISSLSTM, ops, prepare

torch.set_num_threads(1)
{define}
expected = call(small)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
try:
    call(large)
except RuntimeError as error:
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in str(error), error
    print("refused")
assert torch.equal(call(small), expected)
"""

CALLS_SHORT_OF_MEMORY = {
    "inference": """
lstm = ISSLSTM(64, 64)
small, large = torch.randn(8, 4, 64), torch.randn(1, 1, 64).expand(20000, 100, 64)
call = lambda x: lstm(x)[0].detach()
""",
    "training": """
lstm = ISSLSTM(16, 64)
small, large = torch.randn(8, 4, 16), torch.randn(3000, 50, 16)
def call(x):
    lstm.zero_grad()
    lstm(x)[0].sum().backward()
    return lstm.weight_hh_l0.grad.clone()
""",
    "prepared": """
lstm = prepare(torch.nn.LSTM(64, 64, num_layers=6))
small, large = torch.randn(8, 4, 64), torch.randn(4000, 100, 64)
lstm(torch.randn(200, 8, 64))
call = lambda x: lstm(x)[0]
""",
    "steps of no rows": """
lstm = ISSLSTM(1, 1)
small, large = torch.randn(8, 4, 1), torch.empty(2**28, 0, 1)
def call(x):
    zeros = x.new_zeros(x.shape[1], 1)
    weights = lstm._parameters.values()
    y, *_ = ops.recurrent("lstm", x, None, None, zeros, zeros, *weights, None, None, False)
    return y.detach()
""",
    "group norms": """
rows, columns = torch.zeros(3).int(), torch.zeros(3).int()
small, large = 4, 2**25
weight = torch.ones(3, 3)
call = lambda units: ops.group_norms([weight], [rows], [columns], units, 1e-8, False)[:4].clone()
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
@pytest.mark.parametrize("name", CALLS_SHORT_OF_MEMORY)
def test_no_memory_is_an_error_of_torchs_after_which_all_goes_on(name):
    """RuntimeError in torch's words, for those who retry with a smaller batch."""
    program = SHORT_OF_MEMORY.format(define=CALLS_SHORT_OF_MEMORY[name])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_kept_memory_is_given_back_where_it_is_short():
    program = """
import resource, torch
from iss_kernels import ISSLSTM

torch.set_num_threads(1)
lstm = ISSLSTM(1, 64)
with torch.no_grad():
    held = [lstm(torch.ones(4000, 8, 1))[0] for _ in range(14)]  # 8 MB each
    del held  # kept
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
    assert lstm(torch.ones(30_000, 8, 1))[0].shape == (30_000, 8, 64)  # 61 MB
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
