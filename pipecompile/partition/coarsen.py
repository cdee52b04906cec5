"""Fewer atoms at no loss: a light atom joins the neighbour that it can always be moved to.

Atom x may join y, its only predecessor or its only successor, if in every plan moving x into the stage of y raises no
load. Moving it changes the nets of x alone, in the two stages alone: those without y may become crossing, the net
{x, y} ceases to be. So the move is free where

    sum of c(e) over nets e with x, without y   <=   c({x, y})        and x weighs nothing.

With a cap above nothing the rule also moves light atoms that weigh something, and the loss is bounded by what was
absorbed. Heavy-edge contraction, the usual rule, merges across the narrow cuts between transformer blocks.

Source: ours; that contracting an atom with one neighbour on a side is safe is in Herrmann et al., "Multilevel
Algorithms for Acyclic Partitioning of Directed Acyclic Graphs" (2019), section 4.1.
"""

from __future__ import annotations

from pipecompile.partition.contract import Contraction, merge
from pipecompile.partition.problem import Problem

SHARES = (3200, 1600, 800, 400, 200, 100, 50)  # a cap is a mean stage divided by one of these


def lossless(problem: Problem) -> Contraction:
    """Contracts what never makes a difference, until nothing is left to."""
    return _repeat(problem, 0.0)


def lossy(problem: Problem, most: int) -> Contraction:
    """Contracts ever heavier atoms until ``most`` are left, or the next would weigh more than 2% of a stage."""
    contraction = lossless(problem)
    for share in SHARES:
        if len(contraction.problem) <= most:
            break
        contraction = contraction.then(_repeat(contraction.problem, problem.total / problem.num_stages / share))
    return contraction


def _repeat(problem: Problem, cap: float) -> Contraction:
    contraction = Contraction.identity(problem)
    absorbed = [0.0] * len(problem)
    while groups := _joins(contraction.problem, cap, absorbed):
        step = merge(contraction.problem, groups)
        sums = [0.0] * len(step.problem)
        for group in groups:
            sums[step.atom_of[group[0]]] += contraction.problem.seconds[group[0]]  # the light one comes first
        for atom, seconds in enumerate(absorbed):
            sums[step.atom_of[atom]] += seconds
        contraction, absorbed = contraction.then(step), sums
    return contraction


def _joins(problem: Problem, cap: float, absorbed: list[float]) -> list[tuple[int, int]]:
    """Pairs (light atom, its host) that may all be contracted at once: no host is light itself."""
    joins = []
    room = [cap - seconds for seconds in absorbed]
    light, host = [False] * len(problem), [False] * len(problem)
    pinned = {atom for atom, _ in problem.pins}
    for atom, seconds in enumerate(problem.seconds):
        if seconds > cap or host[atom] or atom in pinned or (problem.bounded and _has_bytes(problem, atom)):
            continue
        for other in _only(problem.predecessors[atom]) + _only(problem.successors[atom]):
            if not light[other] and seconds + absorbed[atom] <= room[other] and _is_free(problem, atom, other):
                joins.append((atom, other))
                room[other] -= seconds + absorbed[atom]
                light[atom] = host[other] = True
                break
    return joins


def _only(neighbours: tuple[int, ...]) -> tuple[int, ...]:
    return neighbours if len(neighbours) == 1 else ()


def _is_free(problem: Problem, atom: int, other: int) -> bool:
    gained, lost = 0.0, 0.0
    for index in problem.nets_of[atom]:
        net = problem.nets[index]
        if other not in net.pins:
            gained += net.seconds
        elif len(net.pins) == 2:
            lost += net.seconds
    return gained <= lost


def _has_bytes(problem: Problem, atom: int) -> bool:
    return problem.kept_bytes[atom] > 0 or problem.saved_bytes[atom] > 0
