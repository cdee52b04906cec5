"""Pipelines that processes call in different orders: each waits in one for another process, which waits in another one.

    process 0: waits in pipeline 0        process 1: waits in pipeline 1

Each pipeline has a control channel of its own. In that of pipeline 0, process 1 says that it has been waiting in
pipeline 1, and for whom; process 0, which is one of those, then knows that nobody will come.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Stay:
    """A wait of this process's main thread for all other processes of a pipeline.

    Attributes:
        pipeline: an object of its own for each.
        said: what it waits in.
        processes: of the pipeline, by their numbers in the default process group.
        since: when it began.
    """

    pipeline: object
    said: str
    processes: Sequence[int]
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def to_json(self) -> str:
        return json.dumps([self.said, list(self.processes), self.since])


_stays: list[Stay] = []  # of the main thread: one at most, but for a call inside a call


@contextmanager
def staying(pipeline: object, said: str, processes: Sequence[int]) -> Iterator[None]:
    """A context in which this process waits for all other processes of a pipeline."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stay = Stay(pipeline, said, processes, time.monotonic())
    _stays.append(stay)
    try:
        yield
    finally:
        _stays.remove(stay)


def stay_in(pipeline: object) -> Stay | None:
    """The present wait in a pipeline, if there is one."""
    return next((stay for stay in (*_stays,) if stay.pipeline is pipeline), None)


def stay_elsewhere(pipeline: object) -> Stay | None:
    """The present wait in another pipeline, if there is one, and none in this one."""
    return None if stay_in(pipeline) else next(iter((*_stays,)), None)


def crossed(mine: Stay, process: int, rank: int, told: str) -> str:
    """What is wrong, if another process waits elsewhere for this one; else empty.

    Args:
        mine: the wait of this process.
        process: this process.
        rank: of the other one.
        told: its wait, as JSON.
    """
    said, processes, _ = json.loads(told)
    if process not in processes:
        return ""
    return (
        f"waits in {mine.said}, while rank {rank} waits in {said} of another pipeline, so neither can go on; all "
        f"processes must call their pipelines in the same order"
    )
