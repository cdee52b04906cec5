"""The registry of schedules: the only place that says which schedules exist, and which of them are asynchronous.

A synchronous schedule ends each step with an empty pipeline. An asynchronous one keeps it full from one call to the
next, and updates weights in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedule.gpipe import gpipe
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.pipedream import carried_after, pipedream
from pipecompile.schedule.sequential import sequential

MakeProgram = Callable[[Plan, int], Program]  # from a number of microbatches


class WithFlush(Protocol):
    """Makes the bare program of a synchronous step. With ``step`` it ends with a Step of each stage."""

    def __call__(self, plan: Plan, num_microbatches: int, *, step: bool = False) -> Program: ...


class Segment(Protocol):
    """Makes the bare program of the microbatches that enter a pipeline, after ``carried`` of earlier segments."""

    def __call__(self, plan: Plan, microbatches: range, carried: Iterable[Instruction] = ()) -> Program: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule, by what makes its programs.

    Args:
        with_flush: makes the program of a step that ends with an empty pipeline. For an asynchronous schedule this is
            the nearest synchronous one: rehearsals and comparisons with the unsplit model run it.
        segment: makes the segments of an asynchronous schedule; None for a synchronous one.
    """

    with_flush: WithFlush
    segment: Segment | None = None

    @property
    def is_asynchronous(self) -> bool:
        return self.segment is not None

    def program(self, plan: Plan, num_microbatches: int) -> Program:
        """The bare program of a step that starts with an empty pipeline."""
        if self.segment is None:
            return self.with_flush(plan, num_microbatches)
        return self.segment(plan, range(num_microbatches))

    def steady(self, plan: Plan, num_microbatches: int) -> Program:
        """The bare program of a step in steady state, after the warm-up of an asynchronous schedule."""
        if self.segment is None:
            return self.with_flush(plan, num_microbatches)
        carried: frozenset[Instruction] = frozenset()
        start = 0
        while True:
            program = self.segment(plan, range(start, start + num_microbatches), carried)
            if start >= max(plan.depth):
                return program
            carried, start = carried_after(program), start + num_microbatches


SCHEDULES: Mapping[str, Schedule] = {
    "sequential": Schedule(sequential),
    "gpipe": Schedule(gpipe),
    "1f1b": Schedule(one_f_one_b),
    "pipedream": Schedule(one_f_one_b, segment=pipedream),
}
SYNCHRONOUS: Mapping[str, WithFlush] = {
    name: schedule.with_flush for name, schedule in SCHEDULES.items() if not schedule.is_asynchronous
}
