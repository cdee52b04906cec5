"""Traces into torch functions that take a function, such as ``F.triplet_margin_with_distance_loss``.

The function passed in may do anything, and may read weights of its own, so one call in the graph cannot represent it.
The tracer runs the Python body of the torch function instead, and records what it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor

from pipecompile.ops.torch_internals import pytree

# What torch functions call to decide whether to dispatch to a function mode.
_GATES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def takes_function(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call of a torch function written in Python passes a function or a module."""
    if not isinstance(function, FunctionType) or not any(gate in function.__code__.co_names for gate in _GATES):
        return False
    leaves = pytree.tree_leaves((args, kwargs))
    return any(callable(leaf) and not isinstance(leaf, type | Tensor) for leaf in leaves)


def body_of(function: Callable[..., Any]) -> FunctionType:
    """Returns a torch function that runs its own Python body even under a function mode."""
    assert isinstance(function, FunctionType)
    globals_ = {**function.__globals__, **dict.fromkeys(_GATES, _never)}
    body = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _never(*tensors: Any) -> bool:
    return False
