# SPDX-License-Identifier: Apache-2.0
"""find_groups labels exactly what leaves with a unit, and refuses what it cannot follow."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from iss_kernels.find import find_groups
from iss_kernels.groups import GroupError
from iss_kernels.lstm import ISSLSTM

# nn.LSTM says this itself, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

X = torch.randn(6, 3, 5)  # [T, B, I]


class Net(nn.Module):
    """An LSTM of 4 units, a head, more modules, and a function of these and x as forward."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 4), nn.Linear(4, 2)
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def labels(model: nn.Module, inputs: Any = X) -> dict[str, tuple[list[int], list[int]]]:
    """{weight: (row units, column units)}."""
    groups = find_groups(model, inputs)
    return {w.name: (w.row_units.tolist(), w.column_units.tolist()) for w in groups.weights}


def test_the_labels_of_a_layer_are_gate_rows_recurrent_and_consumer_columns() -> None:
    assert labels(Net(lambda m, x: m.head(m.rnn(x)[0]))) == {
        "rnn.weight_ih_l0": ([0, 1, 2, 3] * 4, [-1] * 5),
        "rnn.weight_hh_l0": ([0, 1, 2, 3] * 4, [0, 1, 2, 3]),
        "head.weight": ([-1, -1], [0, 1, 2, 3]),
    }


def test_a_projection_has_cell_and_output_units() -> None:
    model = Net(
        lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(5, 3, proj_size=2), head=nn.Linear(2, 1)
    )
    assert labels(model) == {
        "rnn.weight_ih_l0": ([0, 1, 2] * 4, [-1] * 5),
        "rnn.weight_hh_l0": ([0, 1, 2] * 4, [3, 4]),
        "rnn.weight_hr_l0": ([3, 4], [0, 1, 2]),
        "head.weight": ([-1], [3, 4]),
    }


def test_layers_read_both_directions_of_the_layer_below() -> None:
    """The last layer reaches the model's output, so its units have no labels."""
    model = nn.LSTM(5, 2, num_layers=2, bidirectional=True)
    found = labels(model)
    assert found["weight_hh_l0_reverse"] == ([2, 3] * 4, [2, 3])
    assert found["weight_ih_l1"] == found["weight_ih_l1_reverse"] == ([-1] * 8, [0, 1, 2, 3])
    assert "weight_hh_l1" not in found
    assert [f.name for f in find_groups(model, X).families] == ["l0", "l0_reverse"]


def test_layers_of_unequal_sizes_are_labelled() -> None:
    rnn = ISSLSTM(5, [3, 2], 2)
    found = labels(Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=rnn, head=nn.Linear(2, 1)))
    assert found["rnn.weight_ih_l1"] == ([3, 4] * 4, [0, 1, 2])
    assert found["head.weight"] == ([-1], [3, 4])


UNITS = [0, 1, 2, 3]
# What the model does to y [T, B, 4], the width of the head that reads it, its column labels.
FOLLOWED: dict[str, tuple[Callable[[Tensor], Any], list[int]]] = {
    "last step": (lambda y: y[-1], UNITS),
    "steps at indices": (lambda y: y[torch.tensor([5, 2, 4]), torch.arange(3)], UNITS),
    "boolean mask": (lambda y: y[torch.ones(6, 3, dtype=torch.bool)], UNITS),
    "gather": (lambda y: y.gather(0, torch.zeros(1, 3, 4, dtype=torch.long)), UNITS),
    "one half": (lambda y: y.chunk(2, dim=-1)[1], [2, 3]),
    "slice": (lambda y: y[..., 1:3], [1, 2]),
    "flip": (lambda y: y.flip(-1), [3, 2, 1, 0]),
    "view": (lambda y: y.contiguous().view(-1, y.size(-1)), UNITS),
    "reshape": (lambda y: y.permute(1, 2, 0).transpose(1, 2).reshape(3, 2, -1), UNITS * 3),
    "steps": (lambda y: torch.stack([step for step in y], 1), UNITS),
    "unbind and cat": (lambda y: torch.cat(y.unbind(0)[:2], -1), UNITS * 2),
    "cat with other": (lambda y: torch.cat([X, y], -1), [-1] * 5 + UNITS),
    "elementwise": (lambda y: F.gelu(F.dropout(y.relu_() * 2 - 1)), UNITS),
    "dtype": (lambda y: y.double().to(X).type_as(X), UNITS),
    "residual of itself": (lambda y: y + y.tanh(), UNITS),
    "in place": (lambda y: y.mul_(0.5).add_(1), UNITS),
    "mask": (lambda y: y.masked_fill(X[..., :1] > 0, 0) * X[..., :1], UNITS),
    "expanded mask": (lambda y: y * X[..., :1].expand_as(y), UNITS),
    "attention pooling": (lambda y: (y * X[..., :1].softmax(0)).sum(0), UNITS),
    "mean": (lambda y: y.mean(0), UNITS),
    "max": (lambda y: y.max(dim=0, keepdim=True).values, UNITS),
    "data": (lambda y: y.data.clone().detach(), UNITS),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_functions_are_followed(name: str) -> None:
    run, columns = FOLLOWED[name]
    model = Net(lambda m, x: m.head(run(m.rnn(x)[0])), head=nn.Linear(len(columns), 2))
    assert labels(model)["head.weight"][1] == columns


def test_packed_sequences_are_followed() -> None:
    def run(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        middle, _ = pad_packed_sequence(m.rnn(packed)[0])
        y, (h_n, _) = m.top(pack_padded_sequence(middle, lengths, enforce_sorted=False))
        return m.head(y.data), m.last(h_n[-1])

    model = Net(run, top=nn.LSTM(4, 4), last=nn.Linear(4, 1))
    found = labels(model, (X, torch.tensor([2, 6, 3])))
    assert found["top.weight_ih_l0"][1] == [0, 1, 2, 3]
    assert found["head.weight"][1] == found["last.weight"][1] == [4, 5, 6, 7]
    packed = pack_sequence([X[:, 0], X[:2, 1]])
    assert [f.name for f in find_groups(nn.LSTM(5, 4, 2), packed).families] == ["l0"]


def test_final_states_are_followed_but_may_be_returned() -> None:
    def run(m: Any, x: Tensor, hx: Any = None) -> Any:
        _, (h_n, c_n) = m.rnn(x, hx)
        return m.head(h_n[-1]), h_n, c_n.detach()

    states = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    for inputs in (X, (X, states), {"x": X, "hx": states}):
        assert labels(Net(run), inputs)["head.weight"][1] == UNITS


def test_a_family_that_reaches_the_output_is_left_out() -> None:
    model = Net(
        lambda m, x: {"y": (y := m.rnn(x)[0])[0], "z": m.head(m.top(y)[0])}, top=nn.LSTM(4, 4)
    )
    groups = find_groups(model, X)
    assert [(f.name, f.lstm, list(f.units)) for f in groups.families] == [("top.l0", "top", UNITS)]
    assert labels(model)["top.weight_ih_l0"][1] == [-1] * 4


def test_a_moved_final_state_is_an_answer() -> None:
    """An embedding of the sequence must keep its size, unlike a state to be passed in again."""
    with pytest.raises(GroupError, match="are the model's own"):
        find_groups(Net(lambda m, x: m.rnn(x)[1][0][-1]), X)


def test_states_read_as_one_tensor_tie_their_families() -> None:
    rnn = nn.LSTM(5, 4, 2, proj_size=2)
    read = Net(lambda m, x: m.head(m.rnn(x)[1][0][-1]), rnn=rnn, head=nn.Linear(2, 1))
    not_read = Net(lambda m, x: (m.head((r := m.rnn(x))[0]), r[1]), rnn=rnn, head=nn.Linear(2, 1))
    assert find_groups(read, X).tied == [
        ["rnn.l0.cell", "rnn.l1.cell"],
        ["rnn.l0.output", "rnn.l1.output"],
    ]
    assert find_groups(not_read, X).tied == []


def test_states_that_are_apart_stay_apart() -> None:
    """If sizes became equal, h_n would be one tensor and the model's code would read it wrongly."""
    model = Net(
        lambda m, x: m.top(m.head(m.rnn(x)[1][0][-1]))[0][..., :1] * m.last(m.again(x)[0]).sum(),
        rnn=ISSLSTM(5, [3, 4], 2),
        top=nn.LSTM(2, 2),
        again=nn.LSTM(5, 4),
        last=nn.Linear(4, 1),
    )
    assert [family.name for family in find_groups(model, X).families] == ["again.l0"]


class Answer:
    """What a model may return, with a tensor inside."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


CONST = torch.ones(2, 4)
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "normalisation": (
        lambda m, y: m.head(F.layer_norm(y, (4,))),
        "rnn.l0 through layer_norm: no rule says what happens to its units there",
    ),
    "matrix product": (
        lambda m, y: y @ CONST.T,
        "rnn.l0 through matmul: no rule says what happens to its units there",
    ),
    "reading values": (
        lambda m, y: y.tolist(),
        "rnn.l0 through tolist: no rule says what happens to its units there",
    ),
    "writing into another tensor": (
        lambda m, y: m.head(torch.zeros(6, 3, 4).copy_(y)),
        "rnn.l0 through copy_: no rule says what happens to its units there",
    ),
    "writing into a slice": (
        lambda m, y: torch.zeros(3, 4).__setitem__(slice(None), y[0]),
        "rnn.l0 through __setitem__: no rule says what happens to its units there",
    ),
    "adding to another tensor": (
        lambda m, y: torch.zeros(6, 3, 4).add_(y),
        "rnn.l0 through add_: no rule says what happens to its units there",
    ),
    "out argument": (
        lambda m, y: torch.tanh(y, out=torch.empty(0)),
        "rnn.l0 through tanh: no rule says what happens to its units there",
    ),
    "other bits": (
        lambda m, y: y.view(torch.int16),
        "rnn.l0 through view: no rule says what happens to its units there",
    ),
    "sum of two LSTMs": (
        lambda m, y: m.head(y + m.top(X)[0]),
        "rnn.l0, top.l0 through add: it mixes different units",
    ),
    "residual": (
        lambda m, y: m.head(y + X[..., :4]),
        "rnn.l0 through add: it mixes its units with elements that do not leave with them",
    ),
    "reduction": (
        lambda m, y: y.mean(-1),
        "rnn.l0 through mean: it reduces over the units",
    ),
    "full reduction": (
        lambda m, y: y.sum(),
        "rnn.l0 through sum: it reduces over the units",
    ),
    "units in rows": (
        lambda m, y: m.head(y[:4, 0].T),
        "rnn.l0 through linear: its units are not in the last dimension alone",
    ),
    "computed weight": (
        lambda m, y: F.linear(y, m.head.weight * 2),
        "rnn.l0 through linear: its weight is not a parameter of the model",
    ),
    "weight with two labellings": (
        lambda m, y: m.head(y) + m.head(y.flip(-1)),
        "rnn.l0 through linear: head.weight is used twice and reads other units",
    ),
    "weight with and without units": (
        lambda m, y: m.head(y) + m.head(X[..., :4]),
        "rnn.l0 through linear: head.weight is used twice and reads other units",
    ),
    "weight of the LSTM": (
        lambda m, y: m.head(y) + m.rnn.weight_hh_l0.sum(),
        "rnn.l0 through sum: it uses rnn.weight_hh_l0, which leaves in part",
    ),
    "tied embedding": (
        lambda m, y: m.head(y) + F.embedding(torch.tensor(0), m.head.weight).sum(),
        "rnn.l0 through embedding: it uses head.weight, which leaves in part",
    ),
    "initial state from another": (
        lambda m, y: m.head(m.top(X, m.rnn(X)[1])[0]),
        "rnn.l0 through top: it is an initial state there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_and_changes_nothing(name: str) -> None:
    run, message = REFUSED[name]
    model = Net(lambda m, x: run(m, m.rnn(x)[0]), top=nn.LSTM(5, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == f"find_groups: cannot follow the output of {message}"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(5, 2), "expected a model with an nn.LSTM or ISSLSTM, found none"),
        (
            nn.LSTM(5, 4),
            "expected units that can leave, but the outputs of l0 are the model's own or not "
            "computed",
        ),
        (
            Net(lambda m, x: Answer(m.rnn(x)[0])),
            "expected units that can leave, but the outputs of rnn.l0 are the model's own or not "
            "computed",
        ),
        (
            Net(lambda m, x: m.rnn(x, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))),
            "expected the initial state of rnn from the model's inputs or none (zeros), got one "
            "made inside, whose size cannot follow",
        ),
    ],
)
def test_models_without_removable_units_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == f"find_groups: {message}"


def test_a_path_that_no_torch_function_shows_is_noticed() -> None:
    for rnn in (nn.LSTM(5, 6), nn.LSTM(5, 6, proj_size=4)):
        width = 6 if rnn.proj_size == 0 else 4
        model = Net(lambda m, x: torch.vmap(m.head)(m.rnn(x)[0]), rnn=rnn, head=nn.Linear(width, 2))
        with pytest.raises(GroupError, match="reaches the model's answers in a way that no torch"):
            find_groups(model, X)


def test_compiled_models_are_refused() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]))
    model.head._orig_mod = nn.Identity()  # what torch.compile leaves; importing it takes seconds
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == (
        "find_groups: expected a model that is neither scripted nor compiled, but head is"
    )


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = Net(
        lambda m, x: m.head(m.rnn(m.norm(x.transpose(1, 2)).transpose(1, 2))[0]),
        norm=nn.BatchNorm1d(5),
    )
    seen: list[Any] = []
    model.rnn.register_forward_hook(lambda *_: seen.append(torch.rand(1)))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    groups = find_groups(model, X)
    assert groups.model is model and model.training and len(seen) == 3
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_hook_of_the_user_is_followed() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]))
    model.rnn.register_forward_hook(lambda m, args, out: (out[0].flip(-1), out[1]))
    assert labels(model)["head.weight"][1] == [3, 2, 1, 0]


def test_dead_units_are_those_whose_outgoing_weights_are_zero() -> None:
    model = Net(lambda m, x: (m.head(y := m.rnn(x)[0]), m.other(y)), other=nn.Linear(4, 1))
    groups = find_groups(model, X)
    with torch.no_grad():
        model.rnn.weight_hh_l0[:, [0, 1, 2]] = 0
        model.head.weight[:, [0, 1, 3]] = 0
        model.other.weight[:, [0, 2, 3]] = 0
    assert groups.dead()["rnn.l0"].tolist() == [True, False, False, False]


def test_groups_follow_a_model_that_is_loaded_or_moved() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]))
    groups = find_groups(model, X)
    model.double().load_state_dict({k: v.double() + 1 for k, v in model.state_dict().items()})
    model.head.weight = nn.Parameter(torch.zeros(2, 4))
    assert groups.parameters()[-1] is model.head.weight
    copied = copy.deepcopy(groups)
    assert copied.parameters()[-1] is copied.model.head.weight is not model.head.weight


def test_groups_print_as_a_table() -> None:
    model = Net(lambda m, x: m.head(m.top(m.rnn(x)[0])[0]), top=nn.LSTM(4, 4))
    assert str(find_groups(model, X)).splitlines() == [
        "family  units  read by",
        "rnn.l0      4  rnn.weight_hh_l0, top.weight_ih_l0",
        "top.l0      4  head.weight, top.weight_hh_l0",
    ]


def test_zeroed_units_are_dead_and_the_others_are_not_touched() -> None:
    model = Net(
        lambda m, x: m.head(m.rnn(x)[0]),
        rnn=nn.LSTM(5, 4, num_layers=2, bidirectional=True),
        head=nn.Linear(8, 2),
    )
    groups = find_groups(model, X)
    chosen = {"rnn.l0": torch.tensor([True, False, False, True])}
    groups.zero_units_(chosen)
    for name, dead in groups.dead().items():
        assert dead.tolist() == chosen.get(name, torch.zeros(4, dtype=torch.bool)).tolist()
    recurrent = model.rnn.weight_hh_l0.unflatten(0, (4, 4)) != 0
    alive = ~chosen["rnn.l0"]
    assert torch.equal(recurrent, (alive[:, None] & alive[None, :]).expand(4, 4, 4))
    assert bool(model.rnn.bias_hh_l0.all())


@pytest.mark.parametrize(
    ("units", "got"),
    [
        ({"lstm.l7": torch.ones(4, dtype=torch.bool)}, "lstm.l7 [4] torch.bool"),
        ({"l0": torch.ones(5, dtype=torch.bool)}, "l0 [5] torch.bool"),
        ({"l0": torch.ones(4)}, "l0 [4] torch.float32"),
    ],
)
def test_units_to_zero_that_are_not_there_are_one_error_and_change_nothing(
    units: dict[str, Tensor], got: str
) -> None:
    model = nn.LSTM(5, 4, num_layers=2)
    groups = find_groups(model, X)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        groups.zero_units_(units)
    assert str(error.value) == f"zero_units_: expected bool masks for l0 [4], got {got}"
    assert all(map(torch.equal, before, model.parameters()))
