"""Calls that a trace has seen before, on tensors of the same shapes: their results are made without running them.

A model repeats its layers, so most calls of a trace are copies of an earlier one: the same function of torch with the
same arguments, on fake tensors with the same sizes, strides and types, under the same modes. The result then has the
sizes of the earlier result, and what the call asks about sizes is guarded already. A run on fake tensors takes
milliseconds, most of all where torch computes it by a decomposition; an empty tensor takes a tenth of that.

Only results in memory of their own count, of functions that write to nothing: no views, no writes. In the gradient
history of a tensor such a call is one node, with the call's tensors before it (see ``autograd_history.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.errors import DependsOnData
from pipecompile.ops.autograd_functions import Applied
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.symbols import Shapes, expression
from pipecompile.ops.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    _get_current_dispatch_mode_stack,
    in_kernel_invocation_manager,
    pytree,
)

_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Made:
    """A tensor that a call returned."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def empty(self, mode: FakeTensorMode) -> Tensor:
        """A fake tensor like it, made without a dispatch."""
        with in_kernel_invocation_manager(mode):
            like = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, like, self.device)


@dataclass(frozen=True)
class Result:
    """What a call returned."""

    tensors: tuple[Made, ...]
    structure: Any
    mode: FakeTensorMode

    def again(self, sources: Sequence[Tensor]) -> Any:
        """The same on other fake tensors, with these tensors in its gradient history."""
        if any(made.requires_grad for made in self.tensors):
            apply: Any = super(torch.autograd.Function, _Again).apply  # not that which traces see
            out = apply(self, *sources)
        else:
            out = self.empty()
        return pytree.tree_unflatten(list(out), self.structure)

    def empty(self) -> tuple[Tensor, ...]:
        return tuple(made.empty(self.mode) for made in self.tensors)


class _Again(torch.autograd.Function):
    """A call that is not run."""

    @staticmethod
    def forward(ctx: Any, result: Result, *sources: Tensor) -> tuple[Tensor, ...]:
        out = result.empty()
        ctx.mark_non_differentiable(*(t for t, made in zip(out, result.tensors, strict=True) if not made.requires_grad))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise DependsOnData("a gradient of calls that were not run")


class RepeatedCalls:
    """The results of one trace's calls, by what they depend on.

    Args:
        shapes: the symbolic sizes of the trace.
    """

    def __init__(self, shapes: Shapes | None) -> None:
        self.shapes = shapes
        self._known: dict[Hashable, Result | None] = {}

    def key(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """What the result of a call depends on; None if this is not known."""
        if not tensors or not _is_torchs(func) or torch.is_inference_mode_enabled():
            return None
        if is_watched():
            return None
        try:
            modes, learned = _modes(tensors[0].device.type), 0 if self.shapes is None else self.shapes.learned
            return func, described(args), described(kwargs), modes, learned
        except Unknown:
            return None

    def known(self, key: Any) -> Result | None:
        """The result of an earlier call with the same key, if there was one that can be made again."""
        return None if key is None else self._known.get(key)

    def learn(self, key: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """Notes the result of a call that has written nothing."""
        if key is not None and key not in self._known:
            self._known[key] = _result(tensors, out)


def is_watched() -> bool:
    """Whether a dispatch mode of the model's own wants to see what runs."""
    return not all(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


class Unknown(Exception):
    """An argument whose effect on a call is not known."""


def _is_torchs(func: Any) -> bool:
    """Whether a function is torch's own, so that nothing but its arguments and torch's modes decide its result."""
    module = getattr(func, "__module__", None) or "torch"
    return module.partition(".")[0] == "torch" and not isinstance(func, Applied) and not is_opaque(func)


def _modes(kind: str) -> Hashable:
    """The modes of torch that results depend on."""
    cuda: Any = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def described(value: Any) -> Hashable:
    """An argument without its memory: equal for arguments that a call does the same with.

    Raises:
        Unknown: it is of another kind than tensors, sizes and what torch's functions take.
    """
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, _SIZES):
        return type(value), value.node._expr
    if isinstance(value, tuple | list):
        return type(value), *map(described, value)
    if isinstance(value, dict):
        return dict, *((name, described(item)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, described(value.start), described(value.stop), described(value.step)
    if type(value) in _PLAIN or isinstance(value, torch.memory_format):
        return type(value), value
    raise Unknown


def _of_tensor(tensor: Tensor) -> Hashable:
    if not isinstance(tensor, FakeTensor) or tensor.layout != torch.strided or tensor.constant is not None:
        raise Unknown
    if tensor.is_inference() or tensor.is_conj() or tensor.is_neg():
        raise Unknown
    return (
        type(tensor),
        tuple(map(expression, tensor.shape)),
        tuple(map(expression, tensor.stride())),
        expression(tensor.storage_offset()),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )


def _result(tensors: Sequence[Tensor], out: Any) -> Result | None:
    """What a call returned, if it can be made again; else None."""
    leaves, structure = pytree.tree_flatten(out)
    if not leaves or not all(map(_is_fresh, leaves)):
        return None
    memory = [storage_key(leaf) for leaf in leaves]
    if len({*memory}) < len(memory) or not {*memory}.isdisjoint(map(storage_key, tensors)):
        return None
    made = tuple(
        Made(
            shape=tuple(leaf.shape),
            stride=leaf.stride(),
            dtype=leaf.dtype,
            device=leaf.device,
            requires_grad=leaf.requires_grad,
        )
        for leaf in leaves
    )
    given = symbols_of(size for tensor in tensors for size in (*tensor.shape, *tensor.stride()))
    if not symbols_of(size for each in made for size in (*each.shape, *each.stride)) <= given:
        return None  # sizes that only data tell, new ones in every call
    return Result(made, structure, leaves[0].fake_mode)


def _is_fresh(leaf: Any) -> bool:
    """Whether an empty tensor can stand for a result."""
    return (
        is_plain(leaf)
        and isinstance(offset := leaf.storage_offset(), int)
        and offset == 0
        and (leaf.grad_fn is not None) == leaf.requires_grad
    )


def is_plain(leaf: Any) -> bool:
    """Whether its sizes and its dtype say all about a tensor."""
    return (
        isinstance(leaf, FakeTensor)
        and leaf.layout == torch.strided
        and leaf.constant is None
        and not leaf.is_inference()
        and not leaf.is_conj()
        and not leaf.is_neg()
    )


def symbols_of(sizes: Any) -> set[Any]:
    """The symbols of sizes; they may be in sequences."""
    found: set[Any] = set()
    for size in sizes:
        if isinstance(size, torch.SymInt):
            found |= size.node.expr.free_symbols
        elif isinstance(size, list | tuple):
            found |= symbols_of(size)
    return found
