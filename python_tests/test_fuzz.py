# SPDX-License-Identifier: Apache-2.0
"""Random inputs to everything that takes a tensor: right ones get right answers, malformed ones get
either the reference's answer or one of Python's ordinary errors, and the next call is right again.

Run it on a build with sanitizers to see that no memory is touched that is nobody's (CONTRIBUTING).
"""

import copy
import random

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from iss_kernels import ISSLSTM, Stream, ops, prepare, reference, use_backend
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.cells import CELLS

# NotImplementedError is a RuntimeError; nn.LSTM raises AttributeError for what is no tensor.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2}
COUNTS = [300, pytest.param(6000, marks=pytest.mark.slow)]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of odd tensors


@pytest.fixture(params=COUNTS)
def choices(request):
    """As many independent sources of random choices, the same ones on every run."""
    return [random.Random(seed) for seed in range(request.param)]


# -- Tensors of any layout, and what is wrong with a malformed one


def laid_out(choose, t):
    """The same values elsewhere: strided, misaligned, expanded, negated twice, on other strides."""
    how = choose.randrange(8)
    if how == 0 and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 1:
        room = torch.zeros(t.numel() + 3, dtype=t.dtype)
        return room[3:].view(t.shape).copy_(t)
    if how == 2 and t.dim() > 0:
        room = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        return room[..., ::2].copy_(t)
    if how == 3 and t.dim() > 0:
        return torch.cat([t, t])[: len(t)]
    if how == 4 and t.is_floating_point():
        return torch._neg_view(-t)
    return t


def malformed(choose, t):
    """A tensor like t with something wrong, or that at least looks so."""
    dim = choose.randrange(t.dim()) if t.dim() else None
    sizes = list(t.shape)
    kind = choose.choice(
        [
            "grow",
            "shrink",
            "empty",
            "flat",
            "deep",
            "dtype",
            "meta",
            "sparse",
            "expanded",
            "huge",
            "none",
            "number",
            "nan",
        ]
    )
    if kind in ("grow", "shrink", "empty") and dim is not None:
        sizes[dim] = {"grow": sizes[dim] + 1, "shrink": max(0, sizes[dim] - 1), "empty": 0}[kind]
        return torch.zeros(sizes, dtype=t.dtype)
    if kind == "flat":
        return t.reshape(-1)
    if kind == "deep":
        return t.unsqueeze(choose.randrange(t.dim() + 1))
    if kind == "dtype":
        return t.to(choose.choice([
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.bool, torch.complex64,
        ]))  # fmt: skip
    if kind == "meta":
        return t.to("meta")
    if kind == "sparse":
        return t.to_sparse() if t.dim() else t
    if kind == "expanded" and dim is not None:
        return t.narrow(dim, 0, min(1, sizes[dim])).expand(sizes) if sizes[dim] else t
    if kind == "huge" and dim is not None:
        sizes = [0] * t.dim()
        sizes[dim] = choose.choice([2**31, 2**40, 2**62])
        return torch.empty(0, dtype=t.dtype).as_strided(sizes, [0] * t.dim()) if 0 in sizes else t
    if kind == "none":
        return None
    if kind == "number":
        return 1.5
    if kind == "nan" and t.is_floating_point():
        return t * float("nan")
    return t


def malformed_value(choose, value):
    """Something like `value`, whatever it is, that a caller might pass instead."""
    if isinstance(value, torch.Tensor):
        return malformed(choose, value)
    if isinstance(value, list):
        what = choose.randrange(5)
        if what == 0:
            return []
        if what == 1:
            return value[:-1]
        if what == 2:
            return [*value, *value[:1]]
        index = choose.randrange(len(value)) if value else 0
        return [malformed(choose, v) if i == index else v for i, v in enumerate(value)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose.choice([-1, 0, value + 1, 2**31, 2**62, -(2**62)])
    if isinstance(value, float):
        return choose.choice([float("nan"), float("inf"), -1.0, 0.0])
    return value


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (tuple, list)) else []


def close(got, wanted, dtype, tolerance=None):
    """Same shapes, and values to rounding; NaN and inf in the same places."""
    got, wanted = tensors_of(got), tensors_of(wanted)
    assert [t.shape for t in got] == [t.shape for t in wanted]
    loose = tolerance or {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=loose, atol=loose * max(1.0, _largest(b)), equal_nan=True
        )


def _largest(t):
    finite = t.detach().double().nan_to_num(0, 0, 0)
    return float(finite.abs().max()) if t.numel() else 0.0


# -- The ops


def recurrent_arguments(choose):
    """A random problem: keyword arguments of `ops.recurrent`."""
    cell = CELLS[choose.choice(["lstm", *CELLS])]
    T, B, I, H = (choose.choice([1, 2, 3, 5, 17]) for _ in range(4))  # noqa: E741
    P = choose.choice([0, 0, 1, 4]) if cell.projects else 0
    depth = choose.choice([1, 2, 5]) if cell.deep else 1
    # A sum that rounds to the other side of zero switches a gradient of relu on or off.
    dtype = choose.choice(DTYPES[:2] if cell.name == "rnn_relu" else DTYPES)
    packed = choose.random() < 0.3

    def values(*shape):
        return (torch.randn(shape, dtype=torch.float64) / 2).float().to(dtype)

    lengths = sorted((choose.randint(1, T) for _ in range(B)), reverse=True)
    sizes = [sum(n > t for n in lengths) for t in range(max(lengths))]
    rows = cell.gates * H
    shape = (sum(sizes),) if packed else (T, B)

    def maybe(probability, value):
        return value if choose.random() < probability else None

    masks = (torch.rand(2, B, H) < 0.8).to(dtype) * 1.25
    return {
        "cell": cell.name,
        "x": values(*shape, I),
        "batch_sizes": torch.tensor(sizes) if packed else None,
        "resets": maybe(0.5, torch.rand(shape) < choose.choice([0.03, 0.5, 1.0])),
        "h0": values(B, P or H),
        "c0": values(B, H) if "c" in cell.states else None,
        "w_ih": values(rows, I),
        "w_hh": values(depth * rows, P or H),
        "b_ih": maybe(0.7, values(rows)),
        "b_hh": maybe(0.7, values(depth * rows)),
        "w_hr": values(P, H) if P else None,
        "masks": maybe(0.5, masks) if cell.deep else None,
        "reverse": choose.random() < 0.5,
    }


def lasso_arguments(choose):
    """Keyword arguments that the group-lasso ops share."""
    dtype, units = choose.choice(DTYPES), choose.choice([1, 2, 7, 40])
    shapes = [
        (choose.choice([0, 1, 3, 70]), choose.choice([0, 1, 5, 33]))
        for _ in range(choose.choice([1, 2, 4]))
    ]

    def labels(count):
        return torch.tensor([choose.randint(-1, units - 1) for _ in range(count)]).int()

    return {
        "weights": [torch.randn(shape).to(dtype) for shape in shapes],
        "row_units": [labels(rows) for rows, _ in shapes],
        "column_units": [labels(columns) for _, columns in shapes],
    }, units


def recurrent_case(choose, spoil):
    """(what to run, what the reference runs, dtype) of a recurrence and its backward."""
    given = recurrent_arguments(choose)
    dtype = given["x"].dtype
    given = {k: laid_out(choose, v) if torch.is_tensor(v) else v for k, v in given.items()}
    given = spoil(given)

    def run(function):
        leaves = [
            t.detach().requires_grad_(name != "masks")
            if torch.is_tensor(t) and t.is_floating_point()
            else t
            for name, t in given.items()
        ]
        outputs = [y for y in function(*leaves) if y is not None]
        if any(t.is_meta for t in outputs):
            raise RuntimeError("a fake result")
        grads = torch.autograd.grad(
            [y.float().sum() for y in outputs if y.requires_grad],
            [t for t in leaves if torch.is_tensor(t) and t.requires_grad],
            materialize_grads=True,
        )
        return [*(t.detach() for t in outputs), *grads]

    return lambda: run(ops.recurrent), lambda: run(reference.recurrent), dtype


def norms_case(choose, spoil):
    given, units = lasso_arguments(choose)
    dtype = given["weights"][0].dtype
    given |= {"units": units, "eps": 1e-8, "paper_overlap": choose.random() < 0.5}
    given = spoil(given)

    def run(function):
        weights = [w.detach().requires_grad_() for w in given["weights"]]
        norms = function(**{**given, "weights": weights})
        return [norms.detach(), *torch.autograd.grad(norms.sum(), weights, materialize_grads=True)]

    return lambda: run(ops.group_norms), lambda: run(reference.group_norms), dtype


def in_place_case(choose, spoil):
    given, units = lasso_arguments(choose)
    dtype = given["weights"][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    name = choose.choice(["add_scaled_by_units_", "scale_by_units_", "threshold_"])
    if name == "threshold_":
        given["threshold"] = 0.5
    else:
        given["factors"] = torch.rand(units).to(wide)
    if name == "add_scaled_by_units_":
        given = {"outputs": [torch.randn_like(w) for w in given["weights"]], **given}
        given["paper_overlap"] = choose.random() < 0.5
    given = spoil(given)

    def run():
        own = copy.deepcopy(given)
        getattr(ops, name)(**own)
        return own["outputs" if "outputs" in own else "weights"]

    def by_reference():
        with use_backend("reference"):
            return run()

    return run, by_reference, dtype


CASES = {"recurrent": recurrent_case, "group_norms": norms_case, "in_place": in_place_case}


@pytest.mark.parametrize("op", CASES)
def test_ops_on_any_layout_give_the_references_answer(op, choices):
    for number, choose in enumerate(choices):
        torch.manual_seed(number)
        run, by_reference, dtype = CASES[op](choose, lambda given: given)
        with use_isa(choose.choice(supported_isas())):
            close(run(), by_reference(), dtype)


@pytest.mark.parametrize("op", CASES)
def test_malformed_arguments_of_an_op_are_an_error_or_what_the_reference_makes_of_them(op, choices):
    refused = 0
    for number, choose in enumerate(choices):
        torch.manual_seed(number)

        def spoil(given, choose=choose):
            given = dict(given)
            for name in choose.sample(list(given), choose.choice([1, 1, 2])):
                given[name] = malformed_value(choose, given[name])
            return given

        torch.manual_seed(number)
        try:
            run, by_reference, dtype = CASES[op](choose, spoil)
            got = run()
        except ERRORS:
            refused += 1
            continue
        close(got, by_reference(), dtype)
    assert 0.3 * len(choices) < refused < len(choices)
    run, by_reference, dtype = CASES[op](random.Random(0), lambda given: given)
    close(run(), by_reference(), dtype)  # nothing was left half done


# -- The modules


def random_lstm(choose):
    layers, both = choose.choice([1, 2, 3]), choose.random() < 0.3
    uneven = choose.random() < 0.4
    size = choose.choice([1, 3, 16, 33])
    sizes = [size + 2 * layer for layer in range(layers)] if uneven else size
    proj = 0 if uneven or size == 1 or choose.random() < 0.7 else choose.randint(1, size - 1)
    return ISSLSTM(
        choose.choice([1, 3, 20]), sizes, layers, choose.random() < 0.8, choose.random() < 0.5,
        bidirectional=both, proj_size=proj,
    ).eval()  # fmt: skip


def random_call(choose, lstm):
    """Positional arguments of a call: padded, unbatched, packed or with lengths; perhaps hx."""
    steps, batch = choose.choice([1, 2, 7]), choose.choice([1, 2, 5])
    form = choose.choice(["padded", "unbatched", "packed", "lengths"])
    lengths = [choose.randint(1, steps) for _ in range(batch)]
    if form == "unbatched":
        x = torch.randn(steps, lstm.input_size)
    elif lstm.batch_first:
        x = torch.randn(batch, steps, lstm.input_size)
    else:
        x = torch.randn(steps, batch, lstm.input_size)
    hx = None
    if lstm._uniform and choose.random() < 0.5:
        rows = () if form == "unbatched" else (batch,)
        hidden, output = lstm.sizes[0][0]
        count = lstm.num_layers * (1 + lstm.bidirectional)
        hx = (torch.randn(count, *rows, output), torch.randn(count, *rows, hidden))
    if form == "packed":
        lengths[choose.randrange(batch)] = steps
        x = pack_padded_sequence(x, torch.tensor(lengths), lstm.batch_first, enforce_sorted=False)
        return [x, hx]
    return [x, hx, lengths] if form == "lengths" else [laid_out(choose, x), hx]


def flat(result):
    """All tensors of what a module returns."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


@torch.no_grad()
def test_modules_give_the_references_answer_in_any_form(choices):
    for number, choose in enumerate(choices[: len(choices) // 2]):
        torch.manual_seed(number)
        lstm = random_lstm(choose)
        call = random_call(choose, lstm)
        weights = choose.choice(list(TOLERANCE))
        with use_isa(choose.choice(supported_isas())):
            got = flat(lstm(*call))
            fast = flat(prepare(lstm, weights)(*call))
        with use_backend("reference"):
            wanted = flat(lstm(*call))
        close(got, wanted, torch.float32, 1e-4)
        close(fast, wanted, torch.float32, TOLERANCE[weights])


def malformed_call(choose, call):
    """The same call with something wrong with its input, its states, its lengths or its packing."""
    call = list(call)
    which = choose.randrange(len(call))
    if which == 0 and isinstance(call[0], PackedSequence):
        data, sizes, order, back = call[0]
        parts = [data, sizes, order, back]
        part = choose.randrange(4)
        if part == 1 and choose.random() < 0.6:
            sizes = sizes.clone()
            sizes[choose.randrange(len(sizes))] = choose.choice([-1, 0, 1, 99, 2**40, -(2**62)])
            parts[1] = choose.choice([sizes, sizes.flip(0), sizes[:-1]])
        elif parts[part] is not None:
            parts[part] = malformed(choose, parts[part])
        call[0] = PackedSequence(*parts)
    elif which == 0:
        call[0] = malformed(choose, call[0])
    elif which == 1 and call[1] is not None:
        states = list(call[1])
        index = choose.randrange(2)
        states[index] = malformed(choose, states[index])
        call[1] = choose.choice([tuple(states), states, tuple(states[:1]), states[0]])
    elif which == 2:
        call[2] = malformed_value(choose, torch.tensor(call[2]))
    return call


@torch.no_grad()
def test_malformed_calls_of_a_module_are_an_error_or_answered_alike(choices):
    for number, choose in enumerate(choices):
        torch.manual_seed(number)
        lstm = random_lstm(choose)
        good = random_call(choose, lstm)
        torch_lstm = lstm.to_torch() if lstm._uniform else None
        fast = prepare(lstm, "float32")
        before = flat(fast(*good))
        try:
            call = malformed_call(choose, good)
        except (*ERRORS, AssertionError):  # PackedSequence looks at some of its parts
            continue
        for module in (lstm, fast):
            try:
                got = flat(module(*call))
            except ERRORS:
                continue
            if any(t.is_meta for t in got):
                assert call[0].is_meta
            elif torch_lstm is not None and len(call) == 2 and got[0].dtype == torch.float32:
                try:
                    wanted = flat(torch_lstm(*call))
                except ERRORS:
                    continue  # prepared models convert what nn.LSTM refuses
                close(got, wanted, torch.float32, 1e-3)
        assert all(map(torch.equal, flat(fast(*good)), before))


@torch.no_grad()
def test_malformed_steps_of_a_stream_are_an_error_and_leave_it_as_it_was(choices):
    for number, choose in enumerate(choices[: len(choices) // 3]):
        torch.manual_seed(number)
        width, batch = choose.choice([1, 3, 16]), choose.choice([1, 2, 5])
        stream = Stream(torch.nn.LSTM(4, width), batch)
        x = torch.randn(batch, 4)
        stream(x)
        state = stream.state
        bad = malformed(choose, x)
        out = choose.choice([None, torch.zeros(batch, width), malformed(choose, x)])
        dense = torch.is_tensor(bad) and bad.layout == torch.strided and not bad.is_complex()
        if dense and choose.random() < 0.3:
            try:
                bad = bad.numpy() if choose.random() < 0.5 else bad.numpy().astype(">f4")
            except ERRORS:
                continue
        try:
            got = torch.as_tensor(stream(bad, out)).clone()
        except ERRORS:
            assert all(map(torch.equal, flat(stream.state), flat(state)))
            continue
        stream.state = state
        given = bad if torch.is_tensor(bad) else torch.from_numpy(bad)
        wanted = stream(given.contiguous())
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
