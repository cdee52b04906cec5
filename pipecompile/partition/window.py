"""Where the boundaries of a good plan must lie.

If no stage takes longer than T, the first k stages and the other K - k bound the set A at boundary k from both sides.
Every net that is open at A is paid by at least one stage on either side, so with equal devices

    weight(A)         + open(A) <= k T
    total - weight(A) + open(A) <= (K - k) T

The weights alone already pin most atoms: one whose ancestors weigh more than k T cannot be in A, one whose descendants
weigh more than (K - k) T must be. These pins are implied by T, not a heuristic.

Source: Tarnawski et al. (NeurIPS 2020), section 4, for ideals as boundaries; the window and its open seconds are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipecompile.partition.family import Family
from pipecompile.partition.problem import Bools, Floats, Problem, Seat

ROUNDING = 1e-9  # relative; a window is a hair too wide rather than too narrow


@dataclass(frozen=True, slots=True)
class Side:
    """What the stages on one side of a boundary can do within the limit."""

    work: float  # seconds of atoms at speed 1
    time: float  # seconds of atoms and nets
    speed: float  # of the fastest
    memory: float  # bytes

    @staticmethod
    def of(seats: tuple[Seat, ...], limit: float) -> Side:
        wide = limit * (1 + ROUNDING)
        speeds = [seat.speed for seat in seats]
        return Side(wide * sum(speeds), wide * len(seats), max(speeds), sum(seat.memory for seat in seats))

    def allows(self, weight: Floats, kept: Floats, opened: Floats) -> Bools:
        """Whether this much weight, bytes and open seconds may lie on this side."""
        within = (weight <= self.work) & (weight / self.speed + opened <= self.time)
        return np.asarray(within & (kept <= self.memory * (1 + ROUNDING)))


@dataclass(frozen=True, slots=True)
class Window:
    """The closed sets that may be boundary ``index`` of a plan within a limit (seconds)."""

    before: Side
    after: Side

    @staticmethod
    def of(problem: Problem, index: int, limit: float) -> Window:
        return Window(Side.of(problem.seats[:index], limit), Side.of(problem.seats[index:], limit))

    def allows(self, sets: Family) -> Bools:
        problem = sets.problem
        opened, weight, kept = sets.open_seconds, sets.weight, sets.kept
        before = self.before.allows(weight, kept, opened)
        return before & self.after.allows(problem.total - weight, problem.kept.sum() - kept, opened)

    def pins(self, problem: Problem) -> tuple[Bools, Bools]:
        """The atoms that every allowed set has, and those that none has."""
        return problem.descendant_weight > self.after.work, problem.ancestor_weight > self.before.work


def windows(problem: Problem, limit: float) -> list[Window]:
    """The window of each boundary."""
    return [Window.of(problem, index, limit) for index in range(1, problem.num_stages)]


def admit(sets: Family, limit: float) -> list[Family]:
    """For each boundary those of the sets that its window allows."""
    return [sets.select(window.allows(sets)) for window in windows(sets.problem, limit)]
