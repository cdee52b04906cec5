"""The stage of each node, the rank of each stage, and the values sent between stages.

A stage may have *replicas*: further stages that run the same nodes. Microbatches are distributed to them round-robin,
and the replica that runs a microbatch forward also runs it backward. To schedules, programs and the runtime a replica
is a stage like any other, with channels to all stages that its microbatches come from and go to. Its parameters are
tied.

Source: PipeDream (Narayanan et al., SOSP 2019), sections 3.1 and 3.2 (1F1B-RR).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from html import escape
from itertools import pairwise
from math import ceil, gcd, lcm

from pipecompile.errors import PlanError
from pipecompile.ir.between_stages import (
    Channel,
    Made,
    Tied,
    channels_of,
    for_replicas,
    made_of,
    meeting,
    replicas_of,
    tied_of,
)
from pipecompile.ir.graph import Cost, CostedGraph, Graph
from pipecompile.ir.json_io import Json
from pipecompile.ir.plan_quality import Quality
from pipecompile.ir.plan_times import Times


@dataclass(frozen=True)
class Plan(Json):
    """The stage of each node, the rank of each stage, and the channels between stages.

    Printed, it names the nodes and the bytes of each stage:

        >>> print(Plan.chain(2))
        2 stages on 2 ranks
          stage 0 on rank 0: 0 nodes; 0 B to 1
          stage 1 on rank 1: 0 nodes

    Attributes:
        stage_of: for each node its stage, or None if it is rematerialized.
        rank_of: for each stage its rank; several stages may share one.
        channels: what a stage sends directly to another, with its bytes per microbatch.
        tied: parameters that several stages read; the first of them owns it.
        quality: the bottleneck, its lower bound and the seconds of the search; None if they are not known.
        recomputed: the stages that recompute their activations in the backward, ascending.
        replica_of: for each stage, the stage whose nodes it runs; without replicas, itself.
        offloaded: the stages whose activations are in the host's memory between the passes, where the order of a
            schedule leaves time for it, ascending; none of them recomputes.
        made: the stages that make outputs, if stages are in several processes, which all get these outputs.
        times: that the plan was made for, if its schedule adapts to them; equal plans may have others.

    Source: PipeDream (Narayanan et al., SOSP 2019), sections 3.1 and 3.2.

    Invariants, checked by ``validate``:

    1. each stage has a rank; a stage may be empty if another capture of the model has no nodes for it;
    2. no value flows to an earlier stage: channels point forward, one per pair of stages;
    3. a rematerialized node has no stage (``None``), any other node has one that is not a replica;
    4. the replicas of a stage come directly after it, and have the same channels.
    """

    stage_of: tuple[int | None, ...]  # node -> stage
    rank_of: tuple[int, ...]  # stage -> rank; several stages may share one
    channels: tuple[Channel, ...] = ()
    tied: tuple[Tied, ...] = ()
    quality: Quality | None = None  # None if it is not known
    recomputed: tuple[int, ...] = ()  # stages that recompute activations in the backward, ascending
    replica_of: tuple[int, ...] = ()  # stage -> the stage whose nodes it runs; empty: itself for every stage
    offloaded: tuple[int, ...] = ()  # stages whose activations go to the host between the passes, ascending
    made: tuple[Made, ...] = ()  # by stages that make outputs, if these are in several processes, ascending
    times: Times | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replica_of", self.replica_of or tuple(range(len(self.rank_of))))
        self.validate()

    @staticmethod
    def of(
        graph: Graph,
        stage_of: Sequence[int | None],
        rank_of: Sequence[int] | None = None,
        replica_of: Sequence[int] = (),
    ) -> Plan:
        """The plan that follows from an assignment of nodes to stages.

        Args:
            graph: the nodes.
            stage_of: a stage per node; ignored for rematerialized nodes.
            rank_of: a rank per stage; by default each stage has its own.
            replica_of: for each stage, the stage whose nodes it runs (see ``with_replicas``); by default itself.

        Raises:
            PlanError: a value would flow backward, nodes that must share a stage do not, or a stage with replicas
                writes a buffer for each microbatch.
        """
        if len(stage_of) != len(graph):
            raise PlanError(f"{len(stage_of)} stages were given for {len(graph)} nodes")
        stages = tuple(
            None if node.rematerialized else stage for node, stage in zip(graph.nodes, stage_of, strict=True)
        )
        for node, stage in zip(graph.nodes, stages, strict=True):
            if stage is None and not node.rematerialized:
                raise PlanError(f"node {node.name} ({node.path}) has no stage")
        for group in graph.together:
            if len({stages[i] for i in group} - {None}) > 1:
                names = ", ".join(f"{graph.nodes[i].name} in {stages[i]}" for i in group)
                raise PlanError(f"nodes that must share a stage are in different ones: {names}")
        num_stages = len(replica_of) or 1 + max((stage for stage in stages if stage is not None), default=0)
        ranks = tuple(range(num_stages)) if rank_of is None else tuple(rank_of)
        run_by = replicas_of(replica_of or range(num_stages))
        _refuse_writers(graph, stages, run_by)
        channels = for_replicas(channels_of(graph, stages), run_by)
        tied, made = tied_of(graph, stages, run_by), made_of(graph, stages, run_by)
        return Plan(stages, ranks, channels, tied, replica_of=tuple(replica_of), made=made)

    @staticmethod
    def chain(
        num_stages: int, rank_of: Sequence[int] | None = None, nbytes: int = 0, replicas: Sequence[int] = ()
    ) -> Plan:
        """A chain of stages without a graph, for schedules and simulations.

        Args:
            num_stages: of the chain, replicas not included.
            rank_of: a rank per stage and replica; by default each has its own.
            nbytes: the bytes that each stage sends to the next, per microbatch.
            replicas: the number of devices of each stage; by default one.
        """
        replica_of = with_replicas(replicas or (1,) * num_stages)
        ranks = range(len(replica_of)) if rank_of is None else rank_of
        firsts = sorted(set(replica_of))
        channels = tuple(Channel(*pair, (), nbytes) for pair in pairwise(firsts))
        run_by = replicas_of(replica_of)
        return Plan((), tuple(ranks), for_replicas(channels, run_by), replica_of=replica_of)

    def on_ranks(self, ranks: Sequence[int]) -> Plan:
        """The same plan with ranks renamed: ``ranks[0]`` in place of rank 0, and so on."""
        return replace(self, rank_of=tuple(ranks[rank] for rank in self.rank_of))

    @property
    def num_stages(self) -> int:
        """The number of stages, replicas and empty ones included."""
        return len(self.rank_of)

    @property
    def tied_by_model(self) -> tuple[Tied, ...]:
        """The tied parameters that are read by stages with different nodes, not only by replicas of one stage."""
        return tuple(t for t in self.tied if len({self.replica_of[stage] for stage in t.stages}) > 1)

    def pace(self, seconds: Sequence[float]) -> float:
        """Seconds per microbatch of the busiest rank; replicas take microbatches in turn.

        Args:
            seconds: of each stage per microbatch.
        """
        ranks = [0.0] * self.num_ranks
        for rank, each, group in zip(self.rank_of, seconds, self.replicas, strict=True):
            ranks[rank] += each / len(group)
        return max(ranks)

    @property
    def num_ranks(self) -> int:
        """One more than the largest rank."""
        return 1 + max(self.rank_of)

    @cached_property
    def incoming(self) -> tuple[tuple[Channel, ...], ...]:
        """For each stage, the channels that end in it, by source."""
        found: list[list[Channel]] = [[] for _ in range(self.num_stages)]
        for channel in sorted(self.channels, key=lambda c: c.source):
            found[channel.target].append(channel)
        return tuple(map(tuple, found))

    @cached_property
    def outgoing(self) -> tuple[tuple[Channel, ...], ...]:
        """For each stage, the channels that start in it, by target."""
        found: list[list[Channel]] = [[] for _ in range(self.num_stages)]
        for channel in sorted(self.channels, key=lambda c: c.target):
            found[channel.source].append(channel)
        return tuple(map(tuple, found))

    def makers(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank that make outputs, ascending, if stages are in several processes."""
        return tuple(it.stage for it in self.made if self.rank_of[it.stage] == rank)

    def shared_bytes(self, rank: int, microbatches: int) -> int:
        """The bytes of the outputs that a rank makes from so many microbatches, for all processes."""
        return sum(it.nbytes * microbatches + it.once for it in self.made if self.rank_of[it.stage] == rank)

    @cached_property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, all stages that run its nodes, itself included, ascending."""
        return replicas_of(self.replica_of)

    def runner(self, stage: int, microbatch: int) -> int:
        """The replica of a stage that runs a microbatch (round-robin)."""
        group = self.replicas[stage]
        return group[microbatch % len(group)]

    def last_run(self, stage: int, microbatch: int) -> int | None:
        """The last microbatch up to ``microbatch`` that a stage runs, or None."""
        group = self.replicas[stage]
        last = microbatch - (microbatch - group.index(stage)) % len(group)
        return last if last >= 0 else None

    def runs(self, stage: int, microbatch: int) -> bool:
        """Whether a stage runs a microbatch."""
        return self.runner(stage, microbatch) == stage

    def sources(self, stage: int, microbatch: int) -> tuple[int, ...]:
        """The stages that a stage receives a microbatch's values from, ascending."""
        turns = self._source_turns[stage]
        return turns[microbatch % len(turns)]

    def targets(self, stage: int, microbatch: int) -> tuple[int, ...]:
        """The stages that a stage sends a microbatch's values to, ascending."""
        turns = self._target_turns[stage]
        return turns[microbatch % len(turns)]

    @cached_property
    def _source_turns(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(self._turns([c.source for c in channels]) for channels in self.incoming)

    @cached_property
    def _target_turns(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(self._turns([c.target for c in channels]) for channels in self.outgoing)

    def _turns(self, stages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Those of some stages that run each microbatch, until it begins again."""
        period = lcm(*(len(self.replicas[stage]) for stage in stages))
        return tuple(tuple(s for s in stages if self.runs(s, k)) for k in range(period))

    def shared(self, channel: Channel, count: int) -> int:
        """The most of ``count`` consecutive microbatches of a channel's source that can go through the channel."""
        source, target = len(self.replicas[channel.source]), len(self.replicas[channel.target])
        return ceil(count * gcd(source, target) / target)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """For each stage, the number of stages on the longest path from it to a sink, itself included.

        That many microbatches keep the path busy. A stage with r replicas counts r for itself, and rounds the depth
        behind it up to a multiple of r, so that each replica has as many microbatches.
        """
        depth = [0] * self.num_stages
        for stage in reversed(range(self.num_stages)):
            count = len(self.replicas[stage])
            behind = max((depth[channel.target] for channel in self.outgoing[stage]), default=0)
            depth[stage] = count * (1 + ceil(behind / count))
        return tuple(depth)

    def validate(self) -> None:
        """Raises ``PlanError`` at the first invariant that does not hold."""
        if not self.rank_of or min(self.rank_of) < 0:
            raise PlanError(f"each stage needs a rank, counted from 0; got {self.rank_of}")
        for stage, original in enumerate(self.replica_of):
            if original != stage and (stage == 0 or original != self.replica_of[stage - 1]):
                raise PlanError(
                    f"stage {stage} is a replica of stage {original}, so it must come directly after it; got "
                    f"{self.replica_of}"
                )
        if len(self.replica_of) != self.num_stages:
            raise PlanError(
                f"{self.num_stages} stages have a rank, but replica_of has {len(self.replica_of)}: {self.replica_of}"
            )
        used = {stage for stage in self.stage_of if stage is not None}
        if not used <= set(self.replica_of):
            raise PlanError(
                f"nodes are in stages {sorted(used)}, but the plan has stages {sorted(set(self.replica_of))}"
            )
        pairs = [(channel.source, channel.target) for channel in self.channels]
        for source, target in pairs:
            if not 0 <= source < target < self.num_stages:
                raise PlanError(
                    f"a value flows from stage {source} to stage {target}, but values must flow to later stages"
                )
        if not set(self.recomputed) <= set(range(self.num_stages)):
            raise PlanError(f"recomputed={self.recomputed} must name stages below {self.num_stages}")
        if not set(self.offloaded) <= set(range(self.num_stages)) - set(self.recomputed):
            raise PlanError(
                f"offloaded={self.offloaded} must name stages below {self.num_stages} that do not recompute their "
                f"activations, as {self.recomputed} do"
            )
        if len(set(pairs)) != len(pairs):
            raise PlanError(f"a pair of stages has more than one channel: {sorted(pairs)}")
        due = {ends for s, t in pairs for ends in meeting(self.replicas[s], self.replicas[t])}
        if missing := sorted(due - set(pairs)):
            raise PlanError(
                f"replicas must have the channels of their stage, but {missing[0]} is not in {sorted(pairs)}"
            )

    def __str__(self) -> str:
        lines = [f"{self.num_stages} stages on {self.num_ranks} ranks"]
        lines += [f"  {self.quality}"] if self.quality else []
        for stage, original in enumerate(self.replica_of):
            count = sum(1 for s in self.stage_of if s == original)
            sends = ", ".join(f"{c.nbytes:,} B to {c.target}" for c in self.outgoing[stage])
            again = ", activations recomputed in the backward" if stage in self.recomputed else ""
            again += ", activations offloaded to the host" if stage in self.offloaded else ""
            like = f", a replica of stage {original}" if original != stage else ""
            lines.append(
                f"  stage {stage} on rank {self.rank_of[stage]}: {count} nodes{like}{again}"
                + (f"; {sends}" if sends else "")
            )
        lines += [f"  {t.parameter} is tied across stages {', '.join(map(str, t.stages))}" for t in self.tied_by_model]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same text, for notebooks."""
        return f"<pre>{escape(str(self))}</pre>"


def with_replicas(counts: Sequence[int]) -> tuple[int, ...]:
    """``Plan.replica_of`` for the number of replicas of each stage, itself included: (1, 2, 1) gives (0, 1, 1, 3).

    Raises:
        PlanError: a count is less than one.
    """
    if min(counts, default=1) < 1:
        raise PlanError(f"each stage must have at least one replica (the stage itself); got {tuple(counts)}")
    return tuple(sum(counts[:stage]) for stage, count in enumerate(counts) for _ in range(count))


def members(graph: Graph, plan: Plan, stage: int) -> tuple[int, ...]:
    """The nodes that a stage runs, ascending: its own, and the rematerialized nodes and model inputs that they read."""
    original, last = plan.replica_of[stage], plan.replica_of[-1]
    needed = {i for i, s in enumerate(plan.stage_of) if s == original}
    if original == last:  # a rematerialized output is made by the last stage
        needed |= {i for i in graph.outputs if graph.nodes[i].rematerialized}
    stack = list(needed)
    while stack:
        for source in graph.nodes[stack.pop()].inputs:
            if graph.nodes[source].rematerialized and source not in needed:
                needed.add(source)
                stack.append(source)
    return tuple(sorted(needed))


def stage_costs(costed: CostedGraph, plan: Plan) -> tuple[Cost, ...]:
    """The cost of each stage per microbatch, rematerialized nodes included. A parameter counts once per stage.

    The backward of a recomputed stage includes the time of its forward.
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


def _refuse_writers(graph: Graph, stage_of: Sequence[int | None], run_by: Sequence[Sequence[int]]) -> None:
    for node, stage in zip(graph.nodes, stage_of, strict=True):
        if stage is not None and node.writes and len(run_by[stage]) > 1:
            where = f"module {node.path!r}" if node.path else "the model's own forward"
            raise PlanError(
                f"stage {stage} cannot have {len(run_by[stage])} replicas: {where} ({node.source}) writes "
                f"{', '.join(map(repr, node.writes))} for each microbatch in turn, and replicas would each write "
                f"their own copy; put it in a stage without replicas, or use batch_norm='deferred' if it is batch "
                f"normalization"
            )
