from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from pipecompile.distributed import near
from pipecompile.distributed.near import LONGEST, Address, Near, Outlet

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


def numbered(number: int) -> Tensor:
    return torch.full((LONGEST,), number, dtype=torch.uint8)


def test_messages_come_whole_and_in_order_also_those_that_wait_for_the_reader() -> None:
    sender, receiver, outlet, jobs = connected()
    for number in range(20):
        outlet.put(numbered(number))
    assert 0 < len(jobs.jobs) < 20  # the first ones are on their way, the others wait
    assert not outlet.put_now([b"0"]), "it would overtake those that wait"
    thread, memory = jobs.start(), torch.empty(LONGEST, dtype=torch.uint8)
    for number in range(20):
        while not receiver.take(address_of(sender), memory):
            receiver.wait(address_of(sender), 1.0)
        assert torch.equal(memory, numbered(number))
    thread.join()
    assert not receiver.take(address_of(sender), memory)
    assert outlet.put_now([b"1", b"23"])
    assert receiver.take(address_of(sender), memory)
    assert bytes(memory[:3].tolist()) == b"123"


def test_the_end_of_a_process_comes_after_its_messages() -> None:
    sender, receiver, outlet, _ = connected()
    outlet.put(numbered(1))
    source, memory = address_of(sender), torch.empty(LONGEST, dtype=torch.uint8)
    for each in sender._opened:
        each.close()
    assert receiver.take(source, memory)
    with pytest.raises(ConnectionError):
        receiver.take(source, memory)


def test_a_process_that_has_ended_gets_nothing() -> None:
    _sender, receiver, outlet, _ = connected()
    for each in receiver._opened:
        each.close()
    with pytest.raises(ConnectionError):
        outlet.put(numbered(1))


def test_a_stranger_that_connects_is_not_taken_for_a_sender() -> None:
    sender, receiver = Near(), Near()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(b"\0" + address_of(receiver).name.encode())
        stranger.send(b"stranger")
        outlet = sender.to(address_of(receiver), Jobs)  # type: ignore[arg-type]
        memory = torch.zeros(4, dtype=torch.uint8)
        assert not receiver.take(address_of(sender), memory)
        outlet.put(torch.ones(4, dtype=torch.uint8))
        assert receiver.take(address_of(sender), memory)
        assert memory.tolist() == [1, 1, 1, 1]


def test_users_of_one_host_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Near()
    monkeypatch.setattr(near.os, "getuid", lambda: 12345)
    theirs = Near()
    assert not mine.reaches(theirs.address)
    assert theirs.address is not None
    outlet = mine.to(theirs.address, Jobs)  # type: ignore[arg-type]
    outlet.put(numbered(1))
    assert not theirs.take(address_of(mine), torch.empty(LONGEST, dtype=torch.uint8))


def test_without_such_sockets_nobody_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Near()
    monkeypatch.delattr(socket, "SO_PEERCRED")
    alone: Any = Near()
    assert alone.address is None
    assert not alone.reaches(other.address)
    assert not other.reaches(alone.address)
