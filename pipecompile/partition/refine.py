"""A better plan near a given one.

For each boundary a corridor of atoms on both sides of it is freed, all closed sets in the corridor that could belong
to a better plan are listed, and the programme chooses from all boundaries together: so atoms may move through several
stages at once, which single moves cannot do when every stage is full. How deep a corridor reaches into a branch is
drawn anew each time, and it is as wide as the listing affords.

Source: large neighbourhood search (Shaw 1998) with the chain programme as its subproblem; the corridors are ours.
"""

from __future__ import annotations

import numpy as np

from pipecompile.partition.chain import Chain, best_chain
from pipecompile.partition.contract import merge
from pipecompile.partition.enumerate import closed_sets
from pipecompile.partition.family import Family
from pipecompile.partition.problem import Bools, Ints, Problem
from pipecompile.partition.window import Window, windows

EFFORT = 5_000  # atoms in all draws together
PATIENCE = 6  # draws without a better plan, before it gives up
MOST_SETS = 1_000  # in one corridor
WIDEST = 48  # atoms free in a corridor
STEP = 1 - 1e-5  # a better plan is at least this much better


def refined(problem: Problem, chain: Chain, lower: float, seed: int = 0) -> Chain:
    """A plan no worse than the given one, repeatable."""
    random = np.random.default_rng(seed)
    patience = PATIENCE
    for _ in range(min(40, 6 + EFFORT // len(problem))):
        if not patience or chain.bottleneck * STEP <= lower:
            break
        better = _improved(problem, chain, random)
        chain, patience = (better, PATIENCE) if better else (chain, patience - 1)
    return chain


def _improved(problem: Problem, chain: Chain, random: np.random.Generator) -> Chain | None:
    """A better plan in a draw of corridors, searched with all atoms that are in no corridor bound to their stage."""
    limit = chain.bottleneck * STEP
    stage_of = np.array(chain.stage_of)
    ranks = [_from_near_to_far(problem, stage_of <= index, random) for index in range(problem.num_stages - 1)]
    near = np.unique(np.concatenate([rank[:WIDEST] for rank in ranks])) if ranks else np.zeros(0, np.int64)
    bound = np.delete(np.arange(len(problem)), near)
    small = merge(problem, [bound[stage_of[bound] == stage].tolist() for stage in range(problem.num_stages)])
    families = []
    for index, window in enumerate(windows(small.problem, limit)):
        atoms = np.array(small.atom_of)[ranks[index][:WIDEST]]
        boundary = np.zeros(len(small.problem), np.bool_)
        boundary[np.array(small.atom_of)[stage_of <= index]] = True
        families.append(_corridor(window, boundary, atoms))
        if not len(families[-1]):
            return None
    better = best_chain(small.problem, families, limit)
    return better and Chain(better.bottleneck, small.expand(better.stage_of))


def _corridor(window: Window, boundary: Bools, atoms: Ints) -> Family:
    """The closed sets near a boundary: as many of the nearest atoms are free as can be listed."""
    width = len(atoms)
    while width:
        near = np.zeros_like(boundary)
        near[atoms[:width]] = True
        sets = closed_sets(window.problem, window.between(boundary & ~near, ~boundary & ~near), MOST_SETS)
        if sets is not None:
            return sets
        width = width * 3 // 4
    return Family.of(window.problem, [])


def _from_near_to_far(problem: Problem, boundary: Bools, random: np.random.Generator) -> Ints:
    """The atoms by their distance from the boundary, which grows along every path away from it, in drawn lengths."""
    length = random.exponential(size=len(problem)) + 1e-3
    inward = (length * boundary).astype(np.float32) @ problem.ancestor_matrix
    outward = problem.ancestor_matrix @ (length * ~boundary).astype(np.float32)
    return np.argsort(np.where(boundary, inward, outward), kind="stable")
