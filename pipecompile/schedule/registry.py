"""The registry of schedules: the only place that says which schedules exist, and which of them are asynchronous.

A synchronous schedule ends each step with an empty pipeline. An asynchronous one keeps it full from one call to the
next, and updates weights in between: for each microbatch, or for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.ir.weight_versions import Versions, lags_after, versions
from pipecompile.schedule.gpipe import gpipe
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.order_program import program_of
from pipecompile.schedule.pipedream import carried_after, drain, pipedream, vertical_sync
from pipecompile.schedule.pipedream_2bw import drain_batch, pipedream_2bw
from pipecompile.schedule.policy import Policy, merge, zb_h1, zb_h2
from pipecompile.schedule.sequential import sequential
from pipecompile.schedule.shape import Shape, shape_of

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
        drain: makes the program that empties its pipeline, from what is carried.
        by_batch: whether its updates are for whole batches. Otherwise each microbatch is a minibatch of its own.
        splits: whether backwards leave the gradients of weights for later. Such a schedule takes no replicas.
    """

    with_flush: WithFlush
    segment: Segment | None = None
    drain: Callable[[Plan, Iterable[Instruction]], Program] = drain
    by_batch: bool = False
    splits: bool = False

    @property
    def is_asynchronous(self) -> bool:
        return self.segment is not None

    @property
    def updates_each(self) -> bool:
        """Whether each microbatch is a minibatch of its own, with its own update."""
        return self.is_asynchronous and not self.by_batch

    def next_segment(self, plan: Plan, microbatches: range, carried: Iterable[Instruction] = ()) -> Program:
        """The bare segment of an asynchronous schedule that ``microbatches`` enter."""
        assert self.segment is not None, "a synchronous schedule has no segments"
        return self.segment(plan, microbatches, carried)

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
        start, enough = 0, max(2 * max(plan.depth), 2 * num_microbatches)  # when versions lag as much as they ever do
        found: Versions | None = None
        while True:
            program = self.segment(plan, range(start, start + num_microbatches), carried)
            if found is not None:
                program = replace(program, lags=lags_after(found, carried))
            if start >= enough:
                return program
            found = versions(program, found)
            carried, start = carried_after(program), start + num_microbatches


def by_policy(policy: Callable[[Shape, int], Policy]) -> WithFlush:
    """The programs of a policy, on the stages of a plan."""

    def with_flush(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
        shape = shape_of(plan)
        return program_of(merge(policy(shape, num_microbatches), shape, num_microbatches), plan, step=step)

    with_flush.__qualname__ = policy.__qualname__
    return with_flush


SCHEDULES: Mapping[str, Schedule] = {
    "sequential": Schedule(sequential),
    "gpipe": Schedule(gpipe),
    "1f1b": Schedule(one_f_one_b),
    "zb-h1": Schedule(by_policy(zb_h1), splits=True),
    "zb-h2": Schedule(by_policy(zb_h2), splits=True),
    "pipedream": Schedule(one_f_one_b, segment=pipedream),
    "pipedream-vertical-sync": Schedule(one_f_one_b, segment=vertical_sync),
    "pipedream-2bw": Schedule(one_f_one_b, segment=pipedream_2bw, drain=drain_batch, by_batch=True),
}
SYNCHRONOUS: Mapping[str, WithFlush] = {
    name: schedule.with_flush for name, schedule in SCHEDULES.items() if not schedule.is_asynchronous
}
