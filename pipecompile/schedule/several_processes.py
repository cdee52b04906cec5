"""What a bare program needs if its ranks are in several processes."""

from __future__ import annotations

from dataclasses import replace

from pipecompile.ir.instruction import Forward, Instruction, Refresh, Share
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


def shared(program: Program, ranks: int) -> Program:
    """The program with Shares: what stages give to the caller comes to all ranks.

    A rank shares the outputs of all its stages at once, directly after the last Forward that makes one, beside the
    backwards. Others take them at the ends of their rows, since nothing in the program needs them. A program without
    Forwards makes no outputs.

    Args:
        ranks: in all, those without a stage too.
    """
    plan, last = program.plan, max(program.microbatches, default=None)
    if last is None or ranks == 1:
        return program
    rows: list[list[Instruction]] = [list(row) for row in program.ranks]
    rows += [[] for _ in range(ranks - len(rows))]
    for maker in range(plan.num_ranks):
        if not (stages := plan.makers(maker)):
            continue
        for rank, row in enumerate(rows):
            share = Share(max(stages), last, rank, ranks)
            if rank == maker:
                places = [p for p, i in enumerate(row) if isinstance(i, Forward) and i.stage in stages]
                row.insert(1 + max(places), share)
            else:
                row.append(share)
    return replace(program, ranks=tuple(map(tuple, rows)))
