"""Runs functions on fake tensors, and says which errors mean that they need real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipecompile.capture.fake_kernels import STAND_INS
from pipecompile.errors import DependsOnData
from pipecompile.ops.symbols import Shapes
from pipecompile.ops.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)

# Raised by a run on fake tensors where real values are needed.
DATA_DEPENDENT = (
    DependsOnData,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)


def run_on_fakes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes | None) -> Any:
    """Returns the result of a function; what it asks about sizes is not taken for a question of the model."""
    func = STAND_INS.get(func, func)
    if shapes is None:
        return func(*args, **kwargs)
    shapes.inside += 1
    try:
        return func(*args, **kwargs)
    finally:
        shapes.inside -= 1
