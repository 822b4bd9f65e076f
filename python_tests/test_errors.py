# SPDX-License-Identifier: Apache-2.0
"""Bad input to ops and backends: one sentence each."""

import pytest
import torch
from test_cuda_recurrent import step_inputs

from iss_kernels import ISSLSTM, ops, use_backend
from iss_kernels.backend import build_info, use_isa
from iss_kernels.cells import CELLS
from iss_kernels.testing import Case, make_inputs

CALLS = {
    "a dtype that has no kernel yet": (
        lambda: ISSLSTM(3, 4, dtype=torch.float16)(torch.randn(5, 2, 3).half()),
        RuntimeError,
        "lstm_forward: expected x of dtype float32, float64 or bfloat16, got float16",
    ),
    "an unknown backend": (
        lambda: use_backend("cuda"),
        ValueError,
        "use_backend: expected name to be one of ('extension', 'reference'), got 'cuda'",
    ),
    "an unknown ISA": (
        lambda: use_isa("mmx"),
        ValueError,
        f"use_isa: expected one of {', '.join(build_info()['isas_built'])}, got mmx",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(name):
    call, error, message = CALLS[name]
    with pytest.raises(error) as got:
        call()
    assert str(got.value).splitlines()[0] == message


LSTM_INPUTS = make_inputs(Case("errors", 3, 2, 5, 4, P=3), torch.float32)
PACKED = make_inputs(Case("errors", 3, 2, 5, 4, batch_sizes=(2, 2, 1)), torch.float32)
GRU_INPUTS, RNN_INPUTS = (
    make_inputs(Case("errors", 3, 2, 5, 4), torch.float32, cell=cell)
    for cell in ("gru", "rnn_relu")
)


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        (LSTM_INPUTS, {"x": torch.randn(2)}, "expected x of shape [T, B, I] or [B, I], got [2]"),
        (PACKED, {"x": torch.randn(3, 2, 5)}, "expected x of shape [N, I], got [3, 2, 5]"),
        (LSTM_INPUTS, {"h0": torch.randn(3)}, "expected h0 [B, P] and c0 [B, H], got [3] and [2, 4]"),
        (LSTM_INPUTS, {"h0": torch.randn(1, 3)}, "expected h0 of shape [B, P] = [2, 3], got [1, 3]"),
        (LSTM_INPUTS, {"c0": torch.randn(1, 4)}, "expected c0 of shape [B, H] = [2, 4], got [1, 4]"),
        (LSTM_INPUTS, {"w_ih": torch.randn(16, 6)}, "expected w_ih of shape [4H, I] = [16, 5], got [16, 6]"),
        (LSTM_INPUTS, {"w_hh": torch.randn(16, 4)}, "expected w_hh of shape [4H, P] = [16, 3], got [16, 4]"),
        (LSTM_INPUTS, {"b_ih": torch.randn(15)}, "expected b_ih of shape [4H] = [16], got [15]"),
        (LSTM_INPUTS, {"b_hh": torch.randn(17)}, "expected b_hh of shape [4H] = [16], got [17]"),
        (LSTM_INPUTS, {"w_hr": torch.randn(4, 3)}, "expected w_hr of shape [P, H] = [3, 4], got [4, 3]"),
        (LSTM_INPUTS, {"w_hr": None}, "expected h0 of shape [B, H] = [2, 4] where there is no w_hr, got [2, 3]"),
        (LSTM_INPUTS, {"w_ih": torch.randn(16, 5).double()}, "expected w_ih of dtype float32, got float64"),
        (LSTM_INPUTS, {"x": torch.ones(3, 2, 5).int()}, "expected x of dtype float32, float64 or bfloat16, got int32"),
        (PACKED, {"batch_sizes": torch.tensor([2, 2, 2])}, "expected batch_sizes to add up to N = 5, got 6"),
        (PACKED, {"batch_sizes": torch.tensor([2, 1, 2])}, "expected batch_sizes to start at B = 2 and never grow, got 2 at step 2"),
        (PACKED, {"batch_sizes": torch.tensor([3, 2])}, "expected batch_sizes to start at B = 2 and never grow, got 3 at step 0"),
        (PACKED, {"batch_sizes": torch.tensor([2.0])}, "expected batch_sizes to be 1-D int64 on the CPU, got 1-D float32 on cpu"),
        (LSTM_INPUTS, {"c0": None}, "expected a c0, got none"),
        (GRU_INPUTS, {"c0": torch.randn(2, 4)}, "expected no c0, got one"),
        (RNN_INPUTS, {"c0": torch.randn(2, 4)}, "expected no c0, got one"),
        (GRU_INPUTS, {"w_hr": torch.randn(3, 4)}, "expected no w_hr, got one"),
        (GRU_INPUTS, {"h0": torch.randn(4)}, "expected h0 [B, H], got [4]"),
        (GRU_INPUTS, {"h0": torch.randn(1, 4)}, "expected h0 of shape [B, H] = [2, 4], got [1, 4]"),
        (GRU_INPUTS, {"w_ih": torch.randn(16, 5)}, "expected w_ih of shape [3H, I] = [12, 5], got [16, 5]"),
        (GRU_INPUTS, {"w_hh": torch.randn(12, 3)}, "expected w_hh of shape [3H, H] = [12, 4], got [12, 3]"),
        (GRU_INPUTS, {"b_hh": torch.randn(11)}, "expected b_hh of shape [3H] = [12], got [11]"),
        (RNN_INPUTS, {"w_ih": torch.randn(12, 5)}, "expected w_ih of shape [H, I] = [4, 5], got [12, 5]"),
        (RNN_INPUTS, {"w_hh": torch.randn(4, 5)}, "expected w_hh of shape [H, H] = [4, 4], got [4, 5]"),
        (RNN_INPUTS, {"b_ih": torch.randn(5)}, "expected b_ih of shape [H] = [4], got [5]"),
        (RNN_INPUTS, {"masks": torch.ones(2, 2, 4)}, "expected no masks, got some"),
        (LSTM_INPUTS, {"resets": torch.zeros(2, 3).bool()}, "expected resets of shape [T, B] = [3, 2], got [2, 3]"),
        (GRU_INPUTS, {"resets": torch.zeros(3).bool()}, "expected resets of shape [T, B] = [3, 2], got [3]"),
        (PACKED, {"resets": torch.zeros(3, 2).bool()}, "expected resets of shape [N] = [5], got [3, 2]"),
        (RNN_INPUTS, {"resets": torch.zeros(3, 2)}, "expected resets of dtype bool, got float32"),
        (GRU_INPUTS, {"resets": torch.zeros(3, 2).long()}, "expected resets of dtype bool, got int64"),
        (GRU_INPUTS, {"resets": torch.zeros(3, 2).bool().to("meta")}, "expected resets on cpu, got meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_recurrent_op(inputs, changes, message):
    with pytest.raises(RuntimeError) as got:
        ops.recurrent(**(inputs | changes))
    said = str(got.value).splitlines()[0].removeprefix(inputs["cell"])
    assert said.removeprefix("_forward") == ": " + message


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_a_cell_that_there_is_none_of(backend):
    with use_backend(backend), pytest.raises((RuntimeError, ValueError)) as got:
        ops.recurrent(**(GRU_INPUTS | {"cell": "mgu"}))
    message = str(got.value).splitlines()[0]
    assert "expected cell to be one " in message and message.endswith(("got mgu", "got 'mgu'"))


WEIGHT = torch.randn(4, 3)
ROWS, COLUMNS = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("weights", "rows", "columns", "message"),
    [
        ([WEIGHT], [ROWS], [], "expected row_units and column_units for each of 1 weights, got 1 and 0"),
        ([WEIGHT.half()], [ROWS], [COLUMNS], "expected weights of dtype float32, float64 or bfloat16, got float16"),
        ([WEIGHT, WEIGHT.double()], [ROWS] * 2, [COLUMNS] * 2, "expected weights of dtype float32, got float64"),
        ([WEIGHT[0]], [ROWS], [COLUMNS], "expected weights of shape [R, C], got [3]"),
        ([WEIGHT], [ROWS.long()], [COLUMNS], "expected row_units of dtype int32, got int64"),
        ([WEIGHT], [COLUMNS], [COLUMNS], "expected row_units of shape [R] = [4], got [3]"),
        ([WEIGHT], [ROWS], [ROWS], "expected column_units of shape [C] = [3], got [4]"),
        ([WEIGHT], [ROWS + 2], [COLUMNS], "expected row_units to be -1 or below units = 2, got 2"),
        ([WEIGHT], [ROWS], [COLUMNS - 2], "expected column_units to be -1 or below units = 2, got -2"),
    ],
)  # fmt: skip
def test_group_norms_op(weights, rows, columns, message):
    with pytest.raises(RuntimeError) as got:
        ops.group_norms(weights, rows, columns, 2, 1e-8, False)
    assert str(got.value).splitlines()[0] == "group_norms_forward: " + message


def by_op(name, *args):
    """Calls an op itself, which the wrapper hands contiguous tensors alone."""
    with pytest.raises(RuntimeError) as got:
        getattr(torch.ops.iss_kernels, name)(*args)
    return str(got.value).splitlines()[0].removeprefix(f"{name}: ")


def test_in_place_ops_take_contiguous_tensors_and_change_nothing_otherwise():
    strided = torch.randn(4, 6)[:, ::2]
    before = strided.clone()
    weights = "expected weights to be contiguous, got strides [6, 2] for shape [4, 3]"
    assert by_op("threshold_", [strided], [ROWS], [COLUMNS], 9.0) == weights
    assert by_op("scale_by_units_", [strided], [ROWS], [COLUMNS], torch.zeros(1)) == weights
    rest = [WEIGHT], [ROWS], [COLUMNS], torch.ones(1), False
    assert by_op("add_scaled_by_units_", [strided], *rest) == weights.replace("weights", "outputs")
    with pytest.raises(RuntimeError, match=r"expected 1 outputs, one for each weight, got 0"):
        ops.add_scaled_by_units_([], *rest)
    assert torch.equal(strided, before)


def test_empty_lists():
    none = "expected at least one weight, got none"
    one = torch.ones(1)
    assert by_op("scale_by_units_", [], [], [], one) == none
    assert by_op("add_scaled_by_units_", [], [], [], [], one, False) == none
    assert by_op("group_norms_backward", one, one, [], [], [], 1e-8, False) == none
    for call in (
        lambda: ops.threshold_([], [], [], 1.0),
        lambda: ops.group_norms([], [], [], 1, 1e-8, False),
    ):  # no tensor says which device's kernel to call
        with pytest.raises(NotImplementedError, match="no tensor arguments"):
            call()


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_numbers_that_are_none(value):
    labels = [WEIGHT], [ROWS], [COLUMNS]
    got = f"got {value:g}"
    assert by_op("threshold_", *labels, value) == f"expected threshold >= 0 and finite, {got}"
    message = by_op("group_norms_forward", *labels, 1, value, False)
    assert message == f"expected eps >= 0 and finite, {got}"


@pytest.mark.parametrize("units", [-1, 2**31, 2**62])
def test_units_that_no_label_can_name(units):
    message = by_op("group_norms_forward", [WEIGHT], [ROWS], [COLUMNS], units, 1e-8, False)
    assert message == f"expected units {'>= 0' if units < 0 else 'below 2^31'}, got {units}"


NORMS = torch.ones(1)


@pytest.mark.parametrize(
    ("dnorms", "norms", "message"),
    [
        (NORMS.double(), NORMS, "expected dnorms of dtype float32 for weights of dtype float32, got float64"),
        (NORMS, NORMS.int(), "expected norms of dtype float32 for weights of dtype float32, got int32"),
        (NORMS[None], NORMS, "expected dnorms of shape [units], got [1, 1]"),
        (torch.ones(2), NORMS, "expected dnorms of shape [units] = [1], got [2]"),
        (NORMS.to("meta"), NORMS, "expected dnorms on cpu, got meta"),
        (NORMS, NORMS.to("meta"), "expected norms on cpu, got meta"),
    ],
)  # fmt: skip
def test_group_norms_backward_op(dnorms, norms, message):
    labels = [WEIGHT], [ROWS], [COLUMNS]
    assert by_op("group_norms_backward", dnorms, norms, *labels, 1e-8, False) == message


def test_what_is_written_shares_no_memory_with_the_rest():
    both = torch.randn(8, 3)
    before = both.clone()
    rows, columns, one = [ROWS] * 2, [COLUMNS] * 2, torch.ones(1)
    apart = "expected weights that share no memory, got weights[0] and weights[1] that do"
    rows_of_5 = torch.zeros(5, dtype=torch.int32)
    assert by_op("threshold_", [both[:4]] * 2, rows, columns, 9.0) == apart
    assert by_op("threshold_", [both[:5], both[4:]], [rows_of_5, ROWS], columns, 9.0) == apart
    halves = [both[:4], both[4:]]
    for outputs in (halves[::-1], [both[2:6], torch.zeros(4, 3)]):
        message = by_op("add_scaled_by_units_", outputs, halves, rows, columns, one, False)
        assert message.startswith("expected outputs that share no memory with weights, got outputs")
    factors = torch.ones(12)
    assert by_op("scale_by_units_", [factors.view(4, 3)], [ROWS], [COLUMNS], factors[:1]) == (
        "expected weights that share no memory with factors, got weights[0] that does"
    )
    labels = torch.zeros(12)
    weight, row_units = labels.view(4, 3), labels[:4].view(torch.int32)
    assert by_op("threshold_", [weight], [row_units], [COLUMNS], 9.0) == (
        "expected weights that share no memory with row_units, got weights[0] that does"
    )
    assert torch.equal(both, before)
    # Each element of an output may be made from itself.
    ops.add_scaled_by_units_(halves, halves, rows, columns, one, True)
    torch.testing.assert_close(both, 3 * before)


def test_a_lazy_clone_is_changed_and_not_what_it_was_cloned_from():
    weight = torch.randn(600, 600)
    clone, before = torch._lazy_clone(weight), weight.clone()
    torch.set_num_threads(2)
    labels = torch.zeros(600, dtype=torch.int32)
    ops.scale_by_units_([clone], [labels], [labels], torch.zeros(1))
    assert torch.equal(weight, before)
    assert not clone.any()


@pytest.mark.parametrize("name", ["add_scaled_by_units_", "scale_by_units_", "threshold_"])
def test_a_tensor_whose_elements_share_memory_is_not_written(name):
    base = torch.randn(1, 3)
    before = base.clone()
    lists = [base.expand(4, 3)], [ROWS], [COLUMNS]
    rest = {
        "add_scaled_by_units_": ([WEIGHT], *lists[1:], torch.ones(1), False),
        "scale_by_units_": (*lists[1:], torch.zeros(1)),
        "threshold_": (*lists[1:], 9.0),
    }
    with pytest.raises(RuntimeError) as got:
        getattr(ops, name)(lists[0], *rest[name])
    assert str(got.value).splitlines()[0] == (
        f"{name}: expected tensors to write whose elements share no memory, "
        "got strides [0, 1] for shape [4, 3]"
    )
    assert torch.equal(base, before)
    shared = torch.randn(4, 4)
    before = shared.clone()
    with pytest.raises(RuntimeError, match="expected tensors to write that share no memory"):
        ops.threshold_([shared[:, :3], shared[:, 1:]], [ROWS] * 2, [COLUMNS] * 2, 9.0)
    assert torch.equal(shared, before)


@pytest.mark.parametrize(("cell", "size"), [
    ("lstm", "T"), ("lstm", "B"), ("lstm", "H"), ("gru", "T"), ("gru", "H"), ("rnn_tanh", "B"),
])  # fmt: skip
def test_sizes_whose_products_overflow(cell, size):
    """They fit where another size is 0."""
    n = 2**62
    gates = CELLS[cell].gates * 2
    x, h0, c0, w_ih, w_hh, w_hr = {
        "T": ((n, 0, 0), (0, 2), (0, 2), (gates, 0), (gates, 2), None),
        "B": ((1, n, 0), (n, 0), (n, 0), (0, 0), (0, 0), None),
        "H": ((1, 0, 0), (0, 0 if cell == "lstm" else n), (0, n), (0, 0), (0, 0), (0, n)),
    }[size]
    inputs = {"x": x, "h0": h0, "c0": c0, "w_ih": w_ih, "w_hh": w_hh, "w_hr": w_hr}
    inputs = {k: None if shape is None else torch.empty(shape) for k, shape in inputs.items()}
    if cell != "lstm":
        inputs |= dict.fromkeys(("c0", "w_hr"))
    none = dict.fromkeys(("batch_sizes", "resets", "b_ih", "b_hh", "masks"))
    with pytest.raises(RuntimeError) as got:
        ops.recurrent(cell=cell, reverse=False, **inputs, **none)
    message = str(got.value).splitlines()[0]
    assert message == f"{cell}_forward: expected {size} below 2^31, got {n}"


def backward_arguments(inputs):
    """Arguments of recurrent_backward up to `cells`, by name."""
    y, h_n, c_n, gates, cells = torch.ops.iss_kernels.recurrent_forward(*inputs.values(), True)
    return {
        "dy": torch.ones_like(y),
        "dh_n": torch.ones_like(h_n),
        "dc_n": None if inputs["c0"] is None else torch.ones_like(c_n),
        **{k: v for k, v in inputs.items() if k != "reverse"},
        "y": y, "gates": gates, "cells": cells,
    }  # fmt: skip


SHAPES = {
    "lstm": {
        "dy": "[T, B, P] = [3, 2, 3]", "dh_n": "[B, P] = [2, 3]", "dc_n": "[B, H] = [2, 4]",
        "y": "[T, B, P] = [3, 2, 3]", "gates": "[N, 4H] = [6, 16]", "cells": "[N, H] = [6, 4]",
    },
    "gru": {
        "dy": "[T, B, H] = [3, 2, 4]", "dh_n": "[B, H] = [2, 4]",
        "gates": "[N, 3H] = [6, 12]", "cells": "[N, H] = [6, 4]",
    },
    "rnn_relu": {"dy": "[T, B, H] = [3, 2, 4]", "y": "[T, B, H] = [3, 2, 4]"},
}  # fmt: skip
INPUTS = {"lstm": LSTM_INPUTS, "gru": GRU_INPUTS, "rnn_relu": RNN_INPUTS}


def refused(cell, arguments):
    message = by_op("recurrent_backward", *arguments.values(), False, True, True, True)
    return message.removeprefix(f"{cell}_backward: ")


@pytest.mark.parametrize(("cell", "name"), [(c, name) for c in SHAPES for name in SHAPES[c]])
def test_recurrent_backward_op(cell, name):
    arguments, shape = backward_arguments(INPUTS[cell]), SHAPES[cell][name]
    tensor = arguments[name]
    for wrong, expected in {
        tensor[:-1]: f"expected {name} of shape {shape}, got {list(tensor[:-1].shape)}",
        tensor.flatten(): f"expected {name} of shape {shape}, got [{tensor.numel()}]",
        tensor.double(): f"expected {name} of dtype float32, got float64",
        tensor.int(): f"expected {name} of dtype float32, got int32",
        tensor.to("meta"): f"expected {name} on cpu, got meta",
    }.items():
        assert refused(cell, arguments | {name: wrong}).startswith(expected)


def test_a_gradient_of_c_where_there_is_no_c():
    lstm, gru = (backward_arguments(INPUTS[cell]) for cell in ("lstm", "gru"))
    assert refused("lstm", lstm | {"dc_n": None}) == "expected a dc_n, got none"
    assert refused("gru", gru | {"dc_n": gru["dh_n"]}) == "expected no dc_n, got one"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.ones(1).double(), "expected factors of dtype float32 for weights of dtype float32, got float64"),
        (torch.ones(1, 1), "expected factors of shape [units], got [1, 1]"),
        (torch.ones(0), "expected row_units to be -1 or below units = 0, got 0"),
    ],
)  # fmt: skip
def test_factors_of_units(factors, message):
    weights = [WEIGHT.clone()]
    with pytest.raises(RuntimeError) as got:
        ops.scale_by_units_(weights, [ROWS], [COLUMNS], factors)
    assert str(got.value).splitlines()[0] == "scale_by_units_: " + message
    with pytest.raises(RuntimeError) as got:
        ops.add_scaled_by_units_(weights, [WEIGHT], [ROWS], [COLUMNS], factors, False)
    assert str(got.value).splitlines()[0] == "add_scaled_by_units_: " + message
    assert torch.equal(weights[0], WEIGHT)


def test_bfloat16_weights_have_float32_factors():
    half = [WEIGHT.bfloat16()]
    with pytest.raises(RuntimeError) as got:
        ops.scale_by_units_(half, [ROWS], [COLUMNS], torch.ones(1).bfloat16())
    assert str(got.value).splitlines()[0] == (
        "scale_by_units_: expected factors of dtype float32 for weights of dtype bfloat16, "
        "got bfloat16"
    )


STEP_MISTAKES = {
    "x is a vector": (1, lambda t: t[0], "expected x [B, I], h [B, P] and c [B, H], got [5], [3, 7] and [3, 7]"),
    "x is int": (1, lambda t: t.int(), "expected x of dtype float32, float64, bfloat16 or float16, got int32"),
    "h of another dtype": (2, lambda t: t.double(), "expected h of dtype float32, got float64"),
    "c is narrow": (3, lambda t: t.half(), "expected c to be contiguous and of dtype float32, got float16 with strides [7, 1]"),
    "w_ih of float64": (4, lambda t: t.double(), "expected w_ih of dtype float32, bfloat16 or float16, got float64"),
    "w_hh unlike w_ih": (5, lambda t: t.half(), "expected w_hh of dtype float32, got float16"),
    "w_hh too small": (5, lambda t: t[:, :6], "expected w_hh of shape [4H, P] = [28, 7], got [28, 6]"),
    "a short bias": (6, lambda t: t[:5], "expected b_ih of shape [4H] = [28], got [5]"),
    "out of another batch": (8, lambda t: t[:2], "expected out of shape [B, H] = [3, 7], got [2, 7]"),
    "columns apart": (1, lambda t: t.t().contiguous().t(), "expected x with adjacent columns, got strides [1, 3]"),
    "no c": (3, lambda t: None, "expected a c, got none"),
    "another cell": (0, lambda t: "gru", "expected no c, got one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", STEP_MISTAKES)
def test_a_step_says_what_is_wrong(gpu, mistake):
    which, change, message = STEP_MISTAKES[mistake]
    arguments = step_inputs(gpu, torch.float32)
    arguments[which] = change(arguments[which])
    with pytest.raises(RuntimeError) as got:
        torch.ops.iss_kernels.recurrent_step_(*arguments)
    assert str(got.value).splitlines()[0] == f"{arguments[0]}_step_: {message}"


@pytest.mark.skipif(build_info().get("cuda_built", False), reason="built with CUDA kernels")
def test_a_cpu_build_says_how_to_get_kernels_for_the_gpu():
    op = torch.ops.iss_kernels.recurrent_forward.default
    arguments = (*make_inputs(Case("device", 3, 2, 5, 4), torch.float32).values(), False)
    for key in ("CUDA", "MPS"):  # as the dispatcher calls it for tensors of that device
        with pytest.raises(RuntimeError) as got:
            op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *arguments)
        assert str(got.value).splitlines()[0] == (
            "recurrent_forward: expected tensors on the CPU, since this iss_kernels was built without CUDA "
            "kernels (to have them, build it with ISS_KERNELS_CUDA=1, nvcc and a CUDA build of torch), "
            f"got {key}"
        )
