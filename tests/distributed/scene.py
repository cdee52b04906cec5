"""What a rank may tell and ask its launcher and the other ranks, beside what is tested."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache

import torch.distributed as dist


@cache
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", int(os.environ["SCENE_PORT"]), timeout=timedelta(seconds=900))


def announce(moment: str) -> None:
    """Tells the launcher, and whoever waits for it, that a moment has come."""
    store().set(moment, "come")


def await_moment(moment: str) -> None:
    store().wait([moment])


def meet(place: str, size: int | None = None) -> None:
    """Waits until as many ranks have come here, by default all."""
    if store().add(f"at {place}", 1) == (size or int(os.environ["WORLD_SIZE"])):
        announce(place)
    await_moment(place)
