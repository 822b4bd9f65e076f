# SPDX-License-Identifier: Apache-2.0
"""Training loops and modules of others, pruned and prepared: make test-models.

A test whose package is missing is skipped.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import iss_kernels as iss

# What these packages use of torch is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


class Model(nn.Module):
    """Repeats what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 24, 2, batch_first=True)
        self.head = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])  # type: ignore[no-any-return]


def loss_of(model: Any, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())


def batches() -> DataLoader[Any]:
    torch.manual_seed(0)
    x = torch.randint(0, 20, (64, 6))
    return DataLoader(TensorDataset(x), batch_size=8)


def sizes_of(model: Model) -> list[int]:
    return [model.lstm.get_parameter(f"weight_hh_l{layer}").shape[1] for layer in range(2)]


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(v, w) for (n, v), (m, w) in pairs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str, tmp_path: Path) -> None:
    """Six epochs are three, and three after a checkpoint, whatever sizes it has."""
    pl = pytest.importorskip("pytorch_lightning")
    (code,) = re.findall(r"```python\n(class Sparse.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {"iss": iss, "pl": pl, "torch": torch}
    exec(compile(code, str(PAGE), "exec"), names)

    class Task(names["Sparse"]):  # type: ignore[misc]
        example = torch.zeros(2, 6, dtype=torch.int64)

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Model()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return loss_of(self.model, batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]

        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.lasso = iss.GroupLasso(self.groups, strength=0.003)

    def trained(epochs: int, folder: str, resume: Path | None = None) -> Any:
        task = Task()
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", precision=precision, logger=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
            callbacks=[pl.callbacks.ModelCheckpoint(tmp_path / folder, save_last=True)],
        )  # fmt: skip
        trainer.fit(task, batches(), ckpt_path=resume)
        return task

    whole = trained(6, "whole")
    half, last = trained(3, "half"), tmp_path / "half" / "last.ckpt"
    resumed = trained(6, "half", last)
    assert 0 < sum(sizes_of(whole.model)) < sum(sizes_of(half.model)) < 48
    assert same(whole, resumed)
    loaded = Task.load_from_checkpoint(tmp_path / "whole" / "last.ckpt")
    assert same(whole, loaded)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    """As Lightning; with gradients summed over two batches."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def run(epochs: range, resume: bool) -> tuple[Model, iss.Groups]:
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        torch.manual_seed(0)
        bare = Model()
        optimizer = torch.optim.AdamW(bare.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.7)
        model, optimizer, data, schedule = accelerator.prepare(bare, optimizer, batches(), schedule)
        bare = accelerator.unwrap_model(model)
        groups = iss.find_groups(bare, torch.zeros(2, 6, dtype=torch.int64))
        if resume:
            kept = torch.load(tmp_path / "kept.pt")
            _, groups = iss.shrink_(bare, groups, optimizer=optimizer, keep=kept)
            accelerator.load_state(str(tmp_path / "state"))
        lasso = iss.GroupLasso(groups, strength=0.003)
        for _ in epochs:
            for (x,) in data:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, x))
                    optimizer.step()
                    if accelerator.sync_gradients:
                        lasso.proximal_(optimizer)
                    schedule.step()
                    optimizer.zero_grad()
            _, groups = iss.shrink_(bare, groups, optimizer=optimizer, lasso=lasso)
        accelerator.save_state(str(tmp_path / "state"))
        torch.save(groups.kept, tmp_path / "kept.pt")
        return bare, groups

    whole, groups = run(range(8), False)
    half, _ = run(range(4), False)
    resumed, again = run(range(4, 8), True)
    assert 0 < sum(sizes_of(whole)) < sum(sizes_of(half)) < 48
    assert same(whole, resumed)
    assert all(torch.equal(units, again.kept[name]) for name, units in groups.kept.items())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl(kind: str) -> None:
    """Sequences that begin anew inside a batch, which TorchRL cuts, pads and gives a mask."""
    rl = pytest.importorskip("torchrl.modules")
    td = pytest.importorskip("tensordict")

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make, module = getattr(rl, f"{kind}Module"), td.nn.TensorDictModule
            self.layers = td.nn.TensorDictSequential(
                module(nn.Linear(4, 6), ["observation"], ["x"]),
                make(input_size=6, hidden_size=12, in_key="x", out_key="y"),
                make(input_size=12, hidden_size=8, in_key="y", out_key="z"),
                module(nn.Linear(8, 2), ["z"], ["action"]),
            )

        def forward(self, observation: Tensor, is_init: Tensor) -> Tensor:
            given = {"observation": observation, "is_init": is_init}
            with rl.set_recurrent_mode(True):
                after = self.layers(td.TensorDict(given, observation.shape[:2]))
            return after["action"]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    is_init = torch.zeros(3, 7, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[1, 4] = is_init[2, 2] = True
    example = torch.randn(3, 7, 4), is_init
    policy = Policy()
    groups = iss.find_groups(policy, example)
    assert [family.size for family in groups.families] == [12, 8]
    groups.zero_units_({f.name: torch.arange(f.size) > 4 for f in groups.families})
    expected = policy(*example)
    small, _ = iss.shrink(policy, groups)
    torch.testing.assert_close(small(*example), expected)
    with torch.no_grad():
        torch.testing.assert_close(iss.prepare(small)(*example), expected)
