"""Phases by a clock that the test turns: they do not overlap, and only slow ones are shown."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.ops import phases
from pipecompile.ops.phases import Line, Phases, State, phase


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += seconds


class Shown:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, state: State) -> None:
        self.lines.append(str(state))

    def hide(self) -> None:
        self.lines.append("")


@contextmanager
def told(say: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """A context in which records of the package's logger are passed on."""
    handler = logging.Handler(logging.INFO)
    handler.emit = say  # type: ignore[method-assign]
    before = phases.LOGGER.level
    phases.LOGGER.setLevel(logging.INFO)
    phases.LOGGER.addHandler(handler)
    try:
        yield
    finally:
        phases.LOGGER.removeHandler(handler)
        phases.LOGGER.setLevel(before)


def test_an_inner_phase_stops_the_clock_of_the_outer_one() -> None:
    clock = Clock()
    it = Phases(clock)
    with it.recorded():
        clock.turn(1)
        with phase("rehearse"):
            clock.turn(2)
            with phase("plan"):
                clock.turn(4)
            clock.turn(8)
        clock.turn(16)
        with phase("plan"):
            clock.turn(32)
    seconds = {name: s for name, s in it.timing.by_phase().items() if s}
    assert seconds == {"plan": 36, "rehearse": 10, "other": 17}
    assert it.timing.total == 63
    assert str(it.timing) == "63.0 s (plan 36.0 s, rehearse 10.0 s, other 17.0 s)"


def test_a_phase_that_raises_ends() -> None:
    clock = Clock()
    it = Phases(clock)

    def fail() -> None:
        with it.recorded(), phase("capture"):
            clock.turn(3)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    clock.turn(5)
    with it.recorded():
        clock.turn(1)
    assert (it.timing.capture, it.timing.total) == (3, 4)


def test_only_what_is_slow_is_shown_with_the_time_that_is_left() -> None:
    clock, shown = Clock(), Shown()
    it = Phases(clock, shown)
    records: list[str] = []
    with told(lambda record: records.append(record.getMessage())), it.recorded():
        with phase("profile", 8) as advance:
            clock.turn(1.5)
            it.look()
            advance()
            advance()
            clock.turn(1.5)
            it.look()
        with phase("plan"):
            clock.turn(1)
            it.look()
            clock.turn(3)
            it.look()
            it.look()
    line, search = "profile 2 of 8: 3.00 s so far, about 9.00 s left", "plan: 4.00 s so far"
    assert shown.lines == ["", line, "", search, search]
    assert records == [line, "profile took 3.00 s", search, "plan took 4.00 s"]


def test_nothing_is_shown_of_a_fast_call(capfd: pytest.CaptureFixture[str]) -> None:
    records: list[str] = []
    with told(lambda record: records.append(record.getMessage())):
        pipe = pipecompile.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), ["cpu", "cpu"])
        pipe.pipeline._phases.patience = 1e9  # however slow the machine is
        pipe(torch.ones(4, 4)).sum().backward()
    assert records == []
    assert capfd.readouterr() == ("", "")
    timing = pipe.pipeline.report.timing
    assert timing.total > 0
    assert min(timing.capture, timing.profile, timing.plan, timing.verify, timing.step) > 0
    pipe(torch.ones(4, 4)).sum().backward()
    assert pipe.pipeline.report.timing == timing


class Stderr(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_line_is_on_a_terminal_alone_and_the_log_everywhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    stderr, seen = Stderr(is_terminal), threading.Event()
    monkeypatch.setattr(phases.sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with told(lambda record: seen.set()), Phases(patience=0.0).recorded(), phase("capture"):
        assert seen.wait(60)
    assert ("capture" in stderr.getvalue()) == is_terminal


def test_the_line_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.sys, "stderr", Stderr(True))
    before, line = threading.active_count(), Line()
    line.show(State("profile", 8, 2, 3.0))
    assert threading.active_count() == before
    line.hide()
