"""What all orders of one search have in common, as lists by code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts
from pipecompile.schedule.wiring import Wiring, memory_of, seconds_of, wires_of


@dataclass(frozen=True)
class Job:
    """The times and memory of each code (see ``order``), and the memory cap of each rank; every B has a W."""

    cells: int  # stages times microbatches: a code of F; B and W are one and two of these further
    wires: Wiring
    seconds: Sequence[float]
    added: Sequence[float]  # to the memory of the rank
    needs: Sequence[int]  # the code on the same rank that is before: F of a B, B of a W; or -1
    rank_of: Sequence[int]
    caps: Sequence[float]


def job_of(shape: Shape, num_microbatches: int, costs: StageCosts, caps: Sequence[float]) -> Job:
    """The job of a shape; caps are rounded up a little, so that sums of floats may reach them."""
    n, cells = num_microbatches, shape.num_stages * num_microbatches
    return Job(
        cells=cells,
        wires=wires_of(shape, n, costs),
        seconds=seconds_of(costs, n),
        added=memory_of(costs, n),
        needs=[*(-1 for _ in range(cells)), *range(2 * cells)],
        rank_of=[rank for _ in range(3) for rank in shape.rank_of for _ in range(n)],
        caps=[cap + 1e-9 * abs(cap) if cap != float("inf") else cap for cap in caps],
    )
