"""Improves a plan near given plans, or anywhere in the windows of the best plan.

*Walks*: many plans are annealed, then the dynamic program chooses among all their boundaries, and the next round starts
from the result. *Cheapest sets*: for each window, only the sets with the fewest open seconds are kept during the
enumeration, and the dynamic program chooses from all windows together. Both can move atoms through several stages at
once, which single moves cannot do when every stage is full. The first finds sets that are expensive at one boundary and
pay off at another, the second finds sets that walks do not reach.

Source: memetic search, which is local search with recombination (Moscato 1989), here exact; and beam search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pipecompile.partition.solver.anneal import annealed
from pipecompile.partition.solver.boundary_windows import free_atoms, narrowed, windows, within_free
from pipecompile.partition.solver.candidate_pool import combine, ends_near
from pipecompile.partition.solver.chain_dp import Chain, best_chain, thrifty_chain
from pipecompile.partition.solver.closed_sets import Family
from pipecompile.partition.solver.deadline import Deadline
from pipecompile.partition.solver.enumerate import cheapest_sets
from pipecompile.partition.solver.interval_dp import prefixes
from pipecompile.partition.solver.orders import orders
from pipecompile.partition.solver.problem import Bools, Problem
from pipecompile.partition.solver.score import bottleneck

WALKERS = 64
STEPS = 600_000  # per round, times atoms
FEWEST_STEPS, MOST_STEPS = 1_000, 3_000
ROUNDS, PATIENCE = 12, 3  # maximum number, and maximum number without improvement
EFFORT = 3_000  # atoms, summed over all rounds
KEPT = 7  # walkers whose plans are kept for the next round
FEWEST_SETS = 50  # per window; with fewer, a beam is not worth its minimum cuts
STEP = 1 - 1e-5  # minimum relative improvement
NATURAL = 3  # further orders whose prefixes are candidates


def walked(
    problem: Problem, starts: Sequence[Sequence[int]], lower: float, seed: int, deadline: Deadline
) -> Iterator[Chain]:
    """Yields better and better plans, none worse than the first start. Deterministic.

    Raises:
        OutOfTime: the deadline has passed.
    """
    best = Chain(bottleneck(problem, starts[0]), tuple(starts[0]))
    boundaries: list[Bools] = []
    patience, steps = PATIENCE, min(MOST_STEPS, max(FEWEST_STEPS, STEPS // len(problem)))
    for number in range(max(2, min(ROUNDS, EFFORT // len(problem)))):
        if not patience or best.bottleneck * STEP <= lower:
            break
        patience -= 1
        begins = [starts[index % len(starts)] for index in range(WALKERS)]
        plans = annealed(problem, begins, steps, seed * ROUNDS + number, deadline)
        plans = sorted(dict.fromkeys(plans), key=lambda plan: bottleneck(problem, plan))
        boundaries += [_boundaries(problem, plan) for plan in plans]
        walker = Chain(bottleneck(problem, plans[0]), plans[0])
        if walker.bottleneck < best.bottleneck * STEP:
            yield walker
            best, patience = walker, PATIENCE
        sets, known = Family.of(problem, boundaries), _boundaries(problem, plans[0])
        found = combine(sets, min(best.bottleneck, walker.bottleneck), known, deadline)
        if found and found.bottleneck < best.bottleneck * STEP:
            yield found
            best, patience = found, PATIENCE
        starts = [best.stage_of, *plans[:KEPT]]


def traded(
    problem: Problem, plans: Sequence[Sequence[int]], limits: Sequence[float], deadline: Deadline
) -> Iterator[Chain]:
    """For each limit (seconds), the plan with the least communication, from boundaries of given plans and some orders.

    A step with n microbatches takes about the sum of all stages plus n - 1 times the bottleneck. With few microbatches,
    the communication of all stages matters, not only that of the slowest.

    Raises:
        OutOfTime: the deadline has passed.
    """
    known = _boundaries(problem, plans[0])
    natural = [prefixes(order, ends_near(problem, order, max(limits))) for order in orders(problem, NATURAL)]
    sets = Family.of(problem, [*natural, *(_boundaries(problem, plan) for plan in plans)])
    for limit in limits:
        if found := combine(sets, limit, known, deadline, thrifty_chain):
            yield Chain(bottleneck(problem, found.stage_of), found.stage_of)


def _boundaries(problem: Problem, stage_of: Sequence[int]) -> Bools:
    """The sets of all atoms up to each stage, one per row."""
    return np.asarray(np.array(stage_of) <= np.arange(problem.num_stages - 1)[:, None])


def cheapest(problem: Problem, chain: Chain, lower: float, effort: int, deadline: Deadline) -> Iterator[Chain]:
    """Yields better and better plans, from few sets per window. ``effort`` is their number times the free atoms.

    Raises:
        OutOfTime: the deadline has passed.
    """
    while chain.bottleneck * STEP > lower:
        limit = chain.bottleneck * STEP
        most = effort // (1 + free_atoms(windows(problem, limit)))
        found = narrowed(problem, limit, deadline) if most >= FEWEST_SETS else None
        if not found:
            return
        small, free = within_free(found)
        families = [cheapest_sets(small.problem, window, most, deadline) for window in free]
        better = best_chain(small.problem, families, limit, deadline)
        if better is None:
            return
        chain = replace(better, stage_of=small.expand(better.stage_of))
        yield chain
