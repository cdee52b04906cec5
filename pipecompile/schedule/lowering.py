"""Inserts transfers into a bare program, in one global order.

For a result that a stage on another rank reads, a Send is inserted after the computation that makes it, and a Recv on
the reader's rank. Both are placed at the simulated time when the result is ready:

    0: 0F0 0F1 0B0 0B1             0: 0F0 0F0>1 0F1 0F1>1 0<1B0 0B0 0<1B1 0B1
    1: 1F0 1B0 1F1 1B1    becomes  1: 1<0F0 1F0 1<0F1 1B0 1B0>0 1F1 1B1 1B1>0

A Recv directly before its reader could deadlock: with one in-order queue of transfers per rank, as NCCL has for a pair
of ranks, rank A may wait in a Send for rank B, which waits in a Send for A. In one global order, which all ranks share,
the first unfinished transfer can always proceed.

Both halves of a transfer are in the program that makes the result, even if the reader is in a later one: then that
program carries the Recv. No transfer is pending between two programs.

Source: torch's ``_add_send_recv`` and zero-bubble's communication pass also order by simulated time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipecompile.errors import ProgramError
from pipecompile.ir.instruction import BackwardWeight, Fetch, Instruction, Offload, Recv, Send, Step, Update
from pipecompile.ir.program import Program, linearize, rank_of, reads, sends, transfer_to
from pipecompile.ir.timeline import Timeline

Key = tuple[float, int, int]  # seconds, index in the linear order, 0 for a computation and 1 for its transfers


def lower(program: Program, timeline: Timeline) -> Program:
    """The program with a Send and a Recv for every result that is read on another rank.

    Args:
        program: a bare program.
        timeline: of this program, simulated or measured.

    Raises:
        ProgramError: the program already has transfers, or the timeline belongs to another program.
    """
    if program.lowered:
        raise ProgramError("the program is lowered already: it has transfers")
    events = sorted([*_computations(program, timeline), *_transfers(program, timeline)], key=lambda event: event[0])
    rows: list[list[Instruction]] = [[] for _ in program.ranks]
    for _, i in events:
        rows[rank_of(i, program.plan)].append(i)
    lowered = replace(program, ranks=tuple(map(tuple, rows)))
    lowered.validate()
    return lowered


def _computations(program: Program, timeline: Timeline) -> Iterator[tuple[Key, Instruction]]:
    start = {span.instruction: span.start for span in timeline.spans}
    end = {span.instruction: span.end for span in timeline.spans}
    _check(program, start)
    queued = [0.0] * len(program.ranks)  # the end of the last computation, after which a copy is queued
    for place, (rank, i) in enumerate(linearize(program)):
        if isinstance(i, Offload | Fetch):  # it begins later, if another copy is under way
            yield (queued[rank], place, 0), i
        else:
            queued[rank] = end[i]
            yield (start[i], place, 0), i


def _transfers(program: Program, timeline: Timeline) -> Iterator[tuple[Key, Instruction]]:
    end = {span.instruction: span.end for span in timeline.spans}
    for send in _owed(program):
        yield from (((-1.0, 0, 1), send), ((-1.0, 0, 1), Recv(send.result, send.target)))
    for place, (_, i) in enumerate(linearize(program)):
        if isinstance(i, Step | Update | BackwardWeight | Send | Recv | Offload | Fetch):
            continue
        for send in sends(i, program.plan):
            yield from (((end[i], place, 1), send), ((end[i], place, 1), Recv(i, send.target)))


def _owed(program: Program) -> list[Send]:
    """Transfers of carried results that this program reads and no earlier program contains."""
    owed = [
        send
        for i in program.instructions
        if not isinstance(i, Send | Recv | Offload | Fetch)
        for result in reads(i, program.plan)
        if result in program.carried and (send := transfer_to(i, result)) in sends(result, program.plan)
    ]
    missing = (send for send in owed if Recv(send.result, send.target) not in program.carried)
    return sorted(missing, key=lambda send: (send.result.microbatch, send.result.stage, send.target))


def _check(program: Program, start: dict[Instruction, float]) -> None:
    if missing := [i for i in program.instructions if i not in start]:
        raise ProgramError(f"the timeline has no {missing[0]}, so it belongs to another program")
