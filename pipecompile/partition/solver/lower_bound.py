"""A lower bound on the load of the stage that holds a heavy atom, by one minimum cut.

Some stage holds the atom. Whatever else it holds, its load is the seconds of its atoms and of the nets that cross it.
If it holds an ancestor, it also holds everything on the paths from there, and likewise for a descendant. The cheapest
such set of atoms is a minimum cut:

    given atom = source     atom -> sink (its seconds)     end -> enter -> leave -> end (seconds of the net)
    ancestor -> its readers that are ancestors     descendant -> its sources that are descendants

A large head or embedding is often the bottleneck, and then this bound alone proves the optimum.

Source: the reduction of a hyperedge cut to a network is Lawler, "Cutsets and Partitions of Hypergraphs" (1973).
"""

from __future__ import annotations

from itertools import chain

import networkx as nx
import numpy as np
from networkx.algorithms.flow import boykov_kolmogorov

from pipecompile.partition.solver.problem import Problem

MOST_CUTS = 4


def stage_bound(problem: Problem) -> float:
    """A lower bound on the bottleneck in seconds: the mean stage, or the cheapest stage around a heavy atom."""
    bound = problem.lower_bound
    alone = problem.weight / problem.speeds.max()
    alone = alone + [problem.net_seconds[list(nets)].sum() for nets in problem.nets_of]
    heaviest = [np.argsort(-seconds, kind="stable")[:MOST_CUTS].tolist() for seconds in (alone, problem.weight)]
    for atom in dict.fromkeys(chain(*heaviest)):
        if alone[atom] > bound:
            both = _cheapest_stage_with(problem, atom)
            bound = max(bound, both / 2 if problem.overlapped else both)
    return bound


def _cheapest_stage_with(problem: Problem, atom: int) -> float:
    network = nx.DiGraph()
    for other, seconds in enumerate(problem.seconds):
        network.add_edge(other, "sink", capacity=seconds / problem.speeds.max())
    for index, net in enumerate(problem.nets):
        network.add_edge(("enter", index), ("leave", index), capacity=net.seconds)
        network.add_edges_from((end, ("enter", index)) for end in net.ends)
        network.add_edges_from((("leave", index), end) for end in net.ends)
    before, after = problem.ancestors[atom], problem.ancestors[:, atom]
    network.add_edges_from((low, high) for low, high in problem.arcs if before[high])
    network.add_edges_from((high, low) for low, high in problem.arcs if after[low])
    return float(boykov_kolmogorov(network, atom, "sink", value_only=True).graph["flow_value"])
