# SPDX-License-Identifier: Apache-2.0
"""Bad input to modules: for the mistakes torch's know, their own errors; else one sentence each."""

import pytest
import torch
from kinds import KINDS, LSTM, every_kind
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import ISSGRU, ISSLSTM, ISSRNN

X = torch.randn(5, 2, 3)


@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 4.0},
        {"hidden_size": -1},
        {"hidden_size": 0},
        {"hidden_size": 4, "input_size": 0},
        {"hidden_size": 4, "input_size": 3.0},
        {"hidden_size": 4, "proj_size": 4},
        {"hidden_size": 4, "proj_size": -1},
        {"hidden_size": 4, "num_layers": 0},
        {"hidden_size": 4, "dropout": 2},
        {"hidden_size": 4, "dropout": True},
        {"hidden_size": 4, "dropout": "a"},
        {"hidden_size": 4, "bias": 1},
        {"hidden_size": 4, "batch_first": None},
    ],
    ids=str,
)
def test_constructor_raises_what_torchs_raises(kind, options):
    options = {"input_size": 3} | options
    with pytest.raises(Exception) as torchs:
        kind.of_torch(**options)
    with pytest.raises(torchs.type) as ours:
        kind(**options)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize(
    "options", [{"nonlinearity": "sigmoid"}, {"nonlinearity": None}, {"proj_size": 0}], ids=str
)
def test_constructor_of_an_rnn(options):
    with pytest.raises(Exception) as torchs:
        nn.RNN(3, 4, **options)
    with pytest.raises(torchs.type) as ours:
        ISSRNN(3, 4, **options)
    assert str(ours.value) == str(torchs.value)


@every_kind
def test_an_argument_that_there_is_not(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        kind(3, 4, depth=2)


@every_kind
def test_dropout_over_one_layer_warns_as_torch_does(kind):
    with pytest.warns(UserWarning) as torchs:
        kind.of_torch(3, 4, dropout=0.5)
    with pytest.warns(UserWarning) as ours:
        kind.ours(3, 4, dropout=0.5)
    assert str(ours[0].message) == str(torchs[0].message)
    assert ours[0].filename == __file__


def states(layers=2, batch=2, hidden=4):
    return torch.randn(layers, batch, hidden), torch.randn(layers, batch, hidden)


PACKED = PackedSequence(X[:, 0], torch.tensor([2, 2, 1]))
FORWARD = {
    "float64": (X.double(),),
    "integers": (X.long(),),
    "one dimension": (torch.randn(5),),
    "four dimensions": (torch.randn(5, 2, 3, 1),),
    "another input size": (torch.randn(5, 2, 4),),
    "another input size, unbatched": (torch.randn(5, 4),),
    "no steps": (torch.randn(0, 2, 3),),
    "no steps, unbatched": (torch.randn(0, 3),),
    "one layer": (X, states(layers=1)),
    "another batch": (X, states(batch=3)),
    "another hidden size": (X, states(hidden=5)),
    "another cell size": (X, (states()[0], states(hidden=5)[1])),
    "an unbatched state": (X, (torch.randn(2, 4), torch.randn(2, 4))),
    "a batched state": (X[:, 0], states()),
    "packed, another input size": (PACKED._replace(data=torch.randn(5, 4)),),
    "packed, three dimensions": (PACKED._replace(data=torch.randn(5, 1, 3)),),
    "packed, another batch": (PACKED, states(batch=3)),
    "packed, an unbatched state": (PACKED, (torch.randn(2, 4), torch.randn(2, 4))),
}


MISTAKES = [
    pytest.param(kind, name, id=f"{kind.name}-{name}")
    for kind in KINDS.values()
    for name in FORWARD
    # nn.LSTM does not check a packed input, and other modules have no cell state.
    if ("packed" not in name if kind is LSTM else "cell" not in name)
]


@pytest.mark.parametrize(("kind", "name"), MISTAKES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_forward_raises_what_torchs_raises(kind, name, batch_first):
    x, *hx = FORWARD[name]
    if name == "no steps" and batch_first:
        x = x.transpose(0, 1)
    args = (x, *(kind.hx(*pair) for pair in hx))
    with pytest.raises(Exception) as expected:
        kind.of_torch(3, 4, 2, batch_first=batch_first)(*args)
    with pytest.raises(expected.type) as got:
        kind(3, 4, 2, batch_first=batch_first)(*args)
    assert str(got.value) == str(expected.value)


SIZES = {"hidden_size": [4, (2, 5)], "num_layers": 2, "bidirectional": True}
UNEQUAL = ISSLSTM(3, **SIZES)
UNEQUAL_GRU = ISSGRU(3, **SIZES)
CALLS = {
    "hidden_size has the wrong number of layers": (
        lambda: ISSLSTM(3, [4, 2]),
        ValueError,
        "ISSLSTM: expected hidden_size with one entry for each of 1 layers, got 2: [4, 2]",
    ),
    "a pair where there is one direction": (
        lambda: ISSLSTM(3, [(4, 2)]),
        ValueError,
        "ISSLSTM: expected hidden_size to hold ints, got [(4, 2)]",
    ),
    "three sizes for two directions": (
        lambda: ISSLSTM(3, [(4, 2, 3)], bidirectional=True),
        ValueError,
        "ISSLSTM: expected hidden_size to hold ints or (forward, backward) pairs, got [(4, 2, 3)]",
    ),
    "a float inside a list": (
        lambda: ISSLSTM(3, [4.0]),
        TypeError,
        "hidden_size should be of type int, got: float",
    ),
    "from_torch of something else": (
        lambda: ISSLSTM.from_torch(nn.GRU(3, 4)),
        TypeError,
        "from_torch: expected a torch.nn.LSTM, got GRU",
    ),
    "hx of one tensor where sizes differ": (
        lambda: UNEQUAL(X, (torch.randn(4, 2, 4), torch.randn(4, 2, 4))),
        RuntimeError,
        "Expected hidden[0] to be a tuple of 4 tensors of sizes "
        "[(2, 4), (2, 4), (2, 2), (2, 5)], got a tensor of size [4, 2, 4]",
    ),
    "hx of a wrong size where sizes differ": (
        lambda: UNEQUAL(X, ([torch.randn(2, h) for h in (4, 4, 2, 2)], ())),
        RuntimeError,
        "Expected hidden[0] to be a tuple of 4 tensors of sizes "
        "[(2, 4), (2, 4), (2, 2), (2, 5)], got [(2, 4), (2, 4), (2, 2), (2, 2)]",
    ),
    "no hx inside the tuple": (
        lambda: ISSLSTM(3, 4)(X, (None, None)),
        RuntimeError,
        "For batched 3-D input, hx and cx should also be 3-D but got (NoneType, NoneType) tensors",
    ),
    "packed hx of a wrong batch": (
        lambda: ISSLSTM(3, 4, 2)(PackedSequence(X[:, 0], torch.tensor([2, 2, 1])), states(batch=3)),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 4), got [2, 3, 4]",
    ),
    "packed input of a wrong size": (
        lambda: ISSLSTM(4, 4)(PackedSequence(X[:, 0], torch.tensor([2, 2, 1]))),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 4, got 3",
    ),
    "from_torch of another cell": (
        lambda: ISSRNN.from_torch(nn.GRU(3, 4)),
        TypeError,
        "from_torch: expected a torch.nn.RNN, got GRU",
    ),
    "sizes of a GRU": (
        lambda: ISSGRU(3, [4, 2]),
        ValueError,
        "ISSGRU: expected hidden_size with one entry for each of 1 layers, got 2: [4, 2]",
    ),
    "a GRU given (h, c)": (
        lambda: ISSGRU(3, 4, 2)(X, states()),
        TypeError,
        "GRU: expected hx to be a tensor h_0, got a tuple",
    ),
    "an RNN given (h, c), packed": (
        lambda: ISSRNN(3, 4, 2)(PACKED, list(states())),
        TypeError,
        "RNN: expected hx to be a tensor h_0, got a list",
    ),
    "an LSTM given h": (
        lambda: ISSLSTM(3, 4, 2)(X, states()[0]),
        RuntimeError,
        "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors",
    ),
    "an LSTM of three layers given h": (
        lambda: ISSLSTM(3, 4, 3)(X, states(layers=3)[0]),
        RuntimeError,
        "lstm expects two hidden states",
    ),
    "a GRU of unequal sizes given (h, c)": (
        lambda: UNEQUAL_GRU(X, UNEQUAL(X)[1]),
        RuntimeError,
        "Expected hidden to be a tuple of 4 tensors of sizes "
        "[(2, 4), (2, 4), (2, 2), (2, 5)], got ['tuple', 'tuple']",
    ),
    "a GRU of unequal sizes given a tensor": (
        lambda: UNEQUAL_GRU(X, states(layers=4)[0]),
        RuntimeError,
        "Expected hidden to be a tuple of 4 tensors of sizes "
        "[(2, 4), (2, 4), (2, 2), (2, 5)], got a tensor of size [4, 2, 4]",
    ),
    "nothing where sizes differ, unbatched": (
        lambda: UNEQUAL_GRU(X[:, 0], (None, None)),
        RuntimeError,
        "Expected hidden to be a tuple of 4 tensors of sizes "
        "[(4,), (4,), (2,), (5,)], got ['NoneType', 'NoneType']",
    ),
    "two layers of three": (
        lambda: ISSGRU(3, [4, 2, 3], 3)(X, (None, None)),
        RuntimeError,
        "Expected hidden to be a tuple of 3 tensors of sizes "
        "[(2, 4), (2, 2), (2, 3)], got ['NoneType', 'NoneType']",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(name):
    call, error, message = CALLS[name]
    with pytest.raises(error) as got:
        call()
    assert str(got.value).splitlines()[0] == message
