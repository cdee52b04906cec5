"""A rank's thread, device and CUDA streams. All CUDA code of the runtime is here.

On CPU, methods do nothing or the obvious thing, so that order, threads and failures are tested without a GPU.

    [1] a rank computes on its own stream, entered for the whole program;
    [2] a copy to another device runs on the sender's copy stream, after an event on its compute stream;
    [3] the receiver's compute stream, not its thread, waits for an event after the copy;
    [4] a tensor used on a second stream is recorded there, so that its memory is not reused too early.
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
    """One rank's thread, device and streams. The thread lives as long as the lane.

    Args:
        threads: number of intra-op threads that torch uses on the CPU (see ``threads_each``).
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.device = device
        self.threads = threads
        self.renew()
        self.cuda = device.type == "cuda"
        self.compute = _stream(device)
        self.copies = _stream(device)

    def renew(self) -> None:
        """Starts a new thread, as in a forked process, which does not inherit its parent's threads."""
        name = f"pipecompile {self.device}"
        self.thread = ThreadPoolExecutor(1, name, _settle, (self.device, self.threads))

    @contextmanager
    def entered(self, after: Any) -> Iterator[None]:
        """Runs the calling thread's work on this lane, after the event ``after`` ([1])."""
        if not self.cuda:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.compute):
            if after is not None:
                self.compute.wait_event(after)
            yield

    def event(self) -> Any:
        """Records an event on the compute stream; None on CPU."""
        return self.compute.record_event() if self.cuda else None

    def wait(self, event: Any) -> None:
        """Makes the compute stream wait for an event of another lane ([3])."""
        if self.cuda and event is not None:
            self.compute.wait_event(event)

    def move(self, values: tuple[Value, ...], target: Lane) -> tuple[tuple[Value, ...], Any]:
        """Copies values to the target's device; returns them with the event after which they are ready ([2])."""
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
        """Copies a tensor of the caller to this lane's device."""
        if tensor.device == self.device:
            self._record(tensor, self.compute)
            return tensor
        return tensor.to(self.device, non_blocking=True)

    def _record(self, tensor: Value, stream: Any) -> None:
        if tensor is not None and tensor.is_cuda and stream is not None:
            tensor.record_stream(stream)  # [4]


def _settle(device: torch.device, threads: int) -> None:
    """Initializes a lane's thread."""
    if device.type == "cpu":
        torch.set_num_threads(threads)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def caller_event(devices: tuple[torch.device, ...]) -> Any:
    """Records an event on the calling thread's stream; None if all devices are CPU."""
    cuda = next((d for d in devices if d.type == "cuda"), None)
    return None if cuda is None else torch.cuda.current_stream(cuda).record_event()


def caller_waits(lanes: tuple[Lane, ...]) -> None:
    """Makes the calling thread's streams wait for all work queued by the lanes."""
    for lane in lanes:
        if lane.cuda:
            torch.cuda.current_stream(lane.device).wait_event(lane.event())
