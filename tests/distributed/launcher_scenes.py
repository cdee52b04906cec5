"""Scenes of the launcher's own tests."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from scene import announce, await_moment


def adds(number: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor([number * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return dist.is_initialized(), total


def raises_on(rank: int) -> int:
    print("hello from", dist.get_rank())
    if dist.get_rank() == rank:
        raise ValueError("the scene's own")
    return os.getpid()


def hangs_on(rank: int) -> None:
    if dist.get_rank() == rank:
        await_moment("that does not come")


def all_hang() -> None:
    await_moment("that does not come")


def is_hurt() -> str:
    """Rank 1 is hurt while it pauses; the others end at once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
    if dist.get_rank() == 1:
        try:
            announce("pausing")
            signal.sigtimedwait([signal.SIGCONT], 300)
        except KeyboardInterrupt:
            return "interrupted"
    return "went on"
