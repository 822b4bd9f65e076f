# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export and torch.jit.trace hold each module as one graph."""

import pytest
import torch
from kinds import GRU, KINDS, LSTM, every_kind, tensors_in
from torch import nn
from torch.export import Dim, export
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from iss_kernels import ISSLSTM, ISSRHN, ISSGRUCell, prepare

BOTH_WAYS = {"bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, BOTH_WAYS) for kind in KINDS.values()),
        (LSTM, {}),
        (LSTM, {"proj_size": 3, "bias": False}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_module_compiles_as_one_graph(kind, options, training):
    module = kind(4, 7, num_layers=2, **options).train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((5, 3, 4), (6, 2, 4), (6, 4)):
        results = []
        for function in (module, compiled):
            x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
            resets = x[..., 0] > 0.5
            y, states = function(x, None, None, resets)
            module.zero_grad()
            sum((t.square().sum() for t in tensors_in(states)), y.sum()).backward()
            results.append([y, states, x.grad, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


@every_kind
def test_unequal_sizes_compile_as_one_graph(kind):
    module = kind(4, [(3, 5), 2], num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("hidden_size", [7, [(3, 5), 2]], ids=["equal sizes", "unequal sizes"])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_two_graphs_serve_every_length(kind, hidden_size, with_state, training):
    """As for any module: one graph for the first shape, one for all others."""
    torch.compiler.reset()
    module, graphs = kind(4, hidden_size, num_layers=2, bidirectional=True), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=counted)
    with torch.set_grad_enabled(training):
        for steps, batch in ((2, 3), (3, 4), (5, 3), (8, 2), (13, 6), (21, 5)):
            x = torch.randn(steps, batch, 4)
            with torch.no_grad():  # dynamo warns of states with a history
                hx = module(x)[1] if with_state else None
            resets = x[..., 0] > 1
            args = (x, hx, None, resets)
            torch.testing.assert_close(compiled(*args), module(*args))
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # nn.LSTM's checks cause it too
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
@every_kind
def test_a_traced_module_is_the_module(kind, options, training):
    module = kind(4, 7, num_layers=2, **options)
    with torch.set_grad_enabled(training):
        traced = torch.jit.trace(module, torch.randn(5, 2, 4))
    x = torch.randn(9, 3, 4, requires_grad=True)
    results = []
    for function in (module, traced):
        y, states = function(x)
        last = tensors_in(states)[-1]
        gradients = torch.autograd.grad(y.sum() + last.sum(), [x, *module.parameters()])
        results.append([y, states, *gradients])
    torch.testing.assert_close(*results)


class Ragged(nn.Module):
    """A module over rows of different lengths, given as such or packed."""

    def __init__(self, rnn, packed):
        super().__init__()
        self.rnn, self.packed = rnn, packed

    def forward(self, x, lengths):
        if not self.packed:
            return self.rnn(x, None, lengths)
        packed, states = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed), states


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("packed", [False, True])
@every_kind
def test_a_trace_serves_other_lengths_and_batches(kind, packed):
    model = Ragged(kind(4, 5, 2, bidirectional=True), packed)
    with torch.no_grad():
        example = torch.randn(7, 3, 4), torch.tensor([7, 2, 5])
        traced = torch.jit.trace(model, example, check_trace=False)
        for lengths in ([7, 7, 5], [3, 6], [4, 1, 1, 2]):
            call = torch.randn(max(lengths), len(lengths), 4), torch.tensor(lengths)
            torch.testing.assert_close(traced(*call), model(*call))


@pytest.mark.parametrize(
    "module",
    [ISSLSTM(4, 5), ISSGRUCell(4, 5), nn.Sequential(ISSRHN(4, 5)), prepare(ISSLSTM(4, 5))],
    ids=lambda module: type(module).__name__,
)
def test_script_refuses_with_a_sentence(module):
    with pytest.raises(RuntimeError, match="^torch.jit.script: expected modules that it can"):
        torch.jit.script(module)


def batch_dims(state, batch):
    """dynamic_shapes for hx, in its own form: [..., B, size]."""
    if torch.is_tensor(state):
        return {state.dim() - 2: batch}
    return tuple(batch_dims(part, batch) for part in state)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden_size", [7, [(3, 5), 2]], ids=["equal sizes", "unequal sizes"])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_an_exported_module_keeps_t_and_b_open(kind, hidden_size, training):
    module = kind(4, hidden_size, num_layers=2, bidirectional=True)
    steps, batch = Dim("T", min=2, max=50), Dim("B", min=2, max=50)
    for with_state in (False, True):

        @torch.no_grad()
        def arguments(*shape, with_state=with_state):
            x = torch.randn(*shape, 4)
            return (x, module(x)[1]) if with_state else (x,)

        given = arguments(5, 2)
        dims = ({0: steps, 1: batch}, *(batch_dims(hx, batch) for hx in given[1:]))
        with torch.set_grad_enabled(training):
            exported = export(module, given, dynamic_shapes=dims).module()
        for shape in ((5, 2), (9, 3), (2, 7)):
            args = arguments(*shape)
            torch.testing.assert_close(exported(*args), module(*args))


def ragged(*lengths):
    return torch.randn(max(lengths) + 1, len(lengths), 4), torch.tensor(lengths)


@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_an_exported_module_keeps_lengths_open(kind):
    model = Ragged(kind(4, [(3, 5), 2], 2, bidirectional=True), packed=False)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    exported = export(model, ragged(7, 2, 5), dynamic_shapes=sizes).module()
    for call in (ragged(7, 2, 5), ragged(3, 9, 1, 8), ragged(2, 2)):
        torch.testing.assert_close(exported(*call), model(*call))
    x, _ = ragged(4, 4)
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        exported(x, torch.tensor([6, 1]))
    with pytest.raises(RuntimeError, match="expected batch_sizes to start at B = 2"):
        exported(x, torch.tensor([4, 0]))


def test_export_refuses_packed_sequences_with_a_sentence():
    with pytest.raises(RuntimeError, match="^torch.export: expected LSTM to get the padded input"):
        export(Ragged(LSTM(4, 5), packed=True), ragged(7, 2, 5))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_packed_batches_and_lengths_are_right_around_a_compiled_module(kind, training):
    """Their sizes are data, which no graph holds; what is compiled must not fix them."""
    torch.compiler.reset()
    module = kind(4, 7, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.set_grad_enabled(training):
        for lengths in ([5, 3], [4, 4, 1], [2, 7, 3, 1]):
            x = torch.randn(max(lengths), len(lengths), 4)
            torch.testing.assert_close(compiled(x, None, lengths), module(x, None, lengths))
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            torch.testing.assert_close(compiled(packed)[0].data, module(packed)[0].data)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=lambda kind: kind.name)
def test_inductor_compiles_a_module(kind):
    module = kind(4, 7).eval()
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    torch._dynamo.reset()
