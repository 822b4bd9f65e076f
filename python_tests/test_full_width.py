# SPDX-License-Identifier: Apache-2.0
"""Modules that get smaller inside and keep the width of their outputs and states."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import iss_kernels as iss
from iss_kernels import use_backend

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))  # [T, B, I]
GONE = [1, 4, 5]


class Model(nn.Module):
    """A recurrent module whose outputs are read all at once."""

    def __init__(self, rnn: Any, run: Callable[..., Any] | None = None, width: int = 8) -> None:
        super().__init__()
        self.rnn, self.run = rnn, run
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, *args: Any) -> Any:
        if self.run is not None:
            return self.run(self, *args)
        return self.out(self.norm(self.rnn(*args)[0]))


def halved(model: nn.Module, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model without some of its units, and with these units dead."""
    whole = copy.deepcopy(model).eval()
    groups = iss.find_groups(whole, args, **options)
    assert groups.families
    masks = {f.name: torch.zeros(f.size, dtype=torch.bool) for f in groups.families}
    for mask in masks.values():
        mask[[unit for unit in GONE if unit < len(mask)]] = True
    groups.zero_units_(masks)
    small, report = iss.shrink(whole, groups)
    assert report.parameters[1] < report.parameters[0]
    return small.eval(), whole


def same(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


RECURRENT: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(5, 8),
    "gru": lambda: nn.GRU(5, 8),
    "tanh": lambda: nn.RNN(5, 8),
    "relu": lambda: nn.RNN(5, 8, nonlinearity="relu"),
    "no bias": lambda: nn.GRU(5, 8, bias=False),
    "layers": lambda: nn.LSTM(5, 8, num_layers=3),
    "directions": lambda: nn.GRU(5, 4, num_layers=2, bidirectional=True),
    "projection": lambda: nn.LSTM(5, 12, proj_size=8),
    "highway": lambda: iss.ISSRHN(5, 8, depth=3),
    "highway with carry": lambda: iss.ISSRHN(5, 8, depth=2, carry="separate"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_layer_norm_over_a_shrunken_module_is_exact(name: str) -> None:
    torch.manual_seed(0)
    model = Model(RECURRENT[name]())
    small, whole = halved(model, X)
    same(small(X), whole(X))
    assert small.rnn(X)[0].shape == (6, 3, 8)
    assert small.rnn.full_width
    with use_backend("reference"):
        same(small(X), whole(X))
    assert iss.find_groups(small, X).full_width == {"rnn": "units have left it before"}
    smaller, whole = halved(small, X)
    same(smaller(X), whole(X))
    assert smaller.rnn(X)[0].shape == (6, 3, 8)


@pytest.mark.parametrize("name", RECURRENT)
def test_full_width_may_begin_after_units_have_left(name: str) -> None:
    """The width outside is then that of the module as it is, not that of the first one."""
    torch.manual_seed(0)
    model = Model(RECURRENT[name](), lambda m, x: m.out(m.norm(m.rnn(x)[0])))
    model.norm = nn.Identity()
    groups = iss.find_groups(model, X)
    small, _ = iss.shrink(
        model, groups, keep={f.name: range(1, f.size, 2) for f in groups.families}
    )
    width = small.out.in_features
    assert width == 4 and not small.rnn.full_width
    small.norm = nn.LayerNorm(width)
    same(iss.shrink(small.eval(), iss.find_groups(small, X))[0](X), small(X))
    smaller, whole = halved(small, X)
    assert smaller.rnn.full_width and smaller.rnn(X)[0].size(-1) == width
    same(smaller(X), whole(X))
    again, _ = iss.shrink(smaller, iss.find_groups(smaller, X))
    same(again(X), smaller(X))


@pytest.mark.parametrize("name", ["lstm", "gru", "layers", "directions", "projection", "highway"])
def test_states_have_the_width_too_and_go_in_again(name: str) -> None:
    def run(m: Any, x: Tensor) -> Any:
        y, state = m.rnn(x[:3])
        return m.out(m.norm(y)), m.out(m.norm(m.rnn(x[3:], state)[0])), state

    torch.manual_seed(0)
    small, whole = halved(Model(RECURRENT[name](), run), X)
    same(small(X), whole(X))
    smaller, whole = halved(small, X)
    same(smaller(X), whole(X))


def test_inner_layers_are_dead_by_their_outgoing_weights_where_no_state_is_read() -> None:
    groups = iss.find_groups(Model(nn.LSTM(5, 8, num_layers=2)), X)
    assert groups.by_value is not None
    assert groups.by_value.tolist() == [False] * 8 + [True] * 8
    biases = [w.name for w in groups.weights if len(w.units) == 1]
    assert biases == ["rnn.bias_ih_l1", "rnn.bias_hh_l1"]
    read = Model(
        nn.LSTM(5, 8, num_layers=2), lambda m, x: m.out(m.norm((r := m.rnn(x))[0] + r[1][0].sum(0)))
    )
    groups = iss.find_groups(read, X)
    assert groups.by_value is not None
    assert bool(groups.by_value.all())


def test_the_lasso_takes_biases_to_zero_and_the_target_counts_them_once() -> None:
    model = Model(nn.LSTM(5, 8))
    groups = iss.find_groups(model, X)
    lasso = iss.GroupLasso(groups, 1.0)
    norms = lasso.norms()["rnn.l0"]
    model.rnn.bias_ih_l0.data.add_(1)
    assert bool((lasso.norms()["rnn.l0"] > norms).all())
    lasso().backward()
    gradient = model.rnn.bias_ih_l0.grad.clone()
    model.zero_grad()
    lasso.add_gradients_()
    same(model.rnn.bias_ih_l0.grad, gradient)
    lasso.proximal_(1e6)
    assert bool(groups.dead()["rnn.l0"].all())
    small, report = iss.shrink(model, groups, budget={"multiply-adds": 300})
    assert sum(p.numel() for n, p in small.rnn.named_parameters() if "weight" in n) <= 300


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(kind: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        state, rows = None, []
        for step in x:
            state = m.rnn(step, state)
            rows.append(m.norm(state[0] if isinstance(state, tuple) else state))
        return m.out(torch.stack(rows))

    torch.manual_seed(0)
    small, whole = halved(Model(kind(5, 8), run), X)
    same(small(X), whole(X))
    smaller, whole = halved(small, X)
    same(smaller(X), whole(X))
    state = small.rnn(X[0, 0])
    assert (state[0] if isinstance(state, tuple) else state).shape == (8,)


def test_an_encoder_hands_its_state_to_a_decoder_of_full_width() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        memory, (h, c) = m.encoder(x)
        zeros = torch.zeros(1, 3, 8)
        y, _ = m.rnn(x, (h + zeros, c))
        return m.out(m.norm(y) + m.norm(memory).sum(0))

    torch.manual_seed(0)
    model = Model(nn.LSTM(5, 8), run)
    model.encoder = nn.LSTM(5, 8)
    groups = iss.find_groups(model, X)
    assert [f.members for f in groups.families] == [("encoder.l0", "rnn.l0")] or [
        f.members for f in groups.families
    ] == [("rnn.l0", "encoder.l0")]
    small, whole = halved(model, X)
    same(small(X), whole(X))


def test_an_encoder_is_free_where_its_decoder_is_not() -> None:
    """The decoder's code asks for a class that a shrunken module does not have."""

    def run(m: Any, x: Tensor) -> Tensor:
        memory, state = m.encoder(x)
        y, _ = m.rnn(x, state if isinstance(m.rnn, nn.LSTM) else state[0])
        return m.out(m.norm(y) + m.norm(memory).sum(0))

    torch.manual_seed(0)
    model = Model(nn.LSTM(5, 8), run)
    model.encoder = nn.LSTM(5, 8)
    groups = iss.find_groups(model, X)
    assert [family.name for family in groups.families] == ["encoder.l0"]
    assert list(groups.full_width) == ["encoder"]
    assert list(groups.kept_whole) == ["rnn.l0"]
    small, whole = halved(model, X)
    same(small(X), whole(X))


# A width in the code, and the states that it makes.
STATES: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "zeros": (lambda m, x: torch.zeros(1, 3, 8), True),
    "new_zeros": (lambda m, x: x.new_zeros(1, 3, 8), True),
    "ones": (lambda m, x: torch.ones(1, 3, 8), False),
    "random": (lambda m, x: torch.randn(1, 3, 8), False),
    "of the input": (lambda m, x: m.first(x[:1]), True),  # its rows leave along
    "sigmoid": (lambda m, x: m.first(x[:1]).sigmoid(), False),
    "learned": (lambda m, x: m.h_0.expand(1, 3, -1), True),
    "data": (lambda m, x: x.mean(0, keepdim=True).repeat(1, 1, 2)[..., :8], False),
    "data that is zero here": (lambda m, x: (x * 0).repeat(1, 1, 2)[:1, :, :8], False),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_unit_that_does_not_begin_at_zero_stays(name: str) -> None:
    state, leaves = STATES[name]
    model = Model(nn.GRU(5, 8), lambda m, x: m.out(m.norm(m.rnn(x, state(m, x))[0].view(-1, 8))))
    model.first, model.h_0 = nn.Linear(5, 8), nn.Parameter(torch.randn(8))
    groups = iss.find_groups(model, X, on_unknown="keep")
    assert list(groups.kept_whole) == ([] if leaves else ["rnn.l0"])
    if leaves:
        small, whole = halved(model, X)
        same(small(X), whole(X))
    else:  # not for what another width would do away with
        assert "nor can they leave inside a layer that keeps its" in groups.kept_whole["rnn.l0"]


def test_h_0_of_an_lstm_may_be_anything() -> None:
    """Its c carries a state on, which h_0 reaches through weights alone."""

    def run(m: Any, x: Tensor) -> Tensor:
        state = x.mean(0, keepdim=True).repeat(1, 1, 2)[..., :8], torch.zeros(1, 3, 8)
        return m.out(m.norm(m.rnn(x, state)[0]))

    small, whole = halved(Model(nn.LSTM(5, 8), run), X)
    same(small(X), whole(X))


@pytest.mark.parametrize("kind", [iss.ISSGRU, iss.ISSLSTM, iss.ISSGRUCell, iss.ISSLSTMCell])
def test_a_state_that_is_not_zero_where_units_left_is_an_error(kind: Any) -> None:
    module = kind(5, 2)
    count = len(module.cell.states)
    module.remember([[torch.tensor([True, False, True])] * count])
    module.full_width = True
    x, shape = (X[0], (3, 3)) if "Cell" in kind.__name__ else (X, (1, 3, 3))
    state = torch.zeros(shape)
    module(x, (state, state) if count > 1 else state)
    state[..., 1] = 1
    with pytest.raises(ValueError, match="_0 to be zero in the places of the units that have left"):
        module(x, (state, state) if count > 1 else state)


def test_other_inputs_saving_pickles_and_training() -> None:
    torch.manual_seed(0)

    def run(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = pad_packed_sequence(m.rnn(pack_padded_sequence(x, lengths))[0])
        return m.out(m.norm(y))

    lengths = torch.tensor([6, 4, 1])
    model = Model(nn.LSTM(5, 4, 2, bidirectional=True), run)
    small, whole = halved(model, X, lengths)
    same(small(X, lengths), whole(X, lengths))
    small.train()(X, lengths).sum().backward()
    assert small.rnn.weight_ih_l0.grad is not None
    rnn = small.rnn.eval()
    same(rnn(X[:, 0])[0], rnn(X[:, :1])[0][:, 0])
    same(pickle.loads(pickle.dumps(rnn))(X), rnn(X))
    same(copy.deepcopy(rnn).double()(X.double())[0].float(), rnn(X)[0])
    with pytest.raises(ValueError, match="to_torch: expected an ISSLSTM whose outputs have"):
        rnn.to_torch()


@pytest.mark.parametrize("weights", ["", "float32", "int8"])
def test_it_is_saved_and_loaded(tmp_path: Path, weights: str) -> None:
    torch.manual_seed(0)
    small, _ = halved(Model(nn.LSTM(5, 8)), X)
    saved = iss.prepare(small, weights) if weights else small
    with torch.no_grad():
        same(saved(X), small(X)) if weights != "int8" else None
        iss.save(saved, tmp_path / "small.safetensors")
        fresh = iss.load(tmp_path / "small.safetensors", Model(nn.LSTM(5, 8))).eval()
        assert torch.equal(fresh(X), saved(X))


def test_a_stream_of_full_width_needs_an_example() -> None:
    torch.manual_seed(0)
    small, _ = halved(Model(nn.LSTM(5, 8)), X)
    with pytest.raises(
        ValueError, match="expected an example of the input of a model whose layers"
    ):
        iss.Stream(small, 3)
    step = iss.Stream(small, 3, X)
    with torch.no_grad():
        same(torch.stack([step(x).clone() for x in X]), small(X))
        step.reset(rows=[True, False, False])
        same(step(X[0])[0], small(X[:1])[0, 0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_and_trace(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    small, _ = halved(Model(nn.GRU(5, 4, bidirectional=True)), X)
    path = str(tmp_path / "small.onnx")
    iss.export_onnx(small, X, path)
    session = onnxruntime.InferenceSession(path)
    longer = torch.cat([X, X])
    (got,) = session.run(None, {session.get_inputs()[0].name: longer.numpy()})
    with torch.no_grad():
        same(torch.from_numpy(got), small(longer))
        same(torch.jit.trace(small, X)(longer), small(longer))
