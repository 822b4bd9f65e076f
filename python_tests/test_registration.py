# SPDX-License-Identifier: Apache-2.0
"""Every registered op passes opcheck; compilation works over whole modules."""

import itertools

import pytest
import torch
from gpu import names_of_ops
from torch.library import opcheck

from iss_kernels.backend import native
from iss_kernels.cells import CELLS
from iss_kernels.testing import CASES, Case, make_inputs

lib = torch.ops.iss_kernels


def samples():
    """Inputs of recurrent_forward: the LSTM's in many shapes, each other cell's in one or two."""
    for name in ("packed_projected", "no_rows"):
        case = next(c for c in CASES if c.name == name)
        yield make_inputs(case, torch.float64, reverse=case.batch_sizes is not None)
    for cell, of in CELLS.items():
        tiny = Case("tiny", 2, 1, 2, 3, P=2 if of.projects else 0)
        yield make_inputs(tiny, torch.float64, cell=cell)
        packed = Case("packed", 3, 3, 2, 5, batch_sizes=(3, 2, 2))
        if cell in ("gru", "rhn"):
            yield make_inputs(packed, torch.float64, True, cell, "few")


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
    for inputs in samples():
        opcheck(lib.recurrent_forward, (*require_grad(list(inputs.values())), True))
    for cell in CELLS:
        inputs = make_inputs(CASES[0], torch.float32, cell=cell)
        opcheck(lib.recurrent_forward, (*inputs.values(), False))


def check_recurrent_backward():
    for inputs in samples():
        *tensors, reverse = inputs.values()
        y, h_n, c_n, *saved = lib.recurrent_forward(*inputs.values(), True)
        dc_n = None if inputs["c0"] is None else torch.randn_like(c_n)
        arguments = [
            torch.randn_like(y), torch.randn_like(h_n), dc_n, *tensors, y, *saved, reverse,
            True, True, True,
        ]  # fmt: skip
        opcheck(lib.recurrent_backward, arguments)
        # The second derivative runs the reference, whose steps over a packed batch depend on data:
        # eager mode has it (gradgradcheck in test_recurrent_ops.py), a traced graph cannot.
        if inputs["x"].shape[:2] == (2, 1):
            needs = itertools.product((True, False), repeat=3)
            for needed in needs if inputs["cell"] in ("lstm", "gru") else ():
                opcheck(lib.recurrent_backward, (*arguments[:-3], *needed))
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


def arguments_of(name, cell="lstm"):
    """What opcheck was given for a differentiable op, as keyword arguments."""
    P = 2 if CELLS[cell].projects else 0
    case = Case("packed", 2, 2, 2, 3, P=P, batch_sizes=(2, 1))
    inputs = make_inputs(case, torch.float64, cell=cell, resets="few")
    outputs = lib.recurrent_forward(*inputs.values(), True)
    saved = dict(zip(("y", "h_n", "c_n", "gates", "cells"), outputs, strict=True))
    weights, rows, columns = group_sample()
    lists = dict(weights=weights, row_units=rows, column_units=columns)
    rest = dict(eps=1e-8, paper_overlap=False)
    norms = lib.group_norms_forward(**lists, units=5, **rest)
    d = {f"d{k}": torch.randn_like(v) for k, v in saved.items() if k in ("y", "h_n", "c_n")}
    if inputs["c0"] is None:
        d["dc_n"] = None
    needs = dict(need_dx=True, need_dh0=True, need_dw=True)
    return {
        "recurrent_forward": inputs | dict(save=True),
        "recurrent_backward": d | inputs | {k: saved[k] for k in ("y", "gates", "cells")} | needs,
        "group_norms_forward": lists | dict(units=5) | rest,
        "group_norms_backward": dict(dnorms=norms, norms=norms) | lists | rest,
    }[name]


def moved(value, device):
    return [t.to(device) for t in value] if isinstance(value, list) else value.to(device)


def is_tensors(value):
    return torch.is_tensor(value) or isinstance(value, list)


@pytest.mark.parametrize(("name", "cell"), [
    *itertools.product(("recurrent_forward", "recurrent_backward"), ("lstm", "gru", "rnn_relu")),
    ("group_norms_forward", "lstm"),
    ("group_norms_backward", "lstm"),
])  # fmt: skip
def test_one_argument_left_on_meta_is_named(name, cell):
    op, given = getattr(lib, name), arguments_of(name, cell)
    recurrent = name.startswith("recurrent")
    first, said = ("x", name.replace("recurrent", cell)) if recurrent else ("weights", name)
    tensors = [key for key, value in given.items() if is_tensors(value)]
    whole = {k: moved(v, "meta") if k in tensors else v for k, v in given.items()}
    results = op(**whole)
    assert all(t.is_meta for t in (results if isinstance(results, (tuple, list)) else [results]))
    for key in tensors:
        with pytest.raises(RuntimeError, match=rf"^{said}: expected \w+ .*on (cpu|meta|the CPU)"):
            op(**given | {key: whole[key]})
        if key != first:
            with pytest.raises(RuntimeError, match=rf"^{said}: expected {key} .*got .*meta"):
                op(**given | {key: whole[key]})


def test_both_registries_of_cells_agree():
    """csrc/cells/spec.h and iss_kernels/cells.py."""
    rows = [
        (c.name, c.gates, "c" in c.states, c.saved_gates, c.saved_states, c.projects, c.deep,
         c.bias_parts)
        for c in CELLS.values()
    ]  # fmt: skip
    assert native().cells() == rows
