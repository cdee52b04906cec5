"""Functions of torch that are handed a function, such as ``F.triplet_margin_with_distance_loss``.

What is handed over may do anything, and read weights of its own, so no single call can stand for it in a graph. The
Python of such a function is run in the tracer's sight instead, and what it calls is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor

from pipecompile.ops.torch_internals import pytree

# What functions of torch ask before they hand a call over to the mode that watches them.
_GATES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def takes_function(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call of a function that is written in Python hands over a function or a module."""
    if not isinstance(function, FunctionType) or not any(gate in function.__code__.co_names for gate in _GATES):
        return False
    leaves = pytree.tree_leaves((args, kwargs))
    return any(callable(leaf) and not isinstance(leaf, type | Tensor) for leaf in leaves)


def body_of(function: Callable[..., Any]) -> FunctionType:
    """A function of torch that goes on to its own Python, even while a mode watches."""
    assert isinstance(function, FunctionType)
    globals_ = {**function.__globals__, **dict.fromkeys(_GATES, _never)}
    body = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _never(*tensors: Any) -> bool:
    return False
