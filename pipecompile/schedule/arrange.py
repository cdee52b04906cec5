"""From ticks to a program: every schedule here is a clock.

    D          depth of the whole plan: stages on its longest path
    d(s)       depth of stage s: stages on the longest path from s to a sink, s included; more with replicas
    k          microbatch

A schedule is told completely by the tick at which each computation would run if each took one tick:

    Forward(s, k)    stride * k + D - d(s)                  the wave of microbatch k goes down the stages ...
    Backward(s, k)   stride * k + D + d(s) - 1 + hold       ... turns round in the sink, and comes up again

    sequential   stride 2D, hold 0       GPipe   stride 1, hold n - 1       1F1B, PipeDream   stride 2, hold 0

    rank 0   F0 .  F1 .  F2 B0 F3 B1          1F1B with three stages: even ticks are for one direction, odd ticks for
    rank 1   .  F0 .  F1 B0 F2 B1 F3          the other. A rank does its computations in the order of their ticks and
    rank 2   .  .  F0 B0 F1 B1 F2 B2          without waiting for them: in the replay F1 and F2 of rank 0 move left.

On a stage of a 1F1B pipeline F_k comes after B_(k-d) and before B_(k-d+1), so at most d(s) microbatches are in
flight. The r replicas of a stage share them: each runs those that are dealt to it (1F1B-RR), and as it is r ticks at
work on one where others take a tick, d(s) is so much greater, and a multiple of r (see ``Plan.depth``).

Ticks grow along every dependency, whatever the stage graph: a chain, skips, branches. All ranks follow one global
order, so no program made here can deadlock, also when several stages share a rank: their rows are merged by tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

from pipecompile.errors import InputError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Backward, Compute, Forward, Instruction, Program, Reduce, Step, is_tied

Clock = Callable[[Compute], int]


def waves(plan: Plan, stride: int, hold: int = 0) -> Clock:
    """The clock in which a wave of Forwards, then of Backwards, starts every ``stride`` ticks."""
    whole = max(plan.depth)

    def tick(i: Compute) -> int:
        depth = plan.depth[i.stage]
        down = isinstance(i, Forward)
        return stride * i.microbatch + (whole - depth if down else whole + depth - 1 + hold)

    return tick


def arrange(
    plan: Plan,
    computations: Iterable[Compute],
    clock: Clock,
    last: Iterable[Compute] = (),
    carried: Iterable[Instruction] = (),
) -> Program:
    """The valid, bare program that does ``computations`` by the clock (equal ticks as given), then ``last``."""
    rows: list[list[Instruction]] = [[] for _ in range(plan.num_ranks)]
    for i in (*sorted(computations, key=clock), *last):
        rows[plan.rank_of[i.stage]].append(i)
    program = Program(plan, tuple(map(tuple, rows)), frozenset(carried))
    program.validate()
    return program


def forwards(plan: Plan, num_microbatches: int) -> tuple[Forward, ...]:
    """All Forwards of a step, each on the replica that its microbatch is dealt to.

    Raises:
        InputError: there are no microbatches.
    """
    if num_microbatches < 1:
        raise InputError(f"a schedule needs at least one microbatch, got {num_microbatches}")
    pairs = product(range(plan.num_stages), range(num_microbatches))
    return tuple(Forward(stage, k) for stage, k in pairs if plan.runs(stage, k))


def backwards(plan: Plan, num_microbatches: int) -> tuple[Backward, ...]:
    """All Backwards of a step."""
    return tuple(Backward(i.stage, i.microbatch) for i in forwards(plan, num_microbatches))


def closing(plan: Plan, microbatch: int, step: bool = False) -> Iterator[Compute]:
    """What follows the last Backwards: gradients of tied parameters are summed, then stages step if asked to.

    Followers come first: a Reduce reads those of later stages only.
    """
    stages = range(plan.num_stages)
    yield from (Reduce(stage, microbatch) for stage in reversed(stages) if is_tied(stage, plan))
    yield from (Step(stage, microbatch) for stage in stages if step)
