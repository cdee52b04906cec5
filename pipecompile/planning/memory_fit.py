"""Plans within memory: partitions, schedules and computes memory in turn, until every device has enough.

The partitioner knows the memory that is a sum over nodes. The rest (tied copies, values of other stages, temporaries)
is known only for a complete plan. If a plan is too large, the excess is reserved, and the next plan is made within the
remaining memory.

With ``recompute="auto"``, stages recompute activations if that makes the step shorter than an uneven cut of the model,
or if it is the only way to fit. Start with every stage recomputing. As memory allows, turn recomputation off, slowest
stage first. Then rebalance, since the stages that still recompute are slower.

With ``offload="auto"``, a plan that offloads activations is weighed against that, by the predicted step, if the step
is longer than without memory limits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_quality import Quality
from pipecompile.ir.weight_versions import versions
from pipecompile.partition import Training
from pipecompile.planning.memory import Memory
from pipecompile.planning.offloading import exchanged, kept, offloading, resident
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload

ATTEMPTS = 4
MARGIN = 1.25  # factor on the excess of a plan that the next one reserves
KNOWN = 4  # plans whose memory is known
WORTH = 0.999  # a plan is replaced if the new step is shorter than this share of the old


@dataclass(frozen=True)
class Fitting:
    """The search for plans of a model within the memory of a cluster."""

    costed: CostedGraph
    request: Request
    cluster: Cluster
    work: Workload
    searched: dict[object, Plan | PlanError] = field(default_factory=dict, compare=False)  # result of each search
    known: deque[tuple[Plan, Memory]] = field(default_factory=lambda: deque(maxlen=KNOWN), compare=False)

    def plan(self) -> Plan | None:
        """The best plan found within memory, or None if none was found.

        Complete plans are compared by the objective, or by the predicted step for "pace".

        Raises:
            InputError: a constraint names a module or a stage that does not exist.
            PlanError: there is no plan even without memory limits, or a stage cannot have the requested replicas.
        """
        fewest = self.every if self.work.recompute == "always" else ()
        fastest = self.fastest(fewest)
        if self.work.offload == "always":
            fastest = offloading(fastest, self.cluster)
        if self._is_free or not any(self.excess(fastest)):
            return fastest
        eased = self._eased() if self.work.recompute == "auto" else None
        found = self._shortest([self.attempt(fewest), eased])
        if found is None or self._score(found) * WORTH > self._score(fastest):  # memory costs time
            found = self._shortest([found, *self._offloaded(eased)])
        return None if found is None else replace(found, quality=self._quality(found, fastest))

    def _shortest(self, plans: Sequence[Plan | None]) -> Plan | None:
        return min((plan for plan in plans if plan), key=self._score, default=None)

    def varied(
        self,
        costed: CostedGraph | None = None,
        request: Request | None = None,
        cluster: Cluster | None = None,
        work: Workload | None = None,
    ) -> Fitting:
        """The search with something changed."""
        return Fitting(costed or self.costed, request or self.request, cluster or self.cluster, work or self.work)

    @cached_property
    def every(self) -> tuple[bool, ...]:
        """Every stage recomputes activations."""
        return (True,) * len(self.request.replicas)

    @property
    def most(self) -> tuple[bool, ...]:
        """Recomputation of every stage, if it is allowed."""
        return () if self.work.recompute == "never" else self.every

    @property
    def in_flight(self) -> int:
        """The most microbatches that a stage keeps for its backward."""
        return max(self._training(self.most).in_flight)

    def fastest(self, again: Sequence[bool]) -> Plan:
        """The best plan without memory limits, in which the stages ``again`` recompute activations."""
        devices = tuple(replace(device, memory=None) for device in self.cluster.devices)
        free = replace(self.cluster, devices=devices)
        search = partial(self.request.partition, self.costed, free, self._training(again), self.work)
        return self._once(("free", *again), search)

    def attempt(self, again: Sequence[bool], away: bool = False) -> Plan | None:
        """A plan within memory, or None if none was found.

        Args:
            again: the stages that recompute activations.
            away: whether all others offload them, those on accelerators.
        """
        away = away or self.work.offload == "always"
        try:
            return self._once(("fitted", away, *again), partial(self._fitted, again, away))
        except PlanError:
            return None

    def _fitted(self, again: Sequence[bool], away: bool) -> Plan:
        plan = self.fastest(again)
        if away:
            plan = offloading(plan, self.cluster)
        training = replace(self._training(again, away), optimizer_state=self.work.state)
        reserved = [0] * len(self.cluster)
        for attempt in range(1 + ATTEMPTS):
            over = self.excess(plan)
            if not any(over):
                return plan
            if training.reserved:  # otherwise the plan was made without limits, and its excess means nothing
                reserved = [before + ceil(MARGIN * more) for before, more in zip(reserved, over, strict=True)]
            if attempt < ATTEMPTS:
                training = replace(training, reserved=tuple(reserved))
                plan = self.request.partition(self.costed, self.cluster, training, self.work)
                plan = offloading(plan, self.cluster) if away else plan
        raise PlanError(f"no plan within memory was found in {ATTEMPTS} attempts")

    def _once(self, key: object, search: Callable[[], Plan]) -> Plan:
        """Runs a search once, and returns its plan or raises its error every time."""
        if key not in self.searched:
            try:
                self.searched[key] = search()
            except PlanError as error:
                self.searched[key] = error
        found = self.searched[key]
        if isinstance(found, PlanError):
            raise found
        return found

    def offloaded(self) -> Plan | None:
        """A plan within memory whose stages offload activations where it is necessary, or None if none was found."""
        if not self._may_offload:
            return None
        fastest = offloading(self.fastest(()), self.cluster)
        plan = self.attempt((), away=True) if any(self.excess(fastest)) else fastest
        return None if plan is None else kept(plan, self._fits, self._score)

    def _offloaded(self, eased: Plan | None) -> list[Plan | None]:
        """Plans that offload instead of recomputing, everywhere or where it makes the step shorter."""
        if not self._may_offload or self.work.recompute == "always":
            return []
        mixed = None if eased is None else exchanged(eased, self.cluster, self._fits, self._score)
        return [self.offloaded(), mixed]

    @property
    def _may_offload(self) -> bool:
        return (
            self.work.offload == "auto"
            and not self.work.asynchronous
            and not all(device.is_cpu for device in self.cluster.devices)
        )

    def _fits(self, plan: Plan) -> bool:
        return not any(self.excess(plan))

    def _eased(self) -> Plan | None:
        """A plan in which only the necessary stages recompute activations, balanced accordingly."""
        best, tried = self.attempt(self.every), [self.every]
        if best is None:
            return None
        best = self._relieved(best)
        while len(again := tuple(s in best.recomputed for s in sorted(set(best.replica_of)))) == len(self.every):
            other = None if again in tried else self.attempt(again)
            if other is None:
                break
            tried.append(again)
            other = self._relieved(other)
            if self._score(other) >= self._score(best) * WORTH:
                break
            best = other
        return best

    def _relieved(self, found: Plan) -> Plan:
        """The same plan with as few recomputing stages as memory allows; recomputation is turned off slowest first."""
        costs = stage_costs(self.costed, found)
        for stage in sorted(found.recomputed, key=lambda s: costs[s].forward, reverse=True):
            plan = replace(found, recomputed=tuple(s for s in found.recomputed if s != stage), quality=None)
            plan = offloading(plan, self.cluster) if self.work.offload == "always" else plan
            if not any(self.excess(plan)):
                found = plan
        return found

    def _training(self, again: Sequence[bool], away: bool = False) -> Training:
        """The microbatches in flight and live weight versions of each stage; without optimizer state."""
        in_flight, live = self._held_away if away else self._held_here
        return Training(in_flight, live, 0.0, tuple(again), asynchronous=self.work.asynchronous)

    @cached_property
    def _held_here(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._held(away=False)

    @cached_property
    def _held_away(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._held(away=True)

    def _held(self, away: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most microbatches on the device, and the most live weight versions, of each stage in a chain."""
        chain = self.request.chain(len(self.cluster))
        chain = offloading(chain, self.cluster) if away else chain
        program = self.work.schedule(chain, self.work.microbatches)
        flight, on_device = versions(program), resident(program)
        groups = [chain.replicas[first] for first in sorted(set(chain.replica_of))]
        in_flight = tuple(max(on_device[stage] for stage in group) for group in groups)
        return in_flight, tuple(max(flight.live[stage] for stage in group) for group in groups)

    @property
    def _is_free(self) -> bool:
        return all(device.memory is None for device in self.cluster.devices)

    @cached_property
    def _score(self) -> Callable[[Plan], float]:
        return self.request.score(self.costed, self.cluster, self.work)

    def _quality(self, found: Plan, fastest: Plan) -> Quality | None:
        """The quality of a plan within memory, bounded by the fastest plan; None if only some stages recompute.

        The search within limits knows bytes only roughly, and of stages that recompute only their slowdown.
        """
        if found.quality is None or fastest.quality is None or 0 < len(found.recomputed) < found.num_stages:
            return None
        bound = min(fastest.quality.lower_bound, found.quality.bottleneck)
        return replace(found.quality, lower_bound=bound)

    def held(self, plan: Plan) -> Memory:
        """The memory of a plan. That of the last ones is known, since a large program takes seconds."""
        for known, memory in self.known:
            if known is plan:
                return memory
        memory = self.work.memory(self.costed, plan, self.cluster, bound=True)
        self.known.append((plan, memory))
        return memory

    def excess(self, plan: Plan) -> list[int]:
        """For each rank of the cluster, the bytes that exceed its memory."""
        held = self.held(plan)
        bytes_of = [*held.ranks, *[0] * (len(self.cluster) - len(held.ranks))]
        limits = [device.memory for device in self.cluster.devices]
        return [0 if limit is None else max(0, n - limit) for n, limit in zip(bytes_of, limits, strict=True)]
