"""What a plan is asked to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.constraints import NO_WISHES, Wishes
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.partition import Objective, Training, partition, scored
from pipecompile.planning.training_spec import Workload

Goal = Objective | Literal["step"]
GOALS = ("pace", "overlap", "step")
BUDGET = 10.0  # CPU seconds of a search without limits
SHORT = 2.5  # and of one of several within limits


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
        objective = self.score(costed, cluster, work) if self.objective == "step" else self.objective
        return partition(costed, len(self.replicas), cluster, training, self.wishes, budget, self.replicas, objective)

    def score(self, costed: CostedGraph, cluster: Cluster, work: Workload) -> Callable[[Plan], float]:
        """What chooses between whole plans: the function that was given, or the predicted step."""
        if callable(self.objective):
            return partial(scored, self.objective)
        return partial(work.step_seconds, costed, cluster=cluster)

    def on(self, ranks: Sequence[int]) -> Request:
        """The same where the devices stand in another order: a function of plans still sees ranks of the first."""
        objective = self.objective
        if not callable(objective):
            return self
        return replace(self, objective=lambda plan: objective(plan.on_ranks(ranks)))

    def chain(self, devices: int, nbytes: int = 0) -> Plan:
        """The stages in a row without a graph, one after the other on so many devices, and round again."""
        ranks = [place % devices for place in range(sum(self.replicas))]
        return Plan.chain(len(self.replicas), ranks, nbytes, self.replicas)
