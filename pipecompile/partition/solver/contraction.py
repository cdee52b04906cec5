"""What must stay together becomes one atom.

Groups that must share a stage, and the strongly connected components that they close, are contracted; nets follow, and
those that end up with the same pins are summed. Things that are pinned to one stage are such a group, and an arc leads
from each stage's to the next one's, so that every order of atoms agrees with the pins. Atoms are numbered
topologically, in the given order where arcs leave a choice, so the model's own order is a plan candidate for nothing.

Source: Tarnawski et al. (NeurIPS 2020), section 5, contraction of colour classes and of strongly connected components.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from operator import itemgetter

import networkx as nx
from networkx.utils import UnionFind

from pipecompile.errors import InfeasibleError
from pipecompile.partition.solver.problem import Net, Problem, Seat


@dataclass(frozen=True, slots=True)
class Contraction:
    """A smaller problem, and the atom of it that each of the former things went into."""

    problem: Problem
    atom_of: tuple[int, ...]

    @staticmethod
    def identity(problem: Problem) -> Contraction:
        return Contraction(problem, tuple(range(len(problem))))

    def expand(self, stage_of: Sequence[int]) -> tuple[int, ...]:
        """The stages of the former things, given those of the atoms."""
        return tuple(stage_of[atom] for atom in self.atom_of)

    def then(self, other: Contraction) -> Contraction:
        """This contraction and then another one of its problem."""
        return Contraction(other.problem, tuple(other.atom_of[atom] for atom in self.atom_of))


def contract(
    seconds: Sequence[float],
    arcs: Iterable[tuple[int, int]],
    nets: Iterable[tuple[Iterable[int], float]],
    seats: Sequence[Seat],
    *,
    together: Iterable[Sequence[int]] = (),
    kept_bytes: Sequence[float] = (),
    saved_bytes: Sequence[float] = (),
    pinned: Iterable[tuple[int, int]] = (),
    overlapped: bool = False,
) -> Contraction:
    """The problem over things that may be cyclic or bound together; O(things + arcs + pins).

    Args:
        together: groups that must share a stage.
        pinned: things and the stage that each must be in.
        overlapped: stages compute while they send and receive.

    Raises:
        InfeasibleError: things that must share a stage are pinned to two.
    """
    pinned_to = _by_stage(pinned)
    arcs = [*arcs, *((low[0], high[0]) for low, high in pairwise(pinned_to.values()))]
    atom_of = _atoms(len(seconds), arcs, [*together, *pinned_to.values()])
    count = 1 + max(atom_of, default=-1)

    def summed(numbers: Sequence[float]) -> tuple[float, ...]:
        sums = [0.0] * count
        for thing, number in enumerate(numbers):
            sums[atom_of[thing]] += number
        return tuple(sums)

    lifted = {(atom_of[low], atom_of[high]) for low, high in arcs}
    problem = Problem(
        summed(seconds),
        tuple(sorted((low, high) for low, high in lifted if low != high)),
        _nets(atom_of, nets),
        tuple(seats),
        summed(kept_bytes),
        summed(saved_bytes),
        _pins(atom_of, pinned_to),
        overlapped,
    )
    return Contraction(problem, tuple(atom_of))


def merge(problem: Problem, together: Iterable[Sequence[int]]) -> Contraction:
    """The problem with further atoms bound together."""
    return contract(
        problem.seconds,
        problem.arcs,
        ((net.pins, net.seconds) for net in problem.nets),
        problem.seats,
        together=together,
        kept_bytes=problem.kept_bytes,
        saved_bytes=problem.saved_bytes,
        pinned=problem.pins,
        overlapped=problem.overlapped,
    )


def _atoms(count: int, arcs: Sequence[tuple[int, int]], together: Iterable[Sequence[int]]) -> list[int]:
    """For each thing its atom: the groups, then the cycles that they close, in topological order."""
    bound = UnionFind(range(count))
    for group in together:
        bound.union(*group)
    while True:
        part_of = _numbered(bound[thing] for thing in range(count))
        after: list[set[int]] = [set() for _ in range(1 + max(part_of, default=-1))]
        for low, high in arcs:
            if part_of[low] != part_of[high]:
                after[part_of[low]].add(part_of[high])
        position = _topological(after)
        if len(position) == len(after):
            return [position[part] for part in part_of]
        things = dict(zip(reversed(part_of), reversed(range(count)), strict=True))  # the first of each part
        rest = nx.DiGraph((low, high) for low, row in enumerate(after) if low not in position for high in row)
        for cycle in nx.strongly_connected_components(rest):
            bound.union(*(things[part] for part in cycle))


def _numbered(names: Iterable[int]) -> list[int]:
    """The names as numbers, in the order in which they first come."""
    number: dict[int, int] = {}
    return [number.setdefault(name, len(number)) for name in names]


def _topological(after: Sequence[set[int]]) -> dict[int, int]:
    """Where each part stands if the lowest that is ready always comes next; parts on and behind cycles never are."""
    waiting = Counter(high for row in after for high in row)
    ready = [part for part in range(len(after)) if not waiting[part]]  # ascending, hence a heap
    position: dict[int, int] = {}
    while ready:
        part = heappop(ready)
        position[part] = len(position)
        for high in after[part]:
            waiting[high] -= 1
            if not waiting[high]:
                heappush(ready, high)
    return position


def _by_stage(pinned: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    things: dict[int, list[int]] = {}
    for thing, stage in sorted(pinned, key=itemgetter(1)):
        things.setdefault(stage, []).append(thing)
    return things


def _pins(atom_of: Sequence[int], pinned_to: dict[int, list[int]]) -> tuple[tuple[int, int], ...]:
    stage_of: dict[int, int] = {}
    for stage, things in pinned_to.items():
        other = stage_of.setdefault(atom_of[things[0]], stage)
        if other != stage:
            raise InfeasibleError(
                f"what is pinned to stage {other} and what is pinned to stage {stage} must share a stage, because each "
                f"needs the other or they belong together; pin them to one stage"
            )
    return tuple(stage_of.items())


def _nets(atom_of: Sequence[int], nets: Iterable[tuple[Iterable[int], float]]) -> tuple[Net, ...]:
    seconds: dict[tuple[int, ...], float] = {}
    for things, cost in nets:
        pins = tuple(sorted({atom_of[thing] for thing in things}))
        if len(pins) > 1 and cost > 0:
            seconds[pins] = seconds.get(pins, 0.0) + cost
    return tuple(Net(pins, cost) for pins, cost in seconds.items())
