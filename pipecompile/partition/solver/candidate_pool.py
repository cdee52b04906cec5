"""The pool: candidate closed sets from orders and from minimum cuts, and the best plan made of them.

Neither source is enough. An order sees the balance of all stages but no other orders. A minimum cut sees the whole
graph but only one boundary. The dynamic program over the pool can take each boundary from a different source. The
prefixes of the best order are in the pool, so the result is never worse than the best interval plan.

Effort is counted in atoms, not in seconds, so that the same problem always has the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

import numpy as np

from pipecompile.partition.solver.boundary_windows import admit, windows
from pipecompile.partition.solver.chain_dp import Chain, best_chain
from pipecompile.partition.solver.closed_sets import Family
from pipecompile.partition.solver.cuts import bisect, sweep
from pipecompile.partition.solver.deadline import Deadline
from pipecompile.partition.solver.interval_dp import best_intervals, prefixes
from pipecompile.partition.solver.orders import orders
from pipecompile.partition.solver.problem import Bools, Problem

EFFORT = 12_000  # atoms placed by interval programs
MOST_ORDERS = 100
FEW_ORDERS = 6  # where the exact search that follows is likely to find the optimum itself
KEPT_ORDERS = 8
MOST_SETS = 1_000  # per boundary
ROUNDING = 1 + 1e-9  # the same load may be summed in another order

Programme = Callable[[Problem, Sequence[Family], float, Deadline], Chain | None]


def pooled(problem: Problem, deadline: Deadline, most: int = MOST_ORDERS) -> Iterator[Chain]:
    """Yields the best plans of each order, then the best over the pool; nothing if no plan within memory was found.

    Args:
        problem: the problem.
        deadline: when to stop.
        most: orders to try.

    Raises:
        OutOfTime: the deadline has passed.
    """
    ranked = _ranked_orders(problem, deadline, most)
    if not ranked:
        return
    for best, order, ends in ranked:
        yield Chain(best, _stages(order, ends))
    best, order, ends = ranked[0]
    order_sets = [prefixes(order, ends_near(problem, order, best)) for _, order, _ in ranked[:KEPT_ORDERS]]
    sets = Family.of(problem, [*order_sets, *_cuts(problem, deadline)])
    if found := combine(sets, best, prefixes(order, ends[:-1]), deadline):
        yield found


def combine(
    sets: Family, limit: float, known: Bools, deadline: Deadline, programme: Programme = best_chain
) -> Chain | None:
    """The best plan whose boundaries are among the sets and the boundaries of a known plan."""
    families = [_cheapest(family) for family in admit(sets, limit)]
    families = [
        Family.of(sets.problem, [family.members, boundary[None]])
        for family, boundary in zip(families, known, strict=True)
    ]
    return programme(sets.problem, families, limit * ROUNDING, deadline)


def ends_near(problem: Problem, order: Sequence[int], limit: float) -> Sequence[int]:
    """The ends of the prefixes of the order whose weight is within the window of some boundary."""
    work = np.cumsum(problem.weight[list(order)])
    near = np.zeros(len(order), np.bool_)
    for window in windows(problem, limit):
        near |= (work <= window.before.work) & (problem.total - work <= window.after.work)
    return (np.flatnonzero(near[:-1]) + 1).tolist()


def _stages(order: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    position = np.empty(len(order), dtype=np.int64)
    position[list(order)] = np.arange(len(order))
    return tuple(np.searchsorted(ends, position, side="right").tolist())


def _ranked_orders(
    problem: Problem, deadline: Deadline, most: int
) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    ranked: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    limit = inf
    for order in _orders(problem, most):
        if ranked and deadline.passed:
            break
        if found := best_intervals(problem, order, limit * 1.3):
            limit = min(limit, found[0])
            ranked.append((found[0], order, found[1]))
    return sorted(ranked, key=lambda entry: entry[0])


def _orders(problem: Problem, most: int) -> Iterator[tuple[int, ...]]:
    yield from orders(problem, min(most, EFFORT // max(1, len(problem))))
    halves, _ = bisect(problem, problem.total / problem.num_stages / 4)
    yield halves


def _cuts(problem: Problem, deadline: Deadline) -> Iterator[Bools]:
    for cut in sweep(problem, 3 * problem.num_stages, 0.3):
        deadline.check()
        yield cut[None]


def _cheapest(family: Family) -> Family:
    if len(family) <= MOST_SETS:
        return family
    return family.select(np.sort(np.argsort(family.open_seconds, kind="stable")[:MOST_SETS]))
