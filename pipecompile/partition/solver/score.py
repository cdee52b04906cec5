"""Scores a plan directly from the definition.

This shares no code with the solver: the load is summed net by net from the definition in ``problem``, in plain Python,
so that a mistake in the solver's matrices shows up.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.errors import PlanError
from pipecompile.ir.plan_quality import SLACK
from pipecompile.partition.solver.problem import Problem


def stage_loads(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Load of each stage in seconds, communication included."""
    work = [0.0] * problem.num_stages
    for atom, stage in enumerate(stage_of):
        work[stage] += problem.seconds[atom] / problem.seats[stage].speed
    both = zip(work, stage_transfers(problem, stage_of), strict=True)
    return tuple(max(pair) if problem.overlapped else sum(pair) for pair in both)


def stage_transfers(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Seconds that each stage sends and receives."""
    sent = [0.0] * problem.num_stages
    for net in problem.nets:
        touched = sorted({stage_of[end] for end in net.ends})
        if len(touched) > 1:
            for stage in touched:
                seat = problem.seats[stage]
                sent[stage] += net.seconds * (seat.sends if stage == stage_of[net.ends[0]] else seat.receives)
    return tuple(sent)


def stage_bytes(problem: Problem, stage_of: Sequence[int]) -> tuple[float, ...]:
    """Peak bytes of each stage."""
    sums = [0.0] * problem.num_stages
    for atom, stage in enumerate(stage_of):
        sums[stage] += problem.kept_bytes[atom] + problem.seats[stage].in_flight * problem.saved_bytes[atom]
    return tuple(sums)


def bottleneck(problem: Problem, stage_of: Sequence[int]) -> float:
    """Load of the slowest stage, in seconds."""
    return max(stage_loads(problem, stage_of))


def rank_loads(problem: Problem, stage_of: Sequence[int], rank_of: Sequence[int]) -> tuple[float, ...]:
    """Load of each rank in seconds, where ranks run several stages: what stays on a rank is not sent."""
    work, sent = ([0.0] * (1 + max(rank_of)) for _ in range(2))
    for atom, stage in enumerate(stage_of):
        work[rank_of[stage]] += problem.seconds[atom] / problem.seats[stage].speed
    for net in problem.nets:
        maker = stage_of[net.ends[0]]
        far = {stage_of[end] for end in net.ends if rank_of[stage_of[end]] != rank_of[maker]}
        for stage in far:
            sent[rank_of[stage]] += net.seconds * problem.seats[stage].receives
        if far:
            sent[rank_of[maker]] += net.seconds * problem.seats[maker].sends
    both = zip(work, sent, strict=True)
    return tuple(max(pair) if problem.overlapped else sum(pair) for pair in both)


def rank_bytes(problem: Problem, stage_of: Sequence[int], rank_of: Sequence[int]) -> tuple[float, ...]:
    """Peak bytes of each rank, if its stages peak at the same time."""
    sums = [0.0] * (1 + max(rank_of))
    for rank, nbytes in zip(rank_of, stage_bytes(problem, stage_of), strict=True):
        sums[rank] += nbytes
    return tuple(sums)


def check(problem: Problem, stage_of: Sequence[int]) -> None:
    """Checks that the assignment is a plan of this problem.

    Raises:
        PlanError: an atom has no valid stage, a value flows backward, a required stage is empty, a fixed atom is in
            another stage, or a stage exceeds its memory.
    """
    if len(stage_of) != len(problem) or not all(0 <= stage < problem.num_stages for stage in stage_of):
        raise PlanError(
            f"each of the {len(problem)} atoms needs a stage below {problem.num_stages}; got {tuple(stage_of)}"
        )
    for low, high in problem.arcs:
        if stage_of[low] > stage_of[high]:
            raise PlanError(
                f"a value flows from stage {stage_of[low]} (atom {low}) to stage {stage_of[high]} (atom {high})"
            )
    for stage, seat in enumerate(problem.seats):
        if not seat.may_idle and stage not in stage_of:
            raise PlanError(f"stage {stage} must not be empty; only stages {sorted(set(stage_of))} have atoms")
    for atom, stage in problem.fixed_stages:
        if stage_of[atom] != stage:
            raise PlanError(f"atom {atom} must be in stage {stage}, but is in stage {stage_of[atom]}")
    for stage, nbytes in enumerate(stage_bytes(problem, stage_of)):
        if nbytes > problem.seats[stage].memory * (1 + SLACK):
            raise PlanError(
                f"stage {stage} holds {nbytes:.0f} bytes, but has memory for {problem.seats[stage].memory:.0f}"
            )
