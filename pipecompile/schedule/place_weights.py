"""Places the gradients of weights (W) among Forwards and Backwards whose order is fixed, with real times.

W depends on nothing but its own Backward, and nothing on another rank waits for it. So a rank runs one

    because the next computation would exceed the memory cap,
    in a gap that it fits into,
    in a gap that is too short, if the computation after it starts late by at most ``patience`` of W,
    or at the end.

The oldest is first. One pass over the order, as in a replay: each rank decides when it knows the time at which what its
next computation waits for arrives.

Source: Zero Bubble (Qi et al., ICLR 2024), section 3.1.
"""

from __future__ import annotations

from pipecompile.schedule.job import Job
from pipecompile.schedule.order import Rows
from pipecompile.schedule.timed import Placed


def place_weights(job: Job, rows: Rows, patience: float = 0.0) -> Placed | None:
    """The rows with all W, or None if they do not fit into memory or no rank can continue.

    Args:
        job: times and memory.
        rows: F and B of each rank.
        patience: the part of a W by which it may delay the next computation.
    """
    reads, sends = job.wires.reads, job.wires.sends
    seconds, added, cells = job.seconds, job.added, job.cells
    ranks = len(rows)
    sent = [-1.0] * (2 * cells)  # when a computation begins to send
    is_queued = job.wires.is_queued
    position, clock, sender, held = [0] * ranks, [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    first = [-1.0] * ranks
    placed: list[list[int]] = [[] for _ in rows]
    weights: list[list[int]] = [[] for _ in rows]
    taken = [0] * ranks  # of the weights
    waiting: dict[int, list[int]] = {}  # code -> the ranks that wait for it
    able = list(range(ranks))
    while able:
        rank = able.pop()
        row, now, out, queue, cap = rows[rank], clock[rank], placed[rank], weights[rank], job.caps[rank]
        next_w, memory = taken[rank], held[rank]
        for index in range(position[rank], len(row)):
            code = row[index]
            ready = now
            for offset, on_its_way in reads[code]:
                at = sent[code + offset]
                if at < 0.0:
                    break
                at += on_its_way
                if at > ready:
                    ready = at
            else:
                more = added[code]
                if first[rank] < 0.0:
                    first[rank] = now = ready
                while next_w < len(queue) and (now < ready or memory + more > cap):
                    weight = queue[next_w]
                    late = seconds[weight] - (ready - now)
                    if memory + more <= cap and late > patience * seconds[weight]:
                        break
                    next_w += 1
                    out.append(weight)
                    now += seconds[weight]
                    memory += added[weight]
                    if now > ready:
                        ready = now
                memory += more
                if memory > cap:
                    return None
                now = ready + seconds[code]
                out.append(code)
                if code >= cells:
                    queue.append(code + cells)
                sent[code] = now
                if is_queued:
                    sent[code] = max(now, sender[rank])
                    sender[rank] = sent[code] + sends[code]
                if code in waiting:
                    able += waiting.pop(code)
                continue
            waiting.setdefault(code + offset, []).append(rank)
            position[rank] = index
            break
        else:
            position[rank] = len(row)
        clock[rank], taken[rank], held[rank] = now, next_w, memory
    for rank in range(ranks):
        if position[rank] < len(rows[rank]):
            return None
        for weight in weights[rank][taken[rank] :]:
            placed[rank].append(weight)
            clock[rank] += seconds[weight]
    return Placed(rows=placed, firsts=first, lasts=clock)
