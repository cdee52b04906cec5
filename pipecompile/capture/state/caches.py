"""Key-value caches of transformers as trees of tensors, so that a call can take a cache and return it.

A cache is an object that a decoder fills: each layer holds the keys and values of all tokens so far. Here it is a tree,
whose leaves are its tensors and its sizes, and whose structure is everything else (classes, options, flags). So a call
with a cache is a call with more tensors: the layers' keys and values are inputs and outputs of the graph, each on the
device of its stage. What forward changes in a cache is what it returns of it.

The classes are transformers' own, found by their module; transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import CaptureError, InputError
from pipecompile.ops.torch_internals import pytree

FILE = "transformers.cache_utils"
NUMBERS = frozenset({"cumulative_length", "batch_size"})  # attributes of layers that count tokens or rows
_PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.Size)


@dataclass(frozen=True)
class CacheKey(pytree.MappingKey[str, Any]):
    """The path inside a cache of one of its tensors.

    Attributes:
        part: the list of layers that the tensor belongs to.
        is_number: whether the tensor is empty, and its size a number of tokens.
    """

    part: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Kept:
    """A cache in a tree, which torch cannot flatten itself.

    Attributes:
        counted: whether its numbers of tokens are sizes of empty tensors. A number among the arguments would be a part
            of the structure of the call, and each step of a decoder another kind of call; a size may be a symbol.
    """

    cache: Any
    counted: bool = False


@dataclass(frozen=True)
class _Leaf:
    """The place of a tensor, or of a number of tokens."""

    is_number: bool = False


@dataclass(frozen=True)
class _Parts:
    """The structure of a list, tuple, dict or object: its class, and its parts by key.

    Attributes:
        follows: attributes that are the device of the first tensor of the object.
    """

    kind: type
    parts: tuple[tuple[Any, Any], ...]
    follows: tuple[str, ...] = ()


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers."""
    return any(kind.__name__ == "Cache" and kind.__module__ == FILE for kind in type(value).__mro__)


def caches_in(tree: Any) -> list[Any]:
    """The caches in a tree, each once, in order."""
    found = (leaf for leaf in pytree.tree_leaves(tree, is_leaf=is_cache) if is_cache(leaf))
    return list({id(cache): cache for cache in found}.values())


def parts_of_caches(tree: Any) -> Iterator[Any]:
    """The caches in a tree, the caches in them, and their layers."""
    for cache in caches_in(tree):
        yield cache
        for value in vars(cache).values():
            yield from parts_of_caches(value)
            yield from value if isinstance(value, list) else ()


def cache_key(path: Sequence[Any]) -> CacheKey | None:
    """The last key of a path if the path leads into a cache, else None."""
    return next((key for key in path if isinstance(key, CacheKey)), None)


def filled(arguments: Any, output: Any) -> Any:
    """What forward has returned, with copies of its caches, which keep what they hold now.

    Raises:
        CaptureError: forward was given several caches, or does not return the one that it was given.
    """
    given, returned = caches_in(arguments), caches_in(output)
    if len(given) > 1:
        raise CaptureError(
            f"the call has {len(given)} key-value caches, and a pipeline can find only one in what the model returns; "
            f"pass one, such as an EncoderDecoderCache of two, or for PEFT's prefix tuning the prefix alone, to the "
            f"model's own generate (docs/trainers.md#peft)"
        )
    for cache in given:
        if next((found for found in returned if type(found) is type(cache)), None) is not cache:
            raise CaptureError(
                f"the model is given a {type(cache).__name__} and does not return it, so what forward stores in it "
                f"would be lost; pass use_cache=True, or no cache"
            )
    copies = {id(cache): _copied(cache) for cache in returned}
    return pytree.tree_map(lambda leaf: copies.get(id(leaf), leaf), output, is_leaf=is_cache) if copies else output


def _copied(cache: Any) -> Any:
    leaves, structure = _leaves(Kept(cache))
    return _build(structure, iter(leaves))


def given_back(arguments: Any, output: Any) -> Any:
    """An output in which the caller's own cache is in the place of its copy, and holds what the copy holds.

    Args:
        arguments: of the call.
        output: of the same call, whose arguments were copies.
    """
    for cache in caches_in(arguments):
        result = next(found for found in caches_in(output) if type(found) is type(cache))
        _take(cache, result)
        output = pytree.tree_map(lambda leaf: cache if leaf is result else leaf, output, is_leaf=is_cache)  # noqa: B023
    return output


def _take(cache: Any, result: Any) -> None:
    """Makes a cache hold what another cache of the same structure holds, which a call has returned in its place."""
    for name in vars(cache).keys() - vars(result).keys():
        delattr(cache, name)
    for name, value in vars(result).items():
        own = vars(cache).get(name)
        if is_cache(own) and is_cache(value):
            _take(own, value)
        elif name == "layers" and isinstance(own, list):
            for mine, new in zip(own, value, strict=False):
                vars(mine).clear()
                vars(mine).update(vars(new))
            own.extend(value[len(own) :])
        else:
            setattr(cache, name, value)


def _flatten(kept: Kept) -> tuple[list[tuple[Any, Any]], Any]:
    leaves: list[tuple[tuple[str, ...], Any]] = []
    structure = _read(kept.cache, (), leaves)
    found = [(path, leaf, not isinstance(leaf, Tensor)) for path, leaf in leaves]
    if kept.counted:
        found = [(path, torch.empty(0, int(leaf)) if is_number else leaf, is_number) for path, leaf, is_number in found]
    return [(_key(path, is_number), leaf) for path, leaf, is_number in found], structure


def _leaves(kept: Kept) -> tuple[list[Any], Any]:
    leaves, structure = _flatten(kept)
    return [leaf for _, leaf in leaves], structure


def _key(path: tuple[str, ...], is_number: bool) -> CacheKey:
    numbered = [i for i, name in enumerate(path) if name.isdecimal()]
    part = ".".join(path[: numbered[0]] if numbered else path[:-1])
    return CacheKey("_".join(path), f"{part}.{path[-1]}" if is_number else part, is_number)


def _read(value: Any, path: tuple[str, ...], leaves: list[tuple[tuple[str, ...], Any]]) -> Any:
    """Returns the structure of a part of a cache, and appends its leaves with their paths."""
    if isinstance(value, Tensor):
        leaves.append((path, value))
        return _Leaf()
    if path and path[-1] in NUMBERS and isinstance(value, int | torch.SymInt):
        leaves.append((path, value))
        return _Leaf(is_number=True)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple | dict):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        kind = next(kind for kind in (list, tuple, dict) if isinstance(value, kind))  # it may be a stand-in
        return _Parts(kind, tuple((key, _read(part, (*path, str(key)), leaves)) for key, part in items))
    if any(kind.__module__ == FILE for kind in type(value).__mro__) and not hasattr(value, "_quantize"):
        held = {name: part for name, part in vars(value).items() if not isinstance(part, torch.device)}
        follows = tuple(name for name, part in vars(value).items() if isinstance(part, torch.device))
        parts = tuple((name, _read(part, (*path, name), leaves)) for name, part in held.items())
        return _Parts(type(value), parts, follows)
    raise InputError(
        f"the cache holds a {type(value).__name__} in {'.'.join(path)!r}, which is neither a tensor nor a plain value, "
        f"so stages cannot pass it on; pass a DynamicCache without offloading, or generate with use_cache=False"
    )


def _build(structure: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(structure, _Leaf):
        leaf = next(leaves)
        return leaf.shape[1] if structure.is_number and isinstance(leaf, Tensor) else leaf
    if not isinstance(structure, _Parts):
        return structure
    parts = {key: _build(part, leaves) for key, part in structure.parts}
    if structure.kind is dict:
        return parts
    if issubclass(structure.kind, list | tuple):
        return structure.kind(parts.values())
    built = object.__new__(structure.kind)
    device = next((tensor.device for tensor in pytree.tree_leaves(parts) if isinstance(tensor, Tensor)), None)
    vars(built).update(parts | dict.fromkeys(structure.follows, device))
    return built


pytree.register_pytree_node(
    Kept,
    _leaves,
    lambda leaves, structure: _build(structure, iter(leaves)),
    flatten_with_keys_fn=_flatten,
)
