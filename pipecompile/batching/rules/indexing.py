"""Functions that index: by number, by mask, along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Local, Partial, Shared
from pipecompile.batching.rules.size_pair import UNKNOWN
from pipecompile.batching.rules.use import Answer, Edited, Instead, Use, only_first, positive, rule
from pipecompile.ops import functional
from pipecompile.ops.functional import masked_scatter_all

WHOLE = slice(None)


def spelled_out(index: Any, ndim: int, dims_taken: Any) -> list[Any]:
    """An index as one item for each dimension, with its ellipsis and missing items written as slices."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(dims_taken(item) for item in items)
    gap = [WHOLE] * (ndim - taken)
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        return items[:at] + gap + items[at + 1 :]
    return items + gap


def _is_mask(item: Any) -> bool:
    value = item.meta.get("val") if isinstance(item, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


@rule("getitem")
def getitem(use: Use) -> Answer:
    """(..., batch, ...)[index] -> (..., batch, ...); (entries, ...)[(..., batch, ...)] -> (..., batch, ...).

    Mixes samples if the index picks among the samples; each sample may pick entries of its own, as in ``x[mask]`` and
    ``x[arange(batch), numbers]``.
    """
    source, index = use.node.args[0], use.node.args[1]
    assert isinstance(source, fx.Node)
    whole = use.kinds[source]
    if isinstance(whole, tuple):
        return whole[index] if isinstance(index, int) and -len(whole) <= index < len(whole) else use.mixed()
    if not use.is_tensor(source):
        return SHARED
    if isinstance(whole, Shared) and not any(not isinstance(use.kind(n), Shared) for n in use.tensors):
        grows = any(use.out[dim] != UNKNOWN for dim in use.scale.growing(use.node))  # numbers are checked for all rules
        return use.mixed("an index that depends on the batch size") if grows else SHARED

    items = spelled_out(index, use.ndim(source), partial(_dims_taken, use))
    tensors = [item for item in items if isinstance(item, fx.Node) and use.is_tensor(item)]
    lines = all(isinstance(use.kind(item), Shared) and use.ndim(item) == 1 for item in tensors)
    lines = lines and isinstance(whole, Batched) and not _is_mask(items[_source_dims(items).index(whole.dim)])
    if any(_is_mask(item) for item in tensors) and not lines:
        return _by_mask(use, whole, items, tensors)
    return _by_numbers(use, whole, items, tensors)


def _by_mask(use: Use, whole: Kind, items: list[Any], tensors: list[fx.Node]) -> Answer:
    """``x[mask]``, with a mask over the leading dimensions: the entries in order, sample by sample."""
    if len(tensors) != 1 or items[0] is not tensors[0] or any(item != WHOLE for item in items[1:]):
        return use.mixed("a mask beside another index")
    mask = use.kind(tensors[0])
    if isinstance(mask, Batched) and mask.dim == 0 and whole in (mask, SHARED) and mask.outer == 1:
        return Batched(0, ragged=True) if whole == mask else use.mixed()
    if isinstance(whole, Batched) and isinstance(mask, Shared) and whole.dim >= use.ndim(tensors[0]):
        return whole.at(whole.dim - use.ndim(tensors[0]) + 1)
    return use.mixed("a mask that does not follow the samples")


def _by_numbers(use: Use, whole: Kind, items: list[Any], tensors: list[fx.Node]) -> Answer:
    """An index of slices, numbers, new dimensions, and tensors of numbers."""
    together = [i for i, item in enumerate(items) if isinstance(item, fx.Node) and use.is_tensor(item)]
    width = max((use.ndim(item) for item in tensors), default=0)
    picked: list[Kind] = [use.kind(item) for item in tensors]
    place, _ = _placed_tensors(use, items, tensors)
    if isinstance(whole, Shared):
        return _from_table(use, picked, tensors, width, place[together[0]])
    if not isinstance(whole, Batched):
        return whole if not tensors else use.mixed()
    source = _source_dims(items)
    item = items[source.index(whole.dim)]
    if isinstance(item, slice):
        keeps = item == WHOLE or (
            item.start in (None, 0) and item.step in (None, 1) and _covers(use, whole, place, items)
        )
        if not keeps:
            return use.mixed("an index along the batch")
        if not all(isinstance(kind, Shared) for kind in picked):
            return use.mixed("an index computed from samples, applied to all of them")
        return whole.at(place[source.index(whole.dim)])
    if isinstance(item, fx.Node) and use.is_tensor(item):
        return _by_row(use, whole, item, tensors, width, place[together[0]])
    return use.mixed("an index of one sample")


def _by_row(use: Use, whole: Batched, rows: fx.Node, tensors: list[fx.Node], width: int, first: int) -> Answer:
    """``x[arange(batch), numbers]``: each sample picks entries of its own."""
    local = use.kind(rows)
    if not isinstance(local, Local) or whole != Batched(whole.dim):
        return use.mixed("an index of sample numbers")
    dim = local.dim - use.ndim(rows) + width
    for other in tensors:
        kind = use.kind(other)
        if other is rows or isinstance(kind, Shared):
            continue
        if not isinstance(kind, Batched) or kind.at(kind.dim - use.ndim(other) + width) != Batched(dim):
            return use.mixed("an index of sample numbers")
    return Batched(first + dim)


def _from_table(use: Use, picked: list[Kind], tensors: list[fx.Node], width: int, first: int) -> Answer:
    found = {kind.at(kind.dim - use.ndim(n) + width) for n, kind in zip(tensors, picked, strict=True)
             if isinstance(kind, Batched)}  # fmt: skip
    if len(found) != 1 or not all(isinstance(kind, Batched | Shared) for kind in picked):
        return use.mixed("an index of row numbers, or with the batch in different dimensions")
    kind = found.pop()
    return kind.at(kind.dim + first)


def _source_dims(items: Sequence[Any]) -> list[int]:
    """The dimension of the source that each item indexes; -1 for a new dimension."""
    dims, next_dim = [], 0
    for item in items:
        dims.append(-1 if item is None else next_dim)
        next_dim += item is not None
    return dims


def _placed(items: Sequence[Any], together: list[int], width: int, front: bool) -> list[int]:
    """The dimension of the result that each item becomes."""
    places: list[int] = []
    dim = width if front else 0
    seen = front
    for i, item in enumerate(items):
        if i in together:
            places.append(0 if front else (dim if not seen else places[together[0]]))
            dim += 0 if seen else width
            seen = True
        elif isinstance(item, slice) or item is None:
            places.append(dim)
            dim += 1
        else:
            places.append(dim)
    return places


def _covers(use: Use, whole: Batched, place: list[int], items: list[Any]) -> bool:
    """Whether a slice along the batch takes the whole batch."""
    index = _source_dims(items).index(whole.dim)
    source = use.shape(use.node.args[0])
    return use.out[place[index]] == source[whole.dim] and bool(use.scale.growing(use.node))


@rule("setitem", functional.setitem)
def setitem(use: Use) -> Answer:
    """x (..., batch, ...), index, value -> (..., batch, ...).

    Mixes samples if the index picks among the samples; each sample may set entries of its own, as in
    ``x[arange(batch), numbers] = value``.
    """
    return _assigned(use, *use.node.args[:3])


@rule("index_put")
def index_put(use: Use) -> Answer:
    """x (..., batch, ...), index, values -> (..., batch, ...), where None takes all of a dimension.

    Mixes samples if the index picks among the samples.
    """
    given = use.arg(1, "indices")
    index = tuple(WHOLE if item is None else item for item in given)
    return _assigned(use, use.node.args[0], index, use.arg(2, "values"))


def _assigned(use: Use, x: Any, index: Any, value: Any) -> Answer:
    items = index if isinstance(index, tuple) else (index,)
    kind, incoming = use.kind(x), use.kind(value)
    if all(isinstance(use.kind(n), Shared) for n in use.tensors):
        return SHARED
    masks = [i for i in items if isinstance(i, fx.Node)]
    if len(items) == 1 and masks and _is_mask(masks[0]) and use.shape(masks[0]) == use.shape(x)[: use.ndim(masks[0])]:
        packed = isinstance(incoming, Batched) and incoming.ragged and incoming.dim == 0 and kind == Batched(0)
        fits = packed or (isinstance(incoming, Shared) and not use.shape(value))
        return kind if fits and use.kind(masks[0]) == kind else use.mixed()
    items = tuple(spelled_out(index, use.ndim(x), partial(_dims_taken, use)))
    tensors = [i for i in items if use.is_tensor(i)]
    if any(use.ndim(i) != 1 and _is_mask(i) for i in tensors):
        return use.mixed("an assignment to indexed entries")
    numbers = [i for i in tensors if not _is_mask(i)]
    what = use.mixed(f"an assignment to {'rows by index' if numbers else 'indexed entries'}", certain=bool(numbers))
    if not isinstance(kind, Batched):
        return what
    place, room = _placed_tensors(use, items, tensors)
    at = _source_dims(items).index(kind.dim)
    if use.is_tensor(items[at]):
        first = place[next(i for i, item in enumerate(items) if use.is_tensor(item))]
        picked: Answer = _by_row(use, kind, items[at], tensors, max(map(use.ndim, tensors)), first)
    elif not all(isinstance(use.kind(i), Shared) for i in tensors):
        return what
    elif items[at] != WHOLE:
        return use.mixed("an assignment to some of the samples")
    else:
        picked = kind.at(place[at])
    if not isinstance(picked, Batched):
        return what
    fits = isinstance(incoming, Shared) or incoming == picked.at(picked.dim - room + use.ndim(value))
    return kind if fits else use.mixed()


def _depth(item: Any) -> int:
    """How many dimensions a list has."""
    return 1 + _depth(item[0]) if isinstance(item, list) and item else 0


def _dims_taken(use: Use, item: Any) -> int:
    """How many dimensions of the source an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return use.ndim(item) if _is_mask(item) else 1


def _placed_tensors(use: Use, items: Sequence[Any], tensors: Sequence[Any]) -> tuple[list[int], int]:
    """The dimension of the result that each item becomes, and how many dimensions the result has."""
    lists = [item for item in items if isinstance(item, list)]
    together = [i for i, item in enumerate(items) if use.is_tensor(item) or isinstance(item, list)]
    front = bool(together) and together != list(range(together[0], together[-1] + 1))
    width = max([*map(use.ndim, tensors), *map(_depth, lists)], default=0)
    kept = sum(item is None or isinstance(item, slice) for item in items)
    return _placed(items, together, width, front), width + kept


@rule("gather take_along_dim scatter scatter_add scatter_reduce index_add")
def along(use: Use) -> Answer:
    """(..., batch, ...), index (..., batch, ...) -> (..., batch, ...), all with the batch in the same dimension.

    Mixes samples if ``dim`` is the batch. ``index_add`` mixes samples wherever an operand has a batch.
    """
    position = 2 if use.name == "take_along_dim" else 1
    dim = use.arg(position, "dim")
    if not isinstance(dim, int):
        return use.mixed()
    dim = positive(dim, use.ndim(use.node.args[0]))
    kinds = [use.kind(n) for n in use.tensors]
    if use.name == "index_add":
        return SHARED if all(isinstance(k, Shared) for k in kinds) else use.mixed()
    if all(isinstance(kind, Shared) for kind in kinds):
        return SHARED if not use.scale.growing(use.node) else use.mixed()
    first = kinds[0]
    if not isinstance(first, Batched) or first.dim == dim or any(kind != first for kind in kinds):
        return use.mixed(f"{use.name} along the batch")
    return first


@rule("index_select narrow select")
def select(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...); (entries, ...), index (batch,) -> (batch, ...).

    Mixes samples if ``dim`` is the batch.
    """
    first = use.node.args[0]
    dim = positive(use.arg(1, "dim"), use.ndim(first))
    kind = only_first(use, first)
    if use.name == "index_select" and isinstance(use.kind(first), Shared) and dim == 0:
        picked = use.kind(use.arg(2, "index"))
        return picked if isinstance(picked, Batched | Shared) else use.mixed()
    if isinstance(kind, Batched):
        if kind.dim == dim:
            return use.mixed("an index along the batch")
        return kind.at(kind.dim - (dim < kind.dim)) if use.name == "select" else kind
    return kind if isinstance(kind, Shared) else use.mixed()


@rule("slice_backward select_backward")
def put_into_zeros(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), a part of zeros; mixes samples if ``dim`` is the batch."""
    kind = use.kind(use.node.args[0])
    if not isinstance(kind, Batched):
        return kind if isinstance(kind, Shared | Partial) and not use.scale.growing(use.node) else use.mixed()
    dim = positive(use.arg(2, "dim"), len(use.out))
    if use.name == "select_backward":
        return kind.at(kind.dim + (dim <= kind.dim))
    return kind if dim != kind.dim else use.mixed("a slice of the samples")


@rule("masked_select")
def masked_select(use: Use) -> Answer:
    """(batch, ...), mask (batch, ...) -> (entries,), sample by sample; mixes samples unless both shapes are equal."""
    first, mask = use.node.args[0], use.arg(1, "mask")
    kind = use.kind(first)
    if kind == use.kind(mask) == Batched(0) and use.shape(first) == use.shape(mask):
        return Batched(0, ragged=True)
    return use.mixed()


@rule("masked_scatter")
def masked_scatter(use: Use) -> Answer:
    """(batch, ...), mask (batch, ...), source (entries, ...) -> (batch, ...).

    The source's entries are taken in order, so sample by sample only if the microbatch's mask takes all of the
    microbatch's source. This is checked when the call runs.
    """
    kinds = [use.kind(use.arg(i, name)) for i, name in enumerate(("self", "mask", "source"))]
    if all(isinstance(kind, Shared) for kind in kinds):
        return SHARED
    first, mask, source = kinds
    fits = isinstance(first, Batched) and first.dim == 0 and first == mask and isinstance(source, Batched)
    if not fits or source.dim != 0 or source.outer != 1:  # type: ignore[union-attr]
        return use.mixed()
    return Edited(first, (Instead(masked_scatter_all),))
