# SPDX-License-Identifier: Apache-2.0
"""The reference, tested first: it is nn.LSTM, in float64, with every gradient."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import reference
from iss_kernels.testing import CASES, make_inputs

# torch's own notice that projections take its slower path.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")


def torch_lstm(inputs):
    """nn.LSTM over the same arguments as reference.recurrent; a reverse pass by flipping time."""
    x, batch_sizes = inputs["x"], inputs["batch_sizes"]
    w = [inputs[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    projected = inputs["w_hr"] is not None
    lstm = nn.LSTM(
        x.shape[-1],
        inputs["c0"].shape[1],
        proj_size=inputs["h0"].shape[1] if projected else 0,
        bidirectional=True,
        dtype=x.dtype,
    )
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] + ["weight_hr"] * projected
    tensors = {
        f"{name}_l0{suffix}": tensor
        for suffix in ("", "_reverse")
        for name, tensor in zip(names, w + [inputs["w_hr"]] * projected, strict=True)
    }
    data = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    states = tuple(torch.stack([s, s]) for s in (inputs["h0"], inputs["c0"]))
    y, (h_n, c_n) = torch.func.functional_call(lstm, tensors, (data, states))
    y = y if batch_sizes is None else y.data
    which = int(inputs["reverse"])
    return y.chunk(2, -1)[which], h_n[which], c_n[which]


def gradients(outputs, inputs):
    torch.manual_seed(1)
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if not c.slow and c.T > 0], ids=str)
def test_reference_is_nn_lstm_with_its_gradients(case, reverse):
    inputs = make_inputs(case, torch.float64, reverse)
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    ours, torchs = reference.recurrent(**inputs), torch_lstm(inputs)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, inputs), gradients(torchs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


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
