# SPDX-License-Identifier: Apache-2.0
"""Memory of tensors that are gone is used again (csrc/cpu/memory.h)."""

import random
from concurrent.futures import ThreadPoolExecutor

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
