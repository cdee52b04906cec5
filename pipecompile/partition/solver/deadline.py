"""When to stop searching: long loops ask now and then, and the search ends with the best plan it has.

Effort is counted in sets and atoms, never in seconds, so without a deadline the same problem has the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from time import process_time


class OutOfTime(Exception):
    """The time is up; caught where a search keeps its best plan."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment in this process's CPU seconds."""

    at: float = inf

    @staticmethod
    def after(seconds: float | None) -> Deadline:
        return Deadline() if seconds is None else Deadline(process_time() + seconds)

    def part(self, share: float) -> Deadline:
        """A deadline before this one, after such a share of the time that is left."""
        now = process_time()
        return self if self.at == inf else Deadline(now + share * max(0.0, self.at - now))

    @property
    def passed(self) -> bool:
        return self.at < inf and process_time() > self.at

    def check(self) -> None:
        """Raises ``OutOfTime`` once the time is up."""
        if self.passed:
            raise OutOfTime


NEVER = Deadline()
