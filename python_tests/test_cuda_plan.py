# SPDX-License-Identifier: Apache-2.0
"""The planner: on any GPU, for any layer, what it picks fits; and it picks what it should."""

import itertools
import subprocess
from pathlib import Path

import cuda_compile
import pytest
import torch

import iss_kernels as iss

ROOT = Path(__file__).parents[1]
GPUS = {
    "A100": (8, 0, 108, 163 * 1024),
    "A10": (8, 6, 72, 99 * 1024),
    "H100": (9, 0, 132, 227 * 1024),
    "a few multiprocessors": (9, 0, 8, 227 * 1024),
    "B200": (10, 0, 148, 227 * 1024),
    "RTX 5090": (12, 0, 170, 99 * 1024),
}
DTYPES = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
DTYPES += [(torch.float16, False), (torch.float64, False)]
SIZES = [*range(1, 70), *range(71, 600, 13), *range(600, 2001, 97), 100_000, 10**9]
TIERS = ["block", "cluster", "grid", "steps"]
# Clusters of 2, 3, ... 16 blocks that an H100 said it holds at once (cudaOccupancyMaxActiveClusters
# for 200 KB of shared memory and 512 threads, so one block on a multiprocessor).
CLUSTERS = dict(zip(range(2, 17), (66, 39, 30, 22, 17, 15, 15, 9, *[7] * 7), strict=True))


def plans(gpu, sizes=SIZES, batches=(1, 3, 16, 64, 128), cell="lstm"):
    for (dtype, tf32), backward, batch, hidden in itertools.product(
        DTYPES, (False, True), batches, sizes
    ):
        yield (
            hidden,
            batch,
            dtype,
            iss.explain_plan(
                hidden, batch, dtype, backward=backward, tf32=tf32, device=GPUS[gpu], cell=cell
            ),
        )


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("gpu", GPUS)
def test_what_it_picks_fits(gpu, cell):
    major, minor, multiprocessors, shared_bytes = GPUS[gpu]
    for hidden, batch, dtype, plan in plans(
        gpu, SIZES if cell == "lstm" else SIZES[::7], cell=cell
    ):
        what = (hidden, batch, dtype, plan)
        assert plan.why, what
        if plan.tier == "steps":
            continue
        assert plan.units % 8 == 0 and plan.blocks == -(-hidden // plan.units), what
        assert plan.rows >= 1 and 1 <= plan.groups <= -(-batch // plan.rows), what
        assert plan.threads % 32 == 0, what
        assert 32 <= plan.threads <= (256 if dtype == torch.float64 else 512), what
        assert 0 < plan.shared_bytes <= shared_bytes, what
        if plan.tier == "block":
            assert plan.blocks == 1, what
        if plan.tier == "cluster":
            data_centre = (major, minor) in ((9, 0), (10, 0))
            assert major >= 9 and 2 <= plan.blocks <= (16 if data_centre else 8), what
        if plan.tier == "grid":  # all of them resident, one on a multiprocessor
            assert plan.blocks >= 2 and plan.blocks * plan.groups <= multiprocessors, what


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_larger_layer_never_goes_back_a_tier(gpu, dtype):
    """For few rows. With many, grid and steps are close together where they meet, and which is
    ahead depends on how H divides into blocks."""
    for batch in (1, 16):
        tiers = [
            TIERS.index(iss.explain_plan(h, batch, dtype, tf32=False, device=GPUS[gpu]).tier)
            for h in range(1, 2000, 5)
        ]
        assert tiers == sorted(tiers)


@pytest.mark.parametrize(
    "gpu, hidden, batch, dtype, tier",
    [
        ("H100", 64, 16, torch.float32, "block"),  # 64 KB of weights
        ("H100", 64, 16, torch.bfloat16, "block"),
        ("H100", 128, 16, torch.float32, "cluster"),  # 256 KB
        ("H100", 256, 16, torch.float32, "cluster"),
        ("H100", 256, 64, torch.bfloat16, "cluster"),
        ("H100", 373, 16, torch.bfloat16, "cluster"),
        ("H100", 512, 16, torch.float32, "grid"),  # 4 MB: more than 16 blocks hold
        ("H100", 1024, 16, torch.bfloat16, "grid"),
        ("H100", 1500, 64, torch.float32, "steps"),  # 36 MB: more than all blocks hold
        ("H100", 1024, 128, torch.float32, "steps"),  # bound by arithmetic: 134 M FMA a step
        ("A100", 64, 16, torch.float32, "block"),
        ("A100", 128, 16, torch.bfloat16, "block"),  # 128 KB, and no clusters
        ("A100", 256, 16, torch.float32, "grid"),
        ("RTX 5090", 256, 16, torch.bfloat16, "cluster"),
    ],
)
def test_landmarks(gpu, hidden, batch, dtype, tier):
    plan = iss.explain_plan(hidden, batch, dtype, tf32=False, device=GPUS[gpu])
    assert plan.tier == tier, plan.why


def test_fewer_gates_leave_room_for_more_units():
    """Of 227 KB: float32 weights of up to 238 units of an RNN, 137 of a GRU, 119 of an LSTM."""
    for cell, hidden in (("rnn_tanh", 192), ("gru", 128), ("lstm", 112)):
        plan = iss.explain_plan(hidden, 64, tf32=False, device=(8, 0, 1, 227 * 1024), cell=cell)
        assert plan.tier == "block", plan.why
    plan = iss.explain_plan(512, 16, tf32=False, device=GPUS["H100"], cell="rnn_tanh")
    assert plan.tier == "cluster" and plan.units % 32 == 0, plan.why


def test_all_clusters_of_a_plan_are_resident_at_once():
    """16 groups of 8 blocks, of which 15 are, would take twice as long as they need."""
    seen = set()
    for hidden, batch, dtype, plan in plans("H100", sizes=range(1, 900, 9), batches=(16, 128, 999)):
        if plan.tier == "cluster":
            assert plan.groups <= CLUSTERS[plan.blocks], (hidden, batch, dtype, plan)
            seen.add((plan.blocks, plan.groups))
    assert {blocks for blocks, groups in seen if groups > 1} >= {4, 8}


@pytest.mark.parametrize(
    "hidden, batch, tier",
    [
        (64, 1, "one step"),
        (512, 16, "one step"),
        (256, 128, "one step"),  # 14 us on an H100; two GEMMs take 15 and more
        (1500, 4, "one step"),
        (10**9, 4, "one step"),
        (1024, 64, "steps"),  # 83 us on an H100
        (64, 10**5, "steps"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_step_keeps_nothing_resident(hidden, batch, tier, dtype):
    for proj_size in (0, 32):
        plan = iss.explain_plan(
            hidden, batch, dtype, proj_size=proj_size, steps=1, tf32=False, device=GPUS["H100"]
        )
        assert plan.tier == tier and plan.blocks == 0, plan
    plan = iss.explain_plan(
        hidden, batch, dtype, backward=True, steps=1, tf32=False, device=GPUS["H100"]
    )
    assert plan.tier == "steps" or hidden == 64, plan  # few KB are soon filled


def test_a_short_sequence_is_not_worth_filling_shared_memory():
    def tiers(backward):
        return [
            iss.explain_plan(
                1024, 16, torch.bfloat16, backward=backward, steps=steps, device=GPUS["H100"]
            ).tier
            for steps in (2, 3, 5, 10, 35, None)
        ]

    for backward in (False, True):
        kept = [tier != "steps" for tier in tiers(backward)]
        assert kept == sorted(kept) and not kept[0] and kept[-2:] == [True, True]
    assert sum(t != "steps" for t in tiers(True)) <= sum(t != "steps" for t in tiers(False))


def test_rows_are_counted_in_32_bits_where_weights_are_resident():
    for backward in (False, True):
        plan = iss.explain_plan(8, 2**30, tf32=False, backward=backward, device=GPUS["H100"])
        assert plan.tier == "steps" and "32 bits" in plan.why


def test_rows_spread_over_the_gpu_before_they_share_a_block():
    plan = iss.explain_plan(64, 16, tf32=False, device=GPUS["H100"])
    assert (plan.rows, plan.groups) == (1, 16)
    plan = iss.explain_plan(64, 10_000, tf32=False, device=GPUS["H100"])
    assert plan.groups <= 132 and plan.rows > 1


def test_it_says_why_not_the_tiers_before():
    why = iss.explain_plan(512, 16, tf32=False, device=GPUS["H100"]).why
    assert "one block" in why and "a cluster would need" in why and "of 227 KB" in why
    why = iss.explain_plan(256, 16, tf32=False, device=GPUS["A100"]).why
    assert "clusters need compute capability 9.0" in why


def test_nvidias_own_calculator_agrees(tmp_path):
    """cuda_occupancy.h: a block of every plan fits on a multiprocessor with all its registers."""
    nvcc = cuda_compile.tool("nvcc")
    if nvcc is None:
        pytest.skip("needs cuda_occupancy.h of the CUDA toolkit")
    program = tmp_path / "occupancy"
    sources = [ROOT / "python_tests/plan_occupancy.cpp", ROOT / "csrc/cuda/plan.cpp"]
    # nvcc as a C++ compiler that knows where its headers are.
    command = [nvcc, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 1000  # plans that it was asked about
