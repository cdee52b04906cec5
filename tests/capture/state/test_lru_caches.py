"""A trace leaves nothing in the caches of the functions that it has run."""

from __future__ import annotations

from functools import lru_cache, wraps
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, mean_square

import pipecompile


@lru_cache
def positions(rows: int, width: int) -> Tensor:
    return torch.arange(rows * width, dtype=torch.float64).view(rows, width).cos()


def remembered(function: Any) -> Any:
    """A cache of its own on each module, made at the first call, as transformers has it."""

    @wraps(function)
    def call(self: Any, *args: Any) -> Any:
        if "cached" not in self.__dict__:
            self.cached = lru_cache(maxsize=1)(function.__get__(self))
        return self.cached(*args)

    return call


class OnFile(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * positions(int(h.shape[0]), D)


class OnModule(nn.Module):
    @remembered
    def positions(self, rows: int) -> Tensor:
        return torch.arange(rows * D, dtype=torch.float64).view(rows, D).sin()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.positions(int(h.shape[0]))


class OnClass(nn.Module):
    @staticmethod
    @lru_cache
    def positions(rows: int) -> Tensor:
        return torch.arange(rows * D, dtype=torch.float64).view(rows, D).sin()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.positions(int(h.shape[0]))


def decorated(function: Any) -> Any:
    """A cache that a decorator closes over."""
    inner = lru_cache(maxsize=1)(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return inner(*args)

    return call


class InClosure(nn.Module):
    @decorated
    def positions(self, rows: int) -> Tensor:
        return torch.arange(rows * D, dtype=torch.float64).view(rows, D).sin()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.positions(int(h.shape[0]))


@pytest.mark.parametrize("kind", [OnFile, OnModule, OnClass, InClosure])
@pytest.mark.parametrize("before", [False, True])
def test_the_model_and_later_captures_compute_anew_what_a_trace_has_remembered(kind: Any, before: bool) -> None:
    model = nn.Sequential(nn.Linear(D, D), kind(), nn.Linear(D, D)).double()
    x = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if before:
        model(torch.cat([x, x]))  # the caches are there, with another entry
    for _ in range(2):
        pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
        assert_same(step(pipe, model, mean_square, ((x,), {})), step(model, model, mean_square, ((x,), {})))
