"""All closed sets in a window.

Free atoms are decided in topological order, in or out, for all partial sets at once, with a row of bits per set. An
atom may be in only if its sources are, so each closed set occurs exactly once. A row is dropped as soon as its weight
plus the open seconds that it can no longer avoid exceed the capacity of a side. Both only grow, so no set of the window
is lost.

The open seconds start at the cheapest cut of the window, and grow by the slack of each net that opens: by weak duality,
a cut costs at least the maximum flow plus the capacity that the flow leaves unused on the arcs of the cut.

Source: ideals as in Tarnawski et al. (NeurIPS 2020), which enumerates all of them; the bounds during enumeration are
ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipecompile.partition.solver.boundary_windows import Window
from pipecompile.partition.solver.closed_sets import Family, Words
from pipecompile.partition.solver.cuts import closed_cut
from pipecompile.partition.solver.deadline import NEVER, Deadline
from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem

PARTIAL = 8  # how many partial sets cost as much as one full set


def closed_sets(problem: Problem, window: Window, most: int, deadline: Deadline = NEVER) -> Family | None:
    """The closed sets that the window allows; ``None`` if there can be more than ``most``.

    Raises:
        OutOfTime: the deadline has passed.
    """
    if window.is_contradiction:
        return Family.of(problem, [])
    search = _Search(problem, window)
    rows = search.start()
    for position in range(len(search.free)):
        deadline.check()
        rows = search.decide(rows, position)
        if len(rows) > PARTIAL * most:
            return None
    family = search.family(rows)
    return family if len(family) <= most else None


def cheapest_sets(problem: Problem, window: Window, most: int, deadline: Deadline = NEVER) -> Family:
    """Closed sets that the window allows, by beam search: only those with the fewest open seconds are kept.

    Raises:
        OutOfTime: the deadline has passed.
    """
    if window.is_contradiction:
        return Family.of(problem, [])
    search = _Search(problem, window)
    rows = search.start()
    for position in range(len(search.free)):
        deadline.check()
        rows = search.decide(rows, position)
        if len(rows) > 2 * PARTIAL * most:
            rows = rows.select(_least(rows.opened, PARTIAL * most))
    family = search.family(rows)
    return family.select(_least(family.open_seconds, most))


def _least(seconds: Floats, count: int) -> Ints:
    return np.sort(np.argsort(seconds, kind="stable")[:count])


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Partial closed sets: the atoms that are in, and the numbers of both sides."""

    bits: Words  # (rows, words), a bit per free atom
    taken: Floats  # (rows, 2), seconds and bytes in the set
    left: Floats  # (rows, 2), seconds and bytes out of it
    opened: Floats  # (rows,), lower bound of the seconds of open nets

    def __len__(self) -> int:
        return len(self.bits)

    def select(self, which: Ints) -> _Rows:
        return _Rows(self.bits[which], self.taken[which], self.left[which], self.opened[which])

    def joined(self, other: _Rows) -> _Rows:
        return _Rows(
            np.concatenate([self.bits, other.bits]),
            np.concatenate([self.taken, other.taken]),
            np.concatenate([self.left, other.left]),
            np.concatenate([self.opened, other.opened]),
        )


class _Search:
    """Decides the free atoms of a window, one after the other."""

    def __init__(self, problem: Problem, window: Window) -> None:
        self.problem, self.window = problem, window
        self.cut = window.cut or closed_cut(problem, window.inside, window.outside)
        self.free: list[int] = np.flatnonzero(~(window.inside | window.outside)).tolist()
        self.position_of = {atom: position for position, atom in enumerate(self.free)}
        self.numbers = np.stack([problem.weight, problem.kept], axis=1)

    def start(self) -> _Rows:
        """One row in which no atom is decided."""
        bits = np.zeros((1, len(self.free) // 64 + 1), np.uint64)
        taken, left = self.window.inside @ self.numbers, self.window.outside @ self.numbers
        return _Rows(bits, taken[None], left[None], np.array([self.cut.seconds]))

    def decide(self, rows: _Rows, position: int) -> _Rows:
        """The rows with the next atom in, and the rows with it out, without those that the window excludes."""
        atom = self.free[position]
        closed = _has_all(rows.bits, self._mask(rows, self.problem.predecessors[atom]))
        opened_in, opened_out = self._opening(rows, atom, position)
        bit = np.zeros(rows.bits.shape[1], np.uint64)
        bit[position // 64] = 1 << position % 64
        number = self.numbers[atom]
        with_it = _Rows(rows.bits | bit, rows.taken + number, rows.left, rows.opened + opened_in)
        without = _Rows(rows.bits, rows.taken, rows.left + number, rows.opened + opened_out)
        kept = with_it.select(np.flatnonzero(closed & self._fits(with_it)))
        return kept.joined(without.select(np.flatnonzero(self._fits(without))))

    def family(self, rows: _Rows) -> Family:
        """The complete sets that the window allows."""
        unpacked = np.unpackbits(rows.bits.astype("<u8").view(np.uint8), axis=1, bitorder="little")
        members = np.tile(self.window.inside, (len(rows), 1))
        members[:, self.free] = unpacked[:, : len(self.free)].astype(np.bool_)
        family = Family.by_weight(self.problem, members)
        return family.select(self.window.allows(family))

    def _fits(self, rows: _Rows) -> Bools:
        window = self.window
        before = window.before.allows(rows.taken[:, 0], rows.taken[:, 1], rows.opened)
        after = window.after.allows(rows.left[:, 0], rows.left[:, 1], rows.opened)
        return before & after & (rows.opened <= window.most_open)

    def _opening(self, rows: _Rows, atom: int, position: int) -> tuple[Floats, Floats]:
        """Seconds of the nets that become open for certain if the atom is in, and if it is out."""
        opened_in, opened_out = np.zeros(len(rows)), np.zeros(len(rows))
        for index in self.problem.nets_of[atom]:
            if self.cut.slack[index] == 0:
                continue
            ends = self.problem.nets[index].ends
            mask = self._mask(rows, tuple(end for end in ends if self.position_of.get(end, position) < position))
            some_in = _has_any(rows.bits, mask) | self.window.inside[list(ends)].any()
            some_out = ~_has_all(rows.bits, mask) | self.window.outside[list(ends)].any()
            opened_in += self.cut.slack[index] * (some_out & ~some_in)
            opened_out += self.cut.slack[index] * (some_in & ~some_out)
        return opened_in, opened_out

    def _mask(self, rows: _Rows, atoms: tuple[int, ...]) -> Words:
        """The bits of the free ones among the atoms."""
        mask = [0] * rows.bits.shape[1]
        for atom in atoms:
            if (position := self.position_of.get(atom)) is not None:
                mask[position // 64] |= 1 << position % 64
        return np.array(mask, np.uint64)


def _has_all(bits: Words, mask: Words) -> Bools:
    return np.asarray(((bits & mask) == mask).all(axis=1))


def _has_any(bits: Words, mask: Words) -> Bools:
    return np.asarray(((bits & mask) != 0).any(axis=1))
