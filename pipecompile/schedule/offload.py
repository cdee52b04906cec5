"""Adds Offloads and Fetches to a bare program, for the stages that its plan offloads.

    rank 0   F0 H0 F1 H1 F2 H2 F3 G0 B0 F4 ...        H0 copies during F1, and its memory is free from F2 on
                                                      G0 copies back during the computation before B0

An Offload stands after its Forward, so that what is copied first is what waits longest. A Fetch stands directly before
its Backward where the rank has a bubble there, and otherwise before the computation before it, with which the copy
overlaps. A microbatch with fewer than three computations in between stays, because it would leave and come back at
once. Where bubbles are follows from the order, with Backwards of twice the time of Forwards.

Source: torchtune's activation offloading also keeps a tensor for as long as it takes to copy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Backward, BackwardWeight, Fetch, Forward, Instruction, Offload
from pipecompile.ir.program import Program
from pipecompile.schedule.simulator import simulate

BETWEEN = 3  # computations between a Forward and its Backward: one to leave, one away, one to come back
Cell = tuple[int, int]  # stage, microbatch


def with_offloads(program: Program) -> Program:
    """The program with an Offload and a Fetch for each microbatch of an offloaded stage that has time for them.

    A program of Forwards alone offloads all of them, and one of Backwards fetches what it carries.
    """
    stages = set(program.plan.offloaded)
    if not stages or any(isinstance(i, Offload | Fetch) for i in program.instructions):
        return program
    carried = {Offload(i.stage, i.microbatch) for i in program.carried if isinstance(i, Forward) and i.stage in stages}
    in_bubbles = _in_bubbles(program)
    rows = tuple(_row(row, stages, in_bubbles) for row in program.ranks)
    found = replace(program, ranks=rows, carried=program.carried | carried)
    found.validate()
    return found


def _in_bubbles(program: Program) -> set[Backward]:
    """The Backwards before which their ranks are idle for as long as a Forward takes."""
    timeline = simulate(program, [Cost(1.0, 2.0)] * program.plan.num_stages)
    found, end = set[Backward](), [0.0] * len(program.ranks)
    for span in timeline.spans:
        if isinstance(span.instruction, Backward) and span.start - end[span.rank] >= 1.0:
            found.add(span.instruction)
        end[span.rank] = span.end
    return found


def _row(row: Sequence[Instruction], stages: set[int], in_bubbles: set[Backward]) -> tuple[Instruction, ...]:
    computations = [i for i in row if isinstance(i, Forward | Backward | BackwardWeight)]
    place = {i: index for index, i in enumerate(computations)}
    leaving: dict[Instruction, Offload] = {}  # after a Forward
    fetched: dict[Instruction, list[Fetch]] = {}  # before a computation
    for i in computations:
        if i.stage not in stages or isinstance(i, BackwardWeight):
            continue
        forward, backward = Forward(i.stage, i.microbatch), Backward(i.stage, i.microbatch)
        is_whole = forward in place and backward in place
        if is_whole and place[backward] - place[forward] <= BETWEEN:
            continue
        if isinstance(i, Forward):
            leaving[i] = Offload(i.stage, i.microbatch)
        else:
            before = i if i in in_bubbles else computations[max(0, place[i] - 1)]
            fetched.setdefault(before, []).append(Fetch(i.stage, i.microbatch))
    found: list[Instruction] = []
    for each in row:
        found += [*fetched.get(each, ()), each, *([leaving[each]] if each in leaving else [])]
    return tuple(found)
