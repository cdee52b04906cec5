"""A small tensor of each process in all of them, in as many steps as the number of ranks has bits.

Each step doubles what a rank knows. With what rank r knows of ranks r, r + 1, ...:

    0        1        2        3        4
    0 1      1 2      2 3      3 4      4 0        each gets what the next one knew
    0 1 2 3  1 2 3 4  2 3 4 0  3 4 0 1  4 0 1 2    ... the next but one
    all      all      all      all      all        ... as much as is missing of the next but three

Source: Bruck et al., "Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems" (1997).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipecompile.distributed.lines import Lines


def exchange(lines: Lines, rank: int, mine: Tensor, seconds: float | None = None) -> Callable[[], list[Tensor]]:
    """Begins an exchange. Returns a function that waits for it, and returns the tensors of all ranks, in their order.

    Nothing else may be sent over the lines meanwhile.

    Args:
        seconds: to wait for each of the others.

    Raises:
        TimeoutError: in the wait, one of them did not come in time.
    """
    size, found = len(lines.ranks), [mine]

    def begun() -> Callable[[], tuple[Tensor | None, ...]]:
        known = len(found)
        get = lines.get((rank + known) % size, seconds=seconds)
        lines.put((rank - known) % size, tuple(found[: size - known]))
        return get

    first = begun() if size > 1 else None

    def wait() -> list[Tensor]:
        get = first
        while get is not None:
            found.extend([value for value in get() if value is not None])
            get = begun() if len(found) < size else None
        return [found[(other - rank) % size] for other in range(size)]

    return wait
