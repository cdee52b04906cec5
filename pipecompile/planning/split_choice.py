"""Whether backwards are split if the user names no schedule: 1F1B, or ZB-H1, which keeps about as much in memory.

ZB-H1 (Qi et al., ICLR 2024, section 2) computes gradients of weights where 1F1B waits for other stages. That is worth
most with few microbatches, of which each takes longer per row the fewer rows it has. But to split a backward takes time
too (``ir/split_nodes.py``), so ZB-H1 is taken if its step is predicted to be shorter by ``PAYS``.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.planning.planned import Planned
from pipecompile.planning.schedule_choice import Weighed, predicted_step, weighed
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES

WHOLE, SPLIT = "1f1b", "zb-h1"
PAYS = 0.03  # the share of a step that split backwards are predicted to save, where they are taken
WORTH = 5e-3  # seconds of a stage per microbatch; faster stages keep the usual number of microbatches, and 1F1B


def under(name: str, work: Workload) -> Workload:
    """The workload under another schedule with one stage on each rank."""
    return replace(work, schedule=SCHEDULES[name].steady)


def or_split(found: Planned) -> Planned:
    """A plan for 1F1B, under 1F1B or ZB-H1, with both as they were weighed; as it is if all stages are short."""
    if is_short(found.costed, found.plan):
        return found
    whole, split = weighed_both(found)
    pays = _pays(split.seconds or 0.0, whole.seconds or 0.0) and _fits(found, under(SPLIT, found.work))
    best, other = (split, whole) if pays else (whole, split)
    return replace(found, work=under(best.schedule, found.work), schedule=best.schedule, weighed=(best, other))


def weighed_both(found: Planned) -> tuple[Weighed, Weighed]:
    """The plan under 1F1B and under ZB-H1."""
    whole, split = (
        weighed(name, found.costed, found.plan, found.cluster, under(name, found.work)) for name in (WHOLE, SPLIT)
    )
    return whole, split


def step_or_split(costed: CostedGraph, plan: Plan, cluster: Cluster, work: Workload) -> float:
    """The predicted step of a plan under the one of both that is taken, whatever memory there is."""
    whole, split = (predicted_step(costed, plan, cluster, under(name, work)) for name in (WHOLE, SPLIT))
    return split if _pays(split, whole) and not is_short(costed, plan) else whole


def is_short(costed: CostedGraph, plan: Plan) -> bool:
    """Whether all stages take too short to tell what is faster."""
    return max(cost.seconds for cost in stage_costs(costed, plan)) < WORTH


def _pays(split: float, whole: float) -> bool:
    return split < whole * (1 - PAYS)


def _fits(found: Planned, work: Workload) -> bool:
    needed = work.memory(found.costed, found.plan, found.cluster).ranks
    return all(
        device.memory is None or nbytes <= device.memory
        for device, nbytes in zip(found.cluster.devices, needed, strict=False)
    )
