"""Views that a trace has made before, of tensors of the same shapes: they are made again without asking how.

How the sizes and strides of a view follow from those of its base is decided by torch in Python if sizes are symbolic,
by many comparisons. Their answers are guarded already when the same operation comes on a tensor of the same sizes and
strides, so the view is made from its known sizes and strides. This is below autograd, which sees the operation itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.repeated_calls import Unknown, described, is_plain, is_watched, symbols_of
from pipecompile.ops.symbols import Shapes
from pipecompile.ops.torch_internals import FakeTensor, OpOverload, in_kernel_invocation_manager


@dataclass(frozen=True, slots=True)
class View:
    """The layout of one view of a tensor's memory."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    offset: Any


@dataclass(frozen=True, slots=True)
class Views:
    """What an operation returned: one view, or several in a list or tuple."""

    each: tuple[View, ...]
    container: type | None

    def of(self, base: Any) -> Any:
        """The same views of another fake tensor."""
        with in_kernel_invocation_manager(base.fake_mode):
            likes = [torch.as_strided(base, view.shape, view.stride, view.offset) for view in self.each]
        made = [FakeTensor(base.fake_mode, like, base.fake_device) for like in likes]
        return made[0] if self.container is None else self.container(made)


class RepeatedViews:
    """The views of one trace, by what they depend on.

    Args:
        shapes: the symbolic sizes of the trace; without any, torch's own cache of fake results is as quick.
    """

    def __init__(self, shapes: Shapes | None) -> None:
        self.shapes = shapes
        self._known: dict[Hashable, Views | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an aten operation below autograd, or makes the views that it made before."""
        if self.shapes is None or not _is_view(func) or not args or not isinstance(args[0], FakeTensor) or is_watched():
            return func(*args, **kwargs)
        try:
            key = func, described(args), described(kwargs), self.shapes.learned
        except Unknown:
            return func(*args, **kwargs)
        if (known := self._known.get(key)) is not None:
            return known.of(args[0])
        out = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _views(args, kwargs, out)
        return out


def _is_view(func: Any) -> bool:
    return isinstance(func, OpOverload) and func.is_view


def _views(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Views | None:
    """The layouts of what an operation returned; None if it is more than views of its first argument."""
    base, container = args[0], type(out) if isinstance(out, list | tuple) else None
    leaves = [out] if container is None else list(out)
    memory = storage_key(base)
    if memory is None or not all(map(is_plain, leaves)):
        return None
    if any(leaf is base or storage_key(leaf) != memory or leaf.dtype != base.dtype for leaf in leaves):
        return None
    each = tuple(View(tuple(leaf.shape), leaf.stride(), leaf.storage_offset()) for leaf in leaves)
    sizes = (size for view in each for size in (*view.shape, *view.stride, view.offset))
    given = symbols_of((*_sizes(base), *args[1:], *kwargs.values()))
    return Views(each, container) if symbols_of(sizes) <= given else None


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    return *tensor.shape, *tensor.stride(), tensor.storage_offset()
