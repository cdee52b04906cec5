"""Checks of a program's rows: gradients complete, weights used in order, activations back in time, outputs shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from pipecompile.errors import ProgramError
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Reduce,
    Share,
    Step,
    Update,
)
from pipecompile.ir.plan import Plan


def check_complete(row: Sequence[Instruction]) -> None:
    """Raises ``ProgramError`` if gradients are read before they are complete."""
    read: dict[int, Reduce | Step | Update] = {}
    for i in row:
        if isinstance(i, Reduce | Step | Update):
            read[i.stage] = i
        elif not isinstance(i, Backward | BackwardWeight):
            continue
        elif (after := read.get(i.stage)) and i.microbatch <= after.microbatch:
            raise ProgramError(f"{i} is after {after}, which reads its gradients; put it before")


def check_updates(instructions: Iterable[Instruction], carried: Set[Instruction]) -> None:
    """Raises ``ProgramError`` if a stage would use the versions of its weights out of order."""
    waiting: dict[int, list[int]] = {}  # by stage, the microbatches of Updates before their Steps, oldest first
    for stage, microbatch in sorted((i.stage, i.microbatch) for i in carried if isinstance(i, Update)):
        waiting.setdefault(stage, []).append(microbatch)
    done: set[Step] = set()
    for i in instructions:
        if isinstance(i, Update):
            if (step := Step(i.stage, i.microbatch)) in done:
                raise ProgramError(f"{i} is after {step}, which has made the weights by then; put it before")
            waiting.setdefault(i.stage, []).append(i.microbatch)
        elif isinstance(i, Step):
            done.add(i)
            made = waiting.get(i.stage)
            if made and (first := made.pop(0)) != i.microbatch:
                older = f"{Step(i.stage, first)}, whose weights {Update(i.stage, first)} has made"
                raise ProgramError(f"{i} is before {older}; put {Step(i.stage, first)} first")


def check_offloads(
    row: Sequence[Instruction], carried: Set[Instruction], ended_before: Mapping[Instruction, Sequence[Offload]]
) -> None:
    """Raises ``ProgramError`` if what a Forward has saved would leave too late, or not be back for its Backward.

    Args:
        row: of one rank.
        carried: instructions of earlier programs.
        ended_before: by instruction, the Offloads that end before it.
    """
    place = {i: index for index, i in enumerate(row)}
    ends = {offload: place[i] for i in row for offload in ended_before.get(i, ())}
    for i in row:
        if not isinstance(i, Offload | Fetch | Backward):
            continue
        forward, backward = Forward(i.stage, i.microbatch), Backward(i.stage, i.microbatch)
        offload, fetch = Offload(i.stage, i.microbatch), Fetch(i.stage, i.microbatch)
        if isinstance(i, Backward):
            is_away = (offload in carried or offload in place) and fetch not in carried
            if is_away and fetch not in place:
                raise ProgramError(f"{i} needs what {offload} has copied to the host; put {fetch} before it")
            continue
        if forward not in carried and place.get(forward, len(row)) > place[i]:
            raise ProgramError(f"{i} is not after {forward}, which saves what it copies; put it after")
        if backward in carried or place.get(backward, len(row)) < place[i]:
            raise ProgramError(f"{i} is after {backward}, which has used what it copies; put it before")
        if isinstance(i, Fetch) and offload not in carried:
            if place.get(offload, len(row)) > place[i]:
                raise ProgramError(f"{i} is not after {offload}, whose copy it fetches; put {offload} before it")
            if ends.get(offload, len(row)) > place[i]:
                raise ProgramError(
                    f"{i} is too near to {offload}, whose copy goes on during the next computation; put a "
                    f"computation between them, or leave both out"
                )


def check_shares(rows: Sequence[Sequence[Instruction]], plan: Plan) -> None:
    """Raises ``ProgramError`` if outputs would be shared before they are made, or not with all ranks."""
    reached: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        for place, i in enumerate(row):
            if not isinstance(i, Share):
                continue
            if i.ranks != len(rows) or not 0 <= i.rank < i.ranks:
                raise ProgramError(f"{i} is of {i.ranks} ranks, but the program has {len(rows)} rows")
            reached.setdefault((i.stage, i.microbatch), set()).add(i.rank)
            if i.rank == plan.rank_of[i.stage]:
                mine = {i.stage, *plan.makers(i.rank)}
                later = (other for other in row[place:] if isinstance(other, Forward) and other.stage in mine)
                if after := next((other for other in later if other.microbatch <= i.microbatch), None):
                    raise ProgramError(f"{i} is before {after}, whose outputs it shares; put it after")
    for (stage, microbatch), ranks in reached.items():
        if missing := sorted(set(range(len(rows))) - ranks):
            lacking = Share(stage, microbatch, missing[0], len(rows))
            raise ProgramError(f"the outputs of stage {stage} are shared, but not with all ranks; add {lacking}")
