"""Runs the stages of a plan before the first step, on their own devices and by their own threads, and times them.

A profile times each operation alone: that gives each its share of a stage, and the stage's seconds but roughly, since
stages share caches, memory and Python's lock with one another. A rehearsal is a step with fewer microbatches, on the
sample and under the schedule of the step to come, so it holds no more memory at once.

It leaves no mark: gradients gather in leaves that are thrown away, buffers that a step writes are written as copies,
random functions draw from seeds of their own. What else a part kept whole may do, to the model's attributes and to
the generators, is undone by those who call (``compile_call``, ``Pipeline``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from pipecompile.calibrate import Times
from pipecompile.compiled import Compiled
from pipecompile.plan import Plan, stage_costs
from pipecompile.program import Program
from pipecompile.runtime import Microbatch, Weights
from pipecompile.session import Session
from pipecompile.steps import Batch, microbatches_of
from pipecompile.timeline import Timeline

PASSES = (2, 8)  # timed, at least and at most, after one to warm up
ENOUGH = 0.5  # seconds: passes are not repeated further once they have taken so long
WORTH = 5e-3  # seconds of a stage from which it is rehearsed: Python's lock passes from thread to thread so late


def rehearse(
    batch: Batch, starts: Sequence[str], schedule: Callable[[Plan, int], Program], devices: Sequence[torch.device]
) -> tuple[Times, ...]:
    """For each stage its times; none where a rehearsal tells nothing.

    That is with a single stage, where no backward will run, on CUDA (see ``Compiled.times``), and where each stage
    takes less than ``WORTH``.

    Args:
        batch: the sample; its first microbatches are run, two for each stage and one more, if there are so many.
        starts: the values that backwards start from, by name.
        schedule: a synchronous one.

    Raises:
        ExecutionError: a stage raised, as it would in a step.
    """
    compiled = batch.compiled
    if not _tells(compiled):
        return ()
    program = compiled.lowered(schedule(compiled.plan, min(len(batch.rows), 2 * compiled.plan.num_stages + 1)))
    with closing(Session(devices, None)) as session:
        session.weights = [Weights(_tensors(compiled, stage.index), stage.device) for stage in compiled.stages]

        def run() -> Timeline:
            for weights in session.weights:
                weights.begin(weights.tensors)
            session.run(compiled, program, _microbatches(batch, starts))
            assert session.timeline is not None
            return session.timeline

        run()
        timed: list[Timeline] = []
        least, most = PASSES
        while len(timed) < least or (len(timed) < most and sum(each.makespan for each in timed) < ENOUGH):
            timed.append(run())
    return compiled.times(Timeline(tuple(span for each in timed for span in each.spans), len(devices)))


def _tells(compiled: Compiled) -> bool:
    costs = stage_costs(compiled.costed, compiled.plan)
    return (
        len(costs) > 1
        and max(cost.seconds for cost in costs) >= WORTH
        and all(stage.device.type == "cpu" for stage in compiled.stages)
        and torch.is_grad_enabled()
        and any(output.requires_grad for output in compiled.captured.outputs)
    )


def _tensors(compiled: Compiled, stage: int) -> dict[str, Tensor]:
    """What a stage reads, by name: what a step reads, and copies of what it writes."""
    module, written = compiled.stages[stage].module, set(map(id, compiled.written))
    named = [*module.named_parameters(), *module.named_buffers()]
    copies = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in named if id(t) in written}
    return {**compiled.tensors(stage), **copies}


def _microbatches(batch: Batch, starts: Sequence[str]) -> dict[int, Microbatch]:
    """All parts of the sample, with seeds of their own; gradients of one come into what the backwards start from."""
    parts = microbatches_of(batch, range(len(batch.rows)))
    for part in parts:
        part.seeds = dict.fromkeys(starts, 1.0)
    return dict(enumerate(parts))
