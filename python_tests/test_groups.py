# SPDX-License-Identifier: Apache-2.0
"""find_groups labels exactly what leaves with a unit, and refuses what it cannot follow."""

import contextlib
import copy
import dataclasses
import gc
import math
import random
import re
import weakref
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from iss_kernels import reference
from iss_kernels.backend import use_backend
from iss_kernels.cells import CELLS, Cell
from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import GroupError, kinds
from iss_kernels.gru import ISSGRU
from iss_kernels.lstm import ISSLSTM
from iss_kernels.recurrent import MODULES, Recurrent
from iss_kernels.rnn import ISSRNN
from iss_kernels.shrink import shrink, shrink_
from iss_kernels.tracer import LIBRARIES

# nn.LSTM says this itself, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

X = torch.randn(6, 3, 5)  # [T, B, I]

# {class: rows of w_ih and of w_hh for each unit}, torch's and our own.
TORCH: dict[Any, int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
OWN: dict[Any, int] = {ISSLSTM: 4, ISSGRU: 3, ISSRNN: 1}


def h_n(states: Any) -> Any:
    """The final h, of which an LSTM's final states are a pair."""
    return states[0] if len(states) == 2 and not isinstance(states, Tensor) else states


class Net(nn.Module):
    """An LSTM of 4 units, a head, other modules, and a function of these and x as forward."""

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


@pytest.mark.parametrize("kind", TORCH | OWN)
def test_the_labels_of_a_layer_are_gate_rows_recurrent_and_consumer_columns(kind: Any) -> None:
    gates = (TORCH | OWN)[kind]
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=kind(5, 4))
    assert labels(model) == {
        "rnn.weight_ih_l0": ([0, 1, 2, 3] * gates, [-1] * 5),
        "rnn.weight_hh_l0": ([0, 1, 2, 3] * gates, [0, 1, 2, 3]),
        "head.weight": ([-1, -1], [0, 1, 2, 3]),
    }
    vectors = find_groups(model, X).vectors
    assert {vector.name: vector.row_units.tolist() for vector in vectors} == {
        "rnn.bias_ih_l0": [0, 1, 2, 3] * gates,
        "rnn.bias_hh_l0": [0, 1, 2, 3] * gates,
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


@pytest.mark.parametrize("kind", TORCH)
def test_layers_read_both_directions_of_the_layer_below(kind: Any) -> None:
    """The last layer reaches the model's output, so its units have no labels."""
    model, gates = kind(5, 2, num_layers=2, bidirectional=True), TORCH[kind]
    found = labels(model)
    assert found["weight_hh_l0_reverse"] == ([2, 3] * gates, [2, 3])
    assert found["weight_ih_l1"] == ([-1] * 2 * gates, [0, 1, 2, 3])
    assert found["weight_ih_l1_reverse"] == found["weight_ih_l1"]
    assert "weight_hh_l1" not in found
    assert [f.name for f in find_groups(model, X).families] == ["l0", "l0_reverse"]


@pytest.mark.parametrize("kind", OWN)
def test_layers_of_unequal_sizes_are_labelled(kind: Any) -> None:
    rnn = kind(5, [3, 2], 2)
    found = labels(Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=rnn, head=nn.Linear(2, 1)))
    assert found["rnn.weight_ih_l1"] == ([3, 4] * OWN[kind], [0, 1, 2])
    assert found["head.weight"] == ([-1], [3, 4])


def test_modules_of_different_kinds_read_each_other() -> None:
    model = Net(
        lambda m, x: m.head(m.fourth(m.third(m.second(m.rnn(x)[0])[0])[0])[0]),
        rnn=nn.GRU(5, 2),
        second=nn.LSTM(2, 3, proj_size=2),
        third=ISSRNN(2, [(1, 2)], bidirectional=True),
        fourth=ISSGRU(3, 2),
        head=nn.Linear(2, 1),
    )
    found = labels(model)
    assert found["second.weight_ih_l0"] == ([2, 3, 4] * 4, [0, 1])
    assert found["third.weight_ih_l0"] == ([7], [5, 6])
    assert found["third.weight_hh_l0_reverse"] == ([8, 9], [8, 9])
    assert found["fourth.weight_ih_l0"] == ([10, 11] * 3, [7, 8, 9])
    assert found["head.weight"] == ([-1], [10, 11])


UNITS = [0, 1, 2, 3]
# What the model does to y [T, B, 4], the width of the head that reads it, its column labels.
FOLLOWED: dict[str, tuple[Callable[[Tensor], Any], list[int]]] = {
    "last step": (lambda y: y[-1], UNITS),
    "steps at indices": (lambda y: y[torch.tensor([5, 2, 4]), torch.arange(3)], UNITS),
    "boolean mask": (lambda y: y[torch.ones(6, 3, dtype=torch.bool)], UNITS),
    "gather": (
        lambda y: y.gather(0, torch.zeros(1, 3, 1, dtype=torch.long).expand(1, 3, y.size(-1))),
        UNITS,
    ),
    "repeat": (lambda y: y.repeat(1, 1, 2), UNITS * 2),
    "flip": (lambda y: y.flip(-1), [3, 2, 1, 0]),
    "view": (lambda y: y.contiguous().view(-1, y.size(-1)), UNITS),
    "contiguous": (
        lambda y: torch.cat([y, y], 2).transpose(0, 1).contiguous().view(18, -1),
        UNITS * 2,
    ),
    "in a constant layout": (lambda y: (y[:1].expand(6, 3, -1) * 2).view(18, -1), UNITS),
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


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, ISSGRU, ISSRNN])
def test_a_final_state_that_is_a_tensor_is_followed_but_may_be_returned(kind: Any) -> None:
    def run(m: Any, x: Tensor, h: Any = None) -> Any:
        _, h = m.rnn(x, h)
        return m.head(h[-1]), h.detach()

    for inputs in (X, (X, torch.zeros(1, 3, 4)), {"x": X, "h": torch.zeros(1, 3, 4)}):
        assert labels(Net(run, rnn=kind(5, 4)), inputs)["head.weight"][1] == UNITS


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
    families = [(f.name, f.module, list(f.units)) for f in groups.families]
    assert families == [("top.l0", "top", UNITS)]
    assert labels(model)["top.weight_ih_l0"][1] == [-1] * 4


@pytest.mark.parametrize("kind", TORCH)
def test_a_moved_final_state_is_an_answer(kind: Any) -> None:
    """An embedding of the sequence must keep its size, unlike a state to be passed in again."""
    with pytest.raises(GroupError, match="its outputs are the model's own"):
        find_groups(Net(lambda m, x: h_n(m.rnn(x)[1])[-1], rnn=kind(5, 4)), X)


def test_states_read_as_one_tensor_tie_their_families() -> None:
    rnn = nn.LSTM(5, 4, 2, proj_size=2)
    read = Net(
        lambda m, x: m.head(m.rnn(x)[1][0].transpose(0, 1)[:, -1]), rnn=rnn, head=nn.Linear(2, 1)
    )
    last = Net(lambda m, x: m.head(m.rnn(x)[1][0][-1]), rnn=rnn, head=nn.Linear(2, 1))
    not_read = Net(lambda m, x: (m.head((r := m.rnn(x))[0]), r[1]), rnn=rnn, head=nn.Linear(2, 1))
    assert find_groups(read, X).tied == [
        ["rnn.l0.cell", "rnn.l1.cell"],
        ["rnn.l0.output", "rnn.l1.output"],
    ]
    assert find_groups(not_read, X).tied == find_groups(last, X).tied == []
    rnn, head = nn.GRU(5, 4, 2), nn.Linear(4, 1)
    read = Net(lambda m, x: m.head(m.rnn(x)[1].transpose(0, 1)[:, -1]), rnn=rnn, head=head)
    not_read = Net(lambda m, x: (m.head((r := m.rnn(x))[0]), r[1]), rnn=rnn, head=head)
    assert find_groups(read, X).tied == [["rnn.l0", "rnn.l1"]]
    assert find_groups(not_read, X).tied == []


@pytest.mark.parametrize("kind", OWN)
def test_states_that_are_apart_stay_apart(kind: Any) -> None:
    """If sizes became equal, h_n would be one tensor and the model's code would read it wrongly."""
    model = Net(
        lambda m, x: m.top(m.head(h_n(m.rnn(x)[1])[-1]))[0][..., :1] * m.last(m.again(x)[0]).sum(),
        rnn=kind(5, [3, 4, 3], 3),
        top=nn.LSTM(2, 2),
        again=nn.LSTM(5, 4),
        head=nn.Linear(3, 2),
        last=nn.Linear(4, 1),
    )
    groups = find_groups(model, X)
    assert {family.name for family in groups.families if groups.by_value[family.start]} == {
        "rnn.l0", "rnn.l1", "rnn.l2",
    }  # fmt: skip
    small, _ = shrink(model, groups, keep={"rnn.l1": [0, 2, 3]})
    assert [h.shape[-1] for h in h_n(small.rnn(X)[1])] == [3, 4, 3]


MIXES = "it mixes its units with elements that do not leave with them"


class Answer:
    """What a model may return, with a tensor inside."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


CONST = torch.ones(2, 4)
# What the model does, and why rnn keeps its width outside.
OUTSIDE: dict[str, tuple[Callable[..., Any], str]] = {
    "normalisation": (
        lambda m, y: m.head(F.layer_norm(y, (4,))),
        "it reaches layer_norm (test_groups.py:LINE), and it normalises over the units",
    ),
    "matrix product": (
        lambda m, y: y @ CONST.T, "it reaches matmul (test_groups.py:LINE), and " + MIXES,
    ),
    "writing into another tensor": (
        lambda m, y: m.head(torch.zeros(6, 3, 4).copy_(y)),
        "a copy without some of its units fails with RuntimeError: The size of tensor a (4)",
    ),
    "residual": (
        lambda m, y: m.head(y + X[..., :4]), "it reaches add (test_groups.py:LINE), and " + MIXES,
    ),
    "reduction": (
        lambda m, y: y.mean(-1),
        "it reaches mean (test_groups.py:LINE), and it reduces over the units",
    ),
    "weight with and without units": (
        lambda m, y: m.head(y) + m.head(X[..., :4]),
        "it reaches linear (test_groups.py:LINE), and " + MIXES,
    ),
    "reading values": (
        lambda m, y: y.tolist(),
        "it reaches tolist (test_groups.py:LINE), and no rule says what happens to its units there",
    ),
    "out argument": (
        lambda m, y: torch.tanh(y, out=torch.empty(0)),
        "it reaches tanh (test_groups.py:LINE), and it writes to `out`",
    ),
    "lengths from units": (
        lambda m, y: m.gru(X, lengths=y[0, :, 0].abs().to(torch.int64) + 1)[0].sum(),
        "it reaches gru (test_groups.py:LINE), and it says there which steps are taken",
    ),
    "resets from units": (
        lambda m, y: m.gru(X, None, None, y[..., 0].to(torch.bool))[0].sum(),
        "it reaches gru (test_groups.py:LINE), and it says there which steps are taken",
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "other bits": (
        lambda m, y: y.view(torch.int16),
        "rnn.l0 through view (test_groups.py:LINE): it reinterprets their bits",
    ),
    "other bits by name": (
        lambda m, y: y.view(dtype=torch.int16),
        "rnn.l0 through view (test_groups.py:LINE): it reinterprets their bits",
    ),
}


def why_full(model: nn.Module) -> str:
    """Why the only recurrent module that runs keeps its width; with LINE for a line's number."""
    groups = find_groups(model, X)
    assert "full width outside" in str(groups)
    assert groups.by_value is not None and bool(groups.by_value.all())
    (why,) = groups.full_width.values()
    return re.sub(r"\.py:\d+", ".py:LINE", why)


def refusal(run: Callable[..., Any]) -> str:
    """The error for a model, which must not change; with LINE for each number of a line."""
    model = Net(lambda m, x: run(m, m.rnn(x)[0]), top=nn.LSTM(5, 4), gru=ISSGRU(5, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return re.sub(r"\.py:\d+", ".py:LINE", str(error.value))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_and_changes_nothing(name: str) -> None:
    run, message = REFUSED[name]
    assert refusal(run) == f"find_groups: cannot follow the output of {message}"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_module_whose_units_cannot_be_followed_keeps_its_width_outside(name: str) -> None:
    run, reason = OUTSIDE[name]
    model = Net(lambda m, x: run(m, m.rnn(x)[0]), top=nn.LSTM(5, 4), gru=ISSGRU(5, 4))
    assert reason in why_full(model)


def test_errors_list_all_kinds() -> None:
    assert kinds().startswith("nn.RNN, nn.LSTM, nn.GRU, ISSRNN, ")
    assert kinds().endswith("ISSLSTM or ISSGRU")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(5, 2), f"expected a model with an {kinds()}, found none"),
        (
            nn.LSTM(5, 4),
            "expected units that can leave, but all have to stay; l0: its outputs are the model's "
            "own",
        ),
        (
            Net(lambda m, x: Answer(m.rnn(x)[0])),
            "expected units that can leave, but all have to stay; rnn.l0: its outputs are the "
            "model's own",
        ),
    ],
)
def test_models_without_removable_units_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == f"find_groups: {message}"


# -- Verified by removal ---------------------------------------------------------------------------


def heads(run: Callable[[Tensor], Tensor], bidirectional: bool = False, kind: Any = nn.LSTM) -> Net:
    """A linear layer over what a function makes of y [T, B, 8 or 16]."""
    rnn = kind(5, 8, bidirectional=bidirectional)
    with torch.no_grad():
        width = run(rnn(X)[0]).size(-1)
    return Net(lambda m, x: m.head(run(m.rnn(x)[0])), rnn=rnn, head=nn.Linear(width, 2))


def halves(y: Tensor) -> Tensor:
    half = y.size(-1) // 2
    return torch.cat([y[-1, :, :half], y[0, :, half:]], -1)


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "last step of one, first of the other": halves,
    "chunk": lambda y: torch.cat([y.chunk(2, -1)[0][-1], y.chunk(2, -1)[1][0]], -1),
    "swapped": lambda y: torch.cat(y.tensor_split(2, -1)[::-1], -1),
    "view": lambda y: y.view(*y.shape[:2], 2, -1)[:, :, 1],
    "unflatten": lambda y: y.unflatten(-1, (2, -1)).flip(-2).flatten(-2),
    "split": lambda y: y.split(y.size(-1) // 2, -1)[1],
}


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("name", HALVES)
def test_directions_taken_apart_by_their_number_are_tied(name: str, kind: Any) -> None:
    groups = find_groups(heads(HALVES[name], True, kind), X)
    assert groups.tied == [["rnn.l0", "rnn.l0_reverse"]]
    assert "one common size: rnn.l0, rnn.l0_reverse" in str(groups)


def test_code_that_reads_the_hidden_size_ties_all_layers() -> None:
    """It is one number while all are of one size."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(x)
        return m.head(y[..., : m.rnn.hidden_size]) + m.top(m.below(x)[0])

    rnn, below = nn.LSTM(5, 4, 2, bidirectional=True), nn.LSTM(5, 4)
    groups = find_groups(Net(run, rnn=rnn, below=below, top=nn.Linear(4, 2)), X)
    assert groups.tied == [["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]]


def test_two_lstms_may_be_tied_and_others_not() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first, second = torch.cat([m.rnn(x)[0], m.again(x)[0]], -1).chunk(2, -1)
        return m.head(first) + m.other(second) + m.last(m.third(x)[0])

    model = Net(
        run, again=nn.LSTM(5, 4), third=nn.LSTM(5, 4), other=nn.Linear(4, 2), last=nn.Linear(4, 2)
    )
    assert find_groups(model, X).tied == [["rnn.l0", "again.l0"]]


PERMUTATION = torch.randperm(8)
# What the model does to y, whether y has two directions, the operation that the error names.
BY_POSITION: dict[str, tuple[Callable[[Tensor], Tensor], bool, str]] = {
    "half of the units": (lambda y: y.chunk(2, -1)[1], False, "chunk"),
    "swapped halves": (lambda y: torch.cat(y.chunk(2, -1)[::-1], -1), False, "chunk"),
    "view with a size": (lambda y: y.view(*y.shape[:2], 2, 8)[:, :, 0], True, "view"),
    "channel shuffle": (
        lambda y: y.view(*y.shape[:2], 2, -1).transpose(2, 3).reshape(*y.shape[:2], -1),
        False,
        "view, transpose, reshape",
    ),
    "steps": (lambda y: y[..., ::2], False, "__getitem__"),
    "range": (lambda y: y[..., 1:3], False, "__getitem__"),
    "list": (lambda y: y[..., [0, 3, 5]], False, "__getitem__"),
    "index_select": (lambda y: y.index_select(-1, PERMUTATION), False, "index_select"),
    "gather": (lambda y: y.gather(-1, PERMUTATION.expand(*y.shape[:2], 8)), False, "gather"),
    "narrow": (lambda y: y.narrow(-1, 0, 4), False, "narrow"),
    "roll": (lambda y: y.roll(1, -1), False, "roll"),
    "sizes": (lambda y: torch.cat(y.split([3, 5], -1)[::-1], -1), False, "split"),
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_units_picked_by_position_keep_their_place(name: str) -> None:
    run, bidirectional, operation = BY_POSITION[name]
    why = why_full(heads(run, bidirectional))
    assert f"it reaches {operation}, and a copy without some of its units " in why
    hint = r", as where code (computes with its (size|shape) or )?picks units by position$"
    assert re.search(hint, why)


@pytest.mark.parametrize("run", [
    lambda y: y.unflatten(-1, (2, -1)).transpose(2, 3).flatten(2),
    lambda y: y.view(*y.shape[:2], 2, -1).transpose(2, 3).reshape(*y.shape[:2], -1),
])  # fmt: skip
def test_directions_that_take_turns_lose_the_same_units(run: Callable[[Tensor], Tensor]) -> None:
    groups = find_groups(heads(run, True), X)
    assert [f.members for f in groups.families] == [("rnn.l0", "rnn.l0_reverse")]


def test_what_cuts_through_one_direction_leaves_the_other() -> None:
    """Where the forward units stay whole, all after the eighth are those of the other direction."""
    groups = find_groups(heads(lambda y: torch.cat([y[-1, :, :8], y[0, :, 8:]], -1), True), X)
    assert [family.name for family in groups.families] == ["rnn.l0", "rnn.l0_reverse"]
    assert list(groups.full_width) == ["rnn"]


@pytest.mark.parametrize(
    ("run", "read"),
    [
        (lambda y: y / math.sqrt(y.size(-1)), "size"),
        (lambda y: y * y.shape[-1], "shape"),
        (lambda y: y * len(y[0, 0]), "__len__"),
        (lambda y: y - y.numel() / 100, "numel"),
    ],
)
def test_numbers_from_the_number_of_units_stay_the_same(
    run: Callable[[Tensor], Tensor], read: str
) -> None:
    why = why_full(heads(run))
    assert (
        f"it reaches the model's answers in a way that no torch function shows (a number "
        f"computed from its {read}, " in why
    )
    assert why.endswith("a copy without some of its units gives other answers")


def test_a_number_from_the_units_beside_units_that_move_is_named() -> None:
    why = why_full(heads(lambda y: y @ (y.transpose(1, 2) @ y) / math.sqrt(y.size(-1))))
    assert "it reaches transpose, and a copy without some of its units gives other answers" in why
    assert why.endswith(", as where code computes with its size or picks units by position")


def test_code_that_reads_the_hidden_size_of_a_layer_of_full_width_is_told_so() -> None:
    model = Net(lambda m, x: m.head(m.norm(m.rnn(x)[0]).reshape(-1, m.rnn.hidden_size)),
                norm=nn.LayerNorm(4))  # fmt: skip
    with pytest.raises(GroupError, match=r"keeps its width, and whose hidden_size gets smaller: "):
        find_groups(model, X)


def test_a_part_of_a_family_may_be_one_with_another() -> None:
    def run(m: Any, x: Tensor) -> Any:
        p, q = m.a(x)[0].chunk(2, -1)
        return m.one(m.norm(p)), m.two(torch.cat([q + m.d(x)[0], m.e(x)[0]], -1))

    model = Net(
        run, a=nn.GRU(5, 16), d=nn.GRU(5, 8), e=nn.GRU(5, 8),
        norm=nn.LayerNorm(8), one=nn.Linear(8, 3), two=nn.Linear(16, 3),
    )  # fmt: skip
    groups = find_groups(model, X)
    assert {family.name: family.size for family in groups.families} == {
        "a.l0": 16, "d.l0": 8, "e.l0": 8
    }  # fmt: skip
    assert list(groups.full_width) == ["a", "d"]


def test_a_module_that_alone_is_at_fault_keeps_its_width_alone() -> None:
    model = Net(
        lambda m, x: m.head(m.top(m.rnn(x)[0])[0][..., ::2]),
        top=nn.LSTM(4, 8),
    )
    groups = find_groups(model, X)
    assert [family.name for family in groups.families] == ["rnn.l0", "top.l0"]
    assert "it reaches __getitem__, and a copy without" in groups.full_width["top"]
    assert not groups.kept_whole
    assert groups.by_value is not None
    assert groups.by_value.tolist() == [False] * 4 + [True] * 8


def test_a_batch_of_one_hides_nothing() -> None:
    """view(1, -1) is right for one row alone, and refuses others by itself."""
    rnn, head = nn.LSTM(5, 4, bidirectional=True), nn.Linear(8, 2)
    mixing = Net(lambda m, x: m.head(m.rnn(x)[1][0].view(x.size(1), -1)), rnn=rnn, head=head)
    right = Net(
        lambda m, x: m.head(m.rnn(x)[1][0].transpose(0, 1).reshape(x.size(1), -1)),
        rnn=rnn,
        head=head,
    )
    of_one = Net(lambda m, x: m.head(m.rnn(x)[1][0].view(1, -1)), rnn=rnn, head=head)
    # It mixes rows and directions, of which unit k is one unit then.
    (family,) = find_groups(mixing, X[:, :1]).families
    assert family.members == ("rnn.l0", "rnn.l0_reverse")
    assert find_groups(right, X[:, :1]).verified.endswith("a row more along dim 0 and 1")
    assert find_groups(of_one, X[:, :1]).verified.endswith("a row more along dim 0")


def test_a_batch_with_lengths_grows_with_its_lengths() -> None:
    def run(m: Any, x: Tensor, lengths: Any) -> Tensor:
        return m.head(m.rnn(pack_padded_sequence(x, lengths))[1][0].view(x.size(1), -1))

    model = Net(run, rnn=nn.LSTM(5, 4, bidirectional=True), head=nn.Linear(8, 2))
    for lengths in ([4], torch.tensor([4])):
        (family,) = find_groups(model, (X[:, :1], lengths)).families
        assert family.members == ("rnn.l0", "rnn.l0_reverse")
    model.run = lambda m, packed: m.head((h_n := m.rnn(packed)[1][0]).view(h_n.size(1), -1))
    (family,) = find_groups(model, pack_padded_sequence(X[:, :1], [4])).families
    assert family.members == ("rnn.l0", "rnn.l0_reverse")


def test_weights_that_are_zero_hide_nothing() -> None:
    """As in a layer that starts at zero, or behind a gate that does."""
    model = heads(lambda y: y.roll(1, -1))
    model.gate = nn.Parameter(torch.zeros(1))
    model.run = lambda m, x: m.gate * m.head(m.rnn(x)[0].roll(1, -1))
    nn.init.zeros_(model.head.weight)
    assert "it reaches roll" in find_groups(model, X).full_width["rnn"]


def test_initial_states_of_the_example_are_cut_for_the_verification() -> None:
    def run(m: Any, x: Tensor, *hx: Any) -> Any:
        y, states = m.rnn(x, hx)
        return m.head(y), states

    rnn: Any
    for rnn in (nn.LSTM(5, 4, 2, bidirectional=True), nn.LSTM(5, 4, 2, proj_size=3)):
        width = (rnn.proj_size or 4) * (1 + rnn.bidirectional)
        states = rnn(X)[1]
        model = Net(run, rnn=rnn, head=nn.Linear(width, 2))
        assert len(find_groups(model, (X, *states)).families) == 4
    by_layer = ISSLSTM(5, [(3, 4), 4], 2, bidirectional=True)
    model = Net(run, rnn=by_layer, head=nn.Linear(8, 2))
    assert len(find_groups(model, (X, *by_layer(X)[1])).families) == 4
    for rnn in (nn.GRU(5, 4, 2, bidirectional=True), ISSRNN(5, [(3, 4), 4], 2, bidirectional=True)):
        model = Net(lambda m, x, h: m.head(m.rnn(x, h)[0]), rnn=rnn, head=nn.Linear(8, 2))
        assert len(find_groups(model, (X, rnn(X)[1])).families) == 4


@pytest.mark.parametrize("kind", OWN)
def test_lengths_and_resets_are_followed_and_grow_with_the_batch(kind: Any) -> None:
    def run(m: Any, x: Tensor, resets: Tensor, lengths: Any) -> Tensor:
        return m.head(m.rnn(x, resets=resets, lengths=lengths)[0])

    model = Net(run, rnn=kind(5, 4), head=nn.Linear(4, 2))
    groups = find_groups(model, (X, torch.rand(6, 3) < 0.3, torch.tensor([6, 2, 5])))
    assert groups.verified == "on the example, and on one with a row more along dim 0 and 1"
    assert groups.weights[-1].column_units.tolist() == UNITS


def test_an_example_that_the_model_writes_into_stays_as_it_is() -> None:
    x = X.clone()
    find_groups(Net(lambda m, x: m.head(m.rnn(x.mul_(0.5))[0])), x)
    assert torch.equal(x, X)


def test_a_model_that_takes_the_example_in_training_alone_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if not m.training:
            raise RuntimeError("no targets")
        return m.head(m.rnn(x)[0])

    with pytest.raises(GroupError) as error:
        find_groups(Net(run), X)
    assert str(error.value) == (
        "find_groups: expected a model that takes the example in eval mode, "
        "got RuntimeError: no targets"
    )


IN_TRAINING: dict[str, Callable[..., Any]] = {
    "a penalty on all units": lambda m, y: (m.head(y), 2 * y.pow(2).mean()),
    "a normalisation": lambda m, y: m.head(F.layer_norm(y, y.shape[-1:])),
    "dropout, and a penalty": lambda m, y: (m.head(F.dropout(y)), y.mean()),
    "dropout of channels, and a penalty": lambda m, y: (
        m.head(F.dropout1d(F.dropout2d(F.dropout3d(y[None, None])[0])[0])),
        y.mean(),
    ),
    "dropout of features, and a penalty": lambda m, y: (
        m.head(torch.feature_dropout(F.feature_alpha_dropout(y, training=True), 0.5, True)),
        y.mean(),
    ),
    "a number of calls": lambda m, y: (m.calls.add_(1), m.head(y), y.mean()),
}


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("name", IN_TRAINING)
def test_what_training_alone_reads_is_noticed(name: str, kind: Any, mode: bool) -> None:
    """Also in the last of three layers, and with dropout between layers."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.third(m.second(m.rnn(x)[0])[0])[0]
        return IN_TRAINING[name](m, y) if m.training else m.head(y)

    model = Net(run, second=kind(4, 6, 2, dropout=0.5), third=kind(6, 4)).train(mode)
    model.register_buffer("calls", torch.zeros(1))
    groups = find_groups(model, X)
    assert len(groups.families) == 4
    assert list(groups.full_width) == ["third"]
    reason = "a copy without some of its units gives other answers in training mode"
    assert mode or groups.full_width["third"] == reason
    assert model.training is mode and model.get_buffer("calls") == 0


@pytest.mark.parametrize("mode", [False, True])
def test_states_may_be_in_another_place_in_training(mode: bool) -> None:
    def run(m: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, states = m.rnn(x, (h, c))
        answers = m.head(y)
        return (answers, answers.pow(2).mean(), states) if m.training else (answers, states)

    state = torch.zeros(1, 3, 4)
    groups = find_groups(Net(run).train(mode), (X, state, state))
    assert groups.families and not groups.full_width


def test_a_penalty_before_the_states_in_training_is_noticed() -> None:
    def run(m: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, states = m.rnn(x, (h, c))
        return (m.head(y), y.mean(), states) if m.training else (m.head(y), states)

    state = torch.zeros(1, 3, 4)
    with pytest.raises(GroupError, match=r"rnn.l0: a copy .* gives other answers in training mode"):
        find_groups(Net(run).eval(), (X, state, state))


@pytest.mark.parametrize("draw", [
    lambda y: y.new_empty(1, 1, y.size(-1)).bernoulli_(0.5),
    lambda y: torch.tensor(np.random.rand(y.size(-1)), dtype=y.dtype),
    lambda y: torch.tensor([random.random() for _ in range(y.size(-1))]),
])  # fmt: skip
def test_random_numbers_of_training_alone_are_no_difference(draw: Callable[..., Any]) -> None:
    model = Net(lambda m, x: m.head((y := m.rnn(x)[0]) * draw(y) if m.training else m.rnn(x)[0]))
    groups = find_groups(model.eval(), X)
    assert groups.families and not groups.full_width


def test_statistics_of_training_are_no_difference() -> None:
    model = Net(lambda m, x: m.head(m.norm(m.rnn(x)[0].transpose(1, 2)).transpose(1, 2)),
                norm=nn.BatchNorm1d(4))  # fmt: skip
    groups = find_groups(model.eval(), X)
    assert groups.families and not groups.full_width


@pytest.mark.parametrize("answer", [lambda y: y * math.nan, lambda y: str(y.shape)])
def test_a_model_whose_answers_tell_nothing_is_refused(answer: Callable[[Tensor], Any]) -> None:
    with pytest.raises(GroupError) as error:
        find_groups(Net(lambda m, x: answer(m.head(m.rnn(x)[0]))), X)
    assert str(error.value) == (
        "find_groups: expected a model that returns finite tensors or numbers, got none, "
        "by which the groups could be verified"
    )


def test_a_model_that_keeps_its_state_is_verified_as_far_as_it_goes() -> None:
    """Another batch does not fit the state that the example left."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, m.state = m.rnn(x, m.state)
        return m.head(y)

    model = Net(run)
    model.state = None
    assert (
        find_groups(model, X).verified == "on the example, and on one with a row more along dim 0"
    )
    assert model.state is None


class Ends(nn.Module):
    """The last steps of both directions, taken apart by a number; `answer` ends the forward."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.h, self.answer = 12, answer
        self.rnn = nn.LSTM(5, 12, bidirectional=True, batch_first=True)
        self.out, self.skip = nn.Linear(24, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(x)
        z = torch.cat([y[:, -1, : self.h], y[:, 0, self.h :]], -1)
        return self.answer(self, x, self.out(z))


ACTIONS = torch.tensor([True, True, True, True, False, False])
# What the model does to what it makes of the units, after which the answers are large.
LARGE: dict[str, Callable[..., Any]] = {
    "mask": lambda m, x, y: y.masked_fill(~ACTIONS, -1e9),
    "small mask": lambda m, x, y: y.masked_fill(~ACTIONS, -1e4),
    "sum with a mask": lambda m, x, y: y + torch.where(ACTIONS, 0.0, -1e9),
    "infinite mask": lambda m, x, y: y.masked_fill(~ACTIONS, -math.inf),
    "offset": lambda m, x, y: y + 3e4,
    "one answer": lambda m, x, y: y * torch.tensor([1.0, 1, 1, 1, 1, 1e6]),
    "layer scale": lambda m, x, y: m.skip(x[:, -1]) + 1e-4 * y,
    "statistics": lambda m, x, y: y * x.std((1, 2))[:, None] + x.mean((1, 2))[:, None] + 290,
    "float16": lambda m, x, y: (y.masked_fill(~ACTIONS, -1e9), m.skip(x).half()),
}


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", LARGE)
def test_large_answers_hide_no_unit(name: str, precision: str) -> None:
    torch.manual_seed(0)
    model, x = Ends(LARGE[name]), torch.randn(3, 7, 5)
    torch.set_float32_matmul_precision(precision)
    try:
        groups = find_groups(model, x)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [f"{width}: {width.family}" for width in groups.widths] == ["h: rnn.l0"]
    assert not groups.full_width
    groups.zero_units_({"rnn.l0": torch.arange(12) < 5})
    small, _ = shrink(model, groups)
    assert groups.families[0].members == ("rnn.l0",)
    torch.testing.assert_close(small(x), model(x))


UNSEEN = "the example does not show its units: without them a copy of the model "


@pytest.mark.parametrize("mode", [True, False])
def test_an_example_that_hides_the_units_is_refused(mode: bool) -> None:
    """A mask of zeros, here of what makes the answers and there of what a second module puts in."""

    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.head(m.rnn(x)[0][..., : m.rnn.hidden_size]) * mask

    model = Net(run).train(mode)
    assert [f.name for f in find_groups(model, (X, torch.ones(3, 1))).families] == ["rnn.l0"]
    with pytest.raises(GroupError, match=f"all have to stay; rnn.l0: {UNSEEN}"):
        find_groups(model, (X, torch.zeros(3, 1)))
    two = Net(
        lambda m, x, mask: m.head(m.rnn(x)[0]) + m.last(m.top(x)[0] * mask),
        top=nn.GRU(5, 8), last=nn.Linear(8, 2),
    )  # fmt: skip
    groups = find_groups(two, (X, torch.zeros(3, 1)))
    assert [f.name for f in groups.families] == ["rnn.l0"]
    assert groups.kept_whole["top.l0"].startswith(UNSEEN)
    assert not groups.full_width


def test_an_example_of_zeros_shows_units_by_their_biases() -> None:
    zeros = torch.zeros_like(X)
    assert find_groups(Net(lambda m, x: m.head(m.rnn(x)[0])), zeros).families
    model = Net(lambda m, x: m.head(m.rnn(x)[0]))
    model.rnn = nn.LSTM(5, 4, bias=False)
    with pytest.raises(GroupError, match=f"rnn.l0: {UNSEEN}"):
        find_groups(model, zeros)
    assert find_groups(model, X).families


def test_an_activation_that_is_zero_by_chance_hides_no_unit() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model = Net(lambda m, x: m.one(m.rnn(x)[0][-1]).relu(), one=nn.Linear(4, 1))
        assert find_groups(model, X[:, :1]).families


@pytest.mark.parametrize("answer", [
    lambda m, y: m.head(y).argmax(-1),
    lambda m, y: m.head(y).argmax(-1).tolist(),
])  # fmt: skip
def test_choices_need_not_show_each_unit(answer: Callable[..., Any]) -> None:
    model = Net(lambda m, x: answer(m, m.top(m.rnn(x)[0])[0]), top=nn.LSTM(4, 4))
    for seed in range(4):
        torch.manual_seed(seed)
        assert len(find_groups(model, X[:1, :1]).families) == 2


def test_units_may_show_in_training_alone() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.top(m.rnn(x)[0])[0]
        return m.last(m.rnn(x)[0]) + (m.head(y) if m.training else 0)

    model = Net(run, top=nn.LSTM(4, 4), last=nn.Linear(4, 2))
    assert [f.name for f in find_groups(model, X).families] == ["rnn.l0", "top.l0"]


def test_settings_of_precision_stay_as_they_are() -> None:
    """Also those by name of a backend, which keep torch from telling one for all."""
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    seen = []
    model = Net(lambda m, x: seen.append(backends[0].fp32_precision) or m.head(m.rnn(x)[0]))
    before = [each.fp32_precision for each in backends]
    try:
        for each in backends:
            each.fp32_precision = "tf32"
        find_groups(model, X)
        assert [each.fp32_precision for each in backends] == ["tf32", "tf32"]
        assert seen[-1] == "ieee"
    finally:
        for each, value in zip(backends, before, strict=True):
            each.fp32_precision = value


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype: torch.dtype, kind: Any) -> None:
    model = Net(lambda m, x: m.head(m.top(m.rnn(x)[0])[0]), rnn=kind(5, 32), top=kind(32, 4))
    if dtype == torch.float16:  # not on the CPU, so at least the answers
        model.run = lambda m, x: m.head(m.top(m.rnn(x)[0])[0]).half()
        assert len(find_groups(model, X).families) == 2
    else:
        assert len(find_groups(model.to(dtype), X.to(dtype)).families) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert len(find_groups(model.float(), X).families) == 2


# -- What shares parameters, or has other ones -----------------------------------------------------


def test_layers_that_share_a_parameter_share_their_units() -> None:
    for name in ("weight_hh_l0", "bias_ih_l0"):
        model = Net(lambda m, x: m.head(torch.cat([m.rnn(x)[0], m.top(x)[0]], 2)))
        model.top, model.head = nn.LSTM(5, 4), nn.Linear(8, 2)
        setattr(model.top, name, getattr(model.rnn, name))
        (family,) = find_groups(model, X).families
        assert (family.members, family.size) == (("rnn.l0", "top.l0"), 4)
        assert labels(model)["head.weight"][1] == UNITS * 2
    one = nn.LSTM(5, 4, bidirectional=True)
    one.bias_hh_l0_reverse = one.bias_hh_l0
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=one, head=nn.Linear(8, 2))
    assert [f.members for f in find_groups(model, X).families] == [("rnn.l0", "rnn.l0_reverse")]


def test_units_of_a_bias_that_another_module_uses_stay_whole() -> None:
    model = Net(lambda m, x: m.head(m.rnn(m.wide(x)[..., :5])[0]), wide=nn.Linear(5, 16))
    model.wide.bias = model.rnn.bias_ih_l0
    with pytest.raises(GroupError, match="all have to stay; rnn.l0: it reaches __getitem__"):
        find_groups(model, X)


@pytest.mark.parametrize("shared", ["weight", "bias"])
def test_a_parameter_shared_with_a_module_that_does_not_run_is_refused(shared: str) -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), other=nn.Linear(4, 2), spare=nn.LSTM(5, 4))
    if shared == "weight":
        model.other.weight = model.head.weight
    else:
        model.spare.bias_hh_l0 = model.rnn.bias_hh_l0
    with pytest.raises(GroupError, match="one parameter: the example does not run the module of"):
        find_groups(model, X)


def test_a_weight_may_be_used_without_its_module() -> None:
    model = Net(lambda m, x: F.linear(m.rnn(x)[0], m.head.weight, m.head.bias))
    model.empty = nn.Parameter(torch.empty(0, 0))
    assert labels(model)["head.weight"][1] == UNITS


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(GroupError) as error:
        find_groups(Net(lambda m, x: m.head(m.rnn(x)[0]), head=nn.LazyLinear(2)), X)
    assert str(error.value) == (
        "find_groups: expected parameters that have a shape, got head.weight without one: "
        "call the model once"
    )


def test_an_error_that_the_model_catches_ends_an_lstm() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            m.rnn(x[None])
        return F.layer_norm(m.rnn(x)[0], (4,)).sum()

    with pytest.raises(GroupError, match="rnn.l0: it reaches layer_norm"):
        find_groups(Net(run), X)


class Doubled(ISSLSTM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, states = super().forward(*args, **kwargs)
        return y * 2, states


def test_modules_of_a_subclass_are_left_alone() -> None:
    with pytest.raises(GroupError) as error:
        find_groups(Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=Doubled(5, 4)), X)
    assert str(error.value) == (
        f"find_groups: expected a model with an {kinds()}, found none but rnn, "
        "of a subclass, whose own methods would be lost"
    )
    alone = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=Doubled(5, 4))
    whole = find_groups(alone, X, on_unknown="keep").kept_whole
    assert whole == {
        "rnn": "its weights are computed, or it is of a subclass or has a forward of its own"
    }
    below = Net(lambda m, x: m.head(m.rnn(m.below(x)[0])[0]), below=Doubled(5, 5))
    groups = find_groups(below, X)
    assert [family.name for family in groups.families] == ["rnn.l0"]
    assert list(groups.kept_whole) == ["below"]
    above = Net(lambda m, x: m.head(m.above(m.rnn(x)[0])[0]), above=Doubled(4, 4))
    assert "no rule" in why_full(above)


def old_weight_norm(module: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, name)


COMPUTED: dict[str, Callable[[nn.Module, str], Any]] = {
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.4),
    "weight_norm": old_weight_norm,
    "weight_norm as a parametrisation": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", TORCH | OWN)
@pytest.mark.parametrize("name", COMPUTED)
def test_modules_with_computed_weights_are_refused_before_anything_runs(
    name: str, kind: type[nn.Module]
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        raise AssertionError("ran")

    model = Net(run, rnn=kind(5, 4))
    COMPUTED[name](model.rnn, "weight_hh_l0")
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == (
        "find_groups: expected recurrent modules whose weights are parameters, got rnn whose "
        "weight_hh_l0 is computed (pruning, weight_norm or another parametrisation): remove that "
        "first"
    )


@pytest.mark.parametrize("name", COMPUTED)
def test_other_layers_may_have_computed_weights(name: str) -> None:
    model = Net(lambda m, x: m.last(m.head(m.rnn(m.first(x))[0])), first=nn.Linear(5, 5))
    model.last = nn.Linear(2, 2)
    for layer in (model.first, model.last):
        COMPUTED[name](layer, "weight")
    model(X)
    assert labels(model)["head.weight"][1] == UNITS
    COMPUTED[name](model.head, "weight")
    followed = {
        "pruned": "head.weight_orig",
        "weight_norm": "head.weight_v",
        "weight_norm as a parametrisation": "head.parametrizations.weight.original1",
    }
    if name in followed:
        assert labels(model)[followed[name]][1] == UNITS
    else:
        assert why_full(model)


@pytest.mark.parametrize("kind", TORCH | OWN)
def test_a_module_with_another_forward_is_refused(kind: Any) -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=kind(5, 4))
    model.rnn.forward = lambda x: (x[..., :4], None)
    with pytest.raises(GroupError) as error:
        find_groups(model, X)
    assert str(error.value) == (
        "find_groups: expected recurrent modules with the forward of their class, "
        "got rnn with another, which shrink could not keep"
    )


def test_a_forward_that_is_called_directly_is_followed() -> None:
    for kind in TORCH | OWN:
        model = Net(lambda m, x: m.head(m.rnn.forward(x)[0]), rnn=kind(5, 4))
        assert labels(model)["head.weight"][1] == UNITS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_for_dtype_and_device_change_nothing(dtype: torch.dtype) -> None:
    model = Net(
        lambda m, x: m.head(m.top(m.rnn(x)[0])[1][0].transpose(0, 1).flatten(1)),
        top=nn.LSTM(4, 4, bidirectional=True),
        head=nn.Linear(8, 2),
    )
    expected = labels(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            groups = find_groups(model, X)
            groups.zero_units_({"rnn.l0": torch.tensor([True] * 2 + [False] * 2, device="cpu")})
            assert groups.dead()["rnn.l0"].tolist() == [True] * 2 + [False] * 2
            assert labels(model) == expected
    finally:
        torch.set_default_dtype(before)


def test_code_that_asks_for_a_class_keeps_its_own_layer_alone() -> None:
    """isinstance(m, nn.LSTM) is false for what an nn.LSTM without some of its units becomes."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.rnn(x)
        y = y[0] if isinstance(m.rnn, nn.LSTM) else y
        made: Tensor = m.head(m.norm(y)) + m.other_head(m.other(x)[0])
        return made

    model = Net(
        run, rnn=nn.LSTM(5, 6), norm=nn.Identity(), head=nn.Linear(6, 2),
        other=nn.GRU(5, 6), other_head=nn.Linear(6, 2),
    )  # fmt: skip
    groups = find_groups(model, X, on_unknown="keep")
    assert [family.name for family in groups.families] == ["other.l0"]
    assert list(groups.kept_whole) == ["rnn.l0"]
    small, _ = shrink(model, groups, keep={"other.l0": torch.arange(6) < 3})
    assert type(small.rnn) is nn.LSTM and type(small.other) is ISSGRU


def test_a_layer_that_reads_a_part_of_the_units_may_lose_them_all() -> None:
    """What a copy cannot be made without is a failure of that copy, not of find_groups."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([rnn(x)[0] for rnn in m.first], -1)
        y = y.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(2)
        parts = [rnn(part)[0] for rnn, part in zip(m.second, y.chunk(4, -1), strict=True)]
        made: Tensor = m.head(torch.cat(parts, -1))
        return made

    first = nn.ModuleList(nn.GRU(5, 8) for _ in range(4))
    second = nn.ModuleList(nn.GRU(8, 8) for _ in range(4))
    groups = find_groups(Net(run, first=first, second=second, head=nn.Linear(32, 3)), X)
    assert {f"second.{i}.l0" for i in range(4)} <= {family.name for family in groups.families}
    assert list(groups.full_width) == [f"first.{i}" for i in range(4)]


@pytest.mark.parametrize("begin", ["zeros_like", "new_zeros"])
@pytest.mark.parametrize("through", [nn.Identity, lambda: nn.Linear(5 + 6, 7)])
def test_a_context_that_begins_with_zeros_is_of_the_units_that_follow(
    begin: str, through: Callable[[], Any]
) -> None:
    """Input feeding: the attention's context goes in beside the next input."""

    def run(m: Any, x: Tensor) -> Tensor:
        memory, made = m.rnn(x)[0], []
        like = begin == "zeros_like"
        context = torch.zeros_like(memory[0]) if like else memory.new_zeros(memory.shape[1:])
        h = None
        for step in x:
            h = m.cell(m.through(torch.cat([step, context], 1)), h)
            scores = (memory * m.query(h)).sum(-1).softmax(0)
            context = (scores[..., None] * memory).sum(0)
            made.append(m.head(torch.cat([h, context], 1)))
        return torch.stack(made)

    inner = through()
    model = Net(
        run, rnn=nn.LSTM(5, 6), through=inner, query=nn.Linear(8, 6), head=nn.Linear(8 + 6, 2),
        cell=nn.GRUCell(7 if isinstance(inner, nn.Linear) else 5 + 6, 8),
    )  # fmt: skip
    groups = find_groups(model, X)
    assert [family.name for family in groups.families] == ["rnn.l0", "cell"]
    assert not groups.full_width


def test_layers_whose_states_are_stacked_and_not_read_are_tied() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y, (h, _) = m.rnn(x)
        y, (other, _) = m.other(y)
        torch.stack([h, other])
        made: Tensor = m.head(y)
        return made

    model = Net(run, rnn=nn.LSTM(5, 6), other=nn.LSTM(6, 6), head=nn.Linear(6, 2))
    groups = find_groups(model, X)
    assert groups.tied == [["rnn.l0", "other.l0"]] and not groups.full_width


def test_units_that_would_all_leave_together_leave_inside() -> None:
    """A linear layer in groups unites the units of each row and of each column."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.rnn(x)[0].unflatten(-1, (3, -1))
        return torch.einsum("tbgi,gih->tbgh", y, m.grouped[0]).flatten(2)

    grouped = nn.ParameterList([torch.randn(3, 4, 5)])
    groups = find_groups(Net(run, rnn=nn.GRU(5, 12), grouped=grouped), X)
    assert [family.size for family in groups.families] == [12]
    assert "all its units would have to leave together" in groups.full_width["rnn"]


@dataclasses.dataclass(slots=True)
class Slotted:
    """An output without a __dict__."""

    prediction: Tensor
    state: Any = None


def test_answers_may_be_in_a_dataclass_with_slots() -> None:
    model = Net(lambda m, x: Slotted(m.head(m.rnn(x)[0])), rnn=nn.GRU(5, 6), head=nn.Linear(6, 2))
    assert [family.name for family in find_groups(model, X).families] == ["rnn.l0"]


def test_a_path_that_no_torch_function_shows_is_noticed() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return torch.vmap(m.head)(m.rnn(x)[0])

    reason = "reaches the model's answers in a way that no torch function shows"
    assert reason in why_full(Net(run, rnn=nn.LSTM(5, 6), head=nn.Linear(6, 2)))
    groups = find_groups(Net(run, rnn=nn.LSTM(5, 6, proj_size=4)), X)
    assert [family.name for family in groups.families] == ["rnn.l0.cell", "rnn.l0.output"]
    assert reason in groups.full_width["rnn"]
    assert groups.by_value is not None
    assert groups.by_value.tolist() == [False] * 6 + [True] * 4


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
    assert groups.model is model and model.training and seen
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_hook_of_the_user_is_followed() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]))
    model.rnn.register_forward_hook(lambda m, args, out: (out[0].flip(-1), out[1]))
    assert labels(model)["head.weight"][1] == [3, 2, 1, 0]


def test_groups_of_a_model_that_was_another_are_refused() -> None:
    """Labels of the units that were would name other rows now."""
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(5, 8), head=nn.Linear(8, 3))
    groups = find_groups(model, X)
    lasso = GroupLasso(groups)
    shrink_(model, groups, keep={"rnn.l0": torch.arange(8) > 0})
    before = copy.deepcopy(model.state_dict())
    for call in (
        groups.dead,
        lambda: groups.zero_units_({"rnn.l0": torch.ones(8, dtype=torch.bool)}),
        lasso.norms,
        lasso.add_gradients_,
    ):
        with pytest.raises(ValueError, match=r"Groups: expected rnn.weight_ih_l0 of shape \[32, 5"):
            call()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("change", ["tied", "parametrised"])
def test_a_weight_under_another_name_is_no_weight_of_zeros(change: str) -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(5, 5), head=nn.Linear(5, 20))
    groups = find_groups(model, X)
    if change == "tied":
        model.head.weight = nn.Parameter(model.rnn.weight_ih_l0.detach().clone())
        model.rnn.weight_ih_l0 = model.head.weight
        assert not groups.dead()["rnn.l0"].any()
    else:
        parametrizations.weight_norm(model.head)
        with pytest.raises(ValueError, match="expected head.weight of shape .* got none"):
            groups.dead()


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
        "verified: on the example, and on one with a row more along dim 0 and 1",
    ]


@pytest.mark.parametrize("kind", TORCH)
def test_zeroed_units_are_dead_and_the_others_are_not_touched(kind: Any) -> None:
    gates = TORCH[kind]
    model = Net(
        lambda m, x: m.head(m.rnn(x)[0]),
        rnn=kind(5, 4, num_layers=2, bidirectional=True),
        head=nn.Linear(8, 2),
    )
    groups = find_groups(model, X)
    chosen = {"rnn.l0": torch.tensor([True, False, False, True])}
    groups.zero_units_(chosen)
    for name, dead in groups.dead().items():
        assert dead.tolist() == chosen.get(name, torch.zeros(4, dtype=torch.bool)).tolist()
    recurrent = model.rnn.weight_hh_l0.unflatten(0, (gates, 4)) != 0
    alive = ~chosen["rnn.l0"]
    assert torch.equal(recurrent, (alive[:, None] & alive[None, :]).expand(gates, 4, 4))
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


# -- A cell of several micro-steps -----------------------------------------------------------------


class Highway(Recurrent):
    """A recurrent highway layer of two micro-steps: a cell that no file here was written for."""

    mode = "HIGHWAY"

    def _shapes(self, *sizes: Any) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes(*sizes)
        for name in ("weight_hh", "bias_hh"):  # one micro-step below the other
            shapes[name] = (2 * shapes[name][0], *shapes[name][1:])
        return shapes


def highway_step(gates_x: Tensor, h: Tensor, *, w_hh: Tensor, b_hh: Tensor, w_hr: Any) -> Any:
    for w, b in zip(w_hh.chunk(2), b_hh.chunk(2), strict=True):
        new, carry = (gates_x + F.linear(h, w, b)).chunk(2, 1)
        h, gates_x = h + carry.sigmoid() * (new.tanh() - h), gates_x.new_zeros(())
    return (h,)


@pytest.fixture
def highway(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(CELLS, "highway", Cell("highway", 2, deep=True))
    monkeypatch.setitem(reference.STEPS, "highway", highway_step)
    monkeypatch.setitem(MODULES, Highway, Highway)
    with use_backend("reference"):
        yield Highway(5, 4)


def test_a_unit_of_a_deep_cell_spans_all_its_micro_steps(highway: Any) -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=highway)
    groups = find_groups(model, X)
    assert labels(model) == {
        "rnn.weight_ih_l0": (UNITS * 2, [-1] * 5),
        "rnn.weight_hh_l0": (UNITS * 4, UNITS),
        "head.weight": ([-1, -1], UNITS),
    }
    assert [vector.row_units.tolist() for vector in groups.vectors] == [UNITS * 2, UNITS * 4]
    assert groups.verified == "on the example, and on one with a row more along dim 0 and 1"
    dead = torch.tensor([False, True, False, True])
    with torch.no_grad():
        for name in ("rnn.weight_hh_l0", "head.weight"):
            model.get_parameter(name)[:, dead] = 0
    small, report = shrink(model, groups)
    assert report.kept["rnn.l0"].tolist() == [0, 2]
    assert type(small.rnn) is Highway and small.rnn.weight_hh_l0.shape == (8, 2)
    torch.testing.assert_close(small(X), model(X))
    GroupLasso(groups).proximal_(1e6)
    assert groups.dead()["rnn.l0"].all() and not model.rnn.weight_hh_l0.any()


class Words(nn.Module):
    """Embedding, a GRU, a softmax layer, which may share the embedding's weight."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, **options)
        self.rnn, self.head = nn.GRU(4, 4), nn.Linear(4, 20)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Any:
        return self.head(self.rnn(self.embedding(words))[0])


WORDS = torch.arange(6).view(3, 2)


def test_the_dimensions_of_an_embedding_are_units_if_asked_for() -> None:
    model = Words()
    assert [family.name for family in find_groups(model, WORDS).families] == ["rnn.l0"]
    groups = find_groups(model, WORDS, embedding=True)
    assert [(family.name, family.size) for family in groups.families] == [
        ("rnn.l0", 4), ("embedding", 4),
    ]  # fmt: skip
    with torch.no_grad():
        model.rnn.weight_ih_l0[:, 2] = 0
    assert groups.dead()["embedding"].tolist() == [False, False, True, False]
    small, report = shrink(model, groups)
    assert report.sizes == {"rnn.l0": (4, 4), "embedding": (4, 3)}
    assert small.embedding.embedding_dim == small.rnn.input_size == 3
    torch.testing.assert_close(small(WORDS), model(WORDS))


def test_a_tied_embedding_has_the_units_that_the_softmax_reads() -> None:
    model = Words(tied=True)
    groups = find_groups(model, WORDS, embedding=True)
    (family,) = groups.families
    assert family.members == ("rnn.l0", "embedding")
    groups.zero_units_({"rnn.l0": torch.tensor([True, False, True, False])})
    small, _ = shrink(model, groups)
    assert small.head.weight is small.embedding.weight
    assert small.embedding.weight.shape == (20, 2)
    torch.testing.assert_close(small(WORDS), model(WORDS))


def test_an_embedding_that_counts_all_its_dimensions_stays_whole() -> None:
    groups = find_groups(Words(max_norm=1.0), WORDS, embedding=True)
    assert [family.name for family in groups.families] == ["rnn.l0"]


class Batch(NamedTuple):
    x: Tensor
    counts: list[int]


class Halving(nn.Module):
    """Writes into what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 8), nn.Linear(8, 2)

    def forward(self, batch: Any) -> Tensor:
        x, counts = batch if isinstance(batch, tuple) else (batch["x"], batch["counts"])
        x.mul_(0.5)
        counts.pop()
        out: Tensor = self.head(self.rnn(x)[0])
        return out


@pytest.mark.parametrize("kind", [Batch, lambda x, counts: UserDict(x=x, counts=counts)])
def test_the_example_stays_as_it_is_in_any_container(kind: Any) -> None:
    x, counts = X.clone(), [6, 6, 6]
    groups = find_groups(Halving(), (kind(x, counts),))
    assert torch.equal(x, X)
    assert counts == [6, 6, 6]
    assert [family.name for family in groups.families] == ["rnn.l0"]


class Replacing(nn.Module):
    """Puts other tensors in the place of its buffers, whose ids go to yet others."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 8), nn.Linear(8, 2)
        self.count = count
        for i in range(count):
            self.register_buffer(f"memory{i}", torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            setattr(self, f"memory{i}", torch.zeros(2, 8))
        held = [x[0].clone() for _ in range(40)]
        out: Tensor = self.head(self.rnn(x)[0]) + torch.stack([h.sum() for h in held]).sum()
        return out


@pytest.mark.parametrize("count", [1, 4, 8, 16, 30])
def test_buffers_that_the_model_replaces_are_not_mixed_up(count: int) -> None:
    groups = find_groups(Replacing(count), X)
    assert [family.name for family in groups.families] == ["rnn.l0"]


def test_random_numbers_of_other_devices_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model, before = nn.GRU(5, 8, 2), torch.get_rng_state()
    find_groups(model, X)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == []


def test_what_a_run_computed_is_let_go_of() -> None:
    """At once: no cycle holds the activations until the collector runs."""
    alive: list[weakref.ref[Tensor]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            between = self.rnn(x)[0].tanh()
            alive.append(weakref.ref(between))
            out: Tensor = self.head(between)
            return out

    gc.collect()
    gc.disable()
    try:
        find_groups(Model(), X)
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_a_frame_of_another_package_is_the_users() -> None:
    torchs = Path(torch.__file__).parent
    assert str(torchs / "nn" / "modules" / "rnn.py").startswith(LIBRARIES)
    assert not str(torchs.with_name("torchrl") / "modules.py").startswith(LIBRARIES)
