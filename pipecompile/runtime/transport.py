"""Transfers between ranks. Only this and ``Peers`` depend on whether ranks run in one process or in several.

``send`` and ``recv`` never wait. ``recv`` returns a function that waits, so that a program can receive early without
delaying the instructions before the value's use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Condition
from typing import Protocol

from pipecompile.ir.program import Recv, Result, Send
from pipecompile.runtime.lane import Lane, Sent, Values
from pipecompile.runtime.runner import Microbatch


class Aborted(Exception):
    """Raised in a waiting rank when another rank has failed."""


class Transport(Protocol):
    """Sends the results of computations between ranks."""

    def begin(self, microbatches: Mapping[int, Microbatch]) -> None:
        """Called before each program, with the microbatches that it uses."""

    def send(self, send: Send, values: Values) -> Sent:
        """Sends values; never waits."""

    def recv(self, recv: Recv) -> Callable[[], Values]:
        """Returns a function that waits for the values and returns them."""

    def abort(self) -> None:
        """Raises ``Aborted`` in every waiting rank."""

    def reset(self) -> None:
        """Drops every transfer in flight."""


class LocalTransport:
    """Transfers within one process.

    Args:
        lanes: by rank.
        rank_of: the rank of each stage.
    """

    def __init__(self, lanes: Mapping[int, Lane], rank_of: Sequence[int]) -> None:
        self.lanes = lanes
        self.rank_of = rank_of
        self.arrived: dict[tuple[Result, int], Sent] = {}
        self.changed = Condition()
        self.aborted = False

    def begin(self, microbatches: Mapping[int, Microbatch]) -> None:
        pass

    def send(self, send: Send, values: Values) -> Sent:
        source, target = self.lanes[self.rank_of[send.stage]], self.lanes[self.rank_of[send.target]]
        sent = source.move(values, target)
        with self.changed:
            self.arrived[send.result, send.target] = sent
            self.changed.notify_all()
        return sent

    def recv(self, recv: Recv) -> Callable[[], Values]:
        key = (recv.result, recv.target)

        def wait() -> Values:
            with self.changed:
                self.changed.wait_for(lambda: self.aborted or key in self.arrived)
                if self.aborted:
                    raise Aborted
                sent = self.arrived.pop(key)
            self.lanes[self.rank_of[recv.target]].wait(sent.ready)
            return sent.values

        return wait

    def abort(self) -> None:
        with self.changed:
            self.aborted = True
            self.changed.notify_all()

    def reset(self) -> None:
        with self.changed:
            self.arrived.clear()
            self.aborted = False
