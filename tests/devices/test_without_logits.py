"""With ``outputs="loss"`` the allocator never holds the logits of more than the microbatches in flight."""

from __future__ import annotations

import pytest
import torch
from machines import LATE
from scenes import piped
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES, ROWS, MICROBATCHES = 8, 2048, 64, 16
LOGITS = ROWS * CLASSES * 4  # bytes


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES, bias=False))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def peak(outputs: str) -> tuple[int, float, int]:
    """Bytes that the last device takes in a step beyond those before it, the loss, and what the plan predicts."""
    torch.manual_seed(0)
    pipe = piped(Classifier(), LATE, where=(0, 1), microbatches=MICROBATCHES, outputs=outputs, verify="never")
    x, labels = torch.randn(ROWS, WIDTH), torch.randint(CLASSES, (ROWS,))
    for _ in range(2):
        pipe.zero_grad()
        torch.accelerator.synchronize(1)
        torch.accelerator.reset_peak_memory_stats(1)
        before = torch.accelerator.memory_allocated(1)
        out = pipe(x, labels)
        out["loss"].backward()
        most = torch.accelerator.max_memory_allocated(1) - before
        loss = out["loss"].item()
        del out
    return most, loss, pipe.pipeline.memory.stages[-1].outputs


def test_logits_are_not_kept() -> None:
    LATE.start()
    (every, loss, kept), (only, same, left) = peak("all"), peak("loss")
    assert loss == pytest.approx(same)
    assert kept > 2 * LOGITS - 1 > left
    assert only < every - LOGITS  # at least one copy of them; the joined ones are a second
    assert only < 6 * LOGITS // MICROBATCHES + CLASSES * WIDTH * 8
