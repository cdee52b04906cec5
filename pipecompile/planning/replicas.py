"""Chooses the number of stages and of devices per stage: the plan, with or without replicas, with the shortest step.

For each number of stages ``partition.deals`` proposes replicas. Each proposal becomes a plan within memory, and its
step is simulated. The predicted step includes sending new weights to the replicas at its start, to one after the other
from the rank that owns them.

Source: PipeDream (Narayanan et al., SOSP 2019), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from pipecompile.errors import InfeasibleError, InputError, PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import DEFAULT_PLAN, PlanOptions
from pipecompile.ir.units import seconds_text
from pipecompile.ir.weight_versions import versions
from pipecompile.partition import Step, deals
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload

MOST_DEVICES = 16  # the search time grows with their cube
CANDIDATE = 1.0  # CPU seconds of the search for one candidate


@dataclass(frozen=True, slots=True)
class Candidate:
    """The number of devices per stage, and the predicted seconds of a step, or the reason why no plan was found."""

    replicas: tuple[int, ...]
    seconds: float | None
    refused: str = ""

    def __str__(self) -> str:
        result = self.refused if self.seconds is None else f"predicted step {seconds_text(self.seconds)}"
        return f"{list(self.replicas)}: {result}"


def with_best_replicas(
    costed: CostedGraph,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions = DEFAULT_PLAN,
) -> tuple[Plan, tuple[Candidate, ...]]:
    """The plan with the shortest predicted step on all devices of the cluster, and all candidates, best first.

    Args:
        options: constraints on every plan, without pins and a number of stages, which depend on the number of stages
            that is searched; objective and CPU seconds of the final search. A candidate's search takes ``CANDIDATE``.

    Raises:
        InputError: there are too many devices, or the constraints fix stages.
        InfeasibleError: no candidate has a plan within memory.
    """
    if len(cluster) > MOST_DEVICES:
        raise InputError(
            f"replicas='auto' searches up to {MOST_DEVICES} devices, but there are {len(cluster)}; pass "
            f"replicas=[...], the number of devices of each stage"
        )
    if options.pins or options.max_stages is not None:
        raise InputError(
            f"replicas='auto' searches the number of stages, which the constraints fix ({options}); use no_split= and "
            f"colocate= alone, or pass replicas=[...], the number of devices of each stage"
        )
    quick = replace(options.without_search(), search_seconds=CANDIDATE)
    asked = [Request(replicas, quick) for replicas in _proposals(costed, cluster, work)]
    found = [_tried(costed, request, cluster, work) for request in asked]
    fitting = [candidate for candidate in found if candidate.seconds is not None]
    if not fitting:
        reasons = ", ".join(map(str, found)) or "no device has memory for the largest node"
        raise InfeasibleError(
            f"no number of stages and replicas has a plan on {len(cluster)} devices ({reasons}); use more devices, or "
            f"devices with more memory"
        )
    ordered = sorted(found, key=lambda it: (it.seconds is None, it.seconds))
    return make_plan(costed, Request(ordered[0].replicas, options), cluster, work), tuple(ordered)


def _proposals(costed: CostedGraph, cluster: Cluster, work: Workload) -> Iterator[tuple[int, ...]]:
    """The proposals without repeats: none replicated, and those of ``deals``, with and without recomputation."""

    @cache
    def in_flight(replicas: int, behind: int) -> int:
        chain = Plan.chain(1 + (behind > replicas), replicas=[replicas, *[behind - replicas] * (behind > replicas)])
        return max(versions(work.schedule(chain, work.microbatches)).in_flight[:replicas])

    modes = {"never": [False], "always": [True], "auto": [False, True]}[work.recompute]
    limited = any(device.memory is not None for device in cluster.devices)
    proposed: dict[tuple[int, ...], None] = {}
    for again in modes if limited else modes[:1]:
        state = work.state if limited else 0.0
        proposed |= dict.fromkeys(deals(costed, cluster, Step(work.microbatches, in_flight, state, again)))
    yield from dict.fromkeys([*proposed, (1,) * len(cluster)])


def _tried(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload) -> Candidate:
    try:
        plan = make_plan(costed, request, cluster, work)
    except PlanError as error:
        return Candidate(request.replicas, None, str(error))
    return Candidate(request.replicas, work.step_seconds(costed, plan, cluster))
