# SPDX-License-Identifier: Apache-2.0
"""The reference, tested first: it is torch's module, in float64, with every gradient."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import reference
from iss_kernels.cells import CELLS
from iss_kernels.testing import CASES, RESETS, Case, make_inputs

# torch's own notice that projections take its slower path.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

MODULES = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}


def torch_recurrent(inputs):
    """torch's module over the arguments of reference.recurrent, without resets.

    A reverse pass is the second direction of a bidirectional module.
    """
    x, batch_sizes, w_hr = (inputs[k] for k in ("x", "batch_sizes", "w_hr"))
    assert inputs["resets"] is None, "torch's modules take no resets"
    gates = CELLS[inputs["cell"]].gates
    module = MODULES[inputs["cell"]](
        x.shape[-1],
        inputs["w_hh"].shape[0] // gates,
        bidirectional=True,
        dtype=x.dtype,
        **({} if w_hr is None else {"proj_size": w_hr.shape[0]}),
    )
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    names |= {} if w_hr is None else {"weight_hr": "w_hr"}
    tensors = {
        f"{name}_l0{suffix}": inputs[key]
        for suffix in ("", "_reverse")
        for name, key in names.items()
    }
    data = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    states = [torch.stack([s, s]) for s in (inputs["h0"], inputs["c0"]) if s is not None]
    hx = tuple(states) if len(states) == 2 else states[0]
    y, final = torch.func.functional_call(module, tensors, (data, hx))
    y = y if batch_sizes is None else y.data
    which = int(inputs["reverse"])
    h_n, c_n = (s[which] for s in final) if isinstance(final, tuple) else (final[which], None)
    return y.chunk(2, -1)[which], h_n, c_n


def by_segments(inputs):
    """torch's module over each row, and in it over each segment between resets, by themselves."""
    reverse, sizes = inputs["reverse"], inputs["batch_sizes"]
    x, resets, h0 = inputs["x"], inputs["resets"], inputs["h0"]
    sizes = [x.shape[1]] * len(x) if sizes is None else sizes.tolist()
    x = torch.split(x.flatten(0, -2), sizes)
    resets = torch.split(resets.flatten(), sizes)
    outputs = {}
    finals = []
    for row in range(len(h0)):
        length = sum(n > row for n in sizes)
        cuts = [t for t in range(1, length) if resets[t][row]]
        segments = list(itertools.pairwise([0, *cuts, length]))
        states = {
            k: inputs[k] if inputs[k] is None else inputs[k][row : row + 1] for k in ("h0", "c0")
        }
        zeros = {k: None if s is None else torch.zeros_like(s) for k, s in states.items()}
        if not reverse and resets[0][row]:
            states = zeros
        for begin, end in reversed(segments) if reverse else segments:
            part = torch.stack([x[t][row : row + 1] for t in range(begin, end)])
            y, *final = torch_recurrent(
                inputs | states | {"x": part, "batch_sizes": None, "resets": None}
            )
            outputs |= {(t, row): y[t - begin] for t in range(begin, end)}
            states = zeros
        finals.append(final)
    y = torch.cat([outputs[t, row] for t, n in enumerate(sizes) for row in range(n)])
    h_n, c_n = (None if s[0] is None else torch.cat(s) for s in zip(*finals, strict=True))
    return y.view(*inputs["x"].shape[:-1], -1), h_n, c_n


def with_gradients(function, inputs):
    """Outputs of function(inputs), then the gradients of everything, for random cotangents."""
    leaves = {
        k: v.detach().requires_grad_()
        for k, v in inputs.items()
        if torch.is_tensor(v) and v.is_floating_point()
    }
    outputs = [y for y in function(inputs | leaves) if y is not None]
    torch.manual_seed(1)
    cotangents = [torch.randn_like(y) for y in outputs]
    return outputs, torch.autograd.grad(
        outputs, list(leaves.values()), cotangents, materialize_grads=True
    )


def assert_same(result, truth):
    for a, b in zip(result[0], truth[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(result[1], truth[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def by_reference(inputs):
    return reference.recurrent(**inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("cell", "case"),
    [
        pytest.param(cell, case, id=f"{cell}-{case}")
        for cell in MODULES
        for case in CASES
        if not case.slow and case.T > 0 and (CELLS[cell].projects or not case.P)
    ],
)
def test_reference_is_torchs_module_with_its_gradients(cell, case, reverse):
    inputs = make_inputs(case, torch.float64, reverse, cell)
    assert_same(with_gradients(by_reference, inputs), with_gradients(torch_recurrent, inputs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", RESETS)
@pytest.mark.parametrize("cell", MODULES)
def test_resets_are_a_loop_over_segments(cell, kind, packed, reverse):
    sizes = (6, 6, 5, 5, 3, 2, 2, 1) if packed else None
    case = Case("resets", 8, 6, 3, 5, P=2 if CELLS[cell].projects else 0, batch_sizes=sizes)
    inputs = make_inputs(case, torch.float64, reverse, cell, kind)
    expected = with_gradients(by_segments, inputs)
    assert_same(with_gradients(by_reference, inputs), expected)
    if kind in ("few", "middle"):  # one step late, as where the state is zeroed after the step
        late = inputs["resets"].roll(1, 0)
        assert not torch.equal(by_reference(inputs | {"resets": late})[0], expected[0][0])


def test_rows_may_be_reset_at_the_same_step_as_they_end():
    inputs = make_inputs(Case("ends", 3, 2, 3, 4, batch_sizes=(2, 2, 1)), torch.float64)
    inputs["resets"] = torch.tensor([False, False, False, True, True])
    for reverse in (False, True):
        inputs["reverse"] = reverse
        assert_same(with_gradients(by_reference, inputs), with_gradients(by_segments, inputs))


def test_no_gradient_flows_across_a_reset():
    for cell in MODULES:
        inputs = make_inputs(Case("cut", 6, 2, 3, 4), torch.float64, cell=cell)
        inputs["resets"] = torch.arange(6)[:, None].eq(3).expand(6, 2)
        x = inputs["x"].requires_grad_()
        y, *_ = by_reference(inputs)
        (before,) = torch.autograd.grad(y[3:].sum(), x, retain_graph=True)
        assert not before[:3].any() and before[3:].any()
        (after,) = torch.autograd.grad(y[:3].sum(), x)
        assert after[:3].any() and not after[3:].any()


def test_no_steps_return_the_initial_state():
    inputs = make_inputs(next(c for c in CASES if c.name == "no_steps"), torch.float64)
    y, h_n, c_n = reference.recurrent(**inputs)
    assert y.shape == (0, 3, 5)
    assert torch.equal(h_n, inputs["h0"]) and torch.equal(c_n, inputs["c0"])


def test_group_norms_by_hand():
    # Unit 0 owns row 0 and column 1, unit 1 owns row 1 and column 0; row 2 belongs to no unit.
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    rows = torch.tensor([0, 1, -1], dtype=torch.int32)
    columns = torch.tensor([1, 0], dtype=torch.int32)
    norms = reference.group_norms([weight], [rows], [columns], 2, 0.0, False)
    # 0: row 1, 2; column 2, 4, 6, of which element (0, 1) = 2 is in both and counts once.
    expected = torch.tensor([1 + 4 + 16 + 36, 9 + 16 + 1 + 25], dtype=torch.float64).sqrt()
    torch.testing.assert_close(norms, expected)
    twice = reference.group_norms([weight], [rows], [columns], 2, 0.0, True)
    torch.testing.assert_close(twice.square(), expected.square() + torch.tensor([4.0, 9.0]))


def test_thresholding_leaves_elements_of_no_unit():
    weight = torch.tensor([[0.1, 0.1, 0.3], [0.1, 0.1, 0.3]])
    rows = torch.tensor([-1, 2], dtype=torch.int32)
    columns = torch.tensor([-1, 0, 0], dtype=torch.int32)
    result = reference.thresholded(weight, rows, columns, 0.2)
    assert result.tolist() == torch.tensor([[0.1, 0.0, 0.3], [0.0, 0.0, 0.3]]).tolist()
