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
        end: the same.
        sequence: the codes that ran, in a sequence that keeps every dependency.
        clock: the end of each rank's last computation.
        position: how many computations of each row ran.
    """

    start: list[float]
    end: list[float]
    sequence: list[int]
    clock: list[float]
    position: list[int]

    def is_whole(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether all rows ran to their ends."""
        return all(at == len(row) for at, row in zip(self.position, rows, strict=True))


def run_rows(wires: Wiring, rows: Sequence[Sequence[int]], seconds: Sequence[float]) -> Ran:
    """Runs rows of codes until all ranks have ended, or wait."""
    reads, sends = wires.reads, wires.sends
    ranks = len(rows)
    start, end, sequence = [-1.0] * len(seconds), [-1.0] * len(seconds), list[int]()
    sent = end if not wires.is_queued else [-1.0] * len(seconds)  # when a computation begins to send
    position, clock, sender = [0] * ranks, [0.0] * ranks, [0.0] * ranks
    waiting: dict[int, list[int]] = {}  # code -> the ranks that wait for it
    able = list(range(ranks))
    while able:
        rank = able.pop()
        row, now = rows[rank], clock[rank]
        for index in range(position[rank], len(row)):
            code = row[index]
            begin = now
            for offset, seconds_on_its_way in reads[code]:
                at = sent[code + offset]
                if at < 0.0:
                    break
                at += seconds_on_its_way
                if at > begin:
                    begin = at
            else:
                start[code] = begin
                end[code] = now = begin + seconds[code]
                sequence.append(code)
                if sent is not end:
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
        clock[rank] = now
    return Ran(start=start, end=end, sequence=sequence, clock=clock, position=position)
