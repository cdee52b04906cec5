"""Joins the outputs of the microbatches, of all parts of the batch where a process needs it whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipecompile.batching import gather
from pipecompile.runtime import Microbatch
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.outputs import Outputs
from pipecompile.runtime.session import Session


@dataclass(frozen=True)
class Joined:
    """The outputs of all stages, of the whole batch where all processes need it, else of the part that runs here.

    Attributes:
        values: by name, in the order of ``Batch.joins``.
        parts: of values of the whole batch that was run in several parts: the value of each part, on the meta device.
    """

    values: Mapping[str, Tensor]
    parts: Mapping[str, Sequence[Tensor]]


def joined_of(
    session: Session, batch: Batch, microbatches: Mapping[int, Microbatch], outputs: Outputs | None
) -> Joined:
    """Joins the outputs of the microbatches.

    Args:
        outputs: from all processes, if they are several.
    """
    found = batch.join(microbatches) if outputs is None else outputs.found
    if batch.part is None:
        return Joined({name: found[name] for name in batch.joins}, {})
    parts = session.peers.of_all_parts({name: value for name, value in found.items() if name in batch.wanted})
    whole = {name: gather(batch.joins[name], values, batch.rows.by_part) for name, values in parts.items()}
    values = {name: whole[name].requires_grad_(found[name].requires_grad) for name in whole}
    shapes = {name: [value.detach().to("meta") for value in values] for name, values in parts.items()}
    return Joined({name: values.get(name, found[name]) for name in batch.joins}, shapes)
