"""The partitioning problem as an integer program, solved by HiGHS (scipy), beside the search of pipecompile.

    python benchmarks/integer_program.py --sizes 200,500 --stages 4,8 --seconds 120

The problems are the drawn blocks of ``branchy.py``, after the contraction without loss that the search makes too. The
program has a binary variable for each atom and each boundary (the atom is before the boundary), and continuous ones for
the nets that each stage sends and receives, and for the bottleneck. Bottlenecks and proven lower bounds are relative to
the bottleneck that pipecompile finds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from math import inf
from time import process_time

import branchy
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_matrix

from pipecompile.partition import Problem
from pipecompile.partition.solver.coarsen import lossless
from pipecompile.partition.solver.solver import solve

Terms = dict[int, float]  # variable -> coefficient
Row = tuple[Terms, float]  # the sum of the terms is at most this number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_numbers, default=[200, 500], help="nodes of the problems, with commas")
    parser.add_argument("--stages", type=_numbers, default=[4, 8], help="numbers of stages, with commas")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of HiGHS")
    arguments = parser.parse_args()
    table = Table("problem", "stages", "pipecompile: bound", "CPU s", "HiGHS: bottleneck", "bound", "CPU s")
    for size, stages in product(arguments.sizes, arguments.stages):
        for skips in (0, size // 44):
            problem = branchy.blocks(size // 22, 0, stages, skips=skips)
            name = f"blocks{' with skips' * bool(skips)}, {size} nodes"
            table.add_row(name, str(stages), *_solved(problem, arguments.seconds))
    Console(width=120).print(table)


def _solved(problem: Problem, seconds: float) -> Iterator[str]:
    quality = solve(problem).quality
    yield f"{quality.lower_bound / quality.bottleneck:.3f}"
    yield f"{quality.seconds:.2f}"
    begin = process_time()
    result = IntegerProgram(lossless(problem).problem).solved(seconds)
    yield "none" if result.x is None else f"{result.fun / quality.bottleneck:.3f}"
    yield "none" if result.mip_dual_bound is None else f"{result.mip_dual_bound / quality.bottleneck:.3f}"
    yield f"{process_time() - begin:.2f}"


class IntegerProgram:
    """Minimizes the bottleneck of a problem without memory limits or fixed stages."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.stages = problem, problem.num_stages
        self.binaries = len(problem) * (self.stages - 1)
        self.bottleneck = self.binaries + 2 * len(problem.nets) * self.stages

    def solved(self, seconds: float) -> OptimizeResult:
        rows = list(self._rows())
        entries = [(i, variable, factor) for i, (terms, _) in enumerate(rows) for variable, factor in terms.items()]
        at, variables, factors = zip(*entries, strict=True)
        count = self.bottleneck + 1
        matrix = coo_matrix((factors, (at, variables)), shape=(len(rows), count)).tocsr()
        most = np.ones(count)
        most[-1] = inf
        return milp(
            np.arange(count) == self.bottleneck,
            constraints=LinearConstraint(matrix, -inf, [limit for _, limit in rows]),
            integrality=np.arange(count) < self.binaries,
            bounds=Bounds(0, most),
            options={"time_limit": seconds},
        )

    def _rows(self) -> Iterator[Row]:
        last = self.stages - 1
        for (low, high), boundary in product(self.problem.arcs, range(last)):
            yield {self._before(high, boundary): 1.0, self._before(low, boundary): -1.0}, 0.0
        for atom, boundary in product(range(len(self.problem)), range(last - 1)):
            yield {self._before(atom, boundary): 1.0, self._before(atom, boundary + 1): -1.0}, 0.0
        for (index, net), stage in product(enumerate(self.problem.nets), range(self.stages)):
            producer, *consumers = net.ends
            for consumer in consumers:
                yield self._exceeds(producer, consumer, stage, self._sent(index, stage))
                yield self._exceeds(consumer, producer, stage, self._sent(index, stage) + 1)
        for stage in range(self.stages):
            yield self._load(stage)

    def _before(self, atom: int, boundary: int) -> int:
        """The variable that is 1 if the atom is in a stage up to the boundary."""
        return atom * (self.stages - 1) + boundary

    def _sent(self, net: int, stage: int) -> int:
        """The variable that is 1 if the stage sends the net; the next one is 1 if it receives the net."""
        return self.binaries + 2 * (net * self.stages + stage)

    def _within(self, atom: int, stage: int, factor: float = 1.0) -> Row:
        """``factor`` if the atom is in the stage: the terms, and a constant to subtract."""
        terms: Terms = {}
        if stage < self.stages - 1:
            terms[self._before(atom, stage)] = factor
        if stage > 0:
            terms[self._before(atom, stage - 1)] = -factor
        return terms, -factor if stage == self.stages - 1 else 0.0

    def _exceeds(self, one: int, other: int, stage: int, variable: int) -> Row:
        """The variable is at least 1 if ``one`` is in the stage and ``other`` is not."""
        (terms, limit), (more, other_limit) = self._within(one, stage), self._within(other, stage, -1.0)
        return {**terms, **more, variable: -1.0}, limit + other_limit

    def _load(self, stage: int) -> Row:
        """The load of the stage is at most the bottleneck."""
        seat, terms, limit = self.problem.seats[stage], {self.bottleneck: -1.0}, 0.0
        for atom, seconds in enumerate(self.problem.seconds):
            more, constant = self._within(atom, stage, seconds / seat.speed)
            terms |= more
            limit += constant
        for index, net in enumerate(self.problem.nets):
            terms |= {self._sent(index, stage): net.seconds * seat.sends}
            terms |= {self._sent(index, stage) + 1: net.seconds * seat.receives}
        return terms, limit


def _numbers(text: str) -> Sequence[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
