"""A daemon thread for what may block for ever, in order: waits in gloo, collectives."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from pipecompile.distributed.control import Control
from pipecompile.distributed.leaving import abroad
from pipecompile.distributed.watch import Cause, Watch

T = TypeVar("T")
Jobs = SimpleQueue[Callable[[], object] | None]
LOST = re.compile(r"gloo.transport|connection|broken pipe|reset by peer|timed out", re.IGNORECASE)


class Worker:
    """Runs jobs one after another. The first one that raises is the last: its error is reported as a cause.

    Args:
        peer: the rank that the jobs communicate with; None if that is all.
    """

    def __init__(self, control: Control, peer: int | None = None) -> None:
        self.control = control
        self.peer = peer
        self._jobs: Jobs = SimpleQueue()
        name = f"pipecompile {control.rank} with {'all' if peer is None else peer}"
        Thread(target=_work, args=(self._jobs, control.watch, peer), daemon=True, name=name).start()
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def put(self, job: Callable[[], object]) -> None:
        """Runs a job after those put before it; never waits."""
        self._jobs.put(job)

    def call(self, function: Callable[[], T], seconds: float | None = None) -> T:
        """Runs a function in the thread and returns what it returns, or raises what it raises.

        Raises:
            Aborted: there is a cause; the function may run on.
            TimeoutError: the time was up; the function may run on.
        """
        return self.wait(self.start(function), seconds)

    def wait(self, future: Future[T], seconds: float | None = None) -> T:
        """The result of a function that was started; raises as ``call``."""
        if not self.control.wait_for(future.done, seconds, self.peer):
            raise TimeoutError
        return future.result()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function after the jobs put before it; does not wait."""
        future: Future[T] = Future()
        changed = self.control.changed

        def job() -> None:
            try:
                result = function()
            except Exception as error:
                if is_lost(error):
                    raise
                future.set_exception(error)
            else:
                future.set_result(result)
            with changed:
                changed.notify_all()

        self.put(job)
        return future


def is_lost(error: BaseException) -> bool:
    """Whether an error tells of a connection that was lost, rather than of a fault in this rank."""
    return isinstance(error, RuntimeError | OSError) and LOST.search(str(error)) is not None


def _work(jobs: Jobs, watch: Watch, peer: int | None) -> None:
    while (job := jobs.get()) is not None:
        try:
            with abroad():
                job()
        except Exception as error:
            if is_lost(error):
                watch.lost(peer, error)
            else:
                watch.report(Cause(watch.rank, watch.host, "", f"{type(error).__name__}: {error}"))
            return
        del job  # it may hold tensors
