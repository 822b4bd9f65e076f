# SPDX-License-Identifier: Apache-2.0
"""The group-lasso ops on a GPU: as on the CPU, within the bound, and the same every time."""

import pytest
import simt
import torch
from test_group_norm_ops import UNITS, in_guard_bands, labelled, wide

from iss_kernels import ops, reference
from iss_kernels.testing import assert_no_worse_than_torch, max_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_overlap = pytest.mark.parametrize("paper_overlap", [False, True])


def problem(gpu, dtype, layout="contiguous"):
    """`labelled` with more units, columns and rows than one tile has, and as a model may hand it.

    Rows begin at multiples of 16, 8, 4 and 2 bytes, as far as the dtype allows.
    misaligned: every weight begins one element after a multiple of 16 bytes.
    """
    weights, rows, columns = labelled(dtype)
    generator = torch.Generator().manual_seed(1)

    def ids(count):  # of every unit some: shuffled, and many in a row
        return torch.randint(-1, UNITS, (count,), generator=generator).sort().values.int()

    for r, c in ((40, 264), (129, 520), (3, 524), (35, 650), (2, 1031)):
        weights.append(torch.randn(r, c, generator=generator).bfloat16().to(dtype))
        rows.append(ids(r))
        columns.append(ids(c))
    weights, rows, columns = gpu.to([weights, rows, columns])
    if layout == "misaligned":
        weights = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in weights]
        assert weights[0].data_ptr() % 16 and weights[0].is_contiguous()
    if layout == "strided":
        weights = [torch.stack([w, w.new_full(w.shape, 9.0)], -1)[..., 0] for w in weights]
    return weights, rows, columns


LAYOUTS = ["contiguous", "misaligned", "strided"]
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def cpu(tensors):
    return [t.detach().cpu() for t in tensors]


@by_layout
@by_overlap
@by_dtype
def test_norms_and_gradients_err_at_most_twice_as_much_as_torch(gpu, dtype, paper_overlap, layout):
    labels = problem(gpu, dtype, layout)

    def run(function, weights, rows, columns):
        weights = [w.detach().requires_grad_() for w in weights]
        norms = function(weights, rows, columns, UNITS, 1e-8, paper_overlap)
        assert norms.dtype == wide(weights[0].dtype)
        dnorms = torch.linspace(-1, 1, UNITS).to(norms)
        return cpu([norms, *torch.autograd.grad(norms, weights, dnorms)])

    weights, rows, columns = map(cpu, labels)
    result, torchs = run(ops.group_norms, *labels), run(reference.group_norms, *map(cpu, labels))
    truth = run(reference.group_norms, [w.double() for w in weights], rows, columns)
    for a, b, t in zip(result, torchs, truth, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert_no_worse_than_torch(a, b, t)


@by_layout
@by_overlap
@by_dtype
def test_adding_scaled_weights_in_place_is_the_gradient(gpu, dtype, paper_overlap, layout):
    weights, rows, columns = problem(gpu, dtype, layout)
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))
    outputs, unharmed = in_guard_bands([torch.ones(w.shape, dtype=dtype) for w in weights])
    outputs = outputs if gpu.simulator else gpu.to(outputs)
    ops.add_scaled_by_units_(outputs, weights, rows, columns, gpu.to(factors), paper_overlap)
    for output, weight, *ids in zip(*map(cpu, (outputs, weights, rows, columns)), strict=True):
        expected = (1 + reference.scaled_by_units(weight, *ids, factors, paper_overlap)).to(dtype)
        truth = 1 + reference.scaled_by_units(
            weight.double(), *ids, factors.double(), paper_overlap
        )
        assert_no_worse_than_torch(output, expected, truth, floor_eps=2)
    assert unharmed()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@by_dtype
def test_scaling_and_threshold_are_the_reference_to_the_bit(gpu, dtype, layout):
    weights, rows, columns = problem(gpu, dtype, layout)
    weights[2][0, 0] = float("nan")
    weights[0][0, :2] = torch.tensor([0.5, -0.5])  # on the threshold: stays
    factors = torch.linspace(-1, 2, UNITS, dtype=wide(dtype))
    factors[3] = 0
    labels = [*zip(*map(cpu, (weights, rows, columns)), strict=True)]
    for call, expected in (
        (lambda w: ops.threshold_(w, rows, columns, 0.5),
         [reference.thresholded(*t, 0.5) for t in labels]),
        (lambda w: ops.scale_by_units_(w, rows, columns, gpu.to(factors)),
         [reference.scaled(*t, factors) for t in labels]),
    ):  # fmt: skip
        changed = [w.clone() for w in weights]
        if layout == "misaligned":
            changed = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in changed]
        call(changed)
        for a, b in zip(cpu(changed), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_no_op_writes_outside_its_weights(gpu):
    if not gpu.simulator:
        pytest.skip("guard bands are on the CPU")
    weights, rows, columns = problem(gpu, torch.float32)
    inside, unharmed = in_guard_bands(weights)
    ops.scale_by_units_(inside, rows, columns, torch.ones(UNITS))
    ops.threshold_(inside, rows, columns, 0.1)
    assert unharmed()


def test_norms_of_many_rows_keep_their_accuracy(gpu):
    """No sum in the weight's dtype grows so long that its rounding shows: 40 000 equal squares."""
    weight = gpu.to(torch.full((40_000, 3), 1.1))
    rows, columns = gpu.to([torch.full((40_000,), -1).int(), torch.arange(3).int()])
    norms = ops.group_norms([weight], [rows], [columns], 3, 1e-8, False).cpu()
    expected = (weight[0].cpu().double().square() * 40_000 + 1e-8).sqrt()
    assert max_error(norms, expected) < 8 * torch.finfo(norms.dtype).eps * expected.max()


def test_gradcheck(gpu):
    weights, rows, columns = problem(gpu, torch.float64)
    weights = [weights[i][:6, :7].clone().requires_grad_() for i in (2, 3, 4)]
    rows, columns = [rows[i][:6] for i in (2, 3, 4)], [columns[i][:7] for i in (2, 3, 4)]

    def function(*weights):
        return ops.group_norms(weights, rows, columns, UNITS, 1e-8, False)

    assert torch.autograd.gradcheck(function, weights)
    assert torch.autograd.gradgradcheck(function, weights)


@by_dtype
def test_a_model_of_many_matrices_takes_several_launches(gpu, dtype):
    """And the norms that they add to are the same to the bit as of the same matrices in one."""
    weights, rows, columns = ([t for t in problem(gpu, dtype)[k][2:3] * 70] for k in range(3))
    weights = [w * (i + 1) for i, w in enumerate(weights)]
    norms = ops.group_norms(weights, rows, columns, UNITS, 1e-8, False)
    truth = reference.group_norms(
        [w.double() for w in cpu(weights)], cpu(rows), cpu(columns), UNITS, 1e-8, False
    )
    assert_no_worse_than_torch(norms.cpu(), truth.to(norms.dtype), truth)
    factors = torch.linspace(-1, 2, UNITS).to(norms)
    expected = [reference.scaled(*t, factors) for t in zip(weights, rows, columns, strict=True)]
    ops.scale_by_units_(weights, rows, columns, factors)
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("units", [0, 1, 31, 32, 33, 600])
def test_any_number_of_units(gpu, units):
    """Each owns a row or none; where there are more than rows, the last ones own nothing."""
    weight = gpu.to(torch.randn(100, 9))
    rows = (torch.arange(100) % units if units else torch.full((100,), -1)).int()
    columns = torch.full((9,), units - 1).int()
    labels = [weight], gpu.to([rows]), gpu.to([columns])
    norms = ops.group_norms(*labels, units, 1e-8, False)
    torch.testing.assert_close(norms, reference.group_norms(*labels, units, 1e-8, False))


def test_empty_matrices_have_no_elements(gpu):
    weights = gpu.to([torch.empty(0, 4), torch.empty(3, 0)])
    rows, columns = ([gpu.to(torch.zeros(w.shape[k]).int()) for w in weights] for k in (0, 1))
    norms = ops.group_norms(weights, rows, columns, 2, 0.25, False)
    assert norms.tolist() == [0.5, 0.5]
    ops.add_scaled_by_units_(weights, weights, rows, columns, norms, False)
    ops.threshold_(weights, rows, columns, 0.5)


# -- Orders and checks -----------------------------------------------------------------------------


def everything(weights, rows, columns, paper_overlap=False):
    """The results of all ops, one after the other."""
    norms = ops.group_norms(weights, rows, columns, UNITS, 1e-8, paper_overlap)
    outputs = [torch.ones_like(w, memory_format=torch.contiguous_format) for w in weights]
    ops.add_scaled_by_units_(outputs, weights, rows, columns, norms, paper_overlap)
    changed = [w.contiguous().clone() for w in weights]
    ops.scale_by_units_(changed, rows, columns, norms)
    ops.threshold_(changed, rows, columns, 0.5)
    return [norms, *outputs, *changed]


@by_dtype
def test_results_do_not_depend_on_the_order_or_the_gpu(gpu, dtype):
    """Twice the same to the bit, in every order of threads, on few and on many multiprocessors."""
    labels = problem(gpu, dtype)
    first = everything(*labels)
    assert all(map(torch.equal, first, everything(*labels)))
    for multiprocessors in (1, 3, 20):
        gpu.pretend((9, 0, multiprocessors, 227 * 1024))
        assert all(map(torch.equal, first, everything(*labels)))
    if gpu.simulator:
        for order in simt.ORDERS:
            gpu.simulator.configure(*order)
            assert all(map(torch.equal, first, everything(*labels)))
        gpu.simulator.configure()


@by_dtype
def test_a_device_that_was_partitioned_since_it_was_asked_gets_a_smaller_grid(gpu, dtype):
    """All blocks of group_norms wait for each other, so they must be resident at once."""
    if not gpu.simulator:
        pytest.skip("needs a device that says another thing when it is asked again")
    labels = problem(gpu, dtype)
    first = everything(*labels)
    gpu.simulator.pretend(multiprocessors=16, left=3)
    assert all(map(torch.equal, first, everything(*labels)))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(layout, dtype, marks=[pytest.mark.slow] * (i > 0 and j > 0))
        for i, layout in enumerate(LAYOUTS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_the_checker_finds_nothing(checked_gpu, dtype, layout):
    """No race, no access outside a tensor, nothing read before it is written, in any order."""
    labels = [t[-6:] for t in problem(checked_gpu, dtype, layout)]
    for policy, seed, preempt in (("fifo", 0, 0), ("random", 1, 50)):
        checked_gpu.simulator.configure(policy, seed, preempt)
        everything(*labels)
    checked_gpu.simulator.configure()


# -- Mistakes --------------------------------------------------------------------------------------


def mistakes():
    """{what is wrong: call(device)}, each of which raises."""
    raw = torch.ops.iss_kernels  # the wrappers copy what is strided
    one, other, factor = torch.ones(2, 3), torch.ones(2, 3), torch.ones(1)
    rows, columns = torch.zeros(2).int(), torch.zeros(3).int()

    def norms(weights=(one,), rows=(rows,), columns=(columns,), units=1):
        return lambda to: ops.group_norms(to([*weights]), to([*rows]), to([*columns]), units, 1, 0)

    def add(outputs=(other,), factors=factor):
        return lambda to: raw.add_scaled_by_units_(
            to([*outputs]), to([one]), to([rows]), to([columns]), to(factors), False
        )

    def scale(weight=other, rows=rows, factors=factor):
        return lambda to: raw.scale_by_units_([to(weight)], to([rows]), to([columns]), to(factors))

    def threshold(weight=other, rows=rows, limit=0.5):
        return lambda to: raw.threshold_([to(weight)], to([rows]), to([columns]), limit)

    t = one[:1].expand_as(one)
    return {
        "labels missing": norms(rows=()),
        "no weights": lambda to: raw.scale_by_units_([], [], [], to(factor)),
        "units beyond 32 bits": norms(units=2**32),
        "two dtypes": norms([one, one.double()], [rows] * 2, [columns] * 2),
        "a vector": norms(weights=[one[0]]),
        "long labels": norms(rows=[rows.long()]),
        "too many labels": norms(columns=[columns[:2]]),
        "negative units": norms(units=-1),
        "a row's unit too large": norms(rows=[torch.tensor([0, 1]).int()]),
        "a column's unit too large": norms(columns=[torch.tensor([0, 7, 1]).int()]),
        "a unit below -1": norms(rows=[torch.tensor([0, -2]).int()]),
        "no units": norms(units=0),
        "outputs missing": add(outputs=()),
        "outputs of another shape": add(outputs=[one[:, :2].clone()]),
        "outputs of another dtype": add(outputs=[one.double()]),
        "outputs of one row, expanded": add(outputs=[t]),
        "factors of another dtype": add(factors=factor.double()),
        "factors of two dimensions": add(factors=factor[None]),
        "weights of one row, expanded": scale(weight=t),
        "a unit without a factor": scale(rows=torch.tensor([1, 0]).int()),
        "no factors": scale(factors=factor[:0]),
        "a threshold that is not a number": threshold(limit=float("nan")),
        "expanded weights of threshold_": threshold(weight=t),
        "a unit below -1 of threshold_": threshold(rows=torch.tensor([-3, 0]).int()),
    }


def said(call, to):
    with pytest.raises(RuntimeError) as raised:
        call(to)
    return str(raised.value).split("\n")[0]


@pytest.fixture(params=mistakes())
def mistake(request):
    """(call, what the CPU says to it): asked before `gpu` takes the CPU's place."""
    call = mistakes()[request.param]
    return call, said(call, lambda t: t)


def test_mistakes_are_called_what_the_cpu_calls_them(mistake, gpu):
    call, expected = mistake
    assert ": expected " in expected and ", got " in expected
    assert said(call, gpu.to).replace("cuda:0", "cpu") == expected


def test_weights_of_whole_numbers_have_no_kernel(gpu):
    weight, rows, columns = gpu.to(
        [torch.ones(2, 3).int(), torch.ones(2).int(), torch.ones(3).int()]
    )
    with pytest.raises(RuntimeError, match="float64, bfloat16 or float16, got int32"):
        ops.group_norms([weight], [rows], [columns], 2, 0.0, False)


def test_a_lazy_clone_is_copied_only_where_it_is_written(gpu):
    weight, rows, columns = gpu.to([torch.ones(2, 3), torch.zeros(2).int(), torch.zeros(3).int()])
    clone = torch._lazy_clone(weight)
    ops.group_norms([clone], [rows], [columns], 1, 0.0, False)
    assert torch._C._is_cow_tensor(clone)
    ops.scale_by_units_([clone], [rows], [columns], torch.full_like(weight[0, :1], 2))
    assert clone.eq(2).all() and weight.eq(1).all()


def test_labels_are_looked_at_again_when_they_change(gpu):
    """A look waits for the device, so it is remembered, but not for longer than it is true."""
    weight = gpu.to(torch.ones(2, 2))
    rows, columns = gpu.to([torch.zeros(2).int(), torch.zeros(2).int()])

    def norms(rows=rows):
        return ops.group_norms([weight], [rows], [columns], 1, 0.0, False).tolist()

    assert norms() == norms() == [2]
    rows[1] = 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected row_units to be -1 or below units = 1"):
            norms()
    rows.fill_(-1)
    columns[1] = -1
    assert norms() == pytest.approx([2**0.5])
    rows.data = rows.new_full((2,), 5)  # another memory, and no version counts it
    with pytest.raises(RuntimeError, match="got 5"):
        norms()
    with torch.inference_mode():
        made_there = torch.full_like(columns, 3)
        with pytest.raises(RuntimeError, match="got 3"):
            norms(made_there)
    assert norms(torch.full_like(columns, -1)) == pytest.approx([2**0.5])


def test_a_label_that_slipped_through_is_no_units(gpu):
    """Written behind torch's back after the look: read nowhere, counted nowhere."""
    if not gpu.simulator:
        pytest.skip("needs NumPy, to write so that no version counts it")
    weight, rows, columns = torch.ones(4, 3), torch.zeros(4).int(), torch.zeros(3).int()
    assert ops.group_norms([weight], [rows], [columns], 1, 4.0, False).tolist() == [4]
    rows.numpy()[:] = [2**31 - 1, -(2**31), 1, 32]
    columns.numpy()[:] = [0, 1, 50]
    assert ops.group_norms([weight], [rows], [columns], 1, 0.0, False).tolist() == [2]
    ops.scale_by_units_([weight], [rows], [columns], torch.full((1,), 3.0))
    assert weight.tolist() == [[3, 1, 1]] * 4


@pytest.mark.parametrize("which", ["row_units", "column_units"])
def test_labels_are_not_looked_at_during_capture(gpu, which):
    """Which would wait for the device. Those that a call before it has checked are known."""
    if not gpu.simulator:
        pytest.skip("a refusal ends a real capture: test_training_can_be_captured_in_a_graph")
    weight = torch.ones(2, 2)
    labels = {"row_units": torch.zeros(2).int(), "column_units": torch.zeros(2).int()}
    text = f"expected {which} in a CUDA graph to have been checked by a call before it"

    def norms():
        return ops.group_norms([weight], *([t] for t in labels.values()), 1, 0.0, False).tolist()

    assert norms() == [2]
    with gpu.simulator.capturing():
        assert norms() == [2]
        labels[which] = labels[which].clone()
        with pytest.raises(RuntimeError, match=f"group_norms_forward: {text}"):
            norms()
    assert norms() == [2]
    labels[which].fill_(-1)  # known no more
    with gpu.simulator.capturing(), pytest.raises(RuntimeError, match=text):
        norms()
    with torch.inference_mode():  # has no version to know it by
        labels[which] = labels[which].clone()
    norms()
    with gpu.simulator.capturing(), pytest.raises(RuntimeError, match=text):
        norms()


def test_training_can_be_captured_in_a_graph(gpu):
    if gpu.simulator:
        pytest.skip("the emulator has no CUDA graphs")
    labels = problem(gpu, torch.float32)
    expected, graph = everything(*labels), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(*labels)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        results = everything(*labels)
    graph.replay()
    assert all(map(torch.equal, results, expected))
