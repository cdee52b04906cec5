"""A thread that runs jobs one after another, and that an interrupt of its caller does not harm.

Ctrl-C raises ``KeyboardInterrupt`` in the main thread between any two steps of Python code, the standard library's
too. A ``Future``, a ``Condition`` or the semaphore of a ``ThreadPoolExecutor`` is Python code: interrupted after it has
taken its lock and before the block that gives it back, it stays locked, and the thread that wants it next waits for
ever. So what both threads touch here is done in single steps of the interpreter: the methods of a ``SimpleQueue`` and
of a plain lock.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread


class Job:
    """A function that has been given to a thread.

    Attributes:
        ended: whether it has run.
        error: what it has raised.
    """

    def __init__(self) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self._running = Lock()
        self._running.acquire()

    def wait(self) -> None:
        """Waits until the job has ended. It may be called again after an interrupt, by the same thread."""
        if not self.ended:
            self._running.acquire()

    def end(self) -> None:
        """Called by the thread that has run the job."""
        self.ended = True  # before the lock: a wait that was interrupted with the lock taken does not wait again
        self._running.release()


Jobs = SimpleQueue[tuple[Job, Callable[[], object]] | None]


class RankThread:
    """Runs jobs in a thread of its own, which ends with this object, or with the program after the job that it runs.

    Args:
        name: of the thread.
        prepare: the first job.
    """

    def __init__(self, name: str, prepare: Callable[[], object]) -> None:
        self._jobs: Jobs = SimpleQueue()
        self.thread = Thread(target=_work, args=(self._jobs,), daemon=True, name=name)
        self.thread.start()
        self.start(prepare)
        weakref.finalize(self, self._jobs.put, None).atexit = False
        _RUNNING.add(self)

    def start(self, function: Callable[[], object]) -> Job:
        """Runs a function after those that were given before; does not wait."""
        job = Job()
        self._jobs.put((job, function))
        return job

    def settle(self) -> None:
        """Waits until all jobs have ended."""
        self.start(_nothing).wait()

    def end(self) -> None:
        """Ends the thread after the jobs that it has."""
        self._jobs.put(None)
        self.thread.join()


def _work(jobs: Jobs) -> None:
    while (given := jobs.get()) is not None:
        job, function = given
        del given
        try:
            function()
        except BaseException as error:
            job.error = error
        del function  # it may hold tensors
        job.end()
        del job  # the traceback of its error holds this frame


def _nothing() -> None:
    """What a thread does after its jobs, to show that they have ended."""


_RUNNING: weakref.WeakSet[RankThread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread must not run torch's code while the interpreter is taken down."""
    for each in list(_RUNNING):
        each.end()
