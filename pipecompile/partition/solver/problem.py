"""The partitioning problem as numbers: the atoms to place, their order, and the cost of a cut.

*Atoms* are indivisible. They are numbered so that every arc goes up, so a stage assignment is acyclic if it never goes
down along an arc. A *net* is one value. Its *ends* are its producer, which comes first, and its consumers. The load in
seconds of a stage S in seat k is

    load(S, k) = sum of the seconds of its atoms / speed(k)
               + sends(k)    * sum of the seconds of the nets made in S that cross it
               + receives(k) * sum of the seconds of the other nets that cross it

where a net crosses S if it has an end in S and an end elsewhere: the stage that makes a tensor pays for it once, each
stage that reads it pays once, and a stage that it passes over pays nothing. The seconds of a net are those on the
fastest link. The factors, at least 1, say how much slower a seat's links to the next and from the previous seat are.
Where communication overlaps with computation, the load is the larger of the two, not their sum. The objective is to
minimize the largest load.

Source: Tarnawski, Phanishayee, Devanur, Mahajan, Nina Paravecino, "Efficient Algorithms for Device Placement of DNN
Graph Operators" (NeurIPS 2020), "Computational Model", in the hypergraph form of the load. Speeds, factors of links,
bytes that grow with the microbatches in flight, and fixed stages of atoms are our additions.
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
    """A value: the two or more atoms that make or read it, ascending, and the seconds to send or receive it."""

    ends: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Seat:
    """The properties of the devices that run a stage."""

    speed: float = 1.0
    memory: float = inf  # bytes
    in_flight: int = 1  # microbatches whose saved bytes the stage holds at the same time
    may_idle: bool = False  # the stage may be empty
    sends: float = 1.0  # factor of the seconds of nets made in the stage
    receives: float = 1.0  # factor of the seconds of nets that it only reads


@dataclass(frozen=True)
class Problem:
    """Atoms, arcs and nets to be placed on a row of seats, one stage per seat.

    Invariants, checked by ``validate``:
    1. there is a seat, its speed is positive, and no link is faster than the fastest;
    2. every arc goes from a lower to a higher atom;
    3. a net has two or more ends, ascending, and its seconds are not negative;
    4. the numbers of each atom are given, and none is negative;
    5. at most one atom is fixed to a stage, and an arc leads from each fixed atom to that of the next such stage;
    6. if links differ, an arc leads from the first end of a net to each other end.
    """

    seconds: tuple[float, ...]  # atom -> seconds at speed 1
    arcs: tuple[tuple[int, int], ...]
    nets: tuple[Net, ...]
    seats: tuple[Seat, ...]
    kept_bytes: tuple[float, ...] = ()  # atom -> bytes held once; empty: zero
    saved_bytes: tuple[float, ...] = ()  # atom -> bytes held per microbatch in flight
    fixed_stages: tuple[tuple[int, int], ...] = ()  # (atom, its stage), by stage
    overlapped: bool = False  # communication overlaps with computation

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
            raise ValueError(f"there must be at least one seat, and every speed must be positive; got {self.seats}")
        if any(not min(seat.sends, seat.receives) >= 1 for seat in self.seats):
            raise ValueError(f"the factors of links must be at least 1; got {self.seats}")
        for low, high in self.arcs:
            if not 0 <= low < high < len(self):
                raise ValueError(f"arc {low} -> {high} must go up within the {len(self)} atoms")
        for net in self.nets:
            if len(net.ends) < 2 or list(net.ends) != sorted(set(net.ends)) or not net.seconds >= 0:
                raise ValueError(f"{net} must have two or more ascending ends and seconds >= 0")
            if not 0 <= net.ends[0] <= net.ends[-1] < len(self):
                raise ValueError(f"{net} has an end outside the {len(self)} atoms")
        for name in ("seconds", "kept_bytes", "saved_bytes"):
            numbers: tuple[float, ...] = getattr(self, name)
            if len(numbers) != len(self) or not all(number >= 0 for number in numbers):
                raise ValueError(f"{name} must have a number >= 0 for each of the {len(self)} atoms")
        if any(not (0 <= atom < len(self) and 0 <= stage < self.num_stages) for atom, stage in self.fixed_stages):
            raise ValueError(
                f"fixed_stages={self.fixed_stages} must be within {len(self)} atoms and {self.num_stages} stages"
            )
        arcs = set(self.arcs) if len(self.fixed_stages) > 1 or self.links_differ else set()
        for (low, stage), (high, later) in pairwise(self.fixed_stages):
            if stage >= later or (low, high) not in arcs:
                raise ValueError(
                    f"atoms {low} and {high}, in stages {stage} and {later}, must have ascending stages and an arc"
                )
        for net in self.nets if self.links_differ else ():
            if any((net.ends[0], end) not in arcs for end in net.ends[1:]):
                raise ValueError(f"{net} must have an arc from its first end, its producer, to each other end")

    # Arrays that the solver reads often.

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
        """Load of each stage, in seconds, from its compute and communication seconds."""
        return np.maximum(work, sent) if self.overlapped else work + sent

    @cached_property
    def factors(self) -> Floats:
        """stage -> sends, receives"""
        return np.array([(seat.sends, seat.receives) for seat in self.seats], dtype=np.float64)

    @property
    def links_differ(self) -> bool:
        """Whether a seat has links slower than the fastest."""
        return any(max(seat.sends, seat.receives) > 1 for seat in self.seats)

    @cached_property
    def total(self) -> float:
        return float(self.weight.sum())

    @cached_property
    def bounded(self) -> bool:
        """Whether a seat has less memory than all atoms together would need."""
        return any(self.kept.sum() + s.in_flight * self.saved.sum() > s.memory for s in self.seats)

    @cached_property
    def must_fill(self) -> int:
        """The number of stages that must not be empty."""
        return sum(not seat.may_idle for seat in self.seats)

    @cached_property
    def earliest(self) -> Ints:
        """atom -> the first stage that the fixed stages allow: the latest one of its ancestors"""
        stages, pins = [0] * len(self), dict(self.fixed_stages)
        for atom, sources in enumerate(self.predecessors):
            stages[atom] = pins.get(atom, max((stages[source] for source in sources), default=0))
        return np.array(stages, dtype=np.int64)

    @cached_property
    def latest(self) -> Ints:
        """atom -> the last stage that the fixed stages allow: the earliest one of its descendants"""
        stages, pins = [self.num_stages - 1] * len(self), dict(self.fixed_stages)
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
        return _neighbours(len(self), ((end, index) for index, net in enumerate(self.nets) for end in net.ends))

    @cached_property
    def ancestors(self) -> Bools:
        """``ancestors[v, u]`` is whether v depends on u. An atom is its own ancestor."""
        above = np.eye(len(self), dtype=np.bool_)
        for atom, sources in enumerate(self.predecessors):
            for source in sources:
                above[atom] |= above[source]
        return above

    @cached_property
    def ancestor_matrix(self) -> NDArray[np.float32]:
        """``ancestors`` as float32, for products that need not be exact."""
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
    def net_ends(self) -> tuple[Ints, Ints]:
        """The ends of all nets in one array, and the index at which each net begins."""
        sizes = [len(net.ends) for net in self.nets]
        ends = np.array([end for net in self.nets for end in net.ends], dtype=np.int64)
        return ends, np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    @cached_property
    def net_sizes(self) -> Ints:
        return np.array([len(net.ends) for net in self.nets], dtype=np.int64)

    @cached_property
    def outer_ends(self) -> tuple[tuple[int | None, int | None], ...]:
        """For each net, the end that precedes all others and the end that follows all others, or None."""
        return tuple(
            (
                net.ends[0] if self.ancestors[list(net.ends), net.ends[0]].all() else None,
                net.ends[-1] if self.ancestors[net.ends[-1], list(net.ends)].all() else None,
            )
            for net in self.nets
        )

    @cached_property
    def lower_bound(self) -> float:
        """A lower bound on the bottleneck in seconds: the mean stage, or the largest atom on the fastest seat."""
        return float(max(self.total / self.speeds.sum(), self.weight.max(initial=0.0) / self.speeds.max()))

    @property
    def upper_bound(self) -> float:
        """An upper bound on the load in seconds: all atoms on the slowest seat, and all nets on the slowest link."""
        return float(self.total / self.speeds.min() + self.net_seconds.sum() * self.factors.max())


def _neighbours(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    found: list[dict[int, None]] = [{} for _ in range(count)]
    for here, there in pairs:
        found[here][there] = None
    return tuple(tuple(sorted(row)) for row in found)
