"""Rows of an order that has a W for every B, and when they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.schedule.job import Job
from pipecompile.schedule.order import Rows
from pipecompile.schedule.run_rows import run_rows


@dataclass(frozen=True)
class Placed:
    """Rows, and when each of them begins and ends."""

    rows: Rows
    firsts: Sequence[float]
    lasts: Sequence[float]

    @property
    def span(self) -> float:
        return max(last - first for last, first in zip(self.lasts, self.firsts, strict=True))

    @property
    def makespan(self) -> float:
        return max(self.lasts) - min(self.firsts)

    def score(self, by_span: bool) -> tuple[float, float]:
        """The smaller is the better."""
        return (self.span, self.makespan) if by_span else (self.makespan, self.span)


@dataclass(frozen=True)
class Timed(Placed):
    """Rows, the end of each code, and all codes in a sequence that keeps every dependency."""

    end: Sequence[float]
    sequence: Sequence[int]


def timed(job: Job, rows: Rows) -> Timed | None:
    """The times of rows, or None if no rank can continue."""
    ran = run_rows(job.wires, rows, job.seconds)
    if not ran.is_whole(rows):
        return None
    firsts = [ran.start[row[0]] for row in rows]
    return Timed(rows=rows, firsts=firsts, lasts=ran.clock, end=ran.end, sequence=ran.sequence)
