"""Finds a good order under a memory cap: candidates, W with real times, squeezes, and a search around the best.

    candidates      rows of F and B: a schedule's own, merges with many limits, lists of greedy runs
    place_weights   each with W after several rules, within the cap; the best few go on
    squeeze         until it stops to help
    search          squeezes with times that are wrong at random, then with the right ones; what is better is kept

All is counted in passes over the computations, so the same input gives the same order on any machine.

Source: the first two as in Zero Bubble (Qi et al., ICLR 2024), section 3; the last is an iterated local search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from random import Random

from pipecompile.schedule.job import Job, job_of
from pipecompile.schedule.list_schedule import list_schedule
from pipecompile.schedule.order import Order, Rows
from pipecompile.schedule.place_weights import Placed, place_weights
from pipecompile.schedule.policy import merge, one_f_one_b
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.squeeze import Timed, mirrored, squeeze, timed
from pipecompile.schedule.stage_costs import StageCosts, busy

PATIENCE = (0.0, 0.5, 1.0)
SQUEEZE_PASSES = 12  # what one squeeze costs, in passes of ``timed``
LARGE = 20_000  # computations from which fewer candidates are tried
AMPLITUDES = (0.05, 0.1, 0.2, 0.4, 0.8)  # by which times are wrong


@dataclass
class Budget:
    """Passes that are left."""

    passes: float

    def take(self, passes: float) -> bool:
        """Whether there were any left before these."""
        self.passes, had = self.passes - passes, self.passes
        return had > 0


def improve(
    shape: Shape,
    num_microbatches: int,
    costs: StageCosts,
    caps: Sequence[float],
    rows: Iterable[Rows],
    *,
    passes: float = 300,
    by_span: bool = True,
    seed: int = 0,
) -> Order | None:
    """The best order found from rows of F and B, or None if none of them fits into memory.

    Args:
        caps: the memory of each rank, in the unit of the costs.
        rows: candidates; W in them are ignored.
        passes: the effort, in passes over all computations.
        by_span: whether the longest span is the objective, then the makespan; or the other way around.
        seed: of the search.
    """
    job = job_of(shape, num_microbatches, costs, caps)
    mirror = mirrored(job)
    goal = max(busy(shape, costs, num_microbatches))
    budget = Budget(passes)
    found = [placed for _, placed in _placed(job, rows, by_span, goal, budget)[:8]]
    best = _squeezed(job, mirror, found, by_span, goal, budget)
    if best is None:
        return None
    best = _searched(job, mirror, best, by_span, goal, budget, Random(seed))
    order = Order(shape, num_microbatches, tuple(map(tuple, best.rows)))
    order.validate()
    return order


def candidates(shape: Shape, num_microbatches: int, costs: StageCosts, caps: Sequence[float]) -> Iterator[Rows]:
    """Rows of F and B of any shape: from few microbatches in flight to more than fill the pipeline or the memory."""
    n, seen = num_microbatches, set()
    job = job_of(shape, n, costs, caps)
    room = [_room(caps[rank], costs.mem_f[stage], n) for stage, rank in enumerate(shape.rank_of)]
    longest = max(shape.depth)
    steps = 8 if len(job.seconds) < LARGE else 4
    full = (min(room) - 1) / (longest - 1) if longest > 1 else 0.0
    for factor in [full, *_little(shape, costs), *(step / steps for step in range(3 * steps + 1))]:
        limits = tuple(min(most, 1 + floor(factor * (d - 1))) for most, d in zip(room, shape.depth, strict=True))
        if limits in seen or (factor and longest == 1):
            continue
        seen.add(limits)
        if shape.num_ranks == shape.num_stages:
            by_rank = tuple(limits[stages[0]] for stages in shape.stages_of)
            yield merge(replace(one_f_one_b(shape, n), limit=by_rank), shape, n).rows
        yield list_schedule(job, limits)


def _room(cap: float, each: float, n: int) -> int:
    """The Forwards that fit into memory, at least 1."""
    return max(1, floor(min(n, cap / each + 1e-9))) if each else n


def _little(shape: Shape, costs: StageCosts) -> list[float]:
    """The factor by which slow transfers need more in flight, by Little's law: round trip over period."""
    period = max(busy(shape, costs, 1))
    trip = sum(costs.f) + sum(costs.b) + 2 * sum(costs.transfer)
    needed = trip / period if period else 0.0
    depth = max(shape.depth) - 1
    return [(ceil(needed) + extra) / depth for extra in (0, 1, 2)] if depth else []


def _placed(
    job: Job, rows: Iterable[Rows], by_span: bool, goal: float, budget: Budget
) -> list[tuple[tuple[float, float], Placed]]:
    """Rows with their W and their scores, the best first; no more once the goal is reached."""
    last, found = 2 * job.cells, []
    for each in rows:
        bare = [[code for code in row if code < last] for row in each]
        for patience in PATIENCE if len(job.seconds) < LARGE else PATIENCE[1:]:
            budget.take(1)
            placed = place_weights(job, bare, patience)
            if placed is not None:
                found.append((_score(placed, by_span), placed))
        if any(score[0] <= goal * (1 + 1e-9) for score, _ in found):
            break
    return sorted(found, key=lambda pair: pair[0])


def _squeezed(
    job: Job, mirror: Job, found: Sequence[Placed], by_span: bool, goal: float, budget: Budget
) -> Timed | None:
    best = None
    for placed in found:
        each = timed(job, placed.rows)
        assert each is not None
        best = each if best is None else best
        while budget.take(SQUEEZE_PASSES) and _score(best, by_span)[0] > goal * (1 + 1e-9):
            after = timed(job, squeeze(job, mirror, each, by_span))
            assert after is not None
            if _score(after, by_span) >= _score(each, by_span):
                break
            each = after
            best = min(best, each, key=lambda each: _score(each, by_span))
    return best


def _searched(job: Job, mirror: Job, best: Timed, by_span: bool, goal: float, budget: Budget, random: Random) -> Timed:
    here = best
    while _score(best, by_span)[0] > goal * (1 + 1e-9) and budget.take(3 * SQUEEZE_PASSES):
        size = random.choice(AMPLITUDES)
        wrong = [seconds * (1 + size * (2 * random.random() - 1)) for seconds in job.seconds]
        odd, odd_mirror = replace(job, seconds=wrong), replace(mirror, seconds=wrong)
        start = timed(odd, here.rows)
        assert start is not None
        there = timed(job, squeeze(odd, odd_mirror, start, by_span))
        for _ in range(2):
            assert there is not None
            there = timed(job, squeeze(job, mirror, there, by_span))
        assert there is not None
        if _score(there, by_span) <= _score(here, by_span):
            here = there
        best = min(best, here, key=lambda each: _score(each, by_span))
    return best


def _score(each: Timed | Placed, by_span: bool) -> tuple[float, float]:
    return (each.span, each.makespan) if by_span else (each.makespan, each.span)
