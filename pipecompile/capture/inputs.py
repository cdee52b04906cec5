"""The arguments of a call: bound to the model's signature, flattened, named, and told apart by having a batch or not.

A tensor is *batched* if its first dimension has the batch's size, which is the size that most first dimensions have
(the first argument decides a tie). Batched tensors are split into microbatches; all other arguments are shared by them.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor

from pipecompile.capture.trees import flatten
from pipecompile.errors import InputError


@dataclass(frozen=True, slots=True)
class Call:
    """One call's arguments: the tensors by name, and everything else.

    ``key`` is equal for two calls exactly if they have the same tree, the same numbers, strings and flags, and tensors
    of the same dtypes and ranks that want gradients alike.
    """

    tensors: Mapping[str, Tensor]
    key: tuple[Any, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]  # in the order of the tree; a tensor's name in its place
    batch: int | None  # None: no tensor has a dimension
    batched: frozenset[str]

    def rebuild(self, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other tensors in place of the call's own."""
        leaves = [tensors[leaf.name] if isinstance(leaf, TensorName) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def split(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of each microbatch, views of the call's; those without a batch go to all."""
        pieces = {name: torch.split(self.tensors[name], list(rows)) for name in self.batched}
        return [{n: pieces[n][i] if n in pieces else t for n, t in self.tensors.items()} for i in range(len(rows))]

    def alike(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of the microbatches that are as large as the first."""
        return [part for part, count in zip(self.split(rows), rows, strict=True) if count == rows[0]]


@dataclass(frozen=True, slots=True)
class TensorName:
    """Stands for a tensor among the leaves of a call."""

    name: str


def read_call(
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settled: Mapping[tuple[str, int], bool] | None = None,
) -> Call:
    """Reads the arguments of ``forward(*args, **kwargs)``.

    Args:
        settled: whether a tensor has a batch, by name and number of dimensions, where an earlier call has settled it.

    Raises:
        InputError: the model does not take such arguments, or a batch is empty, or not made of tensors.
    """
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the model's forward cannot be called so: {error}; it takes {_signature(forward)}") from None
    paths, spec = flatten((bound.args, bound.kwargs))
    names = _names(forward, [path for path, _ in paths])
    tensors = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True) if isinstance(leaf, Tensor)}
    leaves = tuple(
        TensorName(name) if isinstance(leaf, Tensor) else leaf for name, (_, leaf) in zip(names, paths, strict=True)
    )
    settled = settled or {}
    batch = _batch_size(tensors, settled)
    batched = frozenset(n for n, t in tensors.items() if settled.get((n, t.ndim), t.ndim > 0 and t.shape[0] == batch))
    for name, tensor in tensors.items():
        if tensor.is_sparse or tensor.layout != torch.strided:
            raise InputError(f"argument {name!r} is a sparse tensor ({tensor.layout}); pass tensor.to_dense()")
    _check_batch(tensors, batch, batched, bound.arguments)
    return Call(tensors, _key(spec, leaves, tensors), spec, leaves, batch, batched)


def _batch_size(tensors: Mapping[str, Tensor], settled: Mapping[tuple[str, int], bool]) -> int | None:
    known = [n for n, t in tensors.items() if settled.get((n, t.ndim))]
    names = known or [n for n, t in tensors.items() if t.ndim]
    if not names:
        return None
    return int(Counter(int(tensors[name].shape[0]) for name in names).most_common(1)[0][0])


def _check_batch(
    tensors: Mapping[str, Tensor], batch: int | None, batched: frozenset[str], arguments: Mapping[str, Any]
) -> None:
    if batch == 0:
        raise InputError("the batch is empty: the first dimension of the input tensors is 0")
    for name in sorted(batched):
        if tensors[name].shape[0] != batch:
            raise InputError(
                f"{name!r} has {tensors[name].shape[0]} rows where the batch has {batch}; "
                f"every tensor with a batch dimension needs the same number"
            )
    for name, value in _containers(arguments):
        if _is_plain_batch(value, batch):
            raise InputError(
                f"argument {name!r} is a {type(value).__name__} of {batch} items, one a sample, which cannot be split "
                f"into microbatches; pass a tensor (torch.as_tensor) instead"
            )


def _containers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every list, tuple and array among the arguments, with its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _containers(item, f"{name}.{key}" if name else str(key))
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


def _names(forward: Callable[..., Any], paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """A name for each leaf: its argument's, with the keys inside the argument after it."""
    parameters = list(inspect.signature(forward).parameters)
    namespace = fx.graph._Namespace()  # what Python or torch calls otherwise gets a number: input_1
    names: list[str] = []
    for path in paths:
        keys: list[Any] = [getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path]
        in_args, first, *rest = keys
        head = parameters[min(first, len(parameters) - 1)] if in_args == 0 else first
        names.append(namespace.create_name(re.sub(r"\W", "_", "_".join(map(str, [head, *rest]))), None))
    return names


def _key(spec: Any, leaves: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    described = tuple((n, t.dtype, t.ndim, t.requires_grad) for n, t in tensors.items())
    return (str(spec), tuple(_hashable(leaf) for leaf in leaves), described)


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), repr(leaf))
    return (type(leaf), leaf)


def _signature(forward: Callable[..., Any]) -> str:
    return ", ".join(map(str, inspect.signature(forward).parameters.values()))
