"""The unsplit model, run on the microbatches one by one: outputs of any kind are joined as the stages join them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile

ENDS: dict[str, Callable[[Tensor, nn.Linear], Any]] = {
    "a sum": lambda h, _: h.sum(),
    "a mean": lambda h, _: h.mean(),
    "a sum and a mean": lambda h, _: (h.sum(), h.mean(), h),
    "over the rows": lambda h, _: h.sum() / h.shape[0],
    "a vector": lambda h, _: h.sum(0),
    "two views": lambda h, _: torch.cat([h, 2 * h]),
}
OF_BOTH: dict[str, Callable[[Tensor, nn.Linear], Any]] = {
    "a sum and a penalty": lambda h, last: h.sum() + last.weight.square().sum(),
    "a sum plus a mean": lambda h, _: h.sum() + h.square().mean(),
}


class Branches(nn.Module):
    """Is kept whole, so it may be compared on the same microbatches only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h if h.sum() > 1e9 else h.tanh())


class Ends(nn.Module):
    def __init__(self, end: Callable[[Tensor, nn.Linear], Any]) -> None:
        super().__init__()
        self.first, self.branches, self.last, self.end = nn.Linear(4, 4), Branches(), nn.Linear(4, 4), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.last(self.branches(self.first(x))), self.last)


def total(out: Any) -> Tensor:
    parts = out if isinstance(out, tuple) else (out,)
    return sum(((part * torch.arange(1.0, part.numel() + 1).view_as(part)).sum() for part in parts), torch.zeros(()))


@pytest.mark.parametrize("end", ENDS)
def test_any_output_is_compared_on_the_same_microbatches(end: str) -> None:
    torch.manual_seed(0)
    model, x = Ends(ENDS[end]).double(), torch.randn(8, 4, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    assert_same(step(pipe, pipe, total, ((x,), {})), step(model, model, total, ((x,), {})))
    assert any(
        "on the same microbatches, since module 'branches' is kept" in line for line in pipe.pipeline.report.verified
    )


@pytest.mark.filterwarnings("ignore:not compared with the unsplit model")
@pytest.mark.parametrize("end", OF_BOTH)
def test_a_sum_that_is_also_a_mean_is_not_compared_part_by_part(end: str) -> None:
    torch.manual_seed(0)
    model, x = Ends(OF_BOTH[end]).double(), torch.randn(8, 4, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    assert_same(step(pipe, pipe, total, ((x,), {})), step(model, model, total, ((x,), {})))
    assert any("no plain sum or mean over the rows" in line for line in pipe.pipeline.report.verified)
