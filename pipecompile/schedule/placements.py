"""Candidates of a search with their W, each made when it is first asked for, so that searches of one job share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipecompile.schedule.job import Job
from pipecompile.schedule.order import Rows
from pipecompile.schedule.place_weights import place_weights
from pipecompile.schedule.timed import Placed

PATIENCE = (0.0, 0.5, 1.0)
LARGE = 20_000  # computations from which fewer candidates are tried


class Placements:
    """For each candidate that differs from those before, its W after several rules.

    Args:
        job: times and memory.
        rows: candidates; W in them are ignored.
    """

    def __init__(self, job: Job, rows: Iterable[Rows]) -> None:
        self.job = job
        self.rules = PATIENCE if len(job.seconds) < LARGE else PATIENCE[1:]
        self._rest, self._made = self._each(rows), list[Sequence[Placed]]()

    def __iter__(self) -> Iterator[Sequence[Placed]]:
        """For each candidate what fits into memory and can run, by the rules."""
        yield from self._made
        for placed in self._rest:
            self._made.append(placed)
            yield placed

    def _each(self, rows: Iterable[Rows]) -> Iterator[Sequence[Placed]]:
        seen, most = set[tuple[tuple[int, ...], ...]](), 2 * self.job.cells
        for each in rows:
            bare = tuple(tuple(code for code in row if code < most) for row in each)
            if bare in seen:
                continue
            seen.add(bare)
            placed = (place_weights(self.job, bare, rule) for rule in self.rules)
            yield [it for it in placed if it is not None]
