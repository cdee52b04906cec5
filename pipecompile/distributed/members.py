"""Collectives among some processes of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial, reduce
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FOREVER = timedelta(days=365)  # for gloo, whose own time-outs close connections; the control channel ends waits
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
BUCKET = 32 * 2**20  # bytes that are summed at once


class Run(Protocol):
    """Runs what may wait for other processes, where the wait can be ended."""

    def __call__(self, collective: Callable[[], T], /) -> T: ...


class Members:
    """Some of the processes, in an order that is the same in all of them. All must make the same calls.

    Args:
        processes: their numbers in the default process group.
        run: runs each collective.
    """

    def __init__(self, processes: Sequence[int], run: Run) -> None:
        self.processes = tuple(processes)
        self.run = run
        self.group = run(self._new_group)

    def __len__(self) -> int:
        return len(self.processes)

    def gathered(self, value: T) -> list[T]:
        """The value of each member, which is pickled."""
        found: list[T | None] = [None] * len(self)
        self.run(lambda: dist.all_gather_object(found, value, self.group))
        return found  # type: ignore[return-value]

    def gathered_tensors(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each member; all have the same shape and type."""
        found = [torch.empty_like(tensor) for _ in self.processes]
        self.run(lambda: dist.all_gather(found, tensor.contiguous(), self.group))
        return found

    def gather_into(self, out: Tensor, tensor: Tensor) -> None:
        """Writes the tensors of all members to ``out``, one after another; all have the same shape and type."""
        self.run(partial(_gather, out, tensor, self.group))

    def scattered(self, tensor: Tensor) -> Tensor:
        """What each member has for this one, one after another: the part of its tensor at this member's position."""
        found = torch.empty_like(tensor)
        self.run(partial(dist.all_to_all_single, found, tensor, group=self.group))
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the members' tensors, in their order."""
        return reduce(torch.add, self.gathered_tensors(tensor))

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the members, in no set order but with the same bits in all of them.

        Writes to dense tensors.
        """
        found = [t if t.layout == torch.strided else reduce(torch.add, self.gathered(t)) for t in tensors]
        for bucket in _buckets([tensor for tensor in tensors if tensor.layout == torch.strided]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self.run(partial(dist.all_reduce, flat, group=self.group))
            for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))
        return found

    def broadcast(self, content: bytes, source: int) -> bytes:
        """The bytes of the member at position ``source``."""
        box = [content]
        self.run(lambda: dist.broadcast_object_list(box, self.processes[source], self.group))
        return box[0]

    def _new_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(
            list(self.processes), timeout=FOREVER, backend="gloo", use_local_synchronization=True
        )
        return group


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, up to ``BUCKET`` bytes or a single one."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket
