"""Extracts from a trace what computes the values that Python read, so that each call can check them first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.evaluate import META_TO_CPU
from pipecompile.capture.input_reads import Read
from pipecompile.capture.origin import origin_of
from pipecompile.capture.scopes import Scopes
from pipecompile.errors import DependsOnData
from pipecompile.ops.device_args import retarget
from pipecompile.ops.module_tree import owner_of
from pipecompile.ops.names import in_code, in_graph_module, in_model


def extract_reads(reads: Sequence[Read], graph: fx.Graph, attribute: Callable[[str], Tensor]) -> fx.GraphModule | None:
    """Returns a module that computes the values from the inputs of the graph; None if Python read nothing.

    Args:
        reads: What Python read.
        graph: The graph of the trace; its placeholders are those of the module.
        attribute: Returns the real tensor for a ``get_attr`` name.
    """
    if not reads:
        return None
    wanted = [read.node for read in reads]
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = ancestors(wanted)
    for node in graph.nodes:
        if node in needed:
            copies[node] = copy = part.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                copy.target = copy.name  # an argument of the code, that no other node has
            if node.op == "get_attr":
                copy.target = in_code(in_graph_module(str(node.target)))
            copy.args, copy.kwargs = retarget(copy.args, *META_TO_CPU), retarget(copy.kwargs, *META_TO_CPU)
    part.output(tuple(copies[node] for node in wanted))
    root = nn.Module()
    for name in dict.fromkeys(str(node.target) for node in part.nodes if node.op == "get_attr"):
        owner, last = owner_of(root, name)
        owner.register_buffer(last, attribute(in_model(name)))
    return fx.GraphModule(root, part)


def refuse_moving_reads(reads: Sequence[Read], graph: fx.Graph, scopes: Scopes) -> None:
    """Raises ``DependsOnData`` if a guard depends on a buffer that each microbatch changes.

    The module that reads it becomes the innermost of ``scopes``, as if the read itself had failed.
    """
    written = {name for node in graph.nodes for name in origin_of(node).writes}
    for read in (read.node for read in reads):
        moving = [n for n in ancestors([read]) if n.op == "get_attr" and str(n.target) in written]
        if moving:
            scopes.paths.append(origin_of(read).path)
            raise DependsOnData(
                f"{origin_of(read)}: the model's Python reads buffer {moving[0].target!r}, which its forward "
                f"changes; keep the module whole with leaf_modules="
            )
