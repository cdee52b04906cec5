"""Batch normalization: the only function that may mix samples in the body of a model.

Each microbatch is normalized by its own statistics, as in GPipe (Huang et al. 2019, section 2.2), and updates the
running statistics. Deferred, they are updated once per batch, as in GPipe, by the mean and variance of all rows: the
stages add up moments of the inputs, and the tail writes the statistics. The name is from torchgpipe (user guide,
"Deferred Batch Normalization").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from pipecompile.capture import Captured
from pipecompile.capture.origin import origin_of
from pipecompile.errors import CaptureError
from pipecompile.ops.functional import add_moments, moments
from pipecompile.ops.torch_internals import _BatchNorm

# The forms of batch normalization in a trace, with the names of their arguments.
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


def uses_batch_statistics(node: fx.Node) -> bool:
    """Whether a node is a batch normalization in training, or one without running statistics."""
    return node.target in _ARGUMENTS and bool(_given(node).get("training", False))


def norms(captured: Captured) -> tuple[fx.Node, ...]:
    """The calls that normalize by the statistics of a batch, among them those of modules kept whole."""
    nodes = captured.graph.nodes
    return tuple(node for node in nodes if uses_batch_statistics(node) or _is_kept_whole(captured, node))


def norms_kept_whole(captured: Captured) -> tuple[str, ...]:
    """The paths of batch normalizations that are kept whole: one without momentum reads its counter, by which it moves.

    Such a module normalizes by the statistics of each microbatch, and counts microbatches, as its own code does.
    """
    return tuple(str(node.target) for node in captured.graph.nodes if _is_kept_whole(captured, node))


def _is_kept_whole(captured: Captured, node: fx.Node) -> bool:
    """Whether a node calls a batch normalization of torch's and nothing else: no hooks, no forward of a subclass."""
    module = captured.model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, _BatchNorm) or getattr(module.forward, "__func__", None) is not _BatchNorm.forward:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (module.training or module.running_mean is None)


def defer_running(captured: Captured) -> Captured:
    """Moves every write of running statistics out of its batch normalization.

    Raises:
        CaptureError: the model itself reads running statistics.
    """
    if not any(map(_writes_running, captured.graph.nodes)):
        return captured
    _refuse_reads(captured)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    recomputed = dict(captured.recomputed)
    for node in captured.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if _writes_running(node):
            counted = _set_apart(graph, copy)
            if node.name in recomputed:
                recomputed[counted.name] = recomputed[node.name]
    return replace(captured, graph=graph, recomputed=recomputed, checked={})


def _refuse_reads(captured: Captured) -> None:
    """Raises ``CaptureError`` if the model itself reads running statistics, which are updated after all stages."""
    written = {name for node in captured.graph.nodes if _writes_running(node) for name in origin_of(node).writes}
    for node in captured.graph.nodes:
        readers = [user for user in node.users if not _writes_running(user)]
        if node.op == "get_attr" and str(node.target) in written and readers:
            raise CaptureError(
                f"{origin_of(readers[0])}: the model reads {node.target}, which batch_norm='deferred' updates only "
                f"after all stages; use batch_norm='microbatch' or microbatches=1"
            )


def _writes_running(node: fx.Node) -> bool:
    return node.target in _ARGUMENTS and bool(origin_of(node).writes)


def _set_apart(graph: fx.Graph, norm: fx.Node) -> fx.Node:
    """Replaces a batch normalization by one without running statistics, the moments of its input, and the write.

    Returns the node of the moments.
    """
    given = _given(norm)
    x, mean, var = given["input"], given["running_mean"], given["running_var"]
    norm.target, norm.args = F.batch_norm, (x, None, None)
    norm.kwargs = {name: given[name] for name in ("weight", "bias", "training", "momentum", "eps") if name in given}
    counted = graph.create_node("call_function", moments, (x,), name=f"{norm.name}_moments")
    write = (mean, var, counted, given.get("momentum", 0.1))
    written = graph.create_node("call_function", add_moments, write, name=f"{norm.name}_running")
    origin = origin_of(norm)
    for node in (counted, written):
        node.meta.update(norm.meta)
    norm.meta["origin"] = counted.meta["origin"] = replace(origin, writes=(), mutates=False)
    counted.meta["val"] = torch.empty((3, *mean.meta["val"].shape), dtype=torch.float64, device="meta")
    written.meta["val"] = mean.meta["val"]
    return counted


def _given(norm: fx.Node) -> dict[str, Any]:
    """The arguments of a batch normalization, by name."""
    return {**dict(zip(_ARGUMENTS[norm.target], norm.args, strict=False)), **norm.kwargs}
