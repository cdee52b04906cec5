"""Inputs of experiments: random samples of a microbatch and of a whole batch, and changed copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.region_runner import Bench
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed
from pipecompile.batching.rules.size_pair import UNKNOWN, Scale
from pipecompile.capture import Captured
from pipecompile.ops.torch_internals import DisableTorchFunction, _disable_current_modes, pytree

TOLERANCE = 1e3  # units of rounding of the largest entry, allowed for another order of additions
LEAST = 1e-6  # the least magnitude that rounding is measured by
MOST = 0.05  # of the largest entry: an upper bound on the tolerance, for half precision


class Samples:
    """Values of the trace of a microbatch, and of its twin, the trace of the whole batch.

    Attributes:
        bench, rows: runs parts of the trace, on this number of rows.
        whole: runs parts of the twin.
    """

    def __init__(
        self, small: Captured, large: Captured, scale: Scale, kinds: Mapping[fx.Node, Kind | tuple[Kind, ...]]
    ) -> None:
        self.captured = small
        self.scale = scale
        self.kinds = kinds
        self.rows = scale.fewer if (small.call.batch or 1) >= scale.fewer else small.microbatch
        self.bench = Bench(small, self.rows)
        self.whole = Bench(large, scale.whole)

    def by_growth(self, node: fx.Node) -> Kind | tuple[Kind, ...]:
        """The kind of a result, from its shapes at two batch sizes."""
        items = [self._by_growth(node, i) for i in self._items(node)]
        return tuple(items) if items else self._by_growth(node, None)

    def of_the_whole(self, node: fx.Node, generator: torch.Generator) -> Any:
        """A whole batch's value of an input of a region, drawn as by ``draw``."""
        twin = self.scale.twin[node]
        value = twin.meta.get("val")
        if isinstance(value, Tensor) and self._is_drawn(node, value):
            shape = self.scale.whole_shape(value)
            shape = self.whole.value(twin).shape if UNKNOWN in shape else shape
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return self.whole.value(twin)

    def part(self, node: fx.Node, value: Any, first: int) -> Any:
        """A part's share of a whole batch's value: its rows of a tensor, a shared tensor, or its own size."""
        kind = self.kinds.get(node, SHARED)
        if not isinstance(value, Tensor):
            return self.bench.value(node)
        if not isinstance(kind, Batched):
            return value
        part = by_rows(value, kind, self.whole.rows).narrow(kind.dim + 1, first, self.rows)
        return part.reshape(*value.shape[: kind.dim], -1, *value.shape[kind.dim + 1 :])

    def _is_drawn(self, node: fx.Node, value: Tensor) -> bool:
        """Whether a value is an activation, which may be any number."""
        return value.is_floating_point() and isinstance(self.kinds.get(node, SHARED), Batched)

    def draw(self, node: fx.Node, generator: torch.Generator, size: float = 1.0) -> Any:
        """An input of a region: random numbers of standard deviation ``size`` for activations, else the true value."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and self._is_drawn(node, value):
            shape = self.scale.sizes(value, False)
            if UNKNOWN not in shape and self.rows == self.scale.fewer:
                return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(value.dtype)
            real = self.bench.value(node)
            return (torch.randn(real.shape, generator=generator, dtype=torch.float64) * size).to(value.dtype)
        return self.bench.value(node)

    def around(self, node: fx.Node, value: Any, row: int, generator: torch.Generator | None, size: float = 1.0) -> Any:
        """A copy of a value with all rows but one replaced; see the function ``around``."""
        kind = self.kinds.get(node, SHARED)
        return value if isinstance(kind, tuple) else around(value, kind, row, self.rows, generator, size)

    def moved(self, node: fx.Node, value: Any) -> Any:
        """A value with its rows rotated by one: a sample's result must not depend on its position."""
        kind = self.kinds.get(node, SHARED)
        if not isinstance(kind, Batched) or not isinstance(value, Tensor):
            return value
        return by_rows(value, kind, self.rows).roll(1, kind.dim + 1).reshape(value.shape)

    def _by_growth(self, node: fx.Node, item: int | None) -> Kind:
        growing = self.scale.growing(node, item)
        if not growing:
            value = node.meta.get("val")
            value = value[item] if isinstance(value, tuple | list) and item is not None else value
            return Mixed(f"{node.name} has no batch dimension") if isinstance(value, Tensor) else SHARED
        shape = self.scale.shapes(node)[item or 0]
        if len(growing) > 1 or shape is None or shape[growing[0]] % self.scale.rows:
            return Mixed(f"{node.name} has the batch in several dimensions")
        return Batched(growing[0], 1, shape[growing[0]] // self.scale.rows)

    def _items(self, node: fx.Node) -> range:
        value = node.meta.get("val")
        return range(len(value)) if isinstance(value, tuple | list) else range(0)


def by_rows(value: Tensor, kind: Batched, rows: int) -> Tensor:
    """A tensor with its batch dimension unflattened into (outer, rows, inner)."""
    shape = value.shape
    return value.reshape(*shape[: kind.dim], kind.outer, rows, kind.inner, *shape[kind.dim + 1 :])


def around(value: Any, kind: Kind, row: int, rows: int, generator: torch.Generator | None, size: float = 1.0) -> Any:
    """A copy of a value with all rows but one replaced.

    Args:
        generator: draws random rows for floats, and other rows of the value for integers; None: copies of the one row.
        size: the standard deviation of random numbers.
    """
    if not isinstance(kind, Batched) or not isinstance(value, Tensor):
        return value
    split = by_rows(value, kind, rows).clone()
    keep = split.select(kind.dim + 1, row).clone()
    if generator is None:
        split.copy_(keep.unsqueeze(kind.dim + 1).expand_as(split))
    elif value.is_floating_point():
        drawn = torch.randn(split.shape, generator=generator, dtype=torch.float64) * size
        split.copy_(drawn.to(value.dtype))
        split.select(kind.dim + 1, row).copy_(keep)
    else:
        picked = torch.randint(rows, (rows,), generator=generator)
        split.copy_(split.index_select(kind.dim + 1, picked))
        split.select(kind.dim + 1, row).copy_(keep)
    return split.reshape(value.shape)


def same_rows(
    expected: Any,
    seen: Any,
    kind: Kind | tuple[Kind, ...],
    row: int,
    other: int,
    rows: int,
    others: int | None = None,
    least: float = LEAST,
) -> bool:
    """Whether row ``row`` of one result equals row ``other`` of another, which may have ``others`` rows."""
    if isinstance(kind, tuple):
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(seen), kind, strict=True)
        return all(same_rows(a, b, k, row, other, rows, others, least) for a, b, k in pairs)
    if not isinstance(kind, Batched) or not isinstance(expected, Tensor):
        return True
    with DisableTorchFunction(), _disable_current_modes():
        a = by_rows(expected, kind, rows).select(kind.dim + 1, row)
        b = by_rows(seen, kind, others or rows).select(kind.dim + 1, other)
        return same_entries(a, b, least)


def same_entries(a: Tensor, b: Tensor, least: float = LEAST) -> bool:
    """Whether two tensors are equal up to rounding of their largest entry, or of ``least`` if that is larger."""
    if not a.is_floating_point():
        return bool((a == b).all())
    scale = max(float(a.abs().max()), least) if a.numel() else 1.0
    return bool(((a - b).abs() <= min(TOLERANCE * torch.finfo(a.dtype).eps, MOST) * scale).all())
