"""Forwards of a stream of microbatches, one of which enters at each tick: the stages work on different ones.

    tick     0    1    2    3
    rank 0   F0   F1   F2   F3
    rank 1   .    F0   F1   F2
    rank 2   .    .    F0   F1

A program is one tick, a column. Its results are read in the next ones. The number of a microbatch is used again when it
has left, so that the programs of a stream repeat.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm

from pipecompile.ir.instruction import Forward, Instruction
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, waves


def lifetime(plan: Plan) -> int:
    """The ticks from the one in which a microbatch enters to the one after which it has left."""
    return max(plan.depth) - min(plan.depth) + 1


def period(plan: Plan) -> int:
    """The number of microbatches after which their numbers may repeat: each is then with the same replicas."""
    each = lcm(*map(len, plan.replicas))
    return each * -(-max(plan.depth) // each)


def inflow(plan: Plan, ages: Iterable[tuple[int, int]], done: Iterable[Instruction]) -> Program:
    """The bare program of one tick.

    Args:
        plan: the stages.
        ages: of each microbatch in flight, its number and the ticks since it entered.
        done: what has run for these microbatches in earlier ticks, transfers included.
    """
    clock = waves(plan, stride=0)
    pairs = ((Forward(stage, number), age) for number, age in ages for stage in range(plan.num_stages))
    due = [forward for forward, age in pairs if clock(forward) == age and plan.runs(forward.stage, forward.microbatch)]
    return arrange(plan, due, clock, carried=done)
