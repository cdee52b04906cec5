"""Which nodes the backward computes again: those of the model's own ``torch.utils.checkpoint``, as far as they may be;
or, where the plan says so, all that may be.

What draws random numbers unseen, or writes to memory from outside the region, would not be the same a second time: such
nodes run once, and the region is two regions around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.fx as fx

from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.ops.autograd_functions import custom_of


def recomputed(graph: fx.Graph, groups: Iterable[Sequence[str]]) -> dict[str, int]:
    """The checkpoint region of each node that is computed again, by name.

    Args:
        groups: names of nodes that share memory which one of them writes.
    """
    return _whole_groups(
        {n.name: region for n in graph.nodes if (region := origin_of(n).recompute) is not None and _repeats(n)}, groups
    )


def repeatable(graph: fx.Graph, groups: Iterable[Sequence[str]]) -> frozenset[str]:
    """The names of all nodes that may be computed again: a write to a buffer may not."""
    may = {n.name: 0 for n in graph.nodes if _repeats(n) and not origin_of(n).writes}
    return frozenset(_whole_groups(may, groups))


def _whole_groups(found: dict[str, int], groups: Iterable[Sequence[str]]) -> dict[str, int]:
    """The nodes without those whose group is not all in one region."""
    for group in groups:
        if len({found.get(name) for name in group}) > 1:
            for name in group:
                found.pop(name, None)
    return found


def _repeats(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or isinstance(node.target, FunctionLeaf):
        return False
    return custom_of(node.target) is None
