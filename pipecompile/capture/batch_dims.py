"""Finds which arguments have a batch dimension, and which dimension it is.

The batch size is the first size of the first tensor, if that has several dimensions and all tensors have that size
somewhere (states of an RNN have it in their second dimension); otherwise the most common size of first dimensions (the
first argument decides a tie). A tensor is *batched* if its first dimension has that size. ``in_dims=`` overrides this
by name, as in ``torch.vmap``. Batched tensors are split into microbatches; all other arguments are shared by all
microbatches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipecompile.errors import InputError

Dims = Mapping[str, int | None]  # name of an argument, or of one tensor in it -> batch dimension; None: no batch
Settled = Mapping[tuple[str, int], bool]  # (name, number of dimensions) -> whether it was batched in an earlier call


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a call.

    Attributes:
        rows: Number of rows; None if no tensor has a batch.
        dims: Batch dimension of each batched tensor, by name.
    """

    rows: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)


def find_batch(tensors: Mapping[str, Tensor], given: Dims, settled: Settled) -> Batch:
    """Finds the batch of a call.

    Args:
        tensors: The tensors of the call, by name.
        given: Batch dimensions given by the user, by tensor name.
        settled: Whether a tensor is batched, where an earlier call has decided it.

    Raises:
        InputError: A tensor does not have the given dimension, the numbers of rows differ, or the batch is empty.
    """
    said = {name: _positive(name, tensors[name], dim) for name, dim in given.items() if dim is not None}
    guessed = {name: t for name, t in tensors.items() if name not in given and t.ndim}
    rows = (
        _rows([tensors[name].shape[dim] for name, dim in said.items()])
        or _rows([t.shape[0] for n, t in guessed.items() if settled.get((n, t.ndim))])
        or _rows_of_all([*guessed.values()])
        or _rows([t.shape[0] for t in guessed.values()])
    )
    if rows is None:
        return Batch()
    if rows == 0:
        raise InputError("the batch is empty: the batch dimension of the inputs has size 0; pass at least one row")
    dims = {n: 0 for n, t in guessed.items() if settled.get((n, t.ndim), t.shape[0] == rows)} | said
    for name, dim in sorted(dims.items()):
        if tensors[name].shape[dim] != rows:
            raise InputError(
                f"{name!r} has {tensors[name].shape[dim]} rows, but the batch has {rows}; all tensors with a batch "
                f"dimension must have the same number of rows (in_dims= sets which tensors have one, and which it is)"
            )
    return Batch(rows, {name: dims[name] for name in tensors if name in dims})


def refuse_plain_batches(arguments: Mapping[str, Any], batch: int | None, given: Dims) -> None:
    """Raises ``InputError`` if a list or array has one entry per sample and ``in_dims=`` does not say it is shared."""
    for argument, contents in arguments.items():
        for name, value in _containers(contents, argument):
            if argument not in given and _is_plain_batch(value, batch):
                raise InputError(
                    f"argument {name!r} is a {type(value).__name__} of {batch} items, one per sample, which cannot be "
                    f"split into microbatches; pass a tensor instead (torch.as_tensor()), or set "
                    f"in_dims={{{argument!r}: None}} to pass all of it to every microbatch"
                )


def rows_elsewhere(tensors: Mapping[str, Tensor], batched: Container[str], batch: int | None) -> dict[str, int]:
    """Returns which tensors may have their samples in a dimension other than the first, and which dimension.

    These have no batch as far as is known, and as many entries there as the batch has rows: the states of an RNN.
    """
    alone = {name: tensor.shape for name, tensor in tensors.items() if name not in batched}
    return {name: shape.index(batch, 1) for name, shape in alone.items() if batch in shape[1:]}


def _positive(name: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise InputError(
            f"in_dims= gives dimension {dim} as the batch dimension of {name!r}, whose shape is {tuple(tensor.shape)}; "
            f"use a dimension that it has, or None for no batch"
        )
    return dim % tensor.ndim


def _rows(sizes: Sequence[int]) -> int | None:
    return int(Counter(map(int, sizes)).most_common(1)[0][0]) if sizes else None


def _rows_of_all(tensors: Sequence[Tensor]) -> int | None:
    """The first size of the first tensor, if all tensors have it in some dimension.

    None if the first tensor is a vector, which may have one entry for each feature of the others (weights of classes),
    or has the size twice: it may be a matrix from nodes to nodes.
    """
    shapes = [tuple(map(int, tensor.shape)) for tensor in tensors]
    if not shapes or len(shapes[0]) == 1:
        return None
    rows = shapes[0][0]
    return rows if rows and shapes[0].count(rows) == 1 and all(rows in shape for shape in shapes) else None


def _containers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields every list, tuple and array among the arguments, with its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _containers(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        yield name, value
        for index, item in enumerate(value):
            yield from _containers(item, f"{name}[{index}]")
    elif type(value).__module__ == "numpy":
        yield name, value


def _is_plain_batch(value: Any, batch: int | None) -> bool:
    """Whether a value has one entry per sample and does not consist of tensors."""
    if type(value).__module__ == "numpy" and hasattr(value, "ndim") and value.ndim:
        return True
    if not isinstance(value, list | tuple) or batch is None or batch < 2 or len(value) != batch:
        return False
    return all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in value)
