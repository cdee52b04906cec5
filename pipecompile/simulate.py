"""What a program will do on a cluster, before it does it: a max-plus replay.

A rank computes one thing at a time, in the order of its row; a computation starts once the rank is free and
everything it reads has arrived. A transfer starts when its result is there, takes the time of the link, and overlaps
with computation and with other transfers. A bare program, which has no transfers, waits for them on the edge; both
give the same computations at the same times.

Memory needs no clock: it follows from the order of each row.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.cluster import Cluster
from pipecompile.errors import InputError
from pipecompile.graph import Cost
from pipecompile.plan import Plan
from pipecompile.program import (
    Backward,
    Compute,
    Forward,
    Instruction,
    Program,
    Recv,
    Reduce,
    Send,
    Step,
    dependencies,
    linearize,
)
from pipecompile.timeline import Span, Timeline
from pipecompile.versions import Stash, stash_at_start, walk


def simulate(
    program: Program, costs: Sequence[Cost], cluster: Cluster | None = None, step_seconds: float = 0.0
) -> Timeline:
    """The timeline of a bare or a lowered program.

    Args:
        costs: of each stage, for one microbatch, on a device of speed 1.
        cluster: a device for each rank; by default equal devices and links that take no time.
        step_seconds: of one Step, on a device of speed 1.

    Raises:
        InputError: there is not one cost for each stage, or not one device for each rank.
        DeadlockError: the program cannot end.
    """
    _check(program.plan, costs, cluster)
    end: dict[Instruction, float] = dict.fromkeys(program.carried, 0.0)
    free = [0.0] * len(program.ranks)
    spans = []
    for rank, i in linearize(program):
        if isinstance(i, Send | Recv):
            start = end[i.result]
            end[i] = start + _transfer_seconds(i, program.plan, cluster)
        else:
            arrivals = (_arrival(needed, program, end, cluster) for needed in dependencies(i, program.plan))
            start = max(free[rank], *arrivals, 0.0)
            speed = 1.0 if cluster is None else cluster.devices[rank].speed
            end[i] = free[rank] = start + _seconds(i, costs, step_seconds) / speed
        spans.append(Span(rank, i, start, end[i]))
    spans.sort(key=lambda span: (span.rank, span.start))
    return Timeline(tuple(spans), len(program.ranks), peak_bytes(program, costs))


def peak_bytes(program: Program, costs: Sequence[Cost]) -> tuple[int, ...]:
    """For each rank the most bytes it holds at once: each live version of its parameters, and what its microbatches in
    flight have saved. Gradients, optimizer state and transfer buffers come on top. Carried Forwards count as version 0.
    """
    rank_of, stashes = program.plan.rank_of, stash_at_start(program)
    held = [_held(stash, cost) for stash, cost in zip(stashes, costs, strict=True)]
    now = [sum(nbytes for s, nbytes in enumerate(held) if rank_of[s] == rank) for rank in range(len(program.ranks))]
    peak = list(now)
    for i, stash in walk(program, stashes):
        nbytes, rank = _held(stash, costs[i.stage]), rank_of[i.stage]
        now[rank] += nbytes - held[i.stage]
        held[i.stage] = nbytes
        peak[rank] = max(peak[rank], now[rank])
    return tuple(peak)


def _held(stash: Stash, cost: Cost) -> int:
    return stash.live * cost.parameter_bytes + len(stash.in_flight) * cost.saved_bytes


def _seconds(i: Compute, costs: Sequence[Cost], step_seconds: float) -> float:
    match i:
        case Forward():
            return costs[i.stage].forward
        case Backward():
            return costs[i.stage].backward
        case Step():
            return step_seconds
        case _:
            return 0.0  # a Reduce adds gradients up, in no time beside a Backward


def _arrival(needed: Instruction, program: Program, end: dict[Instruction, float], cluster: Cluster | None) -> float:
    if program.lowered or not isinstance(needed, Recv):
        return end[needed]
    if needed.result in program.carried:  # the program that made it has sent it
        return 0.0
    return end[needed.result] + _transfer_seconds(needed, program.plan, cluster)


def _transfer_seconds(i: Send | Recv, plan: Plan, cluster: Cluster | None) -> float:
    if cluster is None:
        return 0.0
    source, target = i.result.stage, i.target
    first, last = min(source, target), max(source, target)  # a gradient has the bytes of the value it belongs to
    if isinstance(i.result, Reduce):
        nbytes = sum(tied.nbytes for tied in plan.tied if tied.owner == first and last in tied.followers)
    else:
        nbytes = sum(channel.nbytes for channel in plan.outgoing[first] if channel.target == last)
    return cluster.transfer_seconds(plan.rank_of[source], plan.rank_of[target], nbytes)


def _check(plan: Plan, costs: Sequence[Cost], cluster: Cluster | None) -> None:
    if len(costs) != plan.num_stages:
        raise InputError(f"{len(costs)} costs were given for {plan.num_stages} stages; give one for each")
    if cluster is not None and len(cluster) < plan.num_ranks:
        raise InputError(f"the cluster has {len(cluster)} devices, but the plan uses {plan.num_ranks} ranks")
