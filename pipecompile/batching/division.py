"""What a captured model is divided into, and what holds where it is not divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipecompile.batching.infer_batch_types import joined_by_hand
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed, Partial
from pipecompile.capture import Captured, Output
from pipecompile.ops.functional import valid_weight

SHARE = "share_of_rows"  # the body's input with a microbatch's share of the batch


@dataclass(frozen=True, slots=True)
class Before:
    """A value of the whole batch that the body reads as input ``name``: that of a node, or what the node, as targets
    of a cross entropy, is counted to."""

    name: str
    node: str
    rows: Batched | None = None  # each microbatch has its own part of it
    count: tuple[int | str, str | None] | None = None  # ignore_index or its node, node with the classes' weights

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose values it is made from."""
        return (self.node, *(name for name in self.count or () if isinstance(name, str)))

    def value(self, values: Mapping[str, Any]) -> Tensor:
        """The value, from those of the nodes; a number becomes a tensor without dimensions."""
        if self.count is None:
            return torch.as_tensor(values[self.node])
        ignored, weight = self.count
        index = values[ignored] if isinstance(ignored, str) else ignored
        return valid_weight(values[self.node], index, None if weight is None else values[weight])


@dataclass(frozen=True)
class Tail:
    """What runs once for a batch: nodes of the whole batch's trace, in order.

    ``joined`` are values of the body, by their names in the trace, under their names in the body.
    """

    nodes: tuple[str, ...]
    joined: Mapping[str, str]
    outputs: tuple[str, ...]
    writes: tuple[str, ...]  # buffers
    why: tuple[str, ...]  # what mixes samples, and where


@dataclass(frozen=True)
class Division:
    """A captured model, divided.

    Attributes:
        captured: the trace at a microbatch.
        whole: the trace that holds for the whole batch; the same where its batch is symbolic.
        body: the trace that the stages are made of.
        joins: how the microbatches' values of each of the body's outputs make the whole batch's.
        places: for each node among the model's outputs its name among the body's or the tail's outputs.
        reweighted: lines about means over the batch.
        tried: what was tried out.
    """

    captured: Captured
    whole: Captured
    body: Captured
    joins: Mapping[str, Kind]
    before: tuple[Before, ...]
    tail: Tail | None
    places: Mapping[str, str]
    reweighted: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    at_least: int = 1  # rows of a batch that it holds for
    at_most: Mapping[Any, int] = field(default_factory=dict)  # sizes (symbols) of what something was tried out on
    one_part: bool = False  # for a batch that is one microbatch
    is_divided: bool = True  # microbatches are parts of a batch, not batches of their own


def undivided(captured: Captured, out_dims: Mapping[str, int | None] | None = None, one_part: bool = False) -> Division:
    """A model whose microbatches are batches of their own: single numbers are means weighed by rows.

    Args:
        out_dims: see ``analyse``.
        one_part: the trace holds for batches of one microbatch alone.
    """
    said = {node.name: dim for node, (_, dim) in joined_by_hand(captured, out_dims or {}).items()}
    joins: dict[str, Kind] = {}
    for output in captured.results:
        name = str(output.node)
        if name in said:
            dim = said[name]
            joins[name] = SHARED if dim is None else Batched(dim)
        else:
            joins.setdefault(name, by_shape(output))
    places = {name: name for name in joins}
    return Division(captured, captured, captured, joins, (), None, places, one_part=one_part, is_divided=False)


def by_shape(output: Output) -> Kind:
    """How an output is joined where microbatches are batches of their own."""
    if output.batch_dim is not None:
        return Batched(output.batch_dim)
    if output.is_shared:
        return SHARED
    if output.is_scalar:
        return Partial(mean=True)
    return Mixed(f"output {output.name!r} has no batch dimension")
