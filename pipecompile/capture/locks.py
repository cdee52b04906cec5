"""Turns: what one thread does at a time, and a thread that would wait for itself is refused.

A call holds its pipeline's turn until it ends, and each rank has one thread. Code of a stage (a hook, a module kept
whole, a custom backward) that called its own pipeline would wait for a call that waits for it. So each thread knows
the turns that it holds, and a rank's thread those that are held for it: by the thread that waits for its program, and
by all that wait for that one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakSet

from pipecompile.errors import ReentryError


@dataclass(frozen=True, slots=True)
class Busy:
    """What one thread is busy with."""

    holds: frozenset[Turn] = frozenset()
    waited_for: frozenset[Turn] = frozenset()  # held by threads that wait for this one

    @property
    def turns(self) -> frozenset[Turn]:
        return self.holds | self.waited_for


_local = threading.local()
_IDLE = Busy()


def busy() -> Busy:
    """What the present thread is busy with."""
    found: Busy = getattr(_local, "busy", _IDLE)
    return found


@contextmanager
def waited_for(turns: frozenset[Turn]) -> Iterator[None]:
    """The present thread runs a program for which these turns are held."""
    _local.busy = Busy(waited_for=turns)
    try:
        yield
    finally:
        _local.busy = _IDLE


class Turn:
    """A lock that the thread which holds it may take again; a forked process has it free."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _TURNS.add(self)

    @contextmanager
    def taken(self, again: bool = True) -> Iterator[None]:
        """Waits for the turn, and has it.

        Args:
            again: whether the thread may hold it already.

        Raises:
            ReentryError: it must not and does, or whoever holds the turn waits for this thread.
        """
        before = busy()
        if self in before.waited_for or (not again and self in before.holds):
            raise ReentryError(
                "the pipeline is called by code that it runs itself (a hook, a loss function, a module or function of "
                "the model), and would wait for its own call to end; call the unsplit model there, "
                "pipe.pipeline.model, or call the pipeline once that call has returned"
            )
        with self.lock:
            _local.busy = replace(before, holds=before.holds | {self})
            try:
                yield
            finally:
                _local.busy = before


class Tracing(Turn):
    """Held while torch or a model is changed for some time: no process is forked meanwhile by another thread.

    The threads that the holder waits for, a program's, may take it beside the holder, one at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lent = Turn()
        self.held: list[threading.RLock] = []  # by the thread that forks
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._wait, after_in_parent=self._go_on, after_in_child=self._go_on)

    @contextmanager
    def taken(self, again: bool = True) -> Iterator[None]:
        with self.lent.taken(again) if self in busy().waited_for else super().taken(again):
            yield

    def _wait(self) -> None:
        if self not in busy().waited_for:
            self.lock.acquire()
            self.held.append(self.lock)

    def _go_on(self) -> None:
        if self.held:
            self.held.pop().release()


_TURNS: WeakSet[Turn] = WeakSet()


def _renew() -> None:
    for turn in list(_TURNS):
        if not isinstance(turn, Tracing):
            turn.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)

CAPTURING = Tracing()  # what captures a model, or compares it with another, changes torch and the model for some time
