"""Cheap closed cuts near a wanted balance, by networkx minimum cuts.

A set that has the sources of all it has is closed, and its cut is acyclic. An infinite arc from each atom to its source
makes every finite cut closed. A net costs its seconds once however many pins lie beyond the cut: it becomes two points,

    pin -> enter (infinite)     enter -> leave (its seconds)     leave -> pin (infinite)

where ``enter`` is the producer itself if that precedes all other pins, and ``leave`` likewise the last. Atoms
that the balance pins to a side are contracted into the terminals, so the network is as small as the window.

If the cheapest cut misses the window, its side and some atoms next to it are pinned too, and it is cut again.

Source: piercing (flow-balanced bipartition) after Yang and Wong, "Efficient Network Flow Based Min-Cut Balanced
Partitioning" (1996); the solver is Boykov and Kolmogorov (2004), never the slowest of networkx's on these networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import networkx as nx
import numpy as np
from networkx.algorithms.flow import boykov_kolmogorov

from pipecompile.partition.problem import Bools, Problem

SOURCE, SINK = "source", "sink"
PIERCINGS = 12
Point = int | str | tuple[str, int]


def closed_cut(problem: Problem, inside: Bools, outside: Bools) -> Bools:
    """The closed set with the fewest open seconds that has all atoms ``inside`` and none ``outside``.

    Args:
        inside: a closed set.
        outside: the complement of a closed set, disjoint from ``inside``.
    """
    network = nx.DiGraph()
    network.add_nodes_from((SOURCE, SINK))
    free = np.flatnonzero(~(inside | outside)).tolist()
    side: list[Point] = [
        SOURCE if i else SINK if o else v for v, (i, o) in enumerate(zip(inside, outside, strict=True))
    ]
    for atom in free:
        network.add_node(atom)
        for source in problem.predecessors[atom]:
            if side[source] == source:
                network.add_edge(atom, source)  # no capacity: infinite
    for net in sorted({net for atom in free for net in problem.nets_of[atom]}):
        _add_net(network, problem, net, side)
    _, (reached, _) = nx.minimum_cut(network, SOURCE, SINK, flow_func=boykov_kolmogorov)
    cut = inside.copy()
    cut[[point for point in reached if isinstance(point, int)]] = True
    return cut


def balanced_cuts(problem: Problem, inside: Bools, outside: Bools, low: float, high: float) -> Iterator[Bools]:
    """Cheap closed sets, the last of which weighs between ``low`` and ``high`` seconds if piercing can get there."""
    inside, outside = inside.copy(), outside.copy()
    for _ in range(PIERCINGS):
        cut = closed_cut(problem, inside, outside)
        yield cut
        weight = float(cut @ problem.weight)
        if low <= weight <= high:
            return
        before = inside.sum() + outside.sum()
        if weight < low:
            inside = _grown(problem, cut, outside, (low - weight) / 3)
        else:
            outside = _shrunk(problem, cut, inside, (weight - high) / 3)
        if inside.sum() + outside.sum() in (before, len(problem)):
            return


def sweep(problem: Problem, targets: int, tolerances: tuple[float, ...]) -> Iterator[Bools]:
    """Cheap cuts at evenly spread shares of the weight, within tolerances given as shares of a mean stage."""
    for tolerance in tolerances:
        half = tolerance * problem.total / max(1, problem.num_stages)
        for target in np.linspace(0, problem.total, targets + 2)[1:-1]:
            inside = problem.descendant_weight > problem.total - (target - half)
            outside = problem.ancestor_weight > target + half
            yield from balanced_cuts(problem, inside, outside, target - half, target + half)


def bisect(problem: Problem, grain: float, tolerance: float = 0.2) -> tuple[tuple[int, ...], list[Bools]]:
    """An order made of nested cuts, each halving a piece until it weighs ``grain`` seconds; and all cuts tried."""
    nothing = np.zeros(len(problem), np.bool_)
    tried: list[Bools] = []
    pieces: list[tuple[Bools, Bools]] = [(nothing, nothing)]
    order: list[int] = []
    while pieces:
        inside, outside = pieces.pop()
        free = ~(inside | outside)
        cut = _halving_cut(problem, inside, outside, tolerance, tried) if free @ problem.weight > grain else None
        if cut is None:
            order += np.flatnonzero(free).tolist()
        else:
            pieces += [(cut, outside), (inside, ~cut)]
    return tuple(order), tried


def _halving_cut(problem: Problem, inside: Bools, outside: Bools, tolerance: float, tried: list[Bools]) -> Bools | None:
    base = float(inside @ problem.weight)
    free = ~(inside | outside)
    weight = float(free @ problem.weight)
    low, high = base + weight * (0.5 - tolerance), base + weight * (0.5 + tolerance)
    must, cannot = _implied(problem, free, weight * (0.5 + tolerance))
    best, best_distance = None, inf
    for cut in balanced_cuts(problem, inside | must, outside | cannot, low, high):
        tried.append(cut)
        distance = abs(float(cut @ problem.weight) - base - weight / 2)
        if (cut ^ inside).any() and (cut ^ ~outside).any() and distance <= best_distance:
            best, best_distance = cut, distance
    return best


def _implied(problem: Problem, free: Bools, most: float) -> tuple[Bools, Bools]:
    """The free atoms that weigh more than ``most`` seconds with their free descendants, and with their ancestors."""
    atoms = np.flatnonzero(free)
    ancestors, weight = problem.ancestors[np.ix_(atoms, atoms)], problem.weight[atoms]
    must, cannot = np.zeros_like(free), np.zeros_like(free)
    cannot[atoms] = ancestors @ weight > most
    must[atoms] = (weight @ ancestors > most) & ~cannot[atoms]
    return must, cannot


def _add_net(network: nx.DiGraph, problem: Problem, index: int, side: list[Point]) -> None:
    net = problem.nets[index]
    producer, consumer = problem.net_ends[index]
    points = list(dict.fromkeys(side[pin] for pin in net.pins))
    if SOURCE in points and SINK in points:
        return
    free = [point for point in points if isinstance(point, int)]
    if len(points) == 2:  # the other of two points is the last one
        producer, consumer = producer or free[0], consumer or free[-1]
    enter: Point = SOURCE if SOURCE in points else ("enter", index) if producer is None else producer
    leave: Point = SINK if SINK in points else ("leave", index) if consumer is None else consumer
    for point in free:
        if isinstance(enter, tuple):
            network.add_edge(point, enter)
        if isinstance(leave, tuple):
            network.add_edge(leave, point)
    capacity = net.seconds + network.get_edge_data(enter, leave, {"capacity": 0.0}).get("capacity", inf)
    network.add_edge(enter, leave, **({"capacity": capacity} if capacity < inf else {}))


def _grown(problem: Problem, cut: Bools, outside: Bools, seconds: float) -> Bools:
    """The set with ready atoms added, earliest first, until it weighs ``seconds`` more; at least one."""
    grown = cut.copy()
    for atom in np.flatnonzero(~(cut | outside)).tolist():
        if all(grown[source] for source in problem.predecessors[atom]):
            grown[atom] = True
            seconds -= problem.seconds[atom]
            if seconds <= 0:
                break
    return grown


def _shrunk(problem: Problem, cut: Bools, inside: Bools, seconds: float) -> Bools:
    """The complement of the set with last atoms taken out of it, latest first, until it weighs ``seconds`` less."""
    out = ~cut
    for atom in np.flatnonzero(cut & ~inside)[::-1].tolist():
        if all(out[target] for target in problem.successors[atom]):
            out[atom] = True
            seconds -= problem.seconds[atom]
            if seconds <= 0:
                break
    return out
