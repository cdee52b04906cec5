"""What generated code cannot spell out: custom functions of autograd, and objects of the user's among arguments.

Both are called through objects that the code knows by a name: one call of ``Applied`` stands for a custom function,
with the backward that the user has written; ``Holding`` calls a function on arguments some of which it holds itself.
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

APPLY: FunctionType = torch.autograd.Function.__dict__["apply"].__func__  # that of all subclasses, as a plain function
_HELD = "<held "
_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}  # where torch takes one for a dtype
_SPELLED = frozenset(
    {
        NoneType, bool, int, float, complex, str, bytes, EllipsisType, torch.dtype, torch.device, torch.layout,
        torch.memory_format, torch.Size,
    }
)  # fmt: skip


class Applied:
    """``function.apply`` as what a graph calls; ``draws`` says that its forward draws random numbers.

    Equal for one function, so that two traces have the same calls.
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
    """A function that is called with the names ``<held 0>`` .. in place of objects, which it knows."""

    def __init__(self, function: Callable[..., Any], objects: tuple[Any, ...]) -> None:
        self.function = function
        self.objects = objects
        self.__name__ = str(getattr(function, "__name__", "function"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = {f"{_HELD}{number}>": item for number, item in enumerate(self.objects)}
        args, kwargs = pytree.tree_map_only(str, lambda word: known.get(word, word), (args, kwargs))
        return self.function(*args, **kwargs)


def held(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
    """A call that code can spell out, for one that it perhaps cannot.

    A function of torch takes a number or a word for what it is, of whatever class; what the user has written, such as a
    custom function, may ask for the object itself.
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
    """A number or a word without its class."""
    match item:
        case int():
            return int.__int__(item)
        case float():
            return float.__float__(item)
    return str.__str__(item)


def custom_of(target: Any) -> Applied | None:
    """The custom function that a graph calls, if it is one."""
    function = target.function if isinstance(target, Holding) else target
    return function if isinstance(function, Applied) else None
