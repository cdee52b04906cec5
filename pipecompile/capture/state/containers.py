"""Reads, compares and restores the contents of a model's lists, dicts, sets and deques.

Classes of libraries may refuse or redefine the methods of their built-in base type (a read-only configuration). So
contents are read and written through the built-in type itself, and written only if they have changed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

KINDS: tuple[type, ...] = (list, OrderedDict, dict, set, deque)  # each before what it derives from


def kind_of(value: Any) -> Any:
    """Returns the built-in type whose methods change a value; None if it is not a mutable container."""
    kind = type(value)
    if kind not in KINDS:
        return next(base for base in KINDS if isinstance(value, base)) if isinstance(value, KINDS) else None
    return kind


def contents(holder: Any) -> list[Any]:
    """Returns the items of a container, in order; the pairs of a dict."""
    kind = kind_of(holder)
    return [*kind.items(holder)] if issubclass(kind, dict) else [*kind.__iter__(holder)]


def refill(holder: Any, items: list[Any]) -> None:
    """Replaces the contents of a container."""
    kind = kind_of(holder)
    kind.clear(holder)
    if kind in (list, deque):
        kind.extend(holder, items)
    elif kind is set:
        set.update(holder, items)
    else:
        for key, value in items:
            kind.__setitem__(holder, key, value)


def put_back(holder: Any, items: list[Any]) -> None:
    """Restores a container's contents if they have changed."""
    if not is_same(contents(holder), items):
        refill(holder, items)


def is_same(now: list[Any], before: list[Any]) -> bool:
    """Whether contents are the same objects, in the same order."""
    return len(now) == len(before) and [*map(_identity, now)] == [*map(_identity, before)]


def _identity(item: Any) -> Any:
    return tuple(map(id, item)) if type(item) is tuple else id(item)
