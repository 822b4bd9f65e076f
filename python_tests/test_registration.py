# SPDX-License-Identifier: Apache-2.0
"""Every registered op passes opcheck; compilation works over whole modules."""

import itertools

import pytest
import torch
from gpu import names_of_ops
from torch.library import opcheck

from iss_kernels.testing import CASES, Case, make_inputs

lib = torch.ops.iss_kernels


def lstm_samples():
    yield make_inputs(Case("tiny", 2, 1, 2, 3, P=2), torch.float64)
    for name in ("tail_avx2", "projected", "packed", "packed_projected", "no_rows"):
        case = next(c for c in CASES if c.name == name)
        yield make_inputs(case, torch.float64, reverse=case.batch_sizes is not None)


def group_sample():
    weights = [torch.randn(6, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)]
    rows = [torch.tensor([0, 1, 2, 0, 1, -1]), torch.tensor([-1] * 5)]
    columns = [torch.tensor([0, 1, 2, 3, 3, -1, 0]), torch.tensor([3, 1, 2, 0, -1, -1])]
    return weights, [r.int() for r in rows], [c.int() for c in columns]


def require_grad(inputs):
    for value in inputs:
        if torch.is_tensor(value) and value.is_floating_point():
            value.requires_grad_()
    return inputs


def check_recurrent_forward():
    for inputs in lstm_samples():
        opcheck(lib.recurrent_forward, (*require_grad(list(inputs.values())), True))
        opcheck(lib.recurrent_forward, (*make_inputs(CASES[0], torch.float32).values(), False))


def check_recurrent_backward():
    for inputs in lstm_samples():
        *tensors, reverse = inputs.values()
        outputs = lib.recurrent_forward(*inputs.values(), True)
        cotangents = [torch.randn_like(t) for t in outputs[:3]]
        arguments = [*cotangents, *tensors, outputs[0], *outputs[3:], reverse, True, True, True]
        opcheck(lib.recurrent_backward, arguments)
        for needed in itertools.product((True, False), repeat=3):
            opcheck(lib.recurrent_backward, (*arguments[:-3], *needed))
        # The second derivative runs the reference, whose steps over a packed batch depend on data:
        # eager mode has it (gradgradcheck in test_lstm_ops.py), a traced graph cannot.
        if inputs["x"].shape[:2] == (2, 1):
            opcheck(lib.recurrent_backward, require_grad(arguments))


def check_group_norms_forward():
    weights, rows, columns = group_sample()
    for overlap in (False, True):
        opcheck(lib.group_norms_forward, (require_grad(weights), rows, columns, 5, 1e-8, overlap))


def check_group_norms_backward():
    weights, rows, columns = group_sample()
    norms = lib.group_norms_forward(weights, rows, columns, 5, 1e-8, False)
    dnorms = torch.randn(5, dtype=torch.float64, requires_grad=True)
    arguments = (dnorms, norms, require_grad(weights), rows, columns, 1e-8, False)
    opcheck(lib.group_norms_backward, arguments)


def check_add_scaled_by_units_():
    weights, rows, columns = group_sample()
    outputs = [torch.randn_like(w) for w in weights]
    factors = torch.randn(5, dtype=torch.float64)
    opcheck(lib.add_scaled_by_units_, (outputs, weights, rows, columns, factors, False))


def check_scale_by_units_():
    opcheck(lib.scale_by_units_, (*group_sample(), torch.randn(5, dtype=torch.float64)))


def check_threshold_():
    opcheck(lib.threshold_, (*group_sample(), 0.5))


def registered():
    """Of the CPU; recurrent_step_, CUDA's alone, has its opcheck in test_cuda_recurrent.py."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in names_of_ops() if has_kernel(f"iss_kernels::{name}", "CPU")]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    """One check_<op> above for every op that the dispatcher knows: none can be forgotten."""
    globals()[f"check_{name}"]()


def test_a_gradient_without_saved_gates_computes_them_again():
    results = []
    for save in (True, False):
        inputs = list(make_inputs(Case("small", 3, 2, 2, 5, P=3), torch.float64).values())
        outputs = lib.recurrent_forward(*require_grad(inputs), save)
        (outputs[0].sum() + outputs[2].square().sum()).backward()
        results.append([t.grad for t in inputs if torch.is_tensor(t)])
    assert all(map(torch.equal, *results))


def arguments_of(name):
    """What opcheck was given for a differentiable op, as keyword arguments."""
    inputs = make_inputs(Case("packed", 2, 2, 2, 3, P=2, batch_sizes=(2, 1)), torch.float64)
    outputs = lib.recurrent_forward(*inputs.values(), True)
    saved = dict(zip(("y", "h_n", "c_n", "gates", "cells"), outputs, strict=True))
    weights, rows, columns = group_sample()
    lists = dict(weights=weights, row_units=rows, column_units=columns)
    rest = dict(eps=1e-8, paper_overlap=False)
    norms = lib.group_norms_forward(**lists, units=5, **rest)
    d = {f"d{k}": torch.randn_like(v) for k, v in saved.items() if k in ("y", "h_n", "c_n")}
    needs = dict(need_dx=True, need_dh0=True, need_dw=True)
    return {
        "lstm_forward": inputs | dict(save=True),
        "lstm_backward": d | inputs | {k: saved[k] for k in ("y", "gates", "cells")} | needs,
        "group_norms_forward": lists | dict(units=5) | rest,
        "group_norms_backward": dict(dnorms=norms, norms=norms) | lists | rest,
    }[name]


def moved(value, device):
    return [t.to(device) for t in value] if isinstance(value, list) else value.to(device)


def is_tensors(value):
    return torch.is_tensor(value) or isinstance(value, list)


@pytest.mark.parametrize(
    "name", ["lstm_forward", "lstm_backward", "group_norms_forward", "group_norms_backward"]
)
def test_one_argument_left_on_meta_is_named(name):
    op, given = getattr(lib, name), arguments_of(name)
    first = "x" if name.startswith("lstm") else "weights"
    tensors = [key for key, value in given.items() if is_tensors(value)]
    whole = {k: moved(v, "meta") if k in tensors else v for k, v in given.items()}
    results = op(**whole)
    assert all(t.is_meta for t in (results if isinstance(results, (tuple, list)) else [results]))
    for key in tensors:
        with pytest.raises(RuntimeError, match=rf"^{name}: expected \w+ .*on (cpu|meta|the CPU)"):
            op(**given | {key: whole[key]})
        if key != first:
            with pytest.raises(RuntimeError, match=rf"^{name}: expected {key} .*got .*meta"):
                op(**given | {key: whole[key]})
