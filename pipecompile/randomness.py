"""Random functions that give the same numbers on any schedule, with any number of stages, and when run again.

A generator that several stages draw from gives each what is left when its turn comes, and on the CPU all stages share
one. So each random call draws from its device's generator seeded for itself: by the step, the microbatch and the call's
name in the whole model. The generator's own state is put back.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable
from typing import Any

import torch

_DRAWING = threading.Lock()  # one call at a time has a generator seeded
_current = threading.local()
_LIMIT = 2**63


def seed_microbatch(seed: int | None) -> None:
    """Says which microbatch the calling thread runs from now on; None: random calls draw as they come."""
    _current.seed = seed


def seeded(function: Callable[..., Any], key: str, device: torch.device) -> Callable[..., Any]:
    """A function that draws random numbers, drawing those of the microbatch being run and of ``key``."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        seed = getattr(_current, "seed", None)
        if seed is None:
            return function(*args, **kwargs)
        generator = _generator(device)
        with _DRAWING:
            state = generator.get_state()
            generator.manual_seed((seed + zlib.crc32(key.encode())) % _LIMIT)
            try:
                return function(*args, **kwargs)
            finally:
                generator.set_state(state)

    draw.__name__ = f"seeded_{getattr(function, '__name__', 'call')}"
    draw.__module__ = __name__
    return draw


def seeds(count: int) -> list[int]:
    """A seed for each microbatch of a step, drawn from the caller's generator."""
    step = int(torch.randint(_LIMIT - 1, ()).item())
    return [(step + i * 0x9E3779B97F4A7C15) % _LIMIT for i in range(count)]


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
