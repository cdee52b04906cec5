"""Finds tensors in an argument that torch does not see, and that would reach a function without being recorded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from pipecompile.ops.torch_internals import FakeTensor, pytree

MOST = 10_000  # objects searched behind one argument; an argument with more counts as hiding tensors


def hides_tensors(value: Any) -> bool:
    """Whether an argument holds modules, or tensors inside objects, closures or bound methods."""
    stack = [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, Tensor)]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor | nn.Module) or len(seen) > MOST:
            return True
        if id(item) not in seen:
            seen.add(id(item))
            stack.extend(_held(item))
    return False


def holds_fakes(function: Any) -> bool:
    """Whether a function holds tensors of the trace in its closure, defaults or bound arguments, outside modules."""
    stack, seen = [function], {0}
    while stack and len(seen) <= MOST:
        item = stack.pop()
        if isinstance(item, FakeTensor):
            return True
        if id(item) not in seen and not isinstance(item, nn.Module | Tensor):
            seen.add(id(item))
            stack.extend(_held(item))
    return False


def _held(item: Any) -> Iterable[Any]:
    match item:
        case None | bool() | int() | float() | str() | type() | ModuleType():
            return ()
        case list() | tuple() | set() | frozenset():
            return item
        case dict():
            return item.values()
        case FunctionType():
            return [*_closed_over(item), *(item.__defaults__ or ())]
        case MethodType():
            return [item.__self__]
        case partial():
            return [item.func, item.args, item.keywords]
        case _:
            return list(getattr(item, "__dict__", {}).values())


def _closed_over(function: FunctionType) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents
