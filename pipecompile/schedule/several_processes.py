"""What a bare program needs if its ranks are in several processes."""

from __future__ import annotations

from dataclasses import replace

from pipecompile.ir.instruction import Refresh
from pipecompile.ir.program import Program, is_tied


def refreshed(program: Program) -> Program:
    """The program with a Refresh of each stage that holds a tied parameter, before all else.

    In one process, the copies of a tied parameter are its memory. A program without Forwards needs no Refresh.
    """
    plan, first = program.plan, min(program.microbatches, default=None)
    if first is None:
        return program
    tied = [stage for stage in range(plan.num_stages) if is_tied(stage, plan)]
    rows = (
        (*(Refresh(stage, first) for stage in tied if plan.rank_of[stage] == rank), *row)
        for rank, row in enumerate(program.ranks)
    )
    return replace(program, ranks=tuple(rows))
