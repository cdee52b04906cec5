"""The optimum and its proof, if the windows are narrow enough to enumerate all closed sets in them.

A plan within T has all its boundaries in the windows of T. So T is increased from the lower bound: as long as the
dynamic program over all closed sets in the windows finds no plan, T is a lower bound, and the first plan that it finds
is optimal. A quick search increases T in small steps, because the optimum is usually near the bound. If it is not, a
patient search follows, which bisects between the bounds, so that it has improved a bound whenever it is stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from pipecompile.partition.solver.boundary_windows import ROUNDING, free_atoms, narrowed, windows, within_free
from pipecompile.partition.solver.chain_dp import Chain, best_chain
from pipecompile.partition.solver.closed_sets import Family
from pipecompile.partition.solver.contraction import Contraction
from pipecompile.partition.solver.deadline import NEVER, Deadline
from pipecompile.partition.solver.enumerate import closed_sets
from pipecompile.partition.solver.problem import Problem

FIRST_GAP, STEP = 0.005, 1.6  # relative to the first lower bound
FEW_ATOMS = 40  # with at most that many, one search among all sets costs less than several in narrow windows
MOST_SETS, FEWEST_SETS = 10_000, 400  # per window; with fewer, a search is not worth its minimum cuts


@dataclass(frozen=True, slots=True)
class Effort:
    """The effort of a search.

    Args:
        sets: the most sets per window, times the free atoms of all windows; if there are more, a smaller T is tried.
        finest: the smallest increase of T, as a factor, that is worth a search.
        halves: bisect between the bounds, instead of increasing T in steps.
    """

    sets: int
    finest: float
    halves: bool


QUICKLY, PATIENTLY = Effort(1_000_000, 1.01, halves=False), Effort(9_000_000, 1.005, halves=True)


def exact(
    problem: Problem, lower: float, upper: float, effort: Effort, deadline: Deadline = NEVER
) -> Iterator[tuple[float, Chain | None]]:
    """Yields increasing lower bounds, the last with an optimal plan if one within ``upper`` (seconds) was found.

    Raises:
        OutOfTime: the deadline has passed.
    """
    floor, ceiling, gap = lower, inf, 0.0
    while True:
        step = floor * (1 + gap) if floor else upper
        if effort.halves:
            step = (lower + upper) / 2 if lower * effort.finest < upper else upper
        if len(problem) <= FEW_ATOMS:
            step = upper
        limit = min(step, upper, (lower + ceiling) / 2) * (1 + ROUNDING)
        small, families = _families(problem, limit, effort.sets, deadline)
        if families is None:
            if limit < lower * effort.finest:
                return
            ceiling = limit
        elif families and (chain := best_chain(small.problem, families, limit, deadline)):
            yield max(lower, chain.bottleneck), replace(chain, stage_of=small.expand(chain.stage_of))
            return
        else:
            lower, gap = max(lower, limit), gap * STEP or FIRST_GAP
            yield lower, None
        if lower >= upper or lower * effort.finest > ceiling:
            return


def _families(
    problem: Problem, limit: float, effort: int, deadline: Deadline
) -> tuple[Contraction, list[Family] | None]:
    """The sets of each window, in the problem of the free atoms. Empty if no plan exists, ``None`` if too many."""
    nowhere = Contraction.identity(problem)
    if effort < FEWEST_SETS * free_atoms(windows(problem, limit)):
        return nowhere, None
    found = narrowed(problem, limit, deadline)
    if not found:
        return nowhere, []
    small, found = within_free(found)
    most = min(MOST_SETS, effort // (1 + free_atoms(found)))
    families = []
    for window in found:
        sets = closed_sets(small.problem, window, most, deadline)
        if sets is None:
            return small, None
        families.append(sets)
        if not len(sets):
            return small, []
    return small, families
