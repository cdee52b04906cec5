"""The sizes of a trace at two batch sizes; sizes that differ depend on the batch.

A trace with a symbolic batch holds for both. A specialized trace comes with a second trace of the whole batch, with the
same nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.rules.batch_types import Batched, Kind, Local, Partial, Shared
from pipecompile.capture import Captured
from pipecompile.ops.symbols import expression, resolve

UNKNOWN = -1  # a size that depends on values


class Scale:
    """Sizes and numbers of nodes at a smaller and at a larger batch.

    Args:
        small: the trace of a microbatch.
        large: the trace of the whole batch, or ``small`` itself if its batch is symbolic.

    Attributes:
        fewer: rows of the smaller batch; at least 2 if the batch is symbolic.
        rows: rows of the larger batch.
        whole: rows of the captured call's batch, or ``rows`` if that is more.
        sizes_tried: the values of all symbols at ``whole`` rows, on which experiments run.
    """

    def __init__(self, small: Captured, large: Captured) -> None:
        values = small.size_values(small.call.tensors)
        batch = [s for s, (name, dim) in small.sizes.items() if dim == 0 and name in small.call.batched]
        if large is small:
            self.fewer = max(2, small.microbatch)
            self.rows = 2 * self.fewer
            self._before = {**values, **dict.fromkeys(batch, self.fewer)}
            self._after = {**values, **dict.fromkeys(batch, self.rows)}
            self.whole = max(self.rows, small.call.batch or 1)
            self.sizes_tried = {**values, **dict.fromkeys(batch, self.whole)}
            self.twin = {node: node for node in small.graph.nodes}
        else:
            self.fewer, self.rows = small.microbatch, large.microbatch
            self._before = {**values, **dict.fromkeys(batch, small.microbatch)}
            self._after = large.size_values(large.call.tensors)
            self.whole, self.sizes_tried = self.rows, self._after
            self.twin = dict(zip(small.graph.nodes, large.graph.nodes, strict=True))
        self._at = lru_cache(maxsize=None)(self._resolve)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's tensor at the larger batch; None if its value is not a tensor."""
        value = self.twin[node].meta.get("val")
        return self.sizes(value, True) if isinstance(value, Tensor) else None

    def shapes(self, node: fx.Node) -> list[tuple[int, ...] | None]:
        """The shape of each item of a node's tuple at the larger batch."""
        value = self.twin[node].meta.get("val")
        items = value if isinstance(value, tuple | list) else [value]
        return [self.sizes(item, True) if isinstance(item, Tensor) else None for item in items]

    def whole_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor of the larger trace at the whole batch."""
        sizes = map(expression, tensor.shape)
        return tuple(resolve(e, self.sizes_tried) if _is_told(e, self.sizes_tried) else UNKNOWN for e in sizes)

    def growing(self, node: fx.Node, item: int | None = None) -> tuple[int, ...]:
        """The dimensions of a tensor (or of an item of a tuple) whose size depends on the batch."""
        small, large = node.meta.get("val"), self.twin[node].meta.get("val")
        if isinstance(small, tuple | list) and isinstance(large, tuple | list) and item is not None:
            small, large = small[item], large[item]
        if not isinstance(small, Tensor) or not isinstance(large, Tensor):
            return ()
        pairs = zip(self.sizes(small, False), self.sizes(large, True), strict=True)
        return tuple(dim for dim, (before, after) in enumerate(pairs) if before != after or before == UNKNOWN)

    def fits(self, node: fx.Node, item: int | None, kind: Kind) -> bool:
        """Whether a result (or an item of a tuple) has the sizes of its kind at both batches."""
        small, large = node.meta.get("val"), self.twin[node].meta.get("val")
        if isinstance(small, tuple | list) and isinstance(large, tuple | list) and item is not None:
            small, large = small[item], large[item]
        if not isinstance(small, Tensor) or not isinstance(large, Tensor):
            return True
        before, after = self.sizes(small, False), self.sizes(large, True)
        match kind:
            case Batched(dim, outer, inner, ragged):
                here = ragged or (before[dim] == outer * self.fewer * inner and after[dim] == outer * self.rows * inner)
                return here and before[:dim] == after[:dim] and before[dim + 1 :] == after[dim + 1 :]
            case Local(dim):
                return before[dim] == self.fewer and after[dim] == self.rows
            case Shared() | Partial():
                return before == after
        return True

    def grows(self, argument: Any, twin: Any) -> bool:
        """Whether a number among a node's arguments depends on the batch."""
        if isinstance(argument, fx.Node):
            value, after = argument.meta.get("val"), self.twin[argument].meta.get("val")
            return bool(self._at(expression(value), False) != self._at(expression(after), True))
        return bool(argument != twin)

    def sizes(self, tensor: Tensor, large: bool) -> tuple[int, ...]:
        return tuple(self._at(expression(size), large) for size in tensor.shape)

    def _resolve(self, expr: Any, large: bool) -> Any:
        values = self._after if large else self._before
        return resolve(expr, values) if _is_told(expr, values) else UNKNOWN


def _is_told(expr: Any, values: Mapping[sympy.Symbol, int]) -> bool:
    """Whether an expression follows from the sizes of inputs."""
    return not isinstance(expr, sympy.Basic) or expr.free_symbols <= values.keys()
