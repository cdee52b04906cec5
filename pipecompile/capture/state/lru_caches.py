"""Clears ``lru_cache`` entries that a trace has added: they hold fake tensors, which later calls must not get."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import _lru_cache_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_HOLDERS = (_lru_cache_wrapper, staticmethod, classmethod, MethodType, FunctionType)
_FOREIGN = sys.stdlib_module_names | {"torch"}


@contextmanager
def forgotten(model: nn.Module) -> Iterator[None]:
    """A context; at its end, caches with new entries are cleared: on the model's modules, their classes and files."""
    before = {id(memo): memo.cache_info().misses for memo in _memos(model)}
    try:
        yield
    finally:
        for memo in _memos(model):
            if memo.cache_info().misses != before.get(id(memo), 0):
                memo.cache_clear()


def _memos(model: nn.Module) -> list[_lru_cache_wrapper[Any]]:
    modules = list(model.modules())
    kinds = {base for kind in {*map(type, modules)} for base in kind.__mro__ if not _is_foreign(base)}
    files = [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
    held = [value for names in (*map(vars, modules), *map(vars, kinds), *files) for value in list(names.values())]
    return [memo for value in held if isinstance(value, _HOLDERS) for memo in _inside(value)]


def _inside(value: Any, depth: int = 3) -> Iterator[_lru_cache_wrapper[Any]]:
    """Yields the caches that a function, method or decorator is, wraps or closes over."""
    match value:
        case _lru_cache_wrapper():
            yield value
        case staticmethod() | classmethod() | MethodType():
            yield from _inside(value.__func__, depth)
        case FunctionType() if depth and value.__closure__:
            for cell in value.__closure__:
                with suppress(ValueError):  # not filled yet
                    yield from _inside(cell.cell_contents, depth - 1)


def _is_foreign(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _FOREIGN
