"""The request for one search for a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import DEFAULT_PLAN, PlanOptions
from pipecompile.partition import Training, partition, scored
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule.placement import PLAIN, Placement

SHORT = 2.5  # CPU seconds of one of several searches within memory limits


@dataclass(frozen=True)
class Request:
    """The stages to plan, and the constraints on the plan in addition to memory.

    Args:
        replicas: the number of devices that run each stage.
        options: the user's constraints and objective; its ``replicas`` are not used. A search within memory limits
            takes at most ``SHORT`` CPU seconds, because there are several searches.
        placement: where the stages are, if ranks run several.
    """

    replicas: tuple[int, ...]
    options: PlanOptions = DEFAULT_PLAN
    placement: Placement = PLAIN

    @staticmethod
    def of(options: PlanOptions, placement: Placement, devices: int, num_stages: int | None = None) -> Request:
        """The request for all devices.

        Args:
            num_stages: where ranks run one each: the number of stages, if the options do not list replicas; by default
                one per device.
        """
        if placement.is_plain:
            return Request(options.counts or (1,) * (num_stages or devices), options)
        return Request((1,) * len(placement.rank_of(devices)), options, placement)

    def partition(self, costed: CostedGraph, cluster: Cluster, training: Training, work: Workload) -> Plan:
        """The best plan found for a training configuration."""
        goal = self.options.objective
        limited = any(device.memory is not None for device in cluster.devices)
        return partition(
            work.with_updates(costed, cluster),
            len(self.replicas),
            cluster,
            training,
            self.options,
            min(self.options.search_seconds, SHORT) if limited else self.options.search_seconds,
            self.replicas,
            self.score(costed, cluster, work) if goal == "step" else goal,
            () if self.placement.is_plain else self.placement.rank_of(len(cluster)),
        )

    @property
    def scores_plans(self) -> bool:
        """Whether the objective is a score of a complete plan, not the cost of a stage."""
        return self.options.objective == "step" or callable(self.options.objective)

    def score(self, costed: CostedGraph, cluster: Cluster, work: Workload) -> Callable[[Plan], float]:
        """The score of a complete plan, to minimize: the user's function, or the predicted seconds of a step."""
        if callable(self.options.objective):
            return partial(scored, self.options.objective)
        return partial(work.step_seconds, costed, cluster=cluster)

    def on(self, ranks: Sequence[int]) -> Request:
        """The request for devices in another order; the user's function still gets plans with the original ranks."""
        objective = self.options.objective
        if not callable(objective):
            return self
        return replace(self, options=self.options.minimizing(lambda plan: objective(plan.on_ranks(ranks))))

    def chain(self, devices: int, nbytes: int = 0) -> Plan:
        """A plan without a graph: a chain of stages, assigned to the devices in turn."""
        if not self.placement.is_plain:
            return Plan.chain(len(self.replicas), self.placement.rank_of(devices), nbytes)
        ranks = [place % devices for place in range(sum(self.replicas))]
        return Plan.chain(len(self.replicas), ranks, nbytes, self.replicas)
