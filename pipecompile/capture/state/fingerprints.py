"""Imprints of values: two are equal exactly if a trace that has read one value is valid for the other.

Plain values are compared by type and value; lists, tuples, dicts and sets by their items; everything else (functions,
classes, modules, tensors, objects) by identity. Attributes of objects are guarded one by one, as forward reads them
(``attribute_hooks.py``).
"""

from __future__ import annotations

import ctypes
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import SynchronizedBase
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch

from pipecompile.capture.state.containers import contents
from pipecompile.capture.state.raw_contents import KINDS, is_raw, raw_contents


class Nothing:
    """A marker for a missing value, or for one that is not plain; equal only to itself."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Nothing()
SCALARS = frozenset(
    {bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format, torch.layout}
)
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class created by Python code
DEEPEST = 12  # nesting of containers; deeper values are compared by identity

SHARED = (ctypes._SimpleCData, ctypes.Array, SynchronizedBase)  # numbers that processes share
ASKED = (ContextVar, *SHARED)  # the same object may hold another value
RECORDS = (SimpleNamespace, Namespace, partial, MappingProxyType, *KINDS, *ASKED)
_BY_IDENTITY = frozenset({FunctionType, BuiltinFunctionType, type, ModuleType, CodeType, property, Nothing})
Meet = Callable[[Any], None]


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """A value compared by identity, and kept alive so that no other object can get its address."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def imprint(value: Any, meet: Meet | None = None, depth: int = 0) -> Any:
    """Returns the imprint of a value; ``meet`` is called with each mutable container in it."""
    kind = type(value)
    if kind is float or isinstance(value, np.generic):
        return kind, repr(value)  # distinguishes 0.0 from -0.0; nan equals nan
    if kind in SCALARS:
        return kind, value
    if kind is Same:
        return value
    if kind in _BY_IDENTITY:
        return Same(value)
    if depth >= DEEPEST:
        return Same(value)
    if isinstance(value, list | tuple | deque):
        return _of_items(kind, value, value, meet, depth)
    if isinstance(value, dict | MappingProxyType):
        return _of_items(kind, value, contents(value) if isinstance(value, dict) else value.items(), meet, depth)
    if isinstance(value, set | frozenset):
        _met(value, meet)
        return kind, frozenset(imprint(item, None, depth + 1) for item in value)
    if is_raw(value):
        _met(value, meet)
        return kind, raw_contents(value)
    return _of_object(kind, value, meet, depth)


def _of_object(kind: type, value: Any, meet: Meet | None, depth: int) -> Any:
    """Returns the imprint of an object that is not a container; records such as namespaces by their attributes."""
    if isinstance(value, MethodType):
        return kind, Same(value.__func__), Same(value.__self__)
    if isinstance(value, partial):
        return _of_items(kind, (), (value.func, value.args, value.keywords, vars(value)), meet, depth)
    if isinstance(value, ContextVar):
        return Same(value), imprint(value.get(MISSING), meet, depth + 1)
    if isinstance(value, SHARED):
        return Same(value), bytes(value.get_obj() if isinstance(value, SynchronizedBase) else value)
    if isinstance(value, SimpleNamespace | Namespace):
        return _of_items(kind, vars(value), [*vars(value).items()], meet, depth)
    if not hasattr(value, "__dict__") and (slots := _slots(kind)):
        return Same(value), _of_items(kind, value, [getattr(value, name, MISSING) for name in slots], meet, depth)
    return Same(value)


def _slots(kind: type) -> list[str]:
    """Returns the names in ``__slots__`` of a class and its bases."""
    return [
        name
        for base in kind.__mro__
        if base.__flags__ & HEAP_TYPE
        for name, found in vars(base).items()
        if isinstance(found, MemberDescriptorType)
    ]


def _of_items(kind: type, container: Any, items: Any, meet: Meet | None, depth: int) -> Any:
    _met(container, meet)
    return kind, tuple(imprint(item, meet, depth + 1) for item in items)


def _met(container: Any, meet: Meet | None) -> None:
    if meet is not None and not isinstance(container, tuple | frozenset):
        meet(container)


def same(seen: Any, expected: Any) -> bool:
    """Whether two values read by Python are equal: numbers, lists or arrays."""
    equal = seen == expected
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)
