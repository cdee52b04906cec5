"""Checks that a program is one of a whole step, which begins and ends with an empty pipeline.

A ``Program`` may be any part of a step: a segment of a pipeline that is never drained, or forwards whose backwards
follow later. So its invariants do not say that nothing is left out. Where a step runs, nothing may be: no rank waits
for a Backward of the first stage that is missing, and a gradient would be lost.
"""

from __future__ import annotations

from collections.abc import Collection

from pipecompile.errors import ProgramError
from pipecompile.ir.instruction import Backward, BackwardWeight, Compute, Fetch, Forward, Offload, Reduce
from pipecompile.ir.program import Program, is_tied


def check_step(program: Program, num_microbatches: int, kinds: Collection[type[Forward | Backward]]) -> None:
    """Raises ``ProgramError`` if a bare program is not valid, or not one of a whole step.

    Args:
        num_microbatches: of the step.
        kinds: what it runs of each microbatch; one of the two where the caller computes the loss in between.
    """
    program.validate()
    plan, present = program.plan, frozenset(program.instructions)
    wanted: dict[Compute, None] = {
        kind(stage, k): None
        for kind in kinds
        for stage in range(plan.num_stages)
        for k in range(num_microbatches)
        if plan.runs(stage, k)
    }
    if Backward in kinds:
        tied = (stage for stage in range(plan.num_stages) if is_tied(stage, plan, trained=True))
        wanted |= {Reduce(stage, num_microbatches - 1): None for stage in tied}
    if missing := next((i for i in wanted if i not in present), None):
        raise ProgramError(
            f"{missing} is missing: a step runs each of its {num_microbatches} microbatches through all stages, and "
            f"reduces the gradients of tied parameters; put it on rank {plan.rank_of[missing.stage]}"
        )
    for i in program.instructions:
        if isinstance(i, BackwardWeight) and Forward not in kinds:
            raise ProgramError(
                f"{i} needs what its Forward notes if it is to be split, but all Forwards have run before the caller "
                f"computes the loss; leave it out, so that the Backward computes all"
            )
        if not isinstance(i, BackwardWeight | Offload | Fetch) and i not in wanted:
            raise ProgramError(
                f"{i} has no place in a step of {num_microbatches} microbatches, from 0, whose optimizer is the "
                f"caller's; leave it out"
            )
