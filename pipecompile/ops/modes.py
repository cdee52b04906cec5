"""The modes that a region of a model runs in (no gradients, autocast): recorded on nodes, entered at run time.

Only modes that the model itself enters form a region. The modes of the calling thread are not part of the trace: the
runtime reads them in every step and enters them in the thread of each rank.

Within an outermost autocast, calls share the casts of weights, and their gradients are added up in its type. So regions
of two such autocasts are entered one after the other, also where they are equal and nothing is between them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from pipecompile.ops.casts import drop_casts

Autocast = tuple[str, str, bool, bool]  # device type, name of the dtype, whether it is on, and whether casts are shared


@dataclass(frozen=True, slots=True)
class Region:
    """The modes of a region.

    Attributes:
        grad: False under ``no_grad``.
        autocast: The autocasts, outermost first.
        entry: Tells apart outermost autocasts of one call.
    """

    grad: bool = True
    autocast: tuple[Autocast, ...] = ()
    entry: int = field(default=0, compare=False)

    def __str__(self) -> str:
        casts = [f"autocast({device}, {dtype}, {enabled})" for device, dtype, enabled, _ in self.autocast]
        return " ".join([*([] if self.grad else ["no_grad"]), *casts]) or "plain"


PLAIN = Region()
_here = threading.local()


def enter_region(grad: bool, autocast: tuple[Autocast, ...]) -> ExitStack:
    """Enters a region. Returns the argument for ``exit_region``; a stage's generated code calls both."""
    entered = entered_modes(grad, autocast)
    _open().append(entered)
    return entered


def exit_region(entered: ExitStack) -> None:
    """Leaves the region that ``enter_region`` entered last."""
    last = _open().pop()
    assert last is entered, "the last one entered is the first one left"
    entered.close()
    drop_casts()


@contextmanager
def regions_left() -> Iterator[None]:
    """A context for generated code, which leaves the regions that the code has entered and not left.

    It raised: an error, or, where a backward recomputes it, the exception by which torch ends it once it has all that
    it needs.
    """
    before = len(_open())
    try:
        yield
    finally:
        while len(_open()) > before:
            exit_region(_open()[-1])


def _open() -> list[ExitStack]:
    """The regions that this thread is in."""
    if not hasattr(_here, "entered"):
        _here.entered = []
    found: list[ExitStack] = _here.entered
    return found


def entered_modes(grad: bool, autocast: tuple[Autocast, ...]) -> ExitStack:
    """Enters modes; a context that leaves them."""
    stack = ExitStack()
    if not grad:
        stack.enter_context(torch.no_grad())
    for device, dtype, enabled, shares in autocast:
        casts = torch.autocast(device, dtype=getattr(torch, dtype), enabled=enabled, cache_enabled=shares)
        stack.enter_context(casts)
    return stack
