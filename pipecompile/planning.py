"""A plan that fits: partition, schedule and memory, composed until what each device would hold is within its memory.

The partitioner knows what adds up node by node. What a stage holds beside that (tied weights, values of other stages,
what is on the way through a pass) is known once there is a plan; where a plan turns out to be too large, so much memory
is reserved, and the next plan is made within the rest.

Stages are planned along a row of the devices in which each has a fast link to the next. In the end devices that are
equal change places, so that heavy cuts lie on fast links.

With ``recompute="auto"`` a stage's backward computes its forward again where memory does not allow otherwise: all of
them first, then, as far as there is room, the slowest stages no longer, and the others, which are slower now, are given
less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

from pipecompile.cluster import Cluster
from pipecompile.errors import PlanError
from pipecompile.graph import CostedGraph
from pipecompile.memory import Memory
from pipecompile.partition import Objective, Training, assign, partition, suited
from pipecompile.plan import Plan, stage_costs
from pipecompile.render.units import bytes_text
from pipecompile.versions import versions
from pipecompile.wishes import NO_WISHES, Wishes
from pipecompile.workload import Workload

Goal = Objective | Literal["step"]
GOALS = ("pace", "overlap", "step")
ATTEMPTS = 4
BUDGET = 10.0  # CPU seconds of a search without limits
SHORT = 4.0  # and of one of several within limits
MARGIN = 1.25  # of what a plan holds too much, that the next reserves
WORTH = 0.999  # of a step, for which another plan is taken


@dataclass(frozen=True)
class Request:
    """What a plan is asked to be, beside fast and within memory.

    Args:
        replicas: for each stage how many devices run it.
        wishes: the user's hand.
        budget: CPU seconds after which a search for a plan ends with the best so far; ``SHORT`` within limits.
        objective: what is to be least: the "pace" of the busiest stage, its pace with transfers overlapped ("overlap"),
            the simulated seconds of a "step", or what a function makes of a plan.
    """

    replicas: tuple[int, ...]
    wishes: Wishes = NO_WISHES
    budget: float = BUDGET
    objective: Goal = "pace"

    def partition(self, costed: CostedGraph, cluster: Cluster, training: Training, work: Workload) -> Plan:
        """The best plan that was found for such training; where devices have a limit, after a short search."""
        limited = any(device.memory is not None for device in cluster.devices)
        budget = min(self.budget, SHORT) if limited else self.budget
        step = partial(work.step_seconds, costed, cluster=cluster)
        objective = step if self.objective == "step" else self.objective
        return partition(costed, len(self.replicas), cluster, training, self.wishes, budget, self.replicas, objective)


def make_plan(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload) -> Plan:
    """The best plan that was found within the memory of the devices, its stages on the ranks that suit their links.

    Raises:
        InputError: a wish names what is not there.
        InfeasibleError: there is none; says which stage of the fastest plan holds how much too much, and what helps.
        PlanError: none was found, or a stage that is to have replicas cannot.
    """
    row = _row(costed, request, cluster)
    plan = _within_memory(costed, request, cluster.in_order(row), work)
    plan = replace(plan, rank_of=tuple(row[rank] for rank in plan.rank_of))
    return assign(plan, [cost.seconds for cost in stage_costs(costed, plan)], cluster, work.microbatches)


def _row(costed: CostedGraph, request: Request, cluster: Cluster) -> tuple[int, ...]:
    """The devices in an order in which each has a fast link to the next, as stages in a row need it."""
    nbytes = sum(node.nbytes for node in costed.graph.nodes) // len(costed.graph)
    chain = Plan.chain(len(request.replicas), _ranks(request.replicas, cluster), nbytes, request.replicas)
    return suited(chain, [0.0] * chain.num_stages, cluster)


def _ranks(replicas: Sequence[int], cluster: Cluster) -> list[int]:
    """A rank for each replica of each stage, one after the other, and round again."""
    return [place % len(cluster) for place in range(sum(replicas))]


def _within_memory(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload) -> Plan:
    every = (True,) * len(request.replicas)
    try:
        return _fitted(costed, request, cluster, work, every if work.recompute == "always" else ())
    except PlanError as error:
        if all(device.memory is None for device in cluster.devices):
            raise
        if work.recompute == "auto" and (found := _try(costed, request, cluster, work, every)):
            return _eased(costed, request, found, cluster, work)
        raise type(error)(_refusal(costed, request, cluster, work)) from error


def _fitted(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, again: Sequence[bool]) -> Plan:
    """A plan within memory of which some stages compute their forward again."""
    training = _training(work, request.replicas, cluster, again)
    free = _without_limits(cluster)
    plan = request.partition(costed, free, training, work)
    if cluster == free:
        return plan
    training = replace(training, optimizer_state=work.state)
    reserved = [0] * len(cluster)
    for attempt in range(1 + ATTEMPTS):
        over = _excess(work.memory(costed, plan, cluster, bound=True), cluster)
        if not any(over):
            return plan
        if training.reserved:  # else the plan was made without limits, and says nothing of what must be reserved
            reserved = [before + ceil(MARGIN * more) for before, more in zip(reserved, over, strict=True)]
        if attempt < ATTEMPTS:
            training = replace(training, reserved=tuple(reserved))
            plan = request.partition(costed, cluster, training, work)
    raise PlanError(f"no plan within memory was found in {ATTEMPTS} attempts")


def _training(work: Workload, replicas: Sequence[int], cluster: Cluster, again: Sequence[bool]) -> Training:
    """What a device of each stage has at once, without optimizer state."""
    chain = Plan.chain(len(replicas), _ranks(replicas, cluster), replicas=replicas)
    flight = versions(work.schedule(chain, work.microbatches))
    groups = [chain.replicas[first] for first in sorted(set(chain.replica_of))]
    in_flight = tuple(max(flight.in_flight[stage] for stage in group) for group in groups)
    live = tuple(max(flight.live[stage] for stage in group) for group in groups)
    return Training(in_flight, live, 0.0, tuple(again))


def _try(
    costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, again: Sequence[bool] = ()
) -> Plan | None:
    try:
        return _fitted(costed, request, cluster, work, again)
    except PlanError:
        return None


def _eased(costed: CostedGraph, request: Request, found: Plan, cluster: Cluster, work: Workload) -> Plan:
    """A plan of which no more stages compute their forward again than memory demands, and which is balanced for it."""
    best = _relieved(costed, found, cluster, work)
    tried = [(True,) * len(request.replicas)]
    while len(again := tuple(s in best.recomputed for s in sorted(set(best.replica_of)))) == len(tried[0]):
        other = None if again in tried else _try(costed, request, cluster, work, again)
        if other is None:
            break
        tried.append(again)
        other = _relieved(costed, other, cluster, work)
        if work.step_seconds(costed, other, cluster) >= work.step_seconds(costed, best, cluster) * WORTH:
            break
        best = other
    return best


def _relieved(costed: CostedGraph, found: Plan, cluster: Cluster, work: Workload) -> Plan:
    """The same plan with as few recomputed stages as memory allows, the slowest relieved first.

    Nothing is known then of how good it is.
    """
    costs = stage_costs(costed, found)
    for stage in sorted(found.recomputed, key=lambda s: costs[s].forward, reverse=True):
        plan = replace(found, recomputed=tuple(s for s in found.recomputed if s != stage), quality=None)
        if not any(_excess(work.memory(costed, plan, cluster, bound=True), cluster)):
            found = plan
    return found


def _excess(held: Memory, cluster: Cluster) -> list[int]:
    """For each rank of the cluster the bytes beyond its memory."""
    bytes_of = [*held.ranks, *[0] * (len(cluster) - len(held.ranks))]
    limits = [device.memory for device in cluster.devices]
    return [0 if limit is None else max(0, n - limit) for n, limit in zip(bytes_of, limits, strict=True)]


def _without_limits(cluster: Cluster) -> Cluster:
    return replace(cluster, devices=tuple(replace(device, memory=None) for device in cluster.devices))


def _refusal(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload) -> str:
    """What the fastest plan would hold too much, and what would make it fit."""
    fastest = _fitted(costed, request, _without_limits(cluster), work, _at_most(work, request))
    held = work.memory(costed, fastest, cluster, bound=True)
    over = _excess(held, cluster)
    rank = max(range(len(over)), key=over.__getitem__)
    limit = cluster.devices[rank].memory
    stages = [stage for stage, r in enumerate(fastest.rank_of) if r == rank]
    most = max(stages, key=lambda stage: held.stages[stage].total)
    parts = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in held.stages[most].by_kind() if n)
    helps = [text for text in (remedy(costed, request, cluster, work, fastest) for remedy in _REMEDIES) if text]
    return (
        f"the model does not fit into the memory of its devices: in the fastest plan of {fastest.num_stages} stages, "
        f"stage {most} would hold {bytes_text(held.ranks[rank])} of {bytes_text(limit or 0)}, "
        f"{bytes_text(over[rank])} too much ({parts}), and no other plan that fits was found; "
        + (f"what would make it fit: {'; '.join(helps)}" if helps else "use devices with more memory")
    )


def _at_most(work: Workload, request: Request) -> tuple[bool, ...]:
    """Which stages may compute their forward again."""
    return (work.recompute != "never",) * len(request.replicas)


def _recomputing(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, _: Plan) -> str:
    if work.recompute != "never" or not _try(costed, request, cluster, work, (True,) * len(request.replicas)):
        return ""
    return "recompute='auto'"


def _more_microbatches(costed: CostedGraph, _: Request, cluster: Cluster, work: Workload, plan: Plan) -> str:
    """An estimate: half as many rows are half as many bytes of everything that is not a parameter."""
    for factor in (2, 4, 8, 16):
        more = replace(work, microbatches=factor * work.microbatches)
        held = more.memory(costed, plan, cluster, bound=True)
        shrunk = [stage.total - stage.of_rows * (factor - 1) // factor for stage in held.stages]
        limits = [cluster.devices[rank].memory for rank in plan.rank_of]
        if all(limit is None or n <= limit for n, limit in zip(shrunk, limits, strict=True)):
            return f"about {more.microbatches} microbatches of the same batch in place of {work.microbatches}"
    return ""


def _more_devices(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, _: Plan) -> str:
    for factor in (2, 4):
        larger = replace(cluster, devices=cluster.devices * factor, pairs=())
        more = replace(request, replicas=request.replicas * factor)
        if _try(costed, more, larger, work, _at_most(work, more)):
            return f"{len(larger)} such devices in place of {len(cluster)}"
    return ""


_REMEDIES = (_recomputing, _more_microbatches, _more_devices)
