"""Escapes names of modules and parameters in generated code: ``nn.ModuleDict({"it's": ...})`` is legal.

torch.fx writes a dotted name into the code of a graph unchanged: a part that is an identifier as an attribute, any
other part in quotes. It treats Python's keywords as identifiers, and does not escape quotes and line ends. So a graph
gets names that format themselves safely.
"""

from __future__ import annotations

import keyword
from functools import cache

import torch.fx as fx
from torch import nn

OTHER = "'"  # ends a name that a graph module has taken itself


def in_code(name: str) -> str:
    """Returns a dotted name, equal to the given one, that is safe in generated code."""
    return name if all(map(_is_safe, name.split("."))) else _Name(name)


def in_graph_module(name: str) -> str:
    """Returns the name that a module or tensor of a model has in a ``GraphModule``: its own, unless that is taken.

    A graph module has attributes of its own (``graph``, ``code``, ``meta``), which a model may call its modules.
    """
    first, *rest = name.split(".")
    return in_code(".".join([first + OTHER, *rest])) if first.rstrip(OTHER) in _taken() else name


def in_model(name: str) -> str:
    """Returns the name in a model of what has a name in a graph module."""
    first, *rest = name.split(".")
    is_other = first.endswith(OTHER) and first.rstrip(OTHER) in _taken()
    return ".".join([first.removesuffix(OTHER), *rest]) if is_other else name


@cache
def _taken() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Appends an argument to a graph, whose name in the code is that of its node.

    torch.fx would take ``__getitem__`` for the argument of a node ``getitem``, and assign one to the other: if there is
    an argument ``getitem`` too, it is lost.
    """
    node = graph.create_node("placeholder", name, name=name)
    node.target = node.name
    return node


def _is_safe(part: str) -> bool:
    """Whether Python reads a part of a name as torch.fx writes it; Python normalizes non-ASCII identifiers."""
    return part.isascii() and (part.isdigit() or (part.isidentifier() and not keyword.iskeyword(part)))


class _Name(str):
    """A name whose unsafe parts are quoted and escaped when torch.fx splits it and writes them."""

    __slots__ = ()

    def split(self, *args: object, **kwargs: object) -> list[str]:
        return [part if _is_safe(part) else _Part(part) for part in str(self).split(*args, **kwargs)]  # type: ignore[arg-type]


class _Part(str):
    __slots__ = ()

    def isidentifier(self) -> bool:
        return False

    def __format__(self, spec: str) -> str:
        return self.encode("unicode_escape").decode("ascii").replace('"', '\\"')
