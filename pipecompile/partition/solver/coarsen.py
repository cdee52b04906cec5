"""Coarsening without loss: an atom joins the neighbor that it can always be moved to.

Atom x may join y, its only predecessor or its only successor, if moving x into the stage of y increases no load in any
plan. The move changes only the nets of x, and only in the two stages: nets without y may start to cross, and the net
{x, y} disappears. So the move is free if

    seconds of x  +  sum of c(e) over nets e with x, without y   <=   c({x, y})

for example a cheap operation with a large result, a constant, or a mask that is expanded for its reader. This also
holds if links differ: a net that starts to cross a stage is made there if {x, y} was, and only read there if {x, y}
was, so it has the same factor, which is at least 1. If memory is limited, x must also hold no bytes. If communication
overlaps with computation, x must take no seconds. With a cap above zero, the rule also moves light atoms. Their seconds
are the loss, which is bounded by the cap. Heavy-edge contraction, the usual rule, merges across the narrow cuts between
transformer blocks.

Source: ours; that contracting an atom with one neighbor on a side is safe is in Herrmann et al., "Multilevel
Algorithms for Acyclic Partitioning of Directed Acyclic Graphs" (2019), on coarsening.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from pipecompile.partition.solver.contraction import Contraction, merge
from pipecompile.partition.solver.problem import Floats, Problem

MANY = 2.5
SHARES = (3200, 1600, 800, 400, 200, 100, 50)  # the caps are a mean stage divided by each of these


def lossless(problem: Problem) -> Contraction:
    """Contracts atoms as long as this is free."""
    quotient = _Quotient(problem)
    quotient.join_dominated()
    return merge(problem, quotient.groups)


def lossy(problem: Problem, most: int) -> Contraction:
    """Contracts increasingly heavy atoms until ``most`` are left, or the next would weigh more than 2% of a stage.

    Graphs with parallel branches keep far more atoms. Then stretches of the order of atoms are contracted, cut at the
    fewest open seconds, until about ``MANY`` times ``most`` are left.
    """
    quotient = _Quotient(problem)
    quotient.join_dominated()
    for share in SHARES:
        if quotient.count <= most:
            break
        quotient.join_lighter_than(1 / problem.num_stages / share)
    contraction = merge(problem, quotient.groups)
    if quotient.count <= MANY * most:
        return contraction
    return contraction.then(merge(contraction.problem, _stretches(contraction.problem, MANY * most)))


def _stretches(problem: Problem, most: float) -> list[range]:
    """Stretches of the order, each lighter than 1.5 / ``most`` of the total weight, or a single atom."""
    weight = np.cumsum(_shares(problem))
    mean = float(weight[-1]) / most
    opened = np.zeros(len(problem))  # seconds open at the boundary after each atom
    for net in problem.nets:
        opened[net.ends[0]] += net.seconds
        opened[net.ends[-1]] -= net.seconds
    opened = np.cumsum(opened)
    ends = {0, len(problem), *(end for atom, _ in problem.fixed_stages for end in (atom, atom + 1))}
    end, done = 0, 0.0
    while end < len(problem):
        low, high = np.searchsorted(weight, [done + mean / 2, done + mean * 3 / 2], side="right")
        low = max(int(low), end)
        end = 1 + low + int(opened[low : max(int(high), low + 1)].argmin()) if low < len(problem) else len(problem)
        done = float(weight[end - 1])
        ends.add(end)
    return [range(first, last) for first, last in pairwise(sorted(ends)) if last - first > 1]


class _Quotient:
    """The remaining atoms, their neighbors and their nets, while atoms are joined."""

    def __init__(self, problem: Problem) -> None:
        self.count = len(problem)
        self.members = [[atom] for atom in range(len(problem))]
        self.before = [set(sources) for sources in problem.predecessors]
        self.after = [set(targets) for targets in problem.successors]
        self.nets_of = [set(nets) for nets in problem.nets_of]
        self.ends = [set(net.ends) for net in problem.nets]
        self.net_seconds = [net.seconds for net in problem.nets]
        self.seconds = (problem.weight / problem.speeds.min()).tolist()  # upper bound
        self.nbytes = ((problem.kept + problem.saved) * problem.bounded).tolist()
        self.weight, self.overlapped = _shares(problem), problem.overlapped
        self.absorbed = [0.0] * len(problem)
        self.fixed = {atom for atom, _ in problem.fixed_stages}

    @property
    def groups(self) -> list[list[int]]:
        return [members for members in self.members if len(members) > 1]

    def join_dominated(self) -> None:
        """Joins all atoms that can be joined without loss."""
        self._join_all(self._is_free, lambda atom, host: self._gained(atom, host, True) <= 0)

    def join_lighter_than(self, cap: float) -> None:
        """Joins light atoms, as long as no host absorbs more than ``cap``, a share of seconds or bytes."""
        self._join_all(
            lambda atom: self.weight[atom] <= cap,
            lambda atom, host: self._gained(atom, host) <= 0 and self._absorbs(atom, host, cap),
        )

    def _join_all(self, is_light: Callable[[int], bool], may: Callable[[int, int], bool]) -> None:
        waiting = [a for a, members in enumerate(self.members) if members and a not in self.fixed and is_light(a)]
        while waiting:
            later = [atom for atom in waiting if not self._joined(atom, may)]
            if len(later) == len(waiting):
                return
            waiting = [atom for atom in later if is_light(atom)]

    def _is_free(self, atom: int) -> bool:
        return self.nbytes[atom] == 0 and not (self.overlapped and self.seconds[atom])

    def _joined(self, atom: int, may: Callable[[int, int], bool]) -> bool:
        for side in (self.before[atom], self.after[atom]):
            if len(side) == 1:
                (host,) = side
                if may(atom, host):
                    self._join(atom, host)
                    return True
        return False

    def _gained(self, atom: int, host: int, its_own: bool = False) -> float:
        """Upper bound of the seconds a stage gains if the atom moves to its host (with its own, if ``its_own``)."""
        gained = self.seconds[atom] if its_own else 0.0
        for net in self.nets_of[atom]:
            if host not in self.ends[net]:
                gained += self.net_seconds[net]
            elif len(self.ends[net]) == 2:
                gained -= self.net_seconds[net]
        return gained

    def _absorbs(self, atom: int, host: int, cap: float) -> bool:
        """Adds the atom's weight to what its host has absorbed, if that stays within the cap."""
        if self.absorbed[host] + self.weight[atom] > cap:
            return False
        self.absorbed[host] += self.weight[atom]
        return True

    def _join(self, atom: int, host: int) -> None:
        for one_way, back in ((self.before, self.after), (self.after, self.before)):
            for other in one_way[atom]:
                back[other].discard(atom)
                if other != host:
                    back[other].add(host)
                    one_way[host].add(other)
        for net in self.nets_of[atom]:
            self.ends[net].discard(atom)
            self.ends[net].add(host)
            self.nets_of[host].add(net)
            if len(self.ends[net]) == 1:
                self.nets_of[host].discard(net)
        self.members[host] += self.members[atom]
        self.members[atom] = []
        self.seconds[host] += self.seconds[atom]
        self.nbytes[host] += self.nbytes[atom]
        self.weight[host] += self.weight[atom]
        self.count -= 1


def _shares(problem: Problem) -> list[float]:
    """atom -> its largest share of all seconds, or of all bytes if memory is limited"""
    numbers: list[Floats] = [problem.weight, *[problem.kept, problem.saved] * problem.bounded]
    shares = [number / number.sum() for number in numbers if number.any()]
    return np.max([np.zeros(len(problem)), *shares], axis=0).tolist()  # type: ignore[no-any-return]
