"""Iterators that a model holds, such as ``itertools.cycle``: what ``next`` gives differs in each call.

Their state can neither be read nor set back, so a trace must not advance one, and later calls could not repeat it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from pipecompile.errors import CaptureError
from pipecompile.ops.source_lines import user_line

_OF = frozenset({"builtins", "itertools"})  # a file is one too, and is only written


def is_iterator(value: Any) -> bool:
    """Whether a value is a generator or another iterator of Python's own."""
    return type(value).__module__ in _OF and isinstance(value, Iterator)


class Advanced:
    """Stands in for an iterator during a trace, and refuses to be advanced, except by other threads."""

    def __init__(self, iterator: Iterator[Any], label: str) -> None:
        self._iterator = iterator
        self._label = label
        self._thread = threading.get_ident()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if threading.get_ident() != self._thread:  # such as one that loads batches
            return next(self._iterator)
        kind = type(self._iterator).__name__
        raise CaptureError(
            f"{user_line()}: forward advances {self._label}, an iterator ({kind}), which goes on from call to "
            f"call and cannot be set back after a trace; count in an attribute (self.calls += 1) and compute from that "
            f"what the iterator gives, or call next() outside and pass its value as an argument"
        )

    def __getattr__(self, name: str) -> Any:
        if threading.get_ident() != self._thread:
            return getattr(self._iterator, name)
        return getattr(type(self), name) if name[:2] == "__" else self.__next__
