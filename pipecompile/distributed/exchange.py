"""Small values of one process, or of each, in all of them, in as many steps as the number of ranks has bits.

``spread`` goes down a binomial tree of the ranks, whose root is the maker:

    0 -> 4    0 -> 2, 4 -> 6    0 -> 1, 2 -> 3, 4 -> 5, 6 -> 7

``exchange`` doubles what each rank knows. With what rank r knows of ranks r, r + 1, ...:

    0        1        2        3        4
    0 1      1 2      2 3      3 4      4 0        each gets what the next one knew
    0 1 2 3  1 2 3 4  2 3 4 0  3 4 0 1  4 0 1 2    ... the next but one
    all      all      all      all      all        ... as much as is missing of the next but three

Source: Bruck et al. 1997, "Efficient algorithms for all-to-all communications", section 4 (``exchange``).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Literal

from torch import Tensor

from pipecompile.distributed.lines import Lines
from pipecompile.runtime.lane import Values


def spread(
    lines: Lines,
    rank: int,
    made: Mapping[str, Tensor],
    makers: Mapping[str, int],
    wanted: Container[str] | Literal["all"],
) -> Mapping[str, Tensor]:
    """As ``Peers.spread``, in the process of ``rank``."""
    found, size = dict(made), len(lines.ranks)
    for maker in sorted(set(makers.values())):
        names = [name for name, other in makers.items() if other == maker]
        if rank == maker:
            values: Values = tuple(made[n] if wanted == "all" or n in wanted else _described(made[n]) for n in names)
        else:
            values = lines.get(parent(rank, maker, size))()
            pairs = zip(names, values, strict=True)
            found.update((name, value) for name, value in pairs if name not in made and value is not None)
        for child in children(rank, maker, size):
            lines.put(child, values)
    return {name: found[name] for name in makers}


def exchange(lines: Lines, rank: int, mine: Tensor, seconds: float | None = None) -> list[Tensor]:
    """The tensors of all ranks, in their order.

    Args:
        seconds: to wait for each of the others.

    Raises:
        TimeoutError: one of them did not come in time.
    """
    size, found = len(lines.ranks), [mine]
    while (known := len(found)) < size:
        get = lines.get((rank + known) % size, seconds=seconds)
        lines.put((rank - known) % size, tuple(found[: size - known]))
        found += [value for value in get() if value is not None]
    return [found[(other - rank) % size] for other in range(size)]


def _described(value: Tensor) -> Tensor:
    return value.detach().to("meta").requires_grad_(value.requires_grad)


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
