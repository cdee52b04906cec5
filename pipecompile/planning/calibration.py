"""Compares measured stage times with predicted ones, and corrects costs accordingly.

A profile times operations on one device, outside of stages. In a step, stages share caches, threads and memory, and
each has overhead of its own. The ratio of measured to predicted seconds, forward and backward, corrects all nodes of a
stage alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median

from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.halves import Halves
from pipecompile.ir.instruction import Backward, BackwardWeight, Fetch, Forward, Offload, Recv, Send, Step, Update
from pipecompile.ir.plan import Plan
from pipecompile.ir.timeline import Timeline

LEAST = 0.5  # of the ratio of a stage, that of its forward and that of its backward; what is fixed is an estimate too


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds per microbatch in one stage: predicted, and the median of the measured ones.

    ``fixed`` is the part of both that corrections leave: it is of the number of nodes, not of their costs.
    """

    predicted: Cost
    measured: Cost
    fixed: Cost = field(default_factory=Cost)

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds; 1 if zero seconds were predicted."""
        return _ratio(self.measured.seconds, self.predicted.seconds)

    @property
    def error(self) -> float:
        """The absolute errors of forward and backward, relative to their predicted sum."""
        measured, predicted = self.measured, self.predicted
        off = abs(measured.forward - predicted.forward) + abs(measured.backward - predicted.backward)
        return off / predicted.seconds if predicted.seconds else 0.0


def stage_times(predicted: Sequence[Cost], timeline: Timeline, halves: Sequence[Halves] = ()) -> tuple[Times, ...]:
    """The times of each stage in a measured step; empty if a stage ran no backward.

    Args:
        predicted: the cost of each stage per microbatch.
        timeline: of the measured step.
        halves: the seconds of each stage where its backward is split; by default those of ``predicted``.
    """
    runs: dict[tuple[type, int, int], list[float]] = {}
    for span in timeline.spans:
        it = span.instruction
        if not isinstance(it, Send | Recv | Offload | Fetch):
            runs.setdefault((type(it), it.stage, it.microbatch), []).append(span.seconds)
    forward: list[list[float]] = [[] for _ in predicted]
    backward: list[list[float]] = [[] for _ in predicted]
    for (kind, stage, microbatch), seconds in runs.items():
        if kind is Forward:
            forward[stage] += seconds
        elif kind is Backward:  # with what it has left for later
            left = runs.get((BackwardWeight, stage, microbatch), [0.0] * len(seconds))
            backward[stage] += [b + w for b, w in zip(seconds, left, strict=True)]
    if not all(forward) or not all(backward):
        return ()
    measured = [Cost(median(f), median(b)) for f, b in zip(forward, backward, strict=True)]
    split = {stage for kind, stage, _ in runs if kind is BackwardWeight and halves}
    return tuple(
        Times(halves[stage].cost, it, halves[stage].fixed) if stage in split else Times(predicted[stage], it)
        for stage, it in enumerate(measured)
    )


def update_seconds(timeline: Timeline, num_stages: int) -> tuple[float, ...]:
    """The median seconds of a stage's optimizer steps in a measured program; 0 for a stage that ran none.

    A Step whose weights an Update has made takes no time, so the longer of the two kinds counts.
    """
    runs: dict[tuple[int, type], list[float]] = {}
    for span in timeline.spans:
        if isinstance(span.instruction, Step | Update):
            runs.setdefault((span.instruction.stage, type(span.instruction)), []).append(span.seconds)
    return tuple(max(median(runs.get((s, kind), [0.0])) for kind in (Step, Update)) for s in range(num_stages))


def corrected(costed: CostedGraph, plan: Plan, times: Sequence[Times], by: str = "a measured step") -> CostedGraph:
    """Scales the costs of each stage's nodes to the measured times. Rematerialized nodes keep their costs.

    For a stage with replicas, the factor is the mean of theirs.

    Args:
        costed: the costs to correct.
        plan: the plan of the measured step.
        times: the times of each stage.
        by: where the times come from, for ``origin``.
    """
    ratios = [_ratios(it, stage in plan.recomputed) for stage, it in enumerate(times)]
    forward = [mean(ratios[stage][0] for stage in r) for r in plan.replicas]
    backward = [mean(ratios[stage][1] for stage in r) for r in plan.replicas]
    costs = tuple(
        cost
        if stage is None
        else replace(cost, forward=cost.forward * forward[stage], backward=cost.backward * backward[stage])
        for cost, stage in zip(costed.costs, plan.stage_of, strict=True)
    )
    corrections = (*(done for done in costed.corrections if done != f"corrected by {by}"), f"corrected by {by}")
    return replace(costed, costs=costs, corrections=corrections)


def _ratios(times: Times, again: bool) -> tuple[float, float]:
    """Ratios of forward and backward, without what is fixed.

    If a stage recomputes, its backward is compared without the forward in it. Little or nothing is left of a measured
    time that is about as long as what is fixed, or of a backward whose forward took less than the first one.
    """

    def rest(cost: Cost) -> Cost:
        return Cost(cost.forward - times.fixed.forward, cost.backward - again * cost.forward - times.fixed.backward)

    measured, predicted, whole = rest(times.measured), rest(times.predicted), times.ratio
    if measured.forward <= 0 or measured.backward <= 0:
        return whole, whole
    pairs = (measured.forward, predicted.forward), (measured.backward, predicted.backward)
    forward, backward = (max(LEAST * whole, _ratio(m, p)) if p >= 0 else whole for m, p in pairs)
    return forward, backward


def _ratio(measured: float, predicted: float) -> float:
    return measured / predicted if predicted else 1.0
