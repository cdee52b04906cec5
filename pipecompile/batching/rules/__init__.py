"""What each function makes of the kinds of its arguments."""

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
