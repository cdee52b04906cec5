"""What a long call is doing: the seconds of each phase, for its report, and a line of progress if one is slow.

    with phases.recorded():                       # a call
        with phase("profile", total=600) as advance:
            ...; advance()                        # one of 600 is done
    phases.timing                                 # -> Timing

Phases nest, and do not overlap: an inner one stops the clock of the outer one. A phase that takes longer than
``PATIENCE`` shows a line on stderr, if that is a terminal, and logs to the logger "pipecompile" (INFO). A thread of its
own looks, so that phases which cannot count their work (a search) show too.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipecompile.ir.timing import PHASES, Timing
from pipecompile.ir.units import seconds_text

PATIENCE = 2.0  # seconds until a phase is shown
LOOKS = 0.25  # seconds between two looks of the thread
LOGGER = logging.getLogger("pipecompile")
OTHER = "other"


@dataclass
class State:
    """A phase that is under way."""

    name: str
    total: int  # pieces of work; 0 if they cannot be counted
    done: int = 0
    seconds: float = 0.0  # without those of phases inside

    @property
    def left(self) -> float | None:
        """The estimated seconds that are left; None if the work cannot be counted."""
        return self.seconds / self.done * (self.total - self.done) if self.done and self.total else None

    def __str__(self) -> str:
        left = "" if self.left is None else f", about {seconds_text(self.left)} left"
        counted = f" {self.done} of {self.total}" if self.total else ""
        return f"{self.name}{counted}: {seconds_text(self.seconds)} so far{left}"


class Display(Protocol):
    """Where progress is shown."""

    def show(self, state: State) -> None: ...

    def hide(self) -> None: ...


class Phases:
    """The phases of a call.

    Args:
        clock: returns seconds.
        display: where slow phases are shown; by default stderr, if it is a terminal.
        patience: seconds after which a phase is slow.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        display: Display | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.clock, self.patience = clock, patience
        self.display = display
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._stack: list[State] = []
        self._since = 0.0
        self._told: set[str] = set()  # phases that have been logged as slow
        self._lock = threading.Lock()

    @property
    def timing(self) -> Timing:
        """The seconds of each phase so far."""
        return Timing(**self.seconds)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context whose phases are recorded here; what is in none of them counts as ``other``."""
        token = _CURRENT.set(self)
        try:
            with self._watched(), self.of(OTHER):
                yield
        finally:
            _CURRENT.reset(token)

    @contextmanager
    def of(self, name: str, total: int = 0) -> Iterator[Callable[[], None]]:
        """A context that is the phase ``name``; the function that it gives counts one of ``total`` pieces of work."""
        with self._lock:
            self._charge()
            state = State(name, total)
            self._stack.append(state)

        def advance() -> None:
            state.done += 1

        try:
            yield advance
        finally:
            with self._lock:
                self._charge()
                self._stack.pop()
            if name in self._told and not any(outer.name == name for outer in self._stack):
                self._told.discard(name)
                LOGGER.info("%s took %s", name, seconds_text(self.seconds[name]))

    def look(self) -> None:
        """Shows the present phase, if it is slow."""
        with self._lock:
            self._charge()
            state = self._stack[-1] if self._stack else None
            if state is None or state.name == OTHER or self.seconds[state.name] < self.patience:
                state = None
        if self.display is not None:
            self.display.hide() if state is None else self.display.show(state)
        if state is not None and state.name not in self._told:
            self._told.add(state.name)
            LOGGER.info("%s", state)

    def _charge(self) -> None:
        """Adds the seconds since the last change to the present phase."""
        now = self.clock()
        if self._stack:
            self._stack[-1].seconds += now - self._since
            self.seconds[self._stack[-1].name] += now - self._since
        self._since = now

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A context during which a thread looks at the phases."""
        running = threading.Lock()  # an interrupt does not leave a lock locked, as it may the parts of an Event
        thread = threading.Thread(target=self._watch, args=(running,), name="pipecompile progress", daemon=True)
        try:
            with running:
                thread.start()
                yield
        finally:
            if thread.is_alive():
                thread.join()

    def _watch(self, running: threading.Lock) -> None:
        if running.acquire(timeout=self.patience):
            return
        self.display = self.display or (Line() if sys.stderr is not None and sys.stderr.isatty() else None)
        while True:
            self.look()
            if running.acquire(timeout=LOOKS):
                break
        if self.display is not None:
            self.display.hide()


class Line:
    """A line on stderr, which disappears."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def show(self, state: State) -> None:
        if self._bar is None:
            columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns,
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task("", total=None, left="")
            self._bar.start()
        left = "" if state.left is None else f"about {seconds_text(state.left)} left"
        total = state.total or None
        self._bar.update(
            self._bar.task_ids[0],
            description=f"pipecompile: {state.name}",
            total=total,
            completed=state.done,
            left=left,
            refresh=True,
        )

    def hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_CURRENT: ContextVar[Phases | None] = ContextVar("pipecompile_phases", default=None)


@contextmanager
def phase(name: str, total: int = 0) -> Iterator[Callable[[], None]]:
    """A phase of the call that is recorded, or one by itself, whose seconds nobody reads.

    Args:
        name: one of ``PHASES``.
        total: pieces of work, if they can be counted.
    """
    phases = _CURRENT.get()
    if phases is not None:
        with phases.of(name, total) as advance:
            yield advance
        return
    with Phases().recorded(), phase(name, total) as advance:
        yield advance
