"""Contracts things that must share a stage into one atom.

Groups that must share a stage are contracted, and so are the strongly connected components that result. Nets follow,
and nets with the same ends are summed. Things that are fixed to one stage form a group, with an arc to the group of the
next stage, so that every order of atoms agrees with the fixed stages. Atoms are numbered topologically, in the given
order where arcs leave a choice, so that the order of the model is one of the orders for free.

Source: Tarnawski et al. (NeurIPS 2020), contraction of color classes and of strongly connected components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import networkx as nx
from networkx.utils import UnionFind

from pipecompile.errors import InfeasibleError
from pipecompile.partition.solver.problem import Net, Problem, Seat


@dataclass(frozen=True, slots=True)
class Contraction:
    """A smaller problem, and the atom that each original thing belongs to."""

    problem: Problem
    atom_of: tuple[int, ...]

    @staticmethod
    def identity(problem: Problem) -> Contraction:
        return Contraction(problem, tuple(range(len(problem))))

    def expand(self, stage_of: Sequence[int]) -> tuple[int, ...]:
        """The stages of the original things, given those of the atoms."""
        return tuple(stage_of[atom] for atom in self.atom_of)

    def then(self, other: Contraction) -> Contraction:
        """This contraction followed by another one of its problem."""
        return Contraction(other.problem, tuple(other.atom_of[atom] for atom in self.atom_of))


def contract(
    seconds: Sequence[float],
    arcs: Iterable[tuple[int, int]],
    nets: Iterable[tuple[Iterable[int], float]],
    seats: Sequence[Seat],
    *,
    together: Iterable[Sequence[int]] = (),
    kept_bytes: Sequence[float] = (),
    saved_bytes: Sequence[float] = (),
    fixed_stages: Iterable[tuple[int, int]] = (),
    overlapped: bool = False,
) -> Contraction:
    """The problem for things that may have cycles or groups. O(things + arcs + ends).

    Args:
        together: groups that must share a stage.
        fixed_stages: pairs of a thing and the stage that it must be in.
        overlapped: communication overlaps with computation.

    Raises:
        InfeasibleError: things that must share a stage are fixed to two.
    """
    pinned_to = _by_stage(fixed_stages)
    arcs = [*arcs, *((low[0], high[0]) for low, high in pairwise(pinned_to.values()))]
    atom_of = _atoms(len(seconds), arcs, [*together, *pinned_to.values()])
    count = 1 + max(atom_of, default=-1)

    def summed(numbers: Sequence[float]) -> tuple[float, ...]:
        sums = [0.0] * count
        for thing, number in enumerate(numbers):
            sums[atom_of[thing]] += number
        return tuple(sums)

    lifted = {(atom_of[low], atom_of[high]) for low, high in arcs}
    problem = Problem(
        seconds=summed(seconds),
        arcs=tuple(sorted((low, high) for low, high in lifted if low != high)),
        nets=_nets(atom_of, nets),
        seats=tuple(seats),
        kept_bytes=summed(kept_bytes),
        saved_bytes=summed(saved_bytes),
        fixed_stages=_fixed(atom_of, pinned_to),
        overlapped=overlapped,
    )
    return Contraction(problem, tuple(atom_of))


def merge(problem: Problem, together: Iterable[Sequence[int]]) -> Contraction:
    """The problem with further groups of atoms contracted."""
    return contract(
        problem.seconds,
        problem.arcs,
        ((net.ends, net.seconds) for net in problem.nets),
        problem.seats,
        together=together,
        kept_bytes=problem.kept_bytes,
        saved_bytes=problem.saved_bytes,
        fixed_stages=problem.fixed_stages,
        overlapped=problem.overlapped,
    )


def _atoms(count: int, arcs: Sequence[tuple[int, int]], together: Iterable[Sequence[int]]) -> list[int]:
    """The atom of each thing: contracts groups, then the cycles that result. Atoms are in topological order."""
    bound = UnionFind(range(count))
    for group in together:
        bound.union(*group)
    while True:
        part_of = _numbered(bound[thing] for thing in range(count))
        parts = nx.DiGraph()
        parts.add_nodes_from(part_of)
        parts.add_edges_from((part_of[low], part_of[high]) for low, high in arcs if part_of[low] != part_of[high])
        position = _topological(parts)
        if len(position) == len(parts):
            return [position[part] for part in part_of]
        things = dict(zip(reversed(part_of), reversed(range(count)), strict=True))  # the first of each part
        for cycle in nx.strongly_connected_components(parts.subgraph(parts.nodes - position.keys())):
            bound.union(*(things[part] for part in cycle))


def _numbered(names: Iterable[int]) -> list[int]:
    """Numbers the names in the order of their first occurrence."""
    number: dict[int, int] = {}
    return [number.setdefault(name, len(number)) for name in names]


def _topological(parts: nx.DiGraph) -> dict[int, int]:
    """The position of each part if the lowest ready part comes next; parts on and behind cycles have none."""
    position: dict[int, int] = {}
    with suppress(nx.NetworkXUnfeasible):  # raised at the first cycle, after the parts before it
        for part in nx.lexicographical_topological_sort(parts):
            position[part] = len(position)
    return position


def _by_stage(fixed_stages: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    things: dict[int, list[int]] = {}
    for thing, stage in sorted(fixed_stages, key=itemgetter(1)):
        things.setdefault(stage, []).append(thing)
    return things


def _fixed(atom_of: Sequence[int], pinned_to: dict[int, list[int]]) -> tuple[tuple[int, int], ...]:
    stage_of: dict[int, int] = {}
    for stage, things in pinned_to.items():
        other = stage_of.setdefault(atom_of[things[0]], stage)
        if other != stage:
            raise InfeasibleError(
                f"nodes pinned to stage {other} and nodes pinned to stage {stage} must share a stage, because they "
                f"depend on each other or belong together; pin them to one stage"
            )
    return tuple(stage_of.items())


def _nets(atom_of: Sequence[int], nets: Iterable[tuple[Iterable[int], float]]) -> tuple[Net, ...]:
    seconds: dict[tuple[int, ...], float] = {}
    for things, cost in nets:
        ends = tuple(sorted({atom_of[thing] for thing in things}))
        if len(ends) > 1 and cost > 0:
            seconds[ends] = seconds.get(ends, 0.0) + cost
    return tuple(Net(ends, cost) for ends, cost in seconds.items())
