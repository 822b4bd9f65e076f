# SPDX-License-Identifier: Apache-2.0
"""prepare: as accurate as each format allows, and in every form of call what ISSLSTM is."""

import copy
import ctypes
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from iss_kernels import ISSLSTM, prepare, use_backend
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.demo.model import LanguageModel, perplexity, windows
from iss_kernels.prepare import PreparedLSTM
from iss_kernels.testing import assert_no_worse_than_torch, max_error

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

FORMATS = ["float32", "float16", "bfloat16", "int8"]
DTYPES = {name: getattr(torch, name) for name in FORMATS}
X = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


def tensors_in(result):
    """All tensors of an LSTM's result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if torch.is_tensor(result):
        return [result]
    return [t for part in result for t in tensors_in(part)]


def equal(a, b):
    return all(map(torch.equal, tensors_in(a), tensors_in(b)))


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, values):
    now = module.state_dict()
    return list(now) == list(values) and all(
        now[name].dtype == value.dtype and torch.equal(now[name], value)
        for name, value in values.items()
    )


class Tagger(nn.Module):
    """A model around LSTMs, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.first = nn.LSTM(3, 3)
        self.inner = nn.ModuleList([ISSLSTM(3, [4, 5], 2), nn.Linear(5, 2)])
        self.again = self.first

    def forward(self, x):
        y = self.again(self.first(self.norm(x))[0])[0]
        return self.inner[1](self.inner[0](y)[0])


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(61, 37), (37, 61)], ids=str)
def test_errors_over_100_steps_stay_within_what_the_format_allows(implementation, weights, sizes):
    lstm = nn.LSTM(*sizes, num_layers=2)
    x = torch.randn(100, 3, sizes[0])
    with torch.no_grad():
        truth = copy.deepcopy(lstm).double()(x.double())
        torchs, ours = lstm(x), prepare(lstm, weights)(x)
    allowed = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
    for a, b, t in zip(*map(tensors_in, (ours, torchs, truth)), strict=True):
        if weights == "float32":
            assert_no_worse_than_torch(a, b, t)
        else:
            assert max_error(a, t) <= allowed[weights]


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_half_formats_only_round_the_weights(isa, weights):
    """The rest is float32: what float32 gives from the weights that were rounded beforehand."""
    lstm = ISSLSTM(13, 21, 2, proj_size=5, bidirectional=True)
    rounded = copy.deepcopy(lstm)
    for name, parameter in rounded.named_parameters():
        if name.startswith("weight"):
            parameter.data = parameter.data.to(DTYPES[weights]).float()
    x = torch.randn(20, 4, 13)
    torch.testing.assert_close(prepare(lstm, weights)(x), prepare(rounded)(x), rtol=1e-6, atol=1e-6)


def test_int8_keeps_each_row_within_half_a_step_of_its_weights():
    lstm = nn.LSTM(5, 7, proj_size=2)
    with torch.no_grad():
        lstm.weight_ih_l0[3] *= 1000  # a scale of its own, so that no other row suffers
        lstm.weight_hh_l0[4] = 0
    prepared = prepare(lstm, "int8")
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        weight, scale = getattr(lstm, name), getattr(prepared, name + "_scale")
        back = getattr(prepared, name).float() * scale[:, None]
        assert scale.shape == weight.shape[:1] and scale.dtype == torch.float32
        assert bool(((back - weight).abs() <= scale[:, None] * 0.5001).all())


def test_a_language_models_perplexity_hardly_moves():
    # Counts up, mostly: something to learn.
    steps = torch.randint(1, 3, (4000,), generator=torch.Generator().manual_seed(0))
    words = (steps.cumsum(0) % 30).view(20, 200).t().contiguous()
    model = LanguageModel(30, 16, 33, 2, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for tokens, targets in windows(words, 20):
            loss = cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    text = words.t().flatten()
    before = perplexity(model, text)
    assert before < 4  # of 30 words: it has learnt
    for weights, allowed in (("float16", 1e-3), ("bfloat16", 1e-3), ("int8", 5e-3)):
        assert abs(math.log(perplexity(prepare(model, weights), text) / before)) < allowed


# -- forward forms ---------------------------------------------------------------------------------

FORMS = [
    {"hidden_size": 4},
    {"hidden_size": 9, "batch_first": True, "bias": False},
    {"hidden_size": 17, "num_layers": 3, "proj_size": 2},
    {"hidden_size": 5, "num_layers": 2, "bidirectional": True, "batch_first": True},
    {"hidden_size": 6, "num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False},
    {"hidden_size": [7, 3], "num_layers": 2},
    {"hidden_size": [(5, 4), 6], "proj_size": [(2, 3), 0], "num_layers": 2, "bidirectional": True},
]


@torch.no_grad()
def calls(lstm):
    """Arguments of every form of call, by name."""
    time, batch = (1, 0) if lstm.batch_first else (0, 1)
    x = torch.randn(*(6, 4)[:: -1 if lstm.batch_first else 1], 3)
    assert x.shape[time] == 6 and x.shape[batch] == 4
    state, one_row = lstm(x)[1], lstm(x.select(batch, 0))[1]
    ragged = [torch.randn(n, 3) for n in (2, 7, 4, 4)]
    packed, sorted_ = (
        pack_sequence(ragged, enforce_sorted=False),
        pack_sequence(sorted(ragged, key=len, reverse=True)),
    )
    return {
        "plain": (x,),
        "one step": (x.narrow(time, 0, 1),),
        "one row": (x.narrow(batch, 0, 1),),
        "strided": (torch.randn(*x.shape[:2], 6)[..., ::2],),
        "state": (x, state),
        "state as a list": (x, list(state)),
        "unbatched": (x.select(batch, 0),),
        "unbatched, state": (x.select(batch, 0), one_row),
        "packed": (packed,),
        "packed, state": (packed, state),
        "packed and sorted": (sorted_, state),
        "lengths": (x, None, [6, 1, 3, 6]),
        "lengths, state": (x, state, torch.tensor([2, 6, 3, 1])),
    }


@pytest.mark.parametrize("options", FORMS, ids=lambda o: " ".join(f"{v}" for v in o.values()))
def test_every_form_of_call_is_isslstms(implementation, options):
    lstm = ISSLSTM(3, **options)
    prepared = prepare(lstm)
    with torch.no_grad():
        for name, args in calls(lstm).items():
            originals = [t.clone() for t in tensors_in([a for a in args[:2] if a is not None])]
            ours, expected = prepared(*args), lstm(*args)
            assert type(ours[0]) is type(expected[0])
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, msg=name)
            left = tensors_in([a for a in args[:2] if a is not None])
            assert all(map(torch.equal, left, originals)), f"{name}: an argument was written to"


def test_formats_take_every_form_of_call_too(isa, weights):
    lstm = ISSLSTM(3, 17, 2, bidirectional=True, proj_size=5)
    prepared = prepare(lstm, weights)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}[weights]
    with torch.no_grad():
        for args in calls(lstm).values():
            torch.testing.assert_close(prepared(*args), lstm(*args), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floating_inputs_are_converted_there_and_back(implementation, weights, dtype):
    lstm = ISSLSTM(3, 4, 2)
    prepared = prepare(lstm, weights)
    for name, args in calls(lstm).items():
        x, *rest = args
        x = x.to(dtype)
        ours = prepared(x, *rest)
        expected = prepared(x.to(torch.float32), *rest)
        for a, b in zip(tensors_in(ours), tensors_in(expected), strict=True):
            assert a.dtype == dtype, name
            assert torch.equal(a, b.to(dtype)), name
        if rest and rest[0] is not None:
            state = tuple(s.to(dtype) for s in rest[0])
            assert tensors_in(prepared(x, state))[0].dtype == dtype


def test_a_float64_lstm_is_prepared_for_float32():
    lstm = nn.LSTM(3, 4, 2, dtype=torch.float64)
    y, _ = prepare(lstm)(X)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, lstm(X.double())[0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_same_dtype_with_the_extension_and_without(dtype):
    prepared, x = prepare(nn.LSTM(3, 4)), X.to(dtype)
    state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for args in ((x,), (x, state), (x, None, [5, 1])):
            ours = prepared(*args)
            with use_backend("reference"):
                expected = prepared(*args)
            assert [t.dtype for t in tensors_in(ours)] == [t.dtype for t in tensors_in(expected)]


def test_no_dropout_between_the_layers_even_in_training_mode():
    lstm = ISSLSTM(3, 4, 2, dropout=0.9)
    prepared = prepare(lstm).train()
    torch.testing.assert_close(prepared(X), lstm.eval()(X))


def test_mistakes_are_isslstms():
    lstm = ISSLSTM(3, 4, 2)
    prepared = prepare(lstm)
    for args in (
        (torch.randn(5, 2, 4),),
        (X.long(),),
        (torch.randn(0, 2, 3),),
        (X[None],),
        (X, (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))),
        (X, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
        (X, None, [6, 1]),
    ):
        with pytest.raises(Exception) as expected:
            lstm(*args)
        with pytest.raises(expected.type) as got:
            prepared(*args)
        assert str(got.value) == str(expected.value)


# -- the model around it ---------------------------------------------------------------------------


def test_every_lstm_of_a_model_is_prepared_and_the_rest_copied(weights):
    model = Tagger()
    before, types = values_of(model), [type(m) for m in model.modules()]
    prepared = prepare(model, weights)
    assert type(prepared) is Tagger and prepared is not model and not prepared.training
    assert type(prepared.first) is PreparedLSTM and prepared.again is prepared.first
    assert type(prepared.inner[0]) is PreparedLSTM
    assert prepared.norm is not model.norm and prepared.norm.weight is not model.norm.weight
    assert isinstance(prepared.inner[1].weight, nn.Parameter)
    with torch.no_grad():
        torch.testing.assert_close(prepared(X), model(X), rtol=0, atol=3e-2)
    assert model.training and [type(m) for m in model.modules()] == types
    assert same_state(model, before)


def test_later_changes_of_the_model_do_not_reach_the_prepared_one(implementation, weights):
    model = Tagger()
    prepared = prepare(model, weights)  # not run yet: nothing may be packed so far
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        expected = twin(X)
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(prepared(X), expected)
        prepared.inner[1].weight.zero_()
        assert model.inner[1].weight.any()


def test_hooks_of_an_lstm_stay():
    calls = []
    model = Tagger()
    model.first.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        prepare(model)(X)
    assert len(calls) == 2


def test_state_dict_has_nn_lstms_names_and_the_formats_dtypes(weights):
    lstm = nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True)
    values = prepare(lstm, weights).state_dict()
    names = list(lstm.state_dict())
    scales = {f"{name}_scale" for name in names if name.startswith("weight")}
    assert set(values) == set(names) | (scales if weights == "int8" else set())
    assert [name for name in values if name in names] == names
    for name in names:
        assert values[name].shape == lstm.state_dict()[name].shape
        wanted = DTYPES[weights] if name.startswith("weight") else torch.float32
        assert values[name].dtype == wanted


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_the_ones_that_run(implementation, weights, assign):
    first, second = (prepare(ISSLSTM(3, 9, 2, proj_size=2), weights) for _ in range(2))
    expected = second(X)
    assert not equal(first(X), expected)
    first.load_state_dict(copy.deepcopy(second.state_dict()), assign=assign)
    assert equal(first(X), expected)
    outer, other = prepare(Tagger(), weights), prepare(Tagger(), weights)
    with torch.no_grad():
        outer(X)
        outer.load_state_dict(other.state_dict())  # the hook of a module inside
        assert torch.equal(outer(X), other(X))


def test_a_plain_lstms_state_dict_loads_into_the_floating_formats():
    lstm = nn.LSTM(3, 4)
    for weights in ("float32", "float16", "bfloat16"):
        prepared = prepare(nn.LSTM(3, 4), weights)
        prepared(X)
        prepared.load_state_dict(lstm.state_dict())
        assert equal(prepared(X), prepare(lstm, weights)(X))


def through_a_file(module, folder):
    torch.save(module, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_deepcopy_pickle_and_save(weights, tmp_path, used):
    prepared = prepare(ISSLSTM(3, [4, 2], num_layers=2), weights)
    if used:
        prepared(X)
    for twin in (
        copy.deepcopy(prepared),
        pickle.loads(pickle.dumps(prepared)),
        through_a_file(prepared, tmp_path),
    ):
        assert type(twin) is PreparedLSTM and twin.weights == weights
        assert equal(twin(X), prepared(X)) and same_state(twin, values_of(prepared))
        twin.load_state_dict(prepare(ISSLSTM(3, [4, 2], num_layers=2), weights).state_dict())
        assert not equal(twin(X), prepared(X))  # a twin has its own weights, and its own hook


@pytest.mark.parametrize(
    "change",
    [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half(), lambda m: m.float()],
    ids=["bfloat16", "double", "half", "float"],
)
def test_a_change_of_dtype_leaves_the_weights_as_they_are(implementation, weights, change):
    lstm = nn.LSTM(3, 4, 2)
    with torch.no_grad():
        lstm.bias_ih_l0[0] = 1e5  # beyond float16
    prepared = prepare(lstm, weights)
    before, y = values_of(prepared), prepared(X)
    assert change(prepared) is prepared
    assert same_state(prepared, before)
    assert equal(prepared(X), y)


def test_the_line_it_prints():
    assert repr(prepare(nn.LSTM(3, 4, 2), "int8")) == (
        "PreparedLSTM(3, 4, num_layers=2, weights='int8')"
    )


# -- errors ----------------------------------------------------------------------------------------


def with_a_weight(value, dtype=torch.float32):
    lstm = nn.LSTM(3, 4, dtype=dtype)
    lstm.weight_hh_l0.data[1, 2] = value
    return lstm


ERRORS = {
    "an unknown format": (
        lambda: prepare(nn.LSTM(3, 4), "int4"),
        ValueError,
        "prepare: expected weights to be one of ('float32', 'float16', 'bfloat16', 'int8'), "
        "got 'int4'",
    ),
    "no module": (
        lambda: prepare([nn.LSTM(3, 4)]),
        TypeError,
        "prepare: expected a torch.nn.Module, got list",
    ),
    "no LSTM": (
        lambda: prepare(nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 4))),
        ValueError,
        "prepare: expected a model with an nn.LSTM or ISSLSTM, got Sequential without one",
    ),
    "prepared already": (
        lambda: prepare(nn.ModuleList([nn.LSTM(3, 4), prepare(nn.LSTM(3, 4))])),
        ValueError,
        "prepare: expected a model that is not prepared yet, got a PreparedLSTM",
    ),
    "NaN": (
        lambda: prepare(with_a_weight(math.nan)),
        ValueError,
        "prepare: expected finite weights, got inf or nan in weight_hh_l0",
    ),
    "infinity": (
        lambda: prepare(with_a_weight(-math.inf), "int8"),
        ValueError,
        "prepare: expected finite weights, got inf or nan in weight_hh_l0",
    ),
    "beyond float16": (
        lambda: prepare(with_a_weight(-7e4), "float16"),
        ValueError,
        "prepare: expected weights within float16's range of 65504, got 70000 in weight_hh_l0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error) as got:
        call()
    assert str(got.value) == message


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_float64_weight_beyond_the_format_is_not_called_float16s(weights):
    with pytest.raises(ValueError, match="in weight_hh_l0") as got:
        prepare(with_a_weight(1e300, torch.float64), weights)
    assert "float16" not in str(got.value).replace("bfloat16", "")


STATE = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
NO_GRADIENT = (
    "PreparedLSTM: expected an input that asks for no gradient (a prepared model only infers; use "
    "torch.no_grad()), got one with requires_grad=True"
)


@pytest.mark.parametrize(
    "args",
    [
        lambda: (X.clone().requires_grad_(),),
        lambda: (X.clone().requires_grad_(), None, [5, 1]),
        lambda: (pack_sequence([X[:, 0].clone().requires_grad_()]),),
        lambda: (X.double().requires_grad_(),),
        lambda: (X, (STATE[0].clone().requires_grad_(), STATE[1])),
        lambda: (X, (STATE[0], STATE[1].clone().requires_grad_())),
    ],
    ids=["input", "lengths", "packed", "float64", "h_0", "c_0"],
)
def test_a_gradient_is_refused_rather_than_wrong(implementation, args):
    prepared = prepare(nn.LSTM(3, 4))
    with pytest.raises(RuntimeError) as got:
        prepared(*args())
    assert str(got.value) == NO_GRADIENT
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors_in(prepared(*args())))


# -- the same bits ---------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch_and_no_call_on_the_last(isa, weights):
    for options in ({"hidden_size": 70, "proj_size": 13}, {"hidden_size": 31, "num_layers": 2}):
        prepared = prepare(ISSLSTM(8, bidirectional=True, **options), weights)
        x = torch.randn(30, 13, 8)
        y, (h, c) = prepared(x)
        for _ in range(3):
            assert equal(prepared(x), (y, (h, c)))
        for row in (0, 5, 12):
            one = prepared(x[:, row : row + 1].contiguous())
            assert equal(one, (y[:, row : row + 1], (h[:, row : row + 1], c[:, row : row + 1])))


def test_a_row_of_weights_beyond_the_cache_is_the_same_too(isa, weights):
    # Over 2 MB of float32 in w_ih and w_hh, where a single row takes two panels at a time; with
    # AVX-512 an odd number of them, the last in part.
    prepared = prepare(nn.LSTM(390, 397), weights)
    x = torch.randn(3, 2, 390)
    y, (h, c) = prepared(x)
    for row in (0, 1):
        one = prepared(x[:, row : row + 1].contiguous())
        assert equal(one, (y[:, row : row + 1], (h[:, row : row + 1], c[:, row : row + 1])))


# Shapes that are split by units, directions, layers and rows: T, B, and the LSTM's options.
SPLITS = {
    "units": (20, 1, {"hidden_size": 300}),
    "units, projected": (20, 1, {"hidden_size": 300, "proj_size": 150}),
    "directions": (20, 1, {"hidden_size": 200, "num_layers": 2, "bidirectional": True}),
    "layers": (200, 1, {"hidden_size": 64, "num_layers": 3}),
    "rows": (20, 64, {"hidden_size": 64, "num_layers": 2}),
}


@pytest.mark.parametrize("weights", ["float32", "int8"])  # int8: each thread quantises rows
@pytest.mark.parametrize("split", SPLITS)
def test_threads_give_the_same_bits(isa, weights, two_threads, split):
    steps, batch, options = SPLITS[split]
    prepared = prepare(ISSLSTM(20, **options), weights)
    x = torch.randn(steps, batch, 20)
    packed = pack_sequence([x[: steps - n // 4, n] for n in range(batch)])
    torch.set_num_threads(1)
    alone = prepared(x), prepared(packed)
    torch.set_num_threads(2)
    # rows: cheap, and threads drift apart by chance. The first call may run alone.
    for _ in range(10 if split == "rows" else 3):
        assert equal((prepared(x), prepared(packed)), alone)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_two_python_threads_share_a_prepared_model(isa, weights, two_threads):
    steps, batch, options = SPLITS["units"]
    prepared = prepare(ISSLSTM(20, **options), weights)
    inputs = [torch.randn(steps, batch, 20) for _ in range(2)]
    twin = copy.deepcopy(prepared)
    expected = [twin(x) for x in inputs]

    def work(which):  # the first calls of both also pack at once
        return all(equal(prepared(inputs[which]), expected[which]) for _ in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def openmp():
    """The OpenMP library that torch runs on, where it is GNU's; else None."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if "libgomp" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


@pytest.mark.skipif(openmp() is None, reason="needs GNU's OpenMP to begin a parallel region")
def test_inside_a_parallel_region_it_runs_alone(isa, two_threads):
    steps, batch, options = SPLITS["units"]
    prepared = prepare(ISSLSTM(20, **options))
    inputs = [torch.randn(steps, batch, 20) for _ in range(2)]
    expected = [prepared(x) for x in inputs]
    results = {}
    library = openmp()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        member = library.omp_get_thread_num()
        with torch.no_grad():
            results[member] = library.omp_in_parallel(), prepared(inputs[member])

    library.GOMP_parallel(body, None, 2, 0)
    assert sorted(results) == [0, 1]
    for member, (parallel, result) in results.items():
        assert parallel and equal(result, expected[member])


def test_another_isa_packs_again(weights):
    prepared = prepare(ISSLSTM(8, 45, 2, proj_size=9), weights)
    x = torch.randn(12, 6, 8)
    results = []
    for name in [*supported_isas(), *supported_isas()]:
        with use_isa(name):
            results.append(prepared(x))
            fresh = copy.deepcopy(prepared)(x)
        assert equal(results[-1], fresh)
    # int8 quantises h on the fly: a last bit may make it round the other way, by one step.
    tolerance = 1e-2 if weights == "int8" else 1e-5
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=tolerance)
