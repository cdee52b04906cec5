"""A forward that writes to its caller's tensors leaves in them what the unsplit model leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile


class Net(nn.Module):
    def __init__(self, write: Callable[[Tensor], Any], inside: bool) -> None:
        super().__init__()
        self.write, self.inside = write, inside
        self.body = blocks(4).double()

    def forward(self, x: Tensor) -> Any:
        self.write(x)
        h = self.body(x)
        return mean_square(h) if self.inside else h


def double(x: Tensor) -> Tensor:
    return x.mul_(2)


def inplace_relu(x: Tensor) -> Tensor:
    return nn.ReLU(inplace=True)(x)


def first_column(x: Tensor) -> None:
    x[:, 0] = 1.0


def through_a_view(x: Tensor) -> Tensor:
    return x.view(-1, 2)[:, 1].add_(3)


def in_rows(x: Tensor) -> None:
    for row in range(2):
        x[:, row].zero_()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("write", [double, inplace_relu, first_column, through_a_view, in_rows])
def test_what_forward_writes_to_its_input(write: Callable[[Tensor], Any], inside: bool, microbatches: int) -> None:
    model = Net(write, inside)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=microbatches, costs="count")

    def loss(output: Tensor) -> Tensor:
        return output if inside else mean_square(output)

    for _ in range(2):
        x = torch.randn(4, D, dtype=torch.float64)
        mine, wanted = x.clone(), x.clone()
        expected = step(model, model, loss, ((wanted,), {}))
        assert_same(step(pipe, model, loss, ((mine,), {})), expected)
        torch.testing.assert_close(mine, wanted)
        with torch.no_grad():
            mine = x.clone()
            pipe(mine)
        torch.testing.assert_close(mine, wanted)


def test_an_input_that_is_read_alone_stays_as_it_is() -> None:
    model = Net(lambda x: x.relu(), inside=True)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    x = torch.randn(4, D, dtype=torch.float64)
    before, version = x.clone(), x._version
    pipe(x).backward()
    assert torch.equal(x, before)
    assert x._version == version


class Halves(nn.Module):
    """Writes to one half of its caller's tensor when the other has been read; loss inside or outside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.body, self.gain, self.inside = blocks(4).double(), nn.Parameter(torch.ones(D).double()), inside

    def forward(self, a: Tensor, b: Tensor) -> Any:
        h = self.body(b + 0.5)
        b.add_(1.0)
        h = a * self.gain * h
        return {"loss": mean_square(h), "h": h} if self.inside else h


@pytest.mark.parametrize(("inside", "from_beside"), [(True, True), (True, False), (False, False)])
def test_a_write_to_a_view_of_the_callers_tensor_keeps_what_backwards_read(inside: bool, from_beside: bool) -> None:
    model = Halves(inside)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")

    def loss(output: Any) -> Tensor:
        if not inside:
            return mean_square(output)
        return output["loss"] + mean_square(output["h"]) if from_beside else output["loss"]

    both = torch.randn(2, 4, D, dtype=torch.float64)
    mine, wanted = both.clone(), both.clone()
    expected = step(model, model, loss, (tuple(wanted), {}))
    assert_same(step(pipe, model, loss, (tuple(mine), {})), expected)
    torch.testing.assert_close(mine, wanted)
