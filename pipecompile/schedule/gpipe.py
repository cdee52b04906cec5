"""GPipe: all Forwards, then all Backwards.

    rank 0   F0 F1 F2 .  .  B0 B1 B2
    rank 1   .  F0 F1 F2 B0 B1 B2 .

For p equal stages the bubble is (p - 1)(f + b), and every stage has all n microbatches in flight. Backwards run in the
order of microbatches, so that gradients are added in the same order under every schedule.

Source: GPipe (Huang et al., NeurIPS 2019), section 2.2; the order of Backwards is torch's ``ScheduleGPipe``.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import arrange, backwards, closing, forwards, waves
from pipecompile.schedule.offload import with_offloads


def gpipe(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
    """The bare program in which each rank runs all Forwards and then all Backwards."""
    n = num_microbatches
    clock = waves(plan, stride=1, hold=n - 1)
    return with_offloads(arrange(plan, forwards(plan, n) + backwards(plan, n), clock, closing(plan, n - 1, step)))
