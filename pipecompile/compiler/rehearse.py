"""Rehearsal: runs and times the stages of a plan before the first step, on their devices and in their threads.

A profile times operations on one device. That gives the share of each operation in its stage, but only roughly the
seconds of the stage, since stages share caches, memory and the GIL. A rehearsal is a step with fewer microbatches, on
the same batch and with the same schedule as the first step, so its peak memory is not higher.

A rehearsal has no side effects: gradients go to temporary leaf tensors, random functions draw from their own seeds, and
buffers, attributes and generators are restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from pipecompile.batching import Rows
from pipecompile.capture import Call
from pipecompile.capture.state.restore import left_as_before
from pipecompile.errors import ExecutionError, PlanError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.timeline import Timeline
from pipecompile.planning.calibration import Times, corrected
from pipecompile.planning.short_stages import all_short
from pipecompile.runtime import Microbatch
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.microbatches import microbatches_of
from pipecompile.runtime.peers import OneProcess, Peers
from pipecompile.runtime.session import Session
from pipecompile.schedule import MakeProgram

REHEARSALS = 3  # maximum; each rehearses the plan made from the times of the one before
HOLDS = 0.05  # relative error of predicted stage times that is accepted: about the variation between steps
PASSES = (2, 8)  # minimum and maximum number of timed passes, after a warm-up pass
ENOUGH = 0.5  # seconds of timed passes after which no other pass is run


@dataclass(frozen=True)
class Rehearsal:
    """The settings of a rehearsal.

    Args:
        starts: names of the outputs from which backwards start.
        schedule: a synchronous schedule.
        devices: one per rank.
        peers: the processes that run the ranks. All of them rehearse, each its own ranks.
    """

    starts: Sequence[str]
    schedule: MakeProgram
    devices: Sequence[torch.device]
    peers: Peers = field(default_factory=OneProcess)

    def times(self, batch: Batch) -> tuple[Times, ...]:
        """The times of each stage; empty if a rehearsal is not useful.

        It is not useful with a single stage, without a backward, or if all stages are short.

        Args:
            batch: the batch to run; only its first microbatches are run, at most two per rank and one more.

        Raises:
            ExecutionError: a stage raised, as it would in a step.
        """
        compiled = batch.compiled
        if not _tells(compiled):
            return ()
        count = min(len(batch.rows), 2 * len(set(compiled.plan.rank_of)) + 1)
        program = compiled.lowered(self.schedule(compiled.plan, count))
        with left_as_before(compiled.captured.model), closing(Session(self.devices, None, self.peers)) as session:

            def run() -> Timeline:
                session.begin(compiled)
                session.run(compiled, program, _microbatches(batch, self.starts))
                assert session.timeline is not None
                return session.timeline

            run()
            timed = [run() for _ in range(PASSES[0])]
            seconds = sum(each.makespan for each in timed) / len(timed)
            more = self.peers.shared(lambda: min(PASSES[1], math.ceil(ENOUGH / seconds)) - len(timed))
            timed += [run() for _ in range(more)]
        spans = self.peers.of_each(tuple(span for each in timed for span in each.spans))
        return compiled.times(Timeline(tuple(span for each in spans for span in each), len(self.devices)))


def rehearsed(
    compiled: Compiled, call: Call, rows: Rows, it: Rehearsal, replan: Callable[[CostedGraph], Compiled]
) -> Compiled:
    """Rehearses a plan, and replans from the measured times, until the predicted times hold.

    If they never hold, returns the rehearsed plan with the shortest measured bottleneck, with its measured times. If a
    stage raises, returns the plan with unchanged costs and a note in their origin; the first step will raise too.

    Args:
        compiled: the model with its first plan.
        call: the call to rehearse.
        rows: its microbatches.
        it: the settings of the rehearsal.
        replan: plans the same model from other costs.
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
            return _noted(compiled, "confirmed by a rehearsal")
        costed = corrected(compiled.planned.costed, compiled.plan, times, "a rehearsal")
        tried.append(compiled.recosted(costed))
        try:
            compiled = replan(costed)
        except PlanError:  # a search with other costs may fail
            break
        if replace(compiled.plan, quality=None) == tried[-1].plan:
            return replace(compiled, stages=tried[-1].stages)  # what torch.compile has compiled of them
    return min(tried, key=lambda each: each.plan.pace([cost.seconds for cost in each.planned.run_costs]))


def _noted(compiled: Compiled, what: str) -> Compiled:
    """The same with a note added to the origin of its costs."""
    costed = compiled.planned.costed
    noted = replace(costed, corrections=(*costed.corrections, what))
    return replace(compiled, planned=replace(compiled.planned, costed=noted))


def _tells(compiled: Compiled) -> bool:
    costs = compiled.planned.stage_costs
    return (
        len(costs) > 1
        and not all_short(costs)
        and torch.is_grad_enabled()
        and any(output.requires_grad for output in compiled.captured.results)
    )


def _microbatches(batch: Batch, starts: Sequence[str]) -> dict[int, Microbatch]:
    """All microbatches of the batch, with rng seeds of their own; backwards start from gradients of one."""
    parts = microbatches_of(batch, range(len(batch.rows)))
    for part in parts:
        part.seeds = dict.fromkeys(starts, 1.0)
    return dict(enumerate(parts))
