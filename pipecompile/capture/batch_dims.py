"""Which arguments have a batch, and along which dimension.

A tensor is *batched* if its first dimension has the batch's size, which is the size that most first dimensions have
(the first argument decides a tie). The user may say otherwise by name, as ``torch.vmap`` is told with ``in_dims``.
Batched tensors are split into microbatches; all other arguments are shared by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipecompile.errors import InputError

Dims = Mapping[str, int | None]  # of an argument or of one tensor in it: the batch's dimension, None for no batch
Settled = Mapping[tuple[str, int], bool]  # by name and number of dimensions: whether an earlier call had it batched


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a call's batch (None: no tensor has one), and for each batched tensor the dimension they are in."""

    rows: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)


def find_batch(tensors: Mapping[str, Tensor], given: Dims, settled: Settled) -> Batch:
    """The batch of a call.

    Args:
        given: what the user has said, by the tensor's name.

    Raises:
        InputError: a tensor does not have the dimension, or they have different numbers of rows, or none.
    """
    said = {name: _positive(name, tensors[name], dim) for name, dim in given.items() if dim is not None}
    guessed = {name: t for name, t in tensors.items() if name not in given and t.ndim}
    rows = _rows({name: tensors[name].shape[dim] for name, dim in said.items()}) or _rows(
        {n: t.shape[0] for n, t in guessed.items() if settled.get((n, t.ndim))} or
        {n: t.shape[0] for n, t in guessed.items()}
    )  # fmt: skip
    if rows is None:
        return Batch()
    if rows == 0:
        raise InputError("the batch is empty: the batch dimension of the input tensors is 0")
    dims = {n: 0 for n, t in guessed.items() if settled.get((n, t.ndim), t.shape[0] == rows)} | said
    for name, dim in sorted(dims.items()):
        if tensors[name].shape[dim] != rows:
            raise InputError(
                f"{name!r} has {tensors[name].shape[dim]} rows where the batch has {rows}; every tensor with a batch "
                f"dimension needs the same number (in_dims= says which tensors have one, and where)"
            )
    return Batch(rows, {name: dims[name] for name in tensors if name in dims})


def refuse_plain_batches(arguments: Mapping[str, Any], batch: int | None, given: Dims) -> None:
    """Raises ``InputError`` if a list or an array has one entry a sample, and nobody has said that it is shared."""
    for argument, contents in arguments.items():
        for name, value in _containers(contents, argument):
            if argument not in given and _is_plain_batch(value, batch):
                raise InputError(
                    f"argument {name!r} is a {type(value).__name__} of {batch} items, one a sample, which cannot be "
                    f"split into microbatches; pass a tensor (torch.as_tensor) instead, or say "
                    f"in_dims={{{argument!r}: None}} if every microbatch is to have the whole of it"
                )


def _positive(name: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise InputError(
            f"in_dims= puts the batch of {name!r} in dimension {dim}, but its shape is {tuple(tensor.shape)}"
        )
    return dim % tensor.ndim


def _rows(sizes: Mapping[str, int]) -> int | None:
    return int(Counter(map(int, sizes.values())).most_common(1)[0][0]) if sizes else None


def _containers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every list, tuple and array among the arguments, with its name."""
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
    """Whether a value has one entry a sample without being made of tensors."""
    if type(value).__module__ == "numpy" and hasattr(value, "ndim") and value.ndim:
        return True
    if not isinstance(value, list | tuple) or batch is None or batch < 2 or len(value) != batch:
        return False
    return all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in value)
