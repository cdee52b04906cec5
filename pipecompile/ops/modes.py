"""The modes that a stretch of a model runs in (no gradients, its own autocast): recorded on nodes, entered at run time.

Only what the model itself does is a region. The modes of the calling thread are not traced in: the runtime reads them
on every step and enters them in each worker.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Region:
    """``grad`` is False under ``no_grad``; ``autocast`` holds (device type, dtype name, enabled), outermost first."""

    grad: bool = True
    autocast: tuple[tuple[str, str, bool], ...] = ()

    def __str__(self) -> str:
        casts = [f"autocast({device}, {dtype}, {enabled})" for device, dtype, enabled in self.autocast]
        return " ".join([*([] if self.grad else ["no_grad"]), *casts]) or "plain"


PLAIN = Region()


def enter_region(grad: bool, autocast: tuple[tuple[str, str, bool], ...]) -> ExitStack:
    """Enters a region and returns what ``exit_region`` takes; both stand as calls in a stage's generated code."""
    stack = ExitStack()
    if not grad:
        stack.enter_context(torch.no_grad())
    for device, dtype, enabled in autocast:
        stack.enter_context(torch.autocast(device, dtype=getattr(torch, dtype), enabled=enabled))
    return stack


def exit_region(entered: ExitStack) -> None:
    """Leaves the region that ``enter_region`` entered."""
    entered.close()
