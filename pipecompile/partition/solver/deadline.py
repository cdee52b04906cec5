"""Deadlines: long loops check them, and the search ends with the best plan so far.

Effort is counted in sets and atoms, not in seconds, so without a deadline the same problem has the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from time import thread_time


class OutOfTime(Exception):
    """The deadline has passed; caught where a search keeps its best plan."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time, in CPU seconds of the thread that searches."""

    at: float = inf

    @staticmethod
    def after(seconds: float | None) -> Deadline:
        return Deadline() if seconds is None else Deadline(thread_time() + seconds)

    def part(self, share: float) -> Deadline:
        """An earlier deadline, after ``share`` of the remaining time."""
        now = thread_time()
        return self if self.at == inf else Deadline(now + share * max(0.0, self.at - now))

    @property
    def passed(self) -> bool:
        return self.at < inf and thread_time() > self.at

    def check(self) -> None:
        """Raises ``OutOfTime`` if the deadline has passed."""
        if self.passed:
            raise OutOfTime


NEVER = Deadline()
