"""A better plan near a given one, or anywhere in its windows.

*Cheapest sets*: of each window only the sets with the fewest open seconds are kept, as they come up, and the
programme chooses from all windows together. *Corridors*: for each boundary some atoms on both sides of it are freed,
and all closed sets in between are listed. How deep a corridor reaches into a branch is drawn anew each time, and it
is as wide as the listing affords. Either way atoms may move through several stages at once, which single moves cannot
do when every stage is full. The first finds what is far away, the second what looks dear at one boundary and pays at
another.

Source: beam search, and large neighbourhood search (Shaw 1998), with the chain programme as the subproblem of both.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipecompile.partition.chain import Chain, best_chain
from pipecompile.partition.contract import merge
from pipecompile.partition.deadline import Deadline
from pipecompile.partition.enumerate import cheapest_sets, closed_sets
from pipecompile.partition.family import Family
from pipecompile.partition.problem import Bools, Ints, Problem
from pipecompile.partition.window import Window, narrowed, windows

EFFORT = 3_000  # atoms in all draws together
PATIENCE = 4  # draws without a better plan, before it gives up
MOST_SETS = 600  # in one corridor
WIDEST = 48  # atoms free in a corridor
STEP = 1 - 1e-5  # a better plan is at least this much better


def refined(problem: Problem, chain: Chain, lower: float, seed: int, deadline: Deadline) -> Iterator[Chain]:
    """Ever better plans, from corridors around the last; repeatable.

    Raises:
        OutOfTime: the deadline has passed.
    """
    random = np.random.default_rng(seed)
    patience = PATIENCE
    for _ in range(min(40, 6 + EFFORT // len(problem))):
        if not patience or chain.bottleneck * STEP <= lower:
            break
        patience -= 1
        if better := _improved(problem, chain, random, deadline):
            yield better
            chain, patience = better, PATIENCE


def cheapest(problem: Problem, chain: Chain, lower: float, most: int, deadline: Deadline) -> Iterator[Chain]:
    """Ever better plans, from at most ``most`` sets in each window.

    Raises:
        OutOfTime: the deadline has passed.
    """
    while chain.bottleneck * STEP > lower:
        limit = chain.bottleneck * STEP
        found = narrowed(problem, limit)
        families = [cheapest_sets(problem, window, most, deadline) for window in found or ()]
        if found is None or (better := best_chain(problem, families, limit, deadline)) is None:
            break
        yield better
        chain = better


def _improved(problem: Problem, chain: Chain, random: np.random.Generator, deadline: Deadline) -> Chain | None:
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
        families.append(_corridor(window, boundary, atoms, deadline))
        if not len(families[-1]):
            return None
    better = best_chain(small.problem, families, limit, deadline)
    return better and Chain(better.bottleneck, small.expand(better.stage_of))


def _corridor(window: Window, boundary: Bools, atoms: Ints, deadline: Deadline) -> Family:
    """The closed sets near a boundary: as many of the nearest atoms are free as can be listed."""
    width = len(atoms)
    while width:
        near = np.zeros_like(boundary)
        near[atoms[:width]] = True
        sets = closed_sets(window.problem, window.between(boundary & ~near, ~boundary & ~near), MOST_SETS, deadline)
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
