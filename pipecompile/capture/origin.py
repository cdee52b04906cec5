"""Where a node comes from: the module whose forward made the call, the user's line, and the modes it ran in."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from pipecompile.ops.modes import PLAIN, Region


@dataclass(frozen=True, slots=True)
class Origin:
    """Kept in ``fx_node.meta["origin"]``.

    ``writes`` names the buffers and parameters that the node writes in place; such a node runs exactly once a
    microbatch. ``copies`` names those of which it writes a microbatch's copy. ``mutates`` says that it writes to an
    argument at all. ``recompute`` is the number of the checkpoint that the call stands in.
    """

    path: str = ""
    source: str = ""
    region: Region = PLAIN
    writes: tuple[str, ...] = ()
    mutates: bool = False
    recompute: int | None = None
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        module = f"module {self.path!r}" if self.path else "the model's own forward"
        return f"{module}, {self.source}" if self.source else module


def origin_of(node: fx.Node) -> Origin:
    """The origin recorded for a node; an empty one for what the tracer itself inserted."""
    origin = node.meta.get("origin")
    return origin if isinstance(origin, Origin) else Origin()
