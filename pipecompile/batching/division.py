"""The parts of a divided model, and the form of a model that is not divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipecompile.batching.infer_batch_types import joined_by_hand
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed, Partial
from pipecompile.capture import Captured, Output
from pipecompile.ops.functional import valid_weight


@dataclass(frozen=True, slots=True)
class Before:
    """A value of the whole batch that the body reads as input ``name``.

    It is the value of a node, or the number (or class weight) of valid targets if the node is a cross entropy's target.
    """

    name: str
    node: str
    rows: Batched | None = None  # each microbatch has its own part of it
    count: tuple[int | str, str | None] | None = None  # ignore_index or its node, node with the classes' weights

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that it is computed from."""
        return (self.node, *(name for name in self.count or () if isinstance(name, str)))

    def value(self, values: Mapping[str, Any]) -> Tensor:
        """The value, computed from the nodes' values; a number becomes a tensor of shape ()."""
        if self.count is None:
            value = values[self.node]
            return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        ignored, weight = self.count
        index = values[ignored] if isinstance(ignored, str) else ignored
        return valid_weight(values[self.node], index, None if weight is None else values[weight])


@dataclass(frozen=True)
class Tail:
    """What runs once per batch: nodes of the whole batch's trace, in order.

    ``joined`` maps the name of a node in the trace to the name of its value in the body.
    """

    nodes: tuple[str, ...]
    joined: Mapping[str, str]
    outputs: tuple[str, ...]
    writes: tuple[str, ...]  # buffers
    weights: tuple[str, ...]  # parameters of two dimensions or more that it works with, and all of leaves
    why: tuple[str, ...]  # what mixes samples, and where


@dataclass(frozen=True)
class Division:
    """A captured model, divided.

    Attributes:
        captured: the trace of a microbatch.
        whole: the trace of the whole batch; the same trace if its batch is symbolic.
        body: the trace that is split into stages.
        joins: the kind of each output of the body, by which the microbatches' values are joined.
        places: for each output node of the model, its name among the outputs of the body or of the tail.
        reweighted: notes on means over the batch.
        tried: places of modules or functions whose samples stayed apart in an experiment.
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
    at_least: int = 1  # rows; it does not hold for smaller batches
    most_rows: int | None = None  # it does not hold for larger batches
    at_most: Mapping[Any, int] = field(default_factory=dict)  # sizes (symbols) up to which experiments have run
    norms_apart: bool = False  # batch normalization reads entries of a sample that are apart, such as several views
    one_part: bool = False  # it holds for batches of one microbatch only
    is_divided: bool = True  # microbatches are parts of a batch, not independent batches

    @property
    def wanted(self) -> frozenset[str]:
        """The outputs of the body that all processes need: scalars, what forward stores, and what the tail reads."""
        left = set(map(id, self.captured.left))
        needed = (output for output in self.captured.results if output.is_scalar or id(output) in left)
        places = (self.places[str(output.node)] for output in needed)
        return frozenset((*places, *(self.tail.joined.values() if self.tail else ())))

    def at_rows(self, rows: int) -> Division:
        """The same with another number of rows as the sample of a microbatch."""
        return self._mapped(lambda it: replace(it, microbatch=rows) if it.microbatch == self.body.microbatch else it)

    def without_values(self) -> Division:
        """The same without the values of the call that it was made from, whose memory the caller may need."""
        return self._mapped(lambda it: replace(it, call=it.call.without_values()))

    def _mapped(self, change: Callable[[Captured], Captured]) -> Division:
        given = {id(it): it for it in (self.captured, self.whole, self.body)}
        kept = {key: change(it) for key, it in given.items()}  # one trace stays one
        return replace(self, captured=kept[id(self.captured)], whole=kept[id(self.whole)], body=kept[id(self.body)])


def undivided(captured: Captured, out_dims: Mapping[str, int | None] | None = None, one_part: bool = False) -> Division:
    """A model whose microbatches are independent batches: scalar outputs become means weighted by rows.

    Args:
        out_dims: see ``analyse``.
        one_part: the trace holds for batches of one microbatch only.
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
    return Division(
        captured=captured,
        whole=captured,
        body=captured,
        joins=joins,
        before=(),
        tail=None,
        places=places,
        one_part=one_part,
        is_divided=False,
    )


def by_shape(output: Output) -> Kind:
    """The kind of an output if microbatches are independent batches."""
    if output.batch_dim is not None:
        return Batched(output.batch_dim)
    if output.is_shared:
        return SHARED
    if output.is_scalar:
        return Partial(mean=True)
    return Mixed(f"output {output.name!r} has no batch dimension")
