"""From a costed graph to a plan: which numbers of the model the solver sees, and what it gives back.

    node                           -> its seconds, forward and backward
    value                          -> a net: its bytes over the link, twice if its gradient comes back
    ``graph.together``             -> one atom
    parameters, saved activations  -> bytes, of which the latter count once for each microbatch in flight

Replicated nodes are in no stage and cross no cut, so they are left out. A parameter counts for the first node that
reads it. What more a stage holds (tied weights, values of other stages, what is on the way) depends on the whole plan:
it is told as ``reserved`` bytes once a plan is known (see ``memory`` and ``planning``).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

from pipecompile.cluster import Cluster, Link
from pipecompile.graph import CostedGraph, Node
from pipecompile.partition.contract import Contraction, contract
from pipecompile.partition.placed import Placed
from pipecompile.partition.problem import Seat
from pipecompile.partition.solve import solve
from pipecompile.partition.training import Training
from pipecompile.partition.wished import Wished
from pipecompile.plan import Plan
from pipecompile.wishes import Wishes


def partition(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster | None = None,
    training: Training | None = None,
    wishes: Wishes | None = None,
    budget: float | None = None,
) -> Plan:
    """A plan with the least time of the busiest stage that was found, never worse than the best cut of one node order.

    Args:
        cluster: the devices, stage s on rank s, and round again if there are more stages; by default equal devices
            without a memory limit.
        training: what their memory must hold; by default 1F1B's with Adam.
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
    contraction = problem_of(costed, num_stages, cluster, training, wishes)
    solution = solve(contraction.problem, budget)
    used = sorted(set(solution.stage_of))
    stage_of = tuple(used.index(stage) for stage in contraction.expand(solution.stage_of))
    ranks = _ranks(num_stages, cluster)
    plan = Plan.of(costed.graph, Placed(costed.graph).stages(stage_of), [ranks[stage] for stage in used])
    again = tuple(range(plan.num_stages)) if training and training.again else ()
    return replace(plan, quality=solution.quality, recomputed=again)


def problem_of(
    costed: CostedGraph,
    num_stages: int,
    cluster: Cluster,
    training: Training | None = None,
    wishes: Wishes | None = None,
) -> Contraction:
    """The numbers of the problem; its things are the nodes that are not replicated, in order."""
    training = training or Training.flushed(num_stages)
    placed = Placed(costed.graph)
    wished = Wished(placed, wishes or Wishes(), num_stages)
    wished.check()
    nodes = [costed.graph.nodes[index] for index in placed.nodes]
    costs = [costed.costs[index] for index in placed.nodes]
    values = zip(nodes, placed.users, strict=True)
    held, trained = _parameters(costed, placed)
    stashed = training.stashed
    return contract(
        [cost.seconds + cost.forward * training.again for cost in costs],
        placed.arcs,
        [
            ((thing, *users), _transfer(node, _typical_link(num_stages, cluster)))
            for thing, (node, users) in enumerate(values)
        ],
        _seats(num_stages, cluster, training, wished.least_stages),
        together=[*placed.together, *wished.groups],
        kept_bytes=[h + t * (1 + training.optimizer_state + stashed[0]) for h, t in zip(held, trained, strict=True)],
        saved_bytes=[cost.saved_bytes + t * stashed[1] for cost, t in zip(costs, trained, strict=True)],
        pinned=[(pin.thing, pin.stage) for pin in wished.pins],
    )


def _parameters(costed: CostedGraph, placed: Placed) -> tuple[list[int], list[int]]:
    """For each thing the bytes of the parameters that it is the first to read, and of those that are trained."""
    specs = {parameter.name: parameter.spec for parameter in costed.graph.parameters}
    held, trained = [], []
    seen: set[str] = set()
    for index in placed.nodes:
        mine = [specs[name] for name in costed.graph.nodes[index].parameters if name not in seen]
        seen.update(costed.graph.nodes[index].parameters)
        held.append(sum(spec.nbytes for spec in mine))
        trained.append(sum(spec.nbytes for spec in mine if spec.requires_grad))
    return held, trained


def _transfer(node: Node, link: Link) -> float:
    """Seconds to send a node's value, and to send its gradient back."""
    returned = sum(spec.nbytes for spec in node.outputs if spec.requires_grad)
    return link.seconds(node.nbytes) + (link.seconds(returned) if returned else 0.0)


def _ranks(num_stages: int, cluster: Cluster) -> tuple[int, ...]:
    return tuple(stage % len(cluster) for stage in range(num_stages))


def _typical_link(num_stages: int, cluster: Cluster) -> Link:
    """The mean of the links from each stage to the next: a cut costs the same wherever it is."""
    ranks = _ranks(num_stages, cluster)
    links = [cluster.between(*pair) for pair in pairwise(ranks) if pair[0] != pair[1]]
    if not links:
        return cluster.link
    slowness = sum(1 / link.bandwidth for link in links)
    bandwidth = len(links) / slowness if slowness else inf
    return Link(bandwidth, sum(link.latency for link in links) / len(links))


def _seats(num_stages: int, cluster: Cluster, training: Training, least: int) -> list[Seat]:
    """A seat for each stage, of which ``least`` are needed; stages on one rank share its memory."""
    ranks = _ranks(num_stages, cluster)
    reserved = training.reserved or (0,) * len(cluster)
    seats = []
    for stage, rank in enumerate(ranks):
        device = cluster.devices[rank]
        memory = inf if device.memory is None else max(0, device.memory - reserved[rank])
        in_flight = 1 if training.again else training.in_flight[stage]
        seats.append(Seat(device.speed, memory / ranks.count(rank), in_flight, stage >= least))
    return seats
