"""The microbatches of a call, as a program starts with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipecompile.batching import Partial, scatter
from pipecompile.runtime import Microbatch
from pipecompile.runtime.batch import Batch


def microbatches_of(batch: Batch, drawn: Sequence[int | None]) -> list[Microbatch]:
    """The microbatches of a batch that run here, each with the seed of its random functions."""
    parts = scatter(batch.call, batch.rows, batch.compiled.run_before(batch.call), batch.division.before)
    microbatches = [Microbatch(part, seed) for part, seed in zip(parts, drawn, strict=True)]
    return microbatches[batch.here]


def from_loss(batch: Batch, loss: int, drawn: Sequence[int | None], scale: float) -> dict[int, Microbatch]:
    """The microbatches of a batch; each backward starts from its share of the loss's gradient ``scale``."""
    name = batch.division.places[str(batch.outputs[loss].node)]
    weights = batch.rows.weights if batch.joins[name] != Partial() else (1.0,) * len(batch.rows)
    parts = zip(microbatches_of(batch, drawn), weights[batch.here], strict=True)
    return {i: replace(part, seeds={name: weight * scale}) for i, (part, weight) in enumerate(parts)}


def each_from_loss(batch: Batch, loss: int, drawn: Sequence[int | None]) -> dict[int, Microbatch]:
    """The microbatches of a batch; each backward starts from the gradient 1 of its own loss."""
    name = str(batch.outputs[loss].node)
    return {i: replace(part, seeds={name: 1.0}) for i, part in enumerate(microbatches_of(batch, drawn))}
