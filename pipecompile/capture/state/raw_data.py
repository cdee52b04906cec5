"""Raw data that forward has met: numpy arrays, ``array.array``, ``bytearray``, views of such memory, and the numbers of
``ctypes`` and ``multiprocessing``.

A trace that has read some is valid while its contents are the same. What forward writes there cannot be repeated by
later calls, since no attribute and no tensor changes, so it is refused.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from copy import copy
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np

from pipecompile.capture.state.fingerprints import SHARED, imprint
from pipecompile.capture.state.raw_contents import LARGEST, is_file, is_raw, raw_contents


class RawData:
    """What one run of forward has met, with the contents before."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, str, Any, Any]] = {}

    def meet(self, value: Any, label: str = "") -> Any:
        """Notes the present contents, if ``value`` is such data. Returns the value."""
        is_known = is_raw(value) or isinstance(value, SHARED)
        if is_known and id(value) not in self._met and not is_file(value):
            before = None if _bytes_in(value) > LARGEST else _copied(value)
            self._met[id(value)] = value, label or f"a {type(value).__name__}", _contents(value), before
        return value

    def put_back(self) -> Iterator[str]:
        """Restores the contents, but those larger than ``LARGEST``. Yields the labels of what has changed."""
        for value, label, contents, before in self._met.values():
            if _contents(value) != contents:
                if before is not None:
                    _put_back(value, before)
                yield label if before is not None else f"{label} (too large to be put back)"


def _contents(value: Any) -> Any:
    return raw_contents(value) if is_raw(value) else imprint(value)


def _bytes_in(value: Any) -> int:
    if isinstance(value, SHARED):
        return ctypes.sizeof(_memory(value))
    sized = isinstance(value, np.ndarray | memoryview)
    return int(value.nbytes) if sized else len(value) * getattr(value, "itemsize", 1)


def _copied(value: Any) -> Any:
    if isinstance(value, SHARED):
        return bytes(_memory(value))
    return np.array(value) if isinstance(value, memoryview) else copy(value)


def _put_back(value: Any, before: Any) -> None:
    if isinstance(value, SHARED):
        ctypes.memmove(ctypes.addressof(_memory(value)), before, len(before))
    elif isinstance(value, array | bytearray):
        value[:] = before  # also their length
    elif not getattr(value, "readonly", False):  # else what it is a view of was written
        np.asarray(value)[...] = before


def _memory(value: Any) -> Any:
    return value.get_obj() if isinstance(value, SynchronizedBase) else value
