from __future__ import annotations

from pipecompile.distributed import rooms
from pipecompile.distributed.rooms import LEAST, Rooms


def test_what_a_program_has_seen_holds_from_the_next_one_on() -> None:
    it = Rooms()
    it.saw("a", 10_000)
    assert it.room("a") == LEAST
    it.begin()
    assert it.room("a") == 10_000
    assert it.room("b") == LEAST


def test_the_largest_of_a_kind_counts() -> None:
    it = Rooms()
    for program in ([5_000, 9_000, 7_000], [6_000]):
        for nbytes in program:
            it.saw("a", nbytes)
        it.begin()
    assert it.room("a") == 9_000


def test_two_ends_forget_alike(monkeypatch) -> None:
    monkeypatch.setattr(rooms, "KINDS", 3)
    ends = Rooms(), Rooms()
    for program in range(10):
        found = [{kind: it.room(kind) for kind in range(10)} for it in ends]
        assert found[0] == found[1]
        kinds = [program, (program + 1) % 5]
        for it, order in zip(ends, (kinds, kinds[::-1]), strict=True):  # one learns when it sends, one when it has got
            for kind in order:
                it.saw(kind, 5_000 + kind)
            it.begin()
    assert len(ends[0]._known) <= 3
