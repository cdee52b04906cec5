"""``copy.deepcopy`` of tensors in a forward, as loggers and metrics make them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D

import pipecompile


class Logs(nn.Module):
    """Keeps a copy of a value, as a logger does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.kept = copy.deepcopy({"mean": h.detach().mean()})
        return self.second(h).square().mean()


class Reads(Logs):
    """Computes with copies. Two are of tensors that share memory, so they share memory."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        one, other, given = copy.deepcopy([h.detach(), h.detach(), x])
        one.mul_(2)
        self.kept = copy.deepcopy([x, x])[1]
        return self.second(h + one * other + given).square().mean()


@pytest.mark.parametrize("kind", [Logs, Reads])
def test_copies_are_those_of_the_unsplit_model(kind: type[Logs]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    call = (torch.randn(6, D, dtype=torch.float64),), {}
    for _ in range(2):
        runs = [step(module, module, lambda loss: loss, call) for module in (pipe, model)]
        assert_same(*runs)
        torch.testing.assert_close(pipe.kept, model.kept)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_copies_of_different_views_that_are_written_are_refused() -> None:
    class Views(Logs):
        def forward(self, x: Tensor) -> Tensor:
            one, other = copy.deepcopy([x, x[:, 1:]])
            other.mul_(2)
            return self.second(self.first(one).tanh()).square().mean()

    pipe = pipecompile.compile(Views(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(pipecompile.ExactnessError):
        pipe(torch.randn(6, D))


def test_a_tensor_with_a_history_is_not_copied() -> None:
    class Wrong(Logs):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(copy.deepcopy(self.first(x))).mean()

    pipe = pipecompile.compile(Wrong(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(pipecompile.CaptureError, match="Only Tensors created explicitly by the user"):
        pipe(torch.randn(4, D))
