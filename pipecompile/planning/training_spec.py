"""The training configuration that planning needs, in addition to the model and the devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import Offloading, Recompute
from pipecompile.partition import ADAM
from pipecompile.planning.memory import NO_TAIL, How, Memory, TailBytes, memory
from pipecompile.planning.predict import predict
from pipecompile.planning.updates import UpdateCost, update_seconds_of, updates_per_microbatch, with_updates
from pipecompile.schedule import SCHEDULES, MakeProgram
from pipecompile.schedule.placement import PLAIN, Placement


@dataclass(frozen=True)
class Workload:
    """The configuration of a training run.

    Args:
        schedule: makes a program from a plan and a number of microbatches.
        microbatches: per step.
        optimizer_state: bytes per byte of trainable parameters, or a function that returns them, called when needed.
        recompute: whether the backward of a stage recomputes its activations.
        offload: whether activations go to the host's memory between the passes.
        tail: what the last stage holds for what is computed once from the whole batch.
        fused: whether the optimizer step needs no temporary memory. Otherwise it needs, on CUDA, a copy of all
            parameters, because torch's optimizers update them together there.
        asynchronous: whether each stage steps on its own.
        placement: where the stages are that the schedule asks for.
        update: the seconds of the optimizer's steps on a CPU, or a function that returns them, called when needed; None
            if they are not known. They count where steps are inside the pipeline.
        splits: whether backwards can be split. Those of compiled stages cannot.
        loss_outside: whether the caller computes the loss, so that all Forwards run before the Backwards.
    """

    schedule: MakeProgram
    microbatches: int
    optimizer_state: float | Callable[[], float] = ADAM
    recompute: Recompute = "auto"
    offload: Offloading = "auto"
    tail: TailBytes = NO_TAIL
    fused: bool = False
    asynchronous: bool = False
    placement: Placement = PLAIN
    update: UpdateCost | Callable[[int], UpdateCost | None] | None = None
    splits: bool = True
    loss_outside: bool = False

    def __post_init__(self) -> None:
        if self.offload == "always" and self.asynchronous:
            raise InputError(
                "offload='always' does not work with schedules that step inside the pipeline, whose activations stay "
                "from one call to the next; use offload='auto', or schedule='1f1b' or another that ends each step with "
                "an empty pipeline"
            )

    def under(self, name: str, placement: Placement) -> Workload:
        """The same under another schedule, by its name."""
        return replace(self, schedule=SCHEDULES[name].steady, placement=placement)

    def memory(
        self, costed: CostedGraph, plan: Plan, cluster: Cluster, buffers: Sequence[int] = (), bound: bool = False
    ) -> Memory:
        """The peak memory of each stage and rank, by simulation.

        Args:
            costed: the model with its costs.
            plan: the stages.
            cluster: the devices.
            buffers: bytes of buffers of each stage.
            bound: return an upper bound instead, which holds whatever the times of instructions are.
        """
        program = self.schedule(plan, self.microbatches)
        timeline = None if bound else predict(program, costed, cluster)
        return memory(costed, plan, program, self.state, buffers, self.tail, self.step_on(cluster), timeline)

    def step_on(self, cluster: Cluster) -> How:
        """How the optimizer updates parameters on some devices."""
        at_once = not all(device.is_cpu for device in cluster.devices)
        return "fused" if self.fused else "foreach" if at_once else "single"

    def step_seconds(self, costed: CostedGraph, plan: Plan, cluster: Cluster) -> float:
        """Predicted seconds of a step, including the transfer of tied parameters to other stages and replicas."""
        updates = self.update_seconds(costed, plan, cluster)
        timeline = predict(self.schedule(plan, self.microbatches), costed, cluster, updates)
        return timeline.makespan + max(_weights_seconds(plan, cluster).values(), default=0.0)

    def with_updates(self, costed: CostedGraph, cluster: Cluster) -> CostedGraph:
        """The costs to plan with: those of a microbatch, with its share of updates inside the pipeline."""
        cost = self._update_cost(costed, cluster)
        if cost is None:
            return costed
        return with_updates(costed, cost, updates_per_microbatch(self.schedule, self.microbatches))

    def update_seconds(self, costed: CostedGraph, plan: Plan, cluster: Cluster) -> tuple[float, ...]:
        """The seconds of one update of each stage inside the pipeline, on a device of speed 1; 0 if not known."""
        cost = self._update_cost(costed, cluster)
        return (0.0,) * plan.num_stages if cost is None else update_seconds_of(costed, plan, cost)

    def _update_cost(self, costed: CostedGraph, cluster: Cluster) -> UpdateCost | None:
        """What updates inside the pipeline cost; None if there are none, or their seconds are not known.

        They are measured only beside measured costs: counted ones are of another device, and plans of them repeatable.
        """
        if not self.asynchronous or not all(device.is_cpu for device in cluster.devices):
            return None
        if callable(self.update):
            threads = 1 if costed.setting is None else costed.setting.threads
            return self.update(threads) if costed.measured else None
        return self.update

    @property
    def state(self) -> float:
        """Bytes of optimizer state per byte of trainable parameters."""
        return self.optimizer_state() if callable(self.optimizer_state) else self.optimizer_state


def _weights_seconds(plan: Plan, cluster: Cluster) -> dict[int, float]:
    """For each rank that owns tied parameters, the seconds to send them to all followers."""
    nbytes: Counter[tuple[int, int]] = Counter()
    for tied in plan.tied:
        for follower in tied.followers:
            nbytes[plan.rank_of[tied.owner], plan.rank_of[follower]] += tied.nbytes
    seconds: dict[int, float] = {}
    for (owner, follower), size in nbytes.items():
        seconds[owner] = seconds.get(owner, 0.0) + cluster.transfer_seconds(owner, follower, size)
    return seconds
