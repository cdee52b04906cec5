"""Plans for the best of several schedules, and for the best pair of a schedule and a number of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipecompile.errors import ExecutionError, PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.planning.by_rows import ByRows
from pipecompile.planning.candidates import EVERY, Candidates
from pipecompile.planning.joint_choice import counted, weigh_jointly
from pipecompile.planning.planned import Planned, planned
from pipecompile.planning.schedule_choice import Weighed, weigh, weighed_again
from pipecompile.planning.short_stages import all_short
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES


def under_best(found: Planned, among: Candidates) -> Planned:
    """A plan under the best of the schedules that can run it, with all as they were weighed.

    It stays as it is if all its stages are short, or if no schedule fits into memory.
    """
    if all_short(found.stage_costs):
        return found
    weighed = weigh(found.costed, found.cluster, found.work, found.request.options, among, found.plan)
    best = weighed[0]
    if best.seconds is None:
        return found
    work = found.work.under(best.schedule, found.work.placement)
    return replace(found, work=work, schedule=best.schedule, weighed=weighed)


def with_best_schedule(
    costed: CostedGraph, cluster: Cluster, work: Workload, options: PlanOptions, among: Candidates = EVERY
) -> Planned:
    """The plan for the schedule with the shortest predicted step, each with its own plan, and what was weighed.

    Raises:
        InputError, InfeasibleError, PlanError: as ``planned``; if no schedule fits, for the preferred one.
    """
    return for_first(weigh(costed, cluster, work, options, among), costed, cluster, work, options, among)


def with_best_pair(
    by_rows: ByRows,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
    tried: Sequence[int],
    costs_of: Callable[[int], CostedGraph],
    dropped: Callable[[int, Exception], None] = lambda number, error: None,
    among: Candidates = EVERY,
) -> Planned:
    """The plan for the schedule and the number of microbatches with the least predicted seconds per row.

    A number of which the costs cannot be had, or which does not fit after all, is dropped.

    Args:
        by_rows: the costs by which pairs are weighed.
        cluster: the devices.
        work: with the usual number of microbatches.
        options: constraints on every plan.
        tried: the numbers of microbatches, the usual one among them.
        costs_of: the costs of a number, from which its plan is made.
        dropped: is told a number that is dropped, and why.
        among: the schedules.

    Raises:
        InputError, InfeasibleError, PlanError: as ``planned``; if no pair fits, for the preferred schedule.
        ExecutionError: as ``costs_of`` for the usual number.
    """
    while True:
        weighed = weigh_jointly(by_rows, cluster, work, options, tried, among=among)
        found = counted(weighed, by_rows)
        this = work if found is None else replace(work, microbatches=found.chosen)
        try:
            best = for_first(weighed, costs_of(this.microbatches), cluster, this, options, among)
            return replace(best, counted=found)
        except (ExecutionError, PlanError) as error:
            if this.microbatches == work.microbatches:
                raise
            dropped(this.microbatches, error)
            tried = [number for number in tried if number != this.microbatches]


def for_first(
    weighed: tuple[Weighed, ...],
    costed: CostedGraph,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
    among: Candidates = EVERY,
) -> Planned:
    """The plan for the first of the schedules that were weighed, or for the preferred one if all were refused.

    Args:
        weighed: the schedules.
        costed: the costs of as many microbatches as ``work`` has.
        cluster: the devices.
        work: the workload.
        options: the user's constraints and objective.
        among: the schedules.

    Raises:
        InputError, InfeasibleError, PlanError: as ``planned``.
    """
    best = weighed[0].schedule if weighed and weighed[0].seconds is not None else among.prefers
    this = work.under(best, SCHEDULES[best].placed(options.stages_per_rank))
    found = planned(costed, cluster, this, options)
    first = weighed[:1] if weighed and weighed[0].seconds is not None else ()
    own = weighed_again(first, costed, found.plan, cluster, this, options)  # its search was longer, by its own costs
    return replace(found, schedule=best, weighed=(*own, *weighed[len(first) :]))
