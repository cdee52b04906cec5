"""What the stage of a heavy atom costs at least, by one minimum cut.

Some stage holds the atom. Whatever else it holds, it pays the seconds of its atoms and of the nets that cross it. With
an ancestor it holds all that lies on the way from there, and so with a descendant. The cheapest set of atoms of which
this is true is a minimum cut:

    given atom = source     atom -> sink (its seconds)     pin -> enter -> leave -> pin (seconds of the net)
    ancestor -> what reads it, as far as that is an ancestor     descendant -> what it reads, likewise

A large head or embedding is often the bottleneck, and then this is the whole proof.

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
    """Seconds that the busiest stage takes at least: the mean stage, or the cheapest stage around a heavy atom."""
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
        network.add_edges_from((pin, ("enter", index)) for pin in net.pins)
        network.add_edges_from((("leave", index), pin) for pin in net.pins)
    before, after = problem.ancestors[atom], problem.ancestors[:, atom]
    network.add_edges_from((low, high) for low, high in problem.arcs if before[high])
    network.add_edges_from((high, low) for low, high in problem.arcs if after[low])
    return float(boykov_kolmogorov(network, atom, "sink", value_only=True).graph["flow_value"])
