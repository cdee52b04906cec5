"""A better plan near a given one.

For each boundary a corridor of atoms on both sides of it is freed, all closed sets in the corridor that could belong
to a better plan are listed, and the programme chooses from all boundaries together: so atoms may move through several
stages at once, which single moves cannot do when every stage is full. How deep a corridor reaches into a branch is
drawn anew each time, and it is as wide as the listing affords.

Source: large neighbourhood search (Shaw 1998) with the chain programme as its subproblem; the corridors are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipecompile.partition.chain import Chain, best_chain
from pipecompile.partition.enumerate import closed_sets
from pipecompile.partition.family import Family
from pipecompile.partition.problem import Bools, Problem
from pipecompile.partition.window import Window, windows

PATIENCE = 8  # draws without a better plan before it gives up
MOST_SETS = 1_000  # in one corridor
WIDEST = 48  # atoms free in a corridor
STEP = 1 - 1e-6  # a better plan is at least this much better


def refined(problem: Problem, chain: Chain, lower: float, seed: int = 0) -> Chain:
    """A plan no worse than the given one, repeatable."""
    random = np.random.default_rng(seed)
    patience = PATIENCE
    while patience and chain.bottleneck * STEP > lower:
        if better := _improved(problem, chain, random):
            chain, patience = better, PATIENCE
        else:
            patience -= 1
    return chain


def _improved(problem: Problem, chain: Chain, random: np.random.Generator) -> Chain | None:
    limit = chain.bottleneck * STEP
    stage_of = np.array(chain.stage_of)
    families = []
    for index, window in enumerate(windows(problem, limit)):
        families.append(_corridor(problem, window, stage_of <= index, random))
        if not len(families[-1]):
            return None
    return best_chain(problem, families, limit)


def _corridor(problem: Problem, window: Window, boundary: Bools, random: np.random.Generator) -> Family:
    """The closed sets near a boundary: as many free atoms as can be listed."""
    depth = _depth(problem, boundary, random)
    free = np.argsort(depth, kind="stable")
    width = min(WIDEST, len(problem))
    while width:
        near = np.zeros(len(problem), np.bool_)
        near[free[:width]] = True
        sets = closed_sets(problem, window.between(boundary & ~near, ~boundary & ~near), MOST_SETS)
        if sets is not None:
            return sets
        width = width * 3 // 4
    return Family.of(problem, [])


def _depth(problem: Problem, boundary: Bools, random: np.random.Generator) -> Sequence[float]:
    """For each atom how far it is from the boundary, growing along every path away from it, in drawn lengths."""
    length = random.exponential(size=len(problem)) + 1e-3
    inward = (length * boundary) @ problem.ancestors
    outward = problem.ancestors @ (length * ~boundary)
    return np.asarray(np.where(boundary, inward, outward))
