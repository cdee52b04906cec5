"""Short messages between processes of one host, over sockets of that host.

gloo has a thread in each process that reads, and a lock for each peer, which a sender holds while it writes. What it
writes wakes the receiver's reading thread, which may take the core from the sender, lock in hand. If a message comes
for the sender meanwhile, its own reading thread asks for the lock in a loop, up to the end of a time slice: 3 to 4 ms
in which nothing else runs on that core. Two ranks that send to each other at once, as they do in 1F1B and when they
agree on a call, meet this in most steps. Here a message costs one system call at each end, or a few, in the thread that
calls, and wakes no other thread.

A socket of this kind (``SOCK_SEQPACKET``) carries pieces whole and in order. There is one for each direction between
two processes, made when the first message is sent; its own name says who that is.

Whether processes that seem to be on one host reach each other is tried: a sandbox may let each of them open sockets,
and connect none. Each process connects with the next one of its host, at the end of the ring with the first one. That
connection also tells it when the next one ends.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from pipecompile.distributed.packet import Part
from pipecompile.distributed.worker import Worker

LONGEST = 256 * 1024  # bytes of a message: what a receiver that computes may leave in the system's memory
PIECE = 64 * 1024  # bytes: what the system takes without much memory in one place
PARTS = 1000  # of a piece; the system takes 1,024
ON_THE_WAY = 512 * 1024  # bytes, or less, if the system has a limit
OWNER = struct.Struct("3i")  # process, user and group at the other end


@dataclass(frozen=True)
class Address:
    """Where a process gets short messages.

    Attributes:
        host: the same for processes that can reach each other.
        name: of its socket.
    """

    host: str
    name: str


class Near:
    """The sockets of one process.

    Attributes:
        address: of this process; None if its system has no such sockets.
    """

    def __init__(self) -> None:
        self.address: Address | None = None
        self._opened: list[socket.socket] = []
        self._connected: dict[Address, socket.socket] = {}
        self._coming: dict[bytes, socket.socket] = {}  # by their other ends
        weakref.finalize(self, _close, self._opened).atexit = False
        if (host := _host()) is not None:
            name = f"pipecompile {uuid4().hex}"
            with suppress(OSError):  # a sandbox that has no such sockets
                self._listener = self._socket(name)
                self._listener.listen(socket.SOMAXCONN)
                self.address = Address(host, name)

    def reaches(self, other: Address | None) -> bool:
        """Whether messages go to, and come from, a process at this address."""
        return None not in (self.address, other) and self.address.host == other.host  # type: ignore[union-attr]

    def tried(self, other: Address) -> str:
        """Connects with a process; returns why the two do not reach each other, or ""."""
        try:
            user = _user_of(self._connection(other))
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return "" if user == os.getuid() else f"it seems to be of user {user}, and this one is of user {os.getuid()}"

    def gone(self, others: Iterable[Address]) -> list[Address]:
        """Those of some processes that have ended, as far as their sockets tell: of those that this one has."""
        return [other for other in others if other in self._connected and _hung_up(self._connected[other])]

    def to(self, other: Address, worker: Callable[[], Worker]) -> Outlet:
        """What sends to a process.

        Args:
            worker: makes one that waits for the receiver to read, and for nothing else.
        """
        return Outlet(self._connection(other), worker)

    def close(self) -> None:
        """Closes the sockets. Reaches nobody afterwards."""
        self.address = None
        for each in self._opened:
            with suppress(OSError):  # not connected
                each.shutdown(socket.SHUT_RDWR)  # wakes a worker that waits for the receiver to read
        _close(self._opened)
        self._connected.clear()
        self._coming.clear()

    def take(self, other: Address, memory: memoryview) -> int:
        """Receives the next piece of a message of a process, if it has come. Never waits.

        Returns:
            Its bytes; 0 if nothing has come.

        Raises:
            ConnectionError: the process has ended.
        """
        source = self._source(other)
        if source is None:
            return 0
        try:
            count = source.recv_into(memory)
        except BlockingIOError:
            return 0
        if not count:
            raise ConnectionResetError("connection closed by the other process")
        return count

    def wait(self, other: Address, seconds: float) -> None:
        """Waits until something has come from a process, but not for longer than some seconds."""
        poll = select.poll()
        poll.register(self._source(other) or self._listener, select.POLLIN)
        poll.poll(1e3 * seconds)

    def _source(self, other: Address) -> socket.socket | None:
        """The socket from a process; None if it has sent nothing yet."""
        assert self.address is not None
        name = _abstract(_between(other, self.address))
        while name not in self._coming:
            try:
                connected, sender = self._listener.accept()
            except BlockingIOError:
                return None
            if _user_of(connected) != os.getuid():
                connected.close()
                continue
            connected.setblocking(False)
            self._opened.append(connected)
            self._coming[sender] = connected
        return self._coming[name]

    def _connection(self, other: Address) -> socket.socket:
        assert self.address is not None
        if other not in self._connected:
            connected = self._socket(_between(self.address, other))
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ON_THE_WAY)
            connected.setblocking(True)
            connected.connect(_abstract(other.name))
            connected.setblocking(False)
            self._connected[other] = connected
        return self._connected[other]

    def _socket(self, name: str) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._opened.append(made)
        made.bind(_abstract(name))
        made.setblocking(False)
        return made


class Outlet:
    """Sends to one process, in order."""

    def __init__(self, connected: socket.socket, worker: Callable[[], Worker]) -> None:
        self._socket = connected
        self._make_worker = worker
        self._waiting: deque[bytes] = deque()  # for the receiver to read

    def put(self, parts: Sequence[Part]) -> None:
        """Sends a message that is in several parts of memory; never waits. They may be written afterwards.

        Raises:
            ConnectionError: the process has ended.
        """
        for piece in _pieces(parts):
            if not self._is_put_now(piece):
                self._waiting.append(b"".join(piece))
                self._worker.put(self._put_next)

    def _is_put_now(self, piece: Sequence[Part]) -> bool:
        if self._waiting:
            return False
        try:
            self._socket.sendmsg(piece, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        return True

    def flush(self) -> None:
        """Waits until all of it is on its way.

        Raises:
            Aborted: a rank has failed.
        """
        if self._waiting:
            self._worker.call(int)  # nothing, after all that it was given before

    @cached_property
    def _worker(self) -> Worker:
        return self._make_worker()

    def _put_next(self) -> None:
        poll, sent = select.poll(), False
        poll.register(self._socket, select.POLLOUT)
        while not sent:
            poll.poll()
            try:
                sent = bool(self._socket.send(self._waiting[0], socket.MSG_NOSIGNAL))
            except BlockingIOError:
                continue
        self._waiting.popleft()


def _pieces(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """The parts of a message, cut into pieces of at most ``PIECE`` bytes and ``PARTS`` parts."""
    piece: list[Part] = []
    left = PIECE
    for part in parts:
        if len(piece) == PARTS:
            yield piece
            piece, left = [], PIECE
        while len(part) > left:
            yield [*piece, part[:left]]
            part, piece, left = part[left:], [], PIECE
        piece.append(part)
        left -= len(part)
    yield piece


def _host() -> str | None:
    """What processes have in common that can reach each other's sockets; None if there are none of this kind."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()} {network.stat().st_ino} {os.getuid()} {socket.SO_PEERCRED}"
    except (AttributeError, OSError):  # not Linux
        return None


def _user_of(connected: socket.socket) -> int:
    """The user at the other end, as this process knows users."""
    _, user, _ = OWNER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, OWNER.size))
    return user  # type: ignore[no-any-return]


def _hung_up(connected: socket.socket) -> bool:
    """Whether the other end is closed; asked for nothing, ``poll`` says that alone."""
    poll = select.poll()
    poll.register(connected, 0)
    return bool(poll.poll(0))


def _between(sender: Address, receiver: Address) -> str:
    return f"{sender.name} to {receiver.name}"


def _abstract(name: str) -> bytes:
    """The name of a socket that is in no folder, and ends with its process."""
    return b"\0" + name.encode()


def _close(opened: Sequence[socket.socket]) -> None:
    for each in opened:
        each.close()
