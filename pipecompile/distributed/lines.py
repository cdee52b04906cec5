"""Packets between ranks in several processes, over gloo, or over sockets of their host if they are short.

A packet says itself what it contains (``packet.py``). Its receiver posts the receive early, with room for as much as
earlier packets of the kind had (``rooms.py``); so gloo sends at once. The thread that calls waits in gloo only for what
has arrived, as the memory of the receive shows. For anything else, a worker waits: it is woken when the caller has
nothing else to do, since each of its steps would hold up a caller that computes. There is a worker for each peer and
direction, so that no packet waits for one that it does not depend on.

Between processes of one host, messages of a short room do not go over gloo (``near.py``): the thread that calls reads
them itself, and waits for them where the control channel can end the wait.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control
from pipecompile.distributed.members import Members
from pipecompile.distributed.near import LONGEST, Address, Near, Outlet
from pipecompile.distributed.packet import emptied, in_parts, is_there, packed, sizes, unpacked
from pipecompile.distributed.rooms import LEAST, Rooms
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.runtime.lane import Values
from pipecompile.runtime.transport import Aborted

Post = Callable[[Tensor, int, dist.ProcessGroup, int], dist.Work | None]
Get = Callable[[], Values]

TAGS = 2  # of one packet
ROUND = 1 << 24  # packets after which tags are used again
FEW, SMALL = 32, 1 << 20  # packets to a peer, and bytes of them, that no worker waits for yet
ODD = 0x9E3779B97F4A7C15  # between the marks of two packets: no number that a tensor is likely to have
SOON = 100e-6  # seconds for which the caller looks for a packet itself: two threads that wake each other take more


class Lines:
    """The lines between one rank and the others.

    Args:
        control: ends all waits when a rank fails.
        members: the processes of the ranks.
        places: of these in the control channel.

    Attributes:
        aborted: whether the waits of this process have been ended.
        said: what is told of the lines, for the report; the same in all processes.
    """

    def __init__(self, control: Control, members: Members, places: Sequence[int]) -> None:
        self.control = control
        self.ranks, self.group = members.processes, members.group
        self.process = dist.get_rank()
        self.places = places
        self.aborted = self._closed = False
        self.near = Near()
        self.said: list[str] = []
        self._addresses = self._tried(members)
        there = {address: place for address, place in zip(self._addresses, places, strict=True) if address}
        control.watch.gone.append(partial(_gone, self.near, there))
        self._out: dict[int, _Out] = {}
        self._in: dict[int, _In] = {}
        self._coming: dict[_Coming, None] = {}  # in the order of their posts

    def _tried(self, members: Members) -> Sequence[Address | None]:
        """Where each rank gets short messages; nowhere for those of a host where one does not reach the next one.

        A sandbox divides the ranks of a host into groups. Around the ring of them, some rank is then next to one of
        another group.
        """
        addresses = members.gathered(self.near.address)
        mine = members.processes.index(self.process)
        ring = [rank for rank, other in enumerate(addresses) if self.near.reaches(other)] or [mine]
        follower = addresses[ring[(ring.index(mine) + 1) % len(ring)]]
        tried = members.gathered("" if follower is None or len(ring) == 1 else self.near.tried(follower))
        failed = {
            address.host: (rank, why)
            for rank, (address, why) in enumerate(zip(addresses, tried, strict=True))
            if address and why
        }
        for host, (rank, why) in failed.items():
            ranks = [self.places[other] for other, address in enumerate(addresses) if address and address.host == host]
            self.said.append(
                f"ranks {', '.join(map(str, ranks))} are on one host, but pass short messages over gloo, since a "
                f"socket of the host connects rank {self.places[rank]} with none of them: {why}"
            )
        if self.near.address is not None and self.near.address.host in failed:
            self.near.close()
        return [None if address and address.host in failed else address for address in addresses]

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
        self._refuse_closed()
        line = self._out.get(peer)
        if line is None:
            worker = Worker(self.control, self.places[peer])
            line = self._out[peer] = _Out(worker, self._name(self.process, self.ranks[peer]))
        tag, room = line.next_tag(), line.room(kind)
        outlet = self._outlet(peer, line, room)
        if outlet is None:
            messages = packed(values, room, line.mark)
            line.saw(kind, sum(map(len, messages)))
        else:
            parts, nbytes = in_parts(values)
            line.saw(kind, nbytes)
            messages = []
            if nbytes > room:
                first, *messages = packed(values, room)
                parts, tag = [first.numpy().data], tag + 1
            try:
                outlet.put(parts)
            except OSError as error:
                self.refuse(peer, error)
        for place, message in enumerate(messages):
            line.sent(message, self.post(dist.isend, message, peer, tag + place))

    def _outlet(self, peer: int, line: _Out, room: int) -> Outlet | None:
        """What sends the first message of a packet, if it does not go over gloo. The receiver decides alike."""
        address = self._near_to(peer, room)
        if address is not None and line.outlet is None:
            try:
                line.outlet = self.near.to(address, partial(Worker, self.control, self.places[peer]))
            except OSError as error:
                self.refuse(peer, error)
        return line.outlet if address is not None else None

    def _near_to(self, peer: int, room: int) -> Address | None:
        """Where a rank is, if first messages of so many bytes travel within this host."""
        address = self._addresses[peer]
        return address if room <= LONGEST and self.near.reaches(address) else None

    def get(self, peer: int, kind: Hashable = None, seconds: float | None = None) -> Get:
        """Receives what a rank ``put``; returns a function that waits for it.

        Args:
            seconds: after which the wait raises ``TimeoutError``.
        """
        self._refuse_closed()
        line = self._in.get(peer)
        if line is None:
            worker = Worker(self.control, self.places[peer])
            line = self._in[peer] = _In(worker, self._name(self.ranks[peer], self.process))
        tag, room = line.next_tag(), line.room(kind)
        message, address = emptied(room), self._near_to(peer, room)
        if address is None:
            work = self.post(dist.irecv, message, peer, tag)
            coming: _Coming = _Posted(self, line, peer, tag, kind, seconds, message, work=work, mark=line.mark)
        else:
            coming = _Near(self, line, peer, tag, kind, seconds, message, sender=address)
            line.unread.append(coming)
        self._coming[coming] = None
        return coming.wait

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Aborted

    def _name(self, sender: int, receiver: int) -> str:
        """What a line is called at both of its ends, and no other line of any pipeline."""
        return f"{self.group.group_name} {sender} {receiver}"

    def arrived(self, coming: _Coming) -> None:
        """Takes note that a packet is there."""
        self._coming.pop(coming, None)

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        for line in self._out.values():
            line.hand_over()
            line.worker.call(_nothing)
            if line.outlet is not None:
                line.outlet.flush()

    def abort(self) -> None:
        """Ends the waits of this process; those of others are ended by the control channel."""
        with self.control.changed:
            self.aborted = True
            self.control.changed.notify_all()

    def close(self) -> None:
        """Closes the sockets of the host, after the last packet of all ranks. Nothing is sent or received after it."""
        self._closed = True
        self.near.close()

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

    def refuse(self, peer: int, error: Exception) -> NoReturn:
        """Raises ``Aborted`` for a lost connection, and any other error as it is."""
        if not is_lost(error):
            raise error
        self.control.lost(self.places[peer], error)
        raise Aborted from error


class _Line:
    """One direction between this rank and another one.

    Args:
        name: the same at both ends, and another one for each line.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker = worker
        self.first_mark = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        self.rooms = Rooms()
        self.count = 0

    def next_tag(self) -> int:
        self.count += 1
        return self.count % ROUND * TAGS

    @property
    def mark(self) -> int:
        """The mark of the last packet, which no other one of this process is likely to have had.

        The memory for a packet may have held any earlier one. With that one's mark in it, the calling thread would take
        a packet for complete that is still on its way, and wait in gloo for the rest.
        """
        return (self.first_mark + self.count * ODD) % (1 << 64)

    def room(self, kind: Hashable) -> int:
        return LEAST if kind is None else self.rooms.room(kind)

    def saw(self, kind: Hashable, nbytes: int) -> None:
        if kind is not None:
            self.rooms.saw(kind, nbytes)


class _Out(_Line):
    """To another rank. Messages must be held until they have been sent; a worker waits for many of them at once.

    Attributes:
        outlet: for messages within this host, once there was one.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        super().__init__(worker, name)
        self.outlet: Outlet | None = None
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
                sent[0][1].wait()
                del sent[0]  # not before: the wait needs the message

        self.worker.put(finish)


class _In(_Line):
    """From another rank.

    Attributes:
        unread: packets within this host of which nothing has been read, in their order.
    """

    def __init__(self, worker: Worker, name: str) -> None:
        super().__init__(worker, name)
        self.unread: deque[_Near] = deque()


class _Coming:
    """A packet that was asked for, until it is there.

    Args:
        message: for its first message.
    """

    def __init__(
        self,
        lines: Lines,
        line: _In,
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


class _Posted(_Coming):
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


class _Near(_Coming):
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


def _gone(near: Near, there: Mapping[Address, int]) -> list[int]:
    """The ranks that have ended, as far as the sockets within this host tell."""
    return [there[address] for address in near.gone(there)]


def _give_way() -> None:
    """Lets gloo's thread run, or another process, if they have no core of their own."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _nothing() -> None:
    """What a worker does after all that it was given before."""
