"""The predicted bytes of each rank over a timeline: what ``planning.memory`` takes the peaks of.

Each computation is a level: what its rank holds at most while it runs. What it holds until its next computation follows
as another level. A synchronous program ends before the optimizer steps. That step comes last, ``STEP_SHARE`` of the
makespan long, because its seconds are not predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.instruction import Backward, BackwardWeight, Fetch, Forward, Step, Update
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.planning.memory import StageState, at_the_end, stage_states
from pipecompile.planning.training_spec import Workload
from pipecompile.render.cells import start_of
from pipecompile.render.page import Level

STEP_SHARE = 0.04


def memory_levels(
    costed: CostedGraph,
    plan: Plan,
    program: Program,
    timeline: Timeline,
    work: Workload,
    cluster: Cluster,
    buffers: Sequence[int] = (),
) -> tuple[tuple[Level, ...], ...]:
    """The levels of each rank in training, whose peaks are those of ``work.memory``; empty without a Backward.

    Args:
        costed: the model with its costs.
        plan: the stages.
        program: bare or lowered.
        timeline: of the whole program.
        work: optimizer state, its temporary memory, and the tail.
        cluster: the devices.
        buffers: bytes of buffers of each stage.
    """
    if not any(isinstance(i, Backward) for i in program.instructions):
        return ()
    step = work.step_on(cluster)
    states = stage_states(costed, plan, program, work.state, buffers, work.tail, step, timeline)
    return tuple(tuple(_levels(program, rank, timeline, states)) for rank in range(len(program.ranks)))


def _levels(program: Program, rank: int, timeline: Timeline, states: Sequence[StageState]) -> Iterator[Level]:
    zero, times = start_of(timeline), {span.instruction: span for span in timeline.spans}
    mine = [state for state, of in zip(states, program.plan.rank_of, strict=True) if of == rank]
    at, makespan = 0.0, timeline.makespan
    for i in program.ranks[rank]:
        if isinstance(i, Fetch):  # its memory is taken when it is queued, as the last computation ends
            states[i.stage].do(i)
        if not isinstance(i, Forward | Backward | BackwardWeight | Step | Update):
            continue
        span, state = times[i], states[i.stage]
        others = sum(each.total for each in mine if each is not state)
        if span.start - zero > at:
            yield Level(at, span.start - zero, others + state.total, "between computations")
        state.do(i)
        others = sum(each.now.total for each in mine if each is not state)  # without what has left before
        at = span.end - zero
        yield Level(span.start - zero, at, others + state.latest, f"during {i}")
    if at < makespan:
        yield Level(at, makespan, sum(each.total for each in mine), "between computations")
    last = at_the_end(mine)
    yield Level(makespan, (1 + STEP_SHARE) * makespan, last, "outputs joined; optimizer step, if it is still to come")
