"""What nodes of a graph are computed from."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes themselves, and all that they read, directly or not."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
