# SPDX-License-Identifier: Apache-2.0
"""ISSRHN is the recurrent highway network of Zilly et al. 2017, here once more, as a loop."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from iss_kernels import ISSRHN, GroupLasso, find_groups, ops, shrink
from iss_kernels.backend import supported_isas, use_backend
from iss_kernels.testing import Case, assert_no_worse_than_torch, make_inputs

T, B, I, H, DEPTH = 6, 4, 3, 5, 3  # noqa: E741  (the letter of the shape alphabet)
CELLS = ["rhn", "rhn_carry"]
CARRIES = ["coupled", "separate"]
DROPOUTS = ["dropout_input", "dropout_state", "dropout_gate"]


def row_by_row(rhn, x, h=None, resets=None, masks=None, lengths=None):
    """y [T, B, H], h_n [B, H] of x [T, B, I], one row of the batch after the other.

    As the paper writes it, s = h * t + s * c: equations 6 to 9.
    """
    steps, batch, _ = x.shape
    gates = 2 if rhn.carry == "coupled" else 3
    width = rhn.hidden_size
    w = rhn.weight_ih_l0.view(gates, width, -1)
    r = rhn.weight_hh_l0.view(rhn.depth, gates, width, width)
    b = rhn.bias_hh_l0.view(rhn.depth, gates, width) if rhn.bias else torch.zeros_like(r[..., 0])
    y, last = torch.zeros(steps, batch, width, dtype=x.dtype), []
    for row in range(batch):
        s = torch.zeros(width, dtype=x.dtype) if h is None else h[row]
        for t in range(steps if lengths is None else lengths[row]):
            if resets is not None and resets[t, row]:
                s = torch.zeros_like(s)
            for d in range(rhn.depth):
                seen = s if masks is None else s * masks[0, row]
                sums = [r[d, g] @ seen + b[d, g] for g in range(gates)]
                if d == 0:
                    sums = [sums[g] + w[g] @ x[t, row] for g in range(gates)]
                candidate, transform = torch.tanh(sums[0]), torch.sigmoid(sums[1])
                carry = 1 - transform if gates == 2 else torch.sigmoid(sums[2])
                if masks is not None:
                    candidate = candidate * masks[1, row]
                s = candidate * transform + s * carry
            y[t, row] = s
        last.append(s)
    return y, torch.stack(last)


def larger(rhn):
    """With weights as large as those of a trained network: they begin as small numbers."""
    for parameter in rhn.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return rhn


def make(**options):
    return larger(ISSRHN(I, H, DEPTH, dtype=torch.float64, **options))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def with_gradients(call, rhn, x, h):
    """What call(x, h) returns, then the gradients of x, h and all parameters."""
    x, h = x.clone().requires_grad_(), h.clone().requires_grad_()
    outputs = call(x, h)
    torch.manual_seed(7)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, h, *rhn.parameters()])]


@pytest.mark.parametrize(
    ("carry", "bias", "recompute"),
    list(itertools.product(CARRIES, [True, False], [False, True])),
)
def test_outputs_and_gradients_are_those_of_the_loop(implementation, carry, bias, recompute):
    rhn = make(carry=carry, bias=bias, recompute=recompute)
    x, h = torch.randn(T, B, I).double(), torch.randn(B, H).double()

    def ours(x, h):
        y, h_n = rhn(x, h[None])
        return y, h_n[0]

    for a, b in zip(
        with_gradients(ours, rhn, x, h),
        with_gradients(lambda x, h: row_by_row(rhn, x, h), rhn, x, h),
        strict=True,
    ):
        same(a, b)


@pytest.mark.parametrize("carry", CARRIES)
def test_forms_of_input(implementation, carry):
    rhn = make(carry=carry)
    x, h = torch.randn(T, B, I).double(), torch.randn(B, H).double()
    y, h_n = row_by_row(rhn, x, h)
    same(rhn(x, h[None]), (y, h_n[None]))
    same(rhn(x)[0], row_by_row(rhn, x)[0])
    same(rhn(x[:, 1], h[None, 1]), (y[:, 1], h_n[None, 1]))
    rhn.batch_first = True
    same(rhn(x.transpose(0, 1), h[None]), (y.transpose(0, 1), h_n[None]))
    rhn.batch_first = False
    lengths = [3, 6, 1, 3]
    y, h_n = row_by_row(rhn, x, h, lengths=lengths)
    same(rhn(x, h[None], lengths=lengths), (y, h_n[None]))
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    packed_y, packed_h = rhn(packed, h[None])
    same((pad_packed_sequence(packed_y)[0], packed_h[0]), (y, h_n))


@pytest.mark.parametrize("carry", CARRIES)
def test_resets_begin_anew(implementation, carry):
    rhn = make(carry=carry)
    x, h = torch.randn(T, B, I).double(), torch.randn(B, H).double()
    resets = torch.rand(T, B) < 0.3
    resets[0, 0] = True
    lengths = [3, 6, 1, 3]
    for given in (None, lengths):

        def ours(x, h, given=given):
            y, h_n = rhn(x, h[None], resets=resets, lengths=given)
            return y, h_n[0]

        def loop(x, h, given=given):
            return row_by_row(rhn, x, h, resets, lengths=given)

        for a, b in zip(
            with_gradients(ours, rhn, x, h), with_gradients(loop, rhn, x, h), strict=True
        ):
            same(a, b)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("packed", "masked", "reverse"),
    [
        (False, False, False),
        pytest.param(True, True, False, marks=pytest.mark.slow),
        pytest.param(True, False, True, marks=pytest.mark.slow),
        (False, True, True),
    ],
)
def test_derivatives(implementation, cell, packed, masked, reverse):
    sizes = (3, 2, 1) if packed else None
    inputs = make_inputs(
        Case("small", 3, 3, 2, 3, batch_sizes=sizes), torch.float64, reverse, cell=cell
    )
    inputs["masks"] = torch.rand(2, 3, 3).double() * 2 if masked else None
    inputs["resets"] = torch.rand(inputs["x"].shape[:-1]) < 0.2
    names = [k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()]
    names = [name for name in names if name != "masks"]

    def function(*tensors):
        y, h_n, _ = ops.recurrent(**(inputs | dict(zip(names, tensors, strict=True))))
        return y, h_n

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)
    if implementation == supported_isas()[0]:  # second derivatives are the reference's
        assert torch.autograd.gradgradcheck(function, leaves)


SHAPES = [
    Case("one", 1, 1, 1, 1),
    Case("one_row", 6, 1, 4, 40),
    Case("tails", 4, 7, 5, 31),
    Case("wide_batch", 2, 70, 2, 3),
    Case("packed", 5, 6, 3, 19, batch_sizes=(6, 6, 4, 1, 1)),
    Case("many_steps", 40, 30, 3, 9, batch_sizes=(30,) * 15 + (17,) * 15 + (3,) * 10),
    Case("no_rows", 4, 0, 3, 5),
    Case("no_steps", 0, 3, 4, 5),
    Case("two_threads", 12, 8, 20, 64),
]


def results(inputs):
    """y, h_n and all gradients of ops.recurrent."""
    inputs = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    leaves = [
        v.requires_grad_()
        for k, v in inputs.items()
        if torch.is_tensor(v) and v.is_floating_point() and k != "masks"
    ]
    y, h_n, _ = ops.recurrent(**inputs)
    torch.manual_seed(7)
    loss = sum((v * torch.randn(v.shape).to(v.dtype)).sum() for v in (y, h_n))
    return [y, h_n, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_no_worse(case, cell, dtype, gpu=None):
    """Kernels against plain torch in the same dtype: as it is, then with all that there is."""
    for everything in (False, True):
        inputs = make_inputs(case, dtype, everything, cell=cell)
        inputs["w_hh"] *= 0.5  # else errors double from step to step
        if everything:
            inputs["masks"] = ((torch.rand(2, case.B, case.H) > 0.4) * 2.0).to(dtype)
            inputs["resets"] = torch.rand(inputs["x"].shape[:-1]) < 0.1
        else:
            inputs["b_ih"] = None
        double = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        ours = results(inputs if gpu is None else gpu.to(inputs))
        with use_backend("reference"):
            torchs, truths = results(inputs), results(double)
        for a, b, truth in zip(ours, torchs, truths, strict=True):
            if dtype == torch.float64:  # torch's own error is not known
                torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-11)
            else:
                assert_no_worse_than_torch(a.cpu(), b, truth)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            # The reference takes seconds for a long sequence, as often as there are ISAs.
            marks=[pytest.mark.slow] * (case.T > 20 and dtype != torch.float32),
            id=f"{case}-{dtype}",
        )
        for case in SHAPES
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_are_no_worse_than_torch(isa, case, cell, dtype, two_threads):
    assert_no_worse(case, cell, dtype)


ON_A_GPU = [
    Case("odd", 5, 3, 4, 5),
    Case("aligned", 3, 3, 5, 64),  # 16 bytes at a time
    Case("packed", 7, 5, 3, 33, batch_sizes=(5, 5, 3, 3, 2, 1, 1)),
    Case("one_step", 1, 9, 4, 17),
    Case("no_steps", 0, 3, 4, 5),
]


@pytest.mark.parametrize("case", ON_A_GPU, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_cuda_kernels_are_no_worse_than_torch(gpu, case, cell, dtype):
    assert_no_worse(case, cell, dtype, gpu)


def test_cuda_kernels_touch_nothing_else(checked_gpu):
    """Every access is checked, and memory is NaN until it is written."""
    with checked_gpu.simulator.guarded_tensors():
        for case in ON_A_GPU[:3]:
            assert_no_worse(case, "rhn", torch.float32, checked_gpu)


def test_a_module_on_a_gpu(gpu):
    rhn, x = make(dropout_state=0.5), torch.randn(T, B, I).double()
    with use_backend("reference"):
        torch.manual_seed(3)
        y, h_n = rhn.cpu()(x, lengths=[3, 6, 1, 3])
    if gpu.simulator is not None:  # a real one draws other numbers
        torch.manual_seed(3)
        same(rhn(x, lengths=[3, 6, 1, 3]), (y, h_n))
    inputs = make_inputs(ON_A_GPU[0], torch.float32, cell="rhn")
    x, h, w_ih, w_hh = gpu.to([inputs[k] for k in ("x", "h0", "w_ih", "w_hh")])
    with pytest.raises(RuntimeError, match="^rhn_step_: expected a cell of one micro-step"):
        ops.recurrent_step_("rhn", x[0], h, None, w_ih, w_hh, None, None, torch.empty_like(h))


def test_parameters_begin_as_in_the_papers_code():
    for carry, gates in (("coupled", 2), ("separate", 3)):
        rhn = ISSRHN(20, 30, 4, carry)
        assert {name: tuple(p.shape) for name, p in rhn.named_parameters()} == {
            "weight_ih_l0": (gates * 30, 20),
            "weight_hh_l0": (4 * gates * 30, 30),
            "bias_hh_l0": (4 * gates * 30,),
        }
        bias = rhn.bias_hh_l0.view(4, gates, 30)
        assert (bias[:, 1] == -2).all() and (bias[:, 2:] == 2).all()
        for drawn in (rhn.weight_ih_l0, rhn.weight_hh_l0, bias[:, 0]):
            assert drawn.abs().max() <= 0.04 and drawn.std() > 0.02
    assert "bias_hh_l0" not in dict(ISSRHN(2, 3, bias=False).named_parameters())


def test_it_is_a_module_like_the_others():
    rhn = ISSRHN(I, H, DEPTH, "separate", dropout_state=0.2, recompute=True)
    assert repr(rhn) == (
        "ISSRHN(3, 5, depth=3, dropout_state=0.2, carry='separate', recompute=True)"
    )
    for other in (copy.deepcopy(rhn), pickle.loads(pickle.dumps(rhn))):
        assert repr(other) == repr(rhn)
        for a, b in zip(other.parameters(), rhn.parameters(), strict=True):
            assert torch.equal(a, b)
    new = ISSRHN(**ISSRHN.options_of(rhn))
    new.load_state_dict(rhn.state_dict())
    assert new.dropout_state == 0.2 and torch.equal(new.weight_hh_l0, rhn.weight_hh_l0)


def test_autocast(implementation):
    rhn, x = larger(ISSRHN(I, H, DEPTH)), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = rhn(x)
    assert y.dtype == h.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rhn(x)[0], rtol=0.05, atol=0.05)


def test_compiled(implementation):
    rhn, x = make(dropout_input=0.3, dropout_state=0.5, dropout_gate=0.2), torch.randn(T, B, I)
    compiled = torch.compile(rhn, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    y = compiled(x.double())[0]
    torch.manual_seed(1)
    same(y, rhn(x.double())[0])


# -- dropout --------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """The arguments x and masks of the calls of ops.recurrent."""
    calls, recurrent = [], ops.recurrent

    def recorded(*arguments):
        calls.append((arguments[1], arguments[11]))
        return recurrent(*arguments)

    monkeypatch.setattr(ops, "recurrent", recorded)
    return calls


def test_without_dropout_or_in_evaluation_nothing_is_dropped(implementation, given):
    rhn, x = make(), torch.randn(T, B, I).double()
    rhn(x)
    rhn.dropout_input = rhn.dropout_state = rhn.dropout_gate = 0.5
    same(rhn.eval()(x)[0], row_by_row(rhn, x)[0])
    for seen, masks in given:
        assert torch.equal(seen, x) and masks is None


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_masks_have_their_probability_and_their_mean(given, p):
    width, batch = 400, 50
    rhn = ISSRHN(width, width, 1, dropout_input=p, dropout_state=p, dropout_gate=p)
    with use_backend("reference"):
        rhn(torch.ones(1, batch, width))
    (x, masks), *_ = given
    state, gate = masks
    for mask in (x[0], state, gate):
        assert torch.equal(mask.unique(), torch.tensor([0, 1 / (1 - p)]))
        # 20,000 draws: five standard deviations of their mean.
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        assert abs((mask == 0).float().mean() - p) < 5 * deviation
        assert abs(mask.mean() - 1) < 5 * deviation / (1 - p)
    assert not torch.equal(state, gate) and not torch.equal(state[0], state[1])


def test_each_dropout_drops_its_own_part(implementation, given):
    x = torch.randn(T, B, I).double()
    for name in DROPOUTS:
        rhn = make(**{name: 0.5})
        rhn(x)
        seen, masks = given.pop()
        assert torch.equal(seen, x) == (name != "dropout_input")
        assert (masks is None) == (name == "dropout_input")
        if masks is not None:
            ones = masks[1 if name == "dropout_state" else 0]
            assert (ones == 1).all() and not (masks == 1).all()
    rhn = make(dropout_gate=1)
    y, h_n = rhn(x)
    assert not y.any() and not h_n.any()  # from zeros, with no candidate
    rhn = make(dropout_input=1)
    same(rhn(x)[0], rhn(torch.zeros_like(x))[0])


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_masks_are_held_for_a_sequence_and_follow_their_row(implementation, given, carry, form):
    rhn = make(carry=carry, dropout_input=0.5, dropout_state=0.3, dropout_gate=0.4)
    x, lengths = torch.randn(T, B, I).double() + 5, [T] * B if form == "padded" else [3, 6, 1, 3]
    y, h_n = rhn(x, lengths=None if form == "padded" else lengths)
    (seen, masks), *_ = given
    order = range(B) if form == "padded" else [1, 0, 3, 2]  # as rows are sorted: longest first
    if form == "packed":
        order = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False).sorted_indices
        sizes = [sum(n > t for n in lengths) for t in range(T)]
        padded = torch.zeros(T, B, I).double()
        for t, rows in enumerate(seen.split(sizes)):
            padded[t, order[: len(rows)]] = rows
        seen, masks = padded, masks[:, order.argsort()]
    scale = seen / x
    for row in range(B):
        assert (scale[: lengths[row], row] == scale[0, row]).all()
    want_y, want_h = row_by_row(rhn, seen, masks=masks, lengths=lengths)
    same(y, want_y)
    same(h_n[0], want_h)
    torch.manual_seed(3)
    first = rhn(x)[0]
    assert not torch.equal(rhn(x)[0], first)  # a sequence later, other masks
    torch.manual_seed(3)
    same(rhn(x)[0], first)


def test_recompute_sees_the_same_masks(implementation):
    x, h = torch.randn(T, B, I).double(), torch.randn(1, B, H).double()
    rhn = make(dropout_input=0.5, dropout_state=0.3, dropout_gate=0.4)

    def gradients(recompute):
        rhn.recompute = recompute
        torch.manual_seed(5)
        return with_gradients(rhn, rhn, x, h)

    for a, b in zip(gradients(False), gradients(True), strict=True):
        same(a, b)


def test_a_state_stays_bounded_by_the_scale_of_the_gate(implementation):
    """A mask of the whole update would let states grow without bounds."""
    rhn = make(dropout_gate=0.75)
    assert rhn(10 * torch.randn(200, B, I).double())[0].abs().max() <= 1 / (1 - 0.75)


# -- groups ---------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A linear layer at each step."""

    def __init__(self, rhn):
        super().__init__()
        self.rhn = rhn
        self.head = nn.Linear(rhn.hidden_size, 2, dtype=rhn.weight_ih_l0.dtype)

    def forward(self, x):
        return self.head(self.rhn(x)[0])


def labels_of(groups):
    return {w.name: (w.row_units.tolist(), w.column_units.tolist()) for w in groups.weights}


@pytest.mark.parametrize(("carry", "gates"), [("coupled", 2), ("separate", 3)])
def test_a_unit_spans_all_depths(implementation, carry, gates):
    model = Tagger(make(carry=carry))
    groups, units = find_groups(model, torch.randn(T, B, I).double()), list(range(H))
    assert labels_of(groups) == {
        "rhn.weight_ih_l0": (units * gates, [-1] * I),
        "rhn.weight_hh_l0": (units * gates * DEPTH, units),
        "head.weight": ([-1] * 2, units),
    }
    assert {v.name: v.row_units.tolist() for v in groups.vectors} == {
        "rhn.bias_hh_l0": units * gates * DEPTH
    }
    norms = GroupLasso(groups, 1.0, eps=1e-16).norms()["rhn.l0"]
    w, r = model.rhn.weight_ih_l0, model.rhn.weight_hh_l0.view(DEPTH, gates, H, H)
    for k in range(H):
        square = w.view(gates, H, I)[:, k].square().sum() + r[:, :, k].square().sum()
        square = square + r[..., k].square().sum() - r[:, :, k, k].square().sum()
        square = square + model.head.weight[:, k].square().sum()
        same(norms[k], square.sqrt())


@pytest.mark.parametrize("carry", CARRIES)
def test_shrinking_changes_no_answer(implementation, carry):
    rhn = make(carry=carry, dropout_input=0.1, dropout_state=0.2, dropout_gate=0.3, recompute=True)
    model = Tagger(rhn).eval()
    x = torch.randn(T, B, I).double()
    groups = find_groups(model, x)
    groups.zero_units_({"rhn.l0": torch.tensor([False, True, False, True, False])})
    small, report = shrink(model, groups)
    assert report.kept["rhn.l0"].tolist() == [0, 2, 4]
    assert type(small.rhn) is ISSRHN and small.rhn.hidden_size == 3
    wanted = ISSRHN.options_of(rhn) | {"hidden_size": 3}
    assert ISSRHN.options_of(small.rhn) == wanted and small.rhn.recompute
    same(small(x), model(x))
    y, h_n = rhn(x)
    assert small.rhn(x)[1].shape == (1, B, 3)
    same(small.rhn(x)[1], h_n[..., [0, 2, 4]])
    assert not small.training and small.train()(x).shape == (T, B, 2)


def test_lasso_takes_whole_units(implementation):
    model = Tagger(make())
    x = torch.randn(T, B, I).double()
    lasso = GroupLasso(find_groups(model, x), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + lasso()).backward()
        optimizer.step()
    lasso.proximal_(1e6)
    assert lasso.groups.dead()["rhn.l0"].all()


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, [4, 5]), ValueError,
         "ISSRHN: expected hidden_size to be one int, the width of all micro-steps, got [4, 5]"),
        ((3, 4.0), TypeError, "hidden_size should be of type int, got: float"),
        ((3, 0), ValueError, "hidden_size must be greater than zero"),
        ((0, 4), ValueError, "input_size must be greater than zero"),
        ((3, 4, 0), ValueError, "depth must be greater than zero"),
        ((3, 4, 2.0), TypeError, "depth should be of type int, got: float"),
        ((3, 4, 2, "none"), ValueError,
         "ISSRHN: expected carry to be 'coupled' or 'separate', got 'none'"),
        ((3, 4, 2, "coupled", 1), TypeError, "batch_first should be of type bool, got: int"),
        ((3, 4, 2, "coupled", False, 0, 1.5), ValueError,
         "dropout_state should be a number in range [0, 1] representing the probability of an "
         "element being zeroed, got 1.5"),
    ],
)  # fmt: skip
def test_arguments_of_the_module(arguments, error, message):
    with pytest.raises(error) as raised:
        ISSRHN(*arguments)
    assert str(raised.value) == message


def test_inputs_of_the_module():
    rhn = make()
    x, h = torch.randn(T, B, I).double(), torch.randn(1, B, H).double()
    with pytest.raises(TypeError, match="RHN: expected hx to be a tensor h_0, got a tuple"):
        rhn(x, (h, h))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4, 5\), got \[1, 4, 4\]"):
        rhn(x, h[..., :4])
    with pytest.raises(ValueError, match="RHN: expected resets to be a bool tensor"):
        rhn(x, resets=torch.zeros(T, B))
    with pytest.raises(TypeError, match="to_torch: expected a module that torch has, got RHN"):
        rhn.to_torch()
    with pytest.raises(TypeError, match="from_torch: expected a class that torch has, got ISSRHN"):
        ISSRHN.from_torch(nn.GRU(I, H))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w_hh", (61, 10), r"rhn_forward: expected w_hh of shape \[D \* 2H, H\] = \[60, 10\], "),
        ("w_hh", (60, 9), r"rhn_forward: expected w_hh of shape \[D \* 2H, H\] = \[60, 10\], "),
        ("b_hh", (20,), r"rhn_forward: expected b_hh of shape \[D \* 2H\] = \[60\], got \[20\]"),
        ("b_ih", (60,), r"rhn_forward: expected b_ih of shape \[2H\] = \[20\], got \[60\]"),
        ("w_ih", (30, 4), r"rhn_forward: expected w_ih of shape \[2H, I\] = \[20, 4\], got "),
        ("masks", (2, 3, 9), r"rhn_forward: expected masks of shape \[2, B, H\] = \[2, 3, 10\], "),
    ],
)
def test_shapes_of_the_op(name, shape, message):
    inputs = make_inputs(Case("bad", 2, 3, 4, 10), torch.float32, cell="rhn")
    with pytest.raises(RuntimeError, match=message):
        ops.recurrent(**(inputs | {name: torch.zeros(shape)}))


def test_masks_of_the_op(implementation):
    inputs = make_inputs(Case("bad", 2, 3, 4, 10), torch.float32, cell="rhn")
    masks = torch.ones(2, 3, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="rhn: expected masks without a gradient"):
        ops.recurrent(**(inputs | {"masks": masks}))
    for cell in ("lstm", "gru", "rnn_tanh"):
        inputs = make_inputs(Case("bad", 2, 3, 4, 10), torch.float32, cell=cell)
        with pytest.raises(RuntimeError, match=f"{cell}: expected no masks, got some"):
            ops.recurrent(**(inputs | {"masks": masks.detach()}))


def test_packed_rows_of_one_sequence(implementation):
    """No row, and rows that end at once."""
    rhn = make(dropout_input=0.5).eval()
    x = [torch.randn(n, I).double() for n in (4, 1, 1)]
    y, h_n = rhn(pack_sequence(x))
    for row, sequence in enumerate(x):
        same(h_n[0, row], rhn(sequence)[1][0])
