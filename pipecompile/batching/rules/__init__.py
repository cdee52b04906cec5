"""Batching rules: the kind of a function's result, from the kinds of its operands.

The docstring of a rule gives shapes: ``(..., batch, ...)`` has the batch in one dimension, ``(...)`` has no batch, and
``sum (...)`` is a sum over the batch of which each microbatch computes its part. ``()`` as the result of a loss is such
a sum too. Where samples mix, the value can only be computed from the whole batch.
"""

from __future__ import annotations

from pipecompile.batching.rules import elementwise, indexing, losses, nn_ops, reductions, shape_ops
from pipecompile.batching.rules.use import (
    RULES,
    Answer,
    Edit,
    Edited,
    Instead,
    Recount,
    RowsArgument,
    Share,
    ShareArgument,
    Squeeze,
    Use,
    WholeArgument,
)

__all__ = [
    "RULES", "Answer", "Edit", "Edited", "Instead", "Recount", "RowsArgument", "Share", "ShareArgument", "Squeeze",
    "Use", "WholeArgument", "elementwise", "indexing", "losses", "nn_ops", "reductions", "shape_ops",
]  # fmt: skip
