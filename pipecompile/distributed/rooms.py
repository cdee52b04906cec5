"""How many bytes the receiver of a transfer makes room for before it knows how many will come.

A receive must be posted before the sender sends, or gloo's two ends negotiate while both wait. So its receiver does not
ask: it makes room for as much as earlier transfers of the kind had. Sender and receiver need the same number, and have
it, because both learn from the same transfers: those of earlier programs, all of which are complete at both ends when a
program begins. What a packet contains is said by the packet alone, so a number that does not fit costs a second
message, and nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable

LEAST = 4096  # bytes, also for what has not been seen
KINDS = 10_000  # that are remembered


class Rooms:
    """The table of one end, for the transfers to or from one peer."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._seen: dict[Hashable, int] = {}

    def room(self, kind: Hashable) -> int:
        """The bytes of the first message of a transfer, at most."""
        return self._known.get(kind, LEAST)

    def saw(self, kind: Hashable, nbytes: int) -> None:
        """Takes note of a transfer, for later programs."""
        self._seen[kind] = max(nbytes, self._seen.get(kind, 0))

    def begin(self) -> None:
        """Applies what was seen. Called at both ends between the same transfers."""
        for kind, nbytes in self._seen.items():
            self._known[kind] = max(nbytes, self._known.get(kind, 0))
        self._seen.clear()
        if len(self._known) > KINDS:
            self._known.clear()
