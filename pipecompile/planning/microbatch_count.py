"""How many microbatches make the shortest step, from costs of microbatches of two sizes.

More microbatches fill the bubble (GPipe, Huang et al. 2019, section 2.3: it is negligible for four per stage), but an
operation on few rows takes longer per row, and each instruction costs the runtime some time. The seconds of a node are
taken as ``a + b * rows``, and the step is simulated for each number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipecompile.ir.graph import Cost, CostedGraph, Graph
from pipecompile.ir.plan import Plan
from pipecompile.planning.counted import Count, Counted
from pipecompile.planning.planned import Planned
from pipecompile.schedule.stage_costs import OVERHEAD

PAYS = 0.02  # another number than the usual one is taken if it is predicted to save this share of the step
PER_RANK = (1, 2, 4, 8)  # microbatches per rank that are tried, beside one in all


def numbers(batch: int, ranks: int, usual: int, most: int) -> list[int]:
    """The numbers of microbatches to compare, ascending, the usual one among them.

    Args:
        batch: rows of the batch. Only numbers that divide it are tried, so that microbatches are alike.
        ranks: of the plan.
        usual: the number without a comparison.
        most: no larger numbers are tried.
    """
    wanted = {1, *(each * ranks for each in PER_RANK)}
    return sorted({usual, *(n for n in wanted if n <= min(batch, most) and batch % n == 0)})


def compared(
    found: Planned,
    other: CostedGraph,
    rows: tuple[int, int],
    batch: int,
    tried: Sequence[int],
    at: Callable[[int], Graph],
) -> Counted:
    """Compares numbers of microbatches.

    Args:
        found: the plan for the usual number.
        other: the costs of microbatches of another size.
        rows: of a microbatch of the plan, and of one of ``other``.
        batch: rows of the batch.
        tried: the numbers.
        at: the graph of a microbatch of so many rows.
    """

    def step(count: int) -> float:
        size = -(-batch // count)
        graph = at(size)
        costed = replace(found.costed, graph=graph, costs=costs_at(found.costed, other, rows, size))
        plan = Plan.of(graph, found.plan.stage_of, found.plan.rank_of, found.plan.replica_of)
        work = replace(found.work, microbatches=count)
        seconds = work.step_seconds(
            costed, replace(plan, recomputed=found.plan.recomputed, offloaded=found.plan.offloaded), found.cluster
        )
        per_rank = plan.num_stages / len(set(plan.rank_of))
        return seconds + 2 * OVERHEAD * (per_rank * count + plan.num_stages - per_rank)

    usual = found.work.microbatches
    steps = tuple(Count(count, step(count)) for count in tried)
    best = min(steps, key=lambda it: it.step)
    present = next(it for it in steps if it.microbatches == usual)
    whole = sum(cost.seconds for cost in costs_at(found.costed, other, rows, batch))
    return Counted(best.microbatches if best.step < present.step * (1 - PAYS) else usual, steps, whole)


def costs_at(one: CostedGraph, other: CostedGraph, rows: tuple[int, int], size: int) -> tuple[Cost, ...]:
    """The costs of a microbatch of ``size`` rows, from those of two sizes; bytes stay those of the first."""

    def line(a: float, b: float) -> float:
        slope = max(0.0, (b - a) / (rows[1] - rows[0]))
        return max(0.0, a + slope * (size - rows[0]))

    return tuple(
        replace(a, forward=line(a.forward, b.forward), backward=line(a.backward, b.backward))
        for a, b in zip(one.costs, other.costs, strict=True)
    )
