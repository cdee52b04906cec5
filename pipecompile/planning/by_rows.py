"""Costs of microbatches of any size, from those of two sizes.

Seconds and bytes of a node are taken as ``a + b * rows``: bytes are, and seconds nearly, since an operation on few rows
takes longer per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph


@dataclass(frozen=True)
class ByRows:
    """The costs of a graph as functions of the rows of a microbatch.

    Args:
        one: the costs of one size.
        other: the costs of another size.
        rows: of a microbatch of ``one``, and of one of ``other``.
        batch: rows of the batch.
        at: the graph of a microbatch of so many rows.
    """

    one: CostedGraph
    other: CostedGraph
    rows: tuple[int, int]
    batch: int
    at: Callable[[int], Graph]

    @property
    def usual(self) -> int:
        """The number of microbatches that ``one`` is for."""
        return -(-self.batch // self.rows[0])

    def size(self, count: int) -> int:
        """The rows of the largest of so many microbatches."""
        return -(-self.batch // count)

    def costed(self, count: int) -> CostedGraph:
        """The costs of each of so many microbatches."""
        size = self.size(count)
        if size == self.rows[0]:
            return self.one
        graph = self.at(size)
        costs = costs_at(self.one, self.other, self.rows, size)
        if not self.knows_memory:
            return replace(self.one, graph=graph, costs=costs)
        pairs = zip(self.one.storages, self.other.storages, strict=True)
        storages = tuple(_bytes(a, b, self.rows, size) for a, b in pairs)
        both = zip(self.one.footprints, self.other.footprints, strict=True)
        prints = tuple(_footprint(a, b, self.rows, size) for a, b in both)
        return replace(self.one, graph=graph, costs=costs, storages=storages, footprints=prints)

    @property
    def knows_memory(self) -> bool:
        """Whether both sizes keep the same values, so that the bytes of others are known too."""
        if len(self.one.storages) != len(self.other.storages):
            return False
        return all(map(_alike, self.one.footprints, self.other.footprints))

    def one_device(self) -> float:
        """The predicted seconds of a step of the whole batch at once on one device of speed 1."""
        return sum(cost.seconds for cost in costs_at(self.one, self.other, self.rows, self.batch))


def costs_at(one: CostedGraph, other: CostedGraph, rows: tuple[int, int], size: int) -> tuple[Cost, ...]:
    """The costs of a microbatch of ``size`` rows, from those of two sizes."""

    def line(a: float, b: float) -> float:
        slope = max(0.0, (b - a) / (rows[1] - rows[0]))
        return max(0.0, a + slope * (size - rows[0]))

    return tuple(
        replace(
            a,
            forward=line(a.forward, b.forward),
            backward=line(a.backward, b.backward),
            saved_bytes=_bytes(a.saved_bytes, b.saved_bytes, rows, size),
        )
        for a, b in zip(one.costs, other.costs, strict=True)
    )


def _bytes(a: int, b: int, rows: tuple[int, int], size: int) -> int:
    return max(0, ceil(a + (b - a) * (size - rows[0]) / (rows[1] - rows[0])))


def _footprint(a: Footprint, b: Footprint, rows: tuple[int, int], size: int) -> Footprint:
    forward = _bytes(a.forward_bytes, b.forward_bytes, rows, size)
    return replace(a, forward_bytes=forward, backward_bytes=_bytes(a.backward_bytes, b.backward_bytes, rows, size))


def _alike(a: Footprint, b: Footprint) -> bool:
    """Whether two sizes of a node make and keep the same storages."""
    return (a.values, a.saved, a.again, a.stretch) == (b.values, b.saved, b.again, b.stretch)
