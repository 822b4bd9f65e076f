# SPDX-License-Identifier: Apache-2.0
"""to_torch of unequal sizes: a module of torch's own modules that computes the same."""

import pytest
import torch
from kinds import LSTM, assert_same, every_kind, tensors_in
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from iss_kernels.torch_layers import TorchLayers

SIZES = {
    "one direction": {"hidden_size": [4, 5], "num_layers": 2},
    "one size a layer": {"hidden_size": [4, 5], "num_layers": 2, "bidirectional": True},
    "no size twice": {"hidden_size": [(4, 5), (3, 2), 6], "num_layers": 3, "bidirectional": True},
}


def both(kind, **options):
    ours = kind(3, **options, dtype=torch.float64)
    torchs = ours.to_torch()
    assert isinstance(torchs, TorchLayers)
    for module in torchs.modules():
        assert type(module) in (TorchLayers, nn.ModuleList, kind.torchs)
    return ours, torchs


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch_first", [False, True])
@every_kind
def test_it_computes_the_same(kind, batch_first, sizes):
    ours, torchs = both(kind, **SIZES[sizes], batch_first=batch_first)
    for shape in ((4, 4, 3), (6, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        y, states = ours(x)
        assert_same(tensors_in(torchs(x)), tensors_in((y, states)))
        assert_same(tensors_in(torchs(x, states)), tensors_in(ours(x, states)))


@every_kind
def test_packed_sequences_are_reversed_row_by_row(kind):
    ours, torchs = both(kind, **SIZES["no size twice"])
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 1, 5]), enforce_sorted=False)
    assert_same(tensors_in(torchs(packed)), tensors_in(ours(packed)))


def test_a_projection():
    ours, torchs = both(LSTM, hidden_size=[7, 6], num_layers=2, bidirectional=True,
                        proj_size=[3, (2, 4)], bias=False)  # fmt: skip
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    assert_same(tensors_in(torchs(x)), tensors_in(ours(x)))


def test_parameters_mode_dropout_and_hooks_are_those_of_the_module():
    ours = LSTM(3, [4, 5], 2, dropout=0.5).eval()
    ours.note, calls = "kept", []
    ours.register_forward_hook(lambda *_: calls.append(1))
    torchs = ours.to_torch()
    assert list(torchs.parameters()) == list(ours.parameters())
    assert torchs.note == "kept" and not torchs.training and torchs.dropout == 0.5
    torchs(torch.randn(5, 3))
    assert calls == [1]


def test_what_it_cannot_take_over_is_refused():
    ours = LSTM(3, [4, 5], 2)
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    with pytest.raises(ValueError, match="^to_torch: expected the LSTM with its own parameters"):
        ours.to_torch()
