"""PipeDream: 1F1B without a flush. The pipeline stays full across calls, and each stage steps on its own.

    rank 0   F0 F1 .  B0S F2 B1S F3 B2S ...       a Step directly after each Backward; a microbatch is a minibatch of
    rank 1   .  F0 B0S F1 B1S F2 B2S F3 ...       its own. In steady state no rank is idle.

The stream of stage s, with w = depth(s) - 1 Forwards of warm-up, is F_0 ... F_w, then B_0 S_0 F_(w+1) B_1 S_1 ...:
F_k comes directly after B_(k-w-1) and its Step. A call takes the next microbatches a ... b-1 and runs a *segment*: for
each stage, the part of its stream before F_b that has not run yet. So the last w Backwards are left to the next
segment, or to ``drain``, which empties the pipeline. After that the stream starts with a new warm-up.

With *vertical sync*, a microbatch uses the same version in all stages: that of the first one, which lags most. There
each Step is directly after its Backward. A later stage has its gradients earlier. It makes the new weights at once (an
Update), and its Step stands where Forwards of the first stage begin to use them:

    rank 0   F0 F1 .  B0S0    F2      B1S1    F3      B2S2 ...      F2 uses version 1 on both ranks
    rank 1   .  F0 B0U0 F1 S0 B1U1 F2 S1 B2U2 F3 ...

The weights that a Forward uses follow from the Steps: see ``weight_versions``.

Source: PipeDream (Narayanan et al., SOSP 2019), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.instruction import Backward, Compute, Forward, Instruction, Step, Update
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, dependencies, reads
from pipecompile.schedule.arrange import arrange, waves


def pipedream(plan: Plan, microbatches: range, carried: Iterable[Instruction] = ()) -> Program:
    """The bare segment of the stream that ``microbatches`` enter.

    Args:
        plan: the stages.
        microbatches: the microbatches after those of earlier segments.
        carried: ``carried_after`` of the previous segment; empty at the start and after a ``drain``.

    Raises:
        InputError: the range is empty, or has gaps.
        PlanError: stages share a tied parameter, or have replicas.
    """
    check_segment(plan, microbatches, "PipeDream")
    forwards = entering(plan, microbatches)
    turn = [microbatches.stop - depth + 1 for depth in plan.depth]  # stage -> the first Backward that comes after F_b
    due = (i for i in [*pending(carried), *forwards] if i.microbatch < turn[i.stage])
    return arrange(plan, [*forwards, *_each(due, Step)], waves(plan, stride=2), carried=carried)


def vertical_sync(plan: Plan, microbatches: range, carried: Iterable[Instruction] = ()) -> Program:
    """The bare segment of the stream with vertical sync that ``microbatches`` enter; arguments as for ``pipedream``."""
    check_segment(plan, microbatches, "PipeDream with vertical sync")
    late = [max(plan.depth) - depth for depth in plan.depth]  # stage -> microbatches from an Update to its Step
    forwards = entering(plan, microbatches)
    due = [
        i for i in [*pending(carried), *forwards] if i.microbatch <= microbatches.stop - plan.depth[i.stage]
    ]  # for their Backwards
    made = [i for i in carried if isinstance(i, Update)] + [Update(i.stage, i.microbatch) for i in due if late[i.stage]]
    steps = [Step(i.stage, i.microbatch) for i in made if i.microbatch <= microbatches.stop - max(plan.depth)]
    first = [i for i in due if not late[i.stage]]
    later = [i for i in due if late[i.stage]]
    clock = waves(plan, stride=2)

    def tick(i: Compute) -> float:
        waits = late[i.stage] if isinstance(i, Step) else 0
        return clock(Backward(i.stage, i.microbatch + waits) if waits else i)

    # a late Step before the Update of the same tick, so that no more versions wait than are used
    return arrange(plan, [*forwards, *steps, *_each(later, Update), *_each(first, Step)], tick, carried=carried)


def drain(plan: Plan, carried: Iterable[Instruction]) -> Program:
    """The bare program of the remaining Backwards and Steps, which empties the pipeline."""
    clock, waiting = waves(plan, stride=2), waiting_steps(carried)
    steps = frozenset(waiting)

    def tick(i: Compute) -> float:
        return -inf if i in steps else clock(i)

    return arrange(plan, [*waiting, *_each(pending(carried), Step)], tick, carried=carried)


def carried_after(program: Program) -> frozenset[Instruction]:
    """The finished instructions that the remaining Backwards and Steps depend on, after a bare or lowered program.

    For a transfer this is the Recv, because ``lower`` puts both halves into the program that makes the result.
    """
    plan, done = program.plan, program.carried | set(program.instructions)
    waiting = {i for i in done if isinstance(i, Update) and Step(i.stage, i.microbatch) not in done}
    begun = [Backward(i.stage, i.microbatch) for i in done if isinstance(i, Forward)]
    left: list[Compute] = [*(i for i in begun if i not in done), *(Step(i.stage, i.microbatch) for i in waiting)]
    needed = (set(dependencies(i, plan)) | set(reads(i, plan)) for i in left)
    return (done & frozenset[Instruction]().union(*needed)) | waiting


def entering(plan: Plan, microbatches: range) -> list[Forward]:
    """The Forwards of a segment."""
    return [Forward(stage, k) for stage in range(plan.num_stages) for k in microbatches]


def pending(carried: Iterable[Instruction]) -> list[Forward]:
    """The Forwards of earlier segments whose Backwards have not run."""
    done = frozenset(carried)
    return [i for i in done if isinstance(i, Forward) and Backward(i.stage, i.microbatch) not in done]


def waiting_steps(carried: Iterable[Instruction]) -> list[Step]:
    """The Steps whose weights have been made by earlier segments, oldest first."""
    return [Step(*key) for key in sorted((i.stage, i.microbatch) for i in carried if isinstance(i, Update))]


def check_segment(plan: Plan, microbatches: range, name: str) -> None:
    """Raises an error if stages cannot step on their own, or microbatches do not follow one another."""
    if not microbatches or microbatches.step != 1 or microbatches.start < 0:
        raise InputError(f"a segment must have one or more consecutive microbatches; got {microbatches}")
    for group in plan.replicas:
        if len(group) > 1:
            raise PlanError(
                f"stages {', '.join(map(str, group))} are replicas, whose gradients are summed once per batch, but "
                f"{name} updates each stage on its own; use schedule='1f1b' or 'gpipe', or no replicas"
            )
    for tied in (each for each in plan.tied if each.is_trained):
        stages = ", ".join(map(str, tied.stages))
        raise PlanError(
            f"parameter {tied.parameter} is tied across stages {stages}, and {name} would update its copies at "
            f"different times, so that they differ; use schedule='1f1b' or 'gpipe', or colocate= with the modules that "
            f"read it, which puts all that lies between them into the same stage"
        )


def _each(forwards: Iterable[Forward], then: type[Step] | type[Update]) -> list[Compute]:
    """A Backward and an update for each Forward, by stage and microbatch."""
    ordered = sorted(forwards, key=lambda i: (i.stage, i.microbatch))
    return [do(i.stage, i.microbatch) for i in ordered for do in (Backward, then)]
