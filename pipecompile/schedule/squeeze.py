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

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipecompile.schedule.job import Job
from pipecompile.schedule.order import Rows
from pipecompile.schedule.run_rows import run_rows
from pipecompile.schedule.wiring import Sends, Wiring


@dataclass(frozen=True)
class Timed:
    """Rows of an order, the start of each code, and all codes in a sequence that keeps every dependency."""

    rows: list[list[int]]
    start: list[float]
    sequence: list[int]
    spans: list[float]
    makespan: float

    @property
    def span(self) -> float:
        return max(self.spans)


def timed(job: Job, rows: Rows) -> Timed | None:
    """The times of rows that have a W for every B, or None if no rank can continue."""
    ran = run_rows(job.wires, rows, job.seconds)
    if not ran.is_whole(rows):
        return None
    start, clock = ran.start, ran.clock
    firsts = [start[row[0]] for row in rows]
    spans = [end - first for end, first in zip(clock, firsts, strict=True)]
    makespan = max(clock) - min(firsts)
    return Timed(rows=[list(row) for row in rows], start=start, sequence=ran.sequence, spans=spans, makespan=makespan)


def squeeze(job: Job, mirror: Job, before: Timed, by_span: bool) -> list[list[int]]:
    """The rows after one pass to the right and one to the left.

    Args:
        job: times and memory.
        mirror: ``mirrored(job)``.
        before: a feasible order, timed.
        by_span: whether each rank has a span of its own, or all end at the same time.
    """
    codes = before.sequence[::-1]  # sorts are stable: of equal times, which zeros make, dependencies stay in order
    start, seconds = before.start, job.seconds
    firsts = [start[row[0]] if by_span else 0.0 for row in before.rows]
    length = before.span if by_span else before.makespan + min(start[row[0]] for row in before.rows)
    codes.sort(key=lambda code: -start[code] - seconds[code])
    _, end = _pass(mirror, codes, [-first - length for first in firsts])
    codes.reverse()
    codes.sort(key=lambda code: -end[code])
    rows, _ = _pass(job, codes, [0.0] * len(firsts))
    return rows


def _pass(job: Job, codes: Sequence[int], release: Sequence[float]) -> tuple[list[list[int]], list[float]]:
    """The rows, and the end of each code, if each starts as early as those before it in ``codes`` leave room."""
    waits, near, sends, seconds, added = job.wires.waits, job.wires.near, job.wires.sends, job.seconds, job.added
    ranks, needs, rank_of = len(release), job.needs, job.rank_of
    arrived = [-1e300] * job.wires.num_slots
    end = [0.0] * len(seconds)
    starts: list[list[float]] = [[] for _ in range(ranks)]
    rows: list[list[int]] = [[] for _ in range(ranks)]
    held: list[list[float]] = [[] for _ in range(ranks)]  # after each computation
    gaps: list[list[tuple[float, float]]] = [[] for _ in range(ranks)]
    last = list(release)  # the end of each rank so far
    for code in codes:
        rank = rank_of[code]
        earliest = release[rank]
        for slot in waits[code]:
            if arrived[slot] > earliest:
                earliest = arrived[slot]
        need = needs[code]
        if need >= 0 and end[need] > earliest:
            earliest = end[need]
        length, more = seconds[code], added[code]
        memory, spaces = held[rank], gaps[rank]
        if spaces and spaces[-1][1] > earliest:
            found = _gap(spaces, starts[rank], memory, earliest, length, more, job.caps[rank])
        else:
            found = None
        if found is None:
            begin = last[rank]
            if earliest > begin:
                spaces.append((begin, earliest))
                begin = earliest
            starts[rank].append(begin)
            rows[rank].append(code)
            memory.append((memory[-1] if memory else 0.0) + more)
            last[rank] = begin + length
        else:
            gap, at = found
            opened, closed = spaces[gap]
            begin = max(opened, earliest)
            left = [(opened, begin)] if begin > opened else []
            right = [(begin + length, closed)] if closed > begin + length else []
            spaces[gap : gap + 1] = left + right
            starts[rank].insert(at, begin)
            rows[rank].insert(at, code)
            memory.insert(at, memory[at - 1] if at else 0.0)
            memory[at:] = [amount + more for amount in memory[at:]]
        done = end[code] = begin + length
        for slot in near[code]:
            arrived[slot] = done
        for slot, transfer, _ in sends[code]:
            arrived[slot] = done + transfer
    return rows, end


def _gap(
    spaces: list[tuple[float, float]],
    starts: list[float],
    memory: list[float],
    earliest: float,
    length: float,
    more: float,
    cap: float,
) -> tuple[int, int] | None:
    """The first gap that is long enough and leaves memory within the cap, and the place in the row; None without."""
    found = None
    after, most = len(starts), -1e300  # the most that is held from a place of the row on
    for gap in range(len(spaces) - 1, -1, -1):
        opened, closed = spaces[gap]
        if closed <= earliest:
            break
        if closed - (opened if opened > earliest else earliest) < length - 1e-9:
            continue
        at = bisect_left(starts, closed, 0, after)
        if more > 0.0:
            if at < after:
                most = max(most, max(memory[at:after]))
                after = at
            if most + more > cap:
                break
            if (memory[at - 1] if at else 0.0) + more > cap:
                continue
        found = gap, at
    return found


def mirrored(job: Job) -> Job:
    """The job in which time runs backward."""
    wires, codes = job.wires, range(len(job.seconds))
    reader = {slot: code for code in codes for slot in wires.waits[code]}
    waits = [(*wires.near[code], *(slot for slot, *_ in wires.sends[code])) for code in codes]
    near: list[tuple[int, ...]] = [()] * len(codes)
    sends: list[Sends] = [()] * len(codes)
    for code in codes:
        for slot in wires.near[code]:
            near[reader[slot]] += (slot,)
        for send in wires.sends[code]:
            sends[reader[send[0]]] += (send,)
    cells = job.cells
    return replace(
        job,
        wires=Wiring(wires.num_slots, waits, near, sends),
        added=[-amount for amount in job.added],
        needs=[*range(cells, 3 * cells), *(-1 for _ in range(cells))],
    )
