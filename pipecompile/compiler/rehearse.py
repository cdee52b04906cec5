"""Runs the stages of a plan before the first step, on their own devices and by their own threads, and times them.

A profile times each operation alone: that gives each its share of a stage, and the stage's seconds but roughly, since
stages share caches, memory and Python's lock with one another. A rehearsal is a step with fewer microbatches, on the
sample and under the schedule of the step to come, so it holds no more memory at once.

It leaves no mark: gradients gather in leaves that are thrown away, random functions draw from seeds of their own, and
what else a step changes, buffers, attributes and generators, is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from pipecompile.batching import Rows
from pipecompile.capture import Call
from pipecompile.capture.state.restore import left_as_before
from pipecompile.errors import ExecutionError, PlanError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.planning.calibration import Times, corrected
from pipecompile.runtime import Microbatch, Weights
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.session import Session
from pipecompile.runtime.steps import Batch, microbatches_of

REHEARSALS = 3  # at most, each of a plan made from the one before
HOLDS = 0.05  # relative: a stage's time is not predicted closer than steps differ from one another
PASSES = (2, 8)  # timed, at least and at most, after one to warm up
ENOUGH = 0.5  # seconds: passes are not repeated further once they have taken so long
WORTH = 5e-3  # seconds of a stage from which it is rehearsed: Python's lock passes from thread to thread so late


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed.

    Args:
        starts: the values that backwards start from, by name.
        schedule: a synchronous one.
        devices: one for each rank.
    """

    starts: Sequence[str]
    schedule: Callable[[Plan, int], Program]
    devices: Sequence[torch.device]

    def times(self, batch: Batch) -> tuple[Times, ...]:
        """For each stage its times; none where a rehearsal tells nothing.

        That is with a single stage, where no backward will run, on CUDA (see ``Compiled.times``), and where each stage
        takes less than ``WORTH``.

        Args:
            batch: the sample; its first microbatches are run, two for each stage and one more, if there are so many.

        Raises:
            ExecutionError: a stage raised, as it would in a step.
        """
        compiled = batch.compiled
        if not _tells(compiled):
            return ()
        count = min(len(batch.rows), 2 * compiled.plan.num_stages + 1)
        program = compiled.lowered(self.schedule(compiled.plan, count))
        with left_as_before(compiled.captured.model), closing(Session(self.devices, None)) as session:
            session.weights = [Weights(compiled.tensors(stage.index), stage.device) for stage in compiled.stages]

            def run() -> Timeline:
                for weights in session.weights:
                    weights.begin(weights.tensors)
                session.run(compiled, program, _microbatches(batch, self.starts))
                assert session.timeline is not None
                return session.timeline

            run()
            timed: list[Timeline] = []
            least, most = PASSES
            while len(timed) < least or (len(timed) < most and sum(each.makespan for each in timed) < ENOUGH):
                timed.append(run())
        spans = tuple(span for each in timed for span in each.spans)
        return compiled.times(Timeline(spans, len(self.devices)))


def rehearsed(
    compiled: Compiled, call: Call, rows: Rows, it: Rehearsal, replan: Callable[[CostedGraph], Compiled]
) -> Compiled:
    """The same planned from what its stages take together, rehearsed until the plan's times hold.

    If they never do, of all rehearsed plans that whose busiest stage took least, with the times that it took. Where a
    stage raises, the costs stay as they are and say so: the step to come raises too.

    Args:
        replan: the same model planned anew, from other costs.
    """
    tried: list[Compiled] = []
    while len(tried) < REHEARSALS:
        try:
            times = it.times(Batch(compiled, call, rows))
        except ExecutionError as error:
            return _noted(compiled, f"not rehearsed, since {error}")
        if not times:
            return compiled
        if max(each.error for each in times) <= HOLDS:
            return _noted(compiled, "held in a rehearsal")
        costed = corrected(compiled.costed, compiled.plan, times, "a rehearsal")
        plan = replace(compiled.plan, quality=None)
        cut = compiled.stages, compiled.before, compiled.tail
        tried.append(compiled.planned(costed, plan, cut, compiled.candidates))
        try:
            compiled = replan(costed)
        except PlanError:  # a search can fail where another has not
            break
        if replace(compiled.plan, quality=None) == plan:
            return compiled
    return min(tried, key=lambda each: max(cost.seconds for cost in stage_costs(each.costed, each.plan)))


def _noted(compiled: Compiled, what: str) -> Compiled:
    """The same with a word on where its costs are from."""
    return replace(compiled, costed=replace(compiled.costed, corrections=(*compiled.costed.corrections, what)))


def _tells(compiled: Compiled) -> bool:
    costs = stage_costs(compiled.costed, compiled.plan)
    return (
        len(costs) > 1
        and max(cost.seconds for cost in costs) >= WORTH
        and all(stage.device.type == "cpu" for stage in compiled.stages)
        and torch.is_grad_enabled()
        and any(output.requires_grad for output in compiled.captured.results)
    )


def _microbatches(batch: Batch, starts: Sequence[str]) -> dict[int, Microbatch]:
    """All parts of the sample, with seeds of their own; gradients of one come into what the backwards start from."""
    parts = microbatches_of(batch, range(len(batch.rows)))
    for part in parts:
        part.seeds = dict.fromkeys(starts, 1.0)
    return dict(enumerate(parts))
