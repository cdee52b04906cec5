"""Stand-ins for ``threading.local`` objects, whose attributes belong to a thread.

Their class cannot be changed to observe what is read. So forward gets a stand-in for one that has a name: a global, an
attribute, a variable of an outer function. It notes each name that is read, as other objects do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pipecompile.ops.source_lines import caller_file, is_library


class Local:
    """Stands in for a ``threading.local`` during a trace.

    Args:
        local: The object.
        see: Called with the object, a name and its value, when forward reads it.
        see_missing: Called with the object and a name that it lacks.
        see_all: Called with the object when forward reads its ``__dict__``.
    """

    __slots__ = ("_of",)

    def __init__(
        self,
        local: threading.local,
        see: Callable[[Any, str, Any], None],
        see_missing: Callable[[Any, str], None],
        see_all: Callable[[Any], None],
    ) -> None:
        object.__setattr__(self, "_of", (local, threading.get_ident(), see, see_missing, see_all))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return threading.local

    def __getattr__(self, name: str) -> Any:
        local, thread, see, see_missing, see_all = self._of
        if threading.get_ident() != thread:
            return getattr(local, name)
        if name == "__dict__":
            if not is_library(caller_file(1)):
                see_all(local)
            return vars(local)
        try:
            value = getattr(local, name)
        except AttributeError:
            see_missing(local, name)
            raise
        see(local, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of[0], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._of[0], name)

    def __eq__(self, other: object) -> bool:
        return (other._of[0] if type(other) is Local else other) is self._of[0]

    def __hash__(self) -> int:
        return hash(self._of[0])
