"""Functions that a captured graph calls beside torch's own: effects of Python statements, written as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def setitem(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x[index] = value`` as an expression."""
    x[index] = value
    return x


def hooked(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    """A function that gives its argument with a hook on its gradient, as ``x.register_hook(hook)`` leaves it."""

    def with_hook(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(hook)  # type: ignore[no-untyped-call]
        return x

    return with_hook


def after(x: Tensor, *writers: Any) -> Tensor:
    """``x`` as it is once ``writers`` have written to its storage: makes the order of a write a dependency."""
    return x


def write_back(buffer: Tensor, value: Tensor) -> Tensor:
    """Gives a buffer the value that the model's forward bound to its name."""
    with torch.no_grad():
        return buffer.copy_(value)
