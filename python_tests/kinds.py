# SPDX-License-Identifier: Apache-2.0
"""The recurrent modules that tests run over, and what compares one of them with torch's."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from iss_kernels import ISSGRU, ISSLSTM, ISSRNN


@dataclass(frozen=True, eq=False)
class Kind:
    """A cell: torch's module, ours, and the options of both."""

    name: str
    torchs: type[nn.RNNBase]
    ours: Any
    options: dict[str, str] = field(default_factory=dict)

    @property
    def projects(self):
        return self.torchs is nn.LSTM

    @property
    def gates(self):
        return {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[self.torchs]

    def of_torch(self, *args, **kwargs):
        """torch's module."""
        return self.torchs(*args, **self.options, **kwargs)

    def __call__(self, *args, **kwargs):
        """Our module."""
        return self.ours(*args, **self.options, **kwargs)

    def pair(self, *args, dtype=torch.float32, **kwargs):
        """torch's module and ours with copies of its parameters."""
        torch.manual_seed(3)
        torchs = self.of_torch(*args, dtype=dtype, **kwargs)
        ours = self(*args, dtype=dtype, **kwargs)
        ours.load_state_dict(torchs.state_dict())
        return torchs, ours

    def hx(self, h, c):
        """A state in the form that the module takes."""
        return (h, c) if self.torchs is nn.LSTM else h

    def random_hx(self, *shape, hidden, proj=0, dtype=torch.float64):
        """[*shape, size] of a state."""
        h, c = (torch.randn(*shape, size, dtype=dtype) for size in (proj or hidden, hidden))
        return self.hx(h, c)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("lstm", nn.LSTM, ISSLSTM),
        Kind("gru", nn.GRU, ISSGRU),
        Kind("rnn_tanh", nn.RNN, ISSRNN),
        Kind("rnn_relu", nn.RNN, ISSRNN, {"nonlinearity": "relu"}),
    )
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LSTM, GRU = KINDS["lstm"], KINDS["gru"]


def tensors_in(result):
    """All tensors of a module's result or arguments, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if torch.is_tensor(result):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors_in(part)]
    return []


def as_state(*tensors):
    """hx of what `tensors_in` takes a state apart into: nothing, h, or h and c."""
    return tensors if len(tensors) > 1 else tensors[0] if tensors else None


def with_gradients(module, args, dtype=None, parameters=None):
    """Outputs of module(*args), then the gradients of the floats in args and of the parameters."""
    leaves = [t.detach().clone() for t in tensors_in(args) if t.is_floating_point()]
    leaves = [(t if dtype is None else t.to(dtype)).requires_grad_() for t in leaves]
    new = iter(leaves)

    def rebuilt(a):
        if torch.is_tensor(a):
            return next(new) if a.is_floating_point() else a
        if isinstance(a, PackedSequence):
            return PackedSequence(rebuilt(a.data), *a[1:])
        return tuple(map(rebuilt, a)) if isinstance(a, (tuple, list)) else a

    torch.manual_seed(5)
    outputs = tensors_in(module(*map(rebuilt, args)))
    torch.manual_seed(7)
    loss = sum((y * torch.randn(y.shape).to(y.dtype)).sum() for y in outputs)
    wanted = [*leaves, *(module.parameters() if parameters is None else parameters)]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def assert_same(a, b, **tolerances):
    """Tensors of two results, alike to rounding in float64."""
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 1e-12, "atol": 1e-12} | tolerances))
