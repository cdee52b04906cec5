"""Devices that run work after the call that queues it returns: CUDA, ROCm, XPU and whatever else torch drives.

Only torch's generic interface is used (``torch.accelerator``, ``torch.Stream``, ``torch.Event``), so that no type of
device is named. On the CPU these functions do nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import _current_graph_task_id

Mark = torch.Event | float  # a time: an event of a device, or seconds of the host's clock


def is_accelerator(device: torch.device) -> bool:
    """Whether a device runs work later than the host queues it."""
    return device.type not in ("cpu", "meta")


def accelerators(devices: Iterable[torch.device]) -> list[torch.device]:
    """The accelerators among devices, each once."""
    return [device for device in dict.fromkeys(devices) if is_accelerator(device)]


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random functions use on a device.

    Raises:
        InputError: torch does not show it.
    """
    if not is_accelerator(device):
        return torch.default_generator
    generators: Sequence[torch.Generator] = getattr(torch.get_device_module(device), "default_generators", ())
    if not generators:
        raise InputError(
            f"torch does not show the random number generator of {device}, so that random functions could not draw the "
            f"same numbers twice; use devices that have torch.{device.type}.default_generators, or the cpu"
        )
    return generators[device.index or 0]


def default_generators() -> list[torch.Generator]:
    """The generators of the CPU and of all accelerators that the process has used."""
    here = torch.accelerator.current_accelerator(check_available=True)
    module = None if here is None else torch.get_device_module(here)
    used = module is not None and getattr(module, "is_initialized", lambda: True)()
    return [torch.default_generator, *(getattr(module, "default_generators", ()) if used else ())]


def factories_on(device: torch.device | None) -> AbstractContextManager[Any]:
    """A context in which ``torch.arange(n)`` and its kin create tensors on an accelerator, as they do in its stages."""
    return device if device is not None and is_accelerator(device) else nullcontext()


def has_failed(device: torch.device) -> bool:
    """Whether a kernel of an accelerator has failed, so that it answers no more questions. Does not wait."""
    if not is_accelerator(device):
        return False
    try:
        torch.accelerator.current_stream(device).query()
    except torch.AcceleratorError:
        return True
    return False


def total_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory; None for the CPU, which has no limit of its own."""
    return int(torch.accelerator.get_memory_info(device)[1]) if is_accelerator(device) else None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of tensors on a device since the process began, or since the user reset it; None on the CPU."""
    if not is_accelerator(device) or not hasattr(torch.accelerator, "max_memory_allocated"):
        return None
    return int(torch.accelerator.max_memory_allocated(device))


def time_mark(device: torch.device, stream: torch.Stream | None = None) -> Mark:
    """The time at which all that has been queued on a stream will have run; on the CPU, the present time.

    Args:
        device: The device.
        stream: The stream; by default, the device's current one.
    """
    if not is_accelerator(device):
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    (stream or torch.accelerator.current_stream(device)).record_event(event)
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds between two marks of one device. Waits until an accelerator has come so far."""
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device. The host does not wait, unless the copy is on the CPU and it may read it at once."""
    if tensor.device.type == "cpu" and is_accelerator(device):
        tensor = torch.empty_like(tensor, pin_memory=True, requires_grad=False).copy_(tensor)
    return tensor.to(device, non_blocking=is_accelerator(device))


def used_here(tensor: Tensor | None, stream: torch.Stream | None = None) -> None:
    """Records that a stream uses a tensor, so that its memory is not reused before that work has run.

    Args:
        tensor: The tensor.
        stream: The stream; by default, the current one of the tensor's device.
    """
    if tensor is not None and is_accelerator(tensor.device):
        tensor.record_stream(stream or torch.accelerator.current_stream(tensor.device))


def in_autograd_thread() -> bool:
    """Whether the calling thread is one that autograd has started for a device, and runs a node there.

    Threads that Python has not started through ``threading`` look alike, but run no node.
    """
    return isinstance(threading.current_thread(), threading._DummyThread) and _current_graph_task_id() != -1
