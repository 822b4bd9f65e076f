# SPDX-License-Identifier: Apache-2.0
"""export_onnx: both exporters write the same answers, by standard nodes, for every size."""

import importlib.util
import io
import math
import os
import warnings

import pytest
import torch
from kinds import GRU, LSTM, every_kind, tensors_in
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import iss_kernels as iss

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SCRIPT = importlib.util.find_spec("onnxscript") is not None
NEEDS_SCRIPT = pytest.mark.skipif(not SCRIPT, reason="onnxscript is missing")
both_exporters = pytest.mark.parametrize(
    "dynamo", [pytest.param(True, marks=NEEDS_SCRIPT), False], ids=["dynamo", "legacy"]
)
# The exporter by torch.export takes two seconds a model: these with --slow.
legacy_or_slow = pytest.mark.parametrize(
    "dynamo",
    [pytest.param(True, marks=[NEEDS_SCRIPT, pytest.mark.slow]), False],
    ids=["dynamo", "legacy"],
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and onnxscript's


FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # not bfloat16, where the machine has it


def onnx_runtime(path):
    session = ort.InferenceSession(path)
    return lambda feeds: session.run(None, feeds)


def openvino(path):
    """Compiled once for all sizes."""
    vino = pytest.importorskip("openvino")
    compiled = vino.Core().compile_model(path, "CPU", FLOAT32)
    return lambda feeds: list(compiled(feeds).values())


def openvino_of_fixed_sizes(path):
    """Compiled for each call: with sizes that may differ OpenVINO 2026.4 takes no sequence_lens."""
    vino = pytest.importorskip("openvino")

    def run(feeds):
        model = vino.Core().read_model(path)
        model.reshape({name: list(value.shape) for name, value in feeds.items()})
        return list(vino.Core().compile_model(model, "CPU", FLOAT32)(feeds).values())

    return run


def check(path, model, *calls, engines=(onnx_runtime, openvino), tolerance=1e-5):
    """Each engine's answers to each call (a dict of inputs) are the model's."""
    onnx.checker.check_model(path)
    for engine in engines:
        run = engine(path)
        for call in calls:
            with torch.no_grad():
                wanted = tensors_in(model(**call))
            feeds = zip(onnx_inputs(path), tensors_in(tuple(call.values())), strict=True)
            got = run({key: value.numpy() for key, value in feeds})
            assert len(got) == len(wanted)
            for w, g in zip(wanted, got, strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(g), w, rtol=tolerance, atol=tolerance,
                    msg=lambda text, engine=engine: f"{engine.__name__}: {text}",
                )  # fmt: skip


RAGGED = (onnx_runtime, openvino_of_fixed_sizes)


def onnx_inputs(path):
    return [given.name for given in onnx.load(path).graph.input]


def operators(path):
    """How often each operator occurs, in subgraphs too."""
    counts, stack = {}, [onnx.load(path).graph]
    while stack:
        for node in stack.pop().node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
            stack += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return counts


def shape_of(path, name):
    graph = onnx.load(path).graph
    value = next(v for v in (*graph.input, *graph.output) if v.name == name)
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


class Tagger(nn.Module):
    """A recurrent module and a head; gives the output and the final states."""

    def __init__(self, rnn, batch_first=False):
        super().__init__()
        self.rnn = rnn
        sizes = rnn.sizes[-1] if hasattr(rnn, "sizes") else None
        width = sum(p for _, p in sizes) if sizes else rnn.hidden_size * (1 + rnn.bidirectional)
        self.head = nn.Linear(width, 3)

    def forward(self, x, hx=None):
        y, states = self.rnn(x, hx)
        return self.head(y), states


@both_exporters
@every_kind
def test_a_layer_is_a_node(tmp_path, kind, dynamo):
    model = Tagger(kind(4, [6, 3], num_layers=2))
    path = tmp_path / "model.onnx"
    iss.export_onnx(model, torch.randn(5, 2, 4), path, dynamo=dynamo)
    check(path, model, *({"x": torch.randn(t, b, 4)} for t, b in ((5, 2), (9, 3), (1, 1))))
    counts = operators(path)
    assert counts[kind.torchs.__name__] == 2
    assert not counts.keys() & {"Loop", "Scan", "If", "Tanh", "Sigmoid", "Expand"}
    assert shape_of(path, "x") == ["x_0", "x_1", 4]
    names = {initializer.name for initializer in onnx.load(path).graph.initializer}
    if dynamo:
        assert names >= {f"rnn.{w}_l{layer}" for w in "WRB" for layer in (0, 1)} | {"head.bias"}


@both_exporters
@every_kind
def test_directions_of_one_size_are_one_node(tmp_path, kind, dynamo):
    model = Tagger(kind(4, [(6, 6), (3, 5)], 2, bidirectional=True, batch_first=True))
    path = tmp_path / "model.onnx"
    iss.export_onnx(model, torch.randn(2, 5, 4), path, dynamo=dynamo)
    check(path, model, *({"x": torch.randn(b, t, 4)} for t, b in ((5, 2), (9, 3))))
    assert operators(path)[kind.torchs.__name__] == 3


@legacy_or_slow
@pytest.mark.parametrize("sizes", [5, [(6, 6), (3, 5)]], ids=["equal sizes", "unequal sizes"])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_states_are_inputs_and_outputs(tmp_path, kind, sizes, dynamo):
    model = Tagger(kind(4, sizes, 2, bidirectional=True, bias=False))

    def call(steps, batch):
        x = torch.randn(steps, batch, 4)
        with torch.no_grad():
            states = model(x)[1]
        return {"x": x, "hx": states}

    path = tmp_path / "model.onnx"
    iss.export_onnx(model, call(5, 2), path, dynamo=dynamo)
    check(path, model, call(5, 2), call(7, 3), call(4, 4))


@legacy_or_slow
@pytest.mark.parametrize("with_state", [False, True])
def test_a_projection_is_a_product_after_the_layer(tmp_path, with_state, dynamo):
    model = Tagger(iss.ISSLSTM(4, [7, 6], 2, bidirectional=True, proj_size=[3, (2, 4)]))

    def call(steps, batch):
        x = torch.randn(steps, batch, 4)
        return {"x": x, "hx": model(x)[1]} if with_state else {"x": x}

    path = tmp_path / "model.onnx"
    with torch.no_grad():
        iss.export_onnx(model, call(5, 2), path, dynamo=dynamo)
        check(path, model, call(5, 2), call(7, 3))
    assert operators(path)["LSTM"] == 2


class Packed(nn.Module):
    """An encoder over a packed batch, as text models have it."""

    def __init__(self, rnn, enforce_sorted=False):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 4), rnn
        self.enforce_sorted = enforce_sorted

    def forward(self, tokens, lengths):
        x = self.embedding(tokens)
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=self.enforce_sorted)
        packed, states = self.rnn(packed)
        y, _ = pad_packed_sequence(packed, padding_value=-1.0)
        return y, states


class WithLengths(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(x, None, lengths)


def ragged(steps, *lengths, tokens=True):
    shape = steps, len(lengths)
    x = torch.randint(11, shape) if tokens else torch.randn(*shape, 4)
    return {"tokens" if tokens else "x": x, "lengths": torch.tensor(lengths)}


@legacy_or_slow
@pytest.mark.parametrize(
    ("kind", "enforce_sorted"), [(LSTM, True), (GRU, False)], ids=lambda v: getattr(v, "name", v)
)
def test_packed_sequences_become_sequence_lens(tmp_path, kind, enforce_sorted, dynamo):
    model = Packed(kind(4, [(6, 6), (3, 5)], 2, bidirectional=True), enforce_sorted)
    path = tmp_path / "model.onnx"
    iss.export_onnx(model, ragged(7, 7, 5, 2), path, dynamo=dynamo)
    check(path, model, ragged(7, 7, 5, 2), ragged(9, 8, 5, 5, 1), ragged(3, 3), engines=RAGGED)
    assert not operators(path).keys() & {"NonZero", "Loop", "Scan"}
    assert operators(path)[kind.torchs.__name__] == 3


@legacy_or_slow
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_become_sequence_lens(tmp_path, batch_first, dynamo):
    model = WithLengths(iss.ISSLSTM(4, [(6, 6), (3, 5)], 2, True, batch_first, 0, True))

    def call(steps, *lengths):
        given = ragged(steps, *lengths, tokens=False)
        return given | {"x": given["x"].transpose(0, 1)} if batch_first else given

    path = tmp_path / "model.onnx"
    iss.export_onnx(model, call(7, 2, 7, 5), path, dynamo=dynamo)
    check(path, model, call(7, 7, 2, 4), call(9, 1, 8, 9, 3), engines=RAGGED)


class Rows(nn.Module):
    """Computes on the rows of a packed sequence, and returns them."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = iss.ISSLSTM(4, 5), nn.Linear(5, 4)
        self.again = iss.ISSGRU(4, 3)

    def forward(self, x, lengths):
        packed, _ = self.rnn(pack_padded_sequence(x, lengths))
        packed.data.mul_(2)  # after which the padded form that it came from is another
        packed = packed._replace(data=self.head(packed.data).tanh())
        y, h = self.again(packed)
        return y.data, h, pad_packed_sequence(packed)[0]


@both_exporters
def test_rows_of_a_packed_sequence_are_what_they_are(tmp_path, dynamo):
    model, path = Rows(), tmp_path / "model.onnx"
    iss.export_onnx(model, ragged(7, 7, 5, 2, tokens=False), path, dynamo=dynamo)
    calls = (ragged(9, *lengths, tokens=False) for lengths in ([8, 5, 5, 1], [9, 2]))
    check(path, model, *calls, engines=[onnx_runtime])


class Reads(nn.Module):
    """Reads what a packed sequence is made of."""

    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSLSTM(4, 5)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths)
        return self.rnn(packed)[0].data[-int(packed.batch_sizes[-1]) :]


@both_exporters
def test_code_that_reads_batch_sizes_is_refused(tmp_path, dynamo):
    with pytest.raises(RuntimeError, match="^export_onnx: expected packed .* got __getitem__ of"):
        iss.export_onnx(Reads(), ragged(7, 7, 5, tokens=False), tmp_path / "model.onnx",
                        dynamo=dynamo)  # fmt: skip
    assert os.listdir(tmp_path) == []


class Cells(nn.Module):
    """One step of each cell."""

    def __init__(self):
        super().__init__()
        self.lstm = iss.ISSLSTMCell(4, 5)
        self.gru = iss.ISSGRUCell(5, 6, bias=False)
        self.rnn = iss.ISSRNNCell(6, 3, nonlinearity="relu")

    def forward(self, x, h, c):
        h, c = self.lstm(x, (h, c))
        return h, c, self.rnn(self.gru(h))


@both_exporters
def test_cells_are_nodes_of_one_step(tmp_path, dynamo):
    model, path = Cells(), tmp_path / "model.onnx"

    def call(batch):
        return {"x": torch.randn(batch, 4), "h": torch.randn(batch, 5), "c": torch.randn(batch, 5)}

    iss.export_onnx(model, call(2), path, dynamo=dynamo)
    check(path, model, call(2), call(5))
    counts = operators(path)
    assert [counts[name] for name in ("LSTM", "GRU", "RNN")] == [1, 1, 1]


class Asks(nn.Module):
    """Asks for torch's class, takes and returns what is no tensor, and writes in place."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 5, 2, bidirectional=True)
        self.cell = nn.utils.parametrizations.weight_norm(nn.GRUCell(10, 3), "weight_hh")

    def forward(self, times, x, mask=None, last=True):
        assert isinstance(self.rnn, nn.LSTM)
        y, _ = self.rnn(x * times)
        y.detach().masked_fill_(y > 0.1, 0.0)
        y.data.masked_fill_(y < -0.1, 0.0)  # which a trace does not see
        return {"h": self.cell(y[-1] if last else y[0]), "times": times}


@both_exporters
def test_a_model_of_torchs_modules(tmp_path, dynamo):
    model, path = Asks(), tmp_path / "model.onnx"
    iss.export_onnx(model, (3, torch.randn(5, 2, 4), None, False), path, dynamo=dynamo)
    onnx.checker.check_model(path)
    x = torch.randn(9, 3, 4)
    got = torch.from_numpy(onnx_runtime(path)({"x": x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(got, model(3, x, None, False)["h"], rtol=1e-5, atol=1e-5)
    assert [operators(path)[name] for name in ("LSTM", "GRU")] == [2, 1]
    assert type(model.rnn) is nn.LSTM


@legacy_or_slow
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_prepared_model(tmp_path, weights, dynamo):
    model = iss.prepare(Tagger(iss.ISSGRU(4, [(6, 6), (3, 5)], 2, bidirectional=True)), weights)
    path = tmp_path / "model.onnx"
    iss.export_onnx(model, torch.randn(5, 2, 4), path, dynamo=dynamo)
    # The file's products are float32, and those of some CPUs bfloat16.
    tolerance = 5e-3 if weights == "bfloat16" else 1e-5
    check(path, model, {"x": torch.randn(9, 3, 4)}, tolerance=tolerance)


@legacy_or_slow
def test_a_prepared_model_of_another_dtype(tmp_path, dynamo):
    model = iss.prepare(Tagger(iss.ISSLSTM(4, 6)).half())
    path, x = tmp_path / "model.onnx", torch.randn(5, 2, 4, dtype=torch.float64)
    iss.export_onnx(model, x, path, dynamo=dynamo)
    check(path, model, {"x": torch.randn(9, 3, 4, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match=r"dtypes that NumPy has.* got bfloat16 in x"):
        iss.export_onnx(model, x.bfloat16(), path, dynamo=dynamo)


@legacy_or_slow
@pytest.mark.parametrize("prepared", [False, True])
def test_int8_lstms_are_onnx_runtimes(tmp_path, prepared, dynamo):
    model = Tagger(iss.ISSLSTM(16, [(32, 32), (24, 40)], 2, bidirectional=True))
    given = iss.prepare(model, "int8") if prepared else model
    path = tmp_path / "model.onnx"
    iss.export_onnx(given, torch.randn(5, 2, 16), path, weights=None if prepared else "int8",
                    dynamo=dynamo)  # fmt: skip
    assert operators(path)["DynamicQuantizeLSTM"] == 3
    call = {"x": torch.randn(9, 3, 16)}
    check(path, model, call, engines=[onnx_runtime], tolerance=0.03)


# -- torch.onnx.export itself


def torchs_warnings(test):
    for category in ("FutureWarning", "torch.jit.TracerWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{category}")(test)
    return test


@torchs_warnings
@both_exporters
def test_torchs_own_export_writes_the_same_nodes(tmp_path, dynamo):
    model = Tagger(iss.ISSLSTM(4, [(6, 6), (3, 5)], 2, bidirectional=True)).eval()
    path = str(tmp_path / "model.onnx")
    sizes = {0: "T", 1: "B"}
    options = {"dynamic_shapes": {"x": sizes}} if dynamo else {"dynamic_axes": {"x": sizes}}
    torch.onnx.export(
        model, (torch.randn(5, 2, 4),), path, dynamo=dynamo, verbose=False, input_names=["x"],
        **options,
    )  # fmt: skip
    check(path, model, {"x": torch.randn(9, 3, 4)})
    assert operators(path)["LSTM"] == 3


@torchs_warnings
@legacy_or_slow
def test_torchs_own_export_of_lengths(tmp_path, dynamo):
    model = WithLengths(iss.ISSGRU(4, 5)).eval()
    path = str(tmp_path / "model.onnx")
    call = ragged(7, 7, 3, 5, tokens=False)
    sizes = {"x": {0: "T", 1: "B"}, "lengths": {0: "B"}}
    options = {"dynamic_shapes": sizes} if dynamo else {"dynamic_axes": sizes}
    torch.onnx.export(
        model, tuple(call.values()), path, dynamo=dynamo, verbose=False, input_names=list(call),
        **options,
    )  # fmt: skip
    check(path, model, ragged(9, 1, 8, 9, 3, tokens=False), engines=RAGGED)


@torchs_warnings
def test_torchs_own_export_of_packed_sequences_is_refused():
    model = Packed(iss.ISSGRU(4, 5)).eval()
    with pytest.raises(RuntimeError, match="iss_kernels.export_onnx takes them$"):
        torch.onnx.export(model, tuple(ragged(7, 7, 3).values()), io.BytesIO(), dynamo=False)


X = torch.randn(5, 2, 4)


class OfValues(nn.Module):
    """What torch.export cannot follow and a trace can."""

    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSGRU(4, 5)

    def forward(self, x):
        return self.rnn(x)[0] * (1 if float(x[0, 0, 0]) > -1e9 else 0)


@pytest.mark.skipif(not SCRIPT, reason="onnxscript is missing")
def test_by_default_the_second_exporter_takes_what_the_first_refuses(tmp_path):
    model, path = OfValues(), tmp_path / "model.onnx"
    with pytest.raises(RuntimeError, match="expected a model that torch.onnx.export takes, got"):
        iss.export_onnx(model, X, path, dynamo=True)
    with pytest.warns(UserWarning, match=r"decided on the values .* \(test_export.py:\d+\)"):
        iss.export_onnx(model, X, path)
    check(path, model, {"x": torch.randn(9, 3, 4)})


class AsksForStarts(nn.Module):
    """Code that takes another way where the example's values are others."""

    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSGRU(4, 5)

    def forward(self, x, starts):
        if torch.all(starts == 0):
            return self.rnn(x)[0]
        return torch.stack([self.rnn(step[None])[0][0] for step in x])


@pytest.mark.parametrize(
    "starts", [torch.zeros(5, 2), torch.zeros(5, 2).long(), torch.zeros(5, 2) > 9]
)
def test_a_trace_of_one_branch_is_refused(tmp_path, starts, capfd):
    """The file would give the answers of the example's branch to all inputs."""
    for options in ({}, {"dynamo": False}):
        with pytest.raises(RuntimeError, match="whose code does not depend on the values"):
            iss.export_onnx(AsksForStarts(), (X, starts), tmp_path / "model.onnx", **options)
        assert os.listdir(tmp_path) == []
    assert "def forward" not in "".join(capfd.readouterr())


class Picks(nn.Module):
    """A step by its number, which code takes out of the tensor."""

    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSGRU(4, 5)

    def forward(self, x, step):
        return self.rnn(x)[0][int(step)]


@pytest.mark.parametrize("step", [torch.tensor(1), torch.tensor([4])], ids=str)
def test_a_number_that_code_takes_out_of_an_input_is_refused(tmp_path, step):
    with pytest.raises(RuntimeError, match="whose code does not depend on the values"):
        iss.export_onnx(Picks(), (X, step), tmp_path / "model.onnx", dynamo=False)
    assert os.listdir(tmp_path) == []


@both_exporters
def test_an_input_that_the_file_lacks_is_named(tmp_path, dynamo):
    class Ignores(Picks):
        def forward(self, x, step):
            return self.rnn(x)[0]

    path, model = tmp_path / "model.onnx", Ignores()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iss.export_onnx(model, (X, torch.tensor(1)), path, dynamo=dynamo)
    told = any("no input for ['step'], which change no" in str(one.message) for one in caught)
    assert told == ("step" not in onnx_inputs(path))


class Pads(nn.Module):
    """Steps in blocks of 16: padded, and cut off again."""

    def __init__(self):
        super().__init__()
        self.blocks, self.rnn = nn.Linear(16, 4), iss.ISSGRU(4, 16)

    def forward(self, x):  # [B, N]
        steps = x.shape[-1]
        x = nn.functional.pad(x, (0, math.ceil(steps / 16) * 16 - steps))
        return self.rnn(self.blocks(x.unflatten(1, (-1, 16))))[0].flatten(1)[:, :steps]


@both_exporters
def test_a_size_that_is_rounded_up_is_found(tmp_path, dynamo):
    """From 40 to 43 steps the padding ends where it did."""
    path, model = tmp_path / "model.onnx", Pads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iss.export_onnx(model, torch.randn(2, 40), path, dynamo=dynamo)
    if shape_of(path, "x") == ["x_0", 40]:
        assert any("in ['x_1'], which" in str(warning.message) for warning in caught)
    else:
        check(path, model, *({"x": torch.randn(3, n)} for n in (40, 43, 49, 200)),
              engines=[onnx_runtime])  # fmt: skip


class Branches(nn.Module):
    """Long sequences, of more than `least` steps, are another matter; of more than 50 none."""

    def __init__(self, least):
        super().__init__()
        self.rnn, self.least = iss.ISSGRU(4, 5), least
        self.positions = nn.Parameter(torch.randn(50, 1, 5))

    def forward(self, x, *, scale=1.0):  # [T, B, 4]
        y = self.rnn(x)[0] * scale
        return (y if x.size(0) <= self.least else -y) + self.positions[: x.size(0)]


@pytest.mark.skipif(not SCRIPT, reason="onnxscript is missing")
@pytest.mark.parametrize("least", [3, 20, 60])
def test_another_branch_for_other_sizes_is_found(tmp_path, least):
    """Of an example of 5 steps, twice as many are compared, and those where the branch begins."""
    path, model = tmp_path / "model.onnx", Branches(least)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iss.export_onnx(model, {"x": X}, path, dynamo=True)
    told = any("in ['x_0'], which" in str(warning.message) for warning in caught)
    assert told == (least < 60)
    assert shape_of(path, "x") == ([5] if told else ["x_0"]) + ["x_1", 4]
    if not told:
        check(path, model, *({"x": torch.randn(n, 3, 4)} for n in (2, 21, 50)))


class OverSteps(nn.Module):
    """A mean over steps, whose number code takes out of the shape."""

    def __init__(self, way="len"):
        super().__init__()
        self.rnn, self.way = nn.LSTM(4, 5), way

    def forward(self, x):
        y = self.rnn(x)[0]
        if self.way == "len":
            return y.sum(0) / len(x)
        return y * float(x[0, 0, 0])


@pytest.mark.parametrize("prepared", [False, True])
def test_a_file_of_int8_holds_no_number_of_the_example(tmp_path, prepared):
    """Its float32 form is compared: what 8 bits round is no sign of what code computed."""
    path = tmp_path / "model.onnx"
    torch.manual_seed(0)
    for way in ("len", "value"):
        given = OverSteps(way)
        options = {"weights": "int8", "dynamo": False}
        if prepared:
            given, options = iss.prepare(given, "int8"), {"dynamo": False}
        if way == "value":
            with pytest.raises(RuntimeError, match="whose code does not depend on the values"):
                iss.export_onnx(given, X, path, **options)
            continue
        with pytest.warns(UserWarning, match=r"the example's size alone in \['x_0'\]"):
            iss.export_onnx(given, X, path, **options)
        assert operators(path)["DynamicQuantizeLSTM"] == 1
        assert shape_of(path, "x") == [5, "x_1", 4]
        check(path, given, {"x": torch.randn(5, 3, 4)}, engines=[onnx_runtime], tolerance=0.03)
        os.remove(path)
    assert os.listdir(tmp_path) == []


class Masked(nn.Module):
    """Scores of actions, some of which never count."""

    def __init__(self, how, value):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 12), nn.Linear(12, 4)
        self.how, self.value = how, value
        self.register_buffer("mask", torch.tensor([False, False, False, True]))

    def forward(self, x, mask=None):
        y = self.head(self.rnn(x)[0] * float(x.abs().max()))
        mask = self.mask if mask is None else mask
        return y + mask * self.value if self.how == "sum" else y.masked_fill(mask, self.value)


@pytest.mark.parametrize("value", [0, -1e4, -1e9, -math.inf])
@pytest.mark.parametrize("how", ["fill", "sum", "an input"])
def test_a_number_beside_large_answers_is_refused(tmp_path, how, value):
    if how == "sum" and value == -math.inf:
        pytest.skip("0 * inf is none")
    model, example = Masked(how, value), X
    if how == "an input":
        example = X, torch.randn(5, 2, 4) > 0
    with pytest.raises(RuntimeError, match="whose code does not depend on the values"):
        iss.export_onnx(model, example, tmp_path / "model.onnx", dynamo=False)
    assert os.listdir(tmp_path) == []


class Centres(nn.Module):
    """Sequences, or batches, of more than `least` are another matter."""

    def __init__(self, least, dim):
        super().__init__()
        self.rnn, self.least, self.dim = nn.LSTM(4, 5), least, dim

    def forward(self, x):
        if x.size(self.dim) > self.least:
            x = x - x.mean(self.dim, keepdim=True)
        return self.rnn(x)[0]


@both_exporters
@pytest.mark.parametrize(("least", "dim"), [(1, 0), (2, 0), (1, 1)])
def test_another_branch_for_one_or_two_is_found(tmp_path, least, dim, dynamo):
    path, model = tmp_path / "model.onnx", Centres(least, dim)
    example = torch.randn(5, 4, 4)
    with pytest.warns(UserWarning, match=rf"the example's size alone in \['x_{dim}'\]"):
        iss.export_onnx(model, example, path, dynamo=dynamo)
    assert shape_of(path, "x")[dim] == example.shape[dim]


def test_a_file_that_onnx_runtime_cannot_run_is_kept_with_a_warning(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match="^export_onnx: .* was not compared with the model"):
        iss.export_onnx(nn.Conv1d(2, 3, 2).double(), X.double(), path, dynamo=False)
    assert path.exists()


class Concatenates(nn.Module):
    """An argument with the name that an exporter gives a node."""

    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSGRU(4, 5)

    def forward(self, cat, relu):
        return self.rnn(torch.cat([cat, relu], -1).relu())[0]


@both_exporters
def test_inputs_may_have_the_names_of_nodes(tmp_path, dynamo):
    path, model = tmp_path / "model.onnx", Concatenates()
    iss.export_onnx(model, (X[..., :1], X[..., :3]), path, dynamo=dynamo)
    assert onnx_inputs(path) == ["cat", "relu"]
    check(path, model, {"cat": torch.randn(7, 3, 1), "relu": torch.randn(7, 3, 3)})


# -- errors: one sentence, and no file


class Fixes(nn.Module):
    """A loop over the steps, which an export unrolls."""

    def __init__(self):
        super().__init__()
        self.cell = iss.ISSGRUCell(4, 5)

    def forward(self, x):
        h = x.new_zeros(x.size(1), 5)
        for step in x:
            h = self.cell(step, h)
        return h


class Resets(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = iss.ISSLSTM(4, [(6, 5)], bidirectional=True)

    def forward(self, x, lengths=None):
        return self.rnn(x, None, lengths, x[..., 0] > 0)


STEPS = {"x": {0: "T"}}
ERRORS = {
    "no module": (lambda path, **how: iss.export_onnx(len, X, path, **how), TypeError,
                  "expected a torch.nn.Module, neither traced nor scripted, got built"),
    "a scripted module": (
        lambda path, **how: iss.export_onnx(torch.jit.script(nn.Tanh()), X, path, **how), TypeError,
        "expected a torch.nn.Module, neither traced nor scripted, got RecursiveScriptModule"),
    "no format": (lambda path, **how: export(path, weights="int4", **how), ValueError,
                  "expected weights to be 'float32' or 'int8', got 'int4'"),
    "no input": (lambda path, **how: export(path, dynamic={"z": {0: "T"}}, **how), ValueError,
                 "expected dynamic to name inputs among ['input'], got 'z'"),
    "no dimension": (lambda path, **how: export(path, dynamic={"input": {3: "T"}}, **how),
                     ValueError,
                     "expected dynamic['input'] to hold dimensions of a 3-D tensor, got 3"),
    "no names of sizes": (lambda path, **how: export(path, dynamic={"input": [0]}, **how),
                          TypeError,
                          "expected dynamic to be {input: {dimension: name}}, got {'input': [0]}"),
    "a fixed size": (lambda path, **how: export(path, dynamic={"input": {2: "I"}}, **how),
                     ValueError, "expected sizes in dynamic that the model lets differ, got"),
    "names": (lambda path, **how: export(path, input_names=["a", "b"], **how), ValueError,
              "expected input_names for 1 tensors, got ['a', 'b']"),
    "a wrong example": (lambda path, **how: export(path, X[..., :3], **how), ValueError,
                        "expected a model that takes the example and returns tensors, got Runt"),
    "int8 of a GRU": (lambda path, **how: export(path, weights="int8", **how), ValueError,
                      "expected LSTMs, the only layers that ONNX Runtime has in 8 bits, got"),
    "resets of ragged rows": (
        lambda path, **how: iss.export_onnx(Resets(), (X, torch.tensor([5, 2])), path, **how),
        RuntimeError, "expected rows of one length where ONNX has no node (resets, and an"),
    "a packed batch": (lambda path, **how: export(path, nn.utils.rnn.pack_sequence([X]), **how),
                       ValueError, "expected a padded batch and its lengths, for the model to"),
    "an object": (lambda path, **how: iss.export_onnx(Asks(), (2, X, object()), path, **how),
                  ValueError, "expected an example of tensors, which become the file's inputs"),
    "no tensor": (lambda path, **how: iss.export_onnx(Asks(), (2, 3), path, **how), ValueError,
                  "expected an example of tensors, which become the file's inputs, and of plain"),
    "no argument": (lambda path, **how: export(path, {"z": X}, **how), TypeError,
                    "expected an example that forward takes, got TypeError: mi"),
    "a loop": (lambda path, **how: iss.export_onnx(Fixes(), X, path, dynamic=STEPS, **how),
               RuntimeError, "expected a model that lets T in dynamic differ (a loop over steps"),
}  # fmt: skip


def export(path, example=X, **options):
    iss.export_onnx(iss.ISSGRU(4, 5), example, path, **options)


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_a_sentence_and_leave_no_file(tmp_path, case):
    call, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        call(tmp_path / "model.onnx", dynamo=SCRIPT)
    message = str(caught.value)
    assert message.startswith(f"export_onnx: {text}") and "\n" not in message
    assert os.listdir(tmp_path) == []


def test_a_model_that_one_file_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("iss_kernels.export._LARGEST", 100)
    with pytest.raises(ValueError, match="^export_onnx: expected parameters of at most 100 bytes"):
        export(tmp_path / "model.onnx")


def test_a_file_that_stands_stays_after_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(ValueError):
        export(path, dynamic={"z": {}}, dynamo=False)
    assert path.read_text() == "before"


@legacy_or_slow
@pytest.mark.parametrize("opset", [18, 20])
def test_the_opset_is_a_choice(tmp_path, opset, dynamo):
    path = tmp_path / "model.onnx"
    export(path, opset=opset, dynamo=dynamo)
    assert onnx.load(path).opset_import[0].version == opset


@both_exporters
def test_sizes_can_be_named_or_fixed(tmp_path, dynamo):
    path = tmp_path / "model.onnx"
    export(path, dynamic={"x": {1: "batch"}}, input_names=["x"], output_names=["y", "h"],
           dynamo=dynamo)  # fmt: skip
    assert shape_of(path, "x") == [5, "batch", 4]
    assert [output.name for output in onnx.load(path).graph.output] == ["y", "h"]


@legacy_or_slow
def test_a_loop_over_steps_fixes_their_number_with_a_warning(tmp_path, dynamo):
    model, path = Fixes(), tmp_path / "model.onnx"
    with pytest.warns(
        UserWarning, match=r"size alone in \['x_0'\], which the exported model fixes"
    ):
        iss.export_onnx(model, X[:3], path, dynamo=dynamo)
    assert shape_of(path, "x") == [3, "x_1", 4]
    check(path, model, {"x": torch.randn(3, 3, 4)})


@legacy_or_slow
@pytest.mark.parametrize(
    "model",
    [
        Resets().double(),
        iss.ISSRHN(4, 5, depth=2),
        pytest.param(iss.ISSRHN(4, 5, 2, "separate"), marks=pytest.mark.slow),
    ],
    ids=["resets", "rhn", "rhn with carry"],
)
def test_what_onnx_has_no_node_for_is_written_step_by_step(tmp_path, model, dynamo):
    path = tmp_path / "model.onnx"
    dtype = next(model.parameters()).dtype
    with pytest.warns(UserWarning, match="which the exported model fixes"):
        iss.export_onnx(model, X[:3].to(dtype), path, dynamo=dynamo)
    call = {onnx_inputs(path)[0]: torch.randn(3, 7, 4, dtype=dtype)}
    check(path, model, call, engines=[onnx_runtime])


@both_exporters
def test_a_shrunken_model_takes_states_of_the_width_before(tmp_path, dynamo):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 8, 2), nn.Linear(8, 3)

        def forward(self, x, h, c):
            return self.head(self.lstm(x, (h, c))[0])

    def call(steps, batch):
        h, c = torch.randn(2, 2, batch, 8)
        return {"x": torch.randn(steps, batch, 4), "h": h, "c": c}

    model, example = Model(), call(5, 2)
    groups = iss.find_groups(model, example)
    small, _ = iss.shrink(model, groups, keep={"lstm.l0": range(5), "lstm.l1": [0, 2, 7]})
    path = tmp_path / "model.onnx"
    iss.export_onnx(small, example, path, dynamo=dynamo)
    check(path, small, call(9, 3))


class Pair(nn.Module):
    """One argument of two tensors, and another of the name that the first of them would have."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4)

    def forward(self, h, h_0):
        return self.gru(h[0] + h[1], h_0)[0]


def test_tensors_have_names_of_their_own(tmp_path):
    path, pair = tmp_path / "model.onnx", torch.randn(2, 5, 2, 3).unbind()
    example = (pair, torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match="input_names where two tensors of the example would have"):
        iss.export_onnx(Pair(), example, path, dynamo=False)
    assert not path.exists()
    iss.export_onnx(Pair(), example, path, input_names=["a", "b", "state"], dynamo=False)
    assert onnx_inputs(path) == ["a", "b", "state"]


def test_an_argument_whose_name_begins_like_another_counts_alone(tmp_path):
    class Model(nn.Module):
        def forward(self, h_len, h):
            return h[0] + h[1] + h_len

    path = tmp_path / "model.onnx"
    iss.export_onnx(Model(), (X[0], (X[1], X[2])), path, dynamo=False)
    assert onnx_inputs(path) == ["h_len", "h_0", "h_1"]


@both_exporters
def test_a_cell_whose_weights_are_computed_is_written_as_they_are_now(tmp_path, dynamo):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = iss.ISSGRUCell(4, 5)

        def forward(self, x, h):
            return self.cell(x, h)

    model, call = Model(), {"x": torch.randn(2, 4), "h": torch.randn(2, 5)}
    prune.l1_unstructured(model.cell, "weight_hh", amount=2)
    model(**call)
    with torch.no_grad():
        model.cell.weight_hh_orig.mul_(3)
    path = tmp_path / "model.onnx"
    iss.export_onnx(model, call, path, dynamic={}, dynamo=dynamo)
    check(path, model, call, engines=[onnx_runtime])


def test_numbers_in_the_place_of_a_tensor_are_named(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True)
            return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match=r"holds the numbers that \['lengths'\] have in the exam"):
        iss.export_onnx(Model(), (torch.randn(3, 6, 4), [6, 5, 3]), path, dynamo=False)
