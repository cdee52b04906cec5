"""Runs the rows of an order on a rank's two clocks: the replay that all others of this folder are made of.

``place_weights`` has a loop of its own, since it decides at each wait what else the rank does meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.schedule.wiring import Wiring


@dataclass(frozen=True)
class Ran:
    """When computations ran.

    Attributes:
        start: by code; -1 for those that did not run.
        sequence: the codes that ran, in a sequence that keeps every dependency.
        clock: the end of each rank's last computation.
        position: how many computations of each row ran.
        arrived: when each slot was filled; -1 for those that were not.
    """

    start: list[float]
    sequence: list[int]
    clock: list[float]
    position: list[int]
    arrived: list[float]

    def is_whole(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether all rows ran to their ends."""
        return all(at == len(row) for at, row in zip(self.position, rows, strict=True))


def run_rows(wires: Wiring, rows: Sequence[Sequence[int]], seconds: Sequence[float]) -> Ran:
    """Runs rows of codes until all ranks have ended, or wait."""
    waits, near, sends = wires.waits, wires.near, wires.sends
    ranks = len(rows)
    start, sequence, arrived = [-1.0] * len(seconds), list[int](), [-1.0] * wires.num_slots
    position, clock, sender = [0] * ranks, [0.0] * ranks, [0.0] * ranks
    waiting: dict[int, int] = {}  # slot -> the rank that waits for it
    able = list(range(ranks))
    while able:
        rank = able.pop()
        row, now, index = rows[rank], clock[rank], position[rank]
        while index < len(row):
            code = row[index]
            begin = now
            for slot in waits[code]:
                at = arrived[slot]
                if at < 0.0:
                    waiting[slot] = rank
                    break
                if at > begin:
                    begin = at
            else:
                start[code] = begin
                sequence.append(code)
                now = begin + seconds[code]
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
        position[rank], clock[rank] = index, now
    return Ran(start=start, sequence=sequence, clock=clock, position=position, arrived=arrived)
