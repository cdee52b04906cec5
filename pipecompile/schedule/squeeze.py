"""Improves an order by squeezing it: all computations to the right, then all to the left, with real times and memory.

    rank 0   F0 F1 .  .  B0 .  B1        a computation moves into a gap before others of its rank if it fits there, what
    rank 1   .  F0 .  F1 B1 B0           it needs has arrived, and the rank's memory stays within its cap

Each pass takes the computations in the order of their times, and puts each at the earliest time that is left. To the
right is the same pass on the mirrored job: time runs backward, results go from reader to maker, and what a computation
added to memory is taken away. Both passes keep all dependencies and caps. In the pass to the right, no rank may end
later than its first start plus the longest span (or all not later than the makespan), so what is not critical makes
room for what is.

Source: forward-backward improvement of project schedules (Li and Willis, EJOR 1992; Valls et al., EJOR 2005); the pass
to the left is called squeeze and reorder in Controllable Memory (Qi et al., NeurIPS 2024).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace

from pipecompile.schedule.job import Job
from pipecompile.schedule.timed import Timed

TOLERANCE = 1e-9  # seconds by which a computation may be longer than its gap
NEAR = 8  # places


def squeeze(job: Job, mirror: Job, before: Timed, by_span: bool) -> Timed:
    """What is left after one pass to the right and one to the left, as if each transfer had a link of its own.

    Args:
        job: times and memory.
        mirror: ``mirrored(job)``.
        before: a feasible order, timed.
        by_span: whether each rank has a span of its own, or all end at the same time.
    """
    codes = [*reversed(before.sequence)]  # sorts are stable: at equal times, as of zeros, dependencies stay in order
    codes.sort(key=before.end.__getitem__, reverse=True)
    length = before.span if by_span else max(before.lasts)
    late = _pass(mirror, codes, [-first - length if by_span else -length for first in before.firsts])
    codes.reverse()
    codes.sort(key=late.end.__getitem__, reverse=True)
    return _pass(job, codes, [0.0] * len(before.rows))


def _pass(job: Job, codes: list[int], release: Sequence[float]) -> Timed:
    """Each computation as early as those before it in ``codes`` leave room."""
    needs, seconds, added, rank_of = job.needs, job.seconds, job.added, job.rank_of
    end = [0.0] * len(seconds)
    lines = [_Line(first, cap) for first, cap in zip(release, job.caps, strict=True)]
    shortest = min(seconds) - TOLERANCE
    for code in codes:
        rank = rank_of[code]
        line, earliest = lines[rank], release[rank]
        for offset, on_its_way in needs[code]:
            at = end[code + offset] + on_its_way
            if at > earliest:
                earliest = at
        length, more = seconds[code], added[code]
        if line.closed and line.closed[-1] > earliest and (found := line.gap(earliest, length, more)) is not None:
            end[code] = line.put_into(found, code, earliest, length, more) + length
            continue
        begin = line.last
        if earliest > begin:
            if earliest - begin >= shortest:  # nothing fits into a shorter one
                line.opened.append(begin)
                line.closed.append(earliest)
            begin = earliest
        line.row.append(code)
        line.starts.append(begin)
        line.held.append(line.held[-1] + more)
        end[code] = line.last = begin + length
    return Timed(
        rows=[line.row for line in lines],
        firsts=[line.starts[0] for line in lines],
        lasts=[line.last for line in lines],
        end=end,
        sequence=codes,
    )


class _Line:
    """A rank, while a pass fills it."""

    __slots__ = ("cap", "closed", "held", "last", "opened", "row", "starts")

    def __init__(self, last: float, cap: float) -> None:
        self.last, self.cap = last, cap  # the end so far
        self.row: list[int] = []
        self.starts: list[float] = []
        self.held = [0.0]  # before each computation, and after the last
        self.opened: list[float] = []  # of each gap
        self.closed: list[float] = []

    def gap(self, earliest: float, length: float, more: float) -> tuple[int, int] | None:
        """The first gap that is long enough and leaves memory within the cap, and the place in the row."""
        opened, closed, starts = self.opened, self.closed, self.starts
        first = bisect_right(closed, earliest)
        if more > 0.0 and (full := self.full(bisect_left(starts, closed[first]), more)) is not None:
            if full == len(starts):
                return None
            first = bisect_right(closed, starts[full], first)
        for gap in range(first, len(closed)):
            begin = opened[gap]
            if closed[gap] - (begin if begin > earliest else earliest) >= length - TOLERANCE:
                return gap, bisect_left(starts, closed[gap])
        return None

    def full(self, first: int, more: float) -> int | None:
        """The last place from ``first`` on that has no room for more; it is often near the end."""
        held, cap = self.held, self.cap
        after, size = len(held), NEAR
        while after > first:
            place, before = after, max(first, after - size)
            if max(held[before:after]) + more > cap:
                while held[place - 1] + more <= cap:
                    place -= 1
                return place - 1
            after, size = before, 8 * size
        return None

    def put_into(self, found: tuple[int, int], code: int, earliest: float, length: float, more: float) -> float:
        """Puts a computation into a gap, and returns when it starts."""
        gap, at = found
        opened, closed = self.opened.pop(gap), self.closed.pop(gap)
        begin = max(opened, earliest)
        for left, right in ((begin + length, closed), (opened, begin)):
            if right > left:
                self.opened.insert(gap, left)
                self.closed.insert(gap, right)
        self.starts.insert(at, begin)
        self.row.insert(at, code)
        self.held.insert(at, self.held[at])
        if more:
            self.held[at + 1 :] = [amount + more for amount in self.held[at + 1 :]]
        return begin


def mirrored(job: Job) -> Job:
    """The job in which time runs backward."""
    return replace(job, needs=job.wires.readers, added=[-amount for amount in job.added])
