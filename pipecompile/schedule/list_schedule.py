"""Lists Forwards and Backwards in the order of a greedy run with real times, for any stage graph.

A rank that is free takes the Backward that is ready, else a Forward, of the microbatch that is furthest behind, as long
as the stage has fewer in flight than its limit; else a W. Limits are per stage, so no stage takes the room of another,
and no run can stop before its end.

Source: list scheduling; the limits are those of 1F1B and ZB-H2 (see ``policy``), and any between.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from pipecompile.schedule.job import Job


def list_schedule(job: Job, limits: Sequence[int], fills: bool = True) -> list[list[int]]:
    """The F and B of each rank, in order.

    Args:
        job: times; memory plays no part.
        limits: of each stage, the most Forwards without their Backward, at least 1.
        fills: whether W take the time of a rank that has nothing else to do.
    """
    waits, near, sends, seconds, cells = job.wires.waits, job.wires.near, job.wires.sends, job.seconds, job.cells
    n = cells // len(limits)
    ranks = len(job.caps)
    missing = [len(waits[code]) + (code >= cells) for code in range(2 * cells)]
    reader = {slot: code for code in range(2 * cells) for slot in waits[code]}
    rows: list[list[int]] = [[] for _ in range(ranks)]
    ready: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]  # B before F, by microbatch, late stages first
    weights = [0] * ranks
    in_flight = [0] * len(limits)
    is_busy = [False] * ranks
    events: list[tuple[float, int, int]] = []  # seconds, a rank that becomes free (or -1), a code that becomes ready

    def enter(code: int) -> int:
        kind, cell = divmod(code, cells)
        stage, k = divmod(cell, n)
        heappush(ready[job.rank_of[code]], (1 - kind, k, -stage))
        return job.rank_of[code]

    def pick(rank: int) -> int | None:
        skipped, picked = [], None
        queue = ready[rank]
        while queue:
            entry = heappop(queue)
            stage = -entry[2]
            if entry[0] == 0 or in_flight[stage] < limits[stage]:
                in_flight[stage] += 1 if entry[0] else -1
                picked = (1 - entry[0]) * cells + stage * n + entry[1]
                break
            skipped.append(entry)
        for entry in skipped:
            heappush(queue, entry)
        return picked

    def start(rank: int, now: float) -> None:
        if is_busy[rank]:
            return
        code = pick(rank)
        if code is None:
            if fills and weights[rank]:
                stage = rows[rank][-1] % cells // n
                weights[rank] -= 1
                is_busy[rank] = True
                heappush(events, (now + seconds[2 * cells + stage * n], rank, -1))
            return
        rows[rank].append(code)
        is_busy[rank] = True
        done = now + seconds[code]
        if code >= cells:
            weights[rank] += 1
        else:
            arrive(code + cells, done)
        heappush(events, (done, rank, -1))
        for slot in near[code]:
            arrive(reader[slot], done)
        for slot, transfer, _ in sends[code]:
            arrive(reader[slot], done + transfer)

    def arrive(code: int, at: float) -> None:
        missing[code] -= 1
        latest[code] = max(latest.get(code, 0.0), at)
        if not missing[code]:
            heappush(events, (latest[code], -1, code))

    latest: dict[int, float] = {}
    for code in range(cells):
        if not missing[code]:
            enter(code)
    for rank in range(ranks):
        start(rank, 0.0)
    while events:
        now = events[0][0]
        touched = []
        while events and events[0][0] <= now:
            _, rank, code = heappop(events)
            if code >= 0:
                rank = enter(code)
            else:
                is_busy[rank] = False
            touched.append(rank)
        for rank in touched:
            start(rank, now)
    return rows
