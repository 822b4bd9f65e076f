# SPDX-License-Identifier: Apache-2.0
"""explain_plan: the planner's choice for any GPU, from a build with or without CUDA kernels."""

import pytest
import torch

import iss_kernels as iss
from iss_kernels import backend
from iss_kernels.backend import supported_isas, use_isa


def test_it_says_what_runs_and_why():
    plan = iss.explain_plan(256, 16, torch.bfloat16, device="H100")
    assert plan.tier in ("block", "cluster", "grid")
    assert plan.units * plan.blocks >= 256 and plan.rows >= 1 and plan.groups >= 1
    assert 0 < plan.shared_bytes <= 227 * 1024
    text = str(plan)
    assert text.startswith(f"{plan.tier}: ") and text.endswith(plan.why)
    assert f"{plan.groups} groups at once, each for {plan.rows} rows" in text


def test_projections_and_huge_layers_run_step_by_step():
    for plan in (
        iss.explain_plan(64, 4, proj_size=32, device="H100"),
        iss.explain_plan(20_000, 4, device="A100"),
        iss.explain_plan(64, 4, device=(7, 0, 80, 0)),
    ):
        assert plan.tier == "steps" and str(plan) == f"steps: {plan.why}"


def test_it_knows_how_long_the_sequence_is():
    plan = iss.explain_plan(64, 4, steps=1, device="H100")
    assert plan.tier == "one step" and str(plan) == f"one step: {plan.why}"
    assert " a step" in iss.explain_plan(256, 4, tf32=False, device="H100").why
    why = iss.explain_plan(256, 4, steps=40, tf32=False, device="H100").why
    assert " us for each of 40 steps with " in why
    why = iss.explain_plan(256, 4, steps=1, backward=True, tf32=False, device="H100").why
    assert " us for the one step; " in why


def test_it_is_for_an_h100_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert iss.explain_plan(512, 8) == iss.explain_plan(512, 8, device="H100")
    assert iss.explain_plan(512, 8, device="H100") == iss.explain_plan(
        512, 8, device=(9, 0, 132, 227 * 1024)
    )


def test_float32_is_exact_unless_torch_says_otherwise():
    exact = iss.explain_plan(512, 8, device="H100")
    assert exact == iss.explain_plan(512, 8, tf32=False, device="H100")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert iss.explain_plan(512, 8, device="H100") == iss.explain_plan(
            512, 8, tf32=True, device="H100"
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


DEVICES = (
    "expected device to be a CUDA device of this machine, one of A100, L40S, RTX 4090, H100, H200, "
    "B200, RTX 5090, or 4 ints (major, minor, multiprocessors, shared bytes)"
)


@pytest.mark.parametrize("arguments, message", [
    ({"hidden_size": 0}, "expected hidden_size to be an int from 1, got 0"),
    ({"batch_size": 2.0}, "expected batch_size to be an int from 1, got 2.0"),
    ({"proj_size": -1}, "expected proj_size to be an int from 0, got -1"),
    ({"steps": 0}, "expected steps to be an int from 1, got 0"),
    ({"dtype": torch.int8}, "expected dtype float32, float64, bfloat16 or float16, got int8"),
    ({"cell": "gru", "proj_size": 3}, "expected proj_size 0 for gru, got 3"),
    ({"cell": "rhn", "device": "H100"},
     "expected device to be cpu for rhn, which takes a GEMM and a kernel for each micro-step on "
     "every GPU, got 'H100'"),
    ({"device": "H1000"}, f"{DEVICES}, got 'H1000'"),
    ({"device": (9, 0)}, f"{DEVICES}, got (9, 0)"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as got:
        iss.explain_plan(**({"hidden_size": 8, "batch_size": 2} | arguments))
    assert str(got.value) == f"explain_plan: {message}"


def test_it_needs_the_extension(monkeypatch):
    monkeypatch.setattr(backend, "_C", None)
    with pytest.raises(RuntimeError, match="explain_plan: expected the compiled extension"):
        iss.explain_plan(8, 2)


def test_the_cpu_plan_is_from_numbers_and_says_why():
    one = iss.explain_plan(64, 4, device="cpu", threads=1)
    assert (one.split, one.threads) == ("rows", 1) and str(one).startswith("one thread (")
    for arguments, split in (
        (dict(hidden_size=64, batch_size=64), "rows"),
        (dict(hidden_size=1024, batch_size=10), "units"),
        (dict(hidden_size=1024, batch_size=2, bidirectional=True), "directions"),
        (dict(hidden_size=48, batch_size=1, num_layers=2, steps=100), "layers"),
    ):
        for cell in ("lstm", "gru", "rnn_tanh"):
            plan = iss.explain_plan(**arguments, cell=cell, device="cpu", threads=2)
            assert (plan.split, plan.threads) == (split, 2), (arguments, cell, plan)
            how = f"({plan.isa}; products in float32)"
            assert str(plan) == f"2 threads {how} divide the {split}: {plan.why}"


@pytest.mark.parametrize("isa", supported_isas())
def test_the_cpu_plan_says_whether_bfloat16_is_multiplied(isa):
    with use_isa(isa):
        plans = [
            iss.explain_plan(8, 2, dtype, device="cpu")
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        ]
        multiplies = backend.multiplies_bfloat16()
    of_bfloat16 = "bfloat16, summed in float32" if multiplies else "float32, of widened bfloat16"
    assert [plan.isa for plan in plans] == [isa] * 3
    assert [plan.products for plan in plans] == ["float64", "float32", of_bfloat16]


@pytest.mark.parametrize("isa", sorted({"amx", "avx512_bf16"} & {*supported_isas()}))
def test_threads_meet_after_a_step_only_where_its_products_take_long_enough(isa):
    with use_isa(isa):
        few, many = (
            iss.explain_plan(units, 10, torch.bfloat16, device="cpu", threads=2)
            for units in (64, 256)
        )
    assert (few.split, many.split) == ("rows" if isa == "amx" else "units", "units")


def test_the_cpu_plan_counts_micro_steps():
    shallow, deep = (
        iss.explain_plan(128, 1, device="cpu", cell="rhn", depth=depth, steps=3, threads=2)
        for depth in (1, 10)
    )
    assert (shallow.threads, deep.threads) == (1, 2), (shallow, deep)


def test_the_cpu_plan_refuses_other_arguments():
    for bad in (dict(threads=0), dict(num_layers=0), dict(input_size=0)):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"expected {name} to be an int from 1, got {value}"):
            iss.explain_plan(8, 1, device="cpu", **bad)
    with pytest.raises(ValueError, match="expected cell to be one of lstm, .* got 'mgu'"):
        iss.explain_plan(8, 1, device="cpu", cell="mgu")
    with pytest.raises(ValueError, match="expected tf32 for a GPU, got True for the cpu"):
        iss.explain_plan(8, 1, device="cpu", tf32=True)
    with pytest.raises(ValueError, match="expected depth with an rhn, got 3 for gru"):
        iss.explain_plan(8, 1, device="cpu", cell="gru", depth=3)


@pytest.mark.parametrize(
    "given", [dict(input_size=8), dict(num_layers=1), dict(bidirectional=False), dict(threads=1)]
)
def test_a_gpus_plan_refuses_what_it_does_not_look_at(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"expected {name} with device='cpu', got {value} for 'H"):
        iss.explain_plan(8, 1, device="H100", **given)


def test_a_device_that_is_none_is_refused():
    for device in (0, 1.5, "tpu", (9, 0)):
        with pytest.raises(ValueError, match="expected device to be a CUDA device of this machine"):
            iss.explain_plan(8, 1, device=device)
