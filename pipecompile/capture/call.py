"""Reads the arguments of a call: binds them to the signature, flattens and names them, moves the batch first."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.batch_dims import Dims, Settled, find_batch, refuse_plain_batches
from pipecompile.capture.pytrees import flatten, is_stream
from pipecompile.capture.state.caches import CacheKey, cache_key, caches_in
from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import pytree

SHARE = "share_of_rows"  # what stages read besides the call: a microbatch's share of the batch


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call.

    Attributes:
        tensors: The tensors by name, with the batch in the first dimension.
        key: Equal for two calls exactly if they have the same tree, the same numbers, strings and flags, and tensors
            with the same dtypes, numbers of dimensions, memory order and ``requires_grad``.
        spec: Tree of the arguments.
        leaves: Leaves of the tree, with a ``TensorName`` in place of each tensor.
        names: Name of each leaf: that of the argument, followed by the keys inside it.
        batch: Number of rows; None if no tensor has a batch dimension.
        batched: Names of the tensors that have a batch.
        dims: Batch dimension in the user's call, where it is not the first.
        cached: For each tensor of a key-value cache, its place in the cache.
        has_cache: Whether there is a key-value cache, which may be empty.
    """

    tensors: Mapping[str, Tensor]
    key: tuple[Any, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    batch: int | None
    batched: frozenset[str]
    dims: Mapping[str, int] = field(default_factory=dict)
    cached: Mapping[str, CacheKey] = field(default_factory=dict)
    has_cache: bool = False

    def rebuild(self, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the user's positional and keyword arguments, with ``tensors`` in place of the call's own."""
        leaves = [self._back(leaf.name, tensors) if isinstance(leaf, TensorName) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def without_values(self) -> Call:
        """Returns a call of the same kind, with tensors that have shapes and no storage."""
        return replace(self, tensors={name: _shape_only(tensor) for name, tensor in self.tensors.items()})

    def _back(self, name: str, tensors: Mapping[str, Any]) -> Any:
        return tensors[name].movedim(0, self.dims[name]) if name in self.dims else tensors[name]

    def split(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Returns the tensors of each microbatch, as views; tensors without a batch are in every microbatch."""
        pieces = {name: torch.split(self.tensors[name], list(rows)) for name in self.batched}
        return [{n: pieces[n][i] if n in pieces else t for n, t in self.tensors.items()} for i in range(len(rows))]

    def alike(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Returns the tensors of the microbatches that have as many rows as the first."""
        return [part for part, count in zip(self.split(rows), rows, strict=True) if count == rows[0]]


def _shape_only(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor.detach().to("meta")
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return empty.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True, slots=True)
class TensorName:
    """Placeholder for a tensor among the leaves of a call."""

    name: str


def read_call(
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settled: Settled | None = None,
    in_dims: Dims | None = None,
) -> Call:
    """Reads the arguments of ``forward(*args, **kwargs)``.

    Args:
        forward: The model's forward.
        args: Positional arguments.
        kwargs: Keyword arguments.
        settled: Whether a tensor has a batch, by name and number of dimensions, where an earlier call has decided it.
        in_dims: Batch dimension, by the name of an argument or of one tensor inside it.

    Raises:
        InputError: The arguments do not fit the signature, or the batch is empty or does not consist of tensors.
    """
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model's forward cannot be called with these arguments: {error}; it takes {_signature(forward)}"
        ) from None
    passed = _passed(forward, bound, args, kwargs)
    paths, spec = flatten(passed, counted=True)
    heads, names = _names([*signature.parameters], [path for path, _ in paths])
    tensors = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True) if isinstance(leaf, Tensor)}
    leaves = tuple(
        TensorName(name) if isinstance(leaf, Tensor) else leaf for name, (_, leaf) in zip(names, paths, strict=True)
    )
    for name, tensor in tensors.items():
        if tensor.is_sparse or tensor.layout != torch.strided:
            raise InputError(f"argument {name!r} is a sparse tensor ({tensor.layout}); pass tensor.to_dense()")
    for name, (_, leaf) in zip(names, paths, strict=True):
        if is_stream(leaf):
            raise InputError(
                f"argument {name!r} is a {type(leaf).__name__}, which can be read only once, but the capture and each "
                f"microbatch read it; pass a list of its items"
            )
    in_dims = in_dims or {}
    given = {
        n: in_dims.get(n, in_dims.get(head)) for n, head in zip(names, heads, strict=True) if {n, head} & {*in_dims}
    }
    cached = {n: key for n, (path, _) in zip(names, paths, strict=True) if n in tensors and (key := cache_key(path))}
    given |= {name: None for name, key in cached.items() if key.is_number}
    batch = find_batch(tensors, {n: dim for n, dim in given.items() if n in tensors}, settled or {})
    refuse_plain_batches(bound.arguments, batch.rows, in_dims)
    elsewhere = {name: dim for name, dim in batch.dims.items() if dim}
    with torch.enable_grad():  # a view of an input that requires grad must too, even under no_grad
        first = {n: t.movedim(elsewhere[n], 0) if n in elsewhere else t for n, t in tensors.items()}
    return Call(
        tensors=first,
        key=_key(spec, leaves, tensors),
        spec=spec,
        leaves=leaves,
        names=tuple(names),
        batch=batch.rows,
        batched=frozenset(batch.dims),
        dims=elsewhere,
        cached=cached,
        has_cache=bool(caches_in(passed)),
    )


def _passed(
    forward: Callable[..., Any], bound: inspect.BoundArguments, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments, in the order of the signature.

    A function sees no difference between ``f(x)`` and ``f(x=x)``, so these are one call. One that wraps another
    (``functools.wraps``) may look for a keyword, so keywords stay keywords.
    """
    if not hasattr(forward, "__wrapped__"):
        return bound.args, bound.kwargs
    first = [name for name in bound.arguments if name in kwargs]
    return tuple(args), {name: kwargs[name] for name in dict.fromkeys([*first, *kwargs])}


def _names(parameters: Sequence[str], paths: Sequence[tuple[Any, ...]]) -> tuple[list[str], list[str]]:
    """Returns, for each leaf, its argument, and its name: that of the argument followed by the keys inside it.

    Args:
        parameters: Names of the arguments of forward, in order.
    """
    namespace = fx.graph._Namespace()  # numbers the names that Python or torch already uses: input_1
    namespace.create_name(SHARE, None)
    heads: list[str] = []
    names: list[str] = []
    for path in paths:
        keys: list[Any] = [getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path]
        in_args, first, *rest = keys
        head = parameters[min(first, len(parameters) - 1)] if in_args == 0 else first
        heads.append(str(head))
        names.append(namespace.create_name(re.sub(r"\W", "_", "_".join(map(str, [head, *rest]))), None))
    return heads, names


def _key(spec: Any, leaves: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    described = tuple((n, t.dtype, t.ndim, t.requires_grad, order_of(t)) for n, t in tensors.items())
    return (str(spec), tuple(_hashable(leaf) for leaf in leaves), described)


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the dimensions from the largest stride to the smallest; None if that is their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    return None if order == tuple(range(tensor.ndim)) else order


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), repr(leaf))
    return (type(leaf), leaf)


def _signature(forward: Callable[..., Any]) -> str:
    return ", ".join(map(str, inspect.signature(forward).parameters.values()))
