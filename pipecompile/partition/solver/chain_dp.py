"""The best chain of closed sets, one from each family: the dynamic program at the end of every search.

    nothing  ⊆  A in families[0]  ⊆  B in families[1]  ⊆ ... ⊆  everything

A stage is the difference B - A of two consecutive sets. It makes the nets that are open at B and not at A (those open
at A were made earlier), and it reads the nets that are open at A and have an end in between. So for all pairs at once

    crossing(B - A) = sends * (open(B) - open(A and B)) + receives * (open(A) - passing(A, B))

and the terms with both sets are matrix products over the few nets that are open on both sides. The program finds the
smallest bottleneck first, then, among the plans that have it, the one with the least communication.

Source: the dynamic program over ideals of Tarnawski et al. (NeurIPS 2020); the matrix form of the load is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from pipecompile.partition.solver.closed_sets import Family, Words
from pipecompile.partition.solver.deadline import NEVER, Deadline
from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem, Seat

BLOCK = 2_000_000  # pairs processed at once
SPARSE = 15  # if fewer than one pair in 15 is a candidate, pairs are multiplied one by one
TIE = 1 + 1e-12


@dataclass(frozen=True, slots=True)
class Chain:
    """A plan and its bottleneck in seconds."""

    bottleneck: float
    stage_of: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """The stages between the sets of two families, one per entry."""

    lower: Ints  # index into the lower family
    upper: Ints
    loads: Floats
    crossing: Floats  # seconds of the load


def best_chain(problem: Problem, families: Sequence[Family], limit: float, deadline: Deadline = NEVER) -> Chain | None:
    """The best plan with one boundary from each family; ``None`` if all exceed the limit (seconds).

    Raises:
        OutOfTime: the deadline has passed.
    """
    return _chain(problem, families, limit, deadline, tight=True)


def thrifty_chain(
    problem: Problem, families: Sequence[Family], limit: float, deadline: Deadline = NEVER
) -> Chain | None:
    """The plan with the least communication among all such plans within the limit."""
    return _chain(problem, families, limit, deadline, tight=False)


def _chain(problem: Problem, families: Sequence[Family], limit: float, deadline: Deadline, tight: bool) -> Chain | None:
    links = [Family.nothing(problem), *families, Family.everything(problem)]
    links, least = _forward(problem, links, limit, deadline)
    if least > limit:
        return None
    bottleneck = least if tight else limit
    rows = _least_crossing(problem, links, bottleneck * TIE, deadline)
    stage_of = np.zeros(len(problem), np.int64)
    for link, row in zip(links[1:-1], rows, strict=True):
        stage_of += ~link.members[row]
    return Chain(bottleneck, tuple(stage_of.tolist()))


def stages_between(
    problem: Problem, seat: Seat, lower: Family, upper: Family, limit: float, deadline: Deadline
) -> Stages:
    """All stages between a set of each family that fit into the seat's memory and within the limit."""
    pairs = _Pairs(problem=problem, seat=seat, lower=lower, upper=upper, limit=limit)
    width = max(1, BLOCK // max(1, len(lower)))
    parts = []
    for begin in range(0, len(upper), width):
        deadline.check()
        parts.append(pairs.stages(begin, min(begin + width, len(upper))))
    if not parts:
        return Stages(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    return Stages(
        np.concatenate([part.lower for part in parts]),
        np.concatenate([part.upper for part in parts]),
        np.concatenate([part.loads for part in parts]),
        np.concatenate([part.crossing for part in parts]),
    )


def _forward(problem: Problem, links: list[Family], limit: float, deadline: Deadline) -> tuple[list[Family], float]:
    """The sets that a chain within the limit can reach, and the smallest bottleneck."""
    reached = [links[0]]
    value = np.zeros(1)
    for seat, link in zip(problem.seats, links[1:], strict=True):
        stages = stages_between(problem, seat, reached[-1], link, limit, deadline)
        following = np.full(len(link), inf)
        np.minimum.at(following, stages.upper, np.maximum(value[stages.lower], stages.loads))
        alive = following <= limit
        reached.append(link.select(alive))
        value = following[alive]
    return reached, float(value.min(initial=inf))


def _least_crossing(problem: Problem, links: list[Family], limit: float, deadline: Deadline) -> list[int]:
    """The row of each inner family in the chain within the limit that has the least communication."""
    value = np.zeros(1)
    came_from: list[Ints] = []
    for seat, lower, upper in zip(problem.seats, links, links[1:], strict=False):
        stages = stages_between(problem, seat, lower, upper, limit, deadline)
        sums = value[stages.lower] + stages.crossing
        order = np.lexsort((sums, stages.upper))
        reached, first = np.unique(stages.upper[order], return_index=True)
        value = np.full(len(upper), inf)
        value[reached] = sums[order[first]]
        parent = np.zeros(len(upper), np.int64)
        parent[reached] = stages.lower[order[first]]
        came_from.append(parent)
    chosen = [0]
    for parent in reversed(came_from[1:]):
        chosen.append(int(parent[chosen[-1]]))
    return chosen[:0:-1]


@dataclass(frozen=True)
class _Pairs:
    """The pairs of sets of two families, processed a block of upper sets at a time."""

    problem: Problem
    seat: Seat
    lower: Family
    upper: Family
    limit: float

    def stages(self, begin: int, end: int) -> Stages:
        """The stages that end in the upper sets ``begin`` to ``end``."""
        first, second = self._candidates(begin, end)
        crossing = self._crossing(first, second)
        work = (self.upper.weight[second] - self.lower.weight[first]) / self.seat.speed
        loads = self.problem.load(work, crossing)
        if self.seat.may_idle:
            idle = self.lower.size[first] == self.upper.size[second]
            loads[idle] = crossing[idle] = 0.0
        within = np.flatnonzero(loads <= self.limit)
        return Stages(first[within], second[within], loads[within], crossing[within])

    def _candidates(self, begin: int, end: int) -> tuple[Ints, Ints]:
        """The nested pairs of sets that fit into memory, and within the limit without communication."""
        lower, upper, problem = self.lower, self.upper, self.problem
        least = upper.weight[begin:end] * (1 - 1e-12) - self.limit * TIE * self.seat.speed
        low = int(np.searchsorted(lower.weight, least[0]))
        high = int(np.searchsorted(lower.weight, upper.weight[end - 1] * TIE, side="right"))
        rows, columns = slice(low, high), slice(begin, end)
        fits = lower.weight[rows, None] >= least
        fits &= _nested(lower.words[rows], upper.words[columns])
        if problem.bounded:
            nbytes = upper.kept[columns] - lower.kept[rows, None]
            nbytes += self.seat.in_flight * (upper.saved[columns] - lower.saved[rows, None])
            fits &= nbytes <= self.seat.memory * (1 + 1e-12)
        if not self.seat.may_idle:
            fits &= lower.size[rows, None] < upper.size[columns]
        first, second = np.nonzero(fits)
        return first + low, second + begin

    def _crossing(self, first: Ints, second: Ints) -> Floats:
        """Seconds of the nets that cross each stage."""
        seat = self.seat
        apart = seat.receives * self.lower.open_seconds[first] + seat.sends * self.upper.open_seconds[second]
        left, right = self._columns
        if not left.shape[1] or not len(first):
            return apart
        low, high, begin, end = first.min(), first.max() + 1, second.min(), second.max() + 1
        if len(first) * SPARSE > (high - low) * (end - begin):
            shared = (left[low:high] @ right[begin:end].T)[first - low, second - begin]
        else:
            shared = np.einsum("ij,ij->i", left[first], right[second])
        return np.asarray(np.maximum(apart - shared, 0.0))

    @cached_property
    def _columns(self) -> tuple[Floats, Floats]:
        """The factors for ``open`` and ``passing``. A net with two ends is passing whenever it is open at both sets."""
        nets = np.flatnonzero(self.lower.is_open.any(axis=0) & self.upper.is_open.any(axis=0))
        sizes, seconds = self.problem.net_sizes[nets], self.problem.net_seconds[nets]
        inside = (self.lower.ends_inside[:, nets], self.upper.ends_inside[:, nets])
        columns: list[tuple[Bools, ...]] = [tuple((ends > 0) & (ends < sizes) for ends in inside)]
        sends, receives = self.seat.sends, self.seat.receives
        paid = [seconds * np.where(sizes > 2, sends, sends + receives)]
        for count in range(1, int(sizes.max(initial=0))):
            some = np.flatnonzero((sizes > 2) & (sizes > count))
            columns.append(tuple(ends[:, some] == count for ends in inside))
            paid.append(receives * seconds[some])
        left, right = (np.hstack(side).astype(np.float64) for side in zip(*columns, strict=True))
        return left * np.concatenate(paid), right


def _nested(lower: Words, upper: Words) -> Bools:
    outside = np.zeros((len(lower), len(upper)), np.bool_)
    some, all_ = np.bitwise_or.reduce(lower, axis=0), np.bitwise_and.reduce(upper, axis=0)
    for word in np.flatnonzero(some & ~all_):
        outside |= (lower[:, word, None] & ~upper[:, word]) != 0
    return ~outside
