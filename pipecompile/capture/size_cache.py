"""Caches arithmetic on symbolic sizes during a trace.

A model repeats its layers, and each operation on fake tensors computes the sizes, strides and contiguity of its result:
about sixty sums, products and comparisons of the same few sizes, each of them a call of sympy. With a cache, an
operation on symbolic sizes costs little more than one on plain sizes. The caches of sympy and torch are below these
calls: with them alone, the capture of GPT-2 takes 1.5 times as long.

An entry is valid for the whole trace. What the trace learns later about a symbol (that it equals another one) is
applied by ``SymNode.expr`` when the entry is read, not when it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipecompile.ops.symbols import Shapes
from pipecompile.ops.torch_internals import SymNode

_OF_TWO = (
    "add", "sub", "mul", "mod", "int_floordiv", "int_truediv", "float_truediv", "float_pow", "pow_by_natural",
    "eq", "ne", "gt", "lt", "le", "ge", "sym_min", "sym_max", "and_", "or_", "sym_and", "sym_or",
)  # fmt: skip
_OF_ONE = ("sym_not", "neg", "sym_float", "abs", "floor", "ceil", "trunc", "sym_int", "is_integer")
_OF_LAYOUTS = (
    "is_contiguous", "is_channels_last_contiguous_2d", "is_channels_last_contiguous_3d",
    "is_channels_last_strides_2d", "is_channels_last_strides_3d", "is_non_overlapping_and_dense_indicator",
    "is_non_overlapping_and_dense",
)  # fmt: skip


def _of_two(name: str) -> Callable[..., Any]:
    original = getattr(SymNode, name)

    def compute(self: SymNode, other: SymNode) -> Any:
        shapes = self.shape_env
        if type(shapes) is not Shapes:
            return original(self, other)
        key = (name, self._expr, self.pytype, other._expr, other.pytype)
        known = shapes.known.get(key)
        if known is None:
            known = shapes.known[key] = original(self, other)
        return known

    return compute


def _of_any(name: str) -> Callable[..., Any]:
    original = getattr(SymNode, name)

    def compute(self: SymNode, *others: list[SymNode]) -> Any:
        shapes = self.shape_env
        if type(shapes) is not Shapes:
            return original(self, *others)
        key = (name, self._expr, self.pytype, *(tuple(node._expr for node in nodes) for nodes in others))
        known = shapes.known.get(key)
        if known is None:
            known = shapes.known[key] = original(self, *others)
        return known

    return compute


def _wrap_int(self: SymNode, number: int, original: Callable[..., SymNode] = SymNode.wrap_int) -> SymNode:
    shapes = self.shape_env
    if type(shapes) is not Shapes:
        return original(self, number)
    known = shapes.known.get(("wrap_int", number))
    if known is None:
        known = shapes.known["wrap_int", number] = original(self, number)
    return known


def _maybe_as_int(self: SymNode, original: Callable[..., int | None] = SymNode.maybe_as_int) -> int | None:
    """Returns the number that a node equals, or None. None is cached until the trace learns about a symbol."""
    shapes = self.shape_env
    if type(shapes) is not Shapes:
        return original(self)
    learned = shapes.learned
    if shapes.known.get(("maybe_as_int", self._expr)) == learned:
        return None
    number = original(self)
    if number is None:
        shapes.known["maybe_as_int", self._expr] = learned
    return number


# Methods of ``SymNode`` during a trace. They do not cache numbers that do not belong to a ``Shapes``.
REMEMBERED: dict[str, Callable[..., Any]] = {
    **{name: _of_two(name) for name in _OF_TWO},
    **{name: _of_any(name) for name in (*_OF_ONE, *_OF_LAYOUTS)},
    "wrap_int": _wrap_int,
    "maybe_as_int": _maybe_as_int,
}
