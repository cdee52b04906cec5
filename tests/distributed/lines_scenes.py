"""Scenes of packets between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.lines import Lines
from pipecompile.distributed.members import Members

WIDTHS = [9_000, 9_000, 20_000, 9_000, 5, 20_000]  # of a kind, program by program


def programs() -> tuple[list[int], bool]:
    """The messages of each program from rank 0 to rank 1, or of none; and whether all values were right."""
    rank = dist.get_rank()
    control = Control(rank, 2, store_of_the_group())
    lines = Lines(control, Members((0, 1), lambda collective: collective()), (0, 1))
    sent, isend = list[int](), dist.isend

    def counted(message: Tensor, *args: object) -> dist.Work | None:
        sent[-1] += 1
        return isend(message, *args)

    dist.isend, right = counted, list[bool]()
    for program, width in enumerate(WIDTHS):
        lines.begin()
        sent.append(0)
        expected = [torch.full((width,), 10 * program + k, dtype=torch.uint8) for k in range(3)]
        if rank == 0:
            for value in expected:
                lines.put(1, (value, None), "kind")
        else:
            waits = [lines.get(0, "kind") for _ in expected]  # posted before any of them is waited for
            for value, wait in zip(expected, waits, strict=True):
                found, nothing = wait()
                right.append(nothing is None and torch.equal(found, value))
                right.append(found.untyped_storage().nbytes() < width + 200)
    lines.flush()
    dist.isend = isend
    dist.barrier()
    control.close()
    return sent, all(right)
