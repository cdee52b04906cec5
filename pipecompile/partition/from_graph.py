"""From a costed graph to a plan: which numbers of the model the solver sees, and what it gives back.

    node                           -> its seconds, forward and backward
    value                          -> a net: its bytes over the fastest link, twice if its gradient comes back
    links between stages           -> factors of their seats, by the mean value
    ``graph.colocate``             -> one atom
    parameters, saved activations  -> bytes, of which the latter count once for each microbatch in flight

Replicated nodes are in no stage and cross no cut, so they are left out. A parameter counts for the first node that
reads it. What more a stage holds (tied weights, values of other stages, what is on the way) depends on the whole plan:
it is told as ``reserved`` bytes once a plan is known (see ``memory`` and ``memory_fit``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import CostedGraph, Node
from pipecompile.ir.plan import Plan, with_replicas
from pipecompile.ir.plan_options import DEFAULT_PLAN, Objective, PlanOptions
from pipecompile.partition.memory_model import Training
from pipecompile.partition.module_constraints import Wished
from pipecompile.partition.seats import Seating
from pipecompile.partition.solver.contraction import Contraction, contract
from pipecompile.partition.solver.problem import Problem
from pipecompile.partition.solver.score import bottleneck
from pipecompile.partition.solver.solver import solve
from pipecompile.partition.stage_nodes import Placed


def partition(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster | None = None,
    training: Training | None = None,
    constraints: PlanOptions | None = None,
    budget: float | None = None,
    replicas: Sequence[int] = (),
    objective: Objective = "pace",
) -> Plan:
    """A plan with the least time of the busiest stage that was found, never worse than the best cut of one node order.

    Args:
        cluster: the devices, stage s on rank s, and round again if there are more stages; by default equal devices
            without a memory limit.
        training: what their memory must hold; by default 1F1B's with Adam.
        constraints: what else the plan must keep to. With ``max_stages`` it may have fewer than ``num_stages``.
        budget: CPU seconds after which the search ends with the best plan so far.
        replicas: for each stage how many devices run it, one after the other in the cluster; by default one. To the
            search such a stage is a device so many times as fast as the slowest of them; what it sends counts whole.
        objective: the busiest stage's seconds, with what it sends added ("pace") or, if that is more, in place of what
            it computes ("overlap"); or what a function makes of a plan, which chooses among the plans that were found
            on the way to either, and such as send less.

    Raises:
        ValueError: ``num_stages`` is less than one, or ``replicas`` are not so many.
        InputError: a wish names a module or a stage that is not there.
        InfeasibleError: the model cannot be cut into so many stages, does not fit into the devices' memory, or
            constraints contradict the model or each other.
        PlanError: no plan within memory was found, though there may be one.
    """
    constraints = constraints or DEFAULT_PLAN
    _check(num_stages, constraints, replicas)
    cluster = Cluster.of([f"rank {rank}" for rank in range(num_stages)]) if cluster is None else cluster
    num_stages = min(num_stages, constraints.max_stages or num_stages)
    replicas = replicas[:num_stages]
    seating = Seating.of(num_stages, cluster, replicas)
    contraction = problem_of(costed, num_stages, cluster, training, constraints, replicas, objective == "overlap")
    again = (training and training.again) or (False,) * num_stages
    solution = solve(contraction.problem, budget, others=callable(objective))

    def plan_of(atoms: tuple[int, ...]) -> Plan:
        quality = replace(solution.quality, bottleneck=bottleneck(contraction.problem, atoms))
        return replace(_seated(costed, seating, contraction.expand(atoms), again), quality=quality)

    plans = [plan_of(solution.stage_of)]
    if not callable(objective):
        return plans[0]
    plans += [plan_of(atoms) for atoms in (*solution.others, *_overlapping(contraction.problem, budget))]
    return min(plans, key=partial(scored, objective))


def _check(num_stages: int, constraints: PlanOptions, replicas: Sequence[int]) -> None:
    if num_stages < 1:
        raise ValueError(f"a plan needs at least one stage; got {num_stages}")
    if len(replicas) not in (0, num_stages):
        raise ValueError(f"{num_stages} stages have replicas {tuple(replicas)}; give a number for each")
    if constraints.max_stages is not None and any(count > 1 for count in replicas):
        raise InputError(
            f"max_stages={constraints.max_stages} may leave stages out, but replicas={list(replicas)} says which "
            f"devices run each of {num_stages}; give only one of them"
        )


def _seated(costed: CostedGraph, seating: Seating, seat_of: Sequence[int], again: Sequence[bool]) -> Plan:
    """The plan in which each thing is on a seat, without the seats that have none.

    Args:
        again: whether what is on a seat is computed again in the backward.
    """
    used = sorted(set(seat_of))
    replica_of = with_replicas([seating.replicas[seat] for seat in used])
    seats = dict(zip(sorted(set(replica_of)), used, strict=True))  # stage, the first of its replicas -> seat
    stage_on = {seat: stage for stage, seat in seats.items()}
    rank_of = [rank for seat in used for rank in seating.ranks[seat]]
    stages = Placed(costed.graph).stages(tuple(stage_on[seat] for seat in seat_of))
    plan = Plan.of(costed.graph, stages, rank_of, replica_of)
    return replace(plan, recomputed=tuple(s for s, first in enumerate(replica_of) if again[seats[first]]))


def scored(objective: Callable[[Plan], float], plan: Plan) -> float:
    """What a function makes of a plan.

    Raises:
        InputError: that is no number.
    """
    score = objective(plan)
    if not isinstance(score, int | float) or score != score:
        raise InputError(
            f"objective= is a function that gave {score!r} for a plan; it must give a number, less is better"
        )
    return score


def _overlapping(problem: Problem, budget: float | None) -> tuple[tuple[int, ...], ...]:
    """Plans of the same problem for stages that send while they compute; none if none was found."""
    try:
        solution = solve(replace(problem, overlapped=True), budget, others=True)
    except PlanError:
        return ()
    return (solution.stage_of, *solution.others)


def problem_of(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster,
    training: Training | None = None,
    constraints: PlanOptions | None = None,
    replicas: Sequence[int] = (),
    overlapped: bool = False,
) -> Contraction:
    """The numbers of the problem; its things are the nodes that are not replicated, in order."""
    seating = Seating.of(num_stages, cluster, replicas)
    training = training or Training.flushed(seating.replicas)
    placed = Placed(costed.graph)
    wished = Wished(placed, constraints or DEFAULT_PLAN, num_stages)
    wished.check()
    nodes = [costed.graph.nodes[index] for index in placed.nodes]
    costs = [costed.costs[index] for index in placed.nodes]
    values = zip(nodes, placed.users, strict=True)
    mean = sum(node.nbytes for node in nodes) / max(1, len(nodes))
    link = seating.fastest_link(mean)
    held, trained = parameter_bytes(costed, placed)
    stashed = training.stashed
    seconds, forward = sum(cost.seconds for cost in costs), sum(cost.forward for cost in costs)
    slower = (seconds + forward) / seconds if seconds else 1.0
    return contract(
        [cost.seconds + cost.forward * training.all_again for cost in costs],
        placed.arcs,
        [((thing, *users), _transfer(node, link)) for thing, (node, users) in enumerate(values)],
        seating.seats(training, wished.least_stages, mean, slower),
        together=[*placed.together, *wished.groups],
        kept_bytes=[h + t * (1 + training.optimizer_state + stashed[0]) for h, t in zip(held, trained, strict=True)],
        saved_bytes=[cost.saved_bytes + t * stashed[1] for cost, t in zip(costs, trained, strict=True)],
        pinned=[(pin.thing, pin.stage) for pin in wished.pins],
        overlapped=overlapped,
    )


def parameter_bytes(costed: CostedGraph, placed: Placed) -> tuple[list[int], list[int]]:
    """For each thing the bytes of the parameters that it is the first to read, and of those that are trained."""
    specs = {parameter.name: parameter.spec for parameter in costed.graph.parameters}
    held, trained = [], []
    seen: set[str] = set()
    for index in placed.nodes:
        mine = [specs[name] for name in costed.graph.nodes[index].parameters if name not in seen]
        seen.update(costed.graph.nodes[index].parameters)
        held.append(sum(spec.nbytes for spec in mine))
        trained.append(sum(spec.nbytes for spec in mine if spec.requires_grad))
    return held, trained


def _transfer(node: Node, link: Link) -> float:
    """Seconds to send a node's value, and to send its gradient back."""
    returned = sum(spec.nbytes for spec in node.outputs if spec.requires_grad)
    return link.seconds(node.nbytes) + (link.seconds(returned) if returned else 0.0)
