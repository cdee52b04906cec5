from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Thread

import pytest
import torch

from pipecompile.distributed import near
from pipecompile.distributed.near import LONGEST, PIECE, Address, Near, Outlet

pytestmark = pytest.mark.skipif(near._host() is None, reason="the system has no such sockets")


class Jobs:
    """In the place of a worker: runs its jobs in a thread once it is told."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], object]] = []

    def put(self, job: Callable[[], object]) -> None:
        self.jobs.append(job)

    def start(self) -> Thread:
        thread = Thread(target=lambda: [job() for job in self.jobs])
        thread.start()
        return thread


def connected() -> tuple[Near, Near, Outlet, Jobs]:
    """A sender, a receiver, and what the one sends to the other with."""
    sender, receiver, jobs = Near(), Near(), Jobs()
    assert sender.reaches(receiver.address)
    assert receiver.address is not None
    return sender, receiver, sender.to(receiver.address, lambda: jobs), jobs  # type: ignore[arg-type]


def address_of(end: Near) -> Address:
    assert end.address is not None
    return end.address


def numbered(number: int) -> list[bytes | memoryview]:
    """A message of several pieces, in parts that end elsewhere than these."""
    content = torch.randint(256, (LONGEST,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return [bytes([number] * 8), b"", content[: PIECE // 2].numpy().data, content[PIECE // 2 : -8].numpy().data]


def taken(receiver: Near, source: Address, nbytes: int) -> bytes:
    """The next message, for which this waits."""
    memory, count = bytearray(nbytes), 0
    while count < nbytes:
        receiver.wait(source, 1.0)
        count += receiver.take(source, memoryview(memory)[count:])
    return bytes(memory)


def test_messages_come_whole_and_in_order_also_those_that_wait_for_the_reader() -> None:
    sender, receiver, outlet, jobs = connected()
    for number in range(20):
        outlet.put(numbered(number))
    assert 0 < len(jobs.jobs) < 20 * LONGEST // PIECE  # the first pieces are on their way, the others wait
    outlet.put([b"last"])  # does not overtake those that wait
    thread, source = jobs.start(), address_of(sender)
    for number in range(20):
        assert taken(receiver, source, LONGEST) == b"".join(numbered(number))
    assert taken(receiver, source, 4) == b"last"
    thread.join()
    assert not receiver.take(source, memoryview(bytearray(1)))
    outlet.put([b"1", b"23"])
    assert taken(receiver, source, 3) == b"123"


def test_the_memory_of_a_message_may_be_written_once_it_is_sent() -> None:
    sender, receiver, outlet, jobs = connected()
    for _ in range(20):
        memory = bytearray(b"1" * LONGEST)
        outlet.put([memoryview(memory)])
        memory[:] = b"2" * LONGEST
    thread = jobs.start()
    assert all(taken(receiver, address_of(sender), LONGEST) == b"1" * LONGEST for _ in range(20))
    thread.join()


def test_the_end_of_a_process_comes_after_its_messages() -> None:
    sender, receiver, outlet, _ = connected()
    outlet.put([b"123"])
    source = address_of(sender)
    for each in sender._opened:
        each.close()
    assert taken(receiver, source, 3) == b"123"
    with pytest.raises(ConnectionError):
        receiver.take(source, memoryview(bytearray(3)))


def test_a_process_that_has_ended_gets_nothing() -> None:
    _sender, receiver, outlet, _ = connected()
    for each in receiver._opened:
        each.close()
    with pytest.raises(ConnectionError):
        outlet.put([b"123"])


def test_a_process_knows_of_those_that_it_has_connected_with_whether_they_have_ended() -> None:
    mine, there, ended, unknown = (Near() for _ in range(4))
    addresses = [address_of(other) for other in (there, ended, unknown)]
    assert [mine.tried(address) for address in addresses[:2]] == ["", ""]
    assert mine.gone(addresses) == []
    for other in (ended, unknown):
        other.close()
    assert mine.gone(addresses) == addresses[1:2]
    assert mine.tried(addresses[2]) == "ConnectionRefusedError: [Errno 111] Connection refused"


def test_another_user_is_not_reached_though_the_system_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = Near(), Near()
    monkeypatch.setattr(near.os, "getuid", lambda: 12345)
    user = near._user_of(mine._connection(address_of(theirs)))
    assert mine.tried(address_of(theirs)) == f"it seems to be of user {user}, and this one is of user 12345"


def test_a_stranger_that_connects_is_not_taken_for_a_sender() -> None:
    sender, receiver = Near(), Near()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(b"\0" + address_of(receiver).name.encode())
        stranger.send(b"stranger")
        outlet = sender.to(address_of(receiver), Jobs)  # type: ignore[arg-type]
        assert not receiver.take(address_of(sender), memoryview(bytearray(8)))
        outlet.put([b"1234"])
        assert taken(receiver, address_of(sender), 4) == b"1234"


def test_users_of_one_host_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Near()
    monkeypatch.setattr(near.os, "getuid", lambda: 12345)
    theirs = Near()
    assert not mine.reaches(theirs.address)
    assert theirs.address is not None
    outlet = mine.to(theirs.address, Jobs)  # type: ignore[arg-type]
    outlet.put([b"1234"])
    assert not theirs.take(address_of(mine), memoryview(bytearray(8)))


def test_without_such_sockets_nobody_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Near()
    monkeypatch.setattr(near, "_host", lambda: None)
    _reaches_nobody(Near(), other)


def test_where_a_sandbox_refuses_them_nobody_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Near()

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(near.socket, "socket", refused)
    _reaches_nobody(Near(), other)


def _reaches_nobody(alone: Near, other: Near) -> None:
    assert alone.address is None
    assert not alone.reaches(other.address)
    assert not other.reaches(alone.address)


def test_a_message_of_many_parts_is_sent_in_pieces_that_the_system_takes() -> None:
    sender, receiver = Near(), Near()
    parts = [bytes([number % 251]) for number in range(2500)]
    sender.to(address_of(receiver), Jobs).put(parts)  # type: ignore[arg-type]
    assert taken(receiver, address_of(sender), 2500) == b"".join(parts)
