"""Adapts an order for equal times to the times of a plan, if the step becomes shorter.

The order itself is a candidate of ``improve``: each rank keeps within the memory that the order needs of it, and the
result is taken only if the simulated step is shorter by more than what it takes to split further backwards: DualPipe-V
splits some of them only. Microbatches of a stage cost the same, so they are numbered
anew, in ascending order: a stage adds up gradients and writes buffers in the order of the unsplit model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from pipecompile.ir.graph import Cost
from pipecompile.ir.halves import Halves
from pipecompile.ir.plan import Plan
from pipecompile.schedule.improve import improve
from pipecompile.schedule.job import job_of
from pipecompile.schedule.order import Op, Order, W
from pipecompile.schedule.placements import Placements
from pipecompile.schedule.replay import peaks, replay
from pipecompile.schedule.shape import Shape, in_order
from pipecompile.schedule.stage_costs import OVERHEAD, StageCosts

WEIGHT_PART = 0.5  # of a backward whose halves are not known, as in ``simulate``
EFFORT, FEWEST, MOST = 200_000, 40, 200  # computations in all passes; passes
SHORTER = 1 - 1e-6  # of the seconds of a step, beyond the rounding of sums


def with_real_times(order: Order, plan: Plan) -> Order:
    """The order, or one that takes less time on a plan that knows its times, and no more memory on any rank.

    Args:
        order: for the stages of the plan, in the order of their ranks' first stages.
        plan: without times, or with stages that recompute, whose backwards are whole, the order stays as it is.
    """
    if plan.times is None or plan.recomputed:
        return order
    shape = in_order(plan)
    if shape.rank_of != order.shape.rank_of:
        return order
    times = plan.times
    whole = tuple(map(Cost, times.forward, times.backward))
    halves = times.halves or tuple(Halves.of(cost, WEIGHT_PART) for cost in whole)
    memory = tuple(map(float, times.saved_bytes))
    w = tuple(it.weights * cost.backward / (it.cost.backward or 1.0) for it, cost in zip(halves, whole, strict=True))
    costs = StageCosts(
        f=times.forward,
        b=tuple(cost.backward - part for cost, part in zip(whole, w, strict=True)),
        w=w,
        transfer=times.transfer,
        mem_f=memory,
        mem_b=(0.0,) * len(memory),
        mem_w=tuple(-amount for amount in memory),
    )
    more = tuple(it.cost.seconds - cost.seconds + OVERHEAD for it, cost in zip(halves, whole, strict=True))
    return _shorter(order, shape, costs, more)


@lru_cache(maxsize=32)
def _shorter(order: Order, shape: Shape, costs: StageCosts, splitting: tuple[float, ...]) -> Order:
    here = Order(shape, order.num_microbatches, order.rows)  # with the edges of the plan
    passes = min(MOST, max(FEWEST, EFFORT / sum(map(len, here.rows))))
    job = job_of(shape, here.num_microbatches, costs, peaks(here, costs))
    found = improve(Placements(job, [here.rows]), passes=passes, by_span=False)
    if found is None:
        return order
    there = _ascending(found)
    more = _splitting(there, splitting) - _splitting(here, splitting)
    is_shorter = replay(there, costs).makespan + max(0.0, more) < SHORTER * replay(here, costs).makespan
    return there if is_shorter else order


def _splitting(order: Order, each: Sequence[float]) -> float:
    """The seconds that a rank needs beside its operations to split backwards, of the rank that needs most.

    Args:
        each: seconds of one split backward, for each stage.
    """
    return max(sum(each[stage] for kind, stage, _ in order.ops(rank) if kind == W) for rank in range(len(order.rows)))


def _ascending(order: Order) -> Order:
    """The same times with the microbatches of each kind and stage in ascending order.

    A dependency joins computations of one microbatch. If each is before its own reader, the k-th of them is before the
    k-th reader.
    """
    rows = []
    for rank in range(len(order.rows)):
        count: Counter[tuple[int, int]] = Counter()
        row = []
        for kind, stage, _ in order.ops(rank):
            row.append(Op(kind, stage, count[kind, stage]))
            count[kind, stage] += 1
        rows.append(row)
    return Order.of(order.shape, order.num_microbatches, rows)
