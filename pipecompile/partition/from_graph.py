"""From a costed graph to a plan: builds the problem that the solver sees, and turns its solution into a plan.

    node                           -> seconds, forward and backward
    value                          -> a net: seconds over the fastest link, and back if the value has a gradient
    links between stages           -> factors of their seats, for a value of mean size
    ``graph.together``             -> one atom
    readers of one parameter       -> one atom, if stages step on their own and nothing lies between (``tied_nodes``)
    parameters, saved activations  -> bytes; activations count once per microbatch in flight

Rematerialized nodes belong to no stage and cross no cut, so they are left out. A parameter counts for the first node
that reads it. Further memory of a stage (tied copies, values of other stages, temporaries) depends on the whole plan.
Once a plan is known, it is passed in as ``reserved`` bytes (see ``memory`` and ``memory_fit``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from time import thread_time

from pipecompile.errors import InfeasibleError, InputError, PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import CostedGraph, Node
from pipecompile.ir.plan import Plan, with_replicas
from pipecompile.ir.plan_options import DEFAULT_PLAN, Objective, PlanOptions
from pipecompile.ir.plan_quality import SLACK, Quality
from pipecompile.partition.memory_model import Training
from pipecompile.partition.module_constraints import ModuleConstraints
from pipecompile.partition.seats import Seating
from pipecompile.partition.solver.by_rank import balanced, quality
from pipecompile.partition.solver.contraction import Contraction, contract
from pipecompile.partition.solver.problem import Problem, Seat
from pipecompile.partition.solver.score import bottleneck, rank_loads
from pipecompile.partition.solver.solver import solve
from pipecompile.partition.stage_nodes import Placed
from pipecompile.partition.tied_nodes import tied_nodes

NOISE = 3e-3  # measured seconds are not known better than to this part; counted ones are
SOLVING, BALANCING = 0.6, 2.0  # the part of the time to balance stages, and the most CPU seconds to balance ranks


def partition(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster | None = None,
    training: Training | None = None,
    constraints: PlanOptions | None = None,
    budget: float | None = None,
    replicas: Sequence[int] = (),
    objective: Objective = "pace",
    rank_of: Sequence[int] = (),
) -> Plan:
    """The plan with the smallest bottleneck that was found. It is never worse than the best cut of a single node order.

    Args:
        costed: the model with the cost of each node.
        num_stages: the number of stages.
        cluster: the devices. Stage s is on rank s; if there are more stages than ranks, ranks repeat. By default equal
            devices without a memory limit.
        training: what the memory of the devices must hold; by default 1F1B with Adam.
        constraints: constraints on the plan. With ``max_stages`` it may have fewer than ``num_stages``.
        budget: CPU seconds after which the search ends with the best plan so far.
        replicas: the number of devices that run each stage, in the order of the cluster; by default one. The search
            treats a stage with r replicas as a device r times as fast as its slowest one; communication is not divided.
        objective: what to minimize. "pace": the bottleneck, computation plus communication. "overlap": the bottleneck,
            the larger of computation and communication. A function: its value for a plan, over the plans found for
            both, and plans with less communication.
        rank_of: the rank of each stage, if ranks run several. Then the bottleneck is that of the busiest rank.

    Raises:
        ValueError: ``num_stages`` is less than one, or ``replicas`` or ``rank_of`` has another length.
        InputError: a constraint names a module or a stage that does not exist.
        InfeasibleError: the model cannot be cut into ``num_stages`` stages, does not fit into the devices' memory, or a
            constraint contradicts the model or another constraint.
        PlanError: no plan within memory was found, although one may exist.
    """
    constraints = constraints or DEFAULT_PLAN
    _check(num_stages, constraints, replicas, rank_of)
    cluster = Cluster.of([f"rank {rank}" for rank in range(num_stages)]) if cluster is None else cluster
    num_stages = min(num_stages, constraints.max_stages or num_stages)
    replicas = replicas[:num_stages]
    seating = Seating.of(num_stages, cluster, replicas, rank_of)
    overlapped = objective == "overlap"
    contraction = problem_of(costed, num_stages, cluster, training, constraints, replicas, overlapped, rank_of)
    again = (training and training.again) or (False,) * num_stages
    close = NOISE if costed.measured else SLACK
    solve_it: _Solve = partial(_on_seats, close=close)
    if len(set(rank_of)) < len(rank_of):
        room = seating.memory(training or Training.flushed(seating.replicas))
        solve_it = partial(_on_ranks, close=close, rank_of=tuple(rank_of), memory=room[: 1 + max(rank_of)])
    found = solve_it(contraction.problem, budget, callable(objective))

    def plan_of(atoms: tuple[int, ...]) -> Plan:
        known = replace(found.quality, bottleneck=found.load(atoms))
        return replace(_seated(costed, seating, contraction.expand(atoms), again), quality=known)

    plans = [plan_of(found.stage_of)]
    if not callable(objective):
        return plans[0]
    plans += [plan_of(atoms) for atoms in (*found.others, *_overlapping(contraction.problem, budget, solve_it))]
    return min(plans, key=partial(scored, objective))


@dataclass(frozen=True)
class _Found:
    """Plans of a problem, the best one with its quality, and what a plan is measured by."""

    stage_of: tuple[int, ...]
    quality: Quality
    others: tuple[tuple[int, ...], ...]
    load: Callable[[Sequence[int]], float]


_Solve = Callable[[Problem, float | None, bool], _Found]


def _on_seats(problem: Problem, budget: float | None, others: bool, close: float) -> _Found:
    """Plans with one stage on each rank, or the ranks of replicas."""
    solution = solve(problem, budget, others=others, close=close)
    return _Found(solution.stage_of, solution.quality, solution.others, partial(bottleneck, problem))


def _on_ranks(
    problem: Problem,
    budget: float | None,
    others: bool,
    close: float,
    rank_of: tuple[int, ...],
    memory: tuple[float, ...],
) -> _Found:
    """Plans with several stages on each rank.

    Raises:
        PlanError: no plan within the memory of the ranks was found.
    """
    if (parts := len(problem)) < len(rank_of):
        raise InfeasibleError(
            f"the model cannot be cut into {len(rank_of)} stages: it can be cut into at most {parts}, since the rest "
            f"must stay together; the schedule has several stages on each of {len(memory)} ranks, so use fewer ranks, "
            f"fewer stages_per_rank, or a schedule with one"
        )
    begin = thread_time()
    seats = tuple(replace(seat, memory=inf) for seat in problem.seats)
    free = replace(problem, seats=seats)
    solution = solve(free, budget if budget is None else budget * SOLVING, others=others, close=close)
    left = BALANCING if budget is None else min(BALANCING, max(0.0, budget - (thread_time() - begin)))
    stage_of = balanced(free, rank_of, memory, solution.stage_of, left)
    over, load, _ = quality(free, rank_of, memory, stage_of)
    if over:  # each stage within an equal part of its rank's memory, which is more than is needed
        with suppress(PlanError):
            stage_of = balanced(free, rank_of, memory, solve(problem, budget, close=close).stage_of, left)
            over, load, _ = quality(free, rank_of, memory, stage_of)
    if over:
        raise PlanError(
            f"no plan was found that keeps each of the {len(memory)} ranks, with {len(rank_of)} stages together, "
            f"within its memory; use more devices, devices with more memory, or fewer microbatches in flight"
        )
    speeds = {rank: seat.speed for rank, seat in zip(rank_of, seats, strict=True)}
    least = max(free.total / sum(speeds.values()), free.weight.max(initial=0.0) / max(speeds.values()))
    kept = tuple(plan for plan in (solution.stage_of, *solution.others) if not quality(free, rank_of, memory, plan)[0])
    measure = Quality(load, min(float(least), load), thread_time() - begin)
    return _Found(stage_of, measure, kept, lambda plan: max(rank_loads(free, plan, rank_of)))


def _check(num_stages: int, constraints: PlanOptions, replicas: Sequence[int], rank_of: Sequence[int]) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1; got {num_stages}")
    if len(rank_of) not in (0, num_stages):
        raise ValueError(f"rank_of={tuple(rank_of)} must have one rank for each of the {num_stages} stages")
    if constraints.max_stages is not None and rank_of:
        raise InputError(
            f"max_stages={constraints.max_stages} lets the search leave stages out, but a schedule with several stages "
            f"on each rank needs all {num_stages}; leave max_stages= out, or use a schedule with one stage on each rank"
        )
    if len(replicas) not in (0, num_stages):
        raise ValueError(f"replicas={list(replicas)} must have one number for each of the {num_stages} stages")
    if constraints.max_stages is not None and any(count > 1 for count in replicas):
        raise InputError(
            f"max_stages={constraints.max_stages} lets the search leave stages out, but replicas={list(replicas)} "
            f"gives the number of devices of each stage; use only one of them"
        )


def _seated(costed: CostedGraph, seating: Seating, seat_of: Sequence[int], again: Sequence[bool]) -> Plan:
    """The plan for an assignment of things to seats, without empty seats.

    Args:
        again: whether the stage on each seat recomputes activations in the backward.
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
    """The value of an objective function for a plan.

    Raises:
        InputError: the value is not a number.
    """
    score = objective(plan)
    if not isinstance(score, int | float) or score != score:
        raise InputError(
            f"the function objective= returned {score!r} for a plan; it must return a number (smaller is better)"
        )
    return score


def _overlapping(problem: Problem, budget: float | None, solve_it: _Solve) -> tuple[tuple[int, ...], ...]:
    """Plans for the same problem with communication that overlaps with computation; empty if none was found."""
    try:
        found = solve_it(replace(problem, overlapped=True), budget, True)
    except PlanError:
        return ()
    return (found.stage_of, *found.others)


def problem_of(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster,
    training: Training | None = None,
    constraints: PlanOptions | None = None,
    replicas: Sequence[int] = (),
    overlapped: bool = False,
    rank_of: Sequence[int] = (),
) -> Contraction:
    """The problem of the solver. Its things are the nodes that are not rematerialized, in order."""
    seating = Seating.of(num_stages, cluster, replicas, rank_of)
    training = training or Training.flushed(seating.replicas)
    placed = Placed(costed.graph)
    bound = ModuleConstraints(placed, constraints or DEFAULT_PLAN, num_stages)
    bound.check()
    groups = [*placed.together, *bound.groups]
    if training.asynchronous:
        groups = _with_ties(groups, bound)
    nodes = [costed.graph.nodes[index] for index in placed.nodes]
    costs = [costed.costs[index] for index in placed.nodes]
    values = zip(nodes, placed.users, strict=True)
    mean = sum(node.nbytes for node in nodes) / max(1, len(nodes))
    link = seating.fastest_link(mean)
    held, trained = parameter_bytes(costed, placed)
    stashed, waiting = training.stashed, min(seating.replicas) - 1  # where a stage owns its parameters
    seconds, forward = sum(cost.seconds for cost in costs), sum(cost.forward for cost in costs)
    slower = (seconds + forward) / seconds if seconds else 1.0
    return contract(
        [cost.seconds + cost.forward * training.all_again for cost in costs],
        placed.arcs,
        [((thing, *users), _transfer(node, link)) for thing, (node, users) in enumerate(values)],
        seating.seats(training, bound.least_stages, mean, slower),
        together=groups,
        kept_bytes=[
            h + t * (1 + training.optimizer_state + stashed[0] + waiting) for h, t in zip(held, trained, strict=True)
        ],
        saved_bytes=[cost.saved_bytes + t * stashed[1] for cost, t in zip(costs, trained, strict=True)],
        fixed_stages=[(pin.thing, pin.stage) for pin in bound.pins],
        overlapped=overlapped,
    )


def _with_ties(groups: list[tuple[int, ...]], bound: ModuleConstraints) -> list[tuple[int, ...]]:
    """The groups, and those of tied nodes, unless pins or the number of stages do not allow these."""
    placed, pins = bound.placed, [(pin.thing, pin.stage) for pin in bound.pins]
    more = [*groups, *tied_nodes(placed).values()]
    seats = [Seat()] * bound.num_stages
    try:
        found = contract([0.0] * len(placed.nodes), placed.arcs, [], seats, together=more, fixed_stages=pins)
    except InfeasibleError:
        return groups
    return more if len(found.problem) >= bound.least_stages else groups


def parameter_bytes(costed: CostedGraph, placed: Placed) -> tuple[list[int], list[int]]:
    """For each thing, the bytes of the parameters that it reads first, and of the trainable ones among them."""
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
    """Seconds to send a node's outputs, and to send their gradients back."""
    returned = sum(spec.nbytes for spec in node.outputs if spec.requires_grad)
    return link.seconds(node.nbytes) + (link.seconds(returned) if returned else 0.0)
