"""Freed memory goes back to the system, where glibc allocates: it would keep some for the next allocation.

What is freed at the end of an arena, of which each thread has one, stays there up to a threshold. glibc raises it with
the sizes of freed blocks, to 64 MiB: for a large model, the gradients of a weight in one microbatch, or two. A fixed
one keeps less, for page faults when a step begins again. What is free between blocks that are used goes back when it is
asked for.

Source: the GNU C Library's manual, "Malloc Tunable Parameters".
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
KEPT = 8 << 20  # bytes at the end of each arena
IN_ARENAS = 32 << 20  # bytes of a block, up to which it is in an arena, as glibc comes to do by itself
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def give_back_much() -> None:
    """Gives back what has been freed, if it is more than ``KEPT``, unless the environment says how much is kept.

    What could not be given back the last time, since it is between blocks that are used, is not counted again.
    """
    if _is_chosen():
        return
    with suppress(AttributeError, OSError):  # glibc before 2.33, or not glibc
        free = _freed()
        left = _LEFT[0] = min(_LEFT[0], free)
        if free > KEPT + left:
            give_back()
            _LEFT[0] = _freed()


def give_back() -> None:
    """Gives back what has been freed, except at the ends of other threads' arenas."""
    with suppress(AttributeError, OSError):  # not glibc
        _libc().malloc_trim(0)


_LEFT = [0]  # bytes that were free after they had been given back


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _freed() -> int:
    """The free bytes in all arenas."""
    count = _libc().mallinfo2
    count.restype = _Mallinfo
    found: int = count().fordblks
    return found


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2``; ``fordblks`` are the free bytes in all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def keep_little() -> None:
    """Keeps little of what will be freed, in this process, unless its environment says how much."""
    if _is_chosen():
        return
    with suppress(AttributeError, OSError):
        libc = _libc()
        libc.gnu_get_libc_version  # noqa: B018  other libraries' mallopt, if any, means something else
        libc.mallopt(TRIM_THRESHOLD, KEPT)
        libc.mallopt(MMAP_THRESHOLD, IN_ARENAS)


def _is_chosen() -> bool:
    """Whether the environment says how much is kept."""
    return any(name in os.environ for name in OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
