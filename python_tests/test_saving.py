# SPDX-License-Identifier: Apache-2.0
"""A model that was saved comes back with the same sizes and the same answers, bit for bit."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kinds import every_kind, tensors_in
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import iss_kernels as iss

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Net(nn.Module):
    """Modules, and a function of the model and its input as forward."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def tagger(rnn: Any, width: int) -> Net:
    return Net(lambda m, x: (m.head(m.rnn(x)[0]), m.rnn(x)[1]), rnn=rnn, head=nn.Linear(width, 3))


def language_model(rnn: Any, width: int) -> Net:
    """Embedding and softmax are one parameter."""
    embed, head = nn.Embedding(9, width), nn.Linear(width, 9)
    head.weight = embed.weight
    run = lambda m, x: m.head(m.rnn(m.embed(x[..., 0].abs().long()))[0])  # noqa: E731
    return Net(run, embed=embed, rnn=rnn, head=head)


def loop(cell: Any, width: int) -> Net:
    def run(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = m.cell(step, state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    return Net(run, cell=cell, head=nn.Linear(width, 3))


def convolution(width: int, rnn: Any) -> Net:
    net = Net(
        lambda m, x: m.rnn(m.norm(m.conv(x.transpose(1, 2))).transpose(1, 2) + m.shift)[0],
        conv=nn.Conv1d(5, width, 3, padding=1), norm=nn.BatchNorm1d(width), rnn=rnn,
    )  # fmt: skip
    net.shift = nn.Parameter(torch.randn(width))
    net.register_buffer("mask", torch.randn(2, width) > 0, persistent=False)
    return net


# {name: makes a saved model, with the width of the output of its recurrent module, and a fresh one}
RNNS: dict[str, Callable[[], tuple[Any, int, Any, int]]] = {
    "LSTM": lambda: (iss.ISSLSTM(5, 3), 3, nn.LSTM(5, 8), 8),
    "as large": lambda: (iss.ISSLSTM(5, 8), 8, nn.LSTM(5, 8), 8),
    "layers": lambda: (iss.ISSLSTM(5, [6, 2, 3], 3), 3, nn.LSTM(5, 8, 3), 8),
    "bidirectional": lambda: (
        iss.ISSLSTM(5, [(6, 2), (3, 4)], 2, bidirectional=True), 7,
        nn.LSTM(5, 8, 2, bidirectional=True), 16,
    ),
    "no bias": lambda: (iss.ISSLSTM(5, 3, bias=False), 3, nn.LSTM(5, 8, bias=False), 8),
    "projections": lambda: (
        iss.ISSLSTM(5, [6, 4], 2, proj_size=[4, 2]), 2, nn.LSTM(5, 8, 2, proj_size=5), 5,
    ),
    "GRU": lambda: (iss.ISSGRU(5, [6, 4], 2), 4, nn.GRU(5, 8, 2), 8),
    "RNN": lambda: (
        iss.ISSRNN(5, [6, 4], 2, nonlinearity="relu"), 4, nn.RNN(5, 8, 2, nonlinearity="relu"), 8,
    ),
    "RHN": lambda: (iss.ISSRHN(5, 6, depth=3), 6, iss.ISSRHN(5, 8, depth=3), 8),
    "RHN, carry": lambda: (
        iss.ISSRHN(5, 6, depth=2, carry="separate"), 6,
        iss.ISSRHN(5, 8, depth=2, carry="separate"), 8,
    ),
    "of ours": lambda: (iss.ISSLSTM(5, [3, 4], 2), 4, iss.ISSLSTM(5, 8, 2), 8),
    "of torch": lambda: (nn.LSTM(5, 3), 3, nn.LSTM(5, 8), 8),
}  # fmt: skip
CELLS: dict[str, Callable[[], tuple[Any, int, Any, int]]] = {
    "LSTM cell": lambda: (iss.ISSLSTMCell(5, 3), 3, nn.LSTMCell(5, 8), 8),
    "GRU cell": lambda: (iss.ISSGRUCell(5, 3), 3, nn.GRUCell(5, 8), 8),
    "RNN cell": lambda: (
        iss.ISSRNNCell(5, 3, nonlinearity="relu"), 3, nn.RNNCell(5, 8, nonlinearity="relu"), 8,
    ),
}  # fmt: skip


def both(build: Any, modules: Any) -> tuple[nn.Module, nn.Module]:
    small, width, fresh, width_before = modules()
    return build(small, width), build(fresh, width_before)


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    **{name: partial(both, tagger, modules) for name, modules in RNNS.items()},
    **{name: partial(both, loop, modules) for name, modules in CELLS.items()},
    "language model": lambda: (
        language_model(iss.ISSLSTM(4, [6, 4], 2), 4),
        language_model(nn.LSTM(8, 8, 2), 8),
    ),
    "convolution": lambda: (
        convolution(3, iss.ISSGRU(3, 4)),
        convolution(8, nn.GRU(8, 8)),
    ),
    "one module": lambda: (iss.ISSLSTM(5, [3, 4], 2), nn.LSTM(5, 8, 2)),
}
every_pair = pytest.mark.parametrize("name", PAIRS)
X = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1)) * 2


def answers(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(model(x))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def round_trip(model: nn.Module, fresh: nn.Module, tmp_path: Any) -> nn.Module:
    iss.save(model, tmp_path / "m.safetensors")
    return iss.load(tmp_path / "m.safetensors", fresh)


@every_pair
def test_a_model_comes_back_with_its_sizes_and_answers(name, tmp_path):
    small, fresh = PAIRS[name]()
    answers(small)  # statistics of the batch
    result = round_trip(small, fresh, tmp_path)
    assert result is fresh
    expected, got = small.state_dict(), result.state_dict()
    assert list(expected) == list(got) and same(list(expected.values()), list(got.values()))
    assert same(answers(result.eval()), answers(small.eval()))
    assert repr(result) == repr(small)


@every_pair
def test_a_model_on_the_meta_device_comes_to_the_cpu(name, tmp_path):
    small, _ = PAIRS[name]()
    with torch.device("meta"):
        _, fresh = PAIRS[name]()
    result = round_trip(small, fresh, tmp_path)
    assert same(answers(result.eval()), answers(small.eval()))
    assert all(p.requires_grad for p in result.parameters())
    assert len(list(result.parameters())) == len(list(small.parameters()))  # what is tied, too


def test_a_module_of_torch_that_became_ours_stays_ours(tmp_path):
    small, fresh = PAIRS["of torch"]()
    result = round_trip(small, iss.accelerate(fresh), tmp_path)
    assert type(result.rnn) is iss.ISSLSTM
    assert same(answers(result), answers(iss.accelerate(small)))


@every_kind
def test_dtypes_are_those_of_the_file(kind, tmp_path):
    small = tagger(kind(5, [3, 4], 2), 4).bfloat16()
    result = round_trip(small, tagger(kind.of_torch(5, 8, 2), 8), tmp_path)
    assert {p.dtype for p in result.parameters()} == {torch.bfloat16}
    assert same(answers(result, X.bfloat16()), answers(small, X.bfloat16()))


def test_a_model_comes_back_in_another_process(tmp_path):
    code = """
import sys, safetensors.torch, torch, iss_kernels as iss
from torch import nn
class Model(nn.Module):
    def __init__(self, rnn, width):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, width), rnn
        self.head = nn.Linear(width, 9)
        self.head.weight = self.embed.weight
    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0])
path, what = sys.argv[1:]
x = torch.arange(8).view(4, 2)
if what == "save":
    model = Model(iss.ISSLSTM(4, [7, 4], num_layers=2), 4)
    iss.save(model, path)
else:
    model = iss.load(path, Model(nn.LSTM(8, 8, num_layers=2), 8))
    assert model.head.weight is model.embed.weight
with torch.no_grad():
    safetensors.torch.save_file({"y": model(x)}, f"{path}.{what}")
"""
    path = str(tmp_path / "m.safetensors")
    for what in ("save", "load"):
        subprocess.run([sys.executable, "-c", code, path, what], check=True)
    saved, loaded = (safetensors.torch.load_file(f"{path}.{what}") for what in ("save", "load"))
    assert torch.equal(saved["y"], loaded["y"])


def test_what_refers_to_a_tensor_or_module_goes_on_to_do_so(tmp_path):
    small, fresh = PAIRS["language model"]()
    weight, rnn, calls = fresh.embed.weight, fresh.rnn, []
    handle = rnn.register_forward_hook(lambda *_: calls.append(1))
    rnn.note, fresh.also = "kept", [rnn]
    fresh.eval()
    fresh.head.bias.requires_grad_(False)
    weight.grad = torch.zeros_like(weight)
    result = round_trip(small, fresh, tmp_path)
    assert result.embed.weight is weight is result.head.weight and weight.grad is None
    assert result.rnn is rnn is result.also[0] and type(rnn) is iss.ISSLSTM
    assert rnn.note == "kept" and not rnn.training and not result.head.bias.requires_grad
    answers(result)
    handle.remove()
    answers(result)
    assert calls == [1]


def test_what_shares_the_memory_of_a_tensor_goes_on_to_share_it(tmp_path):
    model, fresh = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model.running_mean = torch.randn(3)
    also = fresh.running_mean.view(3, 1)
    round_trip(model, fresh, tmp_path)
    assert torch.equal(also.flatten(), model.running_mean)


@pytest.mark.parametrize("inference", ["neither", "fresh", "load"])
def test_a_loaded_model_is_trained_as_the_saved_one(inference, tmp_path):
    small, _ = PAIRS["language model"]()
    with torch.inference_mode(inference == "fresh"):
        _, fresh = PAIRS["language model"]()
    with torch.inference_mode(inference == "load"):
        result = round_trip(small, fresh, tmp_path)
    for model in (small, result):
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    assert same(answers(result), answers(small))


@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["bidirectional", "GRU", "RHN", "one module"])
def test_a_prepared_model_comes_back_in_its_format(name, weights, tmp_path):
    small, fresh = PAIRS[name]()
    fast = iss.prepare(small, weights)
    result = round_trip(fast, fresh.eval(), tmp_path)
    assert same(answers(result), answers(fast)) and repr(result) == repr(fast)


def test_computed_weights_come_back_by_what_they_are_computed_from(tmp_path):
    def made() -> Net:
        net = tagger(nn.LSTM(5, 8), 8)
        parametrizations.weight_norm(net.rnn, "weight_hh_l0")
        parametrizations.spectral_norm(net.head)
        return net

    def pruned() -> Net:
        net = tagger(nn.LSTM(5, 8), 8)
        prune.random_unstructured(net.head, "weight", 0.5)
        return net

    def dropped() -> Net:
        """With a weight as a plain tensor, which a hook computes, and its source as a parameter."""
        net = tagger(nn.LSTM(5, 8), 8)
        source = net.rnn.weight_hh_l0
        del net.rnn._parameters["weight_hh_l0"]
        net.rnn.source = source
        net.rnn.weight_hh_l0 = source * 2

        def compute(rnn: Any, _: Any) -> None:
            rnn.weight_hh_l0 = rnn.source * 2

        net.rnn.register_forward_pre_hook(compute)
        return net

    for make in (made, pruned, dropped):
        model = make()
        answers(model)
        assert same(answers(round_trip(model, make(), tmp_path).eval()), answers(model.eval()))


def test_a_file_of_the_same_model_has_the_same_bytes(tmp_path):
    small, fresh = PAIRS["language model"]()
    path, again = tmp_path / "m", tmp_path / "again"
    iss.save(small, path)
    iss.save(iss.load(path, fresh), again)
    assert path.read_bytes() == again.read_bytes()


def test_tensors_are_stored_by_their_values(tmp_path):
    net = nn.Module()
    net.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    net.register_buffer("transposed", torch.randn(2, 3).t())
    net.register_buffer("expanded", torch.randn(1, 3).expand(2, 3))
    net.register_buffer("part", net.transposed[1:])
    net.register_buffer("empty", torch.zeros(0, 3))
    net.register_buffer("flags", torch.randn(3) > 0)
    fresh = nn.Module()
    for name, value in net.named_buffers():
        fresh.register_buffer(name, torch.zeros([1] * value.dim()))
    expected = list(net.buffers())
    assert same(list(round_trip(net, fresh, tmp_path).buffers()), expected)


def test_buffers_that_a_call_makes_need_not_be_there(tmp_path):
    model, fresh = PAIRS["LSTM"]()
    model.register_buffer("cache", torch.ones(3), persistent=False)
    fresh.register_buffer("other", torch.ones(2), persistent=False)
    result = round_trip(model, fresh, tmp_path)
    assert torch.equal(result.other, torch.ones(2)) and not hasattr(result, "cache")


# -------------------------------------------------------------------------------------------------
# States of the width before shrinking


def shrunken_tagger() -> Net:
    model = tagger(nn.LSTM(5, 8, 2), 8)
    keep = {"rnn.l0": [0, 2, 5]}
    return iss.shrink(model, iss.find_groups(model, X), keep=keep)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_loaded_model_cuts_states_of_the_width_before(prepared, device, tmp_path):
    small: Any = shrunken_tagger()
    if prepared:
        small = iss.prepare(small)
    with torch.device(device):
        fresh = tagger(nn.LSTM(5, 8, 2), 8)
    result: Any = round_trip(small, fresh, tmp_path)
    hx = torch.randn(2, 2, 2, 8).unbind(0)
    with torch.no_grad():
        assert same(tensors_in(result.rnn(X, hx)), tensors_in(small.rnn(X, hx)))
    for ours, theirs in zip(sum(result.rnn.kept, ()), sum(small.rnn.kept, ()), strict=True):
        assert torch.equal(ours.units, theirs.units) and ours.before == theirs.before == 8


def test_a_loaded_cell_cuts_states_of_the_width_before(tmp_path):
    small = iss.ISSGRUCell(5, 2)
    small.remember([[torch.tensor([True, False, True, False])]])
    result = round_trip(small, nn.GRUCell(5, 4), tmp_path)
    h = torch.randn(2, 4)
    assert torch.equal(result(X[0], h), small(X[0], h))


def test_a_model_forgets_what_the_saved_one_does_not_remember(tmp_path):
    loaded: Any = round_trip(tagger(iss.ISSLSTM(5, [3, 8], 2), 8), shrunken_tagger(), tmp_path)
    assert loaded.rnn.kept is None and loaded.rnn.hidden_size == [3, 8]


MASKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "none": lambda values, entry: values.pop("iss_kernels.kept.rnn"),
    "others": lambda values, entry: values["iss_kernels.kept.rnn"].logical_not_(),
    "numbers": lambda values, entry: values.update({"iss_kernels.kept.rnn": torch.zeros(32)}),
    "fewer": lambda values, entry: entry["before"].pop(),
    "text": lambda values, entry: entry.update(before="8"),
}


@pytest.mark.parametrize("name", MASKS)
def test_units_that_do_not_fit_the_sizes_are_refused(name, tmp_path):
    iss.save(shrunken_tagger(), tmp_path / "m")
    values = safetensors.torch.load_file(tmp_path / "m")
    changed(tmp_path / "m", lambda found: MASKS[name](values, found["modules"]["rnn"]), values)
    with pytest.raises(ValueError, match="^load: expected units of rnn that fit its sizes"):
        iss.load(tmp_path / "m", tagger(nn.LSTM(5, 8, 2), 8))


# -------------------------------------------------------------------------------------------------
# state_dict


def torchs_round_trip(model: nn.Module, tmp_path: Any) -> Any:
    torch.save(model.state_dict(), tmp_path / "m.pt")
    return torch.load(tmp_path / "m.pt", weights_only=True)


@every_pair
def test_a_state_dict_loads_into_a_model_that_load_made(name, tmp_path):
    small, fresh = PAIRS[name]()
    result = round_trip(small, fresh, tmp_path)
    for parameter in result.parameters():
        nn.init.zeros_(parameter)
    result.load_state_dict(torchs_round_trip(small, tmp_path))
    assert same(answers(result.eval()), answers(small.eval()))


def test_a_state_dict_loads_into_a_model_that_shrink_made(tmp_path):
    one, other = shrunken_tagger(), shrunken_tagger()
    other.load_state_dict(torchs_round_trip(one, tmp_path))
    assert same(answers(one), answers(other))


@pytest.mark.parametrize("name", [name for name in (*RNNS, *CELLS) if name != "as large"])
def test_a_state_dict_of_other_sizes_is_one_sentence_that_names_load(name):
    small, fresh = PAIRS[name]()
    fresh = iss.accelerate(fresh)
    with pytest.raises(RuntimeError, match="iss.load") as got:
        fresh.load_state_dict(small.state_dict(), strict=False)
    assert str(got.value).startswith("load_state_dict: expected ") and "\n" not in str(got.value)


def test_a_hook_may_change_a_state_dict_before_its_sizes_are_compared():
    lstm = iss.ISSLSTM(5, 3)

    def halved(module: Any, values: Any, prefix: str, *_: Any) -> None:
        for name in list(values):
            values[name] = values[name][:12]

    lstm.register_load_state_dict_pre_hook(halved)
    lstm.load_state_dict({n: torch.cat([v, v]) for n, v in lstm.state_dict().items()})


# -------------------------------------------------------------------------------------------------
# Errors


def with_a_further_layer(net: Any) -> None:
    net.rnn = nn.LSTM(5, 8, 2)


def with_other_code(net: Any) -> None:
    class Own(nn.LSTM):
        pass

    net.rnn = Own(5, 8)


def with_a_computed_weight(net: Any) -> None:
    parametrizations.weight_norm(net.rnn, "weight_hh_l0")


def without_a_tie(net: Any) -> None:
    net.rnn.bias_hh_l0 = net.rnn.bias_ih_l0


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layers": (with_a_further_layer, "rnn with num_layers=1, as in the file, got 2"),
    "no module": (lambda net: delattr(net, "rnn"), "rnn to be an nn.LSTM or ISSLSTM.*got none"),
    "kind": (lambda net: setattr(net, "rnn", nn.GRU(5, 8)), "an nn.LSTM or ISSLSTM.*got a GRU"),
    "batch_first": (
        lambda net: setattr(net, "rnn", nn.LSTM(5, 8, batch_first=True)),
        "batch_first=False, as in the file, got True",
    ),
    "projection": (
        lambda net: setattr(net, "rnn", nn.LSTM(5, 8, proj_size=2)),
        "proj_size=0, as in the file, got 2",
    ),
    "subclass": (with_other_code, "rnn to be an nn.LSTM or ISSLSTM itself, got a Own"),
    "parametrization": (with_a_computed_weight, "weight_hh_l0 computed by _WeightNorm"),
    "prepared": (
        lambda net: setattr(net, "rnn", iss.prepare(net.rnn)),
        "not prepared, got rnn as a PreparedLSTM; load first",
    ),
    "missing": (
        lambda net: setattr(net.head, "bias", None),
        "parameters and buffers of the file, got one without head.bias",
    ),
    "further": (
        lambda net: setattr(net, "tail", nn.BatchNorm1d(3)),
        "got one with a further tail.weight, tail.bias, tail.running_mean and 2 others",
    ),
    "tied": (without_a_tie, "one tensor under rnn.bias_ih_l0, as in the file, got one under"),
    "dimensions": (
        lambda net: setattr(net.head, "bias", nn.Parameter(torch.zeros(3, 1))),
        r"head.bias of a shape like \[3\], as in the file, got \[3, 1\]",
    ),
    "lazy": (
        lambda net: setattr(net, "head", nn.LazyLinear(3)),
        "head.weight to be a dense tensor, got one without a shape",
    ),
}


def state_of(model: nn.Module) -> Any:
    """What a change of the model would change."""
    dense = (t for t in model.state_dict().values() if not nn.parameter.is_lazy(t))
    modules = [(type(m), [*vars(m).items()], [*m._parameters.items()]) for m in model.modules()]
    return [(t.data_ptr(), t._version, t.shape) for t in dense], modules


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_structure_is_refused_and_left_as_it_is(name, tmp_path):
    change, message = OTHERS[name]
    small, fresh = PAIRS["LSTM"]()
    iss.save(small, tmp_path / "m")
    change(fresh)
    before = state_of(fresh)
    with pytest.raises(ValueError, match=f"^load: expected .*{message}"):
        iss.load(tmp_path / "m", fresh)
    assert before == state_of(fresh)


def test_a_recurrent_module_that_is_not_listed_keeps_its_sizes(tmp_path):
    class Own(nn.LSTM):
        pass

    small, fresh = tagger(Own(5, 3), 3), tagger(Own(5, 8), 8)
    assert same(answers(round_trip(small, tagger(Own(5, 3), 3), tmp_path)), answers(small))
    with pytest.raises(ValueError, match=r"weight_ih_l0 of shape \[12, 5\], which a Own cannot"):
        iss.load(tmp_path / "m.safetensors", fresh)


def test_a_kernel_keeps_its_size(tmp_path):
    iss.save(nn.Conv1d(2, 3, 5), tmp_path / "m")
    with pytest.raises(ValueError, match=r"weight of a shape like \[3, 2, 5\], as in the file"):
        iss.load(tmp_path / "m", nn.Conv1d(4, 4, 3))


def changed(path: Any, change: Callable[[dict[str, Any]], Any], values: Any = None) -> None:
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["iss_kernels"])
    values = safetensors.torch.load_file(path) if values is None else values
    change(found)
    safetensors.torch.save_file(values, path, {"iss_kernels": json.dumps(found)})


FILES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "a whole safetensors file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "a whole safetensors"),
    "pickle": (lambda path: torch.save({}, path), "a whole safetensors file"),
    "other": (
        lambda path: safetensors.torch.save_file({"a": torch.zeros(3)}, path),
        "a file that save wrote, got '.*' without its metadata",
    ),
    "newer": (
        lambda path: changed(path, lambda found: found.update(format=2, version="0.9", shared=7)),
        "a file of format 1, got '.*' of format 2, which iss_kernels 0.9 wrote",
    ),
    "no format": (lambda path: changed(path, lambda f: f.pop("format")), "metadata as save writes"),
    "no modules": (lambda path: changed(path, lambda f: f.pop("modules")), "metadata as save"),
    "text": (lambda path: changed(path, lambda f: f.update(modules="rnn")), "metadata as save"),
    "tied to nothing": (
        lambda path: changed(path, lambda f: f.update(shared=[["a", "b"]])),
        "metadata as save",
    ),
    "class": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"].update(kind="Popen")),
        "rnn of a class that this version has, got 'Popen'",
    ),
    "no class": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"].update(kind=[])),
        "metadata as save",
    ),
    "sizes": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"]["options"].update(hidden_size=-3)),
        "rnn of sizes that an ISSLSTM can have, got .*-3",
    ),
    "shapes": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"]["options"].update(hidden_size=4)),
        r"weight_ih_l0 of shape \[16, 5\], as the sizes of rnn say, got \[12, 5\]",
    ),
    "options": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"].update(options=[])),
        "metadata as save",
    ),
    "weights": (
        lambda path: changed(path, lambda f: f["modules"]["rnn"].update(weights="int3")),
        "metadata as save",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_save_did_not_write_is_refused(name, tmp_path):
    change, message = FILES[name]
    small, fresh = PAIRS["LSTM"]()
    iss.save(small, tmp_path / "m")
    change(tmp_path / "m")
    before = state_of(fresh)
    with pytest.raises(ValueError, match=f"^load: expected {message}"):
        iss.load(tmp_path / "m", fresh)
    assert before == state_of(fresh)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        iss.load(tmp_path / "m", nn.LSTM(3, 4))
    with pytest.raises(IsADirectoryError):
        iss.load(tmp_path, nn.LSTM(3, 4))
    with pytest.raises(FileNotFoundError):
        iss.save(nn.LSTM(3, 4), tmp_path / "none" / "m")
    for function in (lambda: iss.save({}, tmp_path / "m"), lambda: iss.load(tmp_path / "m", {})):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
            function()


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        pass


def with_parameter(value: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("value", value)
    return module


def with_a_list(held: Any) -> nn.Module:
    module = nn.Linear(2, 3)
    module.held = held  # type: ignore[assignment]
    return module


UNSAVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra state": (lambda: WithExtraState(2, 3), "parameters and buffers, got other state under"),
    "a list of modules": (
        lambda: with_a_list([nn.Linear(2, 3)]),
        "registers all parameters it holds .*got others in held.0",
    ),
    "a dict of parameters": (
        lambda: with_a_list({"a": nn.Parameter(torch.zeros(3))}),
        "registers all parameters it holds .*got others in held",
    ),
    "meta": (lambda: nn.LSTM(2, 3, device="meta"), "weight_ih_l0 with values.*the meta device"),
    "lazy": (lambda: nn.LazyLinear(3), "weight to be a dense tensor, got one without a shape"),
    "sparse": (lambda: with_parameter(torch.eye(3).to_sparse()), "value.*dense.*sparse_coo"),
    "complex": (lambda: with_parameter(torch.zeros(3).cdouble()), "value.*got torch.complex128"),
    "subclass": (
        lambda: with_parameter(torch.zeros(3).as_subclass(type("Own", (Tensor,), {}))),
        "value to be a dense tensor, got a Own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAVED)
def test_what_a_file_cannot_hold_is_refused(name, tmp_path):
    make, message = UNSAVED[name]
    with pytest.raises(ValueError, match=f"^save: expected .*{message}"):
        iss.save(make(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_module_of_other_sizes_than_its_parameters_is_refused(tmp_path):
    lstm = iss.ISSLSTM(5, 4)
    lstm.weight_ih_l0 = nn.Parameter(torch.zeros(12, 5))
    with pytest.raises(ValueError, match=r"rnn.weight_ih_l0 of shape \[16, 5\], as the sizes of"):
        iss.save(tagger(lstm, 4), tmp_path / "m")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    small, fresh = PAIRS["LSTM"]()
    path = tmp_path / "m"
    iss.save(small, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            iss.save(nn.LSTM(50, 60), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["m"]
    assert same(answers(iss.load(path, fresh)), answers(small))


def test_a_link_goes_on_to_lead_to_the_file(tmp_path):
    small, fresh = PAIRS["LSTM"]()
    iss.save(small, tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    iss.save(tagger(iss.ISSLSTM(5, 2), 2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert iss.load(tmp_path / "m", fresh).rnn.hidden_size == 2


class Options:
    """What several models are made with."""

    def __init__(self) -> None:
        self.hidden = 8


class Agent(nn.Module):
    """Lays its outputs out by the width that its options say."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.rnn, self.head = nn.GRU(4, options.hidden), nn.Linear(options.hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0].view(-1, self.options.hidden))
        return out


def test_options_that_another_model_holds_stay_as_they_are(tmp_path: Path) -> None:
    options, x = Options(), torch.randn(3, 2, 4)
    agent = Agent(options)
    small, _ = iss.shrink(agent, iss.find_groups(agent, x), ratio=0.5)
    iss.save(small, tmp_path / "small.safetensors")
    assert (small.options.hidden, options.hidden) == (4, 8)
    target = Agent(options)
    loaded = iss.load(tmp_path / "small.safetensors", Agent(options))
    assert (loaded.options.hidden, options.hidden) == (4, 8)
    torch.testing.assert_close(loaded(x), small(x))
    assert target(x).shape == (6, 2)
