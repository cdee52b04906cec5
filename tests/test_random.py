"""Random models, split at random, give the numbers of the unsplit model over the same microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from random import Random

import pytest
import torch
from oracle import Inputs, assert_same, microbatched, step
from random_models import D, RandomModel

import pipecompile

COUNT = 40


def inputs(length: int) -> Inputs:
    generator = torch.Generator().manual_seed(length)
    x, late = torch.randn(2, 4, length, D, dtype=torch.float64, generator=generator)
    return (x, late), {}


def built(seed: int) -> RandomModel:
    torch.manual_seed(seed)
    return RandomModel(seed).double()


def seeds() -> Iterator[int]:
    """Those whose models train in eager mode: some write what autograd has saved."""
    for seed in count():
        model = built(seed)
        try:
            step(model, model, model.loss, inputs(3))
        except RuntimeError:
            continue
        yield seed


@pytest.mark.parametrize("seed", list(islice(seeds(), COUNT)))
def test_a_random_model_gives_the_unsplit_models_numbers(seed: int) -> None:
    model, draw = built(seed), Random(seed)
    stages, microbatches = draw.choice([2, 3, 4]), draw.choice([1, 2, 4])
    schedule = draw.choice(["sequential", "gpipe", "1f1b"])
    pipe = pipecompile.compile(
        model, devices=["cpu"] * stages, schedule=schedule, microbatches=microbatches, profile="count"
    )
    for length in (3, 5, 3):
        actual = step(pipe, model, model.loss, inputs(length))
        assert_same(actual, microbatched(model, model.loss, inputs(length), microbatches, model.inside))
