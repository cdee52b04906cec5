"""Plain model parallelism: a microbatch runs through all stages and back before the next one starts.

    rank 0   F0 .  .  B0 F1 .  .  B1
    rank 1   .  F0 B0 .  .  F1 B1 .

One device is busy at a time (on a branching plan, one per branch). This is the baseline for all pipelines.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, backwards, closing, forwards, waves
from pipecompile.schedule.offload import with_offloads


def sequential(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
    """The bare program that keeps one device busy at a time."""
    n = num_microbatches
    clock = waves(plan, stride=2 * max(plan.depth))
    return with_offloads(arrange(plan, forwards(plan, n) + backwards(plan, n), clock, closing(plan, n - 1, step)))
