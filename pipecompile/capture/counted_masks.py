"""Masks that depend on buffers and constants only: how many entries they select is read, and guarded.

``h[:, self.mask]`` has a size that depends on data. If an operation requires such a size to equal another (a linear
layer after it), a trace cannot leave it open. The entries of a buffer that forward does not write are counted in the
trace, as if Python had read the number, so the size is fixed as long as the count is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.purity import is_random

POSITIONS = frozenset({torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere})
AS_TUPLE = frozenset({torch.nonzero, Tensor.nonzero})
GETITEM = Tensor.__getitem__


def masks_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors on whose values the size of a call's result depends."""
    if func in POSITIONS or (func is torch.where and len(args) + len(kwargs) == 1):
        return [it for it in (*args, *kwargs.values()) if isinstance(it, Tensor)][:1]
    if func is GETITEM:
        return [it for it in _items(args[1]) if isinstance(it, Tensor) and it.dtype == torch.bool and it.ndim]
    return []


def is_constant(node: fx.Node, is_parameter: Callable[[str], bool]) -> bool:
    """Whether a value is computed from buffers and constants only."""
    return not any(
        it.op in ("placeholder", "call_module")
        or is_random(it)
        or (it.op == "get_attr" and is_parameter(str(it.target)))
        for it in ancestors([node])
    )


def found(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> Any:
    """Returns what ``nonzero`` and the like return on fake tensors for ``count`` entries."""
    (mask,) = masks_of(func, args, kwargs)
    as_tuple = func is torch.where or (func in AS_TUPLE and (kwargs.get("as_tuple") or args[1:2] == (True,)))
    if not as_tuple:
        return torch.empty(count, mask.ndim, dtype=torch.int64, device=mask.device)
    return tuple(torch.empty(count, dtype=torch.int64, device=mask.device) for _ in range(max(1, mask.ndim)))


def by_positions(index: Any, positions: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
    """Returns an index with each mask replaced by the positions of its entries, one tensor for each dimension."""
    new: list[Any] = []
    for item in _items(index):
        is_mask = isinstance(item, Tensor) and item.dtype == torch.bool and item.ndim
        new += positions(item) if is_mask else [item]
    return tuple(new)


def _items(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)
