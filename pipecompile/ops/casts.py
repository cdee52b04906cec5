"""The casts that autocast makes of tensors, for functions that see their weights as constants (``split_backward.py``).

Until the outermost autocast ends, torch casts a weight with a gradient once, and autograd adds up the gradients of all
calls that read the cast before it casts their sum back. A constant has no such cast, so here is one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LOWERED = ("cpu", "cuda")  # the devices whose autocast lowers products and convolutions
_here = threading.local()


@dataclass(frozen=True, slots=True)
class Cast:
    """What autocast casts tensors to, and whether calls may share the cast of a weight."""

    dtype: torch.dtype
    is_shared: bool

    @staticmethod
    def here(device_type: str) -> Cast | None:
        """That of the autocast that is on for a type of devices, if one is."""
        if not torch.is_autocast_enabled(device_type):
            return None
        return Cast(torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled())

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor as a function sees it."""
        return tensor if not tensor.is_floating_point() or tensor.dtype == torch.float64 else tensor.to(self.dtype)

    def of_weight(self, weight: Tensor) -> Tensor:
        """The same of a weight as a constant: the same tensor for calls that share it, within ``casts_kept``."""
        kept: _Casts | None = getattr(_here, "casts", None)
        if kept is None or not self._shares(weight):
            return self.of(weight.detach())
        _, version, cast = kept.get((id(weight), self.dtype), (None, None, weight))
        if version != weight._version:
            cast = self.of(weight.detach())
            kept[id(weight), self.dtype] = weight, weight._version, cast
        return cast

    def _shares(self, weight: Tensor) -> bool:
        """Whether torch keeps the cast of a weight."""
        return self.is_shared and weight.dtype == torch.float32 and weight.is_leaf and not weight._is_view()


_Casts = dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]]  # a weight, held so that its id is its own, its cast


@contextmanager
def casts_kept() -> Iterator[None]:
    """A context in which this thread casts each weight once, as torch's autocast does for weights with gradients."""
    before = getattr(_here, "casts", None)
    _here.casts = {}
    try:
        yield
    finally:
        _here.casts = before


def drop_casts() -> None:
    """Drops the casts of this thread where torch drops its own: to be called when an autocast has ended."""
    kept: _Casts | None = getattr(_here, "casts", None)
    torch.autocast_increment_nesting()
    if torch.autocast_decrement_nesting() == 0 and kept is not None:
        kept.clear()
