"""Cheap closed cuts near a given balance, by minimum cuts (networkx).

A set that contains the sources of all its atoms is closed, and its cut is acyclic. An infinite arc from each atom to
its source makes every finite cut closed. A net costs its seconds once, however many of its ends are beyond the cut. It
becomes two points,

    end -> enter (infinite)     enter -> leave (its seconds)     leave -> end (infinite)

where ``enter`` is the producer itself if it precedes all other ends, and ``leave`` is the last end if it follows all
others. Atoms that the balance fixes to a side are contracted into the terminals, so the network is as small as the
window.

If the cheapest cut misses the window, its side and some atoms next to it are fixed too, and the search is repeated.

Source: piercing (flow-balanced bipartition) after Yang and Wong, "Efficient Network Flow Based Min-Cut Balanced
Partitioning" (1996); the solver is that of Boykov and Kolmogorov (2004), which was never the slowest of
networkx on these networks. (scipy's maximum flow takes whole numbers only.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import networkx as nx
import numpy as np
from networkx.algorithms.flow import boykov_kolmogorov

from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem

SOURCE, SINK = "source", "sink"
PIERCINGS = 12
Point = int | str | tuple[str, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """A cheapest closed set between two fixed sets, and the flow that proves it."""

    members: Bools
    seconds: float  # of the nets open at it
    slack: Floats  # net -> seconds that the flow does not use


def closed_cut(problem: Problem, inside: Bools, outside: Bools, nets: Bools | None = None) -> Cut:
    """The closed set with the fewest open seconds that contains all atoms ``inside`` and none ``outside``.

    Every closed set between the two has at least as many open seconds as this one, plus the slack of its open nets.

    Args:
        inside: a closed set.
        outside: the complement of a closed set, disjoint from ``inside``.
        nets: the nets that count; by default all.
    """
    slack = problem.net_seconds.copy() if nets is None else np.where(nets, problem.net_seconds, 0.0)
    side: list[Point] = [
        SOURCE if i else SINK if o else v for v, (i, o) in enumerate(zip(inside, outside, strict=True))
    ]
    network, arc_of = _network(problem, side, slack)
    residual = boykov_kolmogorov(network, SOURCE, SINK)
    _, (reached, _) = nx.minimum_cut(network, SOURCE, SINK, flow_func=lambda *_, **__: residual)
    members = inside.copy()
    members[[point for point in reached if isinstance(point, int)]] = True
    open_always = _open_always(problem, inside, outside)
    seconds = float(slack[open_always].sum()) + float(residual.graph["flow_value"])
    slack[open_always] = 0.0
    for net, (enter, leave) in arc_of.items():
        if capacity := network[enter][leave].get("capacity"):
            slack[net] *= max(0.0, 1 - residual[enter][leave]["flow"] / capacity)
    return Cut(members, seconds, slack)


def _network(problem: Problem, side: list[Point], seconds: Floats) -> tuple[nx.DiGraph, dict[int, tuple[Point, Point]]]:
    """The network of the free atoms, and the arc of each net that has one."""
    network = nx.DiGraph()
    network.add_nodes_from((SOURCE, SINK))
    free = [atom for atom, point in enumerate(side) if point == atom]
    for atom in free:
        network.add_node(atom)
        network.add_edges_from((atom, source) for source in problem.predecessors[atom] if side[source] == source)
    nets = sorted({net for atom in free for net in problem.nets_of[atom] if seconds[net] > 0})
    arcs = {net: _add_net(network, problem, net, side) for net in nets}
    return network, {net: arc for net, arc in arcs.items() if arc is not None}


def _open_always(problem: Problem, inside: Bools, outside: Bools) -> Ints:
    """The nets with an end in both fixed sets."""
    ends, begins = problem.net_ends
    if not len(ends):
        return np.zeros(0, np.int64)
    both = np.logical_or.reduceat(inside[ends], begins) & np.logical_or.reduceat(outside[ends], begins)
    return np.flatnonzero(both)


def balanced_cuts(problem: Problem, inside: Bools, outside: Bools, low: float, high: float) -> Iterator[Bools]:
    """Yields cheap closed sets. The last one weighs between ``low`` and ``high`` seconds if piercing reaches that."""
    inside, outside = inside.copy(), outside.copy()
    for _ in range(PIERCINGS):
        cut = closed_cut(problem, inside, outside).members
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


def sweep(problem: Problem, targets: int, tolerance: float) -> Iterator[Bools]:
    """Cheap cuts at evenly spaced shares of the weight, within a tolerance (a share of a mean stage)."""
    half = tolerance * problem.total / max(1, problem.num_stages)
    for target in np.linspace(0, problem.total, targets + 2)[1:-1]:
        inside = problem.descendant_weight > problem.total - (target - half)
        outside = problem.ancestor_weight > target + half
        yield from balanced_cuts(problem, inside, outside, target - half, target + half)


def bisect(problem: Problem, grain: float, tolerance: float = 0.2) -> tuple[tuple[int, ...], list[Bools]]:
    """An order from nested cuts, which halve each piece until it weighs ``grain`` seconds, and all cuts tried."""
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
    """The free atoms heavier than ``most`` seconds with their free descendants; the others heavier with ancestors."""
    atoms = np.flatnonzero(free)
    ancestors, weight = problem.ancestors[np.ix_(atoms, atoms)], problem.weight[atoms]
    must, cannot = np.zeros_like(free), np.zeros_like(free)
    cannot[atoms] = ancestors @ weight > most
    must[atoms] = (weight @ ancestors > most) & ~cannot[atoms]
    return must, cannot


def _add_net(network: nx.DiGraph, problem: Problem, index: int, side: list[Point]) -> tuple[Point, Point] | None:
    """Adds the points and arcs of a net. Returns the arc with its cost, or None if it is open or closed anyway."""
    producer, consumer = problem.outer_ends[index]
    points = list(dict.fromkeys(side[end] for end in problem.nets[index].ends))
    if SOURCE in points and SINK in points:
        return None
    free = [point for point in points if isinstance(point, int)]
    if len(free) == 1:
        producer = consumer = free[0]
    enter: Point = SOURCE if SOURCE in points else ("enter", index) if producer is None else producer
    leave: Point = SINK if SINK in points else ("leave", index) if consumer is None else consumer
    if isinstance(enter, tuple):
        network.add_edges_from((point, enter) for point in free)
    if isinstance(leave, tuple):
        network.add_edges_from((leave, point) for point in free)
    before = network.get_edge_data(enter, leave)
    if before is None or "capacity" in before:
        network.add_edge(enter, leave, capacity=problem.nets[index].seconds + (before or {"capacity": 0.0})["capacity"])
    return enter, leave


def _grown(problem: Problem, cut: Bools, outside: Bools, seconds: float) -> Bools:
    """Adds ready atoms to the set, earliest first and at least one, until it weighs ``seconds`` more."""
    grown = cut.copy()
    for atom in np.flatnonzero(~(cut | outside)).tolist():
        if all(grown[source] for source in problem.predecessors[atom]):
            grown[atom] = True
            seconds -= problem.seconds[atom]
            if seconds <= 0:
                break
    return grown


def _shrunk(problem: Problem, cut: Bools, inside: Bools, seconds: float) -> Bools:
    """Removes last atoms from the set, latest first, until it weighs ``seconds`` less. Returns its complement."""
    out = ~cut
    for atom in np.flatnonzero(cut & ~inside)[::-1].tolist():
        if all(out[target] for target in problem.successors[atom]):
            out[atom] = True
            seconds -= problem.seconds[atom]
            if seconds <= 0:
                break
    return out
