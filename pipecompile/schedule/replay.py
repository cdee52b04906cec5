"""Simulates an order: when each computation runs, and how much memory each rank needs.

A rank has two clocks. It computes one thing at a time, in its order, as soon as what it waits for has arrived; and it
sends one result at a time, while it computes. How long a transfer keeps others waiting is an input (``queued``): all of
its time, as over a narrow link, or none, as in the papers, where it is only late.

    rank 0   F0 F1 F2          computes           span      the longest time from a rank's first start to its last end
    rank 0      -0 -1 -2       sends              makespan  from the first start of any rank to the last end
    rank 1         F0 F1 F2    computes

The two are different metrics, which must not be compared with each other. A step with a barrier before the next one,
such as a global norm, takes a makespan. Steps of which each rank begins the next one at once follow each other in
spans: ranks that begin late end late.

Source: Zero Bubble (Qi et al., ICLR 2024): the cost of a schedule in section 5 is a span, and section 4 is how steps
follow each other in spans. A max-plus replay, O(computations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from pipecompile.errors import DeadlockError, InputError
from pipecompile.schedule.order import Order
from pipecompile.schedule.run_rows import Ran, run_rows
from pipecompile.schedule.stage_costs import StageCosts, busy
from pipecompile.schedule.wiring import memory_of, seconds_of, wires_of, with_whole_backwards


@dataclass(frozen=True)
class Replay:
    """The times of an order: ``start`` and ``end`` by code, -1 for computations that it does not have."""

    order: Order
    costs: StageCosts
    start: Sequence[float]
    end: Sequence[float]

    @cached_property
    def spans(self) -> tuple[float, ...]:
        """Seconds of each rank from its first start to its last end."""
        return tuple(self.end[row[-1]] - self.start[row[0]] if row else 0.0 for row in self.order.rows)

    @property
    def span(self) -> float:
        return max(self.spans)

    @cached_property
    def makespan(self) -> float:
        ends = max(self.end[row[-1]] for row in self.order.rows if row)
        return ends - min(self.start[row[0]] for row in self.order.rows if row)

    @property
    def span_rate(self) -> float:
        """The bubble rate by span: the part of it in which the busiest rank would not compute."""
        return _rate(self.span, self._work)

    @property
    def makespan_rate(self) -> float:
        """The bubble rate by makespan."""
        return _rate(self.makespan, self._work)

    @property
    def _work(self) -> float:
        return max(busy(self.order.shape, self.costs, self.order.num_microbatches))

    @cached_property
    def peaks(self) -> tuple[float, ...]:
        return peaks(self.order, self.costs)

    @property
    def peak(self) -> float:
        """The memory of the rank that needs most."""
        return max(self.peaks)


def replay(order: Order, costs: StageCosts) -> Replay:
    """The times of an order.

    Raises:
        InputError: the costs are of another number of stages.
        DeadlockError: no rank can continue.
    """
    if len(costs.f) != order.shape.num_stages:
        raise InputError(f"got costs of {len(costs.f)} stages for {order.shape.num_stages}; give one per stage")
    seconds = with_whole_backwards(seconds_of(costs, order.num_microbatches), order)
    wires = wires_of(order.shape, order.num_microbatches, costs)
    ran = run_rows(wires, order.rows, seconds)
    if not ran.is_whole(order.rows):
        _refuse(order, ran, costs)
    return Replay(order, costs, ran.start, ran.end)


def peaks(order: Order, costs: StageCosts) -> tuple[float, ...]:
    """The most memory that each rank holds; it follows from the order alone."""
    added = with_whole_backwards(memory_of(costs, order.num_microbatches), order)
    most = []
    for row in order.rows:
        held = peak = 0.0
        for code in row:
            held += added[code]
            if held > peak:
                peak = held
        most.append(peak)
    return tuple(most)


def _rate(seconds: float, work: float) -> float:
    return max(0.0, (seconds - work) / seconds) if seconds else 0.0  # no less than 0 by the rounding of sums


def _refuse(order: Order, ran: Ran, costs: StageCosts) -> NoReturn:
    reads = wires_of(order.shape, order.num_microbatches, costs).reads
    lines = []
    for rank, (row, at) in enumerate(zip(order.rows, ran.position, strict=True)):
        if at < len(row):
            missing = [order.op(row[at] + offset) for offset, _ in reads[row[at]] if ran.end[row[at] + offset] < 0.0]
            lines.append(f"\n  rank {rank} waits at {order.op(row[at])} for {', '.join(map(str, missing))}")
    raise DeadlockError(f"no rank can continue:{''.join(lines)}")
