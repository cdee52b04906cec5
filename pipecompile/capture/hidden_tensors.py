"""Finds tensors in an argument that torch does not see, and that would reach a function without being recorded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from pipecompile.ops.torch_internals import pytree

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


def _held(item: Any) -> Iterable[Any]:
    match item:
        case None | bool() | int() | float() | str() | type() | ModuleType():
            return ()
        case list() | tuple() | set() | frozenset():
            return item
        case dict():
            return item.values()
        case FunctionType():
            return [*(cell.cell_contents for cell in item.__closure__ or ()), *(item.__defaults__ or ())]
        case MethodType():
            return [item.__self__]
        case partial():
            return [item.func, item.args, item.keywords]
        case _:
            return list(getattr(item, "__dict__", {}).values())
