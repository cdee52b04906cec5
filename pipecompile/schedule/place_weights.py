"""Places the gradients of weights (W) among Forwards and Backwards whose order is fixed, with real times.

W depends on nothing but its own Backward, and nothing on another rank waits for it. So a rank runs one

    because the next computation would exceed the memory cap,
    in a gap that it fits into,
    in a gap that is too short, if the computation after it starts late by at most ``patience`` of W, or if the rank has
    been idle for longer than ``allowed``,
    or at the end.

The oldest is first. One pass over the order, as in a replay: each rank decides when it knows the time at which what its
next computation waits for arrives.

Source: Zero Bubble (Qi et al., ICLR 2024), section 3.1. New: the rule by idle time that a target span allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.schedule.job import Job
from pipecompile.schedule.order import Rows


@dataclass(frozen=True)
class Placed:
    """Rows with their W, their times, and the seconds that each rank is idle between its first start and last end."""

    rows: list[list[int]]
    spans: list[float]
    idle: list[float]
    makespan: float

    @property
    def span(self) -> float:
        return max(self.spans)


def place_weights(job: Job, rows: Rows, patience: float = 0.0, allowed: Sequence[float] | None = None) -> Placed | None:
    """The rows with all W, or None if they do not fit into memory or no rank can continue.

    Args:
        job: times and memory.
        rows: F and B of each rank.
        patience: the part of a W by which it may delay the next computation.
        allowed: seconds of idle time after which a rank fills any gap; None: no limit.
    """
    waits, near, sends = job.wires.waits, job.wires.near, job.wires.sends
    seconds, added, cells = job.seconds, job.added, job.cells
    ranks = len(rows)
    arrived: list[float] = [-1.0] * job.wires.num_slots
    position, clock, sender, held = [0] * ranks, [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    first, idle = [-1.0] * ranks, [0.0] * ranks
    placed: list[list[int]] = [[] for _ in rows]
    weights: list[list[int]] = [[] for _ in rows]
    taken = [0] * ranks  # of the weights
    waiting: dict[int, int] = {}
    able = list(range(ranks))
    while able:
        rank = able.pop()
        row, now, out, queue, cap = rows[rank], clock[rank], placed[rank], weights[rank], job.caps[rank]
        index, size, next_w, memory, idled = position[rank], len(row), taken[rank], held[rank], idle[rank]
        limit = allowed[rank] if allowed is not None else 1e300
        while index < size:
            code = row[index]
            ready = now
            for slot in waits[code]:
                at = arrived[slot]
                if at < 0.0:
                    waiting[slot] = rank
                    break
                if at > ready:
                    ready = at
            else:
                if first[rank] < 0.0:
                    first[rank] = now = ready
                while next_w < len(queue):
                    weight = queue[next_w]
                    if memory + added[code] <= cap:
                        gap = ready - now
                        if gap <= 0.0:
                            break
                        late = seconds[weight] - gap
                        if late > 0.0 and late > patience * seconds[weight] and idled + gap <= limit:
                            break
                    next_w += 1
                    out.append(weight)
                    now += seconds[weight]
                    memory += added[weight]
                    if now > ready:
                        ready = now
                memory += added[code]
                if memory > cap:
                    return None
                idled += ready - now
                now = ready + seconds[code]
                out.append(code)
                if code >= cells:
                    queue.append(code + cells)
                for slot in near[code]:
                    arrived[slot] = now
                for slot, transfer, occupied in sends[code]:
                    free = sender[rank]
                    begun = now if now > free else free
                    sender[rank] = begun + occupied
                    arrived[slot] = begun + transfer
                    if slot in waiting:
                        able.append(waiting.pop(slot))
                index += 1
                continue
            break
        position[rank], clock[rank], taken[rank], held[rank], idle[rank] = index, now, next_w, memory, idled
    spans = []
    for rank in range(ranks):
        if position[rank] < len(rows[rank]):
            return None
        for weight in weights[rank][taken[rank] :]:
            placed[rank].append(weight)
            clock[rank] += seconds[weight]
        spans.append(clock[rank] - first[rank])
    return Placed(placed, spans, idle, max(clock) - min(first))
