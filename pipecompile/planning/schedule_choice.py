"""Chooses a schedule, and with it the stages of each rank, by simulation: the shortest step within memory.

Each schedule gets a plan of its own: with the stages that it needs, within the memory that its microbatches in flight
leave, recomputing where that makes it fit. Then its step is simulated, with what it takes to split backwards
(``ir/split_nodes.py``). To it are added the runtime's seconds for each computation, so that short stages are not cut
into shorter ones.

Of schedules that take equally long, the one with the least memory is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.units import bytes_text, seconds_text
from pipecompile.planning.candidates import EVERY, Candidates
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.short_stages import all_short
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.placement import Placement
from pipecompile.schedule.stage_costs import OVERHEAD

CANDIDATE = 1.0  # CPU seconds of the search for the plan of one candidate
ALIKE = 1.001  # steps within this factor take equally long


@dataclass(frozen=True)
class Weighed:
    """A schedule that was weighed.

    Attributes:
        schedule: its name.
        per_rank: the stages of each rank.
        seconds: the predicted step, or None if it was refused.
        peak_bytes: the memory of the fullest rank.
        recomputed: the number of stages that recompute activations.
        offloaded: the number of stages that offload them.
        refused: why it was refused.
        microbatches: the number of microbatches of the step.
        least: a lower bound of the step, if it was not planned, for the reason in ``refused``.
    """

    schedule: str
    per_rank: int
    seconds: float | None = None
    peak_bytes: int = 0
    recomputed: int = 0
    offloaded: int = 0
    refused: str = ""
    microbatches: int = 0
    least: float | None = None

    @property
    def left_out(self) -> bool:
        """Whether it was not planned."""
        return self.least is not None

    def __str__(self) -> str:
        stages = f"{self.per_rank} stages on each rank" if self.per_rank > 1 else "one stage on each rank"
        stages += f", {microbatches_text(self.microbatches)}"
        if self.seconds is None:
            return f"{self.schedule}, {stages}: {self.refused}"
        again = f", {self.recomputed} stages recompute" if self.recomputed else ""
        again += f", {self.offloaded} stages offload" if self.offloaded else ""
        return (
            f"{self.schedule}, {stages}: predicted step {seconds_text(self.seconds)}, "
            f"{bytes_text(self.peak_bytes)} on the fullest rank{again}"
        )


def weigh(
    costed: CostedGraph,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
    among: Candidates = EVERY,
    plan: Plan | None = None,
) -> tuple[Weighed, ...]:
    """Schedules, the best one first, those that were refused last.

    Args:
        costed: the costs of a microbatch.
        cluster: the devices.
        work: of which schedule and placement are replaced.
        options: constraints on every plan; with ``stages_per_rank``, only schedules that can have that number.
        among: the schedules.
        plan: the plan that all of them run; by default each has its own.
    """
    weighing = Weighing(costed=costed, cluster=cluster, work=work, options=options, plan=plan)
    return ordered([weighing.of(name, placement) for name, placement in among.placed(options)], among)


@dataclass(frozen=True)
class Weighing:
    """Weighs candidates with one number of microbatches. The arguments are those of ``weigh``."""

    costed: CostedGraph
    cluster: Cluster
    work: Workload
    options: PlanOptions
    plan: Plan | None = None
    plans: dict[Placement, Plan] = field(default_factory=dict)  # without memory limits, all of a placement have one

    def of(self, name: str, placement: Placement) -> Weighed:
        """A candidate with its predicted step."""
        costed, cluster, this = self.costed, self.cluster, self.work.under(name, placement)
        found = Weighed(schedule=name, per_rank=placement.per_rank, microbatches=this.microbatches)
        if not this.splits and _splits(name, placement):
            return replace(found, refused="compiled stages do not split their backwards")
        try:
            plan = self.plan or self._own(placement, this)
        except PlanError as error:
            return replace(found, refused=str(error))
        ranks = this.memory(costed, plan, cluster).ranks
        for rank, (device, nbytes) in enumerate(zip(cluster.devices, ranks, strict=False)):
            if self.plan is not None and device.memory is not None and nbytes > device.memory:
                has = f"rank {rank} needs {bytes_text(nbytes)}, and its device has {bytes_text(device.memory)}"
                return replace(found, refused=has)
        return replace(
            found,
            seconds=predicted_step(costed, plan, cluster, this),
            peak_bytes=max(ranks),
            recomputed=len(plan.recomputed),
            offloaded=len(plan.offloaded),
        )

    def _own(self, placement: Placement, work: Workload) -> Plan:
        """The plan of a candidate, within memory."""
        limited = any(device.memory is not None for device in self.cluster.devices)
        if limited or placement not in self.plans:
            quick = replace(self.options.without_search(), search_seconds=CANDIDATE)
            request = Request.of(quick, placement, len(self.cluster))
            self.plans[placement] = make_plan(self.costed, request, self.cluster, work)
        return self.plans[placement]


def weighed_again(
    found: Iterable[Weighed],
    costed: CostedGraph,
    plan: Plan,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
) -> tuple[Weighed, ...]:
    """Those of some schedules that can run a plan, in their order, as they are weighed with it.

    Args:
        found: the schedules, as they were weighed.
        costed: the costs of a microbatch.
        plan: the plan.
        cluster: the devices.
        work: the workload that the plan is for.
        options: the constraints on it.
    """
    weighing = Weighing(costed=costed, cluster=cluster, work=work, options=options, plan=plan)
    return tuple(
        weighing.of(it.schedule, work.placement)
        for it in found
        if it.microbatches == work.microbatches and SCHEDULES[it.schedule].placed(it.per_rank) == work.placement
    )


def ordered(found: Iterable[Weighed], among: Candidates = EVERY) -> tuple[Weighed, ...]:
    """Candidates, the best one first, those that were refused or left out last."""
    found = list(found)
    weights = {it: among.weight(it.schedule, it.seconds) for it in found if it.seconds is not None}
    least = min(weights.values(), default=0.0)

    def rank(it: Weighed) -> tuple[int, float, int]:
        if it not in weights:
            return 1 + it.left_out, 0.0, 0
        return 0, 0.0 if weights[it] <= least * ALIKE else weights[it], it.peak_bytes

    return tuple(sorted(found, key=rank))


def best_step(costed: CostedGraph, plan: Plan, cluster: Cluster, work: Workload, among: Candidates) -> float:
    """The predicted step of a plan under the best of the schedules, whatever memory there is.

    If all stages are short, that is the preferred one.
    """
    names = (among.prefers,) if all_short(stage_costs(costed, plan)) else among.names
    steps = {name: predicted_step(costed, plan, cluster, work.under(name, work.placement)) for name in names}
    return steps[among.best(steps)]


def least_seconds(costed: CostedGraph, cluster: Cluster, name: str, placement: Placement, count: int) -> float:
    """A lower bound of the predicted step of a candidate, whatever its plan.

    All work is done by some rank. With one stage on each rank and whole backwards, take the longest path of the graph,
    with seconds q_k on the k-th rank that it visits: before the first forward of that rank, and after its last
    backward, are those of one microbatch on the ranks before, so q_0 + ... + q_{k-1} + count q_k is at most the step,
    and the path at most step (1 - (1 - 1 / count)^ranks).
    """
    ranks, speeds = len(cluster), [device.speed for device in cluster.devices]
    paired = zip(costed.graph.nodes, costed.costs, strict=True)
    seconds = [0.0 if node.rematerialized else cost.seconds for node, cost in paired]
    bound = count * sum(seconds) / sum(speeds)
    if placement.is_plain and not _splits(name, placement):
        behind: list[float] = []
        for node, own in zip(costed.graph.nodes, seconds, strict=True):
            behind.append(own + max((behind[source] for source in node.inputs), default=0.0))
        bound = max(bound, max(behind, default=0.0) / max(speeds) / (1 - (1 - 1 / count) ** ranks))
    return bound + runtime_seconds(placement, count)


def runtime_seconds(placement: Placement, count: int) -> float:
    """The runtime's seconds for the forwards and backwards of a rank."""
    return OVERHEAD * 2 * placement.per_rank * count


def microbatches_text(count: int) -> str:
    return f"{count} microbatch{'' if count == 1 else 'es'}"


def predicted_step(costed: CostedGraph, plan: Plan, cluster: Cluster, work: Workload) -> float:
    """The seconds of a step, with the runtime's: of the longest row, and of a microbatch's way there and back."""
    program = work.schedule(plan, work.microbatches)
    per_rank = plan.num_stages / len(set(plan.rank_of))
    overhead = OVERHEAD * (max(map(len, program.ranks)) + 2 * (plan.num_stages - per_rank))
    return work.step_seconds(costed, plan, cluster) + overhead


def _splits(name: str, placement: Placement) -> bool:
    stages = placement.rank_of(2)
    return bool(SCHEDULES[name].with_flush(Plan.chain(len(stages), stages), 2).split)
