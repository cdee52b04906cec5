"""Turns: locks that refuse a thread which would wait for itself.

A call holds its pipeline's turn until it ends, and each rank has one thread. If code of a stage (a hook, a module kept
whole, a custom backward) calls its own pipeline, it waits for a call that waits for it. So each thread knows the turns
that it holds, and the thread of a rank also knows the turns held by the threads that wait for its program, directly or
indirectly.
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
    """The turns that concern one thread.

    Attributes:
        holds: Turns that the thread holds.
        waited_for: Turns held by threads that wait for this one.
    """

    holds: frozenset[Turn] = frozenset()
    waited_for: frozenset[Turn] = frozenset()

    @property
    def turns(self) -> frozenset[Turn]:
        return self.holds | self.waited_for


_local = threading.local()
_IDLE = Busy()


def busy() -> Busy:
    """Returns the turns that concern the present thread."""
    found: Busy = getattr(_local, "busy", _IDLE)
    return found


@contextmanager
def waited_for(turns: frozenset[Turn]) -> Iterator[None]:
    """A context in which the present thread runs a program while other threads hold ``turns`` and wait for it."""
    try:
        _local.busy = Busy(waited_for=turns)
        yield
    finally:
        _local.busy = _IDLE


class Turn:
    """A reentrant lock; a forked process gets it unlocked."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _TURNS.add(self)

    @contextmanager
    def taken(self, again: bool = True) -> Iterator[None]:
        """Waits for the turn, and holds it inside the context.

        Args:
            again: Whether the thread may already hold it.

        Raises:
            ReentryError: The thread holds it already and must not, or the holder waits for this thread.
        """
        before = busy()
        if self in before.waited_for or (not again and self in before.holds):
            raise ReentryError(
                "the pipeline is called by code that it runs itself (a hook, a loss function, a module or function of "
                "the model) and would wait for its own call to end; call the unsplit model there "
                "(pipe.pipeline.model), or call the pipeline after that call has returned"
            )
        with self.lock:
            try:  # an interrupt may come between any two lines
                _local.busy = replace(before, holds=before.holds | {self})
                yield
            finally:
                _local.busy = before


class Tracing(Turn):
    """Held while torch or a model is patched; other threads cannot fork the process meanwhile.

    The threads that run the holder's program may take it too, one at a time.
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

CAPTURING = Tracing()  # capturing a model, or comparing it with another, patches torch and the model
