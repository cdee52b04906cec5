"""From a costed graph to a plan: which numbers of the model the solver sees, and what it gives back.

    node                           -> its seconds, forward and backward
    value                          -> a net: its bytes over the link, twice if its gradient comes back
    ``graph.together``             -> one atom
    parameters, saved activations  -> bytes, of which the latter count once for each microbatch in flight (1F1B)

Replicated nodes are in no stage and cross no cut, so they are left out. A parameter read by several nodes counts for
each of them: too much rather than too little where a memory limit is given.
"""

from __future__ import annotations

from pipecompile.cluster import Cluster, Link
from pipecompile.graph import CostedGraph, Node
from pipecompile.partition.contract import Contraction, contract
from pipecompile.partition.placed import Placed
from pipecompile.partition.problem import Seat
from pipecompile.partition.solve import solve
from pipecompile.plan import Plan

TRAINING_COPIES = 4  # of a parameter: itself, its gradient, two moments of Adam


def partition(costed: CostedGraph, num_stages: int, cluster: Cluster | None = None) -> Plan:
    """A plan with the least time of the busiest stage that was found, never worse than the best cut of one node order.

    Args:
        cluster: the devices, stage s on rank s, and round again if there are more stages; by default equal devices
            without a memory limit.

    Raises:
        ValueError: ``num_stages`` is less than one.
        InfeasibleError: the model cannot be cut into so many stages, or does not fit into the devices' memory.
        PlanError: no plan within memory was found, though there may be one.
    """
    if num_stages < 1:
        raise ValueError(f"a plan needs at least one stage; got {num_stages}")
    cluster = Cluster.of([f"rank {rank}" for rank in range(num_stages)]) if cluster is None else cluster
    contraction = problem_of(costed, num_stages, cluster)
    stage_of = contraction.expand(solve(contraction.problem).stage_of)
    return Plan.of(costed.graph, Placed(costed.graph).stages(stage_of), _ranks(num_stages, cluster))


def problem_of(costed: CostedGraph, num_stages: int, cluster: Cluster) -> Contraction:
    """The numbers of the problem; its things are the nodes that are not replicated, in order."""
    placed = Placed(costed.graph)
    nodes = [costed.graph.nodes[index] for index in placed.nodes]
    costs = [costed.costs[index] for index in placed.nodes]
    values = zip(nodes, placed.users, strict=True)
    return contract(
        [cost.seconds for cost in costs],
        placed.arcs,
        [((thing, *users), _transfer(node, cluster.link)) for thing, (node, users) in enumerate(values)],
        _seats(num_stages, cluster),
        together=placed.together,
        kept_bytes=[TRAINING_COPIES * cost.parameter_bytes for cost in costs],
        saved_bytes=[cost.saved_bytes for cost in costs],
    )


def _transfer(node: Node, link: Link) -> float:
    """Seconds to send a node's value, and to send its gradient back."""
    returned = sum(spec.nbytes for spec in node.outputs if spec.requires_grad)
    return link.seconds(node.nbytes) + (link.seconds(returned) if returned else 0.0)


def _ranks(num_stages: int, cluster: Cluster) -> tuple[int, ...]:
    return tuple(stage % len(cluster) for stage in range(num_stages))


def _seats(num_stages: int, cluster: Cluster) -> list[Seat]:
    """A seat for each stage; stages on one rank share its memory."""
    ranks = _ranks(num_stages, cluster)
    seats = []
    for stage, rank in enumerate(ranks):
        device = cluster.devices[rank]
        memory = float("inf") if device.memory is None else device.memory / ranks.count(rank)
        seats.append(Seat(device.speed, memory, num_stages - stage))
    return seats
