"""The loss among the outputs of a capture, and captures that compute nothing else (``outputs="loss"``)."""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from pipecompile.capture.captured import Captured, Output
from pipecompile.capture.purity import must_stay
from pipecompile.errors import InputError


def could_be_losses(captured: Captured) -> list[str]:
    """Returns the names of the scalar outputs that require a gradient."""
    tensors = [output for output in captured.outputs if output.node is not None]
    return [o.name or str(i) for i, o in enumerate(tensors) if o.is_scalar and o.requires_grad]


def find_loss(captured: Captured, name: str | None) -> int | None:
    """Returns the position of the loss among the outputs' tensors; None if the caller computes it.

    The loss is the output called ``name``, else "loss", else the only scalar output that requires a gradient. With
    several such outputs the caller combines them, so backwards wait for their gradients.

    Raises:
        InputError: ``name`` is not a scalar output that requires a gradient.
    """
    tensors = [output for output in captured.outputs if output.node is not None]
    losses = [i for i, output in enumerate(tensors) if output.is_scalar and output.requires_grad]
    wanted = name or "loss"
    named = [i for i, output in enumerate(tensors) if output.name == wanted]
    if named and named[0] in losses:
        return named[0]
    if name is not None:
        names = ", ".join(output.name for output in tensors)
        raise InputError(
            f"loss_output={name!r} must be a scalar output that requires a gradient; the outputs are {names}"
        )
    return losses[0] if len(losses) == 1 else None


def with_only_the_loss(captured: Captured, name: str | None) -> Captured:
    """Returns a capture whose graph computes the loss, and what forward stores; other tensors become None.

    A capture that computes no loss is returned as it is. The graph is changed in place.

    Raises:
        InputError: several outputs could be the loss.
    """
    several = could_be_losses(captured)
    position = find_loss(captured, name) if several else None
    if position is None and several:
        raise InputError(
            f"outputs='loss' needs to know the loss, but outputs {', '.join(several)} could each be it; name it with "
            f"loss_output="
        )
    if position is None:
        return captured
    loss = [output for output in captured.outputs if output.node is not None][position].node
    outputs = tuple(_dropped(output) if output.node not in (None, loss) else output for output in captured.outputs)
    _prune(captured.graph, [str(it.node) for it in (*outputs, *captured.left) if it.node is not None])
    alive = {node.name for node in captured.graph.nodes}
    groups = (tuple(n for n in group if n in alive) for group in captured.groups)
    returns = ((path, tuple(n if n in alive else None for n in nodes)) for path, nodes in captured.returns)
    return replace(
        captured,
        outputs=outputs,
        groups=tuple(group for group in groups if len(group) > 1),
        recomputed={name: number for name, number in captured.recomputed.items() if name in alive},
        returns=tuple(returns),
    )


def _dropped(output: Output) -> Output:
    return Output(output.name, None, is_dropped=True)


def _prune(graph: fx.Graph, kept: list[str]) -> None:
    """Lets a graph return only the nodes ``kept``, and removes what only others need."""
    nodes = {node.name: node for node in graph.nodes}
    (end,) = graph.find_nodes(op="output")
    end.args = (tuple(nodes[name] for name in kept),)
    graph.eliminate_dead_code(is_impure_node=must_stay)
