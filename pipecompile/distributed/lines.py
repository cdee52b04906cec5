"""Packets between ranks in several processes, over gloo.

A packet says itself what it contains (``packet.py``). Its receiver posts the receive early, with room for as much as
earlier packets of the kind had (``rooms.py``); so gloo sends at once. Nothing here waits in gloo in the thread that
calls: it posts, and a worker waits. There is a worker for each peer and direction, so that no packet waits for one that
it does not depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control
from pipecompile.distributed.members import Members
from pipecompile.distributed.packet import packed, sizes, unpacked
from pipecompile.distributed.rooms import LEAST, Rooms
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.runtime.lane import Values
from pipecompile.runtime.transport import Aborted

Post = Callable[[Tensor, int, dist.ProcessGroup, int], dist.Work | None]
Get = Callable[[], Values]

TAGS = 2  # of one packet
ROUND = 1 << 24  # packets after which tags are used again


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
        self._lines: dict[tuple[int, str], _Line] = {}
        self._pending = {"to": 0, "from": 0}  # packets on their way
        self._awaited = 0  # threads that wait until there are none

    def begin(self) -> None:
        """Applies what was learnt about the sizes of packets. Called at both ends between the same packets."""
        self._until_none("from")
        for line in self._lines.values():
            line.rooms.begin()

    def put(self, peer: int, values: Values, kind: Hashable = None) -> None:
        """Sends values to a rank; never waits.

        Args:
            kind: of packets that have the same size in each program; None if it says nothing about the size.
        """
        line = self._line(peer, "to")
        messages = packed(values, LEAST if kind is None else line.rooms.room(kind))
        line.saw(kind, sum(map(len, messages)))
        tag = line.next_tag()
        works = [self._post(dist.isend, message, peer, tag + place) for place, message in enumerate(messages)]

        def finish(messages: Sequence[Tensor] = messages) -> None:
            for work in works:
                work.wait()
            self._ended("to")

        self._begun("to")
        line.worker.put(finish)

    def get(self, peer: int, kind: Hashable = None, seconds: float | None = None) -> Get:
        """Receives what a rank ``put``; returns a function that waits for it.

        Args:
            seconds: after which the wait raises ``TimeoutError``.
        """
        line, arrived = self._line(peer, "from"), list[Values]()
        tag = line.next_tag()
        message = torch.empty(LEAST if kind is None else line.rooms.room(kind), dtype=torch.uint8)
        work = self._post(dist.irecv, message, peer, tag)

        def finish(packet: Tensor = message) -> None:
            work.wait()
            whole, first = sizes(packet)
            if first < whole:
                packet = torch.cat([packet[:first], torch.empty(whole - first, dtype=torch.uint8)])
                dist.recv(packet[first:], self.ranks[peer], self.group, tag + 1)
            line.saw(kind, whole)
            arrived.append(unpacked(packet))
            self._ended("from", heard=True)

        def wait() -> Values:
            if arrived:
                return arrived[0]
            if not self.control.wait_for(lambda: self.aborted or bool(arrived), seconds, self.places[peer]):
                raise TimeoutError
            if not arrived:
                raise Aborted
            return arrived[0]

        self._begun("from")
        line.worker.put(finish)
        return wait

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        self._until_none("to")

    def abort(self) -> None:
        """Ends the waits of this process; those of others are ended by the control channel."""
        with self.control.changed:
            self.aborted = True
            self.control.changed.notify_all()

    def _post(self, operation: Post, message: Tensor, peer: int, tag: int) -> dist.Work:
        try:
            work = operation(message, self.ranks[peer], self.group, tag)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            self.control.lost(self.places[peer], error)
            raise Aborted from error
        assert work is not None  # this process is in the group
        return work

    def _until_none(self, way: str) -> None:
        """Waits until no packet is on its way."""
        with self.control.changed:
            if self._pending[way] == 0:
                return
            self._awaited += 1
        try:
            self.control.wait_for(lambda: self._pending[way] == 0)
        finally:
            with self.control.changed:
                self._awaited -= 1

    def _begun(self, way: str) -> None:
        with self.control.changed:
            self._pending[way] += 1

    def _ended(self, way: str, heard: bool = False) -> None:
        """Counts a packet that has arrived; wakes those that wait for it or for the last one, and nobody else."""
        with self.control.changed:
            self._pending[way] -= 1
            if heard or (self._awaited and not self._pending[way]):
                self.control.changed.notify_all()

    def _line(self, peer: int, way: str) -> _Line:
        if (peer, way) not in self._lines:
            self._lines[peer, way] = _Line(Worker(self.control, self.places[peer]))
        return self._lines[peer, way]


class _Line:
    """One direction between this rank and another one."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.rooms = Rooms()
        self.count = 0

    def next_tag(self) -> int:
        self.count += 1
        return self.count % ROUND * TAGS

    def saw(self, kind: Hashable, nbytes: int) -> None:
        if kind is not None:
            self.rooms.saw(kind, nbytes)
