"""A call as the rules see it, and the answers that a rule may give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from pipecompile.batching.rules.batch_types import SHARED, Kind, Mixed, Shared
from pipecompile.batching.rules.size_pair import Scale
from pipecompile.ops.operators import function_of, named


@dataclass(frozen=True, slots=True)
class Share:
    """Multiplies the result by the microbatch's share of the rows: a mean over the same number of entries per row."""


@dataclass(frozen=True, slots=True)
class ShareArgument:
    """Multiplies an argument by the share of the rows: a value added to each part must count once in the sum."""

    position: int


@dataclass(frozen=True, slots=True)
class WholeArgument:
    """Replaces a number that counts samples by the whole batch's number."""

    position: int


@dataclass(frozen=True, slots=True)
class RowsArgument:
    """Replaces row numbers of the microbatch by its part of the whole batch's row numbers."""

    position: int


@dataclass(frozen=True, slots=True)
class Instead:
    """Calls another function with the same arguments."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Squeezes only the dimensions that are 1 for the whole batch: a microbatch of one row keeps its batch."""

    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recount:
    """Divides a sum over valid entries by the number (or weight) of valid entries in the whole batch."""

    target: fx.Node  # computed from inputs alone
    weight: fx.Node | None
    ignore_index: int | fx.Node


Edit = Share | ShareArgument | WholeArgument | RowsArgument | Instead | Squeeze | Recount


@dataclass(frozen=True, slots=True)
class Edited:
    """A kind that holds after the call is edited."""

    kind: Kind
    edits: tuple[Edit, ...]


Answer = Kind | tuple[Kind, ...] | Edited | None  # None: the rule does not cover the call


@dataclass(frozen=True)
class Use:
    """A call with the kinds of its arguments."""

    node: fx.Node
    name: str
    kinds: Mapping[fx.Node, Kind | tuple[Kind, ...]]
    scale: Scale
    early: frozenset[fx.Node] | set[fx.Node]  # nodes that are computed from inputs alone

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument by position or keyword."""
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def given(self, name: str, default: Any = None) -> Any:
        """An argument of a Python function by its name, whether it was passed by position or by keyword."""
        bound = inspect.signature(self.function).bind(*self.node.args, **self.node.kwargs)
        return bound.arguments.get(name, default)

    def dims(self, position: int, name: str) -> Any:
        """A ``dim=`` argument that may also be several positional arguments, as in ``x.flip(0, 1)``."""
        rest = self.node.args[position:]
        return rest if len(rest) > 1 else self.arg(position, name)

    def kind(self, argument: Any) -> Kind:
        """The kind of an argument; a number or a list is shared."""
        if isinstance(argument, fx.Node):
            kind = self.kinds[argument]
            return kind if not isinstance(kind, tuple) else Mixed("a tuple used as a whole")
        return SHARED

    def shape(self, argument: Any) -> tuple[int, ...]:
        """The shape of an argument at the larger batch; empty for a number."""
        shape = self.scale.shape(argument) if isinstance(argument, fx.Node) else ()
        return shape or ()

    def ndim(self, argument: Any) -> int:
        return len(self.shape(argument))

    def is_tensor(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and self.scale.shape(argument) is not None

    @property
    def function(self) -> Any:
        """The function object under which the call's rule is registered."""
        return function_of(self.node.target)

    @property
    def out(self) -> tuple[int, ...]:
        """The result's shape at the larger batch."""
        return self.scale.shape(self.node) or ()

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors among the arguments, including nested ones."""
        return [n for n in self.node.all_input_nodes if self.is_tensor(n)]

    def counts(self, position: int) -> bool:
        """Whether the number at a position depends on the batch."""
        if position >= len(self.node.args):
            return False
        argument = self.node.args[position]
        return not self.is_tensor(argument) and self.scale.grows(argument, self.scale.twin[self.node].args[position])

    def mixed(self, why: str = "", certain: bool = False) -> Mixed:
        return Mixed(why or self.name, certain)


Rule = Callable[[Use], Answer]
RULES: dict[Hashable, tuple[str, Rule]] = {}  # by function object: its name within the rule, and the rule


def rule(*functions: str | Callable[..., Any], aten: bool = True) -> Callable[[Rule], Rule]:
    """Registers a rule for function objects, and for torch's functions by name (``operators.named``).

    Raises:
        NameError: torch has no function of that name, or the function already has a rule.
    """
    found: dict[Hashable, str] = {}
    for function in functions:
        found |= named(function, aten) if isinstance(function, str) else {function: function.__name__}

    def register(one: Rule) -> Rule:
        for key, name in found.items():
            if key in RULES:
                raise NameError(f"{name} has two rules: {RULES[key][1].__name__} and {one.__name__}")
            RULES[key] = name, one
        return one

    return register


def positive(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def dims_of(dim: Any, ndim: int) -> tuple[int, ...]:
    """A ``dim=`` argument as non-negative dimensions; None means all of them."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return tuple(range(ndim))
    return tuple(positive(d, ndim) for d in (dim if isinstance(dim, Sequence) else (dim,)))


def only_first(use: Use, first: Any) -> Kind | None:
    """The first argument's kind if all other tensors are shared, else None."""
    kind = use.kind(first)
    rest = [n for n in use.tensors if n is not first]
    if all(isinstance(use.kind(n), Shared) for n in rest):
        return kind
    return None


__all__ = [
    "RULES", "Answer", "Edited", "Instead", "Recount", "RowsArgument", "Rule", "Share", "ShareArgument", "Squeeze",
    "Use", "WholeArgument", "dims_of", "only_first", "positive", "rule",
]  # fmt: skip
