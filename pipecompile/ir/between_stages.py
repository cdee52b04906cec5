"""What stages give each other, as it follows from the stage of each node.

    Channel   values that later stages read, skip connections included
    Tied      a parameter that several stages read
    Made      outputs that all processes get, if stages are in several

Replicas of a stage (see ``plan.py``) give what the stage gives, each to those that share a microbatch with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from pipecompile.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class Channel:
    """The values that one stage sends directly to another, skip connections included."""

    source: int  # stage
    target: int  # stage, greater than source
    values: tuple[int, ...] = ()  # node ids, ascending
    nbytes: int = 0  # per microbatch


@dataclass(frozen=True, slots=True)
class Tied:
    """A parameter that several stages read: the first stage owns it, the others hold a tied copy."""

    parameter: str
    stages: tuple[int, ...]  # ascending
    nbytes: int = 0  # of its gradient; 0 if it is not trained
    is_trained: bool = True

    @property
    def owner(self) -> int:
        return self.stages[0]

    @property
    def followers(self) -> tuple[int, ...]:
        return self.stages[1:]


@dataclass(frozen=True, slots=True)
class Made:
    """What the outputs that a stage makes have for all processes, if they are several.

    Attributes:
        nbytes: for each microbatch.
        once: for the batch.
    """

    stage: int
    nbytes: int = 0
    once: int = 0


def channels_of(graph: Graph, stage_of: Sequence[int | None]) -> tuple[Channel, ...]:
    """The channels between stages, without replicas, by source and target."""
    values: dict[tuple[int, int], list[int]] = {}
    for index, users in enumerate(graph.users):
        source = stage_of[index]
        if source is None:
            continue
        for target in sorted({stage_of[user] for user in users} - {source, None}):  # type: ignore[type-var]
            values.setdefault((source, target), []).append(index)  # type: ignore[arg-type]
    return tuple(
        Channel(source, target, tuple(nodes), sum(graph.nodes[i].nbytes for i in nodes))
        for (source, target), nodes in sorted(values.items())
    )


def for_replicas(channels: Sequence[Channel], run_by: Sequence[Sequence[int]]) -> tuple[Channel, ...]:
    """Repeats each channel for all pairs of replicas of its ends that share a microbatch."""
    each = [replace(c, source=s, target=t) for c in channels for s, t in meeting(run_by[c.source], run_by[c.target])]
    return tuple(sorted(each, key=lambda c: (c.source, c.target)))


def meeting(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pairs of replicas of two stages that run some microbatch in common."""
    common = gcd(len(sources), len(targets))
    for (i, source), (j, target) in product(enumerate(sources), enumerate(targets)):
        if i % common == j % common:
            yield source, target


def replicas_of(replica_of: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each stage, all stages that run its nodes, itself included, ascending."""
    run_by: dict[int, tuple[int, ...]] = {}
    for stage, original in enumerate(replica_of):
        run_by[original] = (*run_by.get(original, ()), stage)
    return tuple(run_by[original] for original in replica_of)


def tied_of(graph: Graph, stage_of: Sequence[int | None], run_by: Sequence[Sequence[int]]) -> tuple[Tied, ...]:
    """The parameters that several stages read."""
    stages: dict[str, set[int]] = {}
    for node, stage in zip(graph.nodes, stage_of, strict=True):
        for name in node.parameters:
            assert stage is not None, "a node with parameters has a stage"
            stages.setdefault(name, set()).update(run_by[stage])
    trained = {p.name: p.spec.requires_grad for p in graph.parameters}
    nbytes = {p.name: p.spec.nbytes * trained[p.name] for p in graph.parameters}
    tied = ((name, tuple(sorted(read))) for name, read in stages.items() if len(read) > 1)
    return tuple(Tied(name, read, nbytes[name], trained[name]) for name, read in tied)


def made_of(graph: Graph, stage_of: Sequence[int | None], run_by: Sequence[Sequence[int]]) -> tuple[Made, ...]:
    """The stages that make outputs for all processes, ascending."""
    nbytes: dict[int, list[int]] = {}
    for output in graph.shared_outputs:
        own = None if output.node is None else stage_of[output.node]
        size = 0 if output.node is None else graph.nodes[output.node].nbytes
        for stage in run_by[-1 if own is None else own]:  # a rematerialized output is made by the last stage
            found = nbytes.setdefault(stage, [0, 0])
            found[0] += size * (output.how == "joined")
            found[1] += size * (output.how == "once")
    return tuple(Made(stage, *sizes) for stage, sizes in sorted(nbytes.items()))
