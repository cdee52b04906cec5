"""The best chain of closed sets, one from each family: the dynamic programme that every search here ends in.

    nothing  ⊆  A in families[0]  ⊆  B in families[1]  ⊆ ... ⊆  everything

Stage k is the difference of two links. A net crosses it if it is open at either link, unless it is open at both and has
no pin between, so for all pairs at once

    crossing(B - A) = open(A) + open(B) - open(A and B) - passing(A, B)

and the last two are matrix products over the few nets that are open on both sides. First the least greatest load is
found, then, among the plans that have it, the one that sends the fewest seconds.

Source: the programme over ideals of Tarnawski et al. (NeurIPS 2020), section 4; the matrix form of the load is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipecompile.partition.family import Family
from pipecompile.partition.problem import Bools, Floats, Ints, Problem, Seat

BLOCK = 2_000_000  # pairs looked at together
TIE = 1 + 1e-12


@dataclass(frozen=True, slots=True)
class Chain:
    """A plan as the closed sets at its boundaries."""

    bottleneck: float
    stage_of: tuple[int, ...]


def best_chain(problem: Problem, families: Sequence[Family], limit: float) -> Chain | None:
    """The best plan with a boundary from each family, one family a boundary; ``None`` if all exceed the limit."""
    links = [Family.nothing(problem), *families, Family.everything(problem)]
    links, bottleneck = _forward(problem, links, limit)
    if bottleneck > limit:
        return None
    rows = _least_crossing(problem, links, bottleneck * TIE)
    stage_of = np.zeros(len(problem), np.int64)
    for link, row in zip(links[1:-1], rows, strict=True):
        stage_of += ~link.members[row]
    return Chain(bottleneck, tuple(stage_of.tolist()))


def stage_matrix(problem: Problem, seat: Seat, lower: Family, upper: Family) -> tuple[Floats, Floats]:
    """Load and crossing seconds of the stage between each pair of sets, infinite where there is no such stage."""
    crossing = _crossing(problem, lower, upper)
    loads = (upper.weight - lower.weight[:, None]) / seat.speed + crossing
    loads[~_nested(lower, upper)] = inf
    if problem.may_idle:
        _pardon_idle(lower, upper, loads, crossing)
    else:
        loads[_equal(lower, upper)] = inf
    if problem.bounded:
        nbytes = (upper.kept - lower.kept[:, None]) + seat.in_flight * (upper.saved - lower.saved[:, None])
        loads[nbytes > seat.memory * (1 + 1e-12)] = inf
    return loads, crossing


def _forward(problem: Problem, links: list[Family], limit: float) -> tuple[list[Family], float]:
    """The sets that a chain within the limit can reach, and the least greatest load."""
    reached = [links[0]]
    value = np.zeros(1)
    for seat, link in zip(problem.seats, links[1:], strict=True):
        following = np.full(len(link), inf)
        for rows, columns, loads, _ in _blocks(problem, seat, reached[-1], link, limit):
            following[columns] = np.maximum(value[rows, None], loads).min(axis=0)
        alive = following <= limit
        reached.append(link.select(alive))
        value = following[alive]
    return reached, float(value.min(initial=inf))


def _least_crossing(problem: Problem, links: list[Family], limit: float) -> list[int]:
    """The row of each inner link in the chain within the limit that crosses least."""
    value = np.zeros(1)
    came_from: list[Ints] = []
    for seat, lower, upper in zip(problem.seats, links, links[1:], strict=False):
        following = np.full(len(upper), inf)
        parent = np.zeros(len(upper), np.int64)
        for rows, columns, loads, crossing in _blocks(problem, seat, lower, upper, limit):
            crossing[loads > limit] = inf
            sums = value[rows, None] + crossing
            parent[columns] = sums.argmin(axis=0) + rows.start
            following[columns] = sums.min(axis=0)
        value = following
        came_from.append(parent)
    chosen = [0]
    for parent in reversed(came_from[1:]):
        chosen.append(int(parent[chosen[-1]]))
    return chosen[:0:-1]


def _blocks(
    problem: Problem, seat: Seat, lower: Family, upper: Family, limit: float
) -> Iterator[tuple[slice, slice, Floats, Floats]]:
    """Rows of both families, with the load and crossing seconds between them; the rest is beyond the limit."""
    width = max(1, BLOCK // max(1, len(lower)))
    for begin in range(0, len(upper), width):
        columns = slice(begin, min(begin + width, len(upper)))
        reach = limit * TIE * seat.speed
        first = int(np.searchsorted(lower.weight, upper.weight[begin] * (1 - 1e-12) - reach))
        last = int(np.searchsorted(lower.weight, upper.weight[columns.stop - 1] * TIE, side="right"))
        if first < last:
            rows = slice(first, last)
            yield rows, columns, *stage_matrix(problem, seat, lower.select(rows), upper.select(columns))


def _nested(lower: Family, upper: Family) -> Bools:
    columns = lower.members.any(axis=0) & ~upper.members.all(axis=0)
    left = lower.members[:, columns].astype(np.float32)
    right = (~upper.members[:, columns]).astype(np.float32)
    return np.asarray(left @ right.T == 0)


def _crossing(problem: Problem, lower: Family, upper: Family) -> Floats:
    apart = lower.open_seconds[:, None] + upper.open_seconds
    both = np.flatnonzero(lower.is_open.any(axis=0) & upper.is_open.any(axis=0))
    if not len(both):
        return apart
    left, right, seconds = _columns(problem, lower, upper, both)
    return np.asarray(np.maximum(apart - (left * seconds) @ right.T, 0.0))


def _columns(problem: Problem, lower: Family, upper: Family, nets: Ints) -> tuple[Floats, Floats, Floats]:
    """Columns whose products count ``open`` and ``passing``: a net of two pins is passing whenever it is open twice."""
    sizes = problem.net_sizes[nets]
    inside = (lower.pins_inside[:, nets], upper.pins_inside[:, nets])
    wide = np.flatnonzero(sizes > 2)
    columns: list[tuple[NDArray[np.bool_], ...]] = [tuple((pins > 0) & (pins < sizes) for pins in inside)]
    seconds = [problem.net_seconds[nets] * np.where(sizes > 2, 1.0, 2.0)]
    for count in range(1, int(sizes.max())):
        some = wide[sizes[wide] > count]
        if len(some):
            columns.append(tuple(pins[:, some] == count for pins in inside))
            seconds.append(problem.net_seconds[nets[some]])
    left, right = (np.hstack(side).astype(np.float64) for side in zip(*columns, strict=True))
    return left, right, np.concatenate(seconds)


def _equal(lower: Family, upper: Family) -> Bools:
    return np.asarray(lower.members.sum(axis=1)[:, None] >= upper.members.sum(axis=1))


def _pardon_idle(lower: Family, upper: Family, loads: Floats, crossing: Floats) -> None:
    idle = _equal(lower, upper) & (loads < inf)
    loads[idle] = 0.0
    crossing[idle] = 0.0
