"""Numbers in memory of their own: numpy arrays, ``array.array``, ``bytearray``, ctypes, shared numbers; events.

A trace that has read one is valid while its contents are the same. What forward writes into one cannot be repeated by
later calls, since no attribute and no tensor changes, so it is refused.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Iterator
from copy import copy
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np

from pipecompile.capture.state.fingerprints import SHARED, imprint

KINDS = (np.ndarray, array, bytearray, threading.Event, *SHARED)


class RawData:
    """What one run of forward has met, with the contents before."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, str, Any]] = {}

    def meet(self, value: Any, label: str = "") -> Any:
        """Notes the present contents, if ``value`` is such data. Returns the value."""
        if isinstance(value, KINDS) and id(value) not in self._met and not _holds_objects(value):
            self._met[id(value)] = value, label or f"a {type(value).__name__}", _contents(value)
        return value

    def put_back(self) -> Iterator[str]:
        """Restores the contents. Yields the labels of what has changed."""
        for value, label, before in self._met.values():
            if imprint(_contents(value)) != imprint(before):
                _put_back(value, before)
                yield label


def _contents(value: Any) -> Any:
    if isinstance(value, threading.Event):
        return value.is_set()
    return bytes(_memory(value)) if isinstance(value, SHARED) else copy(value)


def _put_back(value: Any, before: Any) -> None:
    if isinstance(value, threading.Event):
        (value.set if before else value.clear)()
    elif isinstance(value, SHARED):
        ctypes.memmove(ctypes.addressof(_memory(value)), before, len(before))
    else:
        value[... if isinstance(value, np.ndarray) else slice(None)] = before


def _memory(value: Any) -> Any:
    return value.get_obj() if isinstance(value, SynchronizedBase) else value


def _holds_objects(value: Any) -> bool:
    """Whether the contents are objects, which are compared by identity."""
    return isinstance(value, np.ndarray) and value.dtype.hasobject
