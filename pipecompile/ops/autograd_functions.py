"""Calls that generated code cannot spell out: custom autograd functions, and user objects among the arguments.

Both are called through objects that the code refers to by name. ``Applied`` calls a custom autograd function and keeps
its backward; ``Holding`` calls a function and supplies some of the arguments itself.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import EllipsisType, FunctionType, NoneType
from typing import Any

import torch
import torch.fx as fx

from pipecompile.ops.operators import is_opaque
from pipecompile.ops.torch_internals import OpOverload, pytree

APPLY: FunctionType = torch.autograd.Function.__dict__["apply"].__func__  # a plain function, shared by all subclasses
_HELD = "<held "
_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}  # Python types that torch accepts as dtypes
_SPELLED = frozenset(
    {
        NoneType, bool, int, float, complex, str, bytes, EllipsisType, torch.dtype, torch.device, torch.layout,
        torch.memory_format, torch.Size,
    }
)  # fmt: skip


class Applied:
    """Calls ``function.apply`` in a graph.

    Two are equal if they call the same function, so that two traces have equal calls.

    Args:
        function: The custom autograd function.
        draws: Whether its forward draws random numbers.
    """

    def __init__(self, function: type[torch.autograd.Function], draws: bool = False) -> None:
        self.function = function
        self.draws = draws
        self.__name__ = f"{function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return APPLY(self.function, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Applied) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class Holding:
    """Calls a function with the objects it holds in place of arguments named ``<held 0>``, ``<held 1>``, ..."""

    def __init__(self, function: Callable[..., Any], objects: tuple[Any, ...]) -> None:
        self.function = function
        self.objects = objects
        self.__name__ = str(getattr(function, "__name__", "function"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = {f"{_HELD}{number}>": item for number, item in enumerate(self.objects)}
        args, kwargs = pytree.tree_map_only(str, lambda word: known.get(word, word), (args, kwargs))
        return self.function(*args, **kwargs)


def held(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
    """Returns a call that generated code can spell out.

    Torch functions treat a number or string by its value, so instances of subclasses are replaced by plain values. A
    function of the user, such as a custom autograd function, may need the object itself.
    """
    objects: list[Any] = []
    own = is_opaque(function)

    def spelled(item: Any) -> Any:
        if isinstance(item, fx.Node | OpOverload):
            return item
        if type(item) in _SPELLED and not (isinstance(item, str) and item.startswith(_HELD)):
            return item
        if not own and isinstance(item, type) and item in _TYPES:
            return _TYPES[item]
        if isinstance(item, Enum) and str(item.name).isidentifier() and own:
            return item
        if not own and isinstance(item, int | float | str):
            return _plain(item)
        objects.append(item)
        return f"{_HELD}{len(objects) - 1}>"

    args, kwargs = fx.node.map_aggregate(args, spelled), fx.node.map_aggregate(kwargs, spelled)
    return (Holding(function, tuple(objects)) if objects else function), args, kwargs


def _plain(item: int | float | str) -> int | float | str:
    """Returns a number or string as an instance of the built-in type."""
    match item:
        case int():
            return int.__int__(item)
        case float():
            return float.__float__(item)
    return str.__str__(item)


def custom_of(target: Any) -> Applied | None:
    """Returns the custom autograd function that a node of the graph calls, or None."""
    function = target.function if isinstance(target, Holding) else target
    return function if isinstance(function, Applied) else None
