"""PipeDream: 1F1B without a flush. The pipeline stays full across calls, and each stage steps on its own.

    rank 0   F0 F1 .  B0S F2 B1S F3 B2S ...       a Step directly after each Backward; a microbatch is a minibatch of
    rank 1   .  F0 B0S F1 B1S F2 B2S F3 ...       its own. In steady state no rank is idle.

The stream of stage s, with w = depth(s) - 1 Forwards of warm-up, is F_0 ... F_w, then B_0 S_0 F_(w+1) B_1 S_1 ...:
F_k comes directly after B_(k-w-1) and its Step. A call takes the next microbatches a ... b-1 and runs a *segment*: for
each stage, the part of its stream before F_b that has not run yet. So the last w Backwards are left to the next
segment, or to ``drain``, which empties the pipeline. After that the stream starts with a new warm-up.

The weights that a Forward uses follow from the Steps: see ``weight_versions``.

Source: PipeDream (Narayanan et al., SOSP 2019), sections 3.2 and 3.3, without vertical sync.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Backward, Compute, Forward, Instruction, Program, Step, dependencies, reads
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
    _check(plan, microbatches)
    forwards = [Forward(stage, k) for stage in range(plan.num_stages) for k in microbatches]
    pending = [*(i for i in carried if isinstance(i, Forward)), *forwards]
    turn = [microbatches.stop - depth + 1 for depth in plan.depth]  # stage -> the first Backward that comes after F_b
    backwards = _with_steps(i for i in pending if i.microbatch < turn[i.stage])
    return arrange(plan, [*forwards, *backwards], waves(plan, stride=2), carried=carried)


def drain(plan: Plan, carried: Iterable[Instruction]) -> Program:
    """The bare program of the remaining Backwards and Steps, which empties the pipeline."""
    pending = (i for i in carried if isinstance(i, Forward))
    return arrange(plan, _with_steps(pending), waves(plan, stride=2), carried=carried)


def carried_after(program: Program) -> frozenset[Instruction]:
    """The finished instructions that the remaining Backwards depend on, after a bare or lowered program.

    For a transfer this is the Recv, because ``lower`` puts both halves into the program that makes the result.
    """
    plan, done = program.plan, program.carried | set(program.instructions)
    begun = (Backward(i.stage, i.microbatch) for i in done if isinstance(i, Forward))
    needed = (set(dependencies(i, plan)) | set(reads(i, plan)) for i in begun if i not in done)
    return done & frozenset[Instruction]().union(*needed)


def _with_steps(forwards: Iterable[Forward]) -> list[Compute]:
    """A Backward and a Step for each Forward, by stage and microbatch."""
    ordered = sorted(forwards, key=lambda i: (i.stage, i.microbatch))
    return [do(i.stage, i.microbatch) for i in ordered for do in (Backward, Step)]


def _check(plan: Plan, microbatches: range) -> None:
    if not microbatches or microbatches.step != 1 or microbatches.start < 0:
        raise InputError(f"a segment must have one or more consecutive microbatches; got {microbatches}")
    for group in plan.replicas:
        if len(group) > 1:
            raise PlanError(
                f"stages {', '.join(map(str, group))} are replicas, whose gradients are summed once per batch, but "
                f"PipeDream updates weights after each microbatch; use schedule='1f1b' or 'gpipe', or no replicas"
            )
    for tied in plan.tied:
        stages = ", ".join(map(str, tied.stages))
        raise PlanError(
            f"parameter {tied.parameter} is tied across stages {stages}, and PipeDream would update its copies at "
            f"different times, so that they differ; use schedule='1f1b' or 'gpipe', or colocate= with the modules that "
            f"read it, which puts all that lies between them into the same stage"
        )
