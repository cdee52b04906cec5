"""Every plan of a small graph, from the definition alone: nothing here is shared with the solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Literal

import numpy as np

from pipecompile.ir.cluster import Cluster, Device, Link, Pair
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions

PATHS = ["", "a", "a.b", "a.b.c", "ab", "d", "d.e"]
MOST_NODES = 10


@dataclass(frozen=True)
class Case:
    """A question for the partitioner."""

    costed: CostedGraph
    num_stages: int
    cluster: Cluster
    constraints: PlanOptions
    objective: Literal["pace", "overlap"] = "pace"

    @property
    def graph(self) -> Graph:
        return self.costed.graph

    @property
    def seats(self) -> int:
        return min(self.num_stages, self.constraints.max_stages or self.num_stages)

    @property
    def placed(self) -> list[int]:
        return [index for index, node in enumerate(self.graph.nodes) if not node.rematerialized]

    def nodes_in(self, path: str) -> list[int]:
        parts = path.split(".") if path else []
        return [i for i in self.placed if self.graph.nodes[i].path.split(".")[: len(parts)] == parts or not parts]


def drawn(seed: int) -> Case:
    """A graph of up to ten nodes, some rematerialized, on uneven devices, some with memory limits or constraints."""
    random = Random(seed)
    costed = _graph(random)
    num_stages = random.choice([1, 2, 2, 3, 3, 3, 4])
    needed = sum(kept_bytes(costed.graph)) + num_stages * sum(cost.saved_bytes for cost in costed.costs) + 1
    tight = random.random() < 0.5
    devices = tuple(
        Device(f"d{i}", random.choice([1.0, 1.0, 0.5, 2.0]), _memory(random, needed / num_stages) if tight else None)
        for i in range(num_stages)
    )
    link, *others = (Link(random.choice([1.0, 4.0, 100.0]), random.choice([0.0, 0.5])) for _ in devices)
    slow = random.random() < 0.8  # some of the links from a device to the next are others
    pairs = [Pair(i, i + 1, other) for i, other in enumerate(others) if slow and random.random() < 0.8]
    cluster = Cluster(devices, link, pairs=tuple(pairs))
    case = Case(costed, num_stages, cluster, PlanOptions(), random.choice(["pace", "pace", "overlap"]))
    return replace(case, constraints=_constraints(random, case)) if random.random() < 0.6 else case


def least_load(case: Case) -> float:
    """Seconds of the busiest stage in the best plan; infinite if there is none."""
    stage_of = _assignments(case)
    if not len(stage_of):
        return inf
    return float(_loads(case, stage_of).max(axis=1).min())


def load(case: Case, plan: Plan) -> float:
    """Seconds of the busiest stage of a plan; infinite if it breaks a bound."""
    seat_of = plan.rank_of  # each stage has a device of its own here, and keeps it where others are left out
    stage_of = np.array([[0 if stage is None else seat_of[stage] for stage in plan.stage_of]])
    return float(_loads(case, stage_of).max()) if _allowed(case, stage_of).all() else inf


def _graph(random: Random) -> CostedGraph:
    nodes = [Node("x", "input", outputs=(TensorSpec((1,), "float32"),), rematerialized=True)]
    costs = [Cost()]
    if random.random() < 0.5:
        nodes.append(Node("mask", "ones", (0,), (TensorSpec((9,), "float32"),), path="a.b", rematerialized=True))
        costs.append(Cost(5.0))
    copies = len(nodes)
    density = random.choice([0.15, 0.3, 0.6])
    for index in range(copies, random.randint(copies + 2, MOST_NODES)):
        sources = [i for i in range(index) if random.random() < density] or [0]
        spec = TensorSpec((random.randint(0, 3),), "float32", random.random() < 0.7)
        read = tuple(sorted({f"p{random.randint(copies, index)}" for _ in range(random.choice([0, 0, 1, 2]))}))
        nodes.append(Node(f"n{index}", "relu", tuple(sources), (spec,), read, path=random.choice(PATHS)))
        costs.append(Cost(random.choice([0, 1, 2, 5]), random.choice([0, 3]), random.choice([0, 1, 4])))
    later = range(copies, len(nodes))
    together = [tuple(random.sample(later, 2))] if random.random() < 0.3 else []
    parameters = tuple(
        Parameter(name, TensorSpec((random.randint(1, 2),), "float16", random.random() < 0.7))
        for name in sorted({name for node in nodes for name in node.parameters})
    )
    graph = Graph(tuple(nodes), (0,), (len(nodes) - 1,), parameters=parameters, together=tuple(together))
    return CostedGraph(graph, tuple(costs), "drawn")


def kept_bytes(graph: Graph) -> list[int]:
    """For each node the bytes of the parameters that it is the first to read: four times if trained, with Adam."""
    specs = {parameter.name: parameter.spec for parameter in graph.parameters}
    first = {name: index for index, node in reversed([*enumerate(graph.nodes)]) for name in node.parameters}
    sums = [0] * len(graph)
    for name, index in first.items():
        sums[index] += specs[name].nbytes * (4 if specs[name].requires_grad else 1)
    return sums


def _memory(random: Random, mean: float) -> int:
    return int(mean * random.choice([0.5, 0.8, 1.2, 2.0]))


def _constraints(random: Random, case: Case) -> PlanOptions:
    paths = [path for path in PATHS if path and case.nodes_in(path)]
    random.shuffle(paths)
    most = random.choice([None, None, None, *range(1, case.num_stages + 1)])
    stages = min(case.num_stages, most or case.num_stages)
    pins = {path: random.randrange(stages) for path in paths[: random.choice([0, 1, 1, 2])]}
    no_split = tuple(random.sample(paths, min(len(paths), random.choice([0, 0, 1]))))
    colocate = (tuple(paths[-2:]),) if len(paths) > 1 and random.random() < 0.2 else ()
    return PlanOptions(pins, no_split, colocate, most)


def _assignments(case: Case) -> np.ndarray:
    """All allowed assignments: a row each, a column per node. Rematerialized nodes are in stage 0 and not counted."""
    rows = np.zeros((1, 0), np.int64)
    for index, node in enumerate(case.graph.nodes):
        choices = range(1 if node.rematerialized else case.seats)
        rows = np.concatenate([np.column_stack([rows, np.full(len(rows), stage)]) for stage in choices])
        for source in () if node.rematerialized else node.inputs:
            if not case.graph.nodes[source].rematerialized:
                rows = rows[rows[:, source] <= rows[:, index]]
    return rows[_allowed(case, rows)]


def _allowed(case: Case, rows: np.ndarray) -> np.ndarray:
    ok = np.ones(len(rows), np.bool_)
    groups = [list(group) for group in case.graph.together] + [
        case.nodes_in(path) for path in case.constraints.no_split
    ]
    groups += [[i for path in group for i in case.nodes_in(path)] for group in case.constraints.colocate]
    for group in groups:
        ok &= (rows[:, group] == rows[:, group[:1]]).all(axis=1)
    for path, stage in case.constraints.pins.items():
        ok &= (rows[:, case.nodes_in(path)] == stage).all(axis=1)
    for source, target in ((s, t) for t in case.placed for s in case.graph.nodes[t].inputs if s in case.placed):
        ok &= rows[:, source] <= rows[:, target]
    kept = kept_bytes(case.graph)
    filled = case.seats if case.constraints.max_stages is None else 1 + max(case.constraints.pins.values(), default=0)
    for seat in range(case.seats):
        here = rows[:, case.placed] == seat
        if seat < filled:
            ok &= here.any(axis=1)
        saved = [case.costed.costs[i].saved_bytes for i in case.placed]
        held = here @ np.array([kept[i] + (case.seats - seat) * s for i, s in zip(case.placed, saved, strict=True)])
        memory = case.cluster.devices[seat].memory
        ok &= held <= (inf if memory is None else memory)
    return ok


def link_factors(case: Case) -> tuple[Link, list[float]]:
    """The fastest of the links in the row of devices, for a mean value, and how many times as long each takes."""
    sizes = [case.graph.nodes[i].nbytes for i in case.placed]
    mean = sum(sizes) / len(sizes)
    row = [case.cluster.between(seat, seat + 1) for seat in range(case.seats - 1)]
    timed = [(link.latency + mean / link.bandwidth, link) for link in row]
    if not any(seconds for seconds, _ in timed):
        return row[0] if row else case.cluster.link, [1.0] * len(row)
    unit, fastest = min(((seconds, link) for seconds, link in timed if seconds), key=lambda entry: entry[0])
    return fastest, [max(1.0, seconds / unit) for seconds, _ in timed]


def _loads(case: Case, rows: np.ndarray) -> np.ndarray:
    work, sent = np.zeros((2, len(rows), case.seats))
    link, factors = link_factors(case)
    for seat in range(case.seats):
        speed = case.cluster.devices[seat].speed
        for index in case.placed:
            work[:, seat] += (rows[:, index] == seat) * case.costed.costs[index].seconds / speed
            readers = [i for i in case.placed if index in case.graph.nodes[i].inputs]
            touching = np.stack([rows[:, i] == seat for i in (index, *readers)], axis=1)
            crosses = touching.any(axis=1) & ~touching.all(axis=1)
            node = case.graph.nodes[index]
            there = link.seconds(node.nbytes)
            back = link.seconds(node.nbytes) if node.outputs[0].requires_grad and node.nbytes else 0.0
            onward, before = ([1.0, *factors, 1.0][seat + 1], [1.0, *factors, 1.0][seat])
            sent[:, seat] += crosses * (there + back) * np.where(rows[:, index] == seat, onward, before)
    return np.maximum(work, sent) if case.objective == "overlap" else work + sent
