"""A batch into microbatches, and their outputs back into one.

Batched tensors are cut along their first dimension into parts as equal as possible; all other arguments go to every
microbatch as they are. An output is joined along its batch dimension; one without (a loss, a metric) is a mean over the
samples, so the parts are weighed by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.capture import Call, Output
from pipecompile.errors import InputError


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of each microbatch; they add up to the batch."""

    counts: tuple[int, ...]

    @staticmethod
    def of(batch: int | None, microbatches: int) -> Rows:
        """As equal as possible, larger ones first; fewer microbatches if there are fewer rows."""
        if batch is None:
            return Rows((1,))
        parts = min(batch, microbatches)
        return Rows(tuple(batch // parts + (i < batch % parts) for i in range(parts)))

    @property
    def weights(self) -> tuple[float, ...]:
        """Each microbatch's share of the batch."""
        return tuple(count / sum(self.counts) for count in self.counts)

    def equal(self) -> Rows:
        """As many microbatches as there can be, no more than these, all of one size."""
        batch = sum(self.counts)
        parts = next(parts for parts in range(len(self), 0, -1) if batch % parts == 0)
        return Rows((batch // parts,) * parts)

    def __len__(self) -> int:
        return len(self.counts)


def scatter(call: Call, rows: Rows) -> list[dict[str, Tensor]]:
    """The input tensors of each microbatch, contiguous."""
    parts: list[dict[str, Tensor]] = [{} for _ in rows.counts]
    for name, tensor in call.tensors.items():
        pieces = torch.split(tensor, list(rows.counts)) if name in call.batched else [tensor] * len(rows)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.contiguous()
    return parts


def gather(output: Output, parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """One output of the whole batch from those of the microbatches.

    Raises:
        InputError: the output has neither a batch dimension nor is it a single number.
    """
    if len(parts) == 1:
        return parts[0]
    if output.batch_dim is not None:
        return torch.cat(list(parts), output.batch_dim)
    if output.is_scalar:
        return sum_weighted(parts, rows)
    if output.is_shared:
        return parts[0]
    raise InputError(
        f"output {output.name!r} of shape {tuple(parts[0].shape)} has no batch dimension, so the results of "
        f"{len(parts)} microbatches cannot be joined; use microbatches=1, or leave it out of the output"
    )


def sum_weighted(parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """The mean over samples of means over microbatches, added up in the microbatches' order."""
    total = parts[0] * rows.weights[0]
    for part, weight in zip(parts[1:], rows.weights[1:], strict=True):
        total = total + part * weight
    return total


def spread(output: Output, gradient: Tensor, rows: Rows) -> list[Tensor]:
    """The gradient of each microbatch's part of an output: the transpose of ``gather``."""
    if output.batch_dim is not None and len(rows) > 1:
        scale = gradient.shape[output.batch_dim] // sum(rows.counts)
        return list(torch.split(gradient, [count * scale for count in rows.counts], output.batch_dim))
    return [gradient * weight for weight in rows.weights]


def joined(outputs: Sequence[Output], parts: Sequence[Mapping[str, Tensor]], rows: Rows) -> dict[str, Tensor]:
    """Every output tensor of the whole batch, by node name."""
    named = {output.node: output for output in outputs if output.node is not None}
    return {name: gather(output, [part[name] for part in parts], rows) for name, output in named.items()}
