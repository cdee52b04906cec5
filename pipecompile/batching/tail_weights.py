"""The weights that a tail works with.

What follows the first function that mixes samples runs once on the whole batch, behind the stages, on the last device.
That is exact, however much it is, and no pipeline if it is most of the model. So a tail with more than a third of the
weights is refused. A weight that is transformed before it meets the batch (``w.t()``, a weight normalization) is not
counted: a stage transforms it, and the tail has the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.fx as fx
from torch import nn

from pipecompile.capture import Captured
from pipecompile.capture.origin import origin_of

MOST = 1 / 3  # of the model's weights: with more, too little is left to the stages


def weights_of(captured: Captured, nodes: Iterable[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """The names of the weights that nodes work with: parameters of two dimensions or more, and all those of a leaf."""
    parameters = _parameters(captured)
    found = {node: _read(captured, node, parameters) for node in nodes}
    return {
        node: tuple(name for name in names if node.op == "call_module" or parameters[name].ndim >= 2)
        for node, names in found.items()
        if names
    }


def share_of_weights(captured: Captured, names: Iterable[str]) -> float:
    """The entries of some parameters, as a part of those of all parameters that the graph reads."""
    parameters = _parameters(captured)
    read = {name for node in captured.graph.nodes for name in _read(captured, node, parameters)}
    sizes = {id(parameters[name]): parameters[name].numel() for name in read}
    return sum(sizes[key] for key in {id(parameters[name]) for name in names}) / max(1, sum(sizes.values()))


def _parameters(captured: Captured) -> dict[str, nn.Parameter]:
    return dict(captured.model.named_parameters(remove_duplicate=False))


def _read(captured: Captured, node: fx.Node, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """The parameters that a node reads, but does not write."""
    if node.op == "call_module":
        return captured.leaf_parameters(str(node.target))
    read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return tuple(name for name in read if name in parameters and name not in origin_of(node).writes)
