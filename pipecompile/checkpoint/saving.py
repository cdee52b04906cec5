"""Checkpoints that are being written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from weakref import WeakKeyDictionary

from torch import nn

from pipecompile.checkpoint.subject import Subject
from pipecompile.distributed.processes import Processes

_UNDER_WAY: WeakKeyDictionary[nn.Module, Saving] = WeakKeyDictionary()  # by model, the last one


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written.

    Attributes:
        path: of the checkpoint, once it is complete.
    """

    path: Path
    _future: Future[None]
    _processes: Processes | None  # not the model, which must be free to go

    def done(self) -> bool:
        """Whether it has been written, or could not be written."""
        return self._future.done()

    def wait(self) -> Path:
        """Waits until the checkpoint is complete; returns its path.

        Raises:
            CheckpointError: it could not be written.
            RankError: a process has failed meanwhile.
        """
        for model in [model for model, last in _UNDER_WAY.items() if last is self]:
            del _UNDER_WAY[model]  # whoever waits is told, and not again
        if self._processes is None:
            self._future.result()
        else:
            self._processes.waited(self._future)
        return self.path


def start(subject: Subject, path: Path, job: Callable[[], None]) -> Saving:
    """Starts to write a checkpoint in the background."""
    processes = subject.processes
    if processes is not None:
        future = processes.background.start(job)
    else:
        future = Future()
        Thread(target=_run, args=(job, future), name=f"pipecompile writes {path.name}").start()
    saving = _UNDER_WAY[subject.model] = Saving(path, future, processes)
    return saving


def finish(subject: Subject) -> None:
    """Waits until the last checkpoint of a model has been written; raises as ``Saving.wait``, unless that has."""
    if (saving := _UNDER_WAY.get(subject.model)) is not None:
        saving.wait()


def _run(job: Callable[[], None], future: Future[None]) -> None:
    try:
        job()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
