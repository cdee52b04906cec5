"""Makes a program from ticks: every schedule here is a clock.

    D          depth of the whole plan: stages on its longest path
    d(s)       depth of stage s: stages on the longest path from s to a sink, s included; more with replicas
    k          microbatch

A schedule is defined by the tick at which each computation would run if each took one tick:

    Forward(s, k)    stride * k + D - d(s)                  microbatch k goes down the stages ...
    Backward(s, k)   stride * k + D + d(s) - 1 + hold       ... turns around in the sink, and comes back up

    sequential   stride 2D, hold 0       GPipe   stride 1, hold n - 1       1F1B, PipeDream   stride 2, hold 0

    rank 0   F0 .  F1 .  F2 B0 F3 B1          1F1B with three stages: even ticks are for one direction, odd ticks for
    rank 1   .  F0 .  F1 B0 F2 B1 F3          the other. A rank runs its computations in the order of their ticks,
    rank 2   .  .  F0 B0 F1 B1 F2 B2          without waiting for ticks: when run, F1 and F2 of rank 0 move left.

On a stage of a 1F1B pipeline, F_k runs after B_(k-d) and before B_(k-d+1), so at most d(s) microbatches are in flight.
The r replicas of a stage share them round-robin (1F1B-RR). A replica has r ticks for each microbatch where other stages
have one, so d(s) is larger by that factor, and a multiple of r (see ``Plan.depth``).

Ticks increase along every dependency in any stage graph: chains, skips, branches. All ranks follow one global order, so
no program made here can deadlock, even if several stages share a rank: their rows are merged by tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipecompile.errors import InputError
from pipecompile.ir.instruction import Backward, Compute, Forward, Instruction, Reduce, Step
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, is_tied

Clock = Callable[[Compute], float]


def waves(plan: Plan, stride: int, hold: int = 0) -> Clock:
    """The clock that starts the Forwards, then the Backwards, of a microbatch every ``stride`` ticks."""
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
    """The valid, bare program that runs ``computations`` by the clock (ties in the given order), then ``last``."""
    rows: list[list[Instruction]] = [[] for _ in range(plan.num_ranks)]
    for i in (*sorted(computations, key=clock), *last):
        rows[plan.rank_of[i.stage]].append(i)
    program = Program(plan, tuple(map(tuple, rows)), frozenset(carried))
    program.validate()
    return program


def forwards(plan: Plan, num_microbatches: int) -> tuple[Forward, ...]:
    """All Forwards of a step, each on the replica that runs its microbatch.

    Raises:
        InputError: ``num_microbatches`` is less than one.
    """
    if num_microbatches < 1:
        raise InputError(f"num_microbatches must be at least 1; got {num_microbatches}")
    groups = plan.replicas
    return tuple(
        Forward(stage, k)
        for stage, group in enumerate(groups)
        for k in range(group.index(stage), num_microbatches, len(group))
    )


def backwards(plan: Plan, num_microbatches: int) -> tuple[Backward, ...]:
    """All Backwards of a step."""
    return tuple(Backward(i.stage, i.microbatch) for i in forwards(plan, num_microbatches))


def closing(plan: Plan, microbatch: int, step: bool = False) -> Iterator[Compute]:
    """The computations after the last Backwards: Reduces of trained tied parameters, then Steps if ``step`` is set.

    Later stages come first: a Reduce reads only the Reduces of later stages.
    """
    stages = range(plan.num_stages)
    yield from (Reduce(stage, microbatch) for stage in reversed(stages) if is_tied(stage, plan, trained=True))
    yield from (Step(stage, microbatch) for stage in stages if step)
