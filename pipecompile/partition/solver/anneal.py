"""Simulated annealing of many plans at once.

Each *walker* holds a plan. A step draws one atom and, for every walker, a stage that the atom's neighbors allow. The
move is accepted if it balances the loads, and otherwise with a probability that decreases with the temperature. Only
the two stages between which an atom moves change their loads, so a step is a few operations on arrays with a column per
walker.

The walkers start from different plans and end in different ones. From the boundaries of all of them, the dynamic
program then finds plans that no single walker has.

Source: Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing" (1983). Moves that keep an acyclic partition
acyclic are those of the refinement in Herrmann et al. (2019). A high power of the loads serves as a smooth maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipecompile.partition.solver.deadline import Deadline
from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem

POWER = 12.0  # of a load, relative to the smallest bottleneck at the start
HOT, COLD = 0.6, 0.006  # first and last temperature, relative to the weight of a mean atom
DRAWN = 256  # steps drawn at once


def annealed(
    problem: Problem, starts: Sequence[Sequence[int]], steps: int, seed: int, deadline: Deadline
) -> list[tuple[int, ...]]:
    """The best plan that each walker visits, its start included. Stops early if the deadline passes."""
    random = np.random.default_rng(seed)
    walk = _Walk(problem, np.array(starts, dtype=np.int64).T)
    cooling = walk.scale * HOT * (COLD / HOT) ** (np.arange(steps) / steps)
    for begin in range(0, steps, DRAWN):
        if deadline.passed:
            break
        atoms = random.choice(walk.movable, size=DRAWN)
        where, odds = random.random((DRAWN, walk.width)), np.log(random.random((DRAWN, walk.width)))
        for atom, draw, odd, heat in zip(atoms.tolist(), where, odds, cooling[begin : begin + DRAWN], strict=False):
            walk.step(atom, draw, odd * heat)
    return [tuple(plan) for plan in walk.best.T.tolist()]


class _Walk:
    """The plans of the walkers, and the numbers that moves change: a column per walker."""

    def __init__(self, problem: Problem, stage_of: Ints) -> None:
        self.problem, self.stage_of, self.width = problem, stage_of, stage_of.shape[1]
        everyone = np.arange(self.width)
        self.ends = np.zeros((len(problem.nets), problem.num_stages, self.width), np.int32)
        for index, net in enumerate(problem.nets):
            for end in net.ends:
                self.ends[index, stage_of[end], everyone] += 1
        self.touched = (self.ends > 0).sum(axis=1)
        self.sends, self.receives = problem.factors.T
        makers = stage_of[[net.ends[0] for net in problem.nets]][:, None] == np.arange(problem.num_stages)[:, None]
        factors = np.where(makers, self.sends[:, None], self.receives[:, None])
        crossing = ((self.ends > 0) & (self.touched > 1)[:, None]) * factors * problem.net_seconds[:, None, None]
        self.work = self._sums(problem.weight) / problem.speeds[:, None]
        self.sent = crossing.sum(axis=0)
        in_flight = np.array([seat.in_flight for seat in problem.seats])[:, None]
        self.bytes = self._sums(problem.kept) + in_flight * self._sums(problem.saved)
        self.atoms = self._sums(np.ones(len(problem)))
        self.least_atoms = np.array([float(not seat.may_idle) for seat in problem.seats])
        self.memory = np.array([seat.memory for seat in problem.seats])
        self.in_flight = in_flight[:, 0]
        self.best, self.least = stage_of.copy(), problem.load(self.work, self.sent).max(axis=0)
        self.pace = float(self.least.min()) or 1.0
        self.scale = POWER * problem.total / len(problem) / problem.speeds.mean() / self.pace
        self.arcs = np.array(problem.arcs, np.int64).reshape(-1, 2).T
        self.before = [np.array(row, np.int64) for row in problem.predecessors]
        self.after = [np.array(row, np.int64) for row in problem.successors]
        self.nets_of = [np.array(row, np.int64)[:, None] for row in problem.nets_of]
        first = np.array([net.ends[0] for net in problem.nets], np.int64)
        self.producers = [first[nets] for nets in self.nets_of]

    @property
    def movable(self) -> Ints:
        """The atoms that can move in some walker; all atoms if none can."""
        low, high = self.arcs
        bound = self.stage_of[low] == self.stage_of[high]
        back, forth = np.zeros_like(self.stage_of, np.bool_), np.zeros_like(self.stage_of, np.bool_)
        np.logical_or.at(back, high, bound)
        np.logical_or.at(forth, low, bound)
        back |= self.stage_of == self.problem.earliest[:, None]
        forth |= self.stage_of == self.problem.latest[:, None]
        some = np.flatnonzero(~(back & forth).all(axis=1))
        return some if len(some) else np.arange(len(self.problem))

    def step(self, atom: int, draw: Floats, limit: Floats) -> None:
        """Moves the atom in each walker in which the loads get worse by less than the negative of the limit."""
        here = self.stage_of[atom]
        there = self._drawn(atom, draw)
        walkers = np.flatnonzero(there != here)
        if not len(walkers):
            return
        here, there = here[walkers], there[walkers]
        nets = self.nets_of[atom]
        leaves, enters = self.ends[nets, here, walkers] == 1, self.ends[nets, there, walkers] == 0
        before = self.touched[nets, walkers]
        after = before - leaves + enters
        seconds, weight = self.problem.net_seconds[nets], self.problem.weight[atom]
        producers = self.producers[atom]
        home, mine = self.stage_of[producers, walkers], producers == atom  # the stage that makes a net, by its producer
        less = self._paid(here, (home == here) & ~mine) * ~leaves - self._paid(here, home == here) * (before > 1)
        more = self._paid(there, (home == there) | mine) * (after > 1) - self._paid(there, home == there) * ~enters
        less, more = (seconds * less).sum(axis=0), (seconds * more).sum(axis=0)
        low, high = self._load(here, walkers), self._load(there, walkers)
        lower, higher = self._load(here, walkers, -weight, less), self._load(there, walkers, weight, more)
        powers = (np.stack([low, high, lower, higher]) / self.pace) ** POWER
        moves = powers[0] + powers[1] - powers[2] - powers[3] > limit[walkers]
        moves &= self.atoms[here, walkers] > self.least_atoms[here]
        if self.problem.bounded:
            nbytes = self.problem.kept[atom] + self.in_flight[there] * self.problem.saved[atom]
            moves &= self.bytes[there, walkers] + nbytes <= self.memory[there]
        some = np.flatnonzero(moves)
        if len(some):
            self._move(atom, walkers[some], here[some], there[some], after[:, some], less[some], more[some])

    def _load(self, stages: Ints, walkers: Ints, weight: float = 0.0, sent: Floats | float = 0.0) -> Floats:
        """Load of one stage of each walker, with ``weight`` and ``sent`` seconds added."""
        work = self.work[stages, walkers] + weight / self.problem.speeds[stages]
        return self.problem.load(work, self.sent[stages, walkers] + sent)

    def _paid(self, stages: Ints, makes: Bools) -> Floats:
        """net, walker -> the factor that a stage pays for a crossing net, depending on whether it makes the net"""
        return np.asarray(np.where(makes, self.sends[stages], self.receives[stages]))

    def _drawn(self, atom: int, draw: Floats) -> Ints:
        """A stage for the atom in each walker, between the stages of its sources and of its targets."""
        first: Ints = self.stage_of[self.before[atom]].max(axis=0, initial=self.problem.earliest[atom])
        last: Ints = self.stage_of[self.after[atom]].min(axis=0, initial=self.problem.latest[atom])
        return np.asarray(first + (draw * (last - first + 1)).astype(np.int64))

    def _move(
        self, atom: int, walkers: Ints, here: Ints, there: Ints, touched: Ints, less: Floats, more: Floats
    ) -> None:
        nets, problem = self.nets_of[atom], self.problem
        self.stage_of[atom, walkers] = there
        self.touched[nets, walkers] = touched
        for stages, count, seconds in ((here, -1, less), (there, 1, more)):
            self.ends[nets, stages, walkers] += count
            self.work[stages, walkers] += count * problem.weight[atom] / problem.speeds[stages]
            self.sent[stages, walkers] += seconds
            self.atoms[stages, walkers] += count
            self.bytes[stages, walkers] += count * (problem.kept[atom] + self.in_flight[stages] * problem.saved[atom])
        slowest = problem.load(self.work[:, walkers], self.sent[:, walkers]).max(axis=0)
        better = slowest < self.least[walkers]
        if better.any():
            chosen = walkers[better]
            self.least[chosen] = slowest[better]
            self.best[:, chosen] = self.stage_of[:, chosen]

    def _sums(self, numbers: Floats) -> Floats:
        """stage, walker -> the sum of the numbers of the atoms there"""
        sums = np.zeros((self.problem.num_stages, self.width))
        everyone = np.arange(self.width)
        for atom in np.flatnonzero(numbers):
            sums[self.stage_of[atom], everyone] += numbers[atom]
        return sums
