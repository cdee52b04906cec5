"""Writes the transfers into a bare program, in one global order.

A result that a stage on another rank reads becomes a Send after the computation that makes it and a Recv on the
reader's rank. Both stand where the simulated clock stands when the result is ready:

    0: 0F0 0F1 0B0 0B1             0: 0F0 0F0>1 0F1 0F1>1 0<1B0 0B0 0<1B1 0B1
    1: 1F0 1B0 1F1 1B1    becomes  1: 1<0F0 1F0 1<0F1 1B0 1B0>0 1F1 1B1 1B1>0

Why not each Recv right before its reader: with one in-order queue of transfers a rank, as NCCL has for a pair of
ranks, rank A may then wait in a Send for rank B, which waits in a Send for A. In one global order, seen by all ranks
alike, the first transfer that is not done yet can always go on.

A transfer stands whole, both halves, in the program that makes the result, also when the reader belongs to a later
one: then the Recv is what that program carries. Nothing is on the way between two programs.

Source: torch's ``_add_send_recv`` and zero-bubble's communication pass order by simulated time too.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipecompile.errors import ProgramError
from pipecompile.ir.program import (
    Backward,
    Forward,
    Instruction,
    Program,
    Recv,
    Reduce,
    Send,
    Step,
    linearize,
    reads,
    sends,
)
from pipecompile.ir.timeline import Timeline

Key = tuple[float, int, int]  # seconds, place in the linear order, 0 for a computation and 1 for its transfers


def lower(program: Program, timeline: Timeline) -> Program:
    """The program with a Send and a Recv for every result that is read on another rank.

    Args:
        timeline: of this bare program, simulated or measured.

    Raises:
        ProgramError: the program has transfers already, or the timeline is of another program.
    """
    if program.lowered:
        raise ProgramError("the program has its transfers already")
    events = sorted([*_computations(program, timeline), *_transfers(program, timeline)], key=lambda event: event[0])
    rows: list[list[Instruction]] = [[] for _ in program.ranks]
    for _, i in events:
        rows[program.plan.rank_of[i.stage]].append(i)
    lowered = Program(program.plan, tuple(map(tuple, rows)), program.carried)
    lowered.validate()
    return lowered


def _computations(program: Program, timeline: Timeline) -> Iterator[tuple[Key, Instruction]]:
    start = {span.instruction: span.start for span in timeline.spans}
    _check(program, start)
    for place, (_, i) in enumerate(linearize(program)):
        yield (start[i], place, 0), i


def _transfers(program: Program, timeline: Timeline) -> Iterator[tuple[Key, Instruction]]:
    end = {span.instruction: span.end for span in timeline.spans}
    for send in _owed(program):
        yield from (((-1.0, 0, 1), send), ((-1.0, 0, 1), Recv(send.result, send.target)))
    for place, (_, i) in enumerate(linearize(program)):
        if not isinstance(i, Forward | Backward | Reduce):
            continue
        for send in sends(i, program.plan):
            yield from (((end[i], place, 1), send), ((end[i], place, 1), Recv(i, send.target)))


def _owed(program: Program) -> list[Send]:
    """Transfers of carried results that no earlier program has written and a computation of this one waits for."""
    owed = [
        send
        for i in program.instructions
        if isinstance(i, Forward | Backward | Reduce | Step)
        for result in reads(i, program.plan)
        if result in program.carried and (send := Send(result, i.stage)) in sends(result, program.plan)
    ]
    missing = (send for send in owed if Recv(send.result, send.target) not in program.carried)
    return sorted(missing, key=lambda send: (send.result.microbatch, send.result.stage, send.target))


def _check(program: Program, start: dict[Instruction, float]) -> None:
    if missing := [i for i in program.instructions if i not in start]:
        raise ProgramError(f"the timeline has no {missing[0]}: it is of another program")
