"""Nodes that read one trained parameter, and can share a stage at no cost to the cuts.

Where each stage steps on its own, copies of a parameter in several stages would differ. So its readers must share a
stage, and with them all that lies between them, since values flow forward only:

    embedding of the source -> encoder -> +            nothing lies between the embeddings: they share a stage
    embedding of the target -> decoder -> + -> head
    embedding -> body -> head                          the body lies between embedding and head: one stage for all of it

Only readers of the first kind are grouped. The second kind would leave a pipeline with nothing to do in parallel; it is
up to the user (``colocate=``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipecompile.partition.solver.contraction import contract
from pipecompile.partition.solver.problem import Seat
from pipecompile.partition.stage_nodes import Placed


def tied_nodes(placed: Placed) -> Mapping[str, tuple[int, ...]]:
    """The things that read a trained parameter, by its name, if there are several and nothing lies between them."""
    readers: dict[str, list[int]] = {}
    for thing, index in enumerate(placed.nodes):
        for name in placed.graph.nodes[index].parameters:
            readers.setdefault(name, []).append(thing)
    trained = {parameter.name for parameter in placed.graph.parameters if parameter.spec.requires_grad}
    found = {name: tuple(things) for name, things in readers.items() if name in trained and len(things) > 1}
    if not found:
        return {}
    apart = _atoms(placed, ())
    return {name: things for name, things in found.items() if _is_free(placed, things, apart)}


def _is_free(placed: Placed, things: Sequence[int], apart: Sequence[int]) -> bool:
    """Whether a group of things merges no others."""
    atoms = {apart[thing] for thing in things}
    return len(set(_atoms(placed, [things]))) == len(set(apart)) - len(atoms) + 1


def _atoms(placed: Placed, groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """thing -> atom, if groups must share a stage"""
    nothing = [0.0] * len(placed.nodes)
    return contract(nothing, placed.arcs, [], [Seat()], together=[*placed.together, *groups]).atom_of
