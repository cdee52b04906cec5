"""How the halves of a transfer find each other: the difference between one process and many is this protocol.

``send`` never waits. ``recv`` does not either: it gives a function that waits, so that a receive may stand early in a
program without holding up what comes before its use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition
from typing import Any, Protocol

from pipecompile.ir.program import Recv, Result, Send
from pipecompile.runtime.lane import Lane, Value

Values = tuple[Value, ...]


class Aborted(Exception):
    """Raised in a rank that waits when another rank has failed."""


class Transport(Protocol):
    """Sends the results of computations between ranks."""

    def send(self, send: Send, values: Values) -> None:
        """Hands values on; never waits."""

    def recv(self, recv: Recv) -> Callable[[], Values]:
        """Gives a function that waits for the values and returns them."""

    def abort(self) -> None:
        """Wakes every rank that waits, with ``Aborted``."""

    def reset(self) -> None:
        """Forgets everything that is under way."""


class LocalTransport:
    """Transfers within one process.

    Args:
        lanes: one for each rank.
        rank_of: stage to rank.
    """

    def __init__(self, lanes: Sequence[Lane], rank_of: Sequence[int]) -> None:
        self.lanes = lanes
        self.rank_of = rank_of
        self.arrived: dict[tuple[Result, int], tuple[Values, Any]] = {}
        self.changed = Condition()
        self.aborted = False

    def send(self, send: Send, values: Values) -> None:
        source, target = self.lanes[self.rank_of[send.stage]], self.lanes[self.rank_of[send.target]]
        moved = source.move(values, target)
        with self.changed:
            self.arrived[send.result, send.target] = moved
            self.changed.notify_all()

    def recv(self, recv: Recv) -> Callable[[], Values]:
        key = (recv.result, recv.target)

        def wait() -> Values:
            with self.changed:
                self.changed.wait_for(lambda: self.aborted or key in self.arrived)
                if self.aborted:
                    raise Aborted
                values, event = self.arrived.pop(key)
            self.lanes[self.rank_of[recv.target]].wait(event)
            return values

        return wait

    def abort(self) -> None:
        with self.changed:
            self.aborted = True
            self.changed.notify_all()

    def reset(self) -> None:
        with self.changed:
            self.arrived.clear()
            self.aborted = False
