"""A plan that fits: partition, schedule and memory, composed until what each device would hold is within its memory.

The partitioner knows what adds up node by node. What a stage holds beside that (tied weights, values of other stages,
what is on the way through a pass) is known once there is a plan; where a plan turns out to be too large, so much memory
is reserved, and the next plan is made within the rest.

Stages are planned along a row of the devices in which each has a fast link to the next. In the end devices that are
equal change places, so that heavy cuts lie on fast links.

With ``recompute="auto"`` a stage's backward computes its forward again where memory does not allow otherwise: all of
them first, then, as far as there is room, the slowest stages no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipecompile.cluster import Cluster
from pipecompile.errors import PlanError
from pipecompile.graph import CostedGraph
from pipecompile.memory import How, Memory, memory
from pipecompile.partition import ADAM, Training, assign, partition, suited
from pipecompile.plan import Plan, stage_costs
from pipecompile.program import Program
from pipecompile.render.units import bytes_text
from pipecompile.simulate import simulate
from pipecompile.versions import versions
from pipecompile.wishes import NO_WISHES, Wishes

Schedule = Callable[[Plan, int], Program]
Recompute = Literal["never", "always", "auto"]
RECOMPUTE = get_args(Recompute)
ATTEMPTS = 4
BUDGET = 10.0  # CPU seconds of a search without limits
SHORT = 4.0  # and of one of several within limits


@dataclass(frozen=True)
class Workload:
    """How a model is to be trained.

    Args:
        schedule: from a plan and a number of microbatches to a program.
        optimizer_state: bytes for each byte of trainable parameters, or a function that finds out once they matter.
        fused: the optimizer needs no memory while it steps; else on CUDA, where torch's update all parameters at once,
            a copy of them.
        tail: bytes that the last stage holds for what is computed once from the whole batch.
    """

    schedule: Schedule
    microbatches: int
    optimizer_state: float | Callable[[], float] = ADAM
    recompute: Recompute = "auto"
    tail: int = 0
    fused: bool = False

    def memory(
        self, costed: CostedGraph, plan: Plan, cluster: Cluster, buffers: Sequence[int] = (), bound: bool = False
    ) -> Memory:
        """What each stage and rank holds at its fullest, by the simulated clock.

        Args:
            buffers: bytes of each stage.
            bound: the most that may ever be there instead, however long anything takes.
        """
        at_once = any(device.kind or device.name.startswith("cuda") for device in cluster.devices)
        step: How = "fused" if self.fused else "foreach" if at_once else "single"
        program = self.schedule(plan, self.microbatches)
        timeline = None if bound else simulate(program, stage_costs(costed, plan), cluster)
        return memory(costed, plan, program, self.state, buffers, self.tail, step, timeline)

    @property
    def state(self) -> float:
        """Bytes of optimizer state for each byte of trainable parameters."""
        return self.optimizer_state() if callable(self.optimizer_state) else self.optimizer_state


@dataclass(frozen=True)
class Request:
    """What a plan is asked to be, beside fast and within memory.

    Args:
        replicas: for each stage how many devices run it.
        wishes: the user's hand.
        budget: CPU seconds after which a search for a plan ends with the best so far; ``SHORT`` within limits.
    """

    replicas: tuple[int, ...]
    wishes: Wishes = NO_WISHES
    budget: float = BUDGET

    def partition(self, costed: CostedGraph, cluster: Cluster, training: Training) -> Plan:
        """The best plan that was found for such training; where devices have a limit, after a short search."""
        limited = any(device.memory is not None for device in cluster.devices)
        budget = min(self.budget, SHORT) if limited else self.budget
        return partition(costed, len(self.replicas), cluster, training, self.wishes, budget, self.replicas)


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
    again = work.recompute == "always"
    try:
        return _fitted(costed, request, cluster, work, again)
    except PlanError as error:
        if all(device.memory is None for device in cluster.devices):
            raise
        if work.recompute == "auto" and (found := _try(costed, request, cluster, work, True)):
            return _eased(costed, found, cluster, work)
        raise type(error)(_refusal(costed, request, cluster, work)) from error


def _fitted(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, again: bool) -> Plan:
    training = _training(work, request.replicas, cluster, again)
    free = _without_limits(cluster)
    plan = request.partition(costed, free, training)
    if cluster == free:
        return plan
    training = replace(training, optimizer_state=work.state)
    reserved = [0] * len(cluster)
    for _ in range(ATTEMPTS):
        over = _excess(work.memory(costed, plan, cluster, bound=True), cluster)
        if not any(over):
            return plan
        if training.reserved:  # else the plan was made without limits, and says nothing of what must be reserved
            reserved = [before + more for before, more in zip(reserved, over, strict=True)]
        training = replace(training, reserved=tuple(reserved))
        plan = request.partition(costed, cluster, training)
    raise PlanError(f"no plan within memory was found in {ATTEMPTS} attempts")


def _training(work: Workload, replicas: Sequence[int], cluster: Cluster, again: bool) -> Training:
    """What a device of each stage has at once, without optimizer state."""
    chain = Plan.chain(len(replicas), _ranks(replicas, cluster), replicas=replicas)
    flight = versions(work.schedule(chain, work.microbatches))
    groups = [chain.replicas[first] for first in sorted(set(chain.replica_of))]
    in_flight = tuple(max(flight.in_flight[stage] for stage in group) for group in groups)
    return Training(in_flight, tuple(max(flight.live[stage] for stage in group) for group in groups), 0.0, again)


def _try(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, again: bool) -> Plan | None:
    try:
        return _fitted(costed, request, cluster, work, again)
    except PlanError:
        return None


def _eased(costed: CostedGraph, found: Plan, cluster: Cluster, work: Workload) -> Plan:
    """The same plan with as few recomputed stages as memory allows, the slowest relieved first."""
    costs = stage_costs(costed, found)
    for stage in sorted(found.recomputed, key=lambda s: costs[s].forward, reverse=True):
        plan = replace(found, recomputed=tuple(s for s in found.recomputed if s != stage))
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
    again = work.recompute != "never"
    fastest = _fitted(costed, request, _without_limits(cluster), work, again)
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


def _recomputing(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload, _: Plan) -> str:
    if work.recompute != "never" or not _try(costed, request, cluster, work, True):
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
        if _try(costed, more, larger, work, work.recompute != "never"):
            return f"{len(larger)} such devices in place of {len(cluster)}"
    return ""


_REMEDIES = (_recomputing, _more_microbatches, _more_devices)
