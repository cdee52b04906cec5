"""One direction between this rank and another one: the tags, marks and rooms of its packets, and what was sent."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.near import Outlet
from pipecompile.distributed.rooms import LEAST, Rooms
from pipecompile.distributed.worker import Worker

TAGS = 2  # of one packet
ROUND = 1 << 24  # packets after which tags are used again
FEW, SMALL = 32, 1 << 20  # packets to a peer, and bytes of them, that no worker waits for yet
ODD = 0x9E3779B97F4A7C15  # between the marks of two packets: no number that a tensor is likely to have


class Line:
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


class Out(Line):
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
