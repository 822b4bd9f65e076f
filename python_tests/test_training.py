# SPDX-License-Identifier: Apache-2.0
"""ISSLSTM and GroupLasso inside what people train with: the steps are nn.LSTM's."""

import copy
import inspect
import math
import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from iss_kernels import ISSLSTM, GroupLasso, accelerate, find_groups
from iss_kernels.backend import supported_isas, use_isa
from iss_kernels.demo.model import LanguageModel, perplexity, windows

T, B, CLASSES = 6, 4, 5
STRENGTH = 1e-2


class Tagger(nn.Module):
    """A class for each time step; an nn.LSTM inside."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 7, num_layers=2)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def tagger(dtype=torch.float64):
    """With nn.LSTM, always the same one."""
    torch.manual_seed(1)
    return Tagger().to(dtype)


def data(dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(T, B, 3, dtype=dtype), torch.randint(CLASSES, (T, B))


def loss_of(model, x, classes):
    return cross_entropy(model(x).flatten(0, 1), classes.flatten())


def lasso_of(model):
    return GroupLasso(find_groups(model, data(next(model.parameters()).dtype)[0]), STRENGTH)


def both():
    """The same model with nn.LSTM and with ISSLSTM."""
    return tagger(), accelerate(tagger())


def assert_same_parameters(a, b, **tolerance):
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, **tolerance)


# -- optimisers ------------------------------------------------------------------------------------

OPTIMISERS = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"lr": 0.05},
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02},
    "Adamax": {"lr": 0.02},
    "LBFGS": {"lr": 0.5, "max_iter": 4},
    "Muon": {"lr": 0.02},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02},
    "RMSprop": {},
    "Rprop": {},
    "SGD": {"lr": 0.5, "momentum": 0.9},
}


def variants():
    """Every optimiser as it is, and with each way to run it that its arguments offer on a CPU."""
    for name, options in OPTIMISERS.items():
        offered = inspect.signature(getattr(torch.optim, name)).parameters
        yield pytest.param(name, options, id=name)
        for way in sorted({"foreach", "fused"} & set(offered)):
            yield pytest.param(name, options | {way: True}, id=f"{name}-{way}")


def test_no_optimiser_is_forgotten():
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c)}
    assert classes == {"Optimizer", "SparseAdam", *OPTIMISERS}  # of these, SparseAdam: no dense


@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_every_optimiser_makes_the_steps_it_makes_with_nn_lstm(name, options):
    x, classes = data()
    models, losses = both(), []
    for model in models:
        lasso = lasso_of(model)
        # Muon takes matrices alone, and works in bfloat16 whatever they are.
        trained = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
        optimiser = getattr(torch.optim, name)(trained, **options)

        def closure(model=model, optimiser=optimiser, lasso=lasso):
            optimiser.zero_grad()
            loss = loss_of(model, x, classes)
            loss.backward()
            return loss.detach() + lasso.add_gradients_()

        losses.append([float(optimiser.step(closure)) for _ in range(8)])
    assert losses[1][-1] < losses[1][0]
    rounding = 2**-8 * options["lr"] if name == "Muon" else 1e-9
    assert_same_parameters(*models, rtol=1e-9, atol=rounding)


def test_clipping_sees_the_gradient_of_the_lasso_too():
    x, classes = data()
    models, norms = both(), []
    for model in models:
        lasso = lasso_of(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(4):
            optimiser.zero_grad()
            loss_of(model, x, classes).backward()
            lasso.add_gradients_()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            torch.testing.assert_close(clipped, torch.tensor(0.1).double(), rtol=1e-4, atol=0)
            optimiser.step()
    torch.testing.assert_close(norms[4:], norms[:4], rtol=1e-9, atol=0)
    assert_same_parameters(*models, rtol=1e-9, atol=1e-9)
    first, *_ = both()
    (loss_of(first, x, classes) + lasso_of(first)()).backward()
    whole = torch.cat([p.grad.flatten() for p in first.parameters()]).norm()
    torch.testing.assert_close(norms[0], whole)


# -- automatic mixed precision ---------------------------------------------------------------------


def steps(model, dtype, scaler, count=4, weight=1):
    """Training steps under autocast to `dtype`; the scales after each. weight: of the loss."""
    x, classes = data(torch.float32)
    lasso = lasso_of(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5 / weight, momentum=0.9)
    scales = []
    for _ in range(count):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = weight * loss_of(model, x, classes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        lasso.add_gradients_()
        scaler.step(optimiser)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_steps_under_autocast_are_the_unscaled_ones(dtype):
    plain = accelerate(tagger(torch.float32))
    scaled = copy.deepcopy(plain)
    before = copy.deepcopy(plain)
    steps(plain, dtype, torch.amp.GradScaler("cpu", enabled=False))
    steps(scaled, dtype, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    # A power of two only moves the exponent: bits differ where float16 underflows without it.
    rounding = 0 if dtype == torch.bfloat16 else 2**-11
    assert_same_parameters(scaled, plain, rtol=0, atol=rounding)
    moved = [(p - q).abs().max() for p, q in zip(plain.parameters(), before.parameters())]  # noqa: B905
    assert min(moved) > 10 * rounding
    # And they are those of float32, to the rounding of the activations that autocast rounds.
    single = copy.deepcopy(before)
    steps(single, torch.float32, torch.amp.GradScaler("cpu", enabled=False))
    assert_same_parameters(scaled, single, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_with_an_infinite_gradient_is_skipped(dtype):
    model = accelerate(tagger(torch.float32))
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    assert steps(model, dtype, scaler, 1, weight=2**10) == [2.0**126]
    assert_same_parameters(model, before, rtol=0, atol=0)
    scales = steps(model, dtype, scaler, 140, weight=2**10)  # halved until all is finite
    assert scales[-1] == scales[-2] < 2.0**126
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.head.weight, before.head.weight)


def learnt(autocast):
    """A language model's perplexity after training on a text that counts up by one or two."""
    steps = torch.randint(1, 3, (4000,), generator=torch.Generator().manual_seed(0))
    words = (steps.cumsum(0) % 30).view(20, 200).t().contiguous()
    torch.manual_seed(0)
    model = LanguageModel(30, 16, 33, 2, dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        for tokens, targets in windows(words, 20):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return perplexity(model, words.t().flatten())


@pytest.mark.parametrize("isa", ["scalar_bf16", *supported_isas()[:1]])
def test_a_language_model_learns_as_well_in_bfloat16(isa):
    single = learnt(autocast=False)
    assert single < 2.2  # of 2 at best
    with use_isa(isa):
        assert abs(math.log(learnt(autocast=True) / single)) < 5e-3


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:.*is deprecated. Please switch to:DeprecationWarning"
)  # torch's
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_training_step_is_the_eager_one(backend):
    x, classes = data()
    eager = accelerate(tagger())
    compiled = copy.deepcopy(eager)
    values = []
    for model in (eager, compiled):
        lasso = lasso_of(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

        def loss(x, classes, model=model):
            return loss_of(model, x, classes)

        update = optimiser.step
        if model is compiled:
            torch.compiler.reset()
            loss = torch.compile(loss, fullgraph=True, backend=backend)
            update = torch.compile(optimiser.step, backend=backend)
        for _ in range(4):
            optimiser.zero_grad()
            value = loss(x, classes)
            value.backward()
            lasso.add_gradients_()
            update()
            values.append(value.detach())
    torch.testing.assert_close(values[4:], values[:4], rtol=1e-9, atol=1e-9)
    assert_same_parameters(compiled, eager, rtol=1e-9, atol=1e-9)


# -- activation checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(use_reentrant):
    torch.manual_seed(0)
    lstm = ISSLSTM(3, 7, num_layers=2, dropout=0.3, dtype=torch.float64)
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)

    def part(x, h, c):
        y, (h, c) = lstm(x, (h, c))
        return y, h, c

    def gradients(call):
        """Of two halves of the sequence, the state passed on, with dropout."""
        torch.manual_seed(3)
        h = c = torch.zeros(2, B, 7, dtype=torch.float64)
        outputs = []
        for piece in x.split(T // 2):
            y, h, c = call(piece, h, c)
            outputs.append(y)
        lstm.zero_grad()
        x.grad = None
        (torch.cat(outputs).square().sum() + h.sum() * c.sum()).backward()
        return [x.grad, *(p.grad.clone() for p in lstm.parameters())]

    def checkpointed(*args):
        return checkpoint(part, *args, use_reentrant=use_reentrant)

    assert all(map(torch.equal, gradients(checkpointed), gradients(part)))


# -- several processes -----------------------------------------------------------------------------


def train_on(model, x, classes, lasso, network):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(5):
        optimiser.zero_grad()
        loss_of(network, x, classes).backward()
        lasso.add_gradients_()
        optimiser.step()
        lasso.threshold_()


def train_a_share(rank, world_size, folder):
    """What each process of the test below does; it has a share of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    x, classes = (t.chunk(world_size, 1)[rank] for t in data())
    model = accelerate(tagger())
    train_on(model, x, classes, lasso_of(model), DistributedDataParallel(model))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    sharded = accelerate(tagger())
    lasso = lasso_of(sharded)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(
        ValueError, match="as a tensor that this process holds whole, got a DTensor"
    ):
        lasso.norms()
    torch.distributed.destroy_process_group()
    # Without an interpreter's end, at which torch aborts one time in twenty: also after DDP of an
    # nn.Linear, where the machine is busy.
    os._exit(0)


def test_two_processes_train_as_one_does_on_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(train_a_share, (2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = accelerate(tagger())
    train_on(alone, *data(), lasso_of(alone), alone)
    for name, parameter in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter, rtol=1e-10, atol=1e-12)
