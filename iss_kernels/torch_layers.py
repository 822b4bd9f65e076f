# SPDX-License-Identifier: Apache-2.0
"""TorchLayers: layers of unequal sizes out of torch's own modules, as `to_torch` gives them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from iss_kernels.accelerate import HOOK_TABLES, added, check_plain


class TorchLayers(nn.Module):
    """What a `Recurrent` of unequal sizes computes, by an nn.LSTM, nn.GRU or nn.RNN for each layer.

    layers: by layer a list of one module of torch or, where a layer's two directions differ in
    size, of two, of which the second walks backwards. Parameters are those of the `Recurrent`.

    Inputs and outputs are those of torch's module, and states have the form that `Recurrent` gives
    them: h_n (and c_n) is a tuple of L * D tensors [B, size] where its sizes differ.
    """

    def __init__(self, module: Any) -> None:
        check_plain(module, "to_torch", f"the {module._kind}")
        super().__init__()
        self.mode, self.batch_first, self.dropout = module.mode, module.batch_first, module.dropout
        self.layers = nn.ModuleList()
        kind = module.torch_class
        for layer, sizes in enumerate(module.sizes):
            first = layer * len(sizes)
            names = module._all_weights[first : first + len(sizes)]
            directions = list(zip(sizes, names, strict=True))
            same = len({(size, len(own)) for size, own in directions}) == 1
            groups = [directions] if same else [[each] for each in directions]
            self.layers.append(nn.ModuleList(_torchs(module, kind, group) for group in groups))
        for table in HOOK_TABLES:
            if "forward" in table or "backward" in table:
                vars(self)[table] = copy.copy(vars(module)[table])
        vars(self).update({name: vars(module)[name] for name in added(module)})
        self.train(module.training)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Apply the layers; shapes as in torch's forward, states as in `Recurrent.forward`."""
        x: Any = input
        time = 1 if self.batch_first and _data(x).dim() == 3 else 0
        given = None
        if hx is not None:
            given = iter(list(zip(*(hx if self.mode == "LSTM" else (hx,)), strict=True)))
        final: list[tuple[Tensor, ...]] = []
        modules: Any
        for number, modules in enumerate(self.layers):
            if number > 0:
                x = _of_data(x, lambda t: dropout(t, self.dropout, self.training))
            outputs = []
            for direction, module in enumerate(modules):
                states = None
                if given is not None:
                    count = 1 + module.bidirectional
                    parts = zip(*(next(given) for _ in range(count)), strict=True)
                    stacks = tuple(torch.stack(part) for part in parts)
                    states = stacks if self.mode == "LSTM" else stacks[0]
                y, after = module(_reversed(x, time) if direction else x, states)
                outputs.append(_reversed(y, time) if direction else y)
                after = after if self.mode == "LSTM" else (after,)
                final += zip(*(state.unbind(0) for state in after), strict=True)
            x = outputs[0]
            if len(outputs) == 2:
                data = torch.cat([_data(y) for y in outputs], -1)
                x = _of_data(x, lambda _, data=data: data)
        result = [
            torch.stack(part) if len({s.shape[-1] for s in part}) == 1 else part
            for part in zip(*final, strict=True)
        ]
        return x, tuple(result) if self.mode == "LSTM" else result[0]


def _torchs(module: Any, kind: Any, directions: Any) -> nn.RNNBase:
    """torch's module of one layer, with the parameters of these directions of `module`."""
    (hidden, projected), names = directions[0]
    options = module.options_of(module) | {
        "input_size": getattr(module, names[0]).shape[1],
        "hidden_size": hidden,
        "num_layers": 1,
        "bidirectional": len(directions) == 2,
    }
    if "proj_size" in options:
        options["proj_size"] = projected if names[-1].startswith("weight_hr") else 0
    new: nn.RNNBase = kind(**options, device="meta")
    for (_, names), own in zip(directions, new._all_weights, strict=True):
        for name, new_name in zip(names, own, strict=True):
            new._parameters[new_name] = module._parameters[name]
    new._init_flat_weights()
    return new


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _of_data(x: Any, function: Any) -> Any:
    """function(x), or of the data of a packed sequence."""
    return x._replace(data=function(x.data)) if isinstance(x, PackedSequence) else function(x)


def _reversed(x: Any, time: int) -> Any:
    """Steps in the opposite order, in a packed sequence those of each row."""
    if not isinstance(x, PackedSequence):
        return x.flip(time)
    padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
    last = lengths.to(padded.device) - 1
    steps = torch.arange(len(padded), device=padded.device)[:, None]
    steps = torch.where(steps <= last, last - steps, steps)
    padded = padded.gather(0, steps[..., None].expand_as(padded))
    return x._replace(data=pack_padded_sequence(padded, lengths).data)
