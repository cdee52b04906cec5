"""The origin of a node: the module whose forward made the call, the user's source line, and the modes it ran in."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from pipecompile.ops.modes import PLAIN, Region


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a node, stored in ``fx_node.meta["origin"]``.

    Attributes:
        path: Path of the module.
        source: Source line, ``file:line``.
        region: Modes that the call ran in.
        writes: Buffers and parameters that the node writes in place; it runs exactly once per microbatch.
        mutates: Whether it writes to any argument.
        recompute: Number of the checkpoint around the call.
        copies: Buffers and parameters of which it writes the microbatch's copy.
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
    """Returns the origin recorded for a node; an empty one for nodes that the tracer inserted."""
    origin = node.meta.get("origin")
    return origin if isinstance(origin, Origin) else Origin()
