"""Gathers the microbatches' values into the whole batch's value, and spreads its gradient over the microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipecompile.batching.rows import Rows
from pipecompile.batching.rules.batch_types import Batched, Kind, Partial, Shared
from pipecompile.errors import InputError


def gather(kind: Kind, parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """The whole batch's value, joined from the microbatches' values.

    Raises:
        InputError: the parts cannot be joined.
    """
    if len(parts) == 1 or isinstance(kind, Shared):
        return parts[0]
    match kind:
        case Batched(dim, outer):
            if outer == 1:
                return torch.cat(list(parts), dim)
            return torch.cat([torch.unflatten(part, dim, (outer, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)
        case Partial(mean):
            weighed = [part * weight for part, weight in zip(parts, rows.weights, strict=True)] if mean else parts
            return sum(weighed[1:], weighed[0])
    raise InputError(
        f"an output of shape {tuple(parts[0].shape)} has no batch dimension ({getattr(kind, 'why', kind)}), so the "
        f"results of {len(parts)} microbatches cannot be joined; use microbatches=1, or do not return it"
    )


def spread(kind: Kind, gradient: Tensor, parts: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """The gradient of each microbatch's part: the transpose of ``gather``."""
    if len(parts) == 1:
        return [gradient]
    match kind:
        case Batched(dim, outer):
            sizes = [part.shape[dim] // outer for part in parts]
            if outer == 1:
                return list(torch.split(gradient, sizes, dim))
            pieces = torch.split(torch.unflatten(gradient, dim, (outer, -1)), sizes, dim + 1)
            return [piece.flatten(dim, dim + 1) for piece in pieces]
        case Partial(mean=False):
            return [gradient] * len(parts)
    return [gradient * weight for weight in rows.weights]
