"""Functions that move entries (views, transpositions, concatenations), and functions that make tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipecompile.batching.rules.batch_types import PARTIAL, SHARED, Batched, Kind, Local, Mixed, Partial, Shared, common
from pipecompile.batching.rules.even_rows import met
from pipecompile.batching.rules.use import Answer, Edited, Squeeze, Use, dims_of, only_first, positive, rule


def reshaped(kind: Batched, before: Sequence[int], after: Sequence[int], rows: int) -> Batched | None:
    """The batch of a tensor viewed in another shape; None if no single dimension holds it.

    Neighboring entries of one sample span ``stride`` entries, and all samples together ``stride * rows``.
    """
    if kind.ragged:
        kept = tuple(before[: kind.dim]) == tuple(after[: kind.dim])
        return kind if kept and math.prod(before[kind.dim + 1 :]) == math.prod(after[kind.dim + 1 :]) else None
    stride = kind.inner * math.prod(before[kind.dim + 1 :])
    for dim, size in enumerate(after):
        right = math.prod(after[dim + 1 :])
        if right and stride % right == 0 and right * size >= stride * rows:
            inner = stride // right
            if size % (inner * rows) == 0:
                return Batched(dim, size // (inner * rows), inner)
    return None


@rule("squeeze squeeze_copy")
def squeeze(use: Use) -> Answer:
    """(..., batch, 1, ...) -> (..., batch, ...).

    Removes the dimensions that are 1 for the whole batch, so that a microbatch of one row keeps its batch.
    """
    kind = reshape(use)
    if not isinstance(kind, Batched):
        return kind
    shape = use.shape(use.node.args[0])
    asked = use.dims(1, "dim")
    dims = dims_of(asked, len(shape)) if asked is not None else tuple(range(len(shape)))
    return Edited(kind, (Squeeze(tuple(dim for dim in dims if shape[dim] == 1)),))


@rule(
    "view reshape flatten unflatten view_as reshape_as ravel unsqueeze atleast_1d atleast_2d atleast_3d",
    "_unsafe_view _reshape_alias",
)
def reshape(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), with the entries in the same order.

    Mixes samples if no single dimension of the result holds the batch.
    """
    first = use.node.args[0]
    kind = use.kind(first)
    if isinstance(kind, Partial | Shared):
        grown = isinstance(kind, Shared) and use.scale.growing(use.node)
        return use.mixed() if grown else kind
    if isinstance(kind, Local):
        big = [dim for dim, size in enumerate(use.out) if size > 1]
        return Local(big[0]) if len(big) == 1 else use.mixed()
    if not isinstance(kind, Batched):
        return kind
    return reshaped(kind, use.shape(first), use.out, use.scale.rows) or use.mixed("a view across samples")


@rule("transpose swapaxes swapdims t permute movedim moveaxis adjoint")
def permute(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), with the batch where its dimension goes."""
    first = use.node.args[0]
    kind, ndim = use.kind(first), use.ndim(first)
    if not isinstance(kind, Batched | Local):
        return kind
    order = _order(use, ndim)
    dim = order.index(kind.dim)
    return kind.at(dim) if isinstance(kind, Batched) else Local(dim)


def _order(use: Use, ndim: int) -> list[int]:
    """The source dimension of each dimension of a permuted tensor."""
    order = list(range(ndim))
    name = use.name
    if name == "permute":
        dims: Any = use.arg(1, "dims")
        return [positive(d, ndim) for d in (dims if isinstance(dims, tuple | list) else use.node.args[1:])]  # type: ignore[arg-type]
    if name in ("movedim", "moveaxis"):
        sources = dims_of(use.arg(1, "source"), ndim)
        targets = dims_of(use.arg(2, "destination"), ndim)
        rest = [d for d in order if d not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            rest.insert(target, source)
        return rest
    pair = (-2, -1) if name in ("adjoint", "t") else (use.arg(1, "dim0"), use.arg(2, "dim1"))
    if ndim < 2:
        return order
    a, b = (positive(d, ndim) for d in pair)
    order[a], order[b] = order[b], order[a]
    return order


@rule(getattr)
def attribute(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...): .T, .mT, .H and .mH move the batch, .data, .real and .imag do not."""
    name = use.arg(1)
    if name in ("T", "mT", "H", "mH"):
        kind, ndim = use.kind(use.arg(0)), use.ndim(use.arg(0))
        if not isinstance(kind, Batched) or ndim < 2:
            return kind
        swapped = {ndim - 1: ndim - 2, ndim - 2: ndim - 1}
        dim = swapped.get(kind.dim, kind.dim) if name.startswith("m") else ndim - 1 - kind.dim
        return kind.at(dim)
    return use.kind(use.arg(0)) if name in ("data", "real", "imag", "grad_fn") else None


@rule("expand expand_as broadcast_to repeat tile")
def expand(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...); (..., 1, ...) -> (..., batch, ...) if the new size is the batch's."""
    first = use.node.args[0]
    kind = use.kind(first)
    offset = len(use.out) - use.ndim(first)
    growing = use.scale.growing(use.node)
    if isinstance(kind, Partial):
        return PARTIAL if not growing and use.name != "repeat" else use.mixed()
    if isinstance(kind, Shared):
        if not growing:
            return SHARED
        if len(growing) > 1:
            return use.mixed()
        dim = growing[0]
        inner = use.shape(first)[dim - offset] if dim >= offset else 1
        outer, rest = divmod(use.out[dim], inner * use.scale.rows)
        if inner == 1:  # of equal entries
            outer, inner = 1, outer
        return Batched(dim, outer, inner) if not rest and outer == 1 else use.mixed()
    if isinstance(kind, Local):
        return Local(kind.dim + offset)
    if not isinstance(kind, Batched):
        return kind
    dim = kind.dim + offset
    times = use.out[dim] // max(1, use.shape(first)[kind.dim])
    return Batched(dim, kind.outer * times, kind.inner, kind.ragged)


@rule("repeat_interleave")
def repeat_interleave(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch * repeats, ...), each sample's copies together.

    Mixes samples unless ``repeats`` is an int that does not depend on the batch and ``dim`` is given.
    """
    first, times = use.node.args[0], use.arg(1, "repeats")
    kind = only_first(use, first)
    dim = use.arg(2, "dim")
    if kind is None or dim is None or not isinstance(times, int) or use.counts(1):
        return SHARED if isinstance(kind, Shared) and not use.scale.growing(use.node) else use.mixed()
    if isinstance(kind, Batched) and kind.dim == positive(dim, use.ndim(first)):
        return Batched(kind.dim, kind.outer, kind.inner * times, kind.ragged)
    return kind if isinstance(kind, Batched | Shared) else use.mixed()


@rule("cat concat concatenate stack hstack vstack")
def cat(use: Use) -> Answer:
    """(..., batch, ...), ... -> (..., batch, ...), or (..., parts * batch, ...) along the batch.

    Mixes samples if operands have the batch in different dimensions, or different shapes along the batch. An operand
    of shape (0,) adds nothing to the others, whatever their shape.
    """
    parts: Any = use.arg(0, "tensors")
    if not isinstance(parts, tuple | list) or use.name in ("hstack", "vstack"):
        return None
    if use.name != "stack":
        parts = [part for part in parts if use.shape(part) != (0,)] or parts
    dim = positive(use.arg(1, "dim", use.node.kwargs.get("axis", 0)), len(use.out))
    kinds = [use.kind(part) for part in parts]
    if len(parts) == 1 and use.name != "stack":
        return kinds[0]  # a copy
    if any(isinstance(kind, Mixed) for kind in kinds):
        return next(kind for kind in kinds if isinstance(kind, Mixed))
    if all(isinstance(kind, Partial) for kind in kinds):
        return PARTIAL
    batched = [kind for kind in kinds if isinstance(kind, Batched)]
    if not batched:
        return SHARED if all(isinstance(kind, Shared) for kind in kinds) else use.mixed()
    kind = common(kinds) or _met(use, kinds, parts)
    if not isinstance(kind, Batched):
        return use.mixed(f"{use.name} of values with the batch in different dimensions")
    if use.name == "stack":
        return kind.at(kind.dim + (dim <= kind.dim))
    if kind.dim != dim:
        return kind
    same = len({use.shape(part) for part in parts}) == 1 and not kind.ragged and kind.outer == 1
    return Batched(dim, len(parts), kind.inner) if same else use.mixed("concatenation along the batch")


def _met(use: Use, kinds: Sequence[Kind], parts: Sequence[Any]) -> Kind | None:
    """The kind of values side by side of which some have equal entries along the batch; else None."""
    found: Kind | None = kinds[0]
    of = parts[0]
    for kind, part in zip(kinds, parts, strict=True):
        if found is not None and kind != found:
            found = met(use, (found, of), (kind, part))
            of = part if found == kind else of
    return found


@rule("chunk split unbind tensor_split unsafe_split unsafe_chunk split_with_sizes")
def split(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), ...

    Mixes samples if ``dim`` is the batch, unless it takes apart what ``cat`` put side by side.
    """
    first = use.node.args[0]
    kind = only_first(use, first)
    position, default = (1, 0) if use.name == "unbind" else (2, 0)
    dim = positive(use.arg(position, "dim", default), use.ndim(first))
    count = len(use.scale.shapes(use.node))
    if isinstance(kind, Batched) and kind.dim == dim:
        sizes = {s[dim] for s in use.scale.shapes(use.node) if s is not None and use.name != "unbind"}
        if kind.outer > 1 and count and kind.outer % count == 0 and len(sizes) == 1:
            return (Batched(dim, kind.outer // count, kind.inner),) * count
        return (use.mixed(f"{use.name} along the batch"),) * count
    if isinstance(kind, Batched) and use.name == "unbind":
        kind = kind.at(kind.dim - (dim < kind.dim))
    return (kind,) * count if isinstance(kind, Batched | Shared | Partial) else (use.mixed(),) * count


@rule("broadcast_tensors meshgrid")
def several(use: Use) -> Answer:
    """(..., batch, ...), ... -> (..., batch, ...), ..., broadcast.

    Mixes samples if an operand has no batch and others do, and for ``meshgrid`` if any has one.
    """
    parts = list(use.tensors)
    count = len(use.scale.shapes(use.node))
    if all(isinstance(use.kind(part), Shared) for part in parts) and not any(
        use.scale.growing(use.node, i) for i in range(count)
    ):
        return (SHARED,) * count
    if use.name == "meshgrid":
        return (use.mixed(),) * count
    shapes = use.scale.shapes(use.node)
    answers: list[Kind] = []
    for part, shape in zip(parts, shapes, strict=True):
        kind = use.kind(part)
        fits = isinstance(kind, Batched) and shape is not None
        answers.append(kind.at(kind.dim + len(shape or ()) - use.ndim(part)) if fits else use.mixed())  # type: ignore[union-attr]
    return tuple(answers)


@rule("zeros ones full empty new_zeros new_ones new_full new_empty rand randn randint scalar_tensor empty_strided")
def constant(use: Use) -> Answer:
    """sizes -> (...), or (..., batch, ...) if one size grows with the batch; mixes samples if the fill value does."""
    values = [n for n in use.tensors if not use.name.startswith("new_")]
    if any(not isinstance(use.kind(n), Shared) for n in values):
        return use.mixed()
    if use.name in ("full", "new_full") and use.counts(1 if use.name == "full" else 2):
        return use.mixed("numbers that count samples")
    growing = use.scale.growing(use.node)
    if not growing:
        return SHARED
    inner, rest = divmod(use.out[growing[0]], use.scale.rows)
    return Batched(growing[0], 1, inner) if len(growing) == 1 and not rest else use.mixed()


@rule("arange")
def arange(use: Use) -> Answer:
    """end -> (end,), or row numbers (batch,) if the end is the batch size; other ranges of the batch mix samples."""
    growing = use.scale.growing(use.node)
    starts_at_zero = len([a for a in use.node.args if not isinstance(a, str)]) == 1
    if not growing:
        return SHARED
    return Local(0) if starts_at_zero and use.out == (use.scale.rows,) else use.mixed("numbers that count samples")


@rule("""
    linspace logspace eye tensor as_tensor tril_indices triu_indices from_numpy asarray randperm hann_window
    hamming_window bartlett_window blackman_window kaiser_window
""")
def made(use: Use) -> Answer:
    """numbers or tensors -> (...), shared; mixes samples if a size or an operand depends on the batch."""
    shared = all(isinstance(use.kind(n), Shared) for n in use.tensors) and not use.scale.growing(use.node)
    return SHARED if shared else use.mixed("numbers that count samples")


@rule("pad")
def pad(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...); mixes samples if the batch is padded."""
    first, widths = use.node.args[0], use.arg(1, "pad", ())
    kind = only_first(use, first)
    if isinstance(kind, Batched):
        padded = [use.ndim(first) - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
        return use.mixed("padding along the batch") if kind.dim in padded else kind
    return kind if isinstance(kind, Shared) and not use.scale.growing(use.node) else use.mixed()


@rule("tril triu view_as_complex view_as_real diagonal diag_embed")
def last_dims(use: Use) -> Answer:
    """(..., batch, ..., n, m) -> (..., batch, ..., n, m).

    Mixes samples if the batch is a dimension that the function works on. ``diagonal`` mixes samples for any batch.
    """
    first = use.node.args[0]
    kind = only_first(use, first)
    if isinstance(kind, Batched):
        inside = use.ndim(first) - (0 if use.name.startswith("view") else 2)
        if use.name == "view_as_complex":
            inside = use.ndim(first) - 1
        simple = use.name in ("tril", "triu") or use.name.startswith("view") or not use.node.args[1:]
        return kind if kind.dim < inside and simple and use.name != "diagonal" else use.mixed()
    return kind if isinstance(kind, Shared | Partial) else use.mixed()


@rule("unfold")
def windows(use: Use) -> Answer:
    """(..., batch, ..., n) -> (..., batch, ..., windows, size), or images (batch, ...) -> (batch, ...).

    ``Tensor.unfold(dim, size, step)`` mixes samples if ``dim`` is the batch, ``F.unfold`` if the batch is not the first
    dimension.
    """
    first = use.node.args[0]
    kind = only_first(use, first)
    if not isinstance(kind, Batched):
        return kind if isinstance(kind, Shared) else use.mixed()
    dim = use.arg(1, "dimension")
    if isinstance(dim, int) and len(use.node.args) >= 4:
        return kind if positive(dim, use.ndim(first)) != kind.dim else use.mixed()
    return kind if kind.dim == 0 else use.mixed()
