# SPDX-License-Identifier: Apache-2.0
"""The shrunken model gives the answers of the model it came from."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import Groups
from iss_kernels.gru import ISSGRU
from iss_kernels.lstm import ISSLSTM
from iss_kernels.rnn import ISSRNN
from iss_kernels.shrink import shrink, shrink_

# nn.LSTM says this itself, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Net(nn.Module):
    """Modules, and a function of the model and its inputs as forward."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.seen: list[int] = []
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)

    def hook_of_a_model(self, module: nn.Module, args: Any, result: Any) -> None:
        self.seen.append(result[0].size(-1))


def tag(m: Any, x: Tensor) -> Any:
    """Label every step, and return the final states too."""
    y, states = m.rnn(x)
    return m.head(y), states


def tag_packed(m: Any, x: Tensor) -> Any:
    packed = pack_padded_sequence(x, torch.tensor([5, 7, 2]), enforce_sorted=False)
    y, states = m.rnn(packed)
    return m.head(pad_packed_sequence(y)[0]), states


def tagger(kind: Any = nn.LSTM, **options: Any) -> Net:
    rnn = kind(5, 8, **options)
    outputs = (options.get("proj_size") or 8) * (2 if options.get("bidirectional") else 1)
    return Net(tag, rnn=rnn, head=nn.Linear(outputs, 3))


def h_n(states: Any) -> Tensor:
    """The final h, of which an LSTM's final states are a pair."""
    return states if isinstance(states, Tensor) else states[0]


def in_chunks(m: Any, x: Tensor) -> Tensor:
    """Truncated sequences, carrying the state over, and a branch on the data."""
    states, answers = None, []
    for part in x.split(3):
        y, states = m.rnn(part, states)
        answers += [m.head(step) if len(part) > 1 else m.head(step.relu()) for step in y]
    return torch.stack(answers)


def halves(m: Any, x: Tensor) -> Tensor:
    """The last step of one direction and the first of the other."""
    forward, backward = m.rnn(x)[0].chunk(2, -1)
    return m.head(torch.cat([forward[-1], backward[0]], -1))


def one_bias(kind: Any = nn.LSTM) -> Net:
    model = tagger(kind, num_layers=2)
    for layer in range(2):
        setattr(model.rnn, f"bias_hh_l{layer}", getattr(model.rnn, f"bias_ih_l{layer}"))
    return model


def in_a_list(kind: Any = nn.LSTM) -> Net:
    """The RNN is found through a plain list too, which is no module, and called without hooks."""
    model = Net(lambda m, x: m.head(m.layers[0].forward(x)[0]), rnn=kind(5, 8))
    model.layers, model.head = [model.rnn], nn.Linear(8, 3)
    return model


# All models are functions of a torch module's class and of our own.
TAGGERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "one layer": lambda kind, _: tagger(kind),
    "two layers": lambda kind, _: tagger(kind, num_layers=2),
    "bidirectional": lambda kind, _: tagger(kind, num_layers=2, bidirectional=True),
    "no bias": lambda kind, _: tagger(kind, num_layers=2, bias=False),
    "batch first": lambda kind, _: tagger(kind, num_layers=2, batch_first=True, bidirectional=True),
    "packed": lambda kind, _: Net(
        tag_packed, rnn=kind(5, 8, 2, bidirectional=True), head=nn.Linear(16, 3)
    ),
    "unequal": lambda _, own: Net(
        tag, rnn=own(5, [(6, 9), (7, 8)], 2, bidirectional=True), head=nn.Linear(15, 3)
    ),
}
OF_LSTMS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "projected": lambda kind, _: tagger(kind, num_layers=2, proj_size=5),
    "projected bidirectional": lambda kind, _: tagger(
        kind, num_layers=2, proj_size=5, bidirectional=True
    ),
}
OTHERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "language model": lambda kind, _: Net(
        lambda m, x: m.head(m.drop(m.rnn(m.embed(x[..., 0].abs().long()))[0])),
        embed=nn.Embedding(9, 4),
        rnn=kind(4, 8, 2, dropout=0.5),
        drop=nn.Dropout(0.5),
        head=nn.Linear(8, 9),
    ),
    "two consumers": lambda kind, _: Net(
        lambda m, x: [
            (y := m.rnn(x)[0], m.a(y), m.b(torch.cat([x, y.tanh()], -1)))[i] for i in (1, 2)
        ],
        rnn=kind(5, 8),
        a=nn.Linear(8, 3),
        b=nn.Linear(13, 2),
    ),
    "classifier": lambda kind, _: Net(
        lambda m, x: m.head(h_n(m.rnn(x)[1])[-1]), rnn=kind(5, 8), head=nn.Linear(8, 3)
    ),
    "deep bidirectional classifier": lambda kind, _: Net(
        lambda m, x: m.head(h_n(m.rnn(x)[1]).transpose(0, 1)[:, -2:].flatten(1)),
        rnn=kind(5, 8, 2, bidirectional=True),
        head=nn.Linear(16, 3),
    ),
    "mean over time": lambda kind, _: Net(
        lambda m, x: m.head(m.rnn(x)[0].mean(0)), rnn=kind(5, 8), head=nn.Linear(8, 3)
    ),
    "flattened": lambda kind, _: Net(
        lambda m, x: m.head(m.rnn(x)[0].transpose(0, 1).flatten(1)),
        rnn=kind(5, 8),
        head=nn.Linear(56, 3),
    ),
    "between two": lambda kind, _: Net(
        lambda m, x: m.head(m.top(m.middle(m.rnn(x)[0]))[0]),
        rnn=kind(5, 8),
        middle=nn.Linear(8, 4),
        top=kind(4, 6),
        head=nn.Linear(6, 3),
    ),
    "one on another": lambda kind, _: Net(
        lambda m, x: m.head(m.top(m.rnn(x)[0].flip(0))[0]),
        rnn=kind(5, 8, bidirectional=True),
        top=kind(16, 6),
        head=nn.Linear(6, 3),
    ),
    "shared linear": lambda kind, _: Net(
        lambda m, x: m.head((y := m.rnn(x)[0])[0]) + m.head(y[-1]),
        rnn=kind(5, 8),
        head=nn.Linear(8, 3),
    ),
    "control flow": lambda kind, _: Net(in_chunks, rnn=kind(5, 8, 2), head=nn.Linear(8, 3)),
    "halves": lambda kind, _: Net(
        halves, rnn=kind(5, 8, bidirectional=True), head=nn.Linear(16, 3)
    ),
    "one bias": lambda kind, _: one_bias(kind),
    "in a list": lambda kind, _: in_a_list(kind),
    "contiguous": lambda kind, _: Net(
        lambda m, x: m.head((y := m.rnn(x)[0].transpose(0, 1).contiguous()).view(-1, y.size(-1))),
        rnn=kind(5, 8, bidirectional=True),
        head=nn.Linear(16, 3),
    ),
    "lengths and resets": lambda _, own: Net(
        lambda m, x: m.head(m.rnn(x, lengths=[5, 7, 2], resets=x[..., 0] > 1)[0]),
        rnn=own(5, 8, 2, bidirectional=True),
        head=nn.Linear(16, 3),
    ),
    "the model itself": lambda kind, _: kind(5, 8, 3),
}
RELU, OWN_RELU = (partial(kind, nonlinearity="relu") for kind in (nn.RNN, ISSRNN))


STATES = {  # models where the form of the final state counts
    name: OTHERS[name]
    for name in ("classifier", "deep bidirectional classifier", "control flow", "the model itself",
                 "one on another", "lengths and resets", "one bias")
}  # fmt: skip


def named(
    models: dict[str, Callable[[Any, Any], nn.Module]], suffix: str, *kinds: Any
) -> dict[str, Callable[[], nn.Module]]:
    return {f"{name}{suffix}": partial(build, *kinds) for name, build in models.items()}


KINDS = ["", " of a GRU", " of an RNN"]  # how names of models end
# Those whose answers are a pair of labels for every step and final states.
TAGGING = (
    named(TAGGERS | OF_LSTMS, "", nn.LSTM, ISSLSTM)
    | named(TAGGERS, KINDS[1], nn.GRU, ISSGRU)
    | named(TAGGERS, KINDS[2], nn.RNN, ISSRNN)
)
MODELS: dict[str, Callable[[], nn.Module]] = (
    TAGGING
    | named(OTHERS, "", nn.LSTM, ISSLSTM)
    | named(STATES, KINDS[1], nn.GRU, ISSGRU)
    | named({"bidirectional": TAGGERS["bidirectional"]}, " with relu", RELU, OWN_RELU)
    | {
        "a projected LSTM itself": lambda: nn.LSTM(5, 8, proj_size=4),
        "LSTM, GRU and RNN": lambda: Net(
            lambda m, x: m.head(m.third(m.second(m.rnn(x)[0])[0])[0]),
            rnn=nn.LSTM(5, 8, proj_size=6),
            second=nn.GRU(6, 7, 2, bidirectional=True),
            third=nn.RNN(14, 6),
            head=nn.Linear(6, 3),
        ),
        "RNN, GRU and LSTM": lambda: Net(
            lambda m, x: m.head(torch.cat([m.third(m.second(m.rnn(x)[0])[0])[0], m.rnn(x)[0]], -1)),
            rnn=ISSRNN(5, [(3, 4)], bidirectional=True),
            second=ISSGRU(7, [5, 6], 2),
            third=ISSLSTM(6, 7),
            head=nn.Linear(14, 3),
        ),
    }
)


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Groups]:
    torch.manual_seed(0)
    model, x = MODELS[name]().to(dtype).eval(), 3 * torch.randn(7, 3, 5, dtype=dtype)
    return model, x, find_groups(model, x)


@torch.no_grad()
def kill(groups: Groups, dead: Tensor, whole: bool = False) -> None:
    """Zero the outgoing weights of the dead (bool [units]); the whole groups and biases too."""
    padded = torch.cat([dead, torch.zeros(1, dtype=torch.bool)])
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        parameter[:, padded[weight.column_units.long()]] = 0
        if whole:
            parameter[padded[weight.row_units.long()]] = 0
    for vector in groups.vectors if whole else ():
        groups.model.get_parameter(vector.name)[padded[vector.row_units.long()]] = 0


def some(groups: Groups) -> Tensor:
    """About half of the units of each family, not the first two but the third: bool [units]."""
    dead = torch.rand(groups.units) < 0.5
    for family in groups.families:
        dead[family.start : family.start + 2] = False
        dead[family.start + 2] = True
    return dead


def tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else sum(map(tensors, tree), [])


def answers(result: Any) -> list[Tensor]:
    """The model's answers without final states."""
    return tensors(result[0] if isinstance(result, tuple) else result)


def same(one: Any, two: Any, dtype: torch.dtype) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_removing_dead_units_changes_no_answer(name: str, dtype: torch.dtype) -> None:
    model, x, groups = built(name, dtype)
    dead = some(groups)
    kill(groups, dead)
    small, report = shrink(model, groups)
    same(answers(small(x)), answers(model(x)), dtype)
    assert report.parameters[1] < report.parameters[0]
    if not groups.tied:
        for family, mask in groups.by_family(~dead).items():
            assert report.kept[family].tolist() == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", TAGGING)
def test_final_states_are_those_of_the_kept_units(name: str) -> None:
    model, x, groups = built(name)
    kill(groups, some(groups))
    small, report = shrink(model, groups)
    (_, big_states), (_, small_states) = model(x), small(x)
    names = list(report.kept)
    cells = [n for n in names if not n.endswith(".output")]
    outputs = [n for n in names if not n.endswith(".cell")]
    pairs = model.rnn._get_name().endswith("LSTM")
    big_states, small_states = ((s if pairs else (s,)) for s in (big_states, small_states))
    which = (outputs, cells) if pairs else (outputs,)
    for big, little, of in zip(big_states, small_states, which, strict=True):
        big, little = (
            [s for t in tensors(state) for s in (t if t.dim() == 3 else [t])]
            for state in (big, little)
        )
        for b, s, family in zip(big, little, of, strict=True):
            same(s, b[:, report.kept[family]], torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_further_training_is_the_same(name: str, dtype: torch.dtype) -> None:
    """Units whose whole group and biases are zero get no gradient, so they stay dead."""
    model, x, groups = built(name, dtype)
    kill(groups, some(groups), whole=True)
    small, _ = shrink(model, groups)
    for one in (model, small):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            sum(a.square().mean() for a in answers(one(x))).backward()
            optimizer.step()
    same(answers(small(x)), answers(model(x)), dtype)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_dead_gives_an_equal_model(name: str) -> None:
    model, x, groups = built(name)
    small, report = shrink(model, groups)
    assert report.parameters[0] == report.parameters[1]
    assert list(small.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), model.parameters(), strict=True)
    )
    same(answers(small(x)), answers(model(x)), torch.float64)


@pytest.mark.parametrize(
    "name", ["projected", "classifier", "the model itself", *(f"bidirectional{k}" for k in KINDS)]
)
def test_a_family_with_everything_dead_keeps_the_unit_of_largest_norm(name: str) -> None:
    model, x, groups = built(name)
    kill(groups, torch.ones(groups.units, dtype=torch.bool))
    largest = {name: [int(n.argmax())] for name, n in GroupLasso(groups).norms().items()}
    small, report = shrink(model, groups)
    assert {name: kept.tolist() for name, kept in report.kept.items()} == largest
    same(answers(small(x)), answers(model(x)), torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_shrinking_leaves_the_model_alone_and_shares_no_storage(name: str) -> None:
    model, x, groups = built(name)
    kill(groups, some(groups))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    small, _ = shrink(model, groups)
    assert torch.equal(random, torch.get_rng_state())
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    old, new = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, small))
    assert not old & new


@pytest.mark.parametrize("kind", KINDS)
def test_keep_takes_indices_or_masks_and_leaves_other_families_whole(kind: str) -> None:
    model, x, groups = built(f"two layers{kind}")
    by_index, report = shrink(model, groups, keep={"rnn.l0": [4, 1]})
    by_mask, _ = shrink(model, groups, keep={"rnn.l0": [u in (1, 4) for u in range(8)]})
    assert report.kept["rnn.l0"].tolist() == [1, 4]
    assert report.sizes == {"rnn.l0": (8, 2), "rnn.l1": (8, 8)}
    assert all(map(torch.equal, by_index.state_dict().values(), by_mask.state_dict().values()))
    kill(groups, torch.tensor([u not in (1, 4) for u in range(8)] + [False] * 8))
    same(answers(by_index(x)), answers(model(x)), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ratio_removes_the_units_of_smallest_norm(kind: str) -> None:
    model, _, groups = built(f"one layer{kind}")
    for weight, parameter in zip(groups.weights, groups.parameters(), strict=True):
        for unit in (0, 3, 6):
            parameter[weight.row_units == unit] *= 0.01
            parameter[:, weight.column_units == unit] *= 0.01
    _, report = shrink(model, groups, ratio=0.45)  # 3.6 of 8 units
    assert report.kept["rnn.l0"].tolist() == [1, 2, 4, 5, 7]
    assert len(shrink(model, groups, ratio=1)[1].kept["rnn.l0"]) == 1


@pytest.mark.parametrize(
    ("round_to", "size"), [(1, 3), (2, 4), (4, 4), (6, 6), (8, 8), (5, 5), (32, 8)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_round_to_takes_units_back_up_to_the_old_size(kind: str, round_to: int, size: int) -> None:
    model, x, groups = built(f"one layer{kind}")
    kill(groups, torch.tensor([0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool))
    small, report = shrink(model, groups, round_to=round_to)
    assert len(report.kept["rnn.l0"]) == size
    assert {0, 3, 5} <= set(report.kept["rnn.l0"].tolist())
    same(answers(small(x)), answers(model(x)), torch.float64)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_families_whose_states_are_read_as_one_tensor_keep_one_size(kind: str) -> None:
    model, x, groups = built(f"deep bidirectional classifier{kind}")
    names = ["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]
    assert groups.tied == [names]
    small, report = shrink(model, groups, keep={name: range(2 + i) for i, name in enumerate(names)})
    assert {after for _, after in report.sizes.values()} == {5}
    small(x)


@pytest.mark.parametrize("name", [name for name in MODELS if "deep" not in name])
def test_a_shrunken_model_shrinks_again(name: str) -> None:
    model, x, groups = built(name)
    once, _ = shrink(model, groups, ratio=0.3)
    groups = find_groups(once, x)
    kill(groups, some(groups))
    twice, report = shrink(once, groups)
    assert report.parameters[1] < report.parameters[0]
    same(answers(twice(x)), answers(once(x)), torch.float64)


def test_the_new_model_keeps_mode_options_and_frozen_parameters() -> None:
    model, _, groups = built("language model", torch.float32)
    model.train()
    model.get_submodule("drop").eval()
    model.get_parameter("rnn.weight_hh_l1").requires_grad_(False)
    model.get_submodule("rnn").register_forward_hook(lambda *_: None)
    small, _ = shrink(model, groups, ratio=0.5)
    rnn = small.get_submodule("rnn")
    assert (rnn.dropout, rnn.training, small.get_submodule("drop").training) == (0.5, True, False)
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["rnn.weight_hh_l1"]
    assert small.get_submodule("head").in_features == 4
    assert len(rnn._forward_hooks) == 1


def test_a_module_or_weight_under_two_names_stays_one() -> None:
    rnn, a, b = nn.LSTM(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
    b.weight = a.weight
    model = Net(lambda m, x: m.a(m.rnn(x)[0]) + m.b(m.again(x)[0]), rnn=rnn, again=rnn, a=a, b=b)
    small, _ = shrink(model, find_groups(model, torch.randn(7, 3, 5)), ratio=0.5)
    assert small.get_submodule("rnn") is small.get_submodule("again")
    assert small.get_submodule("a").weight is small.get_submodule("b").weight
    assert small.get_submodule("b").in_features == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first, second", [("l0", "l0_reverse"), ("l1", "l2")])
def test_weights_shared_within_a_module_stay_one(first: str, second: str, kind: Any) -> None:
    rnn = kind(8, 8, num_layers=3) if second == "l2" else kind(8, 8, bidirectional=True)
    for name in ("weight_ih_", "weight_hh_", "bias_ih_", "bias_hh_"):
        setattr(rnn, name + second, getattr(rnn, name + first))
    head = nn.Linear(8 if second == "l2" else 16, 2)
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=rnn, head=head).eval()
    x = torch.randn(6, 3, 8)
    groups = find_groups(model, x)
    groups.zero_(some(groups))
    expected = model(x)
    small, report = shrink(model, groups)
    assert report.parameters[1] < report.parameters[0]
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5)
    shrink_(model, groups)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    for each in (small, model):
        own: Any = each.get_submodule("rnn")
        assert getattr(own, f"weight_hh_{first}") is getattr(own, f"weight_hh_{second}")
    assert len(report.stayed["rnn"]) == rnn.num_layers * (1 + rnn.bidirectional)


def test_what_was_shared_is_shared_and_nothing_is_on_meta() -> None:
    model, _, groups = built("one bias")
    small, _ = shrink(model, groups, ratio=0.5)
    rnn = small.get_submodule("rnn")
    assert rnn.bias_hh_l0 is rnn.bias_ih_l0 and rnn.bias_hh_l1 is rnn.bias_ih_l1
    assert rnn.bias_ih_l0.shape == (16,)
    assert not any(p.is_meta for p in small.parameters())
    assert list(small.state_dict()) == list(model.state_dict())


def test_whatever_refers_to_an_lstm_refers_to_the_smaller_one() -> None:
    model, x, groups = built("in a list")
    model.rnn.register_forward_hook(model.hook_of_a_model)
    small, _ = shrink(model, groups, ratio=0.5)
    assert small.layers[0] is small.rnn and type(small.rnn) is ISSLSTM
    small.rnn(x)
    assert small.seen == [4] and not model.seen


def test_a_model_that_shares_other_parameters_than_that_of_the_groups_is_refused() -> None:
    _, _, groups = built("one layer")
    other = tagger()
    other.rnn.bias_hh_l0 = other.rnn.bias_ih_l0
    with pytest.raises(ValueError) as error:
        shrink(other, groups)
    assert str(error.value) == (
        "shrink: expected the model of the groups, with one parameter under rnn.bias_ih_l0, "
        "got one under rnn.bias_ih_l0, rnn.bias_hh_l0"
    )
    with pytest.raises(ValueError) as error:
        shrink(tagger(), find_groups(other, torch.randn(7, 3, 5)))
    assert str(error.value) == (
        "shrink: expected the model of the groups, with one parameter under rnn.bias_ih_l0, "
        "rnn.bias_hh_l0, got one under rnn.bias_ih_l0"
    )


def test_an_lstm_that_was_changed_since_is_refused() -> None:
    model, _, groups = built("one layer", torch.float32)
    prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.4)
    with pytest.raises(ValueError, match="shrink: expected rnn with its own parameters, got"):
        shrink(model, groups)


def test_layers_that_are_not_cut_may_have_computed_weights() -> None:
    model = Net(lambda m, x: m.head(m.rnn(m.first(x))[0]), first=nn.Linear(5, 5), rnn=nn.LSTM(5, 8))
    model.head = nn.Linear(8, 3)
    prune.l1_unstructured(model.first, "weight", 0.4)
    groups, x = find_groups(model, torch.randn(7, 3, 5)), torch.randn(7, 3, 5)
    kill(groups, some(groups))
    same(shrink(model, groups)[0](x), model(x), torch.float32)


def test_weights_of_two_dtypes_shrink_by_what_is_dead() -> None:
    """Norms, which need one dtype, are only for units that are taken back."""
    model = Net(lambda m, x: m.head(m.rnn(x)[0].double()), rnn=nn.LSTM(5, 8))
    model.head = nn.Linear(8, 3).double()
    groups, x = find_groups(model, torch.randn(7, 3, 5)), torch.randn(7, 3, 5)
    kill(groups, some(groups))
    same(shrink(model, groups)[0](x), model(x), torch.float32)
    with pytest.raises(ValueError, match="expected weights of one dtype"):
        shrink(model, groups, ratio=0.5)


def test_defaults_for_dtype_and_device_change_nothing() -> None:
    model, x, groups = built("halves")
    kill(groups, some(groups))
    with torch.device("meta"):
        small, report = shrink(model, groups, round_to=4)
        by_index, _ = shrink(model, groups, keep={"rnn.l0": [1, 4]})
        GroupLasso(groups, target=0.5, horizon=4, of="parameters").proximal_(0.0)
    assert report.sizes["rnn.l0"][1] % 4 == 0
    same(small(x), model(x), torch.float64)
    assert by_index(x).device.type == "cpu"


def test_the_report_is_a_table() -> None:
    model, _, groups = built("two layers")
    _, report = shrink(model, groups, keep={"rnn.l0": [0, 1]})
    assert str(report).splitlines() == [
        "                      before  after    left",
        "rnn.l0                     8      2   25.0%",
        "rnn.l1                     8      8  100.0%",
        "recurrent parameters   1,056    456   43.2%",
        "all parameters         1,083    483   44.6%",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": {}, "ratio": 0.5}, "shrink: expected keep, ratio or budget, got keep and ratio"),
        ({"ratio": 1.5}, "shrink: expected ratio between 0 and 1, got 1.5"),
        ({"ratio": float("nan")}, "shrink: expected ratio between 0 and 1, got nan"),
        ({"ratio": True}, "shrink: expected ratio between 0 and 1, got True"),
        ({"ratio": "half"}, "shrink: expected ratio between 0 and 1, got half"),
        ({"round_to": 2.0}, "shrink: expected round_to to be an int, got 2.0"),
        ({"round_to": True}, "shrink: expected round_to to be an int, got True"),
        ({"round_to": 0}, "shrink: expected round_to >= 1, got 0"),
        ({"keep": {"rnn": [0]}}, "shrink: expected keep for rnn.l0, got rnn"),
        (
            {"keep": {"rnn.l0": [8]}},
            "shrink: expected keep for rnn.l0 as a mask of 8 or indices below 8, got [8]",
        ),
        *(
            (
                {"keep": {"rnn.l0": units}},
                f"shrink: expected keep for rnn.l0 as a mask of 8 or indices below 8, got {units}",
            )
            for units in ([-1], [1.5], [[0, 1]], 3)
        ),
        (
            {"keep": {"rnn.l0": [1, 0, 1, 1, 0, 0, 0, 1]}},
            "shrink: expected keep for rnn.l0 to name each unit once, got [1, 0, 1, 1, 0, 0, 0, 1]",
        ),
        (
            {"keep": {"rnn.l0": [True]}},
            "shrink: expected keep for rnn.l0 as a mask of 8 or indices below 8, got [True]",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model, _, groups = built("one layer")
    with pytest.raises(ValueError) as error:
        shrink(model, groups, **options)
    assert str(error.value) == message


def test_groups_of_another_model_are_refused() -> None:
    _, _, groups = built("one layer")
    with pytest.raises(ValueError) as error:
        shrink(tagger(num_layers=1, proj_size=3), groups)
    assert str(error.value) == (
        "shrink: expected the model of the groups, with rnn.weight_hh_l0 of shape [32, 8], "
        "got [32, 3]"
    )
