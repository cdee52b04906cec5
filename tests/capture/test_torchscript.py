"""Functions that ``torch.jit.script`` has compiled, inside a model."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, mean_square

import pipecompile


def rows_of(count: int) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_function_is_traced_as_the_python_that_it_was_made_from() -> None:
    @torch.jit.script
    def clamped(h: Tensor, bound: float) -> Tensor:
        return (h / bound).tanh() * bound

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(clamped(self.first(x), 2.0))

    model = Scripted()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    for rows in (4, 6):
        inputs = (rows_of(rows),), {}
        assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))
    assert pipe.pipeline.captures == 1
    assert not any("kept whole" in note for note in pipe.pipeline.report.notes)
