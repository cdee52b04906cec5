"""Carries a placement over to another capture of the same model.

Evaluation, another shape or another branch of the user's Python give another graph over the same parameters, which must
not move. An atom of the new graph (nodes that must share a stage) is

    bound   if it reads parameters: it goes to a stage that holds all of them, or else some of them;
    known   if the old graph has a matching node (path, operation, occurrence): it goes to the stage of that node, as
            far as edges allow;
    new     otherwise: it goes to the earliest stage that keeps edges forward.

A node that now reads other parameters (a head whose weight has become that of the embedding) may also stay where it
was, if there is no placement otherwise; the parameters are then tied.

A backward pass over the graph finds the latest stage that the bound users of each atom allow. A forward pass then
assigns stages. If a placement without a backward edge exists, it is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipecompile.errors import PlanError
from pipecompile.ir.graph import Graph, Node
from pipecompile.ir.plan import Plan
from pipecompile.partition.solver.contraction import contract
from pipecompile.partition.solver.problem import Problem, Seat
from pipecompile.partition.stage_nodes import Placed

Key = tuple[str, str, int]


def carry_over(plan: Plan, graph: Graph, new_graph: Graph, ties: bool = False) -> Plan:
    """The plan of the new graph in which each parameter stays on a stage that holds it in ``plan``.

    Args:
        ties: whether a stage may read a parameter of another one that it has not read before.

    Raises:
        PlanError: no placement keeps all edges forward.
    """
    placed = Placed(new_graph)
    contraction = contract([0.0] * len(placed.nodes), placed.arcs, [], [Seat()], together=placed.together)
    nodes: list[list[int]] = [[] for _ in contraction.problem.seconds]
    for index, atom in zip(placed.nodes, contraction.atom_of, strict=True):
        nodes[atom].append(index)
    problem, old = contraction.problem, _Old.of(plan, graph)
    holders = [old.holders(new_graph, members) for members in nodes]
    heads = [new_graph.nodes[members[0]] for members in nodes]
    try:
        latest = _latest(problem, holders, plan.num_stages, heads)
    except PlanError:
        if not ties:
            raise
        moved = old.moved(new_graph, nodes)
        holders = [held and held | more for held, more in zip(holders, moved, strict=True)]
        latest = _latest(problem, holders, plan.num_stages, heads)
    stages = _earliest(problem, holders, old.wanted(new_graph, nodes), latest)
    _fill(problem, holders, stages, plan)
    carried = Plan.of(new_graph, placed.stages(contraction.expand(stages)), plan.rank_of, plan.replica_of)
    return replace(carried, recomputed=plan.recomputed, offloaded=plan.offloaded)


@dataclass(frozen=True, slots=True)
class _Old:
    """The stages of nodes and parameters in the old plan."""

    stage_of: dict[Key, int]
    stages_of: dict[str, frozenset[int]]  # parameter -> stages that hold it
    read: dict[Key, tuple[str, ...]]  # parameters

    @staticmethod
    def of(plan: Plan, graph: Graph) -> _Old:
        stage_of: dict[Key, int] = {}
        stages_of: dict[str, frozenset[int]] = {}
        read: dict[Key, tuple[str, ...]] = {}
        for key, node, stage in zip(_keys(graph), graph.nodes, plan.stage_of, strict=True):
            if stage is not None:
                stage_of[key], read[key] = stage, node.parameters
                stages_of |= {name: stages_of.get(name, frozenset()) | {stage} for name in node.parameters}
        return _Old(stage_of, stages_of, read)

    def holders(self, graph: Graph, members: list[int]) -> frozenset[int] | None:
        """The stages that hold all parameters that these nodes read; ``None`` if they read no placed parameter.

        If no stage holds all of them (one operation in the new graph was two in the old one), the stages that hold
        some: the other parameters are tied there.
        """
        names = dict.fromkeys(name for i in members for name in graph.nodes[i].parameters if name in self.stages_of)
        held = [self.stages_of[name] for name in names]
        return (frozenset.intersection(*held) or frozenset.union(*held)) if held else None

    def moved(self, graph: Graph, nodes: list[list[int]]) -> list[frozenset[int]]:
        """For each list of nodes, the stages of their matches in the old graph that read other parameters."""
        now = dict(zip(_keys(graph), graph.nodes, strict=True))
        stages = {
            id(node): self.stage_of[key]
            for key, node in now.items()
            if node.parameters and self.read.get(key, ()) not in ((), node.parameters)
        }
        return [frozenset(stages[i] for i in map(id, (graph.nodes[m] for m in ms)) if i in stages) for ms in nodes]

    def wanted(self, graph: Graph, nodes: list[list[int]]) -> list[int | None]:
        """For each list of nodes, the most frequent stage of their matches in the old graph."""
        keys = list(_keys(graph))
        counts = [Counter(self.stage_of[keys[i]] for i in members if keys[i] in self.stage_of) for members in nodes]
        return [count.most_common(1)[0][0] if count else None for count in counts]


def _keys(graph: Graph) -> Iterator[Key]:
    seen: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        yield node.path, node.op, seen[node.path, node.op]
        seen[node.path, node.op] += 1


def _latest(problem: Problem, holders: list[frozenset[int] | None], num_stages: int, heads: list[Node]) -> list[int]:
    """For each atom, the latest stage from which its value can reach all its users."""
    latest = [num_stages - 1] * len(problem)
    for atom in reversed(range(len(problem))):
        bound = min((latest[user] for user in problem.successors[atom]), default=num_stages - 1)
        held = holders[atom]
        if held is None:
            latest[atom] = bound
        elif fitting := [stage for stage in held if stage <= bound]:
            latest[atom] = max(fitting)
        else:
            user = min(problem.successors[atom], key=latest.__getitem__)
            raise PlanError(
                f"{_named(heads[atom])} reads parameters of {_listed(held)}, but {_named(heads[user])} needs its value "
                f"in stage {bound}, and values cannot flow backward; compile the model again, as it is now and on "
                f"inputs that take this path"
            )
    return latest


def _earliest(
    problem: Problem, holders: list[frozenset[int] | None], wanted: list[int | None], latest: list[int]
) -> list[int]:
    """A stage per atom: one that holds its parameters, the wanted one, or the earliest that its sources allow."""
    stages: list[int] = []
    for atom, held in enumerate(holders):
        low = max((stages[source] for source in problem.predecessors[atom]), default=0)
        like = wanted[atom]
        aim = low if like is None else min(max(like, low), latest[atom])
        if held is not None:
            aim = min((s for s in held if low <= s <= latest[atom]), key=lambda stage: (abs(stage - aim), stage))
        stages.append(aim)
    return stages


def _fill(problem: Problem, holders: list[frozenset[int] | None], stages: list[int], plan: Plan) -> None:
    """Moves the last unbound atom that fits into each empty stage. If no atom fits, the stage stays empty."""
    for empty in sorted(set(plan.replica_of) - set(stages)):
        for atom in reversed(range(len(problem))):
            low = max((stages[source] for source in problem.predecessors[atom]), default=0)
            high = min((stages[user] for user in problem.successors[atom]), default=plan.num_stages - 1)
            if holders[atom] is None and low <= empty <= high and stages.count(stages[atom]) > 1:
                stages[atom] = empty
                break


def _named(node: Node) -> str:
    place = ", ".join(part for part in (node.path, node.source) if part)
    return f"node {node.name} ({place})" if place else f"node {node.name}"


def _listed(stages: frozenset[int]) -> str:
    return ("stage " if len(stages) == 1 else "stages ") + ", ".join(map(str, sorted(stages)))
