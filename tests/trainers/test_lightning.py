"""Lightning on a pipe, beside the unsplit model. Run by ``make trainers``, where Lightning is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_facade import assert_equal, both, llama
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipecompile

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 32, (32, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Holds(lightning.LightningModule):  # type: ignore[misc]
    """Holds a pipe, as any other module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        self.losses.append(loss.item())
        self.log("train", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("validation", self.net(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Steps(Holds):
    """Steps by hand."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        loss = self.net(**batch).loss
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.clip_gradients(self.optimizers(), 0.1, "norm")
        self.optimizers().step()
        self.optimizers().zero_grad()


class Whole(lightning.LightningModule):  # type: ignore[misc]
    """Is compiled itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = llama()

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: Any, _: int) -> Any:
        return self(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


CASES: dict[str, tuple[type[Holds], Any]] = {
    "plain": (Holds, dict),
    "accumulated and clipped": (Holds, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "by hand": (Steps, dict),
    "bfloat16": (Holds, lambda: {"precision": "bf16-mixed"}),
    "SWA": (Holds, lambda: {"callbacks": [StochasticWeightAveraging(0.1, swa_epoch_start=1)], "max_epochs": 3}),
    "EMA": (Holds, lambda: {"callbacks": [EMAWeightAveraging()]}),
}


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    common = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return lightning.Trainer(**common | quiet | options)


def loader(rows: int = 32) -> Any:
    return DataLoader(ROWS[:rows], batch_size=8)


@pytest.mark.parametrize("case", CASES)
def test_lightning_trains_a_module_that_holds_a_pipe(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    pipe, model, _ = both("llama")
    made = [kind(pipe.float() if case == "bfloat16" else pipe), kind(model.float() if case == "bfloat16" else model)]
    for module in made:
        trainer(tmp_path, **options()).fit(module, loader(), loader(5))
    ours, theirs = made
    assert len(theirs.losses) >= 8
    near = 2e-2 if case == "bfloat16" else 1e-6
    assert ours.losses == pytest.approx(theirs.losses, rel=near)
    if case != "bfloat16":
        for name, value in model.state_dict().items():
            torch.testing.assert_close(pipe.state_dict()[name], value, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_of_lightning_goes_on(tmp_path: Path) -> None:
    ends = []
    for which in (0, 1):
        first, again = Holds(both("llama")[which]), Holds(both("llama")[which])
        once = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        once.fit(first, loader())
        once.save_checkpoint(tmp_path / "kept.ckpt")
        trainer(tmp_path).fit(again, loader(), ckpt_path=tmp_path / "kept.ckpt", weights_only=False)
        assert len(again.losses) == 4
        ends.append(dict(again.net.state_dict()))
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-6, atol=1e-8)


def test_a_lightning_module_that_is_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Whole().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    for module in (pipe, model):
        fitted = trainer(tmp_path)
        fitted.fit(module, loader())
        fitted.save_checkpoint(tmp_path / "whole.ckpt")
        again = Whole.load_from_checkpoint(tmp_path / "whole.ckpt", weights_only=False)
        assert_equal(dict(again.state_dict()), dict(module.float().state_dict()))
        module.double()
    assert pipe.pipeline.captures == 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(pipe.state_dict()[name], value, rtol=1e-6, atol=1e-8)
