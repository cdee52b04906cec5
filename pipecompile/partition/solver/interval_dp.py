"""The best cut of one topological order into intervals, with communication.

One pass over the order keeps, for every possible start, the seconds of the nets that cross the interval from there to
the current position. Placing an atom at position ``j`` changes only slices of them:

    a net that is made here          crosses the intervals that start in [0, j], which send it
    a net with its last end at q     newly touches the intervals that start in (q, j], which receive it
    a net that is complete now       no longer crosses those that start at or before its first end

and the dynamic program takes, for each number of stages, the start with the smallest bottleneck.
O(stages * atoms * band + ends * band), where the band is the longest interval within the limit.

Source: Harlap et al., "PipeDream" (2018), section 3.2, for the dynamic program; the crossing nets are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem


def best_intervals(problem: Problem, order: Sequence[int], limit: float = inf) -> tuple[float, tuple[int, ...]] | None:
    """The smallest bottleneck and the end of each stage's interval; ``None`` if it exceeds the limit (seconds)."""
    count, stages = len(problem), problem.num_stages
    work = _prefix_sums(problem.weight, order)
    memory = _Memory(problem, order) if problem.bounded else None
    first, last = _stages_done(problem, order)
    best: Floats = np.full((stages + 1, count + 1), inf)
    best[0, 0] = 0.0
    start: Ints = np.zeros((stages + 1, count + 1), dtype=np.int64)
    starts = np.searchsorted(work, work - limit * problem.speeds.max()) if limit < inf else np.zeros(count + 1, int)
    crossing = Crossing(problem)
    _idle(problem, best, start, 0, last[0])
    for end in range(1, count + 1):
        crossing.place(order[end - 1], end - 1)
        low = int(starts[end])
        computed = (work[end] - work[low:end]) / problem.speeds[:, None]
        loads = problem.load(computed, problem.factors @ crossing.seconds[:, low:end])
        if memory is not None:
            loads[memory.exceeded(low, end)] = inf
        greatest = np.maximum(best[:-1, low:end], loads)
        chosen = greatest.argmin(axis=1)
        best[1:, end] = greatest[np.arange(stages), chosen]
        start[1:, end] = chosen + low
        best[: first[end], end] = inf
        best[last[end] + 1 :, end] = inf
        _idle(problem, best, start, end, last[end])
    if not best[stages, count] <= limit or best[stages, count] == inf:
        return None
    return float(best[stages, count]), _ends(start, stages, count)


def prefixes(order: Sequence[int], ends: Sequence[int]) -> Bools:
    """The closed sets of the atoms before each end of the order, one per row."""
    position = np.empty(len(order), dtype=np.int64)
    position[list(order)] = np.arange(len(order))
    return np.asarray(position[None, :] < np.asarray(ends)[:, None])


class Crossing:
    """Seconds of the nets that cross the interval [start, here), for each start, while atoms are placed one by one.

    ``seconds`` has two rows: nets made in the interval, and nets only read there.
    """

    def __init__(self, problem: Problem) -> None:
        self.nets_of, self.nets = problem.nets_of, problem.nets
        self.seconds: Floats = np.zeros((2, len(problem)))
        self.first: list[int] = [-1] * len(problem.nets)
        self.last: list[int] = [-1] * len(problem.nets)
        self.missing: list[int] = [len(net.ends) for net in problem.nets]

    def place(self, atom: int, position: int) -> None:
        for net in self.nets_of[atom]:
            cost = self.nets[net].seconds
            self.seconds[int(self.first[net] >= 0), self.last[net] + 1 : position + 1] += cost
            self.last[net] = position
            self.missing[net] -= 1
            if self.first[net] < 0:
                self.first[net] = position
            if self.missing[net] == 0:
                self.seconds[0, : self.first[net] + 1] -= cost


class _Memory:
    """The intervals that do not fit into the memory of each seat."""

    def __init__(self, problem: Problem, order: Sequence[int]) -> None:
        self.kept = _prefix_sums(problem.kept, order)
        self.saved = _prefix_sums(problem.saved, order)
        self.in_flight = np.array([seat.in_flight for seat in problem.seats])[:, None]
        self.limit = np.array([seat.memory for seat in problem.seats])[:, None] * (1 + 1e-12)

    def exceeded(self, low: int, end: int) -> Bools:
        kept = self.kept[end] - self.kept[low:end]
        saved = self.saved[end] - self.saved[low:end]
        return np.asarray(kept + self.in_flight * saved > self.limit)


def _stages_done(problem: Problem, order: Sequence[int]) -> tuple[Ints, Ints]:
    """For each end, the least and the greatest number of stages before it that the fixed stages allow."""
    earliest, latest = problem.earliest[list(order)], problem.latest[list(order)]
    first = np.concatenate([[0], np.maximum.accumulate(earliest) + 1])
    last = np.concatenate([np.minimum.accumulate(latest[::-1])[::-1], [problem.num_stages]])
    return first, last


def _idle(problem: Problem, best: Floats, start: Ints, end: int, last: int) -> None:
    for stage, seat in enumerate(problem.seats[:last]):
        if seat.may_idle and best[stage, end] <= best[stage + 1, end]:
            best[stage + 1, end], start[stage + 1, end] = best[stage, end], end


def _prefix_sums(numbers: Floats, order: Sequence[int]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(numbers[list(order)])])


def _ends(start: Ints, stages: int, count: int) -> tuple[int, ...]:
    ends = [count]
    for stage in range(stages, 1, -1):
        ends.append(int(start[stage, ends[-1]]))
    return tuple(reversed(ends))
