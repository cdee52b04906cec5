"""1F1B with a flush: after a warm-up each stage alternates one Forward with one Backward.

    rank 0   F0 F1 .  B0 F2 B1 .  B2
    rank 1   .  F0 B0 F1 B1 F2 B2 .

For p equal stages the bubble is (p - 1)(f + b), the same as for GPipe, but stage s has at most depth(s) microbatches in
flight, independent of their number. On a branching plan the depth is the longest path to a sink, so parallel branches
shorten the warm-up.

Source: PipeDream-Flush (Narayanan et al., ICML 2021, section 3.2), DAPPLE (Fan et al., PPoPP 2021); depth instead of
the stage number: GraphPipe (Jeon et al., ASPLOS 2025).
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, backwards, closing, forwards, waves
from pipecompile.schedule.offload import with_offloads


def one_f_one_b(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
    """The bare program with at most ``plan.depth[stage]`` microbatches in flight at each stage."""
    n = num_microbatches
    return with_offloads(
        arrange(plan, forwards(plan, n) + backwards(plan, n), waves(plan, stride=2), closing(plan, n - 1, step))
    )
