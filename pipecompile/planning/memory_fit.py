"""Plans within memory: partitions, schedules and computes memory in turn, until every device has enough.

The partitioner knows the memory that is a sum over nodes. The rest (tied copies, values of other stages, temporaries)
is known only for a complete plan. If a plan is too large, the excess is reserved, and the next plan is made within the
remaining memory.

With ``recompute="auto"``, stages recompute activations if that makes the step shorter than an uneven cut of the model,
or if it is the only way to fit. Start with every stage recomputing. As memory allows, turn recomputation off, slowest
stage first. Then rebalance, since the stages that still recompute are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil, inf

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_quality import Quality
from pipecompile.ir.units import bytes_text
from pipecompile.ir.weight_versions import versions
from pipecompile.partition import Training
from pipecompile.planning.memory import Memory
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload

ATTEMPTS = 4
MARGIN = 1.25  # factor on the excess of a plan that the next one reserves
WORTH = 0.999  # a plan is replaced if the new step is shorter than this share of the old


@dataclass(frozen=True)
class Fitting:
    """The search for plans of a model within the memory of a cluster."""

    costed: CostedGraph
    request: Request
    cluster: Cluster
    work: Workload
    searched: dict[object, Plan | PlanError] = field(default_factory=dict, compare=False)  # result of each search

    def plan(self) -> Plan:
        """The best plan found. Complete plans are compared by the objective, or by the predicted step for "pace".

        Raises:
            InputError: a constraint names a module or a stage that does not exist.
            InfeasibleError: no plan exists; the message names the stage of the fastest plan that exceeds its memory,
                by how much, and what helps.
            PlanError: no plan was found, or a stage cannot have the requested replicas.
        """
        fewest = self.every if self.work.recompute == "always" else ()
        fastest = self._fastest(fewest)
        if self._is_free or not any(self._excess(fastest)):
            return fastest
        plans = [self._try(fewest), self._eased() if self.work.recompute == "auto" else None]
        found = min((plan for plan in plans if plan), key=self._score, default=None)
        if found is None:
            raise self._refusal()
        return replace(found, quality=self._quality(found, fastest))

    @cached_property
    def every(self) -> tuple[bool, ...]:
        """Every stage recomputes activations."""
        return (True,) * len(self.request.replicas)

    def _fastest(self, again: Sequence[bool]) -> Plan:
        """The best plan without memory limits, in which the stages ``again`` recompute activations."""
        devices = tuple(replace(device, memory=None) for device in self.cluster.devices)
        free = replace(self.cluster, devices=devices)
        search = partial(self.request.partition, self.costed, free, self._training(again), self.work)
        return self._once(("free", *again), search)

    def _try(self, again: Sequence[bool]) -> Plan | None:
        """A plan within memory in which the stages ``again`` recompute activations, or None if none was found."""
        try:
            return self._once(("fitted", *again), partial(self._fitted, again))
        except PlanError:
            return None

    def _fitted(self, again: Sequence[bool]) -> Plan:
        plan = self._fastest(again)
        training = replace(self._training(again), optimizer_state=self.work.state)
        reserved = [0] * len(self.cluster)
        for attempt in range(1 + ATTEMPTS):
            over = self._excess(plan)
            if not any(over):
                return plan
            if training.reserved:  # otherwise the plan was made without limits, and its excess means nothing
                reserved = [before + ceil(MARGIN * more) for before, more in zip(reserved, over, strict=True)]
            if attempt < ATTEMPTS:
                training = replace(training, reserved=tuple(reserved))
                plan = self.request.partition(self.costed, self.cluster, training, self.work)
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

    def _eased(self) -> Plan | None:
        """A plan in which only the necessary stages recompute activations, balanced accordingly."""
        best, tried = self._try(self.every), [self.every]
        if best is None:
            return None
        best = self._relieved(best)
        while len(again := tuple(s in best.recomputed for s in sorted(set(best.replica_of)))) == len(self.every):
            other = None if again in tried else self._try(again)
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
            if not any(self._excess(plan)):
                found = plan
        return found

    def _training(self, again: Sequence[bool]) -> Training:
        """The microbatches in flight and live weight versions of each stage; without optimizer state."""
        chain = self.request.chain(len(self.cluster))
        flight = versions(self.work.schedule(chain, self.work.microbatches))
        groups = [chain.replicas[first] for first in sorted(set(chain.replica_of))]
        in_flight = tuple(max(flight.in_flight[stage] for stage in group) for group in groups)
        live = tuple(max(flight.live[stage] for stage in group) for group in groups)
        return Training(in_flight, live, 0.0, tuple(again), asynchronous=self.work.asynchronous)

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

    def _held(self, plan: Plan) -> Memory:
        return self.work.memory(self.costed, plan, self.cluster, bound=True)

    def _excess(self, plan: Plan) -> list[int]:
        """For each rank of the cluster, the bytes that exceed its memory."""
        held = self._held(plan)
        bytes_of = [*held.ranks, *[0] * (len(self.cluster) - len(held.ranks))]
        limits = [device.memory for device in self.cluster.devices]
        return [0 if limit is None else max(0, n - limit) for n, limit in zip(bytes_of, limits, strict=True)]

    # Errors: no plan fits.

    def _refusal(self) -> PlanError:
        """The error that no plan fits: the excess of the fastest plan, and what would make it fit."""
        fastest = self._fastest(self._most)
        held, over = self._held(fastest), self._excess(fastest)
        rank = max(range(len(over)), key=over.__getitem__)
        limit = self.cluster.devices[rank].memory
        stages = [stage for stage, r in enumerate(fastest.rank_of) if r == rank]
        most = max(stages, key=lambda stage: held.stages[stage].total)
        parts = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in held.stages[most].by_kind() if n)
        helps = ", or ".join(self._remedies(fastest))
        room = sum(inf if device.memory is None else device.memory for device in self.cluster.devices)
        kind = InfeasibleError if self._least > room else PlanError
        return kind(
            f"the model does not fit into the memory of its devices: in the fastest plan of {fastest.num_stages} "
            f"stages, stage {most} would hold {bytes_text(held.ranks[rank])} of {bytes_text(limit or 0)}, "
            f"{bytes_text(over[rank])} too much ({parts}), and no plan that fits was found; "
            + (f"it would fit with {helps}" if helps else "use devices with more memory")
        )

    @property
    def _least(self) -> float:
        """The least bytes that all devices must hold together: weights, gradients and optimizer state."""
        each = self.costed.graph.parameters
        return sum(p.spec.nbytes * (1 + p.spec.requires_grad * (1 + self.work.state)) for p in each)

    @property
    def _most(self) -> tuple[bool, ...]:
        """Recomputation of every stage, if it is allowed."""
        return () if self.work.recompute == "never" else self.every

    def _remedies(self, fastest: Plan) -> Iterator[str]:
        work, cluster, request = self.work, self.cluster, self.request
        if work.recompute == "never" and self._try(self.every):
            yield "recompute='auto'"
        for factor in (2, 4, 8, 16):  # an estimate: half the rows need half the bytes, except parameters
            more = Fitting(self.costed, request, cluster, replace(work, microbatches=factor * work.microbatches))
            shrunk = [stage.total - stage.of_rows * (factor - 1) // factor for stage in more._held(fastest).stages]
            limits = [cluster.devices[rank].memory for rank in fastest.rank_of]
            if all(limit is None or n <= limit for n, limit in zip(shrunk, limits, strict=True)):
                yield f"about {more.work.microbatches} microbatches per batch instead of {work.microbatches}"
                break
        for factor in (2, 4):
            larger = replace(cluster, devices=cluster.devices * factor, pairs=())
            other = Fitting(self.costed, replace(request, replicas=request.replicas * factor), larger, work)
            if other._try(other._most):
                yield f"{len(larger)} such devices instead of {len(cluster)}"
                break
