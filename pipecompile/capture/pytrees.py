"""Flattens arguments and outputs, including the user's own dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.state.caches import Kept, is_cache
from pipecompile.errors import CaptureError
from pipecompile.ops.torch_internals import pytree


def with_paths(tree: Any) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    """Returns the leaves with their paths, and the tree. Parts of a class without key paths are numbered."""
    try:
        return pytree.tree_flatten_with_path(tree)
    except ValueError:  # a class is registered without ``flatten_with_keys_fn`` (diffusers' outputs)
        leaves, spec = pytree.tree_flatten(tree)
        return list(zip(_paths(spec), leaves, strict=True)), spec


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[Any, ...]]:
    if spec.is_leaf():
        yield ()
        return
    children, names = spec.children(), spec.context
    named = isinstance(names, list) and len(names) == len(children) and all(isinstance(name, str) for name in names)
    for i, child in enumerate(children):
        for path in _paths(child):
            yield (pytree.MappingKey(names[i]) if named else pytree.SequenceKey(i), *path)


def is_stream(leaf: Any) -> bool:
    """Whether a leaf is a generator, or another iterator of Python's own, which can be read once."""
    return isinstance(leaf, Iterator) and type(leaf).__module__ == "builtins"


def flatten(tree: Any, counted: bool = False) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    """Returns the leaves with their paths, and the tree; registers dataclasses that torch does not know.

    Args:
        tree: Arguments or an output.
        counted: Whether numbers of tokens in caches are sizes of empty tensors, as among arguments.

    Raises:
        CaptureError: A leaf is an object that contains tensors and that torch cannot flatten.
    """
    while True:
        leaves, spec = with_paths(tree)
        unknown = {type(leaf) for _, leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
        if not unknown:
            break
        for kind in unknown:
            pytree.register_dataclass(kind)
    if any(_is_whole(leaf) for leaf in pytree.tree_leaves(tree, is_leaf=_is_whole)):
        leaves, spec = with_paths(pytree.tree_map(lambda leaf: _kept(leaf, counted), tree, is_leaf=_is_whole))
    for path, leaf in leaves:
        _refuse_hidden_tensors(pytree.keystr(path), leaf)
    return leaves, spec


@dataclasses.dataclass(frozen=True)
class _Size:
    """Placeholder for a ``torch.Size`` in a tree, which torch would rebuild as a plain tuple."""

    sizes: tuple[Any, ...]


pytree.register_pytree_node(
    _Size,
    lambda size: (list(size.sizes), None),
    lambda sizes, _: torch.Size(sizes),
    flatten_with_keys_fn=lambda size: ([(pytree.SequenceKey(i), s) for i, s in enumerate(size.sizes)], None),
)


def _is_whole(tree: Any) -> bool:
    return isinstance(tree, torch.Size) or is_cache(tree)


def _kept(leaf: Any, counted: bool) -> Any:
    if isinstance(leaf, torch.Size):
        return _Size(tuple(leaf))
    return Kept(leaf, counted) if is_cache(leaf) else leaf


def _refuse_hidden_tensors(path: str, leaf: Any) -> None:
    held = [name for name, value in getattr(leaf, "__dict__", {}).items() if _has_tensor(value)]
    if held and not isinstance(leaf, Tensor) and not isinstance(leaf, type):
        raise CaptureError(
            f"{path or 'the output'} is a {type(leaf).__name__}, which holds tensors in {', '.join(held)}, and torch "
            f"cannot flatten it; use a dict, tuple, NamedTuple or dataclass, or register the class with "
            f"torch.utils._pytree.register_pytree_node()"
        )


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
