"""From a costed graph to a plan: which numbers of the model the solver sees, and what it gives back.

    node                           -> its seconds, forward and backward
    value                          -> a net: its bytes over the link, twice if its gradient comes back
    ``graph.together``             -> one atom
    parameters, saved activations  -> bytes, of which the latter count once for each microbatch in flight (1F1B)

Replicated nodes are in no stage and cross no cut, so they are left out. A parameter read by several nodes counts for
each of them: too much rather than too little where a memory limit is given.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.cluster import Cluster, Link
from pipecompile.graph import CostedGraph, Node
from pipecompile.partition.contract import Contraction, contract
from pipecompile.partition.placed import Placed
from pipecompile.partition.problem import Seat
from pipecompile.partition.solve import solve
from pipecompile.partition.wished import Wished
from pipecompile.plan import Plan
from pipecompile.wishes import Wishes

TRAINING_COPIES = 4  # of a parameter: itself, its gradient, two moments of Adam


def partition(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster | None = None,
    wishes: Wishes | None = None,
    budget: float | None = None,
) -> Plan:
    """A plan with the least time of the busiest stage that was found, never worse than the best cut of one node order.

    Args:
        cluster: the devices, stage s on rank s, and round again if there are more stages; by default equal devices
            without a memory limit.
        wishes: what else the plan must keep to. With ``most_stages`` it may have fewer than ``num_stages``.
        budget: CPU seconds after which the search ends with the best plan so far.

    Raises:
        ValueError: ``num_stages`` is less than one.
        InputError: a wish names a module or a stage that is not there.
        InfeasibleError: the model cannot be cut into so many stages, does not fit into the devices' memory, or wishes
            contradict the model or each other.
        PlanError: no plan within memory was found, though there may be one.
    """
    if num_stages < 1:
        raise ValueError(f"a plan needs at least one stage; got {num_stages}")
    cluster = Cluster.of([f"rank {rank}" for rank in range(num_stages)]) if cluster is None else cluster
    wishes = wishes or Wishes()
    num_stages = min(num_stages, wishes.most_stages or num_stages)
    contraction = problem_of(costed, num_stages, cluster, wishes)
    solution = solve(contraction.problem, budget)
    used = sorted(set(solution.stage_of))
    stage_of = tuple(used.index(stage) for stage in contraction.expand(solution.stage_of))
    ranks = _ranks(num_stages, cluster)
    plan = Plan.of(costed.graph, Placed(costed.graph).stages(stage_of), [ranks[stage] for stage in used])
    return replace(plan, quality=solution.quality)


def problem_of(costed: CostedGraph, num_stages: int, cluster: Cluster, wishes: Wishes) -> Contraction:
    """The numbers of the problem; its things are the nodes that are not replicated, in order."""
    placed = Placed(costed.graph)
    wished = Wished(placed, wishes, num_stages)
    wished.check()
    nodes = [costed.graph.nodes[index] for index in placed.nodes]
    costs = [costed.costs[index] for index in placed.nodes]
    values = zip(nodes, placed.users, strict=True)
    return contract(
        [cost.seconds for cost in costs],
        placed.arcs,
        [((thing, *users), _transfer(node, cluster.link)) for thing, (node, users) in enumerate(values)],
        _seats(num_stages, cluster, wished.least_stages),
        together=[*placed.together, *wished.groups],
        kept_bytes=[TRAINING_COPIES * cost.parameter_bytes for cost in costs],
        saved_bytes=[cost.saved_bytes for cost in costs],
        pinned=[(pin.thing, pin.stage) for pin in wished.pins],
    )


def _transfer(node: Node, link: Link) -> float:
    """Seconds to send a node's value, and to send its gradient back."""
    returned = sum(spec.nbytes for spec in node.outputs if spec.requires_grad)
    return link.seconds(node.nbytes) + (link.seconds(returned) if returned else 0.0)


def _ranks(num_stages: int, cluster: Cluster) -> tuple[int, ...]:
    return tuple(stage % len(cluster) for stage in range(num_stages))


def _seats(num_stages: int, cluster: Cluster, least: int) -> list[Seat]:
    """A seat for each stage, of which ``least`` are needed; stages on one rank share its memory."""
    ranks = _ranks(num_stages, cluster)
    seats = []
    for stage, rank in enumerate(ranks):
        device = cluster.devices[rank]
        memory = float("inf") if device.memory is None else device.memory / ranks.count(rank)
        seats.append(Seat(device.speed, memory, num_stages - stage, stage >= least))
    return seats
