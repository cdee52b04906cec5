"""Plans whose ranks run several stages each: the busiest rank counts, not the slowest stage.

The solver balances stages. From its plan, single atoms move between stages that their neighbors allow, in simulated
annealing, until ranks are balanced too. A high power of the loads is a smooth maximum. Stages count too, but less: the
busiest rank bounds a step of many microbatches, and the longer the slowest stage is, the more ranks wait for each other
before and after. Memory is that of a rank, too: what exceeds it costs more than any load.

    load of a rank = seconds of its atoms / speed
                   + sends    * seconds of each net made on it that has an end on another rank
                   + receives * seconds of each net made on another rank, once for each of its stages that reads it

Source: Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing" (1983), as in ``anneal``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from time import thread_time

from pipecompile.partition.solver.problem import Problem
from pipecompile.partition.solver.score import check, rank_bytes, rank_loads

STEPS, PER_MOVE = 6_000, 60  # moves that are tried in one walk, at most, and for each atom and stage
WALKS = 3
POWER = 12  # of loads, relative to the mean of ranks
STAGES = 1e-2  # weight of the squares of stages, relative to the mean
HOT, COLD = 10.0, 1e-3  # first and last temperature, in the change that moving a mean atom makes
EVEN = 0.1  # of the seconds of the slowest stage count beside those of the busiest rank
EMPTY = 0.5  # a stage without atoms, which plans pass through to others, relative to ranks that are balanced
EXCEEDS = 1e6  # a rank beyond its memory, and as much again if it needs twice of it


def balanced(
    problem: Problem, rank_of: Sequence[int], memory: Sequence[float], start: Sequence[int], seconds: float
) -> tuple[int, ...]:
    """The best plan found near another one: within memory, then by its busiest rank and its slowest stage.

    Args:
        problem: its seats have no memory limits.
        rank_of: the rank of each seat.
        memory: bytes of each rank.
        start: a plan of the problem.
        seconds: of CPU time, after which the walks end.
    """
    end = thread_time() + seconds
    here = tuple(start)
    plans = [here]
    for seed in range(WALKS):
        here, smooth = _Walk(problem, rank_of, memory, here).run(Random(seed), end)
        plans += [here, smooth]

    def measure(plan: tuple[int, ...]) -> tuple[float, float]:
        over, busiest, slowest = quality(problem, rank_of, memory, plan)
        return over, busiest + EVEN * slowest

    best = min(plans, key=measure)
    check(problem, best)
    return best


def quality(
    problem: Problem, rank_of: Sequence[int], memory: Sequence[float], plan: Sequence[int]
) -> tuple[float, float, float]:
    """What counts of a plan: bytes beyond the memory of ranks, the busiest rank, and the slowest stage."""
    needed = rank_bytes(problem, plan, rank_of)
    over = sum(max(0.0, n - limit * (1 + 1e-12)) for n, limit in zip(needed, memory, strict=True))
    stages = [0.0] * problem.num_stages
    for atom, stage in enumerate(plan):
        stages[stage] += problem.seconds[atom] / problem.seats[stage].speed
    return over, max(rank_loads(problem, plan, rank_of)), max(stages)


class _Walk:
    """A plan that changes, with the sums that its moves change."""

    def __init__(self, problem: Problem, rank_of: Sequence[int], memory: Sequence[float], plan: Sequence[int]) -> None:
        self.problem, self.rank_of, self.memory = problem, rank_of, memory
        ranks = range(1 + max(rank_of))
        self.plan = list(plan)
        self.work, self.sent, self.bytes = ([0.0] * len(ranks) for _ in range(3))
        self.stage_work = [0.0] * problem.num_stages
        self.count = [0] * problem.num_stages
        self.empty = sum(not seat.may_idle for seat in problem.seats)
        self.goal = (0, 0.0, 0.0)  # empty stages, bytes beyond memory, seconds of the busiest rank
        for atom, stage in enumerate(plan):
            self._put(atom, stage, 1)
        for net in range(len(problem.nets)):
            self._charge(net, 1)
        self.mean = sum(self.work) / len(ranks) or 1.0
        self.per_rank = problem.num_stages / len(ranks)
        self.open = [atom for atom in range(len(plan)) if self._range(atom) is not None]
        self.place = {atom: index for index, atom in enumerate(self.open)}

    def run(self, random: Random, end: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The plan of a walk with the least busy busiest rank, and the one with the best score."""
        now = self._score()
        lowest = math.inf if self.empty else now
        best, least = tuple(self.plan), self.goal
        smooth = best
        steps = min(STEPS, PER_MOVE * len(self.plan) * self.problem.num_stages)
        heat = HOT * POWER / max(1, len(self.plan))
        for step in range(steps):
            if not self.open or (step % 64 == 0 and thread_time() > end):
                break
            atom = self.open[random.randrange(len(self.open))]
            stage = self._drawn(atom, random)
            here = self.plan[atom]
            self._move(atom, stage)
            then = self._score()
            temperature = heat * (COLD / HOT) ** (step / steps)
            if then <= now or random.random() < math.exp((now - then) / (temperature * max(now, 1e-9))):
                now = then
                self._reopen(atom)
                if self.goal < least:
                    best, least = tuple(self.plan), self.goal
                if now < lowest and not self.empty:
                    smooth, lowest = tuple(self.plan), now
            else:
                self._move(atom, here)
        return best, smooth

    def _score(self) -> float:
        """The smooth score of the plan; sets ``goal``, which is what is minimized."""
        overlapped = self.problem.overlapped
        total = over = most = 0.0
        for rank, limit in enumerate(self.memory):
            load = max(self.work[rank], self.sent[rank]) if overlapped else self.work[rank] + self.sent[rank]
            most = max(most, load)
            total += (load / self.mean) ** POWER
            if self.bytes[rank] > limit * (1 + 1e-12):
                over += self.bytes[rank] - limit
                total += EXCEEDS * (self.bytes[rank] / limit if limit else 1 + self.bytes[rank])
        self.goal = (self.empty, over, most)
        squares = sum((self.per_rank * work / self.mean) ** 2 for work in self.stage_work)
        return total + STAGES * squares + EMPTY * len(self.memory) * self.empty

    def _range(self, atom: int) -> tuple[int, int] | None:
        """The first and the last stage that the atom's neighbors allow; None if it cannot move."""
        problem, plan = self.problem, self.plan
        low = max((plan[source] for source in problem.predecessors[atom]), default=0)
        high = min((plan[user] for user in problem.successors[atom]), default=problem.num_stages - 1)
        low, high = max(low, int(problem.earliest[atom])), min(high, int(problem.latest[atom]))
        return (low, high) if low < high else None

    def _drawn(self, atom: int, random: Random) -> int:
        allowed = self._range(atom)
        if allowed is None:
            return self.plan[atom]
        near = [stage for stage in range(allowed[0], allowed[1] + 1) if stage != self.plan[atom]]
        return near[random.randrange(len(near))]

    def _move(self, atom: int, stage: int) -> None:
        nets = self.problem.nets_of[atom]
        for net in nets:
            self._charge(net, -1)
        self._put(atom, self.plan[atom], -1)
        self.plan[atom] = stage
        self._put(atom, stage, 1)
        for net in nets:
            self._charge(net, 1)

    def _put(self, atom: int, stage: int, sign: int) -> None:
        problem, seat, rank = self.problem, self.problem.seats[stage], self.rank_of[stage]
        seconds = sign * problem.seconds[atom] / seat.speed
        self.work[rank] += seconds
        self.stage_work[stage] += seconds
        if not seat.may_idle:
            self.empty += (self.count[stage] + sign == 0) - (self.count[stage] == 0)
        self.count[stage] += sign
        self.bytes[rank] += sign * (problem.kept_bytes[atom] + seat.in_flight * problem.saved_bytes[atom])

    def _charge(self, index: int, sign: int) -> None:
        net, rank_of, seats = self.problem.nets[index], self.rank_of, self.problem.seats
        maker = self.plan[net.ends[0]]
        home = rank_of[maker]
        far = [stage for stage in {self.plan[end] for end in net.ends} if rank_of[stage] != home]
        if far:
            self.sent[home] += sign * net.seconds * seats[maker].sends
            for stage in far:
                self.sent[rank_of[stage]] += sign * net.seconds * seats[stage].receives

    def _reopen(self, atom: int) -> None:
        """Notes which atoms can move, after one has moved."""
        problem = self.problem
        for each in (atom, *problem.predecessors[atom], *problem.successors[atom]):
            if (self._range(each) is not None) != (each in self.place):
                if each in self.place:
                    index, last = self.place.pop(each), self.open.pop()
                    if last != each:
                        self.open[index], self.place[last] = last, index
                else:
                    self.place[each] = len(self.open)
                    self.open.append(each)
