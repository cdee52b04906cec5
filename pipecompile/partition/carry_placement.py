"""The same placement for another capture of the same model.

Evaluation, another shape, another branch of the user's Python give another graph over the same parameters, which must
not move. What stays together in the new graph is

    bound   if it reads a parameter: it goes to a stage that holds it, if one holds all that it reads;
    known   if the old graph has its like (path, operation, occurrence): it goes where that was, as far as edges allow;
    new     otherwise: it goes to the earliest stage that keeps edges forward.

Walking up the graph, each atom learns the latest stage that its bound users leave it; walking down, it takes its
stage. So a placement without a backward edge is found whenever there is one.
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


def carry_over(plan: Plan, graph: Graph, new_graph: Graph) -> Plan:
    """The plan of the new graph with every parameter on a stage that has it in the given plan of the old graph.

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
    latest = _latest(problem, holders, plan.num_stages, [new_graph.nodes[members[0]] for members in nodes])
    stages = _earliest(problem, holders, old.wanted(new_graph, nodes), latest)
    _fill(problem, holders, stages, plan)
    carried = Plan.of(new_graph, placed.stages(contraction.expand(stages)), plan.rank_of, plan.replica_of)
    return replace(carried, recomputed=plan.recomputed)


@dataclass(frozen=True, slots=True)
class _Old:
    """What the old plan says of a node's like, and of a parameter."""

    stage_of: dict[Key, int]
    stages_of: dict[str, frozenset[int]]  # parameter -> stages that hold it

    @staticmethod
    def of(plan: Plan, graph: Graph) -> _Old:
        stage_of: dict[Key, int] = {}
        stages_of: dict[str, frozenset[int]] = {}
        for key, node, stage in zip(_keys(graph), graph.nodes, plan.stage_of, strict=True):
            if stage is not None:
                stage_of[key] = stage
                stages_of |= {name: stages_of.get(name, frozenset()) | {stage} for name in node.parameters}
        return _Old(stage_of, stages_of)

    def holders(self, graph: Graph, members: list[int]) -> frozenset[int] | None:
        """The stages that hold all parameters these nodes read; ``None`` if they read none that was placed.

        Where none holds all (an operation of the old graph that is two in the new one), those that hold some: the
        others are tied there.
        """
        names = dict.fromkeys(name for i in members for name in graph.nodes[i].parameters if name in self.stages_of)
        held = [self.stages_of[name] for name in names]
        return (frozenset.intersection(*held) or frozenset.union(*held)) if held else None

    def wanted(self, graph: Graph, nodes: list[list[int]]) -> list[int | None]:
        """For each list of nodes the stage that most of their likes had."""
        keys = list(_keys(graph))
        counts = [Counter(self.stage_of[keys[i]] for i in members if keys[i] in self.stage_of) for members in nodes]
        return [count.most_common(1)[0][0] if count else None for count in counts]


def _keys(graph: Graph) -> Iterator[Key]:
    seen: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        yield node.path, node.op, seen[node.path, node.op]
        seen[node.path, node.op] += 1


def _latest(problem: Problem, holders: list[frozenset[int] | None], num_stages: int, heads: list[Node]) -> list[int]:
    """For each atom the latest stage from which all its users can still be reached."""
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
                f"{_named(heads[atom])} reads parameters of {_listed(held)}, but its value must reach stage {bound} "
                f"for {_named(heads[user])}: a value cannot flow back; compile the model again, on inputs that take "
                f"this path"
            )
    return latest


def _earliest(
    problem: Problem, holders: list[frozenset[int] | None], wanted: list[int | None], latest: list[int]
) -> list[int]:
    """A stage for each atom: a holder of its parameters, the wanted one, or the earliest that its sources allow."""
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
    """Gives each stage that would be empty the last unbound atom that may move there; without one it stays empty."""
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
