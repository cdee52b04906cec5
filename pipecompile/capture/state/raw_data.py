"""Numbers that Python keeps in memory of its own: numpy arrays, ``array.array`` and ``bytearray``.

A trace that has read one is valid while its contents are the same. What forward writes into one cannot be repeated by
later calls, since no attribute and no tensor changes, so it is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np

from pipecompile.capture.state.fingerprints import imprint

KINDS = (np.ndarray, array, bytearray)


class RawData:
    """What one run of forward has met, with the contents before."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, str, Any]] = {}

    def meet(self, value: Any, label: str = "") -> Any:
        """Notes the present contents, if ``value`` is such data. Returns the value."""
        if isinstance(value, KINDS) and id(value) not in self._met and not _holds_objects(value):
            self._met[id(value)] = value, label or f"a {type(value).__name__}", copy(value)
        return value

    def put_back(self) -> Iterator[str]:
        """Restores the contents. Yields the labels of what has changed."""
        for value, label, before in self._met.values():
            if imprint(value) != imprint(before):
                value[... if isinstance(value, np.ndarray) else slice(None)] = before
                yield label


def _holds_objects(value: Any) -> bool:
    """Whether the contents are objects, which are compared by identity."""
    return isinstance(value, np.ndarray) and value.dtype.hasobject
