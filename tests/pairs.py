"""A pipeline beside the unsplit model that it is made of, for tests that hold one to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import Inputs
from torch import Tensor, nn

import pipecompile

INSIDE = "dict_in_out"  # its loss is an output
OUTSIDE = "long_skip"  # its loss is the caller's


def pipe_of(model: nn.Module, stages: int = 2, **options: Any) -> Any:
    options = {"microbatches": 2, "costs": "count", **options}
    return pipecompile.compile(model, devices=["cpu"] * stages, **options)


def both(name: str, **options: Any) -> tuple[Any, nn.Module, Inputs]:
    """A pipeline of a model, the model once more, and inputs."""
    model = MODELS[name]
    return pipe_of(model.build(), **options), model.build(), model.inputs(4, model.lengths[0])


def loss_of(name: str, call: Callable[..., Any], inputs: Inputs) -> Tensor:
    args, kwargs = inputs
    return MODELS[name].loss(call(*args, **kwargs))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found
    return found


def assert_equal_gradients(pipe: nn.Module, model: nn.Module) -> None:
    expected = gradients(model)
    assert gradients(pipe).keys() == expected.keys()
    for name, gradient in gradients(pipe).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


EITHER = pytest.mark.parametrize("name", [INSIDE, OUTSIDE])
