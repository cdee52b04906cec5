"""Packets that were asked for, until they are there: over gloo, or, if they are short, over a socket of the host.

The thread that calls looks for a packet for a moment. Then a worker waits in gloo, and the thread where the control
channel can end its wait; within a host, the thread alone waits.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control
from pipecompile.distributed.line import Line
from pipecompile.distributed.near import Address, Near
from pipecompile.distributed.packet import is_there, sizes, unpacked
from pipecompile.distributed.worker import Worker
from pipecompile.runtime.lane import Values
from pipecompile.runtime.transport import Aborted

SOON = 100e-6  # seconds for which the caller looks for a packet itself: two threads that wake each other take more


class Ends(Protocol):
    """Where a packet comes from and to: ``Lines``."""

    control: Control
    near: Near
    ranks: Sequence[int]
    group: dist.ProcessGroup
    places: Sequence[int]
    aborted: bool

    def arrived(self, coming: Coming) -> None:
        """Takes note that a packet is there."""

    def refuse(self, peer: int, error: Exception) -> NoReturn:
        """Raises ``Aborted`` for a lost connection, and any other error as it is."""


class In(Line):
    """From another rank.

    Attributes:
        unread: packets within this host of which nothing has been read, in their order.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        super().__init__(worker, name)
        self.unread: deque[WithinHost] = deque()


class Coming:
    """A packet that was asked for, until it is there.

    Args:
        message: for its first message.
    """

    def __init__(
        self,
        lines: Ends,
        line: In,
        peer: int,
        tag: int,
        kind: Hashable,
        seconds: float | None,
        message: Tensor,
    ) -> None:
        self.lines, self.line, self.peer, self.tag, self.kind, self.seconds = lines, line, peer, tag, kind, seconds
        self.message = message
        self.packet: Tensor | None = None  # all of it
        self.values: Values | None = None
        self.is_awaited = False  # by the worker

    def wait(self) -> Values:
        """The values of the packet.

        Raises:
            Aborted: a rank has failed.
            TimeoutError: the packet did not come in time.
        """
        if self.values is None:
            if self.is_awaited or not self._wait():
                self._wait_for_worker()
            assert self.packet is not None
            self.values = unpacked(self.packet)
            self.line.saw(self.kind, sizes(self.packet)[0])
            self.lines.arrived(self)
            del self.message, self.packet
        return self.values

    def _wait(self) -> bool:
        """Waits in the calling thread, where that can be ended; returns whether the packet is there."""
        raise NotImplementedError

    def _has_come(self) -> bool:
        """Whether the first message has come. Never waits."""
        raise NotImplementedError

    def _comes_soon(self) -> bool:
        """Whether it has come, or comes while nothing but this thread waits for it."""
        end = 0.0
        while not self._has_come():
            now = time.perf_counter()
            end = end or now + SOON
            if now > end:
                return False
            _give_way()
        return True

    def _wait_for_worker(self) -> None:
        if not self.is_awaited:
            self.is_awaited = True
            self.line.worker.put(self._finish)
        if not self.lines.control.wait_for(self._is_done, self.seconds, self.lines.places[self.peer]):
            raise TimeoutError
        if self.packet is None:
            raise Aborted

    def _is_done(self) -> bool:
        return self.packet is not None or self.lines.aborted

    def _finish(self) -> None:
        """Waits in gloo."""
        packet, (whole, first) = self.message, sizes(self.message)
        if first < whole:
            packet = torch.cat([packet[:first], torch.empty(whole - first, dtype=torch.uint8)])
            dist.recv(packet[first:], self.lines.ranks[self.peer], self.lines.group, self.tag + 1)
        changed = self.lines.control.changed
        with changed:
            self.packet = packet
            changed.notify_all()


class OverGloo(Coming):
    """One that comes over gloo.

    Args:
        work: the receive of its first message.
        mark: at the end of the message, once it is there.
    """

    def __init__(self, *args: Any, work: dist.Work, mark: int) -> None:
        super().__init__(*args)
        self.work, self.mark = work, mark

    def _wait(self) -> bool:
        if not self._comes_soon():
            return False
        try:
            self.work.wait()  # gloo is about to learn it, too
        except RuntimeError as error:
            self.lines.refuse(self.peer, error)
        self.packet = self.message
        return True

    def _has_come(self) -> bool:
        return is_there(self.message, self.mark)

    def _finish(self) -> None:
        self.work.wait()
        super()._finish()


class WithinHost(Coming):
    """One whose first message comes over a socket of this host.

    Args:
        sender: its address.
    """

    def __init__(self, *args: Any, sender: Address) -> None:
        super().__init__(*args)
        self.sender = sender
        self.memory = self.message.numpy().data
        self.read = 0  # bytes of the first message
        self.is_read = False

    def _wait(self) -> bool:
        lines = self.lines
        pause = partial(lines.near.wait, self.sender)
        try:
            if not self._comes_soon() and not lines.control.wait_for(
                self._is_over, self.seconds, lines.places[self.peer], pause
            ):
                raise TimeoutError
        except OSError as error:
            lines.refuse(self.peer, error)
        if not self.is_read:
            raise Aborted
        del self.memory  # it would keep that of the values
        whole, first = sizes(self.message)
        if first == whole:
            self.packet = self.message
        return first == whole

    def _has_come(self) -> bool:
        unread, near = self.line.unread, self.lines.near
        while not self.is_read and (count := near.take(self.sender, unread[0].memory[unread[0].read :])):
            unread[0].take_note(count)
        return self.is_read

    def take_note(self, count: int) -> None:
        """Takes note that so many bytes more have come."""
        self.read += count
        if self.read == sizes(self.message)[1]:
            self.is_read = True
            self.line.unread.popleft()

    def _is_over(self) -> bool:
        return self._has_come() or self.lines.aborted


def _give_way() -> None:
    """Lets gloo's thread run, or another process, if they have no core of their own."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
