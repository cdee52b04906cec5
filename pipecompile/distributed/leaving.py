"""The end of a process whose threads may stand in gloo or in the store.

Before 3.14, Python ends a daemon thread that comes back from C++ once the interpreter has begun to end, and C++ takes
that for a fault: "terminate called without an active exception". Such a thread comes back as soon as a peer ends, so
after a failure that is likely. The process then ends without the interpreter's cleanup, and without the exit functions
that were registered before this file was imported.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 0.5  # seconds for threads that are about to come back
_abroad: set[object] = set()


@contextmanager
def abroad() -> Iterator[None]:
    """Marks a thread that must have come back before the interpreter ends."""
    mark = object()
    _abroad.add(mark)
    try:
        yield
    finally:
        _abroad.discard(mark)


def uncaught() -> BaseException | None:
    """The exception that ends the script, in functions that run at its exit."""
    return None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)


def _leave() -> None:
    end = time.monotonic() + PATIENCE
    while _abroad and time.monotonic() < end:
        time.sleep(0.005)
    if _abroad:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(uncaught(), KeyboardInterrupt) else 1)  # the code of ``sys.exit`` is not known here


atexit.register(_leave)
os.register_at_fork(after_in_child=_abroad.clear)  # the child has none of the threads
