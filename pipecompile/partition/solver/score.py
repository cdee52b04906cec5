"""Scores a plan from the definition alone.

Nothing here is shared with the solver: the load is added up net by net from the sentence in ``problem``, in plain
Python, so that a mistake in the solver's matrices cannot hide.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.errors import PlanError
from pipecompile.ir.plan_quality import SLACK
from pipecompile.partition.solver.problem import Problem


def stage_loads(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Seconds of each stage, communication included."""
    work = [0.0] * problem.num_stages
    for atom, stage in enumerate(stage_of):
        work[stage] += problem.seconds[atom] / problem.seats[stage].speed
    both = zip(work, stage_transfers(problem, stage_of), strict=True)
    return tuple(max(pair) if problem.overlapped else sum(pair) for pair in both)


def stage_transfers(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Seconds that each stage sends and receives."""
    sent = [0.0] * problem.num_stages
    for net in problem.nets:
        touched = sorted({stage_of[pin] for pin in net.pins})
        if len(touched) > 1:
            for stage in touched:
                seat = problem.seats[stage]
                sent[stage] += net.seconds * (seat.sends if stage == stage_of[net.pins[0]] else seat.receives)
    return tuple(sent)


def stage_bytes(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Bytes that each stage holds at its fullest."""
    sums = [0.0] * problem.num_stages
    for atom, stage in enumerate(stage_of):
        sums[stage] += problem.kept_bytes[atom] + problem.seats[stage].in_flight * problem.saved_bytes[atom]
    return tuple(sums)


def bottleneck(problem: Problem, stage_of: Sequence[int]) -> float:
    """Seconds of the busiest stage."""
    return max(stage_loads(problem, stage_of))


def check(problem: Problem, stage_of: Sequence[int]) -> None:
    """Passes if the assignment is a plan of this problem.

    Raises:
        PlanError: it misses an atom or a seat, flows backward, leaves a seat idle that may not be, moves what is
            pinned, or exceeds a memory.
    """
    if len(stage_of) != len(problem) or not all(0 <= stage < problem.num_stages for stage in stage_of):
        raise PlanError(f"{len(problem)} atoms need a stage below {problem.num_stages}; got {tuple(stage_of)}")
    for low, high in problem.arcs:
        if stage_of[low] > stage_of[high]:
            raise PlanError(f"atom {low} in stage {stage_of[low]} is needed by {high} in stage {stage_of[high]}")
    for stage, seat in enumerate(problem.seats):
        if not seat.may_idle and stage not in stage_of:
            raise PlanError(f"stage {stage} must have an atom; only {sorted(set(stage_of))} have one")
    for atom, stage in problem.pins:
        if stage_of[atom] != stage:
            raise PlanError(f"atom {atom} is pinned to stage {stage}, and not in {stage_of[atom]}")
    for stage, nbytes in enumerate(stage_bytes(problem, stage_of)):
        if nbytes > problem.seats[stage].memory * (1 + SLACK):
            raise PlanError(f"stage {stage} holds {nbytes:.0f} bytes of {problem.seats[stage].memory:.0f}")
