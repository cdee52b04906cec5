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

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.coming import Coming, In, OverGloo, WithinHost
from pipecompile.distributed.control import Control
from pipecompile.distributed.line import Out
from pipecompile.distributed.members import Members
from pipecompile.distributed.near import LONGEST, Address, Near, Outlet
from pipecompile.distributed.packet import emptied, in_parts, packed
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.runtime.lane import Values
from pipecompile.runtime.transport import Aborted

Post = Callable[[Tensor, int, dist.ProcessGroup, int], dist.Work | None]
Get = Callable[[], Values]


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
        self._out: dict[int, Out] = {}
        self._in: dict[int, In] = {}
        self._coming: dict[Coming, None] = {}  # in the order of their posts

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
            line = self._out[peer] = Out(worker, self._name(self.process, self.ranks[peer]))
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

    def _outlet(self, peer: int, line: Out, room: int) -> Outlet | None:
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
            line = self._in[peer] = In(worker, self._name(self.ranks[peer], self.process))
        tag, room = line.next_tag(), line.room(kind)
        message, address = emptied(room), self._near_to(peer, room)
        if address is None:
            work = self.post(dist.irecv, message, peer, tag)
            coming: Coming = OverGloo(self, line, peer, tag, kind, seconds, message, work=work, mark=line.mark)
        else:
            coming = WithinHost(self, line, peer, tag, kind, seconds, message, sender=address)
            line.unread.append(coming)
        self._coming[coming] = None
        return coming.wait

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Aborted

    def _name(self, sender: int, receiver: int) -> str:
        """What a line is called at both of its ends, and no other line of any pipeline."""
        return f"{self.group.group_name} {sender} {receiver}"

    def arrived(self, coming: Coming) -> None:
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


def _gone(near: Near, there: Mapping[Address, int]) -> list[int]:
    """The ranks that have ended, as far as the sockets within this host tell."""
    return [there[address] for address in near.gone(there)]


def _nothing() -> None:
    """What a worker does after all that it was given before."""
