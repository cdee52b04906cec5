"""What all orders of one search have in common, as lists by code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts, busy
from pipecompile.schedule.wiring import Inputs, Wiring, memory_of, of_codes, seconds_of, wires_of


@dataclass(frozen=True)
class Job:
    """The times and memory of each code (see ``order``), and the memory cap of each rank; every B has a W."""

    shape: Shape
    num_microbatches: int
    cells: int  # stages times microbatches: a code of F; B and W are one and two of these further
    wires: Wiring
    needs: Sequence[Inputs]  # those of the wires
    seconds: Sequence[float]
    added: Sequence[float]  # to the memory of the rank
    rank_of: Sequence[int]
    caps: Sequence[float]
    busy: float  # the seconds that the busiest rank computes


def job_of(shape: Shape, num_microbatches: int, costs: StageCosts, caps: Sequence[float]) -> Job:
    """The job of a shape; caps are rounded up a little, so that sums of floats may reach them."""
    wires = wires_of(shape, num_microbatches, costs)
    return Job(
        shape=shape,
        num_microbatches=num_microbatches,
        cells=shape.num_stages * num_microbatches,
        wires=wires,
        needs=wires.needs,
        seconds=seconds_of(costs, num_microbatches),
        added=memory_of(costs, num_microbatches),
        rank_of=of_codes(3 * shape.rank_of, num_microbatches),
        caps=[cap + 1e-9 * abs(cap) if cap != float("inf") else cap for cap in caps],
        busy=max(busy(shape, costs, num_microbatches)),
    )
