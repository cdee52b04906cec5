"""What stages took in a step beside what was predicted, and costs corrected by it.

A profile times each operation alone. In a step they share caches, threads and memory with others, and a stage has a
cost of its own. The ratio of measured to predicted, forward and backward, corrects each node of a stage alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Backward, Forward
from pipecompile.ir.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch in one stage: as predicted, and the median of those measured."""

    predicted: Cost
    measured: Cost

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 where nothing was predicted."""
        return _ratio(self.measured.seconds, self.predicted.seconds)

    @property
    def error(self) -> float:
        """Seconds by which forward and backward are off, relative to the prediction of both."""
        measured, predicted = self.measured, self.predicted
        off = abs(measured.forward - predicted.forward) + abs(measured.backward - predicted.backward)
        return off / predicted.seconds if predicted.seconds else 0.0


def stage_times(predicted: Sequence[Cost], timeline: Timeline) -> tuple[Times, ...]:
    """For each stage its times in a measured step; none if one ran no backward.

    Args:
        predicted: of each stage, for one microbatch.
    """
    seconds: dict[tuple[type, int], list[float]] = {}
    for span in timeline.spans:
        seconds.setdefault((type(span.instruction), span.instruction.stage), []).append(span.seconds)
    stages = range(len(predicted))
    if not all((kind, stage) in seconds for kind in (Forward, Backward) for stage in stages):
        return ()
    return tuple(
        Times(predicted[stage], Cost(median(seconds[Forward, stage]), median(seconds[Backward, stage])))
        for stage in stages
    )


def corrected(costed: CostedGraph, plan: Plan, times: Sequence[Times], by: str = "a measured step") -> CostedGraph:
    """The costs with those of each stage's nodes scaled to what the stage took; rematerialized nodes keep theirs.

    Of a stage with replicas it is the mean of theirs.

    Args:
        by: where the times are from, for ``origin``.
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
    """Of forward and backward; that of a stage which computes its forward again holds for the rest of its backward."""
    measured, predicted = times.measured, times.predicted
    rest = measured.backward - again * measured.forward
    if rest <= 0:  # the forward in a backward took less than that before it
        return times.ratio, times.ratio
    return _ratio(measured.forward, predicted.forward), _ratio(rest, predicted.backward - again * predicted.forward)


def _ratio(measured: float, predicted: float) -> float:
    return measured / predicted if predicted else 1.0
