"""Makes a plan from a model, the devices and a request.

The devices are ordered so that each has a fast link to the next. Stages are planned along this order, within memory
(``memory_fit``). Finally, equal devices are swapped, so that the largest transfers use the fastest links.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_times import Times
from pipecompile.ir.split_nodes import stage_halves
from pipecompile.partition import assign, suited
from pipecompile.planning.memory_fit import Fitting
from pipecompile.planning.refusal import refusal
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload


def make_plan(costed: CostedGraph, request: Request, cluster: Cluster, work: Workload) -> Plan:
    """The best plan found within memory, with stages on ranks that suit the links.

    Raises:
        InfeasibleError: no plan exists; the message names the stage of the fastest plan that exceeds its memory, by how
            much, and what would help.
        InputError, PlanError: as ``Fitting.plan``; no plan within memory was found.
    """
    row = _row(costed, request, cluster)
    fitting = Fitting(costed, request.on(row), cluster.in_order(row), work)
    found = fitting.plan()
    if found is None:
        raise refusal(fitting)
    plan = found.on_ranks(row)
    other = assign(plan, [cost.seconds for cost in stage_costs(costed, plan)], cluster, work.microbatches)
    if request.scores_plans:
        other = min(plan, other, key=request.score(costed, cluster, work))
    return _with_times(other, costed, cluster) if work.placement.turns else other


def _with_times(plan: Plan, costed: CostedGraph, cluster: Cluster) -> Plan:
    """The plan with the times of its stages and channels, to which orders for V shapes are adapted."""
    costs, halves, rank_of = stage_costs(costed, plan), stage_halves(costed, plan, cluster), plan.rank_of
    speeds = [cluster.devices[rank].speed for rank in rank_of]
    times = Times(
        forward=tuple(cost.forward / speed for cost, speed in zip(costs, speeds, strict=True)),
        backward=tuple(cost.backward / speed for cost, speed in zip(costs, speeds, strict=True)),
        saved_bytes=tuple(cost.saved_bytes for cost in costs),
        transfer=tuple(cluster.transfer_seconds(rank_of[c.source], rank_of[c.target], c.nbytes) for c in plan.channels),
        halves=tuple(it.over(speed) for it, speed in zip(halves, speeds, strict=True)),
    )
    return replace(plan, times=times)


def _row(costed: CostedGraph, request: Request, cluster: Cluster) -> tuple[int, ...]:
    """An order of the devices in which each has a fast link to the next, as a chain of stages needs it."""
    chain = request.chain(len(cluster), sum(node.nbytes for node in costed.graph.nodes) // len(costed.graph))
    return suited(chain, [0.0] * chain.num_stages, cluster)
