"""Functions along dimensions: reductions, softmax, sorting. Only sums and means can be divided over the batch."""

from __future__ import annotations

from typing import Any

from pipecompile.batching.rules.batch_types import PARTIAL, Batched, Kind, Partial, Shared
from pipecompile.batching.rules.elementwise import broadcast, entry_by_entry
from pipecompile.batching.rules.use import Answer, Edited, Share, Use, dims_of, only_first, positive, rule


def _dims(use: Use, position: int = 1) -> tuple[int, ...]:
    dim = use.arg(position, "dim", use.node.kwargs.get("axis"))
    if isinstance(dim, int) and len(use.node.args) > position + 1 and isinstance(use.node.args[position + 1], int):
        rest = [a for a in use.node.args[position:] if isinstance(a, int) and not isinstance(a, bool)]
        dim = rest if all(isinstance(a, int) for a in rest) and use.name in ("sum", "mean") else dim
    return dims_of(dim, use.ndim(use.node.args[0]))


def without(use: Use, kind: Batched, dims: tuple[int, ...], item: int | None = None) -> Batched:
    """The batch after ``dims`` are reduced, which the result keeps or drops."""
    shapes = use.scale.shapes(use.node)
    shape = shapes[item or 0] if shapes else None
    kept = shape is None or len(shape) == use.ndim(use.node.args[0])
    return kind if kept else kind.at(kind.dim - sum(dim < kind.dim for dim in dims))


def _along(use: Use, dims: tuple[int, ...]) -> Kind | None:
    """The kind of a result reduced along ``dims``; None if the batch is one of them."""
    kind = only_first(use, use.node.args[0])
    if isinstance(kind, Batched):
        return without(use, kind, dims) if kind.dim not in dims else None
    return kind if isinstance(kind, Shared) else None


@rule("sum nansum mean nanmean")
def add_up(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), or sum (...) if the batch is among the dimensions.

    A mean over the batch is its sum over each microbatch's share of the rows. ``nanmean`` over the batch mixes samples.
    """
    dims, kind = _dims(use), use.kind(use.node.args[0])
    if isinstance(kind, Partial):
        return PARTIAL if use.name in ("sum", "mean") else use.mixed()
    if found := _along(use, dims):
        return found
    if not isinstance(kind, Batched) or use.name == "nanmean":
        return use.mixed()
    if use.name in ("sum", "nansum"):
        return PARTIAL
    return (
        use.mixed("a mean over a number of entries that depends on values")
        if kind.ragged
        else Edited(PARTIAL, (Share(),))
    )


@rule("""
    amax amin aminmax max min argmax argmin all any prod cumsum cumprod logcumsumexp cummax cummin softmax log_softmax
    softmin logsumexp norm linalg_norm linalg_vector_norm normalize std var std_mean var_mean median nanmedian mode
    sort argsort topk kthvalue msort flip roll fft_fft fft_ifft fft_rfft fft_irfft glu
    count_nonzero gumbel_softmax diff
""")
def along(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), reduced or not; mixes samples if the batch is among the dimensions."""
    first = use.node.args[0]
    name = use.name
    if name in ("max", "min") and len(use.tensors) == 2:
        return entry_by_entry(use)
    dims = dims_of(_dim_argument(use), use.ndim(first))
    kind = only_first(use, first)
    if isinstance(kind, Shared):
        return _each(use, kind)
    if not isinstance(kind, Batched) or kind.dim in dims:
        return use.mixed(f"{name} over the batch")
    return _each(use, kind, dims)


def _each(use: Use, kind: Kind, dims: tuple[int, ...] = ()) -> Answer:
    """The kind of the result, or of each item of a tuple."""
    shapes = use.scale.shapes(use.node)
    if use.scale.shape(use.node) is not None:
        return without(use, kind, dims) if isinstance(kind, Batched) else kind
    return tuple(without(use, kind, dims, i) if isinstance(kind, Batched) else kind for i in range(len(shapes)))


_POSITIONS = {"topk": 2, "kthvalue": 2, "norm": 2, "linalg_norm": 2, "linalg_vector_norm": 2, "normalize": 2,
              "roll": 2, "gumbel_softmax": 4, "fft_fft": 2, "fft_ifft": 2,
              "fft_rfft": 2, "fft_irfft": 2, "diff": 2}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"topk": -1, "kthvalue": -1, "sort": -1, "argsort": -1, "glu": -1, "normalize": 1,
                             "fft_fft": -1, "fft_ifft": -1, "fft_rfft": -1, "fft_irfft": -1, "diff": -1, "msort": 0,
                             "gumbel_softmax": -1, "mode": -1}  # fmt: skip


def _dim_argument(use: Use) -> Any:
    if use.name == "flip":
        return use.dims(1, "dims")
    position = _POSITIONS.get(use.name, 1)
    name = "dims" if use.name == "roll" else "dim"
    found = use.arg(position, name, use.node.kwargs.get("axis"))
    if isinstance(found, bool) or (found is not None and not isinstance(found, int | list | tuple)):
        found = None
    if found is None and use.name in ("sort", "argsort") and "stable" in use.node.kwargs:
        return use.node.kwargs.get("dim", -1)
    if found is None and use.name in ("softmax", "log_softmax", "softmin"):
        return 0 if use.ndim(use.node.args[0]) in (0, 1, 3) else 1  # F.softmax without dim=
    return _DEFAULTS.get(use.name) if found is None else found


@rule("fft_fftn fft_ifftn fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_rfftn")
def fourier(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...); mixes samples if the batch is among the dimensions."""
    default = (-2, -1) if use.name.endswith("2") else None
    dims = dims_of(use.arg(2, "dim", default), use.ndim(use.node.args[0]))
    return _along(use, dims) or use.mixed()


@rule("multinomial")
def drawn_classes(use: Use) -> Answer:
    """(batch, classes) -> (batch, numbers), or (classes,) -> (numbers,)."""
    kind = use.kind(use.node.args[0])
    apart = isinstance(kind, Batched) and kind.dim == 0 and use.ndim(use.node.args[0]) == 2
    return kind if apart or isinstance(kind, Shared) else use.mixed("multinomial over the batch")


@rule("cosine_similarity")
def cosine(use: Use) -> Answer:
    """(..., batch, ..., width), (..., batch, ..., width) -> (..., batch, ...); mixes samples if dim is the batch."""
    pair = list(use.tensors)[:2]
    ndim = max(map(use.ndim, pair))
    dim = positive(use.arg(2, "dim", 1), ndim)
    kinds = {use.kind(n) for n in pair if not isinstance(use.kind(n), Shared)}
    if len(kinds) == 1 and isinstance(kind := kinds.pop(), Batched) and len({use.ndim(n) for n in pair}) == 1:
        return kind.at(kind.dim - (dim < kind.dim)) if kind.dim != dim else use.mixed()
    return broadcast(use, pair) if not kinds else use.mixed()
