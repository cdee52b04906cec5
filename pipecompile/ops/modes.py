"""The modes that a region of a model runs in (no gradients, autocast): recorded on nodes, entered at run time.

Only modes that the model itself enters form a region. The modes of the calling thread are not part of the trace: the
runtime reads them in every step and enters them in the thread of each rank.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Region:
    """The modes of a region.

    Attributes:
        grad: False under ``no_grad``.
        autocast: (device type, dtype name, enabled) of each autocast context, outermost first.
    """

    grad: bool = True
    autocast: tuple[tuple[str, str, bool], ...] = ()

    def __str__(self) -> str:
        casts = [f"autocast({device}, {dtype}, {enabled})" for device, dtype, enabled in self.autocast]
        return " ".join([*([] if self.grad else ["no_grad"]), *casts]) or "plain"


PLAIN = Region()


def enter_region(grad: bool, autocast: tuple[tuple[str, str, bool], ...]) -> ExitStack:
    """Enters a region. Returns the argument for ``exit_region``; a stage's generated code calls both."""
    stack = ExitStack()
    if not grad:
        stack.enter_context(torch.no_grad())
    for device, dtype, enabled in autocast:
        stack.enter_context(torch.autocast(device, dtype=getattr(torch, dtype), enabled=enabled))
    return stack


def exit_region(entered: ExitStack) -> None:
    """Leaves the region that ``enter_region`` entered."""
    entered.close()
