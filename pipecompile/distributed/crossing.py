"""Pipelines that processes call in different orders: each waits in one for another process, which waits in another one.

    process 0: waits in pipeline 0        process 1: waits in pipeline 1

Each pipeline has a control channel of its own. In that of pipeline 0, process 1 says that it has been waiting in
pipeline 1, and for whom; process 0, which is one of those, then knows that nobody will come. So does it if process 1
waits in a collective of torch.distributed that the script calls, such as the barrier after a ``save`` of rank 0 alone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist
from torch.distributed import c10d_logger, distributed_c10d

GROUP = "group"  # the argument of a collective


@dataclass(frozen=True)
class Stay:
    """A wait of this process's main thread for all other processes of a pipeline.

    Attributes:
        pipeline: an object of its own for each; None for a collective of the script.
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
        return json.dumps([self.said, list(self.processes), self.pipeline is not None, self.since])


_stays: list[Stay] = []  # of the main thread: one at most, but for a call inside a call
_collective: list[tuple[object, Stay]] = []  # the last one in which the main thread was seen


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


def stay_in_a_collective() -> Stay | None:
    """The present wait in a collective of the script's own, as far as the frames of the main thread tell."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    inner = caller = None
    while frame is not None:
        if frame.f_code.co_filename == distributed_c10d.__file__ and GROUP in frame.f_code.co_varnames:
            inner, caller = frame, None
        elif inner is not None and caller is None and frame.f_code.co_filename != c10d_logger.__file__:
            caller = frame
        frame = frame.f_back
    if inner is None or caller is None:
        return None
    key = (id(inner), inner.f_lasti)
    known = [stay for other, stay in (*_collective,) if other == key]
    if known:
        return known[0]
    where = f"{os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno}"
    said = f"torch.distributed.{inner.f_code.co_name}() at {where}"
    group = inner.f_locals.get(GROUP)
    try:
        members = dist.get_process_group_ranks(group if isinstance(group, dist.ProcessGroup) else None)
    except (RuntimeError, ValueError):  # the group was destroyed meanwhile
        return None
    found = Stay(None, said, members, time.monotonic())
    _collective[:] = [(key, found)]
    return found


def crossed(mine: Stay, process: int, rank: int, told: str) -> str:
    """What is wrong, if another process waits elsewhere for this one; else empty.

    Args:
        mine: the wait of this process.
        process: this process.
        rank: of the other one.
        told: its wait, as JSON.
    """
    said, processes, is_pipeline, _ = json.loads(told)
    if process not in processes:
        return ""
    where, remedy = (
        (" of another pipeline", "call their pipelines in the same order")
        if is_pipeline
        else ("", "make the same calls of the pipeline, save() and close() included, and in the same order")
    )
    return (
        f"waits in {mine.said}, while rank {rank} waits in {said}{where}, so neither can go on; all processes must "
        f"{remedy}"
    )
