"""The part of a large problem in which a plan can be improved: the atoms near its boundaries.

All other atoms of a stage become one atom. The result is small enough for searches whose tables
grow with the square of the atoms, and each of its plans is a plan of the whole problem.

Source: boundary refinement as in multilevel partitioning, Hendrickson and Leland, "A Multilevel Algorithm for
Partitioning Graphs" (1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

import numpy as np

from pipecompile.partition.solver.contraction import Contraction, merge
from pipecompile.partition.solver.problem import Floats, Problem


def near_boundaries(problem: Problem, stage_of: Sequence[int], most: int) -> Contraction:
    """The problem with about ``most`` free atoms, the same number in each stage."""
    order = range(len(problem))
    forth = _distances(problem, stage_of, reversed(order), problem.successors)
    back = _distances(problem, stage_of, order, problem.predecessors)
    distance, stages = np.minimum(forth, back), np.array(stage_of)
    groups = []
    for stage in range(problem.num_stages):
        atoms = np.flatnonzero(stages == stage)
        groups.append(atoms[np.argsort(distance[atoms], kind="stable")][most // problem.num_stages :].tolist())
    return merge(problem, [group for group in groups if group])


def _distances(
    problem: Problem, stage_of: Sequence[int], order: Iterable[int], neighbours: Sequence[Sequence[int]]
) -> Floats:
    """For each atom, the least seconds between it and another stage, on a path through neighbors."""
    distance = [inf] * len(problem)
    for atom in order:
        for other in neighbours[atom]:
            step = distance[other] + problem.seconds[other] if stage_of[other] == stage_of[atom] else 0.0
            distance[atom] = min(distance[atom], step)
    return np.array(distance)
