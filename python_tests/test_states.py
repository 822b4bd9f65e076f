# SPDX-License-Identifier: Apache-2.0
"""The two forms of a state, and states of the width that a module had before units left it."""

import copy
import pickle

import pytest
import torch
from kinds import LSTM, every_kind, tensors_in
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from iss_kernels import (
    ISSGRU,
    ISSLSTM,
    ISSRHN,
    ISSGRUCell,
    ISSLSTMCell,
    ISSRNNCell,
    Stream,
    find_groups,
    prepare,
    shrink,
)
from iss_kernels.states import cut_state

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

X = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BOTH = {"num_layers": 2, "bidirectional": True}


def same_bits(one, two):
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(one), tensors_in(two), strict=True))


# -- two forms -------------------------------------------------------------------------------------


@every_kind
def test_code_that_reads_final_states_reads_both_forms(kind):
    y, states = kind(3, [4, (2, 5)], **BOTH, dtype=torch.float64)(X)
    h_n = states[0] if kind is LSTM else states
    assert [h.shape for h in h_n] == [(2, 4), (2, 4), (2, 2), (2, 5)]
    assert torch.equal(torch.cat((h_n[-2], h_n[-1]), 1), torch.cat((y[-1, :, :2], y[0, :, 2:]), 1))


@every_kind
@pytest.mark.parametrize("batched", [True, False])
def test_equal_sizes_take_a_tuple_too(kind, batched):
    module = kind(3, 4, num_layers=2, dtype=torch.float64)
    x, rows = (X, (2,)) if batched else (X[:, 0], ())
    hx = kind.random_hx(2, *rows, hidden=4)
    apart = tuple(map(tuple, hx)) if kind is LSTM else list(hx)
    same_bits(module(x, apart), module(x, hx))


def test_each_state_is_one_tensor_where_its_own_sizes_are_equal():
    _, (h_n, c_n) = ISSLSTM(3, [6, 5], 2, proj_size=4)(X.float())
    assert h_n.shape == (2, 2, 4) and [c.shape for c in c_n] == [(2, 6), (2, 5)]
    _, (h_n, c_n) = ISSLSTM(3, 6, 2, proj_size=[4, 3])(X.float())
    assert [h.shape for h in h_n] == [(2, 4), (2, 3)] and c_n.shape == (2, 2, 6)


# -- the width before ------------------------------------------------------------------------------


def mask_of(size, before):
    """A mask that keeps `size` random units of `before`."""
    return torch.zeros(before, dtype=torch.bool).index_fill(0, torch.randperm(before)[:size], True)


def remembering(module, *before):
    """The module, as if it had had these widths: of each state, by layer and direction."""
    sizes = zip(*module._state_sizes(), strict=True)
    masks = [list(map(mask_of, *pair)) for pair in zip(sizes, before, strict=True)]
    module.remember(list(zip(*masks, strict=True)))
    return module, masks


def one_or_more(rows):
    """A state of these rows, as a module that has not shrunk returns it."""
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else tuple(rows)


def wide_and_narrow(masks, *batch, dtype=torch.float64):
    """A random hx of the widths before, and the same without the columns that the masks leave."""
    wide = [[torch.randn(*batch, len(mask), dtype=dtype) for mask in part] for part in masks]
    narrow = [[row[..., mask] for row, mask in zip(*pair)] for pair in zip(wide, masks)]  # noqa: B905
    return tuple(
        parts[0] if len(parts) == 1 else tuple(parts)
        for parts in (list(map(one_or_more, state)) for state in (wide, narrow))
    )


# The module's sizes, and those that it had by layer and direction.
FORMS = {
    "equal, as before": ({"hidden_size": 4, "num_layers": 2}, [6, 6]),
    "unequal, equal before": ({"hidden_size": [4, (2, 3)], **BOTH}, [4, 4, 4, 4]),
    "unequal, as before": ({"hidden_size": [4, (2, 3)], **BOTH}, [7, 4, 6, 3]),
    "equal, unequal before": ({"hidden_size": 4, "num_layers": 3}, [4, 6, 5]),
    "one layer": ({"hidden_size": 4}, [9]),
}


@every_kind
@pytest.mark.parametrize("name", FORMS)
def test_a_state_of_the_width_before_is_cut(kind, name):
    options, before = FORMS[name]
    module = kind(3, **options, dtype=torch.float64)
    count = len(module.cell.states)
    module, masks = remembering(module, *[before] * count)
    packed = pack_sequence([X[:2, 0], X[:5, 1]], enforce_sorted=False)
    (wide, narrow), (alone, alone_narrow) = wide_and_narrow(masks, 2), wide_and_narrow(masks)
    for call, one, two in (
        (lambda hx: module(X, hx), wide, narrow),
        (lambda hx: module(X[:, 0], hx), alone, alone_narrow),
        (lambda hx: module(packed, hx), wide, narrow),
        (lambda hx: module(X, hx, [2, 6], X[..., 0] > 1), wide, narrow),
    ):
        same_bits(call(one), call(two))
    fast = prepare(module)
    same_bits(fast(X, wide), fast(X, narrow))
    stayed = list(zip(*masks, strict=True))
    same_bits(cut_state(wide, stayed), narrow)
    same_bits(cut_state(alone, stayed), alone_narrow)


def test_cells_and_outputs_of_a_projected_lstm_are_cut_apart():
    module, masks = remembering(
        ISSLSTM(3, [5, 4], 2, proj_size=[3, 2], dtype=torch.float64), [4, 4], [7, 6]
    )
    wide, narrow = wide_and_narrow(masks, 2)
    same_bits(module(X, wide), module(X, narrow))
    same_bits(cut_state(wide, list(zip(*masks, strict=True))), narrow)


@pytest.mark.parametrize("carry", ["coupled", "separate"])
def test_an_rhns_state_is_cut(carry):
    rhn, masks = remembering(ISSRHN(3, 4, depth=2, carry=carry, dtype=torch.float64), [6])
    wide, narrow = wide_and_narrow(masks, 2)
    same_bits(rhn(X, wide), rhn(X, narrow))


def test_a_learned_state_gets_a_gradient_where_its_units_stayed():
    gru, ((mask,),) = remembering(ISSGRU(3, 4, dtype=torch.float64), [6])
    h0 = nn.Parameter(torch.randn(1, 1, 6).double())
    gru(X, h0.expand(1, 2, 6))[0].sum().backward()
    assert torch.equal(h0.grad[0, 0] != 0, mask)


def test_masks_made_in_inference_mode_serve_in_training():
    gru = ISSGRU(3, 4)
    with torch.inference_mode():
        gru.remember([[mask_of(4, 6)]])
    gru(X.float(), torch.zeros(1, 2, 6, requires_grad=True))[0].sum().backward()


def test_a_second_removal_counts_from_the_first_width():
    once, (first,) = remembering(ISSGRU(3, 4, 2), [6, 6])
    gru = ISSGRU(3, [2, 3], 2)
    gru.kept = once.kept  # as a rebuilt module takes it over
    gru, (second,) = remembering(gru, [4, 4])
    h0 = torch.randn(2, 2, 6)
    expected = tuple(h[:, a][:, b] for h, a, b in zip(h0, first, second, strict=True))
    same_bits(gru(X.float(), h0), gru(X.float(), expected))
    with pytest.raises(RuntimeError, match="from before shrinking, size"):
        gru(X.float(), torch.randn(2, 2, 4))


def test_a_module_that_lost_nothing_remembers_nothing():
    gru = ISSGRU(3, 4)
    gru.remember([[torch.ones(4, dtype=torch.bool)]])
    assert gru.kept is None


def everywhere(module):
    """The module after all that moves or copies it."""
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    yield "dtype", copy.deepcopy(module).double()
    meta = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    meta.load_state_dict(module.state_dict())
    yield "to_empty", meta
    yield "shared", copy.deepcopy(module).share_memory()
    with torch.device("meta"):
        yield "default device", copy.deepcopy(module)


def test_it_goes_where_the_module_goes():
    module, masks = remembering(ISSLSTM(3, [4, 2], 2, dtype=torch.float64), [6, 6], [6, 6])
    wide, narrow = wide_and_narrow(masks, 2)
    expected = module(X, narrow)
    for _, twin in everywhere(module):
        same_bits(twin(X, wide), expected)
    cell, masks = remembering(ISSGRUCell(3, 4, dtype=torch.float64), [6])
    (wide,), (narrow,) = wide_and_narrow(masks, 2)
    for _, twin in everywhere(cell):
        same_bits(twin(X[0], wide), cell(X[0], narrow))


def test_neither_torchs_module_nor_a_state_dict_has_it():
    for module in (ISSGRU(3, 4), ISSGRUCell(3, 4)):
        names, plain = list(module.state_dict()), vars(module.to_torch())
        module, _ = remembering(module, [6])
        assert list(module.state_dict()) == names and not list(module.buffers())
        assert vars(module.to_torch()).keys() == plain.keys()
        with pytest.raises(RuntimeError):
            module.to_torch()(X[0].float(), torch.zeros(2, 6))


def test_prepared_modules_and_their_streams_cut():
    module, masks = remembering(ISSLSTM(3, [4, 2], 2), [6, 6], [6, 6])
    wide, narrow = wide_and_narrow(masks, 2, dtype=torch.float32)
    for fast in (prepare(module, "int8"), copy.deepcopy(prepare(module))):
        same_bits(fast(X.float(), wide), fast(X.float(), narrow))
        step = Stream(fast, 2)
        step.state = wide
        same_bits(step.state, narrow)


# -- cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ISSLSTMCell, ISSGRUCell, ISSRNNCell])
def test_a_cells_state_of_the_width_before_is_cut(implementation, make):
    cell = make(3, 4, dtype=torch.float64)
    count = len(cell._state_sizes()[0])
    mask = mask_of(4, 6)
    cell.remember([[mask] * count])
    for x, rows in ((X[0], (2,)), (X[0, 0], ())):
        states = [torch.randn(*rows, 6).double() for _ in range(count)]
        wide, narrow = (
            tuple(parts) if count > 1 else parts[0]
            for parts in (states, [state[..., mask] for state in states])
        )
        same_bits(cell(x, wide), cell(x, narrow))
        same_bits(cut_state(wide, [[mask] * count]), narrow)
    wrong = torch.zeros(2, 5).double()
    with pytest.raises(RuntimeError) as got:
        cell(X[0], (wrong, wrong) if count > 1 else wrong)
    assert str(got.value) == (
        "hidden0 has inconsistent hidden_size: got 5, expected 4, or, from before shrinking, 6"
    )


# -- compiled --------------------------------------------------------------------------------------


def test_a_module_that_cuts_compiles_as_one_graph():
    module, masks = remembering(ISSLSTM(3, [4, 2], 2, dtype=torch.float64), [6, 6], [6, 6])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for hx in wide_and_narrow(masks, 2):
        torch.testing.assert_close(compiled(X, hx), module(X, hx))
    cell, masks = remembering(ISSGRUCell(3, 4, dtype=torch.float64), [6])
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    for (hx,) in wide_and_narrow(masks, 2):
        torch.testing.assert_close(compiled(X[0], hx), cell(X[0], hx))
    torch._dynamo.reset()


# -- errors ----------------------------------------------------------------------------------------


def raises(message, call, error=RuntimeError):
    with pytest.raises(error) as got:
        call()
    assert str(got.value) == message


def test_a_third_width_is_an_error_that_names_both():
    gru, _ = remembering(ISSGRU(3, 4, 2, dtype=torch.float64), [6, 6])
    raises(
        "Expected hidden size (2, 2, 4), or, from before shrinking, size (2, 2, 6), got [2, 2, 5]",
        lambda: gru(X, torch.zeros(2, 2, 5).double()),
    )
    raises(
        "Expected hidden size (2, 2, 4), or, from before shrinking, size (2, 2, 6), "
        "got [(2, 4), (2, 5)]",
        lambda: gru(X, [torch.zeros(2, width).double() for width in (4, 5)]),
    )
    lstm, _ = remembering(ISSLSTM(3, [4, 2], 2, dtype=torch.float64), [6, 6], [6, 6])
    wide = torch.zeros(2, 2, 6).double()
    raises(
        "Expected hidden[1] to be a tuple of 2 tensors of sizes [(2, 4), (2, 2)], or, from before "
        "shrinking, size (2, 2, 6), got a tensor of size [2, 2, 5]",
        lambda: lstm(X, (wide, torch.zeros(2, 2, 5).double())),
    )
    raises(
        "Expected hidden[0] to be a tuple of 2 tensors of sizes [(2, 4), (2, 2)], or, from before "
        "shrinking, size (2, 2, 6), got a tensor of size [2, 3, 6]",
        lambda: lstm(X, (torch.zeros(2, 3, 6).double(), wide)),
    )


def test_cut_state_of_another_form_is_an_error():
    h, masks = torch.zeros(2, 2, 6), [[mask_of(4, 6)] * 2] * 2
    raises(
        "cut_state: expected h of the widths before, [6, 6], got [4, 4]",
        lambda: cut_state((h[..., :4], h), masks),
        ValueError,
    )
    raises(
        "cut_state: expected hx to be (h, c), got a Tensor", lambda: cut_state(h, masks), ValueError
    )


def test_masks_that_do_not_fit_are_refused():
    gru = ISSGRU(3, [4, 2], 2)
    message = (
        "remember: expected bool masks of [(6,), (6,)] units that keep [(4,), (2,)], by layer and "
        "direction, got masks of [(6,), (6,)] that keep [(4,), (4,)]"
    )
    raises(message, lambda: gru.remember([[mask_of(4, 6)], [mask_of(4, 6)]]), ValueError)
    gru.remember([[mask_of(4, 6)], [mask_of(2, 6)]])
    with pytest.raises(ValueError, match="remember: expected"):  # of other units than it had
        gru.remember([[mask_of(4, 6)], [mask_of(2, 6)]])


# -- shrink ----------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A recurrent module that gets its initial state from its caller, and a label for each step."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        width = (getattr(rnn, "proj_size", 0) or rnn.hidden_size) * (1 + rnn.bidirectional)
        self.head = nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x, hx):
        y, states = self.rnn(x, hx)
        return self.head(y), states


@every_kind
def test_a_shrunken_model_takes_the_states_of_the_whole_one(kind):
    model = Tagger(kind.of_torch(3, 8, **BOTH, dtype=torch.float64))
    hx = kind.random_hx(4, 2, hidden=8)
    small = model
    for _ in range(2):  # the second time out of the small model, still with the first width
        groups = find_groups(small, (X, hx))
        dead = {f.name: torch.arange(f.size) % (3 + i) == 1 for i, f in enumerate(groups.families)}
        with torch.no_grad():
            groups.zero_units_(dead)
        expected = small(X, hx)[0]
        small, _ = shrink(small, groups)
        torch.testing.assert_close(small(X, hx)[0], expected, rtol=1e-12, atol=1e-12)
    assert sum(small.rnn.sizes, []) != sum(kind(3, 8, **BOTH).sizes, [])
