"""The optimum, with its proof, where the windows are narrow enough to look at every closed set in them.

A plan within T has all its boundaries in the windows of T. So T rises from the lower bound: as long as the programme
over all closed sets in the windows finds no plan, T is a lower bound; the first plan that it finds is an optimum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from pipecompile.partition.chain import Chain, best_chain
from pipecompile.partition.contract import Contraction
from pipecompile.partition.deadline import NEVER, Deadline
from pipecompile.partition.enumerate import closed_sets
from pipecompile.partition.family import Family
from pipecompile.partition.problem import Problem
from pipecompile.partition.window import ROUNDING, Window, narrowed, within_free

FIRST_GAP, STEP = 0.005, 1.6  # relative to the first lower bound
MOST_SETS = 10_000  # in one window
FINEST = 1.005  # the least rise of T that is worth a search


def exact(
    problem: Problem, lower: float, upper: float, effort: int, deadline: Deadline = NEVER
) -> Iterator[tuple[float, Chain | None]]:
    """Lower bounds as they rise, the last with an optimal plan if one within ``upper`` (seconds) exists and was found.

    Args:
        effort: sets in one window times free atoms in all of them; where there are more, a smaller T is tried.

    Raises:
        OutOfTime: the deadline has passed.
    """
    floor, ceiling, gap = lower, inf, 0.0
    while True:
        limit = min(upper if floor == 0 else floor * (1 + gap), upper, (lower + ceiling) / 2) * (1 + ROUNDING)
        found = narrowed(problem, limit, deadline)
        small, free = within_free(found) if found else (Contraction.identity(problem), [])
        families = _families(small.problem, free, effort, deadline)
        if families is None:
            if limit < lower * FINEST:
                return
            ceiling = limit
        elif families and (chain := best_chain(small.problem, families, limit, deadline)):
            yield max(lower, chain.bottleneck), replace(chain, stage_of=small.expand(chain.stage_of))
            return
        else:
            lower, gap = max(lower, limit), gap * STEP or FIRST_GAP
            yield lower, None
        if lower >= upper or lower * FINEST > ceiling:
            return


def _families(problem: Problem, found: list[Window], effort: int, deadline: Deadline) -> list[Family] | None:
    families = []
    most = min(MOST_SETS, effort // (1 + sum(window.free for window in found)))
    for window in found:
        sets = closed_sets(problem, window, most, deadline)
        if sets is None:
            return None
        families.append(sets)
        if not len(sets):
            return [sets] * (problem.num_stages - 1)
    return families
