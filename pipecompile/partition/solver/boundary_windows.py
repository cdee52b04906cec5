"""Windows: bounds on where the boundaries of a good plan can lie.

If no stage takes longer than T, the first k stages and the other K - k bound the set A at boundary k from both sides.
At least one stage on either side pays for each net that is open at A, so with equal devices

    weight(A)         + open(A) <= k T
    total - weight(A) + open(A) <= (K - k) T

The weights alone fix most atoms: an atom whose ancestors weigh more than k T cannot be in A, and an atom whose
descendants weigh more than (K - k) T must be in A. This follows from T; it is not a heuristic.

Minimum cuts make the windows narrower. The cheapest cut within a window is a part of both sums. In addition, the
cheapest cut of an earlier window j < k, over the nets that lie entirely inside the window after it, is paid twice
within the first k stages, by a producer and by a consumer. No net is counted by two windows. The smaller remainder
fixes more atoms, which makes the cuts more expensive, and so on, until little changes or an atom is fixed to both
sides: then no plan is within T.

Source: Tarnawski et al. (NeurIPS 2020), for ideals as boundaries; the windows and their narrowing are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

import numpy as np

from pipecompile.partition.solver.closed_sets import Family
from pipecompile.partition.solver.contraction import Contraction, merge
from pipecompile.partition.solver.cuts import Cut, closed_cut
from pipecompile.partition.solver.deadline import NEVER, Deadline
from pipecompile.partition.solver.problem import Bools, Floats, Problem, Seat

ROUNDING = 1e-9  # relative; windows are rounded outward
ROUNDS, LITTLE = 8, 0.95  # maximum number, and the share of free atoms that a round must get below


@dataclass(frozen=True, slots=True)
class Side:
    """The capacity of the stages on one side of a boundary, within the limit."""

    work: float  # seconds of atoms at speed 1
    time: float  # seconds of atoms and nets
    speed: float  # of the fastest stage
    memory: float  # bytes
    overlapped: bool  # communication overlaps with computation

    @staticmethod
    def of(seats: Sequence[Seat], limit: float, overlapped: bool = False) -> Side:
        wide = limit * (1 + ROUNDING)
        speeds, memory = [seat.speed for seat in seats], sum(seat.memory for seat in seats)
        return Side(
            work=wide * sum(speeds), time=wide * len(seats), speed=max(speeds), memory=memory, overlapped=overlapped
        )

    def less(self, spent: float, opened: float) -> Side:
        """The capacity left after ``spent`` seconds, and ``opened`` seconds of nets open at the boundary."""
        rest = self.speed * (self.time - spent - opened)
        work = min(self.work, rest) if rest < 0 or not self.overlapped else self.work
        return replace(self, work=work, time=self.time - spent)

    def allows(self, weight: Floats, kept: Floats, opened: Floats) -> Bools:
        """Whether this side has room for these weights, bytes and seconds of open nets."""
        spent = opened if self.overlapped else weight / self.speed + opened
        return np.asarray((weight <= self.work) & (spent <= self.time) & (kept <= self.memory * (1 + ROUNDING)))


@dataclass(frozen=True, eq=False, repr=False)
class Window:
    """The closed sets that can be one boundary of a plan within a limit (seconds)."""

    problem: Problem
    before: Side
    after: Side
    inside: Bools  # atoms in every allowed set
    outside: Bools  # atoms in no allowed set
    cut: Cut | None = None  # a minimum cut between ``inside`` and ``outside``

    @staticmethod
    def within(problem: Problem, before: Side, after: Side, cut: Cut | None = None) -> Window:
        """The window in which each atom is fixed that one of the sides has no room for."""
        inside, outside = problem.descendant_weight > after.work, problem.ancestor_weight > before.work
        if problem.bounded:
            inside |= problem.kept @ problem.ancestors > after.memory * (1 + ROUNDING)
            outside |= problem.ancestors @ problem.kept > before.memory * (1 + ROUNDING)
        return Window(problem=problem, before=before, after=after, inside=inside, outside=outside, cut=cut)

    @property
    def most_open(self) -> float:
        """The most seconds of open nets with which both sides together still have room for all atoms."""
        time, fastest = self.before.time + self.after.time, max(self.before.speed, self.after.speed)
        return (time if self.problem.overlapped else time - self.problem.total / fastest) / 2

    @property
    def free(self) -> int:
        """The number of atoms that are not fixed."""
        return int((~(self.inside | self.outside)).sum())

    @property
    def is_contradiction(self) -> bool:
        return bool((self.inside & self.outside).any())

    def pinned(self, boundary: int) -> Window:
        """The window of the boundary after ``boundary`` stages: atoms that must be before or after it are fixed."""
        before, after = self.problem.latest < boundary, self.problem.earliest >= boundary
        return replace(self, inside=self.inside | before, outside=self.outside | after)

    def between(self, inside: Bools, outside: Bools) -> Window:
        """The part of the window with all atoms ``inside`` and none ``outside``."""
        return replace(self, inside=self.inside | inside, outside=self.outside | outside, cut=None)

    def allows(self, sets: Family) -> Bools:
        opened, weight, kept = sets.open_seconds, sets.weight, sets.kept
        before = self.before.allows(weight, kept, opened) & sets.have(self.inside) & sets.lack(self.outside)
        return before & self.after.allows(self.problem.total - weight, self.problem.kept.sum() - kept, opened)


def windows(problem: Problem, limit: float) -> list[Window]:
    """The window of each boundary, from weights and fixed stages only."""
    found = [Window.within(problem, *sides) for sides in _sides(problem, limit)]
    return [window.pinned(boundary) for boundary, window in enumerate(found, start=1)]


def free_atoms(found: Sequence[Window]) -> int:
    """The number of atoms that are not fixed, summed over all boundaries."""
    return sum(window.free for window in found)


def narrowed(problem: Problem, limit: float, deadline: Deadline = NEVER) -> list[Window] | None:
    """The window of each boundary, narrowed by minimum cuts; ``None`` if no plan is within the limit.

    Raises:
        OutOfTime: the deadline has passed.
    """
    found, free = windows(problem, limit), inf
    for _ in range(ROUNDS):
        if any(window.is_contradiction for window in found):
            return None
        before, free = free, free_atoms(found)
        if free > LITTLE * before:
            break
        found = _narrow(problem, limit, found, deadline)
    return found


def within_free(found: list[Window]) -> tuple[Contraction, list[Window]]:
    """The problem in which all atoms with only one possible stage are merged by stage, and its windows.

    Fixed sets are closed, and so are the stages between them: no free atom can lie between merged ones.
    """
    problem = found[0].problem
    fixed = np.logical_and.reduce([window.inside | window.outside for window in found])
    stage_of = np.sum([window.outside for window in found], axis=0)
    groups = [np.flatnonzero(fixed & (stage_of == stage)).tolist() for stage in range(problem.num_stages)]
    small = merge(problem, [group for group in groups if group])
    first = np.unique(small.atom_of, return_index=True)[1]
    lifted = [(window, window.inside[first], window.outside[first]) for window in found]
    return small, [replace(w, problem=small.problem, inside=i, outside=o, cut=None) for w, i, o in lifted]


def admit(sets: Family, limit: float) -> list[Family]:
    """For each boundary, the sets that its window allows."""
    return [sets.select(window.allows(sets)) for window in windows(sets.problem, limit)]


def _sides(problem: Problem, limit: float) -> list[tuple[Side, Side]]:
    def side(seats: Sequence[Seat]) -> Side:
        return Side.of(seats, limit, problem.overlapped)

    return [(side(problem.seats[:k]), side(problem.seats[k:])) for k in range(1, problem.num_stages)]


def _narrow(problem: Problem, limit: float, found: list[Window], deadline: Deadline) -> list[Window]:
    spent_before, spent_after = [0.0], [0.0]
    for window, following in pairwise(found):
        spent_before.append(spent_before[-1] + 2 * _least(problem, window, following.inside))
    for window, preceding in pairwise(found[::-1]):
        spent_after.append(spent_after[-1] + 2 * _least(problem, window, preceding.outside))
    narrow = []
    for index, (before, after) in enumerate(_sides(problem, limit)):
        deadline.check()
        cut = closed_cut(problem, found[index].inside, found[index].outside)
        before = before.less(spent_before[index], cut.seconds)
        after = after.less(spent_after[-1 - index], cut.seconds)
        narrow.append(Window.within(problem, before, after, cut).pinned(index + 1))
    return narrow


def _least(problem: Problem, window: Window, within: Bools) -> float:
    """The least open seconds of a boundary in the window, over the nets whose ends are all in ``within``."""
    atoms, begins = problem.net_ends
    if not len(atoms):
        return 0.0
    nets = np.logical_and.reduceat(within[atoms], begins)
    return closed_cut(problem, window.inside, window.outside, nets).seconds if nets.any() else 0.0
