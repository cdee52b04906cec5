"""The seconds of a profile, shared among its distinct operations by their weight: what all calls like it take together.

Equal operations are timed once, so the time of one call of a block that is repeated 24 times counts 24 times in a plan,
and is worth 24 times the repeats. How many calls are alike is known from the trace; how long all others take, which are
still to come, is estimated from those that were timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.fx as fx
from torch import Tensor

from pipecompile.ops.symbols import expression
from pipecompile.ops.torch_internals import pytree
from pipecompile.profile.meters import ENOUGH

SECONDS = 0.5  # of timed runs; each operation is run at least as often as ``meters.REPEATS`` says


class Budget:
    """The seconds that are left for the operations of a graph.

    Args:
        nodes: the calls of the graph.
        seconds: the seconds of all timed runs.
    """

    def __init__(self, nodes: Iterable[fx.Node], seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._alike = Counter(map(_looks, nodes))
        self._calls = sum(self._alike.values())
        self._covered = 0  # calls like those that were timed
        self._weight = 0.0  # seconds of them

    def share(self, node: fx.Node) -> Callable[[float], float]:
        """The seconds for the runs of a node, as a function of the seconds of one."""
        alike = self._alike[_looks(node)]

        def of(seconds: float) -> float:
            weight = alike * seconds
            total = (self._weight + weight) * self._calls / (self._covered + alike)
            return min(ENOUGH, self.seconds * weight / total) if total else 0.0

        return of

    def spend(self, node: fx.Node, seconds: float) -> None:
        """Records the seconds of one call of a node."""
        alike = self._alike[_looks(node)]
        self._covered = min(self._covered + alike, self._calls)
        self._weight += alike * seconds


def _looks(node: fx.Node) -> Any:
    """What calls have in common that do the same on tensors of the same shapes, as far as the trace shows it."""
    read = tuple(shape for source in node.all_input_nodes for shape in _shapes(source.meta.get("val")))
    return node.op, node.target, read


def _shapes(value: Any) -> Iterator[tuple[Any, ...]]:
    yield from (tuple(map(expression, leaf.shape)) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
