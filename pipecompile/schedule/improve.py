"""Finds a good order under a memory cap: candidates, W with real times, squeezes, and a search around the best.

    candidates      rows of F and B: a schedule's own, merges with many limits, lists of greedy runs; rows with W of
                    an order for fewer microbatches, whose steady state is repeated
    place_weights   each with W after several rules, within the cap; the best few go on
    squeeze         until it stops to help
    search          squeezes with times that are wrong at random, then with the right ones; what is better is kept

The last two are counted in passes over the computations, so the same input gives the same order on any machine.

Source: the first two as in Zero Bubble (Qi et al., ICLR 2024), section 3; the last is an iterated local search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from math import ceil, floor
from random import Random

from pipecompile.schedule.job import Job, job_of
from pipecompile.schedule.list_schedule import list_schedule
from pipecompile.schedule.order import Order, Rows
from pipecompile.schedule.placements import LARGE, Placements
from pipecompile.schedule.policy import merge, one_f_one_b
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.squeeze import mirrored, squeeze
from pipecompile.schedule.stage_costs import StageCosts, busy
from pipecompile.schedule.timed import Placed, Timed, timed

SQUEEZE_PASSES = 6  # what one squeeze costs, in passes of ``timed``
SQUEEZED = 8  # candidates that are squeezed
EARLY = 4  # of those whose W wait for nothing
SHARES = (4, 1, 1)  # of the effort of the search, around the best of them, the next and the third
FILLING = (1.0, 1.5, 1.25, 1.125, 0.75, 0.5)  # in flight in stages that are not the first of a rank, by their depth
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
    placements: Placements,
    *,
    whole: Iterable[Rows] = (),
    passes: float = 300,
    by_span: bool = True,
    seed: int = 0,
) -> Order | None:
    """The best order found from candidates, or None if none of them fits into memory.

    Args:
        placements: candidates with their W.
        whole: candidates with a W for every B, which stays where it is; if one of them fits, no others are made.
        passes: the effort of the squeezes and the search, in passes over all computations.
        by_span: whether the longest span is the objective, then the makespan; or the other way around.
        seed: of the search.
    """
    job = placements.job
    search = _Search(job=job, mirror=mirrored(job), by_span=by_span, budget=Budget(passes), random=Random(seed))
    starts = search.squeezed(search.fitting(whole)[:1] or search.placed(placements))
    if not starts:
        return None
    best = search.around(starts[: len(SHARES)])
    order = Order(job.shape, job.num_microbatches, tuple(map(tuple, best.rows)))
    order.validate()
    return order


def candidates(shape: Shape, num_microbatches: int, costs: StageCosts, caps: Sequence[float]) -> Iterator[Rows]:
    """Rows of F and B of any shape: from few microbatches in flight to more than fill the pipeline or the memory."""
    n, seen = num_microbatches, set()
    job = job_of(shape, n, costs, caps)
    for limits in (*_filling(shape, n, costs, caps), *_deep(shape, n, costs, caps)):
        if limits in seen:
            continue
        seen.add(limits)
        if shape.num_ranks == shape.num_stages:
            by_rank = tuple(limits[stages[0]] for stages in shape.stages_of)
            yield merge(replace(one_f_one_b(shape, n), limit=by_rank), shape, n).rows
        yield list_schedule(job, limits)


def _deep(shape: Shape, n: int, costs: StageCosts, caps: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """Limits in proportion to the depth of a stage."""
    room = [_room(caps[rank], costs.mem_f[stage], n) for stage, rank in enumerate(shape.rank_of)]
    longest = max(shape.depth)
    steps = 8 if 3 * shape.num_stages * n < LARGE else 4
    grid = [step / steps for step in range(3 * steps + 1)]
    between = [1 + (step + 0.5) / steps for step in range(steps)]  # a rank's memory often lies here
    full = (min(room) - 1) / (longest - 1) if longest > 1 else 0.0
    for factor in [full, *_little(shape, costs), *grid, *between]:
        if not factor or longest > 1:
            yield tuple(min(most, 1 + floor(factor * (d - 1))) for most, d in zip(room, shape.depth, strict=True))


def _filling(shape: Shape, n: int, costs: StageCosts, caps: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """Limits that fill memory: the first stage of each rank, whose gradients come last, has what the others leave."""
    if shape.num_ranks == shape.num_stages:
        return
    for factor in FILLING:
        limits = [min(n, 1 + floor(factor * (d - 1))) for d in shape.depth]
        for cap, (first, *others) in zip(caps, shape.stages_of, strict=True):
            left = cap - sum(limits[stage] * costs.mem_f[stage] for stage in others)
            limits[first] = _room(left, costs.mem_f[first], n) if left >= costs.mem_f[first] else 0
        if min(limits):
            yield tuple(limits)


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


@dataclass(frozen=True)
class _Search:
    """The steps of a search for one job, which share a budget and stop at the goal."""

    job: Job
    mirror: Job
    by_span: bool
    budget: Budget
    random: Random

    def placed(self, placements: Placements) -> list[Placed]:
        """The candidates to squeeze: the best, each with its W after the best rule, and some whose W wait for nothing.

        The latter are longer, but leave room: where memory is scarce, a squeeze makes more of them.
        """
        found: list[Placed] = []
        early: list[Placed] = []
        for placed in placements:
            if placed:
                found.append(min(placed, key=self.score))
                early.append(placed[-1])
                if self.is_reached(found[-1]):
                    break
        found = sorted(found, key=self.score)[:SQUEEZED]
        early = [it for it in sorted(early, key=self.score)[:EARLY] if it not in found]
        return [it for both in zip_longest(found, early) for it in both if it is not None]

    def fitting(self, rows: Iterable[Rows]) -> list[Timed]:
        """The candidates with all W that run and fit into memory, the best first."""
        found = []
        for each in rows:
            if (run := timed(self.job, each)) is not None and self._fits(each):
                found.append(run)
                if self.is_reached(run):
                    break
        return sorted(found, key=self.score)

    def _fits(self, rows: Rows) -> bool:
        added = self.job.added
        held = (accumulate(added[code] for code in row) for row in rows)
        return all(max(each) <= cap for each, cap in zip(held, self.job.caps, strict=True))

    def squeezed(self, starts: Sequence[Placed]) -> list[Timed]:
        """Each start after as many squeezes as help; the best first."""
        found: list[Timed] = []
        for placed in starts:
            here = self.timed(placed.rows)
            while not (self.is_reached(here) or any(map(self.is_reached, found))) and self.budget.take(SQUEEZE_PASSES):
                there = self.squeeze(here)
                if self.score(there) >= self.score(here):
                    break
                here = there
            found.append(here)
        return sorted(found, key=self.score)

    def around(self, starts: Sequence[Timed]) -> Timed:
        """The best order near any of the starts, the first of which gets most of the budget."""
        best, whole = starts[0], self.budget.passes / sum(SHARES[: len(starts)])
        for here, share in zip(starts, SHARES, strict=False):
            budget = Budget(share * whole)
            while not self.is_reached(best) and budget.take(3 * SQUEEZE_PASSES):
                there = self.near(here)
                here = min(there, here, key=self.score)
                best = min(best, here, key=self.score)
        return best

    def near(self, here: Timed) -> Timed:
        """Another order: squeezed with wrong times, then twice with the right ones."""
        wrong = _wrong(self.job, self.random)
        job, mirror = replace(self.job, seconds=wrong), replace(self.mirror, seconds=wrong)
        odd = timed(job, here.rows)
        assert odd is not None
        right = self.timed(squeeze(job, mirror, odd, self.by_span).rows)
        return self.squeeze(self.squeeze(right))

    def squeeze(self, here: Timed) -> Timed:
        there = squeeze(self.job, self.mirror, here, self.by_span)
        return self.timed(there.rows) if self.job.wires.is_queued else there

    def timed(self, rows: Rows) -> Timed:
        found = timed(self.job, rows)
        assert found is not None, "a squeeze keeps all dependencies"
        return found

    def is_reached(self, each: Placed) -> bool:
        return self.score(each)[0] <= self.job.busy * (1 + 1e-9)

    def score(self, each: Placed) -> tuple[float, float]:
        return each.score(self.by_span)


def _wrong(job: Job, random: Random) -> list[float]:
    """Times that are wrong at random: all F, B and W by a factor for each kind, or each computation by its own."""
    size, by_kind = random.choice(AMPLITUDES), random.random() < 0.5
    count = 3 if by_kind else len(job.seconds)
    factors = [1 + size * (2 * random.random() - 1) for _ in range(count)]
    if by_kind:
        factors = [factor for factor in factors for _ in range(job.cells)]
    return [seconds * factor for seconds, factor in zip(job.seconds, factors, strict=True)]
