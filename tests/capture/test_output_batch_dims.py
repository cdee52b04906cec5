"""Outputs of several microbatches are joined along the dimension that grows with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, mean_square

import pipecompile
from pipecompile.capture import capture, read_call
from pipecompile.capture.output_batch_dims import with_batch_dims

ROWS = 2  # of a microbatch; many other dimensions below have this size


class Fixed(nn.Module):
    """Unrolls its rows in Python, so that the trace holds for one number of them alone."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.make = make
        self.double()

    def forward(self, x: Tensor) -> Any:
        rows = [self.first(row) for row in x]
        return self.make(self.last(torch.stack(rows)))


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "first": (lambda h: h, 0),
    "second": (lambda h: h.unsqueeze(0), 1),
    "second of two alike": (lambda h: torch.stack([h, -h]), 1),
    "last": (lambda h: h[:, :ROWS].mT, 1),
    "twice the rows": (lambda h: h.reshape(-1, D // 2), 0),
}


def floats(batch: int) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("make", "dim"), SHAPES.values(), ids=SHAPES)
def test_an_output_grows_along_one_dimension_even_where_the_batch_is_a_number(make: Any, dim: int) -> None:
    model = Fixed(make)
    call = read_call(model.forward, (floats(4),), {})
    found = with_batch_dims(capture(model, call, ROWS), lambda: capture(model, call))
    assert [output.batch_dim for output in found.outputs] == [dim]
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    with pytest.warns(UserWarning, match="run as one microbatch"):  # it is another program for other rows
        ran = step(pipe, model, mean_square, ((floats(4),), {}))
    assert_same(ran, step(model, model, mean_square, ((floats(4),), {})))


@pytest.mark.parametrize("make", [lambda h: {"rows": [row[:ROWS] for row in h]}, lambda h: h.sum(0)[:ROWS]])
def test_outputs_that_parts_could_not_be_joined_to_are_those_of_one_microbatch(make: Any) -> None:
    model = Fixed(make)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    with pytest.warns(UserWarning, match="run as one microbatch"):
        found = pipe(floats(4))
    torch.testing.assert_close(found, model(floats(4)))
