"""Transfers between ranks. Only this and ``Peers`` depend on whether ranks run in one process or in several.

``send`` and ``recv`` never wait. ``recv`` returns a function that waits, so that a program can receive early without
delaying the instructions before the value's use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Protocol

from pipecompile.ir.instruction import Recv, Send
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import rank_of, target_of
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
        plan: the ranks of the stages.
    """

    def __init__(self, lanes: Mapping[int, Lane], plan: Plan) -> None:
        self.lanes = lanes
        self.plan = plan
        self.boxes: dict[str, SimpleQueue[Sent | None]] = {}  # one for each transfer; None wakes who waits
        self.aborted = False

    def begin(self, microbatches: Mapping[int, Microbatch]) -> None:
        pass

    def send(self, send: Send, values: Values) -> Sent:
        source, target = self.lanes[rank_of(send, self.plan)], self.lanes[target_of(send, self.plan)]
        sent = source.move(values, target)
        self._box(send).put(sent)
        return sent

    def recv(self, recv: Recv) -> Callable[[], Values]:
        send = Send(recv.result, recv.target)

        def wait() -> Values:
            box = self._box(send)  # before it is asked whether there was an abort, which looks for boxes afterwards
            sent = None if self.aborted else box.get()
            if self.aborted or sent is None:
                raise Aborted
            del self.boxes[str(send)]
            self.lanes[target_of(recv, self.plan)].wait(sent.ready)
            return sent.values

        return wait

    def abort(self) -> None:
        self.aborted = True
        for box in list(self.boxes.values()):
            box.put(None)

    def reset(self) -> None:
        self.boxes.clear()
        self.aborted = False

    def _box(self, send: Send) -> SimpleQueue[Sent | None]:
        return self.boxes.setdefault(str(send), SimpleQueue())
