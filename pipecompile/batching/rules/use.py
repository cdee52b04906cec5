"""One call in a graph as the rules see it, and what a rule may answer."""

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
    """The call's result times the microbatch's share of the rows: a mean over equally many entries a row."""


@dataclass(frozen=True, slots=True)
class ShareArgument:
    """One argument times the share of the rows: what is added to each part must be added once in all."""

    position: int


@dataclass(frozen=True, slots=True)
class WholeArgument:
    """A number that counts samples: the whole batch's in its place."""

    position: int


@dataclass(frozen=True, slots=True)
class RowsArgument:
    """Numbers of rows: the whole batch's, of which each microbatch has its own, in the place of its own count."""

    position: int


@dataclass(frozen=True, slots=True)
class Instead:
    """Another function in the place of the call's, with the same arguments."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Squeeze:
    """The dimensions that the whole batch's call takes away: a microbatch of one row would lose its batch too."""

    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recount:
    """A mean over valid entries: the sum, over the number (or weight) of valid entries in the whole batch."""

    target: fx.Node  # computed from inputs alone
    weight: fx.Node | None
    ignore_index: int | fx.Node


Edit = Share | ShareArgument | WholeArgument | RowsArgument | Instead | Squeeze | Recount


@dataclass(frozen=True, slots=True)
class Edited:
    """A kind that holds once the call is changed."""

    kind: Kind
    edits: tuple[Edit, ...]


Answer = Kind | tuple[Kind, ...] | Edited | None  # None: the rule does not know


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
        """An argument of a Python function by its name, however it was given."""
        bound = inspect.signature(self.function).bind(*self.node.args, **self.node.kwargs)
        return bound.arguments.get(name, default)

    def dims(self, position: int, name: str) -> Any:
        """A ``dim=`` argument that may also be given as several arguments: ``x.flip(0, 1)``."""
        rest = self.node.args[position:]
        return rest if len(rest) > 1 else self.arg(position, name)

    def kind(self, argument: Any) -> Kind:
        """The kind of an argument; numbers are shared, a list has the kind that its items agree on."""
        if isinstance(argument, fx.Node):
            kind = self.kinds[argument]
            return kind if not isinstance(kind, tuple) else Mixed("a tuple is used whole")
        return SHARED

    def shape(self, argument: Any) -> tuple[int, ...]:
        """The shape of an argument at the larger batch; that of a number is empty."""
        shape = self.scale.shape(argument) if isinstance(argument, fx.Node) else ()
        return shape or ()

    def ndim(self, argument: Any) -> int:
        return len(self.shape(argument))

    def is_tensor(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and self.scale.shape(argument) is not None

    @property
    def function(self) -> Any:
        """The object by which the call is known."""
        return function_of(self.node.target)

    @property
    def out(self) -> tuple[int, ...]:
        """The result's shape at the larger batch."""
        return self.scale.shape(self.node) or ()

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors among the arguments, nested ones too."""
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
RULES: dict[Hashable, tuple[str, Rule]] = {}  # by function object: the name that the rule knows it by, and the rule


def rule(*functions: str | Callable[..., Any], aten: bool = True) -> Callable[[Rule], Rule]:
    """Registers the rule of functions: of objects, and of torch's functions by name (``operators.named``).

    Raises:
        NameError: torch has no function of a name, or a function has a rule already.
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
    """A ``dim=`` argument as positive numbers; None means all."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return tuple(range(ndim))
    return tuple(positive(d, ndim) for d in (dim if isinstance(dim, Sequence) else (dim,)))


def only_first(use: Use, first: Any) -> Kind | None:
    """The first argument's kind where all other tensors are shared; a verdict on everything else."""
    kind = use.kind(first)
    rest = [n for n in use.tensors if n is not first]
    if all(isinstance(use.kind(n), Shared) for n in rest):
        return kind
    return None


__all__ = [
    "RULES", "Answer", "Edited", "Instead", "Recount", "RowsArgument", "Rule", "Share", "ShareArgument", "Squeeze",
    "Use", "WholeArgument", "dims_of", "only_first", "positive", "rule",
]  # fmt: skip
