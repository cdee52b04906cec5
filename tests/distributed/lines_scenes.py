"""Scenes of packets between ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from failing_scenes import piped, step
from torch import Tensor

from pipecompile.distributed import lines as lines_file
from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.lines import Lines
from pipecompile.distributed.members import Members
from pipecompile.distributed.near import Near, Outlet
from pipecompile.distributed.packet import Part
from pipecompile.errors import RankError

WIDTHS = [9_000, 9_000, 20_000, 9_000, 5, 20_000]  # of a kind, program by program


def programs(within_the_host: bool) -> tuple[list[int], list[int], bool]:
    """The messages of each program from rank 0 to rank 1, over gloo and within the host, and whether all were right."""
    rank = dist.get_rank()
    if not within_the_host:
        lines_file.LONGEST = 0
    control = Control(rank, 2, store_of_the_group())
    lines = Lines(control, Members((0, 1), lambda collective: collective()), (0, 1))
    sent, isend = list[int](), dist.isend
    near, put = list[int](), Outlet.put

    def counted(message: Tensor, *args: object) -> dist.Work | None:
        sent[-1] += 1
        return isend(message, *args)

    def counted_near(outlet: Outlet, parts: Sequence[Part]) -> None:
        near[-1] += 1
        put(outlet, parts)

    dist.isend, Outlet.put, right = counted, counted_near, list[bool]()  # type: ignore[method-assign]
    for program, width in enumerate(WIDTHS):
        lines.begin()
        sent.append(0)
        near.append(0)
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
    return sent, near, all(right)


def many() -> list[bool]:
    """Whether packets of several pieces come in order, though they wait for their reader, and one goes over gloo."""
    rank = dist.get_rank()
    torch.manual_seed(0)  # both ranks know the values
    control = Control(rank, 2, store_of_the_group())
    lines = Lines(control, Members((0, 1), lambda collective: collective()), (0, 1))
    right = list[bool]()
    for _ in range(2):  # in the first one, the rest of each packet follows over gloo
        lines.begin()
        widths = [900_000 if k == 70 else 200_000 - k for k in range(200)]
        values = [torch.randint(256, (width,), dtype=torch.uint8) for width in widths]
        if rank == 0:
            for k, value in enumerate(values):
                lines.put(1, (value,), "large" if k == 70 else "kind")
                value.zero_()  # nobody reads it any more
        dist.barrier()
        if rank == 1:
            waits = [lines.get(0, "large" if k == 70 else "kind") for k in range(200)]
            order = (*range(100, 150), *range(100), *range(150, 200))
            found = {k: waits[k]() for k in order}
            right.append(all(torch.equal(found[k][0], values[k]) for k in order))
    lines.flush()
    dist.barrier()
    control.close()
    return right


def own_sockets() -> int:
    """The sockets of this process that have a name which the package gives."""
    named = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines() if "@pipecompile " in line}
    inodes = {link[len("socket:[") : -1] for link in map(_link, Path("/proc/self/fd").iterdir())}
    return len(named & inodes)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # that of the folder itself
        return ""


def within_and_without(sandbox: bool) -> tuple[float, Sequence[str], list[int]]:
    """A step's loss, the report on links, and the sockets within the host that are open before and after ``close``.

    Args:
        sandbox: something lets processes bind such sockets, and connects nobody with that of rank 1.
    """

    class Apart(Near):
        def __init__(self) -> None:
            super().__init__()
            if sandbox and dist.get_rank() == 1:
                self._listener.close()

    lines_file.Near = Apart  # type: ignore[misc]
    pipe = piped()
    loss = step(pipe)
    links, before = pipe.pipeline.report.links, own_sockets()
    pipe.pipeline.close()
    after = own_sockets()
    with pytest.raises(RankError, match="has closed the pipeline, so it cannot be used any more"):
        pipe.pipeline.share.processes.agree("a call after the end")
    return loss, links, [before, after]
