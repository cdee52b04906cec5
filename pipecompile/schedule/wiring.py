"""What each computation waits for and sends, as integers, for one shape and number of microbatches.

A *slot* is one result on its way from a stage to another: F results go along the edges of the shape, B results against
them. A computation waits for slots; one that ends fills slots, those on its own rank at once, the others after a
transfer. The transfers of a rank go one after the other, in the order in which it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pipecompile.schedule.order import Order
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts

Slots = tuple[int, ...]
Sends = tuple[tuple[int, float, float], ...]  # slots, seconds, and those in which the rank sends nothing else


@dataclass(frozen=True)
class Wiring:
    """Lists by code (see ``order``): slots waited for, slots filled at once, slots filled by a transfer."""

    num_slots: int
    waits: list[Slots]
    near: list[Slots]
    sends: list[Sends]


def wires_of(shape: Shape, num_microbatches: int, costs: StageCosts) -> Wiring:
    """The wiring of a shape."""
    return _wiring(shape, num_microbatches, costs.transfer, costs.queued)


@lru_cache(maxsize=8)
def _wiring(shape: Shape, num_microbatches: int, transfer: tuple[float, ...], queued: float) -> Wiring:
    n, stages, edges = num_microbatches, shape.num_stages, shape.edges
    cells, seconds = stages * n, transfer or (0.0,) * len(edges)
    waits: list[Slots] = [()] * (3 * cells)
    near: list[Slots] = [()] * (3 * cells)
    sends: list[Sends] = [()] * (3 * cells)
    for index, (source, target) in enumerate(edges):
        far = shape.rank_of[source] != shape.rank_of[target]
        for direction, (giver, taker) in enumerate(((source, target), (target, source))):
            first = (direction * len(edges) + index) * n
            for k in range(n):
                give, take = (direction * stages + giver) * n + k, (direction * stages + taker) * n + k
                waits[take] += (first + k,)
                if far:
                    sends[give] += ((first + k, seconds[index], queued * seconds[index]),)
                else:
                    near[give] += (first + k,)
    return Wiring(2 * len(edges) * n, waits, near, sends)


def seconds_of(costs: StageCosts, num_microbatches: int) -> list[float]:
    """The seconds of each code, if every B has a W."""
    return [seconds for kind in (costs.f, costs.b, costs.w) for seconds in kind for _ in range(num_microbatches)]


def memory_of(costs: StageCosts, num_microbatches: int) -> list[float]:
    """What each code adds to the memory of its rank, if every B has a W."""
    kinds = (costs.mem_f, costs.mem_b, costs.mem_w)
    return [amount for kind in kinds for amount in kind for _ in range(num_microbatches)]


def with_whole_backwards(values: list[float], order: Order) -> list[float]:
    """Values per code in which a B without a W counts as both."""
    cells = order.shape.num_stages * order.num_microbatches
    last = {code for row in order.rows for code in row if code >= 2 * cells}
    values = list(values)
    for code in range(cells, 2 * cells):
        if code + cells not in last:
            values[code] += values[code + cells]
    return values
