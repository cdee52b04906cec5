"""Random numbers of Python and numpy in a forward: those of the unsplit model, from the same seed, call after call."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from random import choice
from random import random as draw
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError

D = 6
CALLS = 5
GENERATOR = np.random.default_rng(4)


class Model(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(5)])
        self.body = body
        self.numpy = np.random.default_rng(3)
        self.python = random.Random(5)
        self.old = np.random.RandomState(6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self, torch.tanh(self.layers[0](x)))
        return self.layers[4](h)


def _mixed(self: Any, h: Tensor) -> Tensor:
    self.weight = random.random()
    return self.weight * self.layers[1](h) + (1 - self.weight) * self.layers[2](h)


def _layer_drop(self: Any, h: Tensor) -> Tensor:
    for layer in self.layers[1:4]:
        if self.training and random.uniform(0, 1) < 0.5:
            continue
        h = h + layer(h)
    return h


def _mixup(self: Any, h: Tensor) -> Tensor:
    lam = np.random.beta(0.4, 0.4)
    lam = max(lam, 1 - lam)
    return h * lam + self.layers[1](h) * (1.0 - lam)


def _noise(self: Any, h: Tensor) -> Tensor:
    return h * np.random.rand() + np.random.normal(0.0, 0.1) - h / (1 + np.random.uniform())


def _held(self: Any, h: Tensor) -> Tensor:
    return h * self.numpy.uniform(0.5, 1) + self.python.gauss(0, 1) * self.old.rand() + GENERATOR.random()


def _imported(self: Any, h: Tensor) -> Tensor:
    return choice([self.layers[1], self.layers[2]])(h) * draw()


def _whole_number(self: Any, h: Tensor) -> Tensor:
    return h.roll(random.randint(0, 2), -1) * np.random.randint(1, 3)


def _in_place(self: Any, h: Tensor) -> Tensor:
    h = self.layers[1](h)
    half = h[..., : D // 2]
    half *= random.random()
    half += np.random.rand()
    return h


def _where_only_a_number_goes(self: Any, h: Tensor) -> Tensor:
    return torch.lerp(h, self.layers[1](h), random.random())


def _array(self: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(np.random.randn(D))


def _order_of_features(self: Any, h: Tensor) -> Tensor:
    order = [*range(D)]
    random.shuffle(order)
    return h[..., order]


def _permutation(self: Any, h: Tensor) -> Tensor:
    return h[..., torch.from_numpy(np.random.permutation(D))]


def _seeded(self: Any, h: Tensor) -> Tensor:
    random.seed(3)
    return h * random.random()


def _swapped_order(self: Any, h: Tensor) -> Tensor:
    if np.random.rand() < 0.5:
        return h * random.random()
    return h * random.random() * random.random()


CASES: dict[str, tuple[Callable[..., Tensor], int]] = {  # with the captures of five calls
    "mixed": (_mixed, 1),
    "layer drop": (_layer_drop, 5),
    "mixup": (_mixup, 2),
    "noise": (_noise, 1),
    "held": (_held, 1),
    "imported": (_imported, 2),
    "whole number": (_whole_number, 4),
    "in place": (_in_place, 1),
    "where only a number goes": (_where_only_a_number_goes, CALLS),
    "array": (_array, CALLS),
    "order of features": (_order_of_features, CALLS),
    "permutation": (_permutation, CALLS),
    "seeded": (_seeded, 1),
    "swapped order": (_swapped_order, 2),
}


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(model: Model) -> list[str]:
    held = (model.numpy.bit_generator.state, model.python.getstate(), model.old.get_state())
    return [*map(str, (random.getstate(), np.random.get_state(), GENERATOR.bit_generator.state, *held))]


def steps(call: Callable[[Tensor], Tensor], model: Model) -> list[Any]:
    """Several steps from one seed: each one's output, gradients, the numbers kept, and the generators after it."""
    random.seed(1)
    np.random.seed(1)
    GENERATOR.bit_generator.state = np.random.default_rng(4).bit_generator.state
    found = []
    for seed in range(CALLS):
        model.zero_grad()
        out = call(inputs(seed))
        out.square().mean().backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        found.append((out.detach(), gradients, getattr(model, "weight", None), states(model)))
    return found


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (3, 4)])
@pytest.mark.parametrize(("body", "captures"), CASES.values(), ids=CASES)
def test_a_seed_gives_the_numbers_of_the_unsplit_model(
    body: Callable[..., Tensor], captures: int, stages: int, microbatches: int
) -> None:
    expected = steps(model := Model(body), model)
    model = Model(body)
    pipe = pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, costs="count")
    for mine, theirs in zip(steps(pipe, model), expected, strict=True):
        torch.testing.assert_close(mine[:2], theirs[:2])
        assert mine[2:] == theirs[2:]
    assert pipe.pipeline.captures == captures
    assert random.random.__self__ is random.choice.__self__  # type: ignore[attr-defined]
    assert type(model.numpy) is np.random.Generator


def test_a_capture_alone_draws_nothing() -> None:
    model = Model(_held)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    before = states(model)
    pipe.pipeline.prepare(inputs(0))
    assert states(model) == before


def test_a_generator_that_is_exchanged_is_the_one_that_draws() -> None:
    model, other = Model(_held), Model(_held)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    for seed in (1, 2):
        model.numpy, other.numpy = np.random.default_rng(seed), np.random.default_rng(seed)
        random.seed(seed)
        GENERATOR.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        mine = pipe(inputs(0))
        random.seed(seed)
        GENERATOR.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        torch.testing.assert_close(mine, other(inputs(0)))


def test_draws_that_are_not_seen_are_refused() -> None:
    hidden = [random.Random(3).random]

    def body(self: Any, h: Tensor) -> Tensor:
        return h * hidden[0]()

    pipe = pipecompile.compile(Model(body), ["cpu", "cpu"], costs="count")
    with pytest.raises(CaptureError, match=r"draws random numbers from a random\.Random .* cannot be recorded"):
        pipe(inputs(0))


class Deciding(nn.Module):
    """A module that can only be kept whole, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        h = self.lin(h)
        if h.sum() > 1e9:
            return h
        return h * random.random()


def _deciding(self: Any, h: Tensor) -> Tensor:
    return self.deciding(h)


def _with_deciding() -> Model:
    model = Model(_deciding)
    torch.manual_seed(1)
    model.deciding = Deciding().double()
    return model


def test_a_module_kept_whole_draws_once_a_batch() -> None:
    expected = steps(model := _with_deciding(), model)
    for microbatches in (1, 2):
        model = _with_deciding()
        pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = steps(pipe, model)
        assert any("draws random numbers" in str(w.message) for w in caught) == (microbatches > 1)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[:2], theirs[:2])
            assert mine[3] == theirs[3]


def test_a_decision_by_torch_random_numbers_is_refused_or_kept_whole() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        return h if torch.rand([]) < 0.5 else self.layers[1](h)

    pipe = pipecompile.compile(Model(body), ["cpu", "cpu"], costs="count")
    with pytest.raises(CaptureError, match="reads a random value"):
        pipe(inputs(0))
