# SPDX-License-Identifier: Apache-2.0
"""recurrent_forward and recurrent_backward: every cell, ISA and dtype against torch's own error."""

import math

import mpmath
import pytest
import torch
from test_reference import MODULES, torch_recurrent
from torch.utils._python_dispatch import TorchDispatchMode

from iss_kernels import ops, reference
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.cells import CELLS
from iss_kernels.testing import CASES, RESETS, Case, assert_no_worse_than_torch, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

# The LSTM takes every case. What other cells share with it is not run again: these cases, or for a
# plain RNN the first of them, are where a cell's own equations meet the shapes.
OTHERS = {
    "gru": ("one", "one_row", "tail_avx512", "packed", "no_rows", "no_steps", "wide_batch",
            "two_threads", "ptb_medium"),
    "rnn_tanh": ("one_row", "tail_avx512", "packed", "no_rows", "two_threads"),
    "rnn_relu": ("one_row", "tail_avx512", "packed"),
    "rhn": ("one_row", "tail_avx512", "packed"),
    "rhn_carry": ("tail_avx512", "packed"),
}  # fmt: skip


def problems(cases):
    """(cell, case) for the parameters of a test: each of `cases` that is one of the cell's."""
    return pytest.mark.parametrize(
        ("cell", "case"),
        [
            pytest.param(cell, c, marks=[pytest.mark.slow] * c.slow, id=f"{cell}-{c}")
            for cell in CELLS
            for c in cases
            if cell == "lstm" or c.name in OTHERS.get(cell, ())
        ],
    )


SOME = [c for c in CASES if c.name in ("tail_avx512", "projected", "packed", "packed_projected")]
by_cell = pytest.mark.parametrize("cell", CELLS)


def is_floating(value):
    return torch.is_tensor(value) and value.is_floating_point()


def run(function, case, dtype, reverse=False, numbers=None, cell="lstm", resets=None):
    """Outputs and the gradients of everything, for cotangents that are the same in every dtype.

    numbers: a dtype that holds all inputs and cotangents exactly, where `dtype` is wider.
    """
    numbers = numbers or dtype
    inputs = {
        k: v.to(dtype) if is_floating(v) else v
        for k, v in make_inputs(case, numbers, reverse, cell, resets).items()
    }
    leaves = [v.requires_grad_() for v in inputs.values() if is_floating(v)]
    outputs = [y for y in function(inputs) if y is not None]
    torch.manual_seed(1)
    cotangents = [torch.randn(y.shape).to(numbers).to(dtype) for y in outputs]
    given = [(y, d) for y, d in zip(outputs, cotangents, strict=True) if y.requires_grad]
    ys, dys = zip(*given, strict=True)
    grads = torch.autograd.grad(ys, leaves, dys, materialize_grads=True)
    return [t.detach() for t in (*outputs, *grads)]


def ours(inputs):
    return ops.recurrent(**inputs)


def by_reference(inputs):
    return reference.recurrent(**inputs)


def torchs(inputs):
    """torch's module, or where it takes no such input (resets, an empty sequence) the reference."""
    takes = inputs["cell"] in MODULES and inputs["resets"] is None and len(inputs["x"]) > 0
    return torch_recurrent(inputs) if takes else by_reference(inputs)


def assert_as_good_as_torch(case, dtype, reverse, cell, resets=None):
    result = run(ours, case, dtype, reverse, None, cell, resets)
    same_dtype = run(torchs, case, dtype, reverse, None, cell, resets)
    if dtype == torch.float64:  # no truth beyond float64 at hand: the two may differ by rounding
        for a, b in zip(result, same_dtype, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        return
    truth = run(torchs, case, torch.float64, reverse, dtype, cell, resets)
    for a, b, t in zip(result, same_dtype, truth, strict=True):
        assert a.dtype == b.dtype == dtype
        assert_no_worse_than_torch(a, b, t)


@pytest.mark.parametrize("reverse", [False, True])
@problems(CASES)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch(isa, cell, case, dtype, reverse):
    assert_as_good_as_torch(case, dtype, reverse, cell)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_are_right_to_a_few_ulp(isa, dtype, name):
    """Through the op with H = 1 and no recurrence: a saved gate is the activation of its input."""
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.logspace(-12, 1.9, 500)])
    # Beyond exp's range the result is that at its end: 0 and 1 to within exp(-87).
    x = torch.cat([x, -x, torch.tensor([0.0, 90, -90, 1e30, -1e30])]).to(dtype)
    zeros, w_ih = torch.zeros(len(x), 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    gate = 3 if name == "sigmoid" else 2
    w_ih[gate] = 1
    w_hh = torch.zeros(4, 1, dtype=dtype)
    *_, gates, _ = torch.ops.iss_kernels.recurrent_forward(
        "lstm",
        x.view(1, -1, 1),
        None,
        None,
        zeros,
        zeros,
        w_ih,
        w_hh,
        None,
        None,
        None,
        None,
        False,
        True,
    )
    exact = {"sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "tanh": mpmath.tanh}[name]
    eps = torch.finfo(dtype).eps
    with mpmath.workdps(40):
        for value, result in zip(x.tolist(), gates[:, gate].tolist(), strict=True):
            truth = exact(mpmath.mpf(value))
            assert abs(result - truth) <= 4 * eps * abs(truth) + 2e-38


@by_cell
def test_nan_and_infinity_pass_as_in_torch(isa, dtype, cell):
    case = Case("nan", 3, 5, 4, 11)
    inputs = make_inputs(case, dtype, cell=cell)
    inputs["x"][1, 2, 0] = float("nan")
    inputs["x"][0, 4, 1] = float("inf")
    if cell not in ("gru", "rhn_carry"):  # see assert_what_is_not_finite_shows
        inputs["h0"][0, 0] = float("-inf")
    torch.testing.assert_close(
        ours(inputs), by_reference(inputs), equal_nan=True, rtol=1e-5, atol=1e-5
    )


def differentiable(cell, case, resets):
    """`ours` as a function of its tensors alone, and those, small."""
    small = Case("small", 3, case.B if case.batch_sizes else 2, 2, 3, 2 if case.P else 0,
                 case.batch_sizes and (case.B, 2, 1))  # fmt: skip
    inputs = make_inputs(small, torch.float64, True, cell, resets)
    names = [k for k, v in inputs.items() if is_floating(v)]

    def function(*tensors):
        outputs = ours(inputs | dict(zip(names, tensors, strict=True)))
        return tuple(y for y in outputs if y is not None)

    return function, [inputs[k].requires_grad_() for k in names]


@pytest.mark.parametrize("resets", [None, "few"])
@problems(SOME)
def test_gradcheck(isa, cell, case, resets):
    assert torch.autograd.gradcheck(*differentiable(cell, case, resets), fast_mode=True)


@pytest.mark.parametrize("resets", [None, "few"])
@problems(SOME)
def test_gradgradcheck(cell, case, resets):
    """On one ISA: second derivatives are the reference's."""
    assert torch.autograd.gradgradcheck(*differentiable(cell, case, resets), fast_mode=True)


class Asked(TorchDispatchMode):
    """Remembers need_dx, need_dh0 and need_dw of the last recurrent_backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.iss_kernels.recurrent_backward.default:
            self.needed = args[-3:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("resets", [None, "few"])
@problems(SOME)
def test_only_gradients_that_are_asked_for_are_computed(cell, case, resets):
    inputs = make_inputs(case, torch.float64, cell=cell, resets=resets)
    names = [k for k, v in inputs.items() if is_floating(v)]

    def gradients(asked, require):
        leaves = {k: inputs[k].clone().requires_grad_(k in require) for k in names}
        loss = sum(y.square().sum() for y in ours(inputs | leaves) if y is not None)
        with Asked() as mode:
            grads = torch.autograd.grad(loss, [leaves[k] for k in asked])
        return dict(zip(asked, grads, strict=True)), mode.needed

    everything, needed = gradients(names, names)
    assert needed == (True, True, True)
    for name in names:
        for require in (names, [name]):
            grads, needed = gradients([name], require)
            assert needed == (name == "x", name == "h0", name not in ("x", "h0", "c0"))
            assert torch.equal(grads[name], everything[name])


@problems(SOME)
def test_the_same_input_gives_the_same_bits(isa, dtype, cell, case):
    for resets in (None, "few"):
        first = run(ours, case, dtype, cell=cell, resets=resets)
        for _ in range(3):
            again = run(ours, case, dtype, cell=cell, resets=resets)
            assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("resets", [None, "few"])
@pytest.mark.parametrize(
    "case", [Case("rows", 30, 13, 8, 70), Case("one_tile", 2, 10, 8, 480)], ids=str
)
@by_cell
def test_a_row_does_not_depend_on_its_batch_or_on_the_threads(
    isa, dtype, two_threads, cell, case, resets
):
    inputs = make_inputs(case, dtype, cell=cell, resets=resets)
    y, *final = ours(inputs)
    for row in (0, 5, case.B - 1):
        one_y, *one_final = ours(of_row(inputs, row))
        assert torch.equal(one_y[:, 0], y[:, row])
        for one, whole in zip(one_final, final, strict=True):
            assert whole is None or torch.equal(one[0], whole[row])
    alone = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        alone.append(run(ours, case, dtype, cell=cell, resets=resets))
    assert all(all(map(torch.equal, alone[0], other)) for other in alone[1:])


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("reverse", [False, True])
@by_cell
def test_a_product_with_a_state_of_zeros_is_left_out(isa, dtype, cell, batch, steps, reverse):
    """Every row of zeros has the bits that it has beside a row that starts from something else."""
    inputs = make_inputs(Case("zeros", steps, batch + 1, 8, 19), dtype, reverse, cell)
    inputs["h0"][:batch] = 0
    dy = torch.randn(steps, batch + 1, 19, dtype=torch.float64).to(dtype)
    rows = {k: inputs[k][..., :batch, :] for k in of_rows(inputs)}

    def run(inputs, dy):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_floating(v)}
        outputs = ours(inputs | leaves)
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), dy)
        return [y for y in outputs if y is not None], dict(zip(leaves, grads, strict=True))

    together, grads_together = run(inputs, dy)
    alone, grads_alone = run(inputs | rows, dy[:, :batch])
    dy[:, batch] = 0
    _, grads = run(inputs, dy)
    assert all(torch.equal(a, b[..., :batch, :]) for a, b in zip(alone, together, strict=True))
    for name in rows:
        assert torch.equal(grads_alone[name], grads_together[name][..., :batch, :])
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        assert torch.equal(grads_alone[name], grads[name])


def place(inputs, name, bad):
    """The inputs with one value of `name` not finite."""
    value = inputs[name].clone()
    value.view(-1)[-2] = bad
    return inputs | {name: value}


def parameters(*names):
    """(cell, name) for each of the names that is an input of the cell; one plain RNN for both."""
    return pytest.mark.parametrize(
        ("cell", "name"),
        [
            pytest.param(cell, name, id=f"{cell}-{name}")
            for cell, of in CELLS.items()
            for name in names
            if cell != "rnn_tanh"
            if (name != "c0" or "c" in of.states) and (name != "w_hr" or of.projects)
        ],
    )


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), pytest.param(float("-inf"), marks=pytest.mark.slow)]
)
@parameters("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
@pytest.mark.parametrize("zeros", [0, 2, 3])
def test_what_is_not_finite_shows_whatever_the_batch(isa, dtype, cell, name, bad, zeros):
    """Where a state is zero, no less than beside it: 0 * inf and 0 * NaN are NaN."""
    inputs = make_inputs(Case("bad", 3, 3, 4, 19, P=5 * (name == "w_hr")), dtype, cell=cell)
    inputs["h0"][:zeros] = 0
    assert_what_is_not_finite_shows(place(inputs, name, bad), name, bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@parameters("x", "h0", "c0", "w_hh", "b_hh", "w_hr")
@pytest.mark.parametrize("kind", ["few", "all"])
def test_what_is_not_finite_shows_whatever_is_reset(isa, dtype, cell, name, bad, kind):
    """A reset puts zeros in the state's place, which the weights still multiply."""
    case = Case("bad", 3, 3, 4, 19, P=5 * (name == "w_hr"))
    inputs = make_inputs(case, dtype, cell=cell, resets=kind)
    assert_what_is_not_finite_shows(place(inputs, name, bad), name, bad)


def assert_what_is_not_finite_shows(inputs, name, bad):
    """In the same places as in the reference, and in a row by itself as beside others."""
    dy = torch.randn(*inputs["x"].shape[:-1], inputs["h0"].shape[1], dtype=torch.float64)
    dy = dy.to(inputs["x"].dtype)

    def run(function, inputs, dy):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_floating(v)}
        outputs = function(inputs | leaves)
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), dy, materialize_grads=True)
        return [y for y in outputs if y is not None], dict(zip(leaves, grads, strict=True))

    outputs, grads = run(ours, inputs, dy)
    expected, expected_grads = run(by_reference, inputs, dy)
    # inf closes a gate to 1e-38 in place of 0, and inf * 1e-38 is not NaN. Where that gate closes
    # on what the inf made, only the unit of the inf shows it.
    in_its_unit = inputs["cell"] in ("gru", "rhn_carry") and name == "h0"
    both = [*zip(outputs, expected, strict=True)]
    both_grads = [*zip(grads.values(), expected_grads.values(), strict=True)]
    for a, b in both + both_grads:
        if math.isnan(bad):
            assert torch.equal(a.isnan(), b.isnan())
        elif name != "w_hr" and not in_its_unit:
            assert torch.equal(a.isfinite(), b.isfinite())
    if in_its_unit:
        for a, b in both:
            assert torch.equal(a.isfinite().all(-1), b.isfinite().all(-1))
    for row in range(3):
        alone, grads_alone = run(ours, of_row(inputs, row), dy[:, row : row + 1])
        for a, b in zip(alone, outputs, strict=True):
            assert torch.equal(bits(a), bits(b[..., row : row + 1, :]))
        for k in of_rows(inputs):
            assert torch.equal(bits(grads_alone[k]), bits(grads[k][..., row : row + 1, :]))


def bits(tensor):
    """As integers, where NaN is equal to itself."""
    return tensor.detach().contiguous().view(torch.int64 if tensor.itemsize == 8 else torch.int32)


def of_rows(inputs):
    """Names of the inputs that have rows of the batch."""
    return [k for k in ("x", "h0", "c0") if inputs[k] is not None]


def of_row(inputs, row):
    """The inputs of one row of the batch."""
    one = {k: inputs[k][..., row : row + 1, :] for k in of_rows(inputs)}
    resets = inputs["resets"]
    return inputs | one | {"resets": resets if resets is None else resets[:, row : row + 1]}


@by_cell
def test_nor_does_its_gradient(isa, dtype, two_threads, cell):
    """A product with few rows packs a panel at a time; one of K > 1024 is added up in two parts."""
    inputs = make_inputs(Case("gradient", 5, 14, 70, 280), dtype, cell=cell, resets="few")
    dy = torch.randn(5, 14, 280, dtype=torch.float64).to(dtype)

    def run_training(inputs, dy):
        x = inputs["x"].clone().requires_grad_()
        y = ours(inputs | {"x": x})[0]
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    for given in (inputs, inputs | {"resets": None}):
        y, dx = run_training(given, dy)
        for row in (0, 6, 13, 0):
            one_y, one_dx = run_training(of_row(given, row), dy[:, row : row + 1])
            assert torch.equal(one_y[:, 0], y[:, row])
            assert torch.equal(one_dx[:, 0], dx[:, row])


@pytest.mark.parametrize("threads", [2, 7])  # 7: more than this machine may have cores
@pytest.mark.parametrize(("cell", "case"), [
    ("lstm", Case("one_row", 30, 1, 8, 200)),
    ("lstm", Case("few_rows", 20, 3, 8, 190, P=70)),
    ("lstm", Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1))),
    ("lstm", Case("few_units", 60, 5, 8, 20)),
    ("lstm", Case("packed_rows", 5, 50, 8, 70, batch_sizes=(50, 41, 41, 7, 1))),
    ("gru", Case("one_row", 30, 1, 8, 200)),
    ("gru", Case("packed_rows", 5, 50, 8, 70, batch_sizes=(50, 41, 41, 7, 1))),
    ("rnn_tanh", Case("packed", 3, 4, 8, 260, batch_sizes=(4, 2, 1))),
], ids=str)  # fmt: skip
def test_threads_that_divide_the_work_give_the_same_bits(
    isa, dtype, two_threads, cell, case, threads
):
    for reverse, resets in ((False, None), (True, "few")):
        torch.set_num_threads(1)
        alone = run(ours, case, dtype, reverse, None, cell, resets)
        torch.set_num_threads(threads)
        for _ in range(2):  # sleeping threads are not woken for so little: the first may run alone
            again = run(ours, case, dtype, reverse, None, cell, resets)
            assert all(map(torch.equal, again, alone))


@by_cell
def test_isas_agree_to_rounding(dtype, cell):
    case = Case("isas", 12, 6, 10, 45)
    results = []
    for name in supported_isas():
        with use_isa(name):
            results.append(run(ours, case, dtype, cell=cell, resets="few"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(
                a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * b.abs().max()
            )


@by_cell
def test_non_contiguous_arguments_give_the_same_result(isa, dtype, cell):
    case = Case("strided", 4, 5, 6, 13, P=4 if CELLS[cell].projects else 0)
    inputs = make_inputs(case, dtype, cell=cell, resets="few")

    def strided(t):
        if not torch.is_tensor(t):
            return t
        fill = True if t.dtype == torch.bool else float("nan")
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), fill, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    def results(inputs):
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if is_floating(v)}
        outputs = [y for y in ours(inputs) if y is not None]
        loss = sum(y.square().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]

    expected = results(inputs)
    for a, b in zip(results({k: strided(v) for k, v in inputs.items()}), expected, strict=True):
        assert torch.equal(a, b)


@by_cell
def test_nothing_is_written_outside_the_outputs(isa, dtype, cell):
    """Inputs between guard bands: neither they nor the bands change."""
    case = Case("guard", 3, 4, 5, 9)
    inputs = make_inputs(case, dtype, cell=cell, resets="few")
    originals = {k: v.clone() for k, v in inputs.items() if is_floating(v)}
    guarded = {}
    for key, value in originals.items():
        wide = torch.full((value.numel() + 64,), 7.0, dtype=dtype)
        wide[32:-32] = value.flatten()
        guarded[key] = wide
    views = {k: w[32:-32].view(originals[k].shape).requires_grad_() for k, w in guarded.items()}
    outputs = [t for t in ours(inputs | views) if t is not None]
    torch.stack([t.sum() for t in outputs]).sum().backward()
    for key, wide in guarded.items():
        assert bool((wide[:32] == 7).all()) and bool((wide[-32:] == 7).all())
        assert torch.equal(wide[32:-32].view(originals[key].shape), originals[key])


# -- resets ----------------------------------------------------------------------------------------

EVERY_KIND = [
    Case("padded", 9, 5, 4, 19),
    Case("packed", 7, 6, 3, 18, batch_sizes=(6, 6, 5, 4, 4, 2, 1)),
    Case("projected", 6, 5, 4, 19, P=6),
]
FEW = [
    Case("one_row", 7, 1, 4, 40),
    Case("packed_projected", 5, 4, 4, 19, P=6, batch_sizes=(4, 4, 2, 2, 1)),
    Case("blocks", 3, 600, 2, 3),  # as wide_batch
    Case("two_threads", 20, 8, 20, 64),
]


@pytest.mark.parametrize(("cell", "case", "kind"), [
    pytest.param(cell, case, kind, id=f"{cell}-{case}-{kind}")
    for cell, of in CELLS.items()
    for case in EVERY_KIND + FEW if of.projects or not case.P
    for kind in (RESETS[1:] if case in EVERY_KIND else ["few"])
])  # fmt: skip
def test_resets_err_at_most_twice_as_much_as_the_reference(isa, dtype, cell, case, kind):
    for reverse in (False, True):
        assert_as_good_as_torch(case, dtype, reverse, cell, kind)


@by_cell
def test_no_reset_has_the_bits_of_no_mask(isa, dtype, cell):
    for case in (Case("rows", 12, 7, 5, 33), Case("packed", 3, 5, 3, 9, batch_sizes=(5, 2, 2))):
        for reverse in (False, True):
            none, without = (
                run(ours, case, dtype, reverse, None, cell, kind) for kind in ("none", None)
            )
            assert all(map(torch.equal, none, without))


@by_cell
def test_a_row_that_is_reset_has_the_bits_of_one_that_starts_from_zeros(isa, dtype, cell):
    """Whichever row of its batch is reset, and whatever the others do."""
    inputs = make_inputs(Case("start", 9, 6, 5, 33), dtype, cell=cell)
    resets = torch.zeros(9, 6, dtype=torch.bool)
    resets[4, 2] = True
    y, h_n, _ = ours(inputs | {"resets": resets})
    plain_y, plain_h, _ = ours(inputs)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[:, others], plain_y[:, others])
    assert torch.equal(h_n[others], plain_h[others])
    assert torch.equal(y[:4, 2], plain_y[:4, 2])
    later = of_row(inputs, 2)
    later |= {k: torch.zeros_like(later[k]) for k in of_rows(inputs) if k != "x"}
    later["x"] = later["x"][4:]
    assert torch.equal(ours(later)[0][:, 0], y[4:, 2])
    assert not torch.equal(y[4:, 2], plain_y[4:, 2])


@by_cell
def test_recompute_with_resets_has_the_same_bits(isa, dtype, cell):
    for case in (Case("padded", 9, 5, 4, 19), Case("packed", 3, 5, 3, 9, batch_sizes=(5, 2, 2))):
        for reverse in (False, True):
            results = [
                run(
                    lambda inputs, again=again: ops.recurrent(**inputs, recompute=again),
                    case, dtype, reverse, None, cell, "few",
                )
                for again in (False, True)
            ]  # fmt: skip
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_have_gradients_where_there_are_no_inputs(cell):
    inputs = make_inputs(Case("no_inputs", 4, 3, 0, 5), torch.float64, cell=cell)
    names = ("h0", "w_hh", "b_hh")
    results = []
    for function in (ops.recurrent, reference.recurrent):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        y, *_ = function(**(inputs | leaves))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    torch.testing.assert_close(*results)
