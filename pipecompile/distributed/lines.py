"""Packets between ranks in several processes, over gloo.

A packet says itself what it contains (``packet.py``). Its receiver posts the receive early, with room for as much as
earlier packets of the kind had (``rooms.py``); so gloo sends at once. The thread that calls waits in gloo only for what
has arrived, as the memory of the receive shows. For anything else, a worker waits: it is woken when the caller has
nothing else to do, since each of its steps would hold up a caller that computes. There is a worker for each peer and
direction, so that no packet waits for one that it does not depend on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control
from pipecompile.distributed.members import Members
from pipecompile.distributed.packet import emptied, is_there, packed, sizes, unpacked
from pipecompile.distributed.rooms import LEAST, Rooms
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.runtime.lane import Values
from pipecompile.runtime.transport import Aborted

Post = Callable[[Tensor, int, dist.ProcessGroup, int], dist.Work | None]
Get = Callable[[], Values]

TAGS = 2  # of one packet
ROUND = 1 << 24  # packets after which tags are used again
FEW, SMALL = 32, 1 << 20  # packets to a peer, and bytes of them, that no worker waits for yet
SOON = 100e-6  # seconds for which the caller looks for a packet itself: two threads that wake each other take more


class Lines:
    """The lines between one rank and the others.

    Args:
        control: ends all waits when a rank fails.
        members: the processes of the ranks.
        places: of these in the control channel.

    Attributes:
        aborted: whether the waits of this process have been ended.
    """

    def __init__(self, control: Control, members: Members, places: Sequence[int]) -> None:
        self.control = control
        self.ranks, self.group = members.processes, members.group
        self.places = places
        self.aborted = False
        self._out: dict[int, _Out] = {}
        self._in: dict[int, _In] = {}
        self._coming: dict[_Coming, None] = {}  # in the order of their posts

    def begin(self) -> None:
        """Applies what was learnt about the sizes of packets. Called at both ends between the same packets."""
        for coming in (*self._coming,):
            coming.wait()
        for line in (*self._out.values(), *self._in.values()):
            line.rooms.begin()

    def put(self, peer: int, values: Values, kind: Hashable = None) -> None:
        """Sends values to a rank; never waits.

        Args:
            kind: of packets that have the same size in each program; None if it says nothing about the size.
        """
        line = self._out.get(peer)
        if line is None:
            line = self._out[peer] = _Out(Worker(self.control, self.places[peer]))
        tag = line.next_tag()
        messages = packed(values, line.room(kind), _mark(tag))
        line.saw(kind, sum(map(len, messages)))
        for place, message in enumerate(messages):
            line.sent(message, self.post(dist.isend, message, peer, tag + place))

    def get(self, peer: int, kind: Hashable = None, seconds: float | None = None) -> Get:
        """Receives what a rank ``put``; returns a function that waits for it.

        Args:
            seconds: after which the wait raises ``TimeoutError``.
        """
        line = self._in.get(peer)
        if line is None:
            line = self._in[peer] = _In(Worker(self.control, self.places[peer]))
        tag = line.next_tag()
        message = emptied(line.room(kind))
        coming = _Coming(self, line, peer, tag, kind, seconds, message, self.post(dist.irecv, message, peer, tag))
        self._coming[coming] = None
        return coming.wait

    def arrived(self, coming: _Coming) -> None:
        """Takes note that a packet is there."""
        self._coming.pop(coming, None)

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        for line in self._out.values():
            line.hand_over()
            line.worker.call(_nothing)

    def abort(self) -> None:
        """Ends the waits of this process; those of others are ended by the control channel."""
        with self.control.changed:
            self.aborted = True
            self.control.changed.notify_all()

    def post(self, operation: Post, message: Tensor, peer: int, tag: int) -> dist.Work:
        """Begins to send or to receive a message.

        Raises:
            Aborted: the connection is lost.
        """
        try:
            work = operation(message, self.ranks[peer], self.group, tag)
        except RuntimeError as error:
            self.refuse(peer, error)
        assert work is not None  # this process is in the group
        return work

    def refuse(self, peer: int, error: RuntimeError) -> None:
        """Raises ``Aborted`` for a lost connection, and any other error as it is."""
        if not is_lost(error):
            raise error
        self.control.lost(self.places[peer], error)
        raise Aborted from error


class _Line:
    """One direction between this rank and another one."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.rooms = Rooms()
        self.count = 0

    def next_tag(self) -> int:
        self.count += 1
        return self.count % ROUND * TAGS

    def room(self, kind: Hashable) -> int:
        return LEAST if kind is None else self.rooms.room(kind)

    def saw(self, kind: Hashable, nbytes: int) -> None:
        if kind is not None:
            self.rooms.saw(kind, nbytes)


class _Out(_Line):
    """To another rank. Messages must be held until they have been sent; a worker waits for many of them at once."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._sent: list[tuple[Tensor, dist.Work]] = []
        self._nbytes = 0

    def sent(self, message: Tensor, work: dist.Work) -> None:
        self._sent.append((message, work))
        self._nbytes += message.nbytes
        if len(self._sent) >= FEW or self._nbytes >= SMALL:
            self.hand_over()

    def hand_over(self) -> None:
        """Lets the worker wait for what was sent."""
        sent, self._sent, self._nbytes = self._sent, [], 0

        def finish() -> None:
            while sent:
                sent.pop(0)[1].wait()

        self.worker.put(finish)


class _In(_Line):
    """From another rank."""


class _Coming:
    """A packet that was asked for, until it is there."""

    def __init__(
        self,
        lines: Lines,
        line: _In,
        peer: int,
        tag: int,
        kind: Hashable,
        seconds: float | None,
        message: Tensor,
        work: dist.Work,
    ) -> None:
        self.lines, self.line, self.peer, self.tag, self.kind, self.seconds = lines, line, peer, tag, kind, seconds
        self.message, self.work = message, work
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
            self._wait()
            assert self.packet is not None
            self.values = unpacked(self.packet)
            self.line.saw(self.kind, sizes(self.packet)[0])
            self.lines.arrived(self)
            del self.message, self.packet
        return self.values

    def _wait(self) -> None:
        control = self.lines.control
        if not self.is_awaited and self._comes_soon():
            try:
                self.work.wait()  # gloo is about to learn it, too
            except RuntimeError as error:
                self.lines.refuse(self.peer, error)
            self.packet = self.message
            return
        if not self.is_awaited:
            self.is_awaited = True
            self.line.worker.put(self._finish)
        if not control.wait_for(self._is_done, self.seconds, self.lines.places[self.peer]):
            raise TimeoutError
        if self.packet is None:
            raise Aborted

    def _comes_soon(self) -> bool:
        """Whether the packet has come, or comes while nothing but this thread waits for it."""
        mark, end = _mark(self.tag), 0.0
        while not is_there(self.message, mark):
            now = time.perf_counter()
            end = end or now + SOON
            if now > end:
                return False
            _give_way()
        return True

    def _is_done(self) -> bool:
        return self.packet is not None or self.lines.aborted

    def _finish(self) -> None:
        """Waits in gloo."""
        self.work.wait()
        packet, (whole, first) = self.message, sizes(self.message)
        if first < whole:
            packet = torch.cat([packet[:first], torch.empty(whole - first, dtype=torch.uint8)])
            dist.recv(packet[first:], self.lines.ranks[self.peer], self.lines.group, self.tag + 1)
        changed = self.lines.control.changed
        with changed:
            self.packet = packet
            changed.notify_all()


def _mark(tag: int) -> int:
    """The mark of a packet: no number that a tensor is likely to have."""
    return (tag * 0x9E3779B97F4A7C15 ^ 0xA5C3E1F00F1E3C5A) & 0xFFFFFFFFFFFFFFFF


def _give_way() -> None:
    """Lets gloo's thread run, or another process, if they have no core of their own."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _nothing() -> None:
    """What a worker does after all that it was given before."""
