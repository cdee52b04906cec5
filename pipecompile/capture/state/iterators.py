"""Iterators that a model holds, such as ``itertools.cycle``: what ``next`` gives differs in each call.

Their state can neither be read nor set back, so a trace must not advance one, and later calls could not repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from pipecompile.errors import CaptureError
from pipecompile.ops.source_lines import user_line

_OF = frozenset({"builtins", "itertools"})  # a file is one too, and is only written


def is_iterator(value: Any) -> bool:
    """Whether a value is a generator or another iterator of Python's own."""
    return type(value).__module__ in _OF and isinstance(value, Iterator)


class Advanced:
    """Stands in for an iterator during a trace, and refuses to be advanced."""

    def __init__(self, iterator: Iterator[Any], label: str) -> None:
        self._kind = type(iterator).__name__
        self._label = label

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> NoReturn:
        raise CaptureError(
            f"{user_line()}: forward advances {self._label}, an iterator ({self._kind}), which goes on from call to "
            f"call and cannot be set back after a trace; count in an attribute (self.calls += 1) and compute from that "
            f"what the iterator gives, or call next() outside and pass its value as an argument"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name) if name[:2] == "__" else self.__next__
