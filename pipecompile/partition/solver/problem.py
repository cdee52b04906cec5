"""The partitioning problem as numbers: what must be placed, in which order, and what a cut costs.

*Atoms* are what cannot be taken apart. They are numbered so that every arc goes up, hence a stage assignment is acyclic
when it never goes down along an arc. A *net* is one value: its producer, which is its first pin, and its consumers. The
seconds of a stage S in seat k are

    load(S, k) = sum of the seconds of its atoms / speed(k)
               + sends(k)    * sum of the seconds of the nets that are made in S and cross it
               + receives(k) * sum of the seconds of the other nets that cross it

where a net crosses S if it has a pin in S and a pin elsewhere: each tensor is paid once by the stage that makes it and
once by each stage that uses it, and never by a stage it merely passes. The seconds of a net are those on the fastest
link, and the factors, one or more, say how much slower a seat's links to the next and from the last seat are. Where
values are sent while a stage computes, its load is not the sum of both, but the greater one. The objective is the
greatest load.

Source: Tarnawski, Phanishayee, Devanur, Mahajan, Nina Paravecino, "Efficient Algorithms for Device Placement of DNN
Graph Operators" (NeurIPS 2020), section 3, in the hypergraph form of the load. Speeds, factors of links, and bytes that
grow with the microbatches in flight, are our additions, and so are pins: atoms whose stage is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Net:
    """A value: the atoms that make or use it, ascending, two or more, and the seconds to send or to receive it."""

    pins: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Seat:
    """What is known of the device that runs a stage."""

    speed: float = 1.0
    memory: float = inf  # bytes
    in_flight: int = 1  # microbatches whose saved bytes the stage holds at once
    may_idle: bool = False  # it may be left without an atom
    sends: float = 1.0  # times a net's seconds, of nets that are made in the stage
    receives: float = 1.0  # and of nets that it only reads


@dataclass(frozen=True)
class Problem:
    """Atoms, arcs and nets to be placed on a row of seats, one stage a seat.

    Invariants, checked by ``validate``:
    1. there is a seat, its speed is positive, and no link is faster than the fastest;
    2. every arc goes from a lower to a higher atom;
    3. a net has two or more pins, ascending, and costs no less than nothing;
    4. the numbers of each atom are given, and none is negative;
    5. a stage has one pinned atom at most, and an arc leads from each to that of the next stage that has one;
    6. where links differ, an arc leads from a net's first pin to each other.
    """

    seconds: tuple[float, ...]  # atom -> seconds at speed 1
    arcs: tuple[tuple[int, int], ...]
    nets: tuple[Net, ...]
    seats: tuple[Seat, ...]
    kept_bytes: tuple[float, ...] = ()  # atom -> bytes held once; none given: no atom holds any
    saved_bytes: tuple[float, ...] = ()  # atom -> bytes held for each microbatch in flight
    pins: tuple[tuple[int, int], ...] = ()  # (atom, the stage that it must be in), by stage
    overlapped: bool = False  # a stage computes while it sends and receives

    def __post_init__(self) -> None:
        nothing = (0.0,) * len(self.seconds)
        object.__setattr__(self, "kept_bytes", self.kept_bytes or nothing)
        object.__setattr__(self, "saved_bytes", self.saved_bytes or nothing)
        self.validate()

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def num_stages(self) -> int:
        return len(self.seats)

    def validate(self) -> None:
        """Raises ``ValueError`` at the first invariant that does not hold."""
        if not self.seats or any(seat.speed <= 0 for seat in self.seats):
            raise ValueError(f"there must be a seat, and every speed must be positive; got {self.seats}")
        if any(not min(seat.sends, seat.receives) >= 1 for seat in self.seats):
            raise ValueError(f"the factors of links are at least 1; got {self.seats}")
        for low, high in self.arcs:
            if not 0 <= low < high < len(self):
                raise ValueError(f"arc {low} -> {high} does not go up within the {len(self)} atoms")
        for net in self.nets:
            if len(net.pins) < 2 or list(net.pins) != sorted(set(net.pins)) or not net.seconds >= 0:
                raise ValueError(f"{net} needs two or more ascending pins and no negative seconds")
            if not 0 <= net.pins[0] <= net.pins[-1] < len(self):
                raise ValueError(f"{net} has a pin outside the {len(self)} atoms")
        for name in ("seconds", "kept_bytes", "saved_bytes"):
            numbers: tuple[float, ...] = getattr(self, name)
            if len(numbers) != len(self) or not all(number >= 0 for number in numbers):
                raise ValueError(f"{name} must hold a number, not negative, for each of the {len(self)} atoms")
        if any(not (0 <= atom < len(self) and 0 <= stage < self.num_stages) for atom, stage in self.pins):
            raise ValueError(f"{self.pins} pins what is none of {len(self)} atoms or {self.num_stages} stages")
        arcs = set(self.arcs) if len(self.pins) > 1 or self.links_differ else set()
        for (low, stage), (high, later) in pairwise(self.pins):
            if stage >= later or (low, high) not in arcs:
                raise ValueError(f"atom {low} in stage {stage} and {high} in {later} need an arc, and stages to ascend")
        for net in self.nets if self.links_differ else ():
            if any((net.pins[0], pin) not in arcs for pin in net.pins[1:]):
                raise ValueError(f"{net} has pins without an arc from its first, which must be its producer")

    # What the solver reads again and again, as arrays.

    @cached_property
    def weight(self) -> Floats:
        return np.array(self.seconds, dtype=np.float64)

    @cached_property
    def kept(self) -> Floats:
        return np.array(self.kept_bytes, dtype=np.float64)

    @cached_property
    def saved(self) -> Floats:
        return np.array(self.saved_bytes, dtype=np.float64)

    @cached_property
    def speeds(self) -> Floats:
        return np.array([seat.speed for seat in self.seats], dtype=np.float64)

    def load(self, work: Floats, sent: Floats) -> Floats:
        """Seconds of stages that compute and send for so many."""
        return np.maximum(work, sent) if self.overlapped else work + sent

    @cached_property
    def factors(self) -> Floats:
        """stage -> sends, receives"""
        return np.array([(seat.sends, seat.receives) for seat in self.seats], dtype=np.float64)

    @property
    def links_differ(self) -> bool:
        """Whether some seat's links are slower than the fastest."""
        return any(max(seat.sends, seat.receives) > 1 for seat in self.seats)

    @cached_property
    def total(self) -> float:
        return float(self.weight.sum())

    @cached_property
    def bounded(self) -> bool:
        """Whether some seat's memory is less than everything would take there."""
        return any(self.kept.sum() + s.in_flight * self.saved.sum() > s.memory for s in self.seats)

    @cached_property
    def must_fill(self) -> int:
        """How many seats may not be left without an atom."""
        return sum(not seat.may_idle for seat in self.seats)

    @cached_property
    def earliest(self) -> Ints:
        """atom -> the first stage that the pins leave it: the latest pin among its ancestors"""
        stages, pins = [0] * len(self), dict(self.pins)
        for atom, sources in enumerate(self.predecessors):
            stages[atom] = pins.get(atom, max((stages[source] for source in sources), default=0))
        return np.array(stages, dtype=np.int64)

    @cached_property
    def latest(self) -> Ints:
        """atom -> the last stage that the pins leave it: the earliest pin among its descendants"""
        stages, pins = [self.num_stages - 1] * len(self), dict(self.pins)
        for atom in reversed(range(len(self))):
            bound = min((stages[target] for target in self.successors[atom]), default=self.num_stages - 1)
            stages[atom] = pins.get(atom, bound)
        return np.array(stages, dtype=np.int64)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        return _neighbours(len(self), ((high, low) for low, high in self.arcs))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        return _neighbours(len(self), self.arcs)

    @cached_property
    def nets_of(self) -> tuple[tuple[int, ...], ...]:
        return _neighbours(len(self), ((pin, index) for index, net in enumerate(self.nets) for pin in net.pins))

    @cached_property
    def ancestors(self) -> Bools:
        """``ancestors[v, u]``: u must be in place when v is; an atom is its own ancestor."""
        above = np.eye(len(self), dtype=np.bool_)
        for atom, sources in enumerate(self.predecessors):
            for source in sources:
                above[atom] |= above[source]
        return above

    @cached_property
    def ancestor_matrix(self) -> NDArray[np.float32]:
        """``ancestors`` for products that may be a little wrong."""
        return self.ancestors.astype(np.float32)

    @cached_property
    def ancestor_weight(self) -> Floats:
        return np.asarray(self.ancestors @ self.weight)

    @cached_property
    def descendant_weight(self) -> Floats:
        return np.asarray(self.weight @ self.ancestors)

    @cached_property
    def net_seconds(self) -> Floats:
        return np.array([net.seconds for net in self.nets], dtype=np.float64)

    @cached_property
    def net_pins(self) -> tuple[Ints, Ints]:
        """All pins in one row, and where each net's begin."""
        sizes = [len(net.pins) for net in self.nets]
        pins = np.array([pin for net in self.nets for pin in net.pins], dtype=np.int64)
        return pins, np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    @cached_property
    def net_sizes(self) -> Ints:
        return np.array([len(net.pins) for net in self.nets], dtype=np.int64)

    @cached_property
    def net_ends(self) -> tuple[tuple[int | None, int | None], ...]:
        """For each net the pin that comes before all others, and the one that comes after, where there is one."""
        return tuple(
            (
                net.pins[0] if self.ancestors[list(net.pins), net.pins[0]].all() else None,
                net.pins[-1] if self.ancestors[net.pins[-1], list(net.pins)].all() else None,
            )
            for net in self.nets
        )

    @cached_property
    def lower_bound(self) -> float:
        """Seconds that no plan can beat: the mean stage, and the greatest atom on the fastest seat."""
        return float(max(self.total / self.speeds.sum(), self.weight.max(initial=0.0) / self.speeds.max()))

    @property
    def upper_bound(self) -> float:
        """Seconds that no plan exceeds: everything on the slowest seat, and every net on the slowest link."""
        return float(self.total / self.speeds.min() + self.net_seconds.sum() * self.factors.max())


def _neighbours(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    found: list[dict[int, None]] = [{} for _ in range(count)]
    for here, there in pairs:
        found[here][there] = None
    return tuple(tuple(sorted(row)) for row in found)
