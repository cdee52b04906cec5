"""The registry of schedules: the only place that says which schedules exist, and what each of them asks of a plan.

A synchronous schedule ends each step with an empty pipeline. An asynchronous one keeps it full from one call to the
next, and updates weights in between: for each microbatch, or for each call.

    clocks (``arrange``)       sequential, GPipe, 1F1B, PipeDream: any plan, replicas too
    policies (``policy``)      zero bubble, BFS, interleaved: any stage graph, with several stages on a rank
    phases, blocks             ZB-V, DualPipe-V, V-Half, V-Min: two stages on a rank, in the shape of a V
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from pipecompile.errors import InputError
from pipecompile.ir.instruction import Instruction
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.weight_versions import Versions, lags_after, versions
from pipecompile.schedule.gpipe import gpipe
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.order import Order
from pipecompile.schedule.order_program import program_of
from pipecompile.schedule.periodic import periodic, v_half, v_min
from pipecompile.schedule.phases import dualpipe_v, in_phases, zb_v
from pipecompile.schedule.pipedream import carried_after, drain, pipedream, vertical_sync
from pipecompile.schedule.pipedream_2bw import drain_batch, pipedream_2bw
from pipecompile.schedule.placement import PLAIN, Placement
from pipecompile.schedule.policy import Policy, breadth_first, interleaved, interleaved_zb, merge, zb_h1, zb_h2
from pipecompile.schedule.real_times import with_real_times
from pipecompile.schedule.sequential import sequential
from pipecompile.schedule.shape import Shape, in_order

AUTO = "auto"  # no schedule: the planner chooses one
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
        placement: where the stages are, if the user does not say.
        per_rank: the fewest and the most stages of a rank that the user may ask for; None: any number.
        takes_replicas: whether stages may have replicas.
    """

    with_flush: WithFlush
    segment: Segment | None = None
    drain: Callable[[Plan, Iterable[Instruction]], Program] = drain
    by_batch: bool = False
    placement: Placement = PLAIN
    per_rank: tuple[int, int | None] = (1, None)
    takes_replicas: bool = True

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

    def placed(self, per_rank: int | None, name: str = "of this kind") -> Placement:
        """The placement with a number of stages on each rank.

        Args:
            per_rank: that the user asks for; None: what the schedule needs.
            name: of the schedule, for the error.

        Raises:
            InputError: the schedule does not have that number.
        """
        least, most = self.per_rank
        if per_rank is None or per_rank == self.placement.per_rank:
            return self.placement
        if per_rank < least or (most is not None and per_rank > most):
            has = f"exactly {least}" if least == most else f"{least} or more"
            raise InputError(
                f"stages_per_rank={per_rank} does not fit schedule {name}, which has {has} on each rank; leave it out, "
                f"or use another schedule"
            )
        return Placement(per_rank)

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
        shape = in_order(plan)
        return program_of(merge(policy(shape, num_microbatches), shape, num_microbatches), plan, step=step)

    with_flush.__qualname__ = policy.__qualname__
    return with_flush


def on_a_v(order: Callable[[int, int], Order], name: str) -> WithFlush:
    """The programs of orders for a V shape, from numbers of ranks and microbatches, adapted to the times of a plan."""

    def with_flush(plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
        for_equal_times = order(len(set(plan.rank_of)), num_microbatches)
        return program_of(with_real_times(for_equal_times, plan), plan, step=step)

    with_flush.__qualname__ = name
    return with_flush


def _split(policy: Callable[[Shape, int], Policy]) -> Schedule:
    return Schedule(by_policy(policy), takes_replicas=False)


def _looped(policy: Callable[[Shape, int], Policy], per_rank: int, most: int | None = None) -> Schedule:
    least = 2 if most is None else most
    placement = Placement(per_rank)
    return Schedule(by_policy(policy), placement=placement, per_rank=(least, most), takes_replicas=False)


def _v(order: Callable[[int, int], Order], name: str) -> Schedule:
    placement = Placement(2, turns=True)
    return Schedule(on_a_v(order, name), placement=placement, per_rank=(2, 2), takes_replicas=False)


SCHEDULES: Mapping[str, Schedule] = {
    "sequential": Schedule(sequential),
    "gpipe": Schedule(gpipe),
    "1f1b": Schedule(one_f_one_b),
    "bfs": _looped(breadth_first, 2),
    "interleaved-1f1b": _looped(interleaved, 2),
    "interleaved-1f1b-3": _looped(interleaved, 3, most=3),
    "interleaved-1f1b-4": _looped(interleaved, 4, most=4),
    "zb-h1": _split(zb_h1),
    "zb-h2": _split(zb_h2),
    "interleaved-zb": _looped(interleaved_zb, 2),
    "zb-v": _v(partial(in_phases, zb_v), "zb_v"),
    "v-half": _v(partial(periodic, v_half), "v_half"),
    "v-min": _v(partial(periodic, v_min), "v_min"),
    "dualpipe-v": _v(partial(in_phases, dualpipe_v), "dualpipe_v"),
    "pipedream": Schedule(one_f_one_b, segment=pipedream, per_rank=(1, 1)),
    "pipedream-vertical-sync": Schedule(one_f_one_b, segment=vertical_sync, per_rank=(1, 1)),
    "pipedream-2bw": Schedule(one_f_one_b, segment=pipedream_2bw, drain=drain_batch, by_batch=True, per_rank=(1, 1)),
}
SYNCHRONOUS: Mapping[str, WithFlush] = {
    name: schedule.with_flush for name, schedule in SCHEDULES.items() if not schedule.is_asynchronous
}
