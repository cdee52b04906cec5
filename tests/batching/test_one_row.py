"""A batch of one row is not divided, so what mixes its samples is no obstacle; larger batches get their own capture."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_same, step
from test_facade import loss_of
from torch import Tensor, nn
from toys import D

import pipecompile
from pipecompile.errors import CaptureError


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.mixes = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.mixes:
            h = h - h.mean(0, keepdim=True) / 2
        return self.second(h).square().mean()


def test_one_row_cannot_mix_with_others() -> None:
    model = Mixes().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    for _ in range(2):
        call = (torch.randn(1, D, dtype=torch.float64),), {}
        assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert pipe.pipeline.captures == 1
    with pytest.raises(CaptureError, match="samples of the batch mix here"):
        pipe(torch.randn(4, D, dtype=torch.float64))


def test_a_first_batch_of_one_row_does_not_end_pipelining() -> None:
    model = Mixes().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    pipe(torch.randn(1, D, dtype=torch.float64))
    pipe.mixes = model.mixes = False
    for rows in (1, 4):
        call = (torch.randn(rows, D, dtype=torch.float64),), {}
        assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert "0F1" in str(pipe.pipeline.program)
