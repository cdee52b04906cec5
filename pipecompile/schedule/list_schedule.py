"""Lists Forwards and Backwards in the order of a greedy run with real times, for any stage graph.

A rank that is free takes the Backward that is ready, else a Forward, of the microbatch that is furthest behind, as long
as the stage has fewer in flight than its limit; else a W. Limits are per stage, so no stage takes the room of another,
and no run can stop before its end.

A stage that takes its microbatches in order makes its results in order, so those after it can do the same. Only the
next Forward and the next Backward of each stage are ever looked at.

Source: list scheduling; the limits are those of 1F1B and ZB-H2 (see ``policy``), and any between.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import inf

from pipecompile.schedule.job import Job


def list_schedule(job: Job, limits: Sequence[int], fills: bool = True) -> list[list[int]]:
    """The F and B of each rank, in order.

    Args:
        job: times; memory plays no part.
        limits: of each stage, the most Forwards without their Backward, at least 1.
        fills: whether W take the time of a rank that has nothing else to do.
    """
    readers, seconds, rank_of, cells = job.wires.readers, job.seconds, job.rank_of, job.cells
    stages, ranks = len(limits), len(job.caps)
    n = cells // stages
    stages_of: list[list[int]] = [[] for _ in range(ranks)]
    for stage in reversed(range(stages)):
        stages_of[rank_of[stage * n]].append(stage)  # late ones first
    forwards, backwards = [0] * stages, [0] * stages  # those that have begun
    missing = [*(len(needs) for needs in job.wires.needs[: 2 * cells]), *([0] * cells)]  # W are not listed
    latest = [0.0] * (3 * cells)  # arrival of what each code reads
    ready = [inf if count else 0.0 for count in missing]
    rows: list[list[int]] = [[] for _ in range(ranks)]
    weights, free = [0] * ranks, [0.0] * ranks
    wakes = [(0.0, rank) for rank in range(ranks)]  # seconds at which a rank looks at what is ready

    def pick(rank: int, now: float) -> int | None:
        picked, least = None, n
        for stage in stages_of[rank]:
            k = backwards[stage]
            if k < least and ready[cells + stage * n + k] <= now:
                picked, least = stage, k
        if picked is not None:
            backwards[picked] += 1
            return cells + picked * n + least
        for stage in stages_of[rank]:
            k = forwards[stage]
            if k < least and k - backwards[stage] < limits[stage] and ready[stage * n + k] <= now:
                picked, least = stage, k
        if picked is not None:
            forwards[picked] += 1
            return picked * n + least
        return None

    while wakes:
        now, rank = heappop(wakes)
        if now < free[rank]:
            continue
        code = pick(rank, now)
        if code is not None:
            rows[rank].append(code)
            weights[rank] += code >= cells
            done = free[rank] = now + seconds[code]
            for offset, on_its_way in readers[code]:
                reader, at = code + offset, done + on_its_way
                if at > latest[reader]:
                    latest[reader] = at
                missing[reader] -= 1
                if not missing[reader]:
                    ready[reader] = at = latest[reader]
                    if at >= free[rank_of[reader]]:
                        heappush(wakes, (at, rank_of[reader]))
        elif fills and weights[rank]:
            weights[rank] -= 1
            done = free[rank] = now + seconds[2 * cells + rows[rank][-1] % cells]
        else:
            continue
        heappush(wakes, (done, rank))
    return rows
