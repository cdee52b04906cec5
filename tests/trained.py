"""A pipeline and the unsplit model trained side by side for a few steps: everything that a user could read is equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from long import LONG
from pairs import pipe_of
from torch import Tensor, nn
from toys import D, mean_square

ROWS, LENGTH = 8, 5
MORE = ((2, 4, "1f1b"), (3, 1, "1f1b"), (3, 4, "gpipe")) if LONG else ()
WAYS = pytest.mark.parametrize(
    "way",
    [
        {"stages": stages, "microbatches": microbatches, "schedule": schedule}
        for stages, microbatches, schedule in ((2, 1, "gpipe"), (3, 4, "1f1b"), *MORE)
    ],
    ids=lambda way: "-".join(map(str, way.values())),
)


def floats(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(ROWS, LENGTH, D, generator=generator, dtype=torch.float64),)


def assert_trains_alike(
    model: nn.Module,
    way: Mapping[str, Any],
    steps: int = 3,
    inputs: Callable[[int], tuple[Any, ...]] = floats,
    loss: Callable[[Any], Tensor] = mean_square,
) -> None:
    """Loss, every gradient, and after each step every parameter and buffer by name, in float64.

    Args:
        way: stages, microbatches, schedule, and other options of ``compile``.
        inputs: arguments by step.
    """
    eager = model.double()
    copy = deepcopy(eager)
    pipe = pipe_of(copy, **way)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (eager, copy)]
    for step in range(steps):
        losses = []
        for module, optimizer in zip((eager, pipe), optimizers, strict=True):
            optimizer.zero_grad()
            value = loss(module(*inputs(step)))
            value.backward()
            losses.append(value.detach())
        _same({"loss": losses[1]}, {"loss": losses[0]}, f"step {step}")
        _same(_gradients(copy), _gradients(eager), f"step {step}, gradient")
        assert any(gradient is not None for gradient in _gradients(eager).values())
        for optimizer in optimizers:
            optimizer.step()
        _same(_parameters(copy), _parameters(eager), f"step {step}, parameter")
        _same(dict(copy.named_buffers()), dict(eager.named_buffers()), f"step {step}, buffer")
        assert list(pipe.state_dict()) == list(eager.state_dict())


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _same(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], what: str) -> None:
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        got = actual[name]
        assert (got is None) == (value is None), f"{what} {name}: {got} instead of {value}"
        if value is not None:
            torch.testing.assert_close(got, value, msg=lambda message, name=name: f"{what} {name}: {message}")
