"""Packets between processes, and what a line keeps of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_scenes import Net, batch
from launcher import Launcher
from torch import Tensor

from pipecompile.distributed import lines, near
from pipecompile.distributed.line import Out
from pipecompile.distributed.packet import MARK, is_there


@pytest.mark.parametrize("within_the_host", [True, False])
def test_a_packet_of_a_known_size_is_one_message_and_any_other_arrives_too(
    launcher: Launcher, within_the_host: bool
) -> None:
    """Three packets in each of six programs: unknown, known, larger than known, then never larger."""
    (over_gloo, inside, _), (_, _, right) = launcher.returned(
        "lines_scenes:programs", 2, within_the_host=within_the_host
    )
    assert right
    assert [a + b for a, b in zip(over_gloo, inside, strict=True)] == [6, 3, 6, 3, 3, 3]
    first = 3 if within_the_host and near._host() is not None else 0
    assert inside == [first] * 6


def test_packets_that_wait_for_their_reader_come_in_order(launcher: Launcher) -> None:
    assert launcher.returned("lines_scenes:many", 2) == [[], [True, True]]


@pytest.mark.skipif(near._host() is None, reason="the system has no such sockets")
def test_where_sockets_of_the_host_do_not_connect_ranks_gloo_does_and_the_report_says_so(launcher: Launcher) -> None:
    inside = launcher.returned("lines_scenes:within_and_without", 2, sandbox=False)
    apart = launcher.returned("lines_scenes:within_and_without", 2, sandbox=True)
    torch.manual_seed(0)
    expected = Net()(batch()).item()
    for (loss, links, (before, after)), (its, said, none) in zip(inside, apart, strict=True):
        assert loss == its == pytest.approx(expected, rel=1e-5)
        assert before > 0
        assert after == 0
        assert none == [0, 0]
        assert links == said[:-1]
        assert said[-1] == (
            "ranks 0, 1 are on one host, but pass short messages over gloo, since a socket of the host connects rank 0 "
            "with none of them: ConnectionRefusedError: [Errno 111] Connection refused"
        )


Open = Callable[[int, str], lines.Lines]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the lines of a process in a group. What they post is kept, in ``messages``, and goes nowhere."""
    worker = SimpleNamespace(put=lambda job: None)
    monkeypatch.setattr(lines, "Worker", lambda control, place: worker)

    def open_(process: int, group: str) -> lines.Lines:
        monkeypatch.setattr(lines.dist, "get_rank", lambda: process)
        members: Any = SimpleNamespace(
            processes=range(3), group=SimpleNamespace(group_name=group), gathered=lambda address: [None] * 3
        )
        control: Any = SimpleNamespace(watch=SimpleNamespace(gone=[]))
        found: Any = lines.Lines(control, members, range(3))
        found.messages = []

        def post(operation: object, message: Tensor, peer: int, tag: int) -> object:
            found.messages.append(message)
            return SimpleNamespace(wait=lambda: None)

        found.post = post
        return found  # type: ignore[no-any-return]

    return open_


def sent(line: Any, peer: int) -> Tensor:
    line.put(peer, (torch.ones(3),))
    return line.messages[-1]  # type: ignore[no-any-return]


def test_no_two_packets_have_the_same_mark(opened: Open) -> None:
    found = []
    for group in ("one", "other"):
        for process in range(3):
            line = opened(process, group)
            found += [sent(line, peer) for peer in range(3) for _ in range(4)]
    marks = {MARK.unpack_from(message.numpy().data, len(message) - MARK.size)[0] for message in found}
    assert len(marks) == len(found) == 2 * 3 * 3 * 4


def test_a_packet_is_known_by_its_mark_and_an_earlier_one_from_elsewhere_is_not(opened: Open) -> None:
    receiver: Any = opened(1, "one")
    packet, elsewhere = (sent(opened(process, group), 1) for process, group in ((0, "one"), (2, "one")))
    coming = receiver.get(0).__self__
    memory = receiver.messages[-1]
    memory[: len(elsewhere)] = elsewhere  # what an earlier receive of another line has left; of this one, the head came
    assert not is_there(memory, coming.mark)
    memory[: len(packet)] = packet
    assert is_there(memory, coming.mark)
    ((value,), awaited) = coming.wait(), coming.is_awaited
    assert torch.equal(value, torch.ones(3))
    assert not awaited


def test_a_message_is_held_until_it_has_been_sent() -> None:
    jobs: list[Callable[[], None]] = []
    line, message, held = Out(SimpleNamespace(put=jobs.append), "a line"), torch.empty(1), list[bool]()
    alive = weakref.ref(message)
    line.sent(message, SimpleNamespace(wait=lambda: held.append(alive() is not None)))
    del message
    line.hand_over()
    (finish,) = jobs
    finish()
    assert held == [True]
    assert alive() is None
