"""All closed sets in a window.

Free atoms are decided in topological order, in or out, for all partial sets at once: a row of bits for each. An atom
may be in only if its sources are, so each closed set comes up exactly once. A row is dropped as soon as its weight
and the open seconds that it cannot avoid any more exceed what a side may take: both only grow, so nothing in the
window is lost.

The open seconds start at the cheapest cut of the window, and grow by the slack of each net that opens: by weak duality,
a cut costs at least the greatest flow and what that leaves unused on the cut's arcs.

Source: ideals as in Tarnawski et al. (NeurIPS 2020), section 4, which enumerates all of them; to bound while
enumerating is ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipecompile.partition.cuts import closed_cut
from pipecompile.partition.family import Family, Words
from pipecompile.partition.problem import Bools, Floats, Problem
from pipecompile.partition.window import Window

PARTIAL = 8  # partial sets are cheaper than full ones


def closed_sets(problem: Problem, window: Window, most: int) -> Family | None:
    """The closed sets that the window allows, in order of weight; ``None`` if there may be more than ``most``."""
    inside, outside = window.inside, window.outside
    if window.is_contradiction:
        return Family.of(problem, [])
    rows = _Rows.of(problem, window, inside, outside)
    for position in range(len(rows.free)):
        rows = rows.decide(position)
        if len(rows.bits) > PARTIAL * most:
            return None
    family = Family.by_weight(problem, rows.members(inside))
    family = family.select(window.allows(family))
    return family if len(family) <= most else None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Partial closed sets: which free atoms are in, and what both sides weigh and have opened."""

    problem: Problem
    window: Window
    inside: Bools
    outside: Bools
    free: list[int]
    position_of: dict[int, int]
    bits: Words  # (rows, words)
    taken: Floats  # seconds in the set
    left: Floats  # seconds out of it
    taken_bytes: Floats
    left_bytes: Floats
    opened: Floats  # seconds of nets that will be open, at least
    slack: Floats  # net -> seconds that its opening adds to that

    @staticmethod
    def of(problem: Problem, window: Window, inside: Bools, outside: Bools) -> _Rows:
        free = np.flatnonzero(~(inside | outside)).tolist()
        cut = closed_cut(problem, inside, outside) if window.cut is None else window.cut
        return _Rows(
            problem,
            window,
            inside,
            outside,
            free,
            {atom: position for position, atom in enumerate(free)},
            np.zeros((1, len(free) // 64 + 1), np.uint64),
            np.array([inside @ problem.weight]),
            np.array([outside @ problem.weight]),
            np.array([inside @ problem.kept]),
            np.array([outside @ problem.kept]),
            np.array([cut.seconds]),
            cut.slack,
        )

    def decide(self, position: int) -> _Rows:
        """The rows with the next atom in and those with it out, as far as the window allows either."""
        atom = self.free[position]
        weight, kept = self.problem.seconds[atom], self.problem.kept_bytes[atom]
        closed = self._has_all(self._mask(self.problem.predecessors[atom]))
        opened_in, opened_out = self._opening(atom, position)
        taken, left, taken_bytes, left_bytes = self.taken, self.left, self.taken_bytes, self.left_bytes
        with_it = np.flatnonzero(
            closed & self._fits(taken + weight, left, taken_bytes + kept, left_bytes, self.opened + opened_in)
        )
        without = np.flatnonzero(
            self._fits(taken, left + weight, taken_bytes, left_bytes + kept, self.opened + opened_out)
        )
        added = self.bits[with_it]
        added[:, position // 64] |= np.uint64(1 << position % 64)
        return _Rows(
            self.problem,
            self.window,
            self.inside,
            self.outside,
            self.free,
            self.position_of,
            np.concatenate([added, self.bits[without]]),
            np.concatenate([taken[with_it] + weight, taken[without]]),
            np.concatenate([left[with_it], left[without] + weight]),
            np.concatenate([taken_bytes[with_it] + kept, taken_bytes[without]]),
            np.concatenate([left_bytes[with_it], left_bytes[without] + kept]),
            np.concatenate([(self.opened + opened_in)[with_it], (self.opened + opened_out)[without]]),
            self.slack,
        )

    def members(self, inside: Bools) -> Bools:
        """The full sets."""
        unpacked = np.unpackbits(self.bits.astype("<u8").view(np.uint8), axis=1, bitorder="little")
        members = np.tile(inside, (len(self.bits), 1))
        members[:, self.free] = unpacked[:, : len(self.free)].astype(np.bool_)
        return members

    def _fits(self, taken: Floats, left: Floats, taken_bytes: Floats, left_bytes: Floats, opened: Floats) -> Bools:
        before, after = self.window.before, self.window.after
        within = before.allows(taken, taken_bytes, opened) & after.allows(left, left_bytes, opened)
        return within & (opened <= self.window.most_open)

    def _opening(self, atom: int, position: int) -> tuple[Floats, Floats]:
        """Seconds of the nets that open for good if the atom comes in, and if it stays out."""
        opened_in, opened_out = np.zeros(len(self.bits)), np.zeros(len(self.bits))
        for index in self.problem.nets_of[atom]:
            net = self.problem.nets[index]
            pinned_in, pinned_out = self.inside[list(net.pins)].any(), self.outside[list(net.pins)].any()
            if self.slack[index] == 0:
                continue
            mask = self._mask(tuple(pin for pin in net.pins if self.position_of.get(pin, position) < position))
            some_in = self._has_any(mask) | pinned_in
            some_out = ~self._has_all(mask) | pinned_out
            opened_in += self.slack[index] * (some_out & ~some_in)
            opened_out += self.slack[index] * (some_in & ~some_out)
        return opened_in, opened_out

    def _mask(self, atoms: tuple[int, ...]) -> Words:
        mask = [0] * self.bits.shape[1]
        for atom in atoms:
            if (position := self.position_of.get(atom)) is not None:
                mask[position // 64] |= 1 << position % 64
        return np.array(mask, np.uint64)

    def _has_all(self, mask: Words) -> Bools:
        return np.asarray(((self.bits & mask) == mask).all(axis=1))

    def _has_any(self, mask: Words) -> Bools:
        return np.asarray(((self.bits & mask) != 0).any(axis=1))
