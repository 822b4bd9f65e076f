# SPDX-License-Identifier: Apache-2.0
"""torch.func and forward-mode differentiation over modules and the norms are those of torch."""

import pytest
import torch
from kinds import KINDS, every_kind, tensors_in
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from iss_kernels import ops, reference

# torch has no batching rule for the LSTM of oneDNN.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

T, B, I, H = 4, 3, 2, 5  # noqa: E741  (the letter of the shape alphabet)


def both(kind=KINDS["lstm"], **options):
    """torch's module in float64, and ours with its parameters."""
    torchs = kind.of_torch(I, H, 2, dtype=torch.float64, **options)
    return torchs, kind.ours.from_torch(torchs)


def y_of(module):
    return lambda x: module(x)[0]


def loss_of(module):
    def loss(weights, x, target):
        y, states = functional_call(module, weights, (x[:, None],))
        return (y[:, 0] - target).square().sum() + tensors_in(states)[-1].sin().sum()

    return loss


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


X = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).reshape(T, B, I)
TARGET = torch.linspace(1, -1, T * B * H, dtype=torch.float64).reshape(T, B, H)

TRANSFORMS = {
    "grad": lambda m: grad(lambda x: m(x)[0].square().sum())(X),
    "vjp": lambda m: vjp(y_of(m), X)[1](TARGET),
    "jvp": lambda m: jvp(y_of(m), (X,), (X.cos(),)),
    "jacrev": lambda m: jacrev(y_of(m))(X),
    "jacfwd": lambda m: jacfwd(y_of(m))(X),
    "hessian": lambda m: hessian(lambda x: m(x)[0].square().sum())(X[:2]),
    "gradients of weights": lambda m: grad(loss_of(m))(weights_of(m), X[:, 0], TARGET[:, 0]),
}


@every_kind
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_transforms_are_those_of_torch(kind, transform, recompute):
    torchs, ours = both(kind)
    ours.recompute = recompute
    expected, got = (TRANSFORMS[transform](module) for module in (torchs, ours))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_kind
def test_gradients_per_sample_are_those_of_each_sample(kind):
    torchs, ours = both(kind)
    got = vmap(grad(loss_of(ours)), (None, 1, 1))(weights_of(ours), X, TARGET)
    for row in range(B):
        expected = grad(loss_of(torchs))(weights_of(torchs), X[:, row], TARGET[:, row])
        torch.testing.assert_close({name: g[row] for name, g in got.items()}, expected)


@every_kind
def test_an_ensemble_is_its_members(kind):
    members = [kind(I, H, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    weights, buffers = stack_module_state(members)

    def call(weights, x):
        return functional_call(members[0], (weights, buffers), (x,))[0]

    alone = torch.stack([member(X)[0] for member in members])
    torch.testing.assert_close(vmap(call, (0, None))(weights, X), alone)
    torch.testing.assert_close(vmap(call)(weights, torch.stack([X] * 3)), alone)


@every_kind
def test_a_packed_batch_can_be_transformed(kind):
    torchs, ours = both(kind, bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(X, [4, 3, 1])

    def loss(module):
        return lambda data: module(packed._replace(data=data))[0].data.square().sum()

    data = packed.data.clone().requires_grad_()  # torch's packed form knows no torch.func
    (expected,) = torch.autograd.grad(loss(torchs)(data), data)
    torch.testing.assert_close(grad(loss(ours))(packed.data), expected)


@every_kind
def test_forward_mode_has_the_tangent_of_torch(kind):
    torchs, ours = both(kind)
    expected = jvp(y_of(torchs), (X,), (X.cos(),))[1]
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            dual = ours(forward_ad.make_dual(X, X.cos()))[0]
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


@every_kind
def test_batched_cotangents(kind):
    torchs, ours = both(kind)
    cotangents = torch.stack([TARGET, TARGET.sin()])
    x = X.clone().requires_grad_()
    expected, got = (
        torch.autograd.grad(m(x)[0], x, cotangents, is_grads_batched=True) for m in (torchs, ours)
    )
    torch.testing.assert_close(got, expected)


def test_the_kernels_run_where_no_transform_is_active(monkeypatch):
    _, ours = both()
    monkeypatch.delattr(reference, "recurrent")
    ours(X)
    with pytest.raises(AttributeError):
        vmap(y_of(ours))(X[None])


def test_a_transform_compiles_as_one_graph():
    torchs, ours = both()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: grad(lambda x: ours(x)[0].square().sum())(x), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(X), TRANSFORMS["grad"](torchs))
    torch.compiler.reset()


NORMS = {
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "gradients per sample": lambda f, w: vmap(grad(lambda w: f(w).sum()))(torch.stack([w, w + 1])),
    "jvp": lambda f, w: jvp(f, (w,), (w.cos(),)),
    "hessian": lambda f, w: hessian(lambda w: f(w).sum())(w),
}


@pytest.mark.parametrize("transform", list(NORMS))
def test_transforms_of_the_norms_are_those_of_the_definition(transform):
    rows = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    columns = torch.tensor([2, 1, -1], dtype=torch.int32)

    def norms(function):
        return lambda w: function([w], [rows], [columns], 3, 1e-8, False)

    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    expected, got = (
        NORMS[transform](norms(f), w) for f in (reference.group_norms, ops.group_norms)
    )
    torch.testing.assert_close(got, expected)


COUNTS = torch.tensor([4, 1, 3])
FORMS = {"lengths": {"lengths": COUNTS}, "mask": {"mask": torch.arange(T)[:, None] < COUNTS}}


@every_kind
@pytest.mark.parametrize("form", list(FORMS))
def test_transforms_follow_rows_of_their_own_length(kind, form):
    _, ours = both(kind)
    options = FORMS[form]
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ours(x, **options)[0].square().sum(), x)
    got = grad(lambda x: ours(x, **options)[0].square().sum())(X)
    torch.testing.assert_close(got, expected)
    y, tangent = jvp(lambda x: ours(x, **options)[0], (X,), (X.cos(),))
    torch.testing.assert_close(y, ours(X, **options)[0])
    torch.testing.assert_close((tangent * y * 2).sum(), (expected * X.cos()).sum())
    both_at_once = vmap(lambda x: ours(x, **options)[0])(torch.stack([X, X.sin()]))
    torch.testing.assert_close(both_at_once[1], ours(X.sin(), **options)[0])
