# SPDX-License-Identifier: Apache-2.0
"""Training loops of others, pruned as docs/training.md says: make test-models.

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
