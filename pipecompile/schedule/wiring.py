"""What each computation reads and sends, as integers, for one shape and number of microbatches.

F reads along the edges of the shape, B against them, both from computations of the same microbatch. So what a code
(see ``order``) reads is found by an *offset*, which all microbatches have in common: the code of its maker less its
own. What a rank sends goes one after the other, in the order in which it computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf
from typing import TypeVar

from pipecompile.schedule.order import Order
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts

T = TypeVar("T")
Inputs = tuple[tuple[int, float], ...]  # offsets, and seconds


@dataclass(frozen=True)
class Wiring:
    """Lists by code.

    Attributes:
        reads: offsets of the makers of what a computation reads, and the seconds from when a maker begins to send until
            it has arrived; -inf for a maker on the same rank, which has ended if it has run.
        needs: the same, and what is before it on its own rank, F of B and B of W; the seconds are from the end of a
            maker, as if each transfer had a link of its own.
        readers: offsets of the computations that need it, with the same seconds.
        sends: the seconds in which what it makes keeps other results of its rank from being sent.
    """

    reads: list[Inputs]
    needs: list[Inputs]
    readers: list[Inputs]
    sends: list[float]

    @cached_property
    def is_queued(self) -> bool:
        """Whether results of a rank wait for others to be sent."""
        return any(self.sends)


def wires_of(shape: Shape, num_microbatches: int, costs: StageCosts) -> Wiring:
    """The wiring of a shape."""
    return _wiring(shape, num_microbatches, costs.transfer, costs.queued)


@lru_cache(maxsize=8)
def _wiring(shape: Shape, num_microbatches: int, transfer: tuple[float, ...], queued: float) -> Wiring:
    n, stages, cells = num_microbatches, shape.num_stages, shape.num_stages * num_microbatches
    reads: list[Inputs] = [()] * (3 * stages)
    needs: list[Inputs] = [()] * stages + [((-cells, 0.0),)] * (2 * stages)
    sends = [0.0] * (3 * stages)
    for (source, target), seconds in zip(shape.edges, transfer or (0.0,) * len(shape.edges), strict=True):
        far = shape.rank_of[source] != shape.rank_of[target]
        for giver, taker in ((source, target), (stages + target, stages + source)):
            offset = (giver - taker) * n
            if far:
                reads[taker] += ((offset, sends[giver] + seconds),)
                needs[taker] += ((offset, seconds),)
                sends[giver] += queued * seconds
            else:
                reads[taker] += ((offset, -inf),)
                needs[taker] += ((offset, 0.0),)
    readers: list[Inputs] = [()] * (3 * stages)
    for taker, inputs in enumerate(needs):
        for offset, seconds in inputs:
            readers[taker + offset // n] += ((-offset, seconds),)
    return Wiring(of_codes(reads, n), of_codes(needs, n), of_codes(readers, n), of_codes(sends, n))


def of_codes(values: Iterable[T], num_microbatches: int) -> list[T]:
    """Values by code, of values for each stage of each kind."""
    return [value for value in values for _ in range(num_microbatches)]


def seconds_of(costs: StageCosts, num_microbatches: int) -> list[float]:
    """The seconds of each code, if every B has a W."""
    return of_codes((*costs.f, *costs.b, *costs.w), num_microbatches)


def memory_of(costs: StageCosts, num_microbatches: int) -> list[float]:
    """What each code adds to the memory of its rank, if every B has a W."""
    return of_codes((*costs.mem_f, *costs.mem_b, *costs.mem_w), num_microbatches)


def with_whole_backwards(values: list[float], order: Order) -> list[float]:
    """Values per code in which a B without a W counts as both."""
    cells = order.shape.num_stages * order.num_microbatches
    last = {code for row in order.rows for code in row if code >= 2 * cells}
    values = list(values)
    for code in range(cells, 2 * cells):
        if code + cells not in last:
            values[code] += values[code + cells]
    return values
