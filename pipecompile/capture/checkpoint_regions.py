"""Finds the nodes that a backward recomputes: in the model's ``torch.utils.checkpoint`` regions, or wherever possible.

Parts kept whole, custom functions, and writes to memory from outside the region may not give the same result a second
time. Such nodes run once and split the region in two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.fx as fx

from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.ops.autograd_functions import custom_of


def recomputed(graph: fx.Graph, groups: Iterable[Sequence[str]]) -> dict[str, int]:
    """Returns the checkpoint region of each recomputed node, by name.

    Args:
        graph: The captured graph.
        groups: Names of nodes that share memory which one of them writes.
    """
    return _whole_groups(
        {n.name: region for n in graph.nodes if (region := origin_of(n).recompute) is not None and _repeats(n)}, groups
    )


def repeatable(graph: fx.Graph, groups: Iterable[Sequence[str]]) -> frozenset[str]:
    """Returns the names of all nodes that may be recomputed; a write to a buffer may not be."""
    may = {n.name: 0 for n in graph.nodes if _repeats(n) and not origin_of(n).writes}
    return frozenset(_whole_groups(may, groups))


def _whole_groups(found: dict[str, int], groups: Iterable[Sequence[str]]) -> dict[str, int]:
    """Removes the nodes whose group is not entirely in one region."""
    for group in groups:
        if len({found.get(name) for name in group}) > 1:
            for name in group:
                found.pop(name, None)
    return found


def _repeats(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or isinstance(node.target, FunctionLeaf):
        return False
    return custom_of(node.target) is None
