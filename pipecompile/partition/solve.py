"""From a problem to the best plan that can be found for it, and how good it is known to be.

    contract what is free -> interval programmes over many orders -> minimum cuts -> one programme over all of them

The bottleneck never exceeds that of the best interval plan, since its boundaries are among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import process_time

from pipecompile.errors import InfeasibleError
from pipecompile.partition.coarsen import lossy
from pipecompile.partition.contract import Contraction
from pipecompile.partition.evaluate import SLACK, bottleneck, check
from pipecompile.partition.pool import pooled
from pipecompile.partition.problem import Problem

MOST_ATOMS = 600


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan of a problem and its quality."""

    stage_of: tuple[int, ...]  # atom -> stage
    bottleneck: float  # seconds of the busiest stage
    lower_bound: float  # seconds that no plan can beat
    seconds: float  # CPU seconds spent on it

    @property
    def gap(self) -> float:
        """How much better another plan could be, relative to the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else 0.0

    @property
    def proven(self) -> bool:
        return self.gap <= SLACK


def solve(problem: Problem) -> Solution:
    """The best plan found.

    Raises:
        InfeasibleError: there are more seats than atoms, or no plan within memory was found.
    """
    begin = process_time()
    _refuse_impossible(problem)
    coarse = _coarse(problem)
    chain, _ = pooled(coarse.problem)
    if chain is None:
        raise InfeasibleError(f"no plan was found that keeps each of the {problem.num_stages} stages within its memory")
    stage_of = coarse.expand(chain.stage_of)
    check(problem, stage_of)
    return Solution(stage_of, bottleneck(problem, stage_of), problem.lower_bound, process_time() - begin)


def _coarse(problem: Problem) -> Contraction:
    coarse = lossy(problem, MOST_ATOMS)
    if problem.may_idle or len(coarse.problem) >= problem.num_stages:
        return coarse
    return Contraction(problem, tuple(range(len(problem))))


def _refuse_impossible(problem: Problem) -> None:
    if len(problem) < problem.num_stages and not problem.may_idle:
        raise InfeasibleError(
            f"{problem.num_stages} stages were asked for, but the model can be cut into at most {len(problem)}: "
            f"the rest of it must stay together; ask for {len(problem)} stages or fewer"
        )
    held, limit = sum(problem.kept_bytes), sum(seat.memory for seat in problem.seats)
    if held > limit:
        raise InfeasibleError(
            f"weights, gradients and optimizer state take {held:,.0f} bytes, and {problem.num_stages} devices have "
            f"{limit:,.0f}; use more devices, or devices with more memory"
        )
