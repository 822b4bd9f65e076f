# SPDX-License-Identifier: Apache-2.0
"""The group Lasso of a language model against plain torch and memory; check, then time.

python bench/bench_lasso.py [--quick] [--threads N ...] [--output CSV]

For the LSTM weights and the output layer of each model:

    norms      of all groups: reads the weights         beside w.sum(), the least that can be read
    gradient   added in place, given the norms          reads weights, reads and writes gradients
    penalty    norms and gradient, as a training step   beside autograd of the reference
    proximal   scaling in place, given the norms        reads and writes the weights
    threshold  in place                                 reads and writes the weights

and a whole training step, with and without `GroupLasso.add_gradients_`. Bytes are those that must
move, each once; `bandwidth` is their rate as a fraction of the measured rate of reading a working
set of this size (roofline.py). Memory may read and write at once, so that what writes can exceed 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import RESULTS, Row, command_line, each, output_of, p50, recording, timed_rows
from roofline import roofline
from torch import Tensor
from torch.nn.functional import cross_entropy

from iss_kernels import GroupLasso, find_groups, ops, reference
from iss_kernels.demo.model import LanguageModel
from iss_kernels.testing import assert_no_worse_than_torch

EPS = 1e-8


@dataclass(frozen=True)
class Model:
    """A language model of some LSTM layers of equal size."""

    vocabulary: int
    hidden: int
    layers: int = 2

    def build(self) -> LanguageModel:
        """With embeddings as wide as the layers, as in Zaremba et al. 2014; without dropout."""
        return LanguageModel(self.vocabulary, self.hidden, self.hidden, self.layers, 0.0)

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}, {self.vocabulary} words"


MODELS = [Model(10_000, 1500), Model(10_000, 650), Model(10_000, 200), Model(50, 64)]
TRAINED = [Model(10_000, 650), Model(1_621, 384)]  # the second: the demo's
STEPS, BATCH = 35, 20
QUICK = Model(50, 64)


@dataclass(frozen=True)
class Problem:
    """What the ops take, for one model: weights [R, C], labels [R] and [C]; factors [units]."""

    weights: list[Tensor]
    rows: list[Tensor]
    columns: list[Tensor]
    units: int
    grads: list[Tensor]
    factors: Tensor

    @staticmethod
    def of(model: Model, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Factors so close to 0 that thousands of calls leave the gradients small."""
        torch.manual_seed(0)
        module = model.build().to(dtype)
        groups = find_groups(module, torch.zeros(2, 1, dtype=torch.long))
        weights = [parameter.detach().to(device) for parameter in groups.parameters()]
        wide = torch.promote_types(dtype, torch.float32)
        factors = torch.full((groups.units,), 1e-6, dtype=wide, device=device)
        labels = [
            [w.row_units.to(device) for w in groups.weights],
            [w.column_units.to(device) for w in groups.weights],
        ]
        grads = [torch.zeros_like(w) for w in weights]
        return Problem(weights, labels[0], labels[1], groups.units, grads, factors)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(w.numel() * w.element_size() for w in self.weights)

    def labelled(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The arguments that every op has."""
        return self.weights, self.rows, self.columns

    def torch_norms(self) -> Tensor:
        return reference.group_norms(*self.labelled(), self.units, EPS, False)

    def our_norms(self) -> Tensor:
        return ops.group_norms(*self.labelled(), self.units, EPS, False)

    def torch_gradient(self, factors: Tensor) -> None:
        for grad, weight, rows, columns in zip(self.grads, *self.labelled(), strict=True):
            grad += reference.scaled_by_units(weight, rows, columns, factors, False)

    def our_gradient(self, factors: Tensor) -> None:
        ops.add_scaled_by_units_(self.grads, *self.labelled(), factors, False)

    def autograd(self) -> None:
        leaves = [w.requires_grad_() for w in self.weights]
        norms = reference.group_norms(leaves, self.rows, self.columns, self.units, EPS, False)
        torch.autograd.backward(torch.dot(self.factors, norms))
        for w in self.weights:
            w.requires_grad_(False)

    def torch_proximal(self, factors: Tensor) -> None:
        for weight, rows, columns in zip(*self.labelled(), strict=True):
            weight.copy_(reference.scaled(weight, rows, columns, factors))

    def our_proximal(self, factors: Tensor) -> None:
        ops.scale_by_units_(*self.labelled(), factors)

    def torch_threshold(self) -> None:
        for weight, rows, columns in zip(*self.labelled(), strict=True):
            weight.copy_(reference.thresholded(weight, rows, columns, 0.0))

    def our_threshold(self) -> None:
        ops.threshold_(*self.labelled(), 0.0)

    def check(self) -> None:
        """Ours is no worse than torch, against float64."""
        wide = [w.double() for w in self.weights]
        truth = reference.group_norms(wide, self.rows, self.columns, self.units, EPS, False)
        assert_no_worse_than_torch(self.our_norms(), self.torch_norms(), truth)
        factors = torch.linspace(-1, 1, self.units).to(self.factors)
        for weight, rows, columns in zip(*self.labelled(), strict=True):
            grad, scaled = torch.zeros_like(weight), weight.clone()
            ops.add_scaled_by_units_([grad], [weight], [rows], [columns], factors, False)
            true = reference.scaled_by_units(weight, rows, columns, factors, False)
            torch.testing.assert_close(grad, true.to(weight.dtype))
            ops.scale_by_units_([scaled], [rows], [columns], factors)
            torch.testing.assert_close(scaled, reference.scaled(weight, rows, columns, factors))


@dataclass(frozen=True)
class Kernel:
    """What is timed: functions by provider, and the bytes they move, in weights."""

    name: str
    moved: int
    working_set: int
    providers: dict[str, Callable[[], object]]


def kernels(problem: Problem) -> list[Kernel]:
    """Factors of 1 leave the weights as they are, and so does a threshold of 0."""
    one, factors = torch.ones_like(problem.factors), problem.factors

    def penalty() -> None:
        problem.our_gradient(1e-6 / problem.our_norms())

    return [
        Kernel("norms", 1, 1, {
            "w.sum()": lambda: sum(w.sum() for w in problem.weights),
            "torch": problem.torch_norms,
            "iss_kernels": problem.our_norms,
        }),
        Kernel("gradient", 3, 2, {
            "torch": lambda: problem.torch_gradient(factors),
            "iss_kernels": lambda: problem.our_gradient(factors),
        }),
        Kernel("penalty", 4, 2, {"torch autograd": problem.autograd, "iss_kernels": penalty}),
        Kernel("proximal", 2, 1, {
            "torch": lambda: problem.torch_proximal(one),
            "iss_kernels": lambda: problem.our_proximal(one),
        }),
        Kernel("threshold", 2, 1, {
            "torch": problem.torch_threshold,
            "iss_kernels": problem.our_threshold,
        }),
    ]  # fmt: skip


def columns_of(model: Model, dtype: str, threads: int) -> Row:
    """What a row says of its problem."""
    return {
        "layers": model.layers, "H": model.hidden, "vocabulary": model.vocabulary,
        "dtype": dtype, "threads": threads, "bytes": "", "gbps": "", "bandwidth": "",
    }  # fmt: skip


def measure(model: Model, dtype: torch.dtype, threads: int, seconds: float) -> list[Row]:
    """Rows for all kernels and providers of one model."""
    problem = Problem.of(model, dtype)
    problem.check()
    dtype_name = str(dtype).removeprefix("torch.")
    about = columns_of(model, dtype_name, threads)
    roof = roofline(threads)
    rows: list[Row] = []
    with torch.no_grad():
        for kernel in kernels(problem):
            with torch.set_grad_enabled(kernel.name == "penalty"):
                calls = {(kernel.name, name): call for name, call in kernel.providers.items()}
                new = timed_rows(calls, seconds, ("kernel", "provider"), about)
            moved = kernel.moved * problem.bytes
            bandwidth = roof.gbytes_per_s(kernel.working_set * problem.bytes)
            for row in new:
                gbps = moved / p50(row) / 1e6
                row |= {"bytes": moved, "gbps": f"{gbps:.2f}"}
                row |= {"bandwidth": f"{gbps / bandwidth:.3f}"}
            rows += new
            *others, ours = new
            print(
                f"{str(model):<21} {dtype_name:<9}x{threads} {kernel.name:<10}{p50(ours):10.4f} ms",
                f"{float(str(ours['bandwidth'])):5.2f} of {bandwidth:.0f} GB/s; ",
                ", ".join(f"{row['provider']} {p50(row) / p50(ours):.2f} x" for row in others),
            )
    return rows


def training(model: Model, threads: int, seconds: float) -> list[Row]:
    """Rows of a step of SGD with and without the penalty's gradient."""
    torch.manual_seed(0)
    module = model.build()
    lasso = GroupLasso(find_groups(module, torch.zeros(2, 1, dtype=torch.long)), 1e-5)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    words = torch.randint(model.vocabulary, (STEPS + 1, BATCH))

    def step(penalised: bool) -> None:
        optimizer.zero_grad()
        logits, _ = module(words[:-1])
        torch.autograd.backward(cross_entropy(logits.flatten(0, 1), words[1:].flatten()))
        if penalised:
            lasso.add_gradients_()
        optimizer.step()

    calls = {"training step": lambda: step(False), "with the lasso": lambda: step(True)}
    about = {"provider": "iss_kernels", **columns_of(model, "float32", threads)}
    rows = timed_rows(calls, seconds, ["kernel"], about)
    plain, penalised = map(p50, rows)
    print(
        f"{str(model):<21} float32  x{threads} training step {plain:.2f} ms,",
        f"with the lasso {penalised:.2f} ms: {penalised / plain - 1:+.1%}",
    )
    return rows


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "one small model, a few seconds")
    options = parser.parse_args()
    with recording(output_of(parser, options, RESULTS / "lasso.csv")) as rows:
        for threads in each(options.threads):
            for model in [QUICK] if options.quick else MODELS:
                for dtype in (torch.float32, torch.bfloat16):
                    rows += measure(model, dtype, threads, 0.1 if options.quick else 3.0)
            for model in [QUICK] if options.quick else TRAINED:
                rows += training(model, threads, 0.1 if options.quick else 20.0)


if __name__ == "__main__":
    main()
