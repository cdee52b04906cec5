"""The two halves of a step as separate programs.

    rank 0   F0 F1 F2 .        rank 0   .  B0 B1 B2
    rank 1   .  F0 F1 F2       rank 1   B0 B1 B2 .

The forward half alone is used for evaluation. Together the halves are GPipe with a pause, for a loss that is computed
outside the model: the caller gets the outputs of all microbatches before the first Backward.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, backwards, closing, forwards, waves
from pipecompile.schedule.offload import with_offloads


def forward_only(plan: Plan, num_microbatches: int) -> Program:
    """The bare program of all Forwards."""
    return with_offloads(arrange(plan, forwards(plan, num_microbatches), waves(plan, stride=1)))


def backward_only(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
    """The bare program of all Backwards, which carries the Forwards of ``forward_only``."""
    n = num_microbatches
    clock = waves(plan, stride=1)
    bare = arrange(plan, backwards(plan, n), clock, closing(plan, n - 1, step), carried=forwards(plan, n))
    return with_offloads(bare)
