"""What a bare program needs if its ranks are in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipecompile.errors import ProgramError
from pipecompile.ir.program import Instruction, Program, Recv, Refresh, Send, is_tied


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
    return Program(plan, tuple(rows), program.carried)


def renumbered(program: Program, numbers: Sequence[int]) -> Program:
    """The program with other numbers of microbatches: ``numbers[k]`` in place of k.

    Raises:
        ProgramError: the program has transfers already, whose order does not depend on numbers.
    """

    def other(i: Instruction) -> Instruction:
        if isinstance(i, Send | Recv):
            return replace(i, result=replace(i.result, microbatch=numbers[i.result.microbatch]))
        return replace(i, microbatch=numbers[i.microbatch])

    if program.lowered:
        raise ProgramError("a program with transfers cannot be renumbered; renumber it before it is lowered")
    return Program(
        program.plan, tuple(tuple(map(other, row)) for row in program.ranks), frozenset(map(other, program.carried))
    )
