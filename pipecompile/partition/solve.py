"""From a problem to the best plan that can be found for it, and how good it is known to be.

    contract what is free -> interval programmes over many orders -> minimum cuts -> one programme over all of them
        -> the exact programme, first without the bounds that make it slow, then with them

The bottleneck never exceeds that of the best interval plan, since its boundaries are among the candidates. The exact
programme is asked twice: a problem without memory limits, whose seats may idle, has fewer atoms and a lower optimum. If
its plan happens to be one of the problem itself, all is done; else its optimum is where the second search begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from time import process_time
from typing import NoReturn

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.partition.bound import stage_bound
from pipecompile.partition.chain import Chain
from pipecompile.partition.coarsen import lossless, lossy
from pipecompile.partition.contract import Contraction
from pipecompile.partition.evaluate import SLACK, bottleneck, check
from pipecompile.partition.exact import exact
from pipecompile.partition.pool import pooled
from pipecompile.partition.problem import Problem
from pipecompile.partition.refine import cheapest, refined

MOST_ATOMS = 600  # for the pool
MOST_EXACT_ATOMS = 5_000  # for the exact programme, whose tables grow with the square
QUICKLY, PATIENTLY = 3_000, 10_000  # sets in one window, before and after refinement
BEAMS = 500, 1_500  # sets in one window that are followed up


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
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else self.bottleneck

    @property
    def proven(self) -> bool:
        return self.gap <= SLACK


def solve(problem: Problem) -> Solution:
    """The best plan found; the same problem has the same plan.

    Raises:
        InfeasibleError: there are more seats than atoms, or no plan within memory exists.
        PlanError: no plan within memory was found, and the search was not exhaustive.
    """
    begin = process_time()
    _refuse_impossible(problem)
    stage_of, lower = _prove(problem, _first_plan(problem), _lower_bound(problem), QUICKLY)
    if stage_of is None and lower < inf:
        stage_of, lower = _prove(problem, None, lower, PATIENTLY)
    if stage_of is None:
        _refuse_memory(problem, lower == inf)
    elif bottleneck(problem, stage_of) > lower * (1 + SLACK):
        stage_of, lower = _prove(problem, _refine(problem, stage_of, lower), lower, PATIENTLY)
    assert stage_of is not None
    check(problem, stage_of)
    return Solution(stage_of, bottleneck(problem, stage_of), lower, process_time() - begin)


def _lower_bound(problem: Problem) -> float:
    if len(problem) > MOST_EXACT_ATOMS:
        return problem.lower_bound
    return stage_bound(_relaxations(problem)[0].problem)


def _first_plan(problem: Problem) -> tuple[int, ...] | None:
    coarse = _coarse(problem)
    chain, _ = pooled(coarse.problem)
    return None if chain is None else coarse.expand(chain.stage_of)


def _coarse(problem: Problem) -> Contraction:
    coarse = lossy(problem, MOST_ATOMS)
    if problem.may_idle or len(coarse.problem) >= problem.num_stages:
        return coarse
    return Contraction.identity(problem)


def _refine(problem: Problem, stage_of: tuple[int, ...], lower: float) -> tuple[int, ...]:
    """The best plan of several searches, each from the best so far."""
    chain = Chain(bottleneck(problem, stage_of), stage_of)
    if len(problem) > MOST_EXACT_ATOMS:
        return stage_of
    for seed, most in enumerate(BEAMS):
        chain = refined(problem, cheapest(problem, chain, lower, most), lower, seed)
    return chain.stage_of


def _prove(
    problem: Problem, stage_of: tuple[int, ...] | None, lower: float, most: int
) -> tuple[tuple[int, ...] | None, float]:
    """The plan or a better one, and a lower bound; infinite if there is no plan."""
    upper = bottleneck(problem, stage_of) if stage_of else problem.upper_bound
    if len(problem) > MOST_EXACT_ATOMS or (stage_of and upper <= lower * (1 + SLACK)):
        return stage_of, min(lower, upper)
    for contraction in _relaxations(problem):
        lower, chain = exact(contraction.problem, lower, upper, most)
        if chain and _is_plan(problem, found := contraction.expand(chain.stage_of)):
            return found, min(lower, bottleneck(problem, found))
    if not stage_of and lower >= upper:
        return None, inf
    return stage_of, min(lower, upper)


def _relaxations(problem: Problem) -> list[Contraction]:
    """The problem without what makes it hard, and the problem itself."""
    nothing = (0.0,) * len(problem)
    relaxed = lossless(replace(problem, kept_bytes=nothing, saved_bytes=nothing, may_idle=True))
    if problem.may_idle and not problem.bounded:
        return [relaxed]
    return [relaxed, lossless(problem) if problem.may_idle else Contraction.identity(problem)]


def _is_plan(problem: Problem, stage_of: tuple[int, ...]) -> bool:
    try:
        check(problem, stage_of)
    except PlanError:
        return False
    return True


def _refuse_impossible(problem: Problem) -> None:
    if len(problem) < problem.num_stages and not problem.may_idle:
        raise InfeasibleError(
            f"{problem.num_stages} stages were asked for, but the model can be cut into at most {len(problem)}: "
            f"the rest of it must stay together; ask for {len(problem)} stages or fewer"
        )
    held, limit = sum(problem.kept_bytes), sum(seat.memory for seat in problem.seats)
    if held > limit:
        raise InfeasibleError(
            f"all stages together must hold {held:,.0f} bytes (weights, gradients, optimizer state), and the "
            f"{problem.num_stages} devices have {limit:,.0f}; use more devices, or devices with more memory"
        )


def _refuse_memory(problem: Problem, proven: bool) -> NoReturn:
    kind, what = (InfeasibleError, "exists") if proven else (PlanError, "was found")
    raise kind(
        f"no plan {what} that keeps each of the {problem.num_stages} stages within its memory; use more devices, "
        f"devices with more memory, or fewer microbatches in flight"
    )
