"""How many microbatches make the shortest step, from costs of microbatches of two sizes.

More microbatches fill the bubble (GPipe, Huang et al. 2019, section 2.3: it is negligible for four per stage), but an
operation on few rows takes longer per row, and each instruction costs the runtime some time. The step is simulated for
each number, with the costs of its rows (``by_rows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipecompile.ir.plan import Plan
from pipecompile.planning.by_rows import ByRows
from pipecompile.planning.counted import Count, Counted
from pipecompile.planning.planned import Planned
from pipecompile.planning.schedule_choice import predicted_step
from pipecompile.planning.split_choice import step_or_split

PAYS = 0.02  # a smaller number than the usual one is taken if it is predicted to save this share: it needs more memory


def compared(found: Planned, by_rows: ByRows, tried: Sequence[int], may_split: bool = False) -> Counted:
    """Compares numbers of microbatches.

    Args:
        found: the plan for the usual number.
        by_rows: the costs of any number.
        tried: the numbers.
        may_split: whether backwards are split for those numbers for which that pays.
    """
    step_of = step_or_split if may_split else predicted_step

    def step(count: int) -> float:
        costed = by_rows.costed(count)
        plan = Plan.of(costed.graph, found.plan.stage_of, found.plan.rank_of, found.plan.replica_of)
        plan = replace(plan, recomputed=found.plan.recomputed, offloaded=found.plan.offloaded)
        return step_of(costed, plan, found.cluster, replace(found.work, microbatches=count))

    usual = found.work.microbatches
    steps = tuple(Count(count, step(count)) for count in tried)
    best = min(steps, key=lambda it: it.step)
    present = next(it for it in steps if it.microbatches == usual)
    pays = best.step < present.step * (1 - PAYS * (best.microbatches < usual))
    return Counted(best.microbatches if pays else usual, steps, by_rows.one_device())
