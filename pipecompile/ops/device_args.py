"""Devices as constants of a graph, which must follow their stage, and as ranks that share one CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx


def retarget(argument: Any, old: torch.device, new: torch.device) -> Any:
    """Returns a nested fx argument with the device ``old``, that of the trace, replaced by ``new``."""
    match argument:
        case torch.device() if same_device(argument, old):
            return new
        case str() if argument == old.type or argument == str(old):
            return str(new)
        case fx.immutable_collections.immutable_list() | list():
            return [retarget(item, old, new) for item in argument]
        case tuple() if hasattr(argument, "_fields"):
            return type(argument)(*(retarget(item, old, new) for item in argument))
        case tuple():
            return tuple(retarget(item, old, new) for item in argument)
        case dict():
            return {key: retarget(item, old, new) for key, item in argument.items()}
        case _:
            return argument


def threads_each(devices: Sequence[torch.device]) -> int:
    """Returns the number of intra-op threads per CPU rank: the caller's, divided by the number of CPU ranks."""
    return max(1, torch.get_num_threads() // max(1, sum(device.type == "cpu" for device in devices)))


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """A context with ``count`` intra-op threads, because the number of threads changes the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are the same; a missing index matches any index."""
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)
