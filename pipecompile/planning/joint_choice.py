"""Chooses a schedule together with the number of microbatches: the least predicted seconds per row within memory.

Candidates are pairs of a schedule, with its placement, and a number of microbatches. All steps are of one batch, so
the shortest has the least seconds per row. The search is bounded:

    a candidate that cannot be shorter than the best one so far, by a lower bound, is not planned;
    the most promising are planned first, by the closed form of equal stages; after some CPU seconds, no more are.

A candidate with fewer rows in a microbatch needs less memory, so a larger number may be the only one that fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.units import seconds_text
from pipecompile.planning.by_rows import ByRows
from pipecompile.planning.candidates import EVERY, Candidates
from pipecompile.planning.counted import Count, Counted
from pipecompile.planning.schedule_choice import (
    ALIKE,
    Weighed,
    Weighing,
    least_seconds,
    microbatches_text,
    ordered,
    runtime_seconds,
)
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule.placement import Placement

LONGER = "since they cannot be shorter"
LATE = "since the search took"
TOLD = 8  # candidates of a kind that have a line of their own
SECONDS = 10.0  # CPU seconds after which no more candidates are planned, once one has a plan


def weigh_jointly(
    by_rows: ByRows,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
    counts: Sequence[int],
    seconds: float = SECONDS,
    among: Candidates = EVERY,
) -> tuple[Weighed, ...]:
    """All candidates, the chosen one first; those that were refused or not planned last.

    Args:
        by_rows: the costs of microbatches of any size.
        work: of which schedule, placement and number of microbatches are replaced.
        options: constraints on every plan.
        counts: the numbers of microbatches.
        seconds: CPU seconds after which no more candidates are planned, once one has a plan.
        among: the schedules.
    """
    limited = any(device.memory is not None for device in cluster.devices)
    if limited and not by_rows.knows_memory:
        counts = [count for count in counts if by_rows.size(count) <= by_rows.rows[0]]
    weighings = {
        count: Weighing(
            costed=by_rows.costed(count),
            cluster=cluster,
            work=replace(work, microbatches=count),
            options=options,
        )
        for count in counts
    }
    began, found, best = time.process_time(), [], float("inf")
    for name, placement, count in _promising(weighings, cluster, options, among):
        least = least_seconds(weighings[count].costed, cluster, name, placement, count)
        out_of_time = best < float("inf") and time.process_time() - began > seconds
        if least > best * ALIKE or out_of_time:
            left = replace(Weighed(name, placement.per_rank), microbatches=count, least=least)
            found.append(replace(left, refused=LONGER if least > best * ALIKE else f"{LATE} {seconds_text(seconds)}"))
            continue
        found.append(weighings[count].of(name, placement))
        best = min(best, found[-1].seconds or best)
    return ordered(found, among)


def counted(weighed: Sequence[Weighed], by_rows: ByRows) -> Counted | None:
    """The best predicted step of each number of microbatches that has one; None if none has."""
    steps: dict[int, float] = {}
    for it in weighed:
        if it.seconds is not None:
            steps[it.microbatches] = min(it.seconds, steps.get(it.microbatches, it.seconds))
    if not steps:
        return None
    tried = tuple(Count(count, step) for count, step in sorted(steps.items()))
    return Counted(weighed[0].microbatches, tried, by_rows.one_device())


def told(weighed: Sequence[Weighed]) -> Iterator[str]:
    """The candidates in words: the best, and some that were refused, each in a line; others in one for each number."""
    planned = [it for it in weighed if it.seconds is not None]
    refused = [it for it in weighed if it.seconds is None and not it.left_out]
    yield from map(str, planned[:TOLD])
    for (count, _), others in _by_count(planned[TOLD:]):
        steps = sorted({seconds_text(it.seconds or 0.0): it.seconds or 0.0 for it in others}.items(), key=itemgetter(1))
        last = f" to {steps[-1][0]}" if len(steps) > 1 else ""
        yield f"longer with {microbatches_text(count)}: {_names(others)}; {steps[0][0]}{last}"
    yield from map(str, refused[:TOLD])
    for (count, _), others in _by_count(replace(it, refused="") for it in refused[TOLD:]):
        yield f"refused too with {microbatches_text(count)}: {_names(others)}"
    for (count, why), others in _by_count(it for it in weighed if it.left_out):
        least = seconds_text(min(it.least or 0.0 for it in others))
        yield f"not planned with {microbatches_text(count)}, {why}: {_names(others)}; at least {least}"


def _by_count(weighed: Iterable[Weighed]) -> list[tuple[tuple[int, str], list[Weighed]]]:
    """Candidates by their numbers of microbatches, and by why they were refused."""
    found: dict[tuple[int, str], list[Weighed]] = {}
    for it in weighed:
        found.setdefault((it.microbatches, it.refused), []).append(it)
    return sorted(found.items(), key=itemgetter(0))


def _names(weighed: Iterable[Weighed]) -> str:
    return ", ".join(it.schedule for it in weighed)


def _promising(
    weighings: dict[int, Weighing], cluster: Cluster, options: PlanOptions, among: Candidates
) -> list[tuple[str, Placement, int]]:
    """All candidates, the most promising first: those with the shortest step if stages were equal."""
    ranks = len(cluster)
    each = {count: it.costed.seconds / ranks for count, it in weighings.items()}

    def estimate(candidate: tuple[str, Placement, int]) -> tuple[float, int]:
        _, placement, count = candidate
        bubble = (ranks - 1) / placement.per_rank
        return each[count] * (count + bubble) + runtime_seconds(placement, count), placement.per_rank

    named = list(among.placed(options))
    return sorted(((*pair, count) for count in weighings for pair in named), key=estimate)
