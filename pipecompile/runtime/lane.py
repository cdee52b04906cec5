"""A rank's thread, device and streams. All synchronization of streams in a program is here.

On an accelerator, the host queues work on streams, and the device runs it later. Five rules keep results exact:

    [1] a rank computes on its own stream, entered for the whole program, after all that the caller has queued;
    [2] a copy to another device runs on the sender's copy stream, after the computation of its values, into memory of
        the receiver's own stream, so that computation on neither side waits for it;
    [3] the receiver's compute stream, not its thread, waits for the copy; a CPU receiver waits itself;
    [4] a tensor that another stream than its own uses is recorded there, so that its memory is not reused too early;
    [5] the caller's streams wait for all that the ranks have queued;
    [6] copies to the host and back have a stream each, after all that the rank has queued; its memory is the compute
        stream's own, which waits for a copy before it uses or frees what is copied.

Memory that the caller frees goes back to a lane's stream without being recorded: lanes take memory in programs only,
and a program starts behind every stream from which the pipeline has ever been called ([1]). Recording it would keep
gradients allocated until the optimizer's kernels have run, after the next step has asked for their memory.

On the CPU, methods do nothing or the obvious thing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipecompile.ops.accelerators import Mark, accelerators, copied, is_accelerator, time_mark, used_here
from pipecompile.runtime.rank_thread import RankThread

Value = Tensor | None
Values = tuple[Value, ...]


@dataclass(frozen=True)
class Sent:
    """Values on their way to another rank.

    Attributes:
        ready: The event after which the receiver may read them; None if they are ready.
        began, ended: When they were copied, by the sender's clock.
    """

    values: Values
    ready: torch.Event | None
    began: Mark
    ended: Mark


class Lane:
    """One rank's thread, device and streams. The thread lives as long as the lane.

    Args:
        threads: number of intra-op threads that torch uses on the CPU (see ``threads_each``).

    Attributes:
        compute, sends, receives, notes, outward, inward: streams of an accelerator; None on the CPU.
        one: a byte on the device, for notes.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.device = device
        self.threads = threads
        self.renew()
        self.compute, self.sends, self.receives, self.notes = (_stream(device) for _ in range(4))
        self.outward, self.inward = (_stream(device) for _ in range(2))
        self.copying = False  # since the compute stream has waited for both
        self.one = torch.ones(1, dtype=torch.uint8, device="cpu").to(device)

    def renew(self) -> None:
        """Starts a new thread, as in a forked process, which does not inherit its parent's threads."""
        self.thread = RankThread(f"pipecompile {self.device}", partial(_prepare, self.device, self.threads))

    @contextmanager
    def entered(self, after: Iterable[torch.Event]) -> Iterator[None]:
        """Runs the calling thread's work on this lane, after events of the caller ([1])."""
        if self.compute is None or self.receives is None:
            for event in after:  # the caller's tensors may be copied from other devices
                torch.accelerator.current_stream(event.device).wait_event(event)
            yield
            return
        with self.compute:
            for event in after:
                self.compute.wait_event(event)
                self.receives.wait_event(event)
            yield

    def mark(self) -> Mark:
        """The time at which all that the rank has queued so far will have run."""
        return time.perf_counter() if self.compute is None else time_mark(self.device, self.compute)

    def note(self, flag: Tensor, ended: Mark, copies: torch.Stream | None = None) -> None:
        """Sets a flag in the host's memory when the work before a mark has run. Nothing else waits for that.

        Args:
            flag: one pinned byte.
            ended: the mark, on an accelerator.
            copies: the stream of the work, if it is a copy.
        """
        stream = copies or self.notes
        if stream is None or not isinstance(ended, torch.Event):
            raise TypeError(f"{self.device} runs its work at once, and notes nothing later")
        stream.wait_event(ended)
        with stream:
            flag.copy_(self.one, non_blocking=True)

    def wait(self, event: torch.Event | None) -> None:
        """Waits for an event of another lane ([3])."""
        if event is None:
            return
        if self.compute is None:
            event.synchronize()
        else:
            self.compute.wait_event(event)

    def move(self, values: Values, target: Lane) -> Sent:
        """Copies values to the target's device ([2]); on the same device, the target reads them as they are."""
        began, copying = self.mark(), self.sends or target.receives
        if self.device == target.device or copying is None:
            if self.compute is None:
                return Sent(values, None, began, began)
            for value in values:
                used_here(value, target.compute)
            return Sent(values, self.compute.record_event(), began, began)
        if self.sends is not None and self.compute is not None:
            self.sends.wait_event(self.compute.record_event())
            began = time_mark(self.device, self.sends)
        with torch.no_grad(), ExitStack() as streams:
            for stream in (target.receives, self.sends):  # a copy runs on the sender's, which is entered last
                if stream is not None:
                    streams.enter_context(stream)
            moved = tuple(None if value is None else _sent(value, target.device) for value in values)
        for before, after in zip(values, moved, strict=True):
            used_here(before, self.sends)
            used_here(after, target.compute)
        return Sent(moved, copying.record_event(), began, time_mark(self.device, self.sends))

    @property
    def offloads(self) -> bool:
        """Whether the host has another memory."""
        return self.compute is not None

    def to_host(self, tensors: Sequence[Tensor]) -> Sent:
        """Begins to copy tensors to the host ([6]). They must be held until the compute stream has waited for that."""
        pinned = self._copying(self.outward)
        began = time_mark(self.device, self.outward)
        with torch.no_grad(), self.outward or nullcontext():
            copies = [torch.empty_like(t, device="cpu", pin_memory=pinned).copy_(t, non_blocking=True) for t in tensors]
        return self._copied(copies, self.outward, began)

    def from_host(self, tensors: Sequence[Tensor]) -> Sent:
        """Begins to copy tensors of the host to this device ([6])."""
        fresh = [torch.empty_like(t, device=self.device, pin_memory=False) for t in tensors]  # compute's memory
        self._copying(self.inward)
        began = time_mark(self.device, self.inward)
        with torch.no_grad(), self.inward or nullcontext():
            for there, here in zip(tensors, fresh, strict=True):
                here.copy_(there, non_blocking=True)
        return self._copied(fresh, self.inward, began)

    def _copying(self, stream: torch.Stream | None) -> bool:
        """Makes a stream of copies wait for all that the rank has queued; returns whether there is one."""
        if stream is None or self.compute is None:
            return False
        stream.wait_event(self.compute.record_event())
        self.copying = True
        return True

    def _copied(self, values: Sequence[Tensor], stream: torch.Stream | None, began: Mark) -> Sent:
        ready = None if stream is None else stream.record_event()
        return Sent(tuple(values), ready, began, time_mark(self.device, stream))

    def settle(self) -> None:
        """Makes the compute stream wait for all copies to the host and back ([6]), also after a failure."""
        if self.copying and self.compute is not None:
            for stream in (self.outward, self.inward):
                if stream is not None:
                    self.compute.wait_event(stream.record_event())
        self.copying = False

    def fetch(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the caller on this lane's device."""
        if self.compute is None and tensor.device == self.device:
            return tensor
        used_here(tensor)  # on the current stream of its device, which is the compute stream if it is here
        return tensor if tensor.device == self.device else copied(tensor, self.device)


class Callers:
    """The streams from which a pipeline is called."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = accelerators(devices)
        self.streams: dict[tuple[torch.device, int], torch.Stream] = {}

    def events(self, inputs: Iterable[torch.device]) -> list[torch.Event]:
        """Events after all that has been queued on them, those of earlier calls included ([1]).

        Args:
            inputs: devices of the call's tensors, which may be others than the pipeline's.
        """
        for device in dict.fromkeys((*self.devices, *accelerators(inputs))):
            stream = torch.accelerator.current_stream(device)
            self.streams[device, stream.stream_id] = stream
        return [stream.record_event() for stream in self.streams.values()]

    def wait(self, lanes: Iterable[Lane]) -> None:
        """Makes the calling thread's streams wait for all that the lanes have queued ([5])."""
        for lane in lanes:
            if lane.compute is not None:
                lane.settle()
                torch.accelerator.current_stream(lane.device).wait_event(lane.compute.record_event())


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A copy on another device; on the CPU, it may be read after an event."""
    copy = copied(value, device) if is_accelerator(device) else value.to(device, non_blocking=True)
    return copy.requires_grad_(value.requires_grad)


def _prepare(device: torch.device, threads: int) -> None:
    """What a lane's thread does first."""
    if device.type == "cpu":
        torch.set_num_threads(threads)


def _stream(device: torch.device) -> torch.Stream | None:
    return torch.Stream(device) if is_accelerator(device) else None
