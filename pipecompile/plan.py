"""Which stage each node belongs to, which rank runs each stage, and what crosses between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

from pipecompile.errors import PlanError
from pipecompile.graph import Cost, CostedGraph, Graph
from pipecompile.quality import Quality
from pipecompile.serial import Json


@dataclass(frozen=True, slots=True)
class Channel:
    """The values that one stage sends straight to another, skips included."""

    source: int  # stage
    target: int  # stage, greater than source
    values: tuple[int, ...] = ()  # node ids, ascending
    nbytes: int = 0  # of one microbatch


@dataclass(frozen=True, slots=True)
class Tied:
    """A parameter that several stages read: the first owns it, the others hold a replica."""

    parameter: str
    stages: tuple[int, ...]  # ascending

    @property
    def owner(self) -> int:
        return self.stages[0]

    @property
    def followers(self) -> tuple[int, ...]:
        return self.stages[1:]


@dataclass(frozen=True)
class Plan(Json):
    """Node to stage, stage to rank, and the channels between stages.

    Invariants, checked by ``validate``:
    1. each stage has a rank; one may be empty, where another capture of the model has nothing to do there;
    2. no value flows to an earlier stage: channels point forward, one per pair of stages;
    3. a replicated node has no stage (``None``), any other has one.
    """

    stage_of: tuple[int | None, ...]  # node -> stage
    rank_of: tuple[int, ...]  # stage -> rank; several stages may share one
    channels: tuple[Channel, ...] = ()
    tied: tuple[Tied, ...] = ()
    quality: Quality | None = None  # where it was searched for
    recomputed: tuple[int, ...] = ()  # stages whose backward computes their forward again, ascending

    def __post_init__(self) -> None:
        self.validate()

    @staticmethod
    def of(graph: Graph, stage_of: Sequence[int | None], rank_of: Sequence[int] | None = None) -> Plan:
        """The plan that an assignment of nodes to stages implies.

        Args:
            stage_of: a stage for each node; ignored for replicated ones.
            rank_of: a rank for each stage; by default one rank a stage.

        Raises:
            PlanError: a value would flow backward, or nodes that belong together are apart.
        """
        if len(stage_of) != len(graph):
            raise PlanError(f"{len(stage_of)} stages were given for {len(graph)} nodes")
        stages = tuple(None if node.replicated else stage for node, stage in zip(graph.nodes, stage_of, strict=True))
        for node, stage in zip(graph.nodes, stages, strict=True):
            if stage is None and not node.replicated:
                raise PlanError(f"node {node.name} ({node.path}) has no stage")
        for group in graph.together:
            if len({stages[i] for i in group} - {None}) > 1:
                names = ", ".join(f"{graph.nodes[i].name} in {stages[i]}" for i in group)
                raise PlanError(f"nodes that must share a stage are apart: {names}")
        num_stages = 1 + max((stage for stage in stages if stage is not None), default=0)
        ranks = tuple(range(num_stages)) if rank_of is None else tuple(rank_of)
        return Plan(stages, ranks, _channels(graph, stages), _tied(graph, stages))

    @staticmethod
    def chain(num_stages: int, rank_of: Sequence[int] | None = None, nbytes: int = 0) -> Plan:
        """Stages in a row without a graph: for schedules and simulations."""
        ranks = range(num_stages) if rank_of is None else rank_of
        return Plan((), tuple(ranks), tuple(Channel(s, s + 1, (), nbytes) for s in range(num_stages - 1)))

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @property
    def num_ranks(self) -> int:
        return 1 + max(self.rank_of)

    @cached_property
    def incoming(self) -> tuple[tuple[Channel, ...], ...]:
        """For each stage the channels that end in it, by source."""
        return tuple(
            tuple(sorted((c for c in self.channels if c.target == s), key=lambda c: c.source))
            for s in range(self.num_stages)
        )

    @cached_property
    def outgoing(self) -> tuple[tuple[Channel, ...], ...]:
        """For each stage the channels that start in it, by target."""
        return tuple(
            tuple(sorted((c for c in self.channels if c.source == s), key=lambda c: c.target))
            for s in range(self.num_stages)
        )

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """For each stage the number of stages on the longest path from it to a sink, itself included."""
        depth = [1] * self.num_stages
        for stage in reversed(range(self.num_stages)):
            for channel in self.outgoing[stage]:
                depth[stage] = max(depth[stage], 1 + depth[channel.target])
        return tuple(depth)

    def validate(self) -> None:
        """Raises ``PlanError`` at the first invariant that does not hold."""
        if not self.rank_of or min(self.rank_of) < 0:
            raise PlanError(f"ranks must be counted from 0, one for each stage; got {self.rank_of}")
        used = {stage for stage in self.stage_of if stage is not None}
        if not used <= set(range(self.num_stages)):
            raise PlanError(f"stages {sorted(used)} are used, but there are {self.num_stages} with a rank")
        pairs = [(channel.source, channel.target) for channel in self.channels]
        for source, target in pairs:
            if not 0 <= source < target < self.num_stages:
                raise PlanError(f"a value flows from stage {source} to stage {target}: stages must point forward")
        if not set(self.recomputed) <= set(range(self.num_stages)):
            raise PlanError(f"stages {self.recomputed} are to be computed again, but there are {self.num_stages}")
        if len(set(pairs)) != len(pairs):
            raise PlanError(f"more than one channel for a pair of stages: {sorted(pairs)}")

    def __str__(self) -> str:
        lines = [f"{self.num_stages} stages on {self.num_ranks} ranks"]
        lines += [f"  {self.quality}"] if self.quality else []
        for stage in range(self.num_stages):
            count = sum(1 for s in self.stage_of if s == stage)
            sends = ", ".join(f"{c.nbytes:,} B to {c.target}" for c in self.outgoing[stage])
            again = ", computed again in the backward" * (stage in self.recomputed)
            lines.append(
                f"  stage {stage} on rank {self.rank_of[stage]}: {count} nodes{again}" + (f"; {sends}" * bool(sends))
            )
        lines += [f"  {t.parameter} is tied over stages {', '.join(map(str, t.stages))}" for t in self.tied]
        return "\n".join(lines)


def members(graph: Graph, plan: Plan, stage: int) -> tuple[int, ...]:
    """The nodes that a stage runs, ascending: its own and the replicated ones they need; model inputs included."""
    last = plan.num_stages - 1
    needed = {i for i, s in enumerate(plan.stage_of) if s == stage}
    if stage == last:  # a replicated output is made by the last stage
        needed |= {i for i in graph.outputs if graph.nodes[i].replicated}
    stack = list(needed)
    while stack:
        for source in graph.nodes[stack.pop()].inputs:
            if graph.nodes[source].replicated and source not in needed:
                needed.add(source)
                stack.append(source)
    return tuple(sorted(needed))


def stage_costs(costed: CostedGraph, plan: Plan) -> tuple[Cost, ...]:
    """The cost of each stage for one microbatch, replicated nodes included; a parameter counts once a stage.

    The backward of a recomputed stage takes its forward's time too.
    """
    graph = costed.graph
    costs = []
    for stage in range(plan.num_stages):
        nodes = members(graph, plan, stage)
        total = reduce(Cost.__add__, (costed.costs[i] for i in nodes), Cost())
        names = {name for i in nodes for name in graph.nodes[i].parameters}
        parameter_bytes = sum(graph.parameter_bytes[name] for name in names)
        backward = total.backward + total.forward * (stage in plan.recomputed)
        costs.append(Cost(total.forward, backward, total.saved_bytes, parameter_bytes))
    return tuple(costs)


def _channels(graph: Graph, stage_of: Sequence[int | None]) -> tuple[Channel, ...]:
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


def _tied(graph: Graph, stage_of: Sequence[int | None]) -> tuple[Tied, ...]:
    stages: dict[str, set[int]] = {}
    for node, stage in zip(graph.nodes, stage_of, strict=True):
        for name in node.parameters:
            stages.setdefault(name, set()).add(stage)  # type: ignore[arg-type]
    return tuple(Tied(name, tuple(sorted(s))) for name, s in stages.items() if len(s) > 1)
