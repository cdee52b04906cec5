"""A step never makes the host wait: the caller, who reads the loss, is the only one who does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scenes
import torch
import virtual_device as vd
from machines import LATE
from scenes import Net, built, floats, ids, piped
from torch import nn
from torch.nn import functional as F
from toys import Tied

from pipecompile import Batching, PlanOptions

SGD = {"schedule": "pipedream", "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "sequential": {"schedule": "sequential"},
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "pipedream": SGD,
    "three stages": {"where": (0, 1, 2)},
    "recomputed": {"plan": PlanOptions(recompute="always")},
    "replicas": {"where": (0, 1, 2), "plan": PlanOptions(replicas=[1, 2])},
    "batch norm": {"make": lambda: Net(lambda: nn.BatchNorm1d(scenes.D))},
    "deferred": {"make": lambda: Net(lambda: nn.BatchNorm1d(scenes.D)), "batching": Batching(batch_norm="deferred")},
    "dropout": {"make": lambda: Net(lambda: nn.Dropout(0.3))},
    "tail": {"make": scenes.Contrastive},
    "checkpoint": {"make": scenes.Checkpointed},
}


def waits_of(step: Callable[[], Any], warm: int = 2) -> dict[str, int]:
    for _ in range(warm):
        step()
    vd.waits()
    for _ in range(2):
        step()
    return vd.waits()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_waits_for_nothing(name: str) -> None:
    LATE.start()
    options = dict(OPTIONS[name])
    pipe = piped(built(options.pop("make", Net)), LATE, **options)
    optimizer = None if "optimizer" in options else torch.optim.Adam(pipe.parameters(), foreach=True)

    def step() -> None:
        loss = pipe(*floats(0))
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert waits_of(step) == {}


def test_a_step_with_the_loss_outside_waits_for_nothing() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    x, y = (tensor.to(LATE[1]) for tensor in floats(0))
    assert waits_of(lambda: F.mse_loss(pipe(x), y).backward()) == {}


def test_a_step_with_tied_weights_waits_for_nothing() -> None:
    LATE.start()
    pipe = piped(built(Tied), LATE, plan=PlanOptions(pins={"embedding": 0, "head": 1}))
    assert waits_of(lambda: pipe(*ids(0))[0].backward()) == {}


def test_an_evaluation_waits_for_nothing() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE).eval()
    with torch.no_grad():
        assert waits_of(lambda: pipe(floats(0)[0])) == {}


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.round(decimals=3)


class WithRounded(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.mse_loss(self.head(Rounded.apply(self.layers(x))), y)


def test_a_backward_that_may_not_be_linear_reads_the_gradient_of_the_loss() -> None:
    LATE.start()
    pipe = piped(built(WithRounded), LATE)
    assert waits_of(lambda: pipe(*floats(0)).backward()) == {"aten::_local_scalar_dense": 2}  # one in each of two steps


def test_to_read_the_loss_is_one_wait() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    assert waits_of(lambda: pipe(*floats(0)).item()) == {"aten::_local_scalar_dense": 2}
