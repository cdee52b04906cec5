"""A plan together with what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.halves import Halves
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.split_nodes import stage_halves
from pipecompile.planning.counted import Counted
from pipecompile.planning.memory import Memory
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.replicas import Candidate, with_best_replicas
from pipecompile.planning.schedule_choice import Weighed, weighed_again
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import one_f_one_b


@dataclass(frozen=True)
class Planned:
    """A plan together with what it was made from.

    Args:
        plan: the plan.
        costed: the graph that was planned, with its costs.
        request: the stages and the constraints.
        cluster: the devices.
        work: the workload.
        candidates: for ``replicas="auto"``, the numbers of devices per stage that were compared, best first.
        remembered: what of it earlier processes have measured or planned, in words.
        key: the key under which it is remembered; empty if it is not.
        counted: the numbers of microbatches that were compared, if they were.
        schedule: the name of the schedule, if it was chosen.
        weighed: the schedules that it was chosen from, itself first. With other costs or another plan, those that can
            run the plan, as they are weighed then.
    """

    plan: Plan
    costed: CostedGraph
    request: Request
    cluster: Cluster
    work: Workload
    candidates: tuple[Candidate, ...] = ()
    remembered: tuple[str, ...] = ()
    key: str = ""
    counted: Counted | None = None
    schedule: str = ""
    weighed: tuple[Weighed, ...] = ()

    @cached_property
    def stage_costs(self) -> tuple[Cost, ...]:
        """The cost of each stage per microbatch."""
        return stage_costs(self.costed, self.plan)

    @cached_property
    def stage_halves(self) -> tuple[Halves, ...]:
        """The seconds of each stage per microbatch where its backward is split."""
        return stage_halves(self.costed, self.plan, self.cluster)

    @cached_property
    def run_costs(self) -> tuple[Cost, ...]:
        """The cost of each stage per microbatch as its schedule runs it: with what it takes to split its backward."""
        split = {i.stage for i in self.work.schedule(self.plan, self.work.microbatches).split}
        both = zip(self.stage_costs, self.stage_halves, strict=True)
        return tuple(it.cost if stage in split else cost for stage, (cost, it) in enumerate(both))

    def memory(self, buffers: Sequence[int] = ()) -> Memory:
        """The peak memory in training of each stage and rank.

        Args:
            buffers: bytes of buffers of each stage.
        """
        return self.work.memory(self.costed, self.plan, self.cluster, buffers)

    def again(self, costed: CostedGraph) -> Planned:
        """Another plan for the same request, made from other costs.

        Raises:
            PlanError: no plan was found.
        """
        return self._weighed_again(make_plan(costed, self.request, self.cluster, self.work), costed)

    def without_functions(self) -> Planned:
        """The same without what the user gave as functions, so that another process can read it."""
        return replace(
            self,
            request=replace(self.request, options=replace(self.request.options, objective="pace")),
            work=replace(self.work, schedule=one_f_one_b, optimizer_state=self.work.state, update=None),
        )

    def recosted(self, costed: CostedGraph) -> Planned:
        """The same plan with other costs, with which its quality is not known."""
        return self._weighed_again(replace(self.plan, quality=None), costed)

    def _weighed_again(self, plan: Plan, costed: CostedGraph) -> Planned:
        weighed = weighed_again(self.weighed, costed, plan, self.cluster, self.work, self.request.options)
        return replace(self, plan=plan, costed=costed, weighed=weighed)


def planned(
    costed: CostedGraph, cluster: Cluster, work: Workload, options: PlanOptions, num_stages: int | None = None
) -> Planned:
    """The plan that the options ask for.

    Args:
        costed: the graph to plan, with its costs.
        cluster: the devices.
        work: the workload.
        options: the user's constraints and objective.
        num_stages: the number of stages if the options do not list replicas; by default one per device.

    Raises:
        InputError, InfeasibleError, PlanError: as ``make_plan`` and ``with_best_replicas``.
    """
    candidates: tuple[Candidate, ...] = ()
    if options.replicas == "auto":
        plan, candidates = with_best_replicas(costed, cluster, work, options)
        request = Request(candidates[0].replicas, options)
    else:
        request = Request.of(options, work.placement, len(cluster), num_stages)
        plan = make_plan(costed, request, cluster, work)
    return Planned(plan=plan, costed=costed, request=request, cluster=cluster, work=work, candidates=candidates)
