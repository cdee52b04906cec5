"""A better plan near given ones, or anywhere in the windows of the best.

*Walks*: many plans are annealed, then the programme chooses among all their boundaries, and what it finds is where the
next round starts. *Cheapest sets*: of each window only the sets with the fewest open seconds are kept, as they come up,
and the programme chooses from all windows together. Either way atoms may move through several stages at once, which
single moves cannot do when every stage is full. The first finds what looks dear at one boundary and pays at another,
the second what no walk reaches.

Source: memetic search, that is local search with recombination (Moscato 1989), here an exact one; and beam search.
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
STEPS = 600_000  # of one round, times atoms
FEWEST_STEPS, MOST_STEPS = 1_000, 3_000
ROUNDS, PATIENCE = 12, 3  # at most, and without a better plan
EFFORT = 3_000  # atoms in all rounds together
KEPT = 7  # walkers whose plans are used again
FEWEST_SETS = 50  # in one window; with fewer, a beam is not worth its minimum cuts
STEP = 1 - 1e-5  # a better plan is at least this much better
NATURAL = 3  # orders whose prefixes are looked at too


def walked(
    problem: Problem, starts: Sequence[Sequence[int]], lower: float, seed: int, deadline: Deadline
) -> Iterator[Chain]:
    """Ever better plans, none worse than the first start; repeatable.

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
    """For each limit (seconds) the plan that sends least, from the boundaries of given plans and of some orders.

    Where few microbatches fill a pipeline, a step takes about the sum of all stages and so many times the busiest one's
    seconds as there are further microbatches: what is sent counts once for each stage, not only in the busiest.

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
    """The set of all stages up to each, a row each."""
    return np.asarray(np.array(stage_of) <= np.arange(problem.num_stages - 1)[:, None])


def cheapest(problem: Problem, chain: Chain, lower: float, effort: int, deadline: Deadline) -> Iterator[Chain]:
    """Ever better plans, from a few sets in each window: their number times that of free atoms is the effort.

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
