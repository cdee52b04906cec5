"""A binomial tree of ranks, along which values reach all ranks in as many steps as their number has bits:

0 -> 4    0 -> 2, 4 -> 6    0 -> 1, 2 -> 3, 4 -> 5, 6 -> 7
"""

from __future__ import annotations

from collections.abc import Iterator


def parent(rank: int, root: int, size: int) -> int:
    """The rank from which another one than the root gets the values."""
    place = (rank - root) % size
    return (root + (place & (place - 1))) % size


def children(rank: int, root: int, size: int) -> Iterator[int]:
    """The ranks to which a rank gives the values, those with the most below them first."""
    place = (rank - root) % size
    lowest = place & -place or 1 << (size - 1).bit_length()
    while lowest := lowest >> 1:
        if place + lowest < size:
            yield (root + place + lowest) % size
