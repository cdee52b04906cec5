"""Finds the dimension along which the microbatches of an output are joined.

If the batch size is a symbol, it is the dimension that contains the symbol. If the trace fixed the batch size, another
dimension may have the same size by chance; a second trace, of the whole batch, shows which dimension grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor

from pipecompile.capture.captured import Captured, Output
from pipecompile.ops.symbols import Shapes, resolve


def batch_dim(tensor: Tensor, batch: Any, shapes: Shapes | None) -> int | None:
    """Returns the only dimension of an output that grows with the batch, or None.

    Args:
        tensor: The output, in the trace.
        batch: The size of the batch in the trace: an expression or a number; None if there is no batch.
        shapes: What the trace has decided about sizes.
    """
    if batch is None:
        return None
    if isinstance(batch, sympy.Basic) and shapes is not None:
        batch = shapes.replace(batch)
    dims = [dim for dim, size in enumerate(tensor.shape) if _grows(size, batch)]
    if isinstance(batch, sympy.Basic) and batch.free_symbols:
        return dims[0] if len(dims) == 1 else None
    return 0 if dims and dims[0] == 0 else None


def _grows(size: int | torch.SymInt, batch: Any) -> bool:
    """Whether a size contains the batch symbol; for a batch of fixed size, whether it is equal."""
    if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
        return bool(size.node.expr.free_symbols & getattr(batch, "free_symbols", set()))
    return bool((size.node.expr if isinstance(size, torch.SymInt) else size) == batch)


def with_batch_dims(captured: Captured, whole: Callable[[], Captured]) -> Captured:
    """Returns the capture with the batch dimension of its outputs set, if there is more than one microbatch.

    Args:
        captured: The capture of a microbatch.
        whole: Captures the whole batch, with all sizes fixed.
    """
    batch = captured.call.batch
    if batch is None or batch == captured.microbatch or not captured.is_fixed:
        return captured
    try:
        other = whole()
    except Exception:  # it can only be traced at the size of a microbatch: keep the dimensions that have this size
        return captured
    grown = {output.name: _shape(other, output) for output in (*other.outputs, *other.left)}

    def settled(outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        shapes = [(output, _shape(captured, output), grown.get(output.name, ())) for output in outputs]
        return tuple(replace(output, batch_dim=_growing(a, b, captured.microbatch, batch)) for output, a, b in shapes)

    return replace(captured, outputs=settled(captured.outputs), left=settled(captured.left))


def _shape(captured: Captured, output: Output) -> tuple[int, ...]:
    nodes: dict[str, Any] = {node.name: node.meta.get("val") for node in captured.graph.nodes}
    value = nodes.get(output.node or "")
    return tuple(resolve(size, captured.sample_sizes) for size in value.shape) if isinstance(value, Tensor) else ()


def _growing(part: tuple[int, ...], whole: tuple[int, ...], rows: int, batch: int) -> int | None:
    """Returns the one dimension that grows with the rows from a microbatch to the whole batch, or None."""
    if len(part) != len(whole):
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(part, whole, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 and part[grown[0]] * batch == whole[grown[0]] * rows else None
