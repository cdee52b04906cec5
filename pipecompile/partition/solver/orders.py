"""Topological orders to cut into intervals: the model's own, breadth first, depth first, and seeded mixtures.

On a graph with parallel branches no single order is good for every number of stages, and many cheap orders beat one
elaborate order: depth first keeps a branch in one stage, breadth first cuts all branches at the same depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pipecompile.partition.solver.problem import Problem

DEPTH_FIRST = (1.0, 0.95, 0.8, 0.5)  # the probability of taking the newest ready atom next


def orders(problem: Problem, count: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """At least three and about ``count`` topological orders, without repeats."""
    seen = set()
    random = Random(seed)
    for index in range(max(count, 3)):
        order = _order(problem, index, random)
        if order not in seen:
            seen.add(order)
            yield order


def _order(problem: Problem, index: int, random: Random) -> tuple[int, ...]:
    if index == 0:
        return tuple(range(len(problem)))
    if index == 1:
        return ready_order(problem, 0.0, None)
    if index == 2:
        return ready_order(problem, 1.0, None)
    return ready_order(problem, DEPTH_FIRST[index % len(DEPTH_FIRST)], random)


def ready_order(problem: Problem, depth_first: float, random: Random | None) -> tuple[int, ...]:
    """A topological order that takes atoms from the list of ready ones.

    Args:
        depth_first: the probability of taking the newest; otherwise a random one, or the oldest without ``random``.
    """
    waiting = [len(sources) for sources in problem.predecessors]
    ready = [atom for atom, count in enumerate(waiting) if count == 0]
    _shuffle(ready, random)
    order = []
    while ready:
        if random is None:
            atom = ready.pop(-1 if depth_first else 0)
        else:
            atom = ready.pop(-1 if random.random() < depth_first else random.randrange(len(ready)))
        order.append(atom)
        freed = []
        for target in problem.successors[atom]:
            waiting[target] -= 1
            if waiting[target] == 0:
                freed.append(target)
        _shuffle(freed, random)
        ready += freed
    return tuple(order)


def _shuffle(atoms: list[int], random: Random | None) -> None:
    if random is not None:
        random.shuffle(atoms)
