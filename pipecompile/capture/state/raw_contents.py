"""The contents of raw data: numbers that Python keeps in memory of its own, in an array or in bytes.

Two states are compared by their bytes, of which all guards of an array share one copy. Above ``LARGEST`` bytes a digest
takes the place of the copy: slower, without memory. A read-only memory map is compared by the identity of its file,
which may be larger than the memory.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

KINDS = (np.ndarray, array, bytearray, memoryview)
LARGEST = 1 << 24  # bytes that are copied


def is_raw(value: Any) -> bool:
    """Whether a value is raw data. The objects in an array are not: they are compared by identity."""
    return isinstance(value, KINDS) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Raw:
    """The contents of raw data: two are equal exactly if types of items, shapes and bytes are.

    Attributes:
        items: The type of the items.
        shape: The sizes.
        data: The bytes, their digest, or the identity of the file that has them.
    """

    items: Any
    shape: tuple[int, ...]
    data: Any


_LAST: WeakValueDictionary[int, Raw] = WeakValueDictionary()  # by the identity of the data


def raw_contents(value: Any) -> Raw:
    """Returns the present contents: the same object as before while they are equal and it is in use."""
    now, last = _read(value), _LAST.get(id(value))
    if now == last:
        return last
    _LAST[id(value)] = now
    return now


def _read(value: Any) -> Raw:
    if isinstance(value, np.ndarray):
        return Raw(value.dtype, value.shape, _file_behind(value) or _kept(_bytes_of(value)))
    if isinstance(value, memoryview):
        return Raw(value.format, value.shape or (), _kept(value.cast("B") if value.c_contiguous else value.tobytes()))
    return Raw(getattr(value, "typecode", ""), (len(value),), _kept(memoryview(value).cast("B")))


def is_file(value: Any) -> bool:
    """Whether raw data is a read-only memory map of a file."""
    return isinstance(value, np.ndarray) and _file_behind(value) is not None


def _bytes_of(value: np.ndarray[Any, Any]) -> Any:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _kept(data: Any) -> bytes:
    return bytes(data) if len(data) <= LARGEST else blake2b(data).digest()


def _file_behind(value: np.ndarray[Any, Any]) -> tuple[Any, ...] | None:
    """Returns the identity of the file of which an array is a read-only map, and which part of it the array is."""
    base: Any = value
    while isinstance(base.base, np.ndarray):
        base = base.base
    if not (isinstance(base, np.memmap) and base.mode == "r" and base.filename is not None):
        return None
    start = base.offset + value.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return os.fspath(base.filename), start, value.strides, *_version(base.filename)


def _version(path: Any) -> tuple[int, ...]:
    try:
        file = os.stat(path)
    except OSError:  # the map still holds what a removed file had
        return ()
    return file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size
