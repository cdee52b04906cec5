"""PipeDream-2BW: the stream of PipeDream, with one update for each batch of microbatches, and two versions of weights.

    W^(t+1) = Opt( W^t , gradient of L( W^max(0, t-1) ; batch t ) )      in every stage

The microbatches of batch t use the weights that the update of batch t-2 has made. A stage updates directly after the
last Backward of a batch (an Update); its Step stands before the first Forward of the batch after the next. With two
stages and batches of two microbatches:

    rank 0   F0 F1 .  B0 F2 B1 U1 F3 S1 B2 F4 B3 U3 F5 S3 ...          F2 and F3 use version 0, F4 and F5 version 1
    rank 1   .  F0 B0 F1 B1 U1 F2 B2 F3 B3 S1 U3 F4 ...

A call is a batch, and its segment ends before the first Forward of the next. That Forward needs the update of the batch
before, so all Backwards of that batch are in the segment. If a batch has fewer microbatches than the depth less one,
some of them come later than in PipeDream's stream, and ranks wait.

Source: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (ICML 2021), section 3.1. There a batch must
have at least as many microbatches as there are stages.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipecompile.ir.instruction import Backward, Compute, Instruction, Step, Update
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, waves
from pipecompile.schedule.pipedream import check_segment, entering, pending, waiting_steps


def pipedream_2bw(plan: Plan, microbatches: range, carried: Iterable[Instruction] = ()) -> Program:
    """The bare segment of the stream that the batch of these ``microbatches`` enters.

    Args:
        plan: the stages.
        microbatches: the microbatches after those of earlier segments.
        carried: ``carried_after`` of the previous segment; empty at the start and after a drain.

    Raises:
        InputError: the range is empty, or has gaps.
        PlanError: stages share a tied parameter, or have replicas.
    """
    check_segment(plan, microbatches, "PipeDream-2BW")
    carried = frozenset(carried)
    first, stop = microbatches.start, microbatches.stop
    forwards = entering(plan, microbatches)
    turn = [max(stop - depth + 1, first) for depth in plan.depth]  # stage -> the first Backward of the next segment
    due = [i for i in [*pending(carried), *forwards] if i.microbatch < turn[i.stage]]
    backwards: list[Compute] = []
    for i in sorted(due, key=lambda i: (i.stage, i.microbatch)):
        backwards.append(Backward(i.stage, i.microbatch))
        if i.microbatch == first - 1:
            backwards.append(Update(i.stage, i.microbatch))
    last: list[Compute] = [Step(stage, first - 1) for stage in range(plan.num_stages) if carried]
    last += [Update(stage, stop - 1) for stage in range(plan.num_stages) if turn[stage] == stop]
    return arrange(plan, [*forwards, *backwards], waves(plan, stride=2), last, carried)


def drain_batch(plan: Plan, carried: Iterable[Instruction]) -> Program:
    """The bare program of the remaining Backwards, Updates and Steps, which empties the pipeline."""
    forwards = pending(carried)
    backwards = [Backward(i.stage, i.microbatch) for i in sorted(forwards, key=lambda i: (i.stage, i.microbatch))]
    ends = {i.stage: i.microbatch for i in backwards}
    last = [*waiting_steps(carried), *(Step(stage, microbatch) for stage, microbatch in ends.items())]
    return arrange(plan, backwards, waves(plan, stride=2), last, carried)
