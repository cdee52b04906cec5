"""The stage graph: the content shared by all pictures of a plan.

    stage_graph(costed, plan) -> StageGraph    the input of
    dot  mermaid  html  table                  and itself the json format

A stage is a cluster of modules. An edge carries values from one module to another, within a stage or across a cut. If
several modules of one stage read a value, it crosses the cut once, so its edge ends at the first of them. A replica is
a stage with its own rank and memory. Its modules and edges are drawn only with the stage that it is a replica of.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

from pipecompile.ir.between_stages import Channel
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node
from pipecompile.ir.json_io import Json, converter
from pipecompile.ir.plan import Plan, members, stage_costs
from pipecompile.render.modules import Box, blocks_of_stages, box_label, boxes_of_stages
from pipecompile.render.paths import Names


@dataclass(frozen=True, slots=True)
class Module:
    """A box in a stage: consecutive nodes of one module, or of a run of modules."""

    stage: int
    label: str  # short: "h.3", "h.0…5", or operations directly in an open module
    paths: tuple[str, ...]  # in full: "transformer.h.3"
    nodes: tuple[int, ...]
    cost: Cost  # per microbatch; each parameter counts once


@dataclass(frozen=True, slots=True)
class Stage:
    """The contents and costs of one stage, per microbatch."""

    rank: int
    blocks: tuple[str, ...]  # module paths, coarse; a module that the plan cuts is in several stages
    modules: tuple[int, ...]  # finer boxes, in execution order
    inputs: tuple[int, ...]  # model inputs that it reads
    rematerialized: tuple[int, ...]  # nodes that it computes for itself
    parameters: tuple[str, ...]
    num_parameters: int  # elements
    cost: Cost
    bytes_in: int  # values from other stages
    bytes_out: int  # values to other stages, once per stage that reads them


@dataclass(frozen=True, slots=True)
class Edge:
    """Values from one module to a later one. Between two stages they cross a cut."""

    source: int  # module
    target: int  # module
    values: tuple[int, ...]  # nodes, ascending
    nbytes: int


@dataclass(frozen=True)
class StageGraph(Json):
    """A costed graph under a plan, as stages of modules. The ids of nodes, modules and stages are positions.

    As JSON (``to_json``, ``--format json``), an object with the keys

    - ``costed``: the ``CostedGraph``: ``graph`` (``nodes`` with name, op, inputs, outputs, parameters, path, source,
      rematerialized; ``inputs``, ``outputs``, ``parameters``, ``together``), ``costs`` (one per node) and ``source``;
    - ``plan``: the ``Plan``: ``stage_of`` (node -> stage, null for inputs and rematerialized nodes), ``rank_of``,
      ``channels``, ``tied``, ``replica_of`` (stage -> the stage whose nodes it runs);
    - ``stages``, ``modules``, ``edges``: the fields of the classes above. An edge whose modules have different stages
      crosses a cut; the ``nbytes`` of those between two stages, none a replica, sum to those of their channel.

    Times are in seconds and sizes in bytes, per microbatch. ``StageGraph.from_json`` reads it back.
    """

    costed: CostedGraph
    plan: Plan
    stages: tuple[Stage, ...]
    modules: tuple[Module, ...]
    edges: tuple[Edge, ...]

    def to_json(self) -> str:
        return json.dumps(converter.unstructure(self), indent=1)

    def node(self, index: int) -> Node:
        return self.costed.graph.nodes[index]

    def crosses(self, edge: Edge) -> bool:
        return self.modules[edge.source].stage != self.modules[edge.target].stage

    @cached_property
    def crossings(self) -> tuple[Edge, ...]:
        """The edges between stages."""
        return tuple(filter(self.crosses, self.edges))

    @cached_property
    def names(self) -> Names:
        """Short names for the modules of the model."""
        return Names(node.path for node in self.costed.graph.nodes)

    @property
    def cuts(self) -> tuple[Channel, ...]:
        """The channels between stages, without those of replicas."""
        drawn = set(self.plan.replica_of)
        return tuple(c for c in self.plan.channels if {c.source, c.target} <= drawn)

    @property
    def balance(self) -> float:
        """The bottleneck over the mean of all ranks; 1.0 is perfect. Replicas share the time of a stage."""
        seconds: dict[int, float] = {}
        for rank, stage, group in zip(self.plan.rank_of, self.stages, self.plan.replicas, strict=True):
            seconds[rank] = seconds.get(rank, 0.0) + stage.cost.seconds / len(group)
        total = sum(seconds.values())
        return max(seconds.values()) * len(seconds) / total if total else 1.0

    def share(self, cost: Cost) -> float:
        """The seconds of a cost relative to the bottleneck."""
        busiest = max(stage.cost.seconds for stage in self.stages)
        return cost.seconds / busiest if busiest else 0.0

    def tied(self, stage: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The parameters that a stage shares with stages other than its replicas, and those stages."""
        return tuple(
            (tied.parameter, tuple(other for other in tied.stages if other != stage))
            for tied in self.plan.tied_by_model
            if stage in tied.stages
        )


def stage_graph(costed: CostedGraph, plan: Plan) -> StageGraph:
    """The stage graph of a plan. ``plan`` must belong to ``costed``.

    Raises:
        ValueError: the plan has another number of nodes.
    """
    if len(plan.stage_of) != len(costed.graph):
        raise ValueError(f"the plan has {len(plan.stage_of)} nodes, but the graph has {len(costed.graph)}")
    modules = _modules(costed, plan)
    costs = stage_costs(costed, plan)
    stages = tuple(_stage(costed.graph, plan, modules, stage, cost) for stage, cost in enumerate(costs))
    return StageGraph(
        costed=costed, plan=plan, stages=stages, modules=modules, edges=_edges(costed.graph, plan, modules)
    )


def _modules(costed: CostedGraph, plan: Plan) -> tuple[Module, ...]:
    placed = [(s, box) for s, boxes in enumerate(boxes_of_stages(costed.graph, plan)) for box in boxes]
    names = Names(node.path for node in costed.graph.nodes)
    return tuple(
        Module(
            stage=stage,
            label=box_label(costed.graph, box, names),
            paths=box.paths or _own_paths(costed.graph, box),
            nodes=box.nodes,
            cost=_cost(costed, box),
        )
        for stage, box in placed
    )


def _own_paths(graph: Graph, box: Box) -> tuple[str, ...]:
    return tuple(dict.fromkeys(graph.nodes[node].path for node in box.nodes))


def _cost(costed: CostedGraph, box: Box) -> Cost:
    total = reduce(Cost.__add__, (costed.costs[node] for node in box.nodes), Cost())
    names = {name for node in box.nodes for name in costed.graph.nodes[node].parameters}
    nbytes = sum(costed.graph.parameter_bytes[name] for name in names)
    return Cost(total.forward, total.backward, total.saved_bytes, nbytes)


def _stage(graph: Graph, plan: Plan, modules: tuple[Module, ...], stage: int, cost: Cost) -> Stage:
    nodes = members(graph, plan, stage)
    names = tuple(dict.fromkeys(name for node in nodes for name in graph.nodes[node].parameters))
    sizes = {parameter.name: prod(parameter.spec.shape) for parameter in graph.parameters}
    inputs = set(graph.inputs)
    return Stage(
        rank=plan.rank_of[stage],
        blocks=blocks_of_stages(graph, plan)[stage],
        modules=tuple(i for i, module in enumerate(modules) if module.stage == stage),
        inputs=tuple(i for i in nodes if i in inputs),
        rematerialized=tuple(i for i in nodes if graph.nodes[i].rematerialized and i not in inputs),
        parameters=names,
        num_parameters=sum(sizes[name] for name in names),
        cost=cost,
        bytes_in=sum(channel.nbytes for channel in plan.incoming[stage]),
        bytes_out=sum(channel.nbytes for channel in plan.outgoing[stage]),
    )


def _edges(graph: Graph, plan: Plan, modules: tuple[Module, ...]) -> tuple[Edge, ...]:
    module_of = {node: position for position, module in enumerate(modules) for node in module.nodes}
    values: dict[tuple[int, int], list[int]] = {}
    for value, users in enumerate(graph.users):
        if value in module_of:
            readers = [module_of[user] for user in users if user in module_of]
            for reader in _ends(module_of[value], readers, modules):
                values.setdefault((module_of[value], reader), []).append(value)
    return tuple(
        Edge(source, target, tuple(nodes), sum(graph.nodes[node].nbytes for node in nodes))
        for (source, target), nodes in sorted(values.items())
    )


def _ends(source: int, readers: list[int], modules: tuple[Module, ...]) -> list[int]:
    """The modules that read a value: all of them in its own stage, and the first one in each other stage."""
    near = {reader for reader in readers if modules[reader].stage == modules[source].stage} - {source}
    first: dict[int, int] = {}
    for reader in sorted(set(readers)):
        first.setdefault(modules[reader].stage, reader)
    return sorted(near | {m for stage, m in first.items() if stage != modules[source].stage})
