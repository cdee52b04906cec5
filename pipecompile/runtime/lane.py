"""Where a rank computes: its thread, its device, and on CUDA a stream of its own. All the CUDA code there is.

On CPU every method does nothing or the plain thing, so that order, threads and failure are tested without a GPU.

    [1] a rank computes on its own stream, entered for the whole program;
    [2] a copy to another device runs on the sender's copy stream, after an event on its compute stream;
    [3] the receiver's compute stream waits for an event behind the copy, not the receiver's thread;
    [4] a tensor used on a second stream is recorded there, so that its memory is not handed out too early.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Value = Tensor | None


class Lane:
    """One rank's thread, device and streams; the thread lives as long as the lane.

    Args:
        threads: of torch's own within an operation, on the CPU (see ``threads_each``).
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.device = device
        self.threads = threads
        self.renew()
        self.cuda = device.type == "cuda"
        self.compute = _stream(device)
        self.copies = _stream(device)

    def renew(self) -> None:
        """Takes a new thread, as in a forked process, which has none of its parent's."""
        name = f"pipecompile {self.device}"
        self.thread = ThreadPoolExecutor(1, name, _settle, (self.device, self.threads))

    @contextmanager
    def entered(self, after: Any) -> Iterator[None]:
        """Runs the calling thread's work on this lane, behind the event ``after`` ([1])."""
        if not self.cuda:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.compute):
            if after is not None:
                self.compute.wait_event(after)
            yield

    def event(self) -> Any:
        """Marks what has been queued on the compute stream so far."""
        return self.compute.record_event() if self.cuda else None

    def wait(self, event: Any) -> None:
        """Queues nothing further before an event of another lane ([3])."""
        if self.cuda and event is not None:
            self.compute.wait_event(event)

    def move(self, values: tuple[Value, ...], target: Lane) -> tuple[tuple[Value, ...], Any]:
        """Values on the target's device, and the event behind which they are there."""
        if not self.cuda and not target.cuda:
            return values, None
        if not self.cuda:
            return tuple(None if v is None else v.to(target.device) for v in values), None
        if self.device == target.device:
            for value in values:
                self._record(value, target.compute)
            return values, self.event()
        self.copies.wait_event(self.event())
        with torch.cuda.stream(self.copies):
            moved = tuple(None if v is None else v.to(target.device, non_blocking=target.cuda) for v in values)
            done = self.copies.record_event()
        for before, after in zip(values, moved, strict=True):
            self._record(before, self.copies)
            self._record(after, target.compute)
        if not target.cuda:
            done.synchronize()
        return moved, done

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor of the caller on this lane's device."""
        if tensor.device == self.device:
            self._record(tensor, self.compute)
            return tensor
        return tensor.to(self.device, non_blocking=True)

    def _record(self, tensor: Value, stream: Any) -> None:
        if tensor is not None and tensor.is_cuda and stream is not None:
            tensor.record_stream(stream)  # [4]


def _settle(device: torch.device, threads: int) -> None:
    """Run once in a lane's thread."""
    if device.type == "cpu":
        torch.set_num_threads(threads)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def caller_event(devices: tuple[torch.device, ...]) -> Any:
    """Marks what the calling thread has queued so far; None if no device is CUDA."""
    cuda = next((d for d in devices if d.type == "cuda"), None)
    return None if cuda is None else torch.cuda.current_stream(cuda).record_event()


def caller_waits(lanes: tuple[Lane, ...]) -> None:
    """The calling thread's streams wait for all that the lanes have queued."""
    for lane in lanes:
        if lane.cuda:
            torch.cuda.current_stream(lane.device).wait_event(lane.event())
