"""The schedules among which planning chooses, where the user names none, and the rule by which it does.

Without ``schedule=`` these are 1F1B and ZB-H1, which keeps about as much in memory and runs the same plan. ZB-H1 (Qi et
al., ICLR 2024, section 2) computes gradients of weights where 1F1B waits for other stages. That is worth most with few
microbatches, of which each takes longer per row the fewer rows it has. But to split a backward takes time too
(``ir/split_nodes.py``), so ZB-H1 has to pay. "auto" means all synchronous schedules, each with a plan of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import AUTO, SCHEDULES
from pipecompile.schedule.placement import Placement


@dataclass(frozen=True)
class Candidates:
    """Schedules among which one is chosen.

    Attributes:
        names: their names.
        prefers: the one that runs until one is chosen, where none can be, and where all others were refused.
        pays: the share of a step that another one must save to be taken instead.
        one_plan: whether all run the plan of ``prefers``. Otherwise each has its own, and its own stages on each rank.
    """

    names: tuple[str, ...]
    prefers: str = "1f1b"
    pays: float = 0.0
    one_plan: bool = False

    @staticmethod
    def of(asked: object) -> Candidates | None:
        """Those that an argument ``schedule`` leaves open; None if it is one schedule."""
        return DEFAULT if asked is None else EVERY if asked == AUTO else None

    def placed(self, options: PlanOptions) -> Iterator[tuple[str, Placement]]:
        """Their names and where their stages are, without those that cannot have the stages per rank of the options."""
        for name in self.names:
            try:
                yield name, SCHEDULES[name].placed(options.stages_per_rank)
            except InputError:
                continue

    def weight(self, name: str, seconds: float) -> float:
        """A predicted step, as it is compared with others."""
        return seconds if name == self.prefers else seconds / (1 - self.pays)

    def best(self, steps: Mapping[str, float]) -> str:
        """The one to take, by predicted steps alone."""
        return min(steps, key=lambda name: self.weight(name, steps[name]))

    def are_open(self, work: Workload, cluster: Cluster, options: PlanOptions, measured: bool) -> bool:
        """Whether a plan may choose among them.

        There is nothing to choose if the caller computes the loss: all Forwards run before the Backwards, whatever the
        schedule. Without being asked to, a plan chooses on CPUs only, for which the seconds of splitting are known.

        Args:
            work: the workload.
            cluster: the devices.
            options: the constraints on the plan.
            measured: whether seconds are measured on these devices, and another choice in another run does no harm.
        """
        if work.loss_outside or not self.one_plan:
            return not work.loss_outside
        on_cpu = all(device.is_cpu for device in cluster.devices)
        return measured and on_cpu and work.splits and options.replicas is None


LEFT_OUT = ("sequential",)  # never shorter than the others
EVERY = Candidates(tuple(n for n, it in SCHEDULES.items() if not it.is_asynchronous and n not in LEFT_OUT))
DEFAULT = Candidates(("1f1b", "zb-h1"), pays=0.03, one_plan=True)
