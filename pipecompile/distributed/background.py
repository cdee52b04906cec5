"""Collectives beside those of the calls, for what goes on while the pipeline trains.

The collectives of one group must come in one order in all processes. Those of the calls are started by the thread that
calls, so what runs beside it has a group, and a thread, of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from pipecompile.distributed.members import Members
from pipecompile.distributed.worker import Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Background:
    """Runs jobs one after another. All processes must start the same ones in the same order."""

    worker: Worker
    members: Members

    def start(self, job: Callable[[], T]) -> Future[T]:
        """Runs a job after those started before it; does not wait. ``Processes.waited`` does."""
        return self.worker.start(job)

    def gathered(self, value: T) -> list[T]:
        """The value of each process. Only jobs may call it: it waits in gloo."""
        found: list[T | None] = [None] * len(self.members)
        dist.all_gather_object(found, value, self.members.group)
        return found  # type: ignore[return-value]
