"""Plans whose activations go to the host's memory between the passes, where memory binds.

Which microbatches go, and when, follows from the plan's stages (``schedule.offload``). So a plan only says which stages
offload. A stage on the CPU does not: its activations are in the host's memory already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.weight_versions import Away, stash_at_start, walk

Fits = Callable[[Plan], bool]
Score = Callable[[Plan], float]


def offloading(plan: Plan, cluster: Cluster) -> Plan:
    """The plan in which every stage offloads that can: those on accelerators that do not recompute."""
    stages = (s for s, rank in enumerate(plan.rank_of) if not cluster.devices[rank].is_cpu)
    return replace(plan, offloaded=tuple(s for s in stages if s not in plan.recomputed))


def kept(plan: Plan, fits: Fits, score: Score) -> Plan:
    """The same plan with as few offloading stages as memory allows, those that delay the step most first."""
    while plan.offloaded:
        fewer = [replace(plan, offloaded=tuple(s for s in plan.offloaded if s != stage)) for stage in plan.offloaded]
        best = min(filter(fits, fewer), key=score, default=None)
        if best is None:
            break
        plan = best
    return plan


def exchanged(plan: Plan, cluster: Cluster, fits: Fits, score: Score) -> Plan:
    """The same plan, in which recomputing stages offload where that fits and makes the step shorter."""
    for stage in plan.recomputed:
        other = replace(
            plan,
            recomputed=tuple(s for s in plan.recomputed if s != stage),
            offloaded=tuple(sorted((*plan.offloaded, stage))),
        )
        if not cluster.devices[plan.rank_of[stage]].is_cpu and fits(other) and score(other) < score(plan):
            plan = other
    return plan


def resident(program: Program) -> tuple[int, ...]:
    """For each stage, the most microbatches between their Forward and Backward that are not on the host."""
    stashes, away = stash_at_start(program), Away(program)
    most = [len(stash.in_flight) - away.count(stage) for stage, stash in enumerate(stashes)]
    for i, stash in walk(program, stashes):
        away.reach(i)
        most[i.stage] = max(most[i.stage], len(stash.in_flight) - away.count(i.stage))
    return tuple(most)
