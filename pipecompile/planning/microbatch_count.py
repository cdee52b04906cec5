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
from pipecompile.planning.candidates import Candidates
from pipecompile.planning.counted import Count, Counted
from pipecompile.planning.planned import Planned
from pipecompile.planning.schedule_choice import best_step, predicted_step

PAYS = 0.02  # a smaller number than the usual one is taken if it is predicted to save this share: it needs more memory


def compared(found: Planned, by_rows: ByRows, tried: Sequence[int], among: Candidates | None = None) -> Counted:
    """Compares numbers of microbatches.

    Args:
        found: the plan for the usual number.
        by_rows: the costs of any number.
        tried: the numbers.
        among: the schedules of which each number has the best; by default all have that of the plan.
    """

    def step(count: int) -> float:
        costed = by_rows.costed(count)
        plan = Plan.of(costed.graph, found.plan.stage_of, found.plan.rank_of, found.plan.replica_of)
        plan = replace(plan, recomputed=found.plan.recomputed, offloaded=found.plan.offloaded)
        work = replace(found.work, microbatches=count)
        if among is None:
            return predicted_step(costed, plan, found.cluster, work)
        return best_step(costed, plan, found.cluster, work, among)

    usual = found.work.microbatches
    steps = tuple(Count(count, step(count)) for count in tried)
    best = min(steps, key=lambda it: it.step)
    present = next(it for it in steps if it.microbatches == usual)
    pays = best.step < present.step * (1 - PAYS * (best.microbatches < usual))
    return Counted(best.microbatches if pays else usual, steps, by_rows.one_device())
