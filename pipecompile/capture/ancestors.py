"""Finds the nodes that other nodes of a graph are computed from."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes and everything they read, directly or indirectly."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
