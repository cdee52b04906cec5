"""Solves a partitioning problem: the best plan found, and a lower bound.

    contract atoms without loss -> interval programs over some orders -> minimum cuts -> one program over all of them
        -> the exact search, first for the relaxed problem, then for the problem itself

A few orders usually give a plan from which a quick exact search proves an optimum. Many orders and longer searches
follow only if the plan is not as close to the lower bound as is asked for.

The bottleneck never exceeds that of the best interval plan, because its boundaries are among the candidates. The exact
search runs twice. The relaxed problem, without memory limits and with empty stages allowed, has fewer atoms and a lower
optimum. If its plan is also valid for the original problem, the search is done. Otherwise its optimum is the lower
bound with which the second search starts.

As an integer program, the problem takes a general solver (HiGHS, in scipy) 26 CPU seconds for 500 nodes in 8 stages,
where this search takes half a second, and cannot be solved within two minutes for 2,000 nodes
(``benchmarks/integer_program.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from time import thread_time
from typing import NoReturn

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.plan_quality import SLACK, Quality
from pipecompile.partition.solver.candidate_pool import FEW_ORDERS, MOST_ORDERS, pooled
from pipecompile.partition.solver.chain_dp import Chain
from pipecompile.partition.solver.coarsen import lossless, lossy
from pipecompile.partition.solver.contraction import Contraction
from pipecompile.partition.solver.deadline import Deadline, OutOfTime
from pipecompile.partition.solver.exact import PATIENTLY, QUICKLY, Effort, exact
from pipecompile.partition.solver.lower_bound import stage_bound
from pipecompile.partition.solver.near_boundaries import near_boundaries
from pipecompile.partition.solver.problem import Problem
from pipecompile.partition.solver.refine import cheapest, traded, walked
from pipecompile.partition.solver.score import bottleneck, check, stage_transfers

MOST_ATOMS = 600  # for the pool
MOST_EXACT_ATOMS = 5_000  # for the exact search, whose tables grow with the square
MOST_NEAR = 1_500  # near the boundaries, for larger problems
BEAMS, ZOOMED = (150_000, 500_000), (60_000,)  # sets per window in a beam, times free atoms
MOST_OTHERS = 40
SEARCHING = 0.95  # of the time; the rest is for an equally good plan with less communication
SHARE = 0.4  # of the remaining time, for a first plan, and for a quick proof
TRADING = 1.0  # CPU seconds for plans with less communication
SLACKS = (1.02, 1.05, 1.1, 1.2, 1.4)  # relative to the smallest bottleneck
BEYOND = 1.001  # relative to an upper bound of any load: no plan within this limit means no plan at all


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan of a problem and its quality."""

    stage_of: tuple[int, ...]  # atom -> stage
    quality: Quality
    others: tuple[tuple[int, ...], ...] = ()  # further plans, if requested


def solve(problem: Problem, budget: float | None = None, others: bool = False, close: float = SLACK) -> Solution:
    """The best plan found. The same problem gives the same plan, unless the budget ends the search.

    Args:
        problem: the problem.
        budget: CPU seconds after which the search ends with the best plan so far.
        others: whether to keep other plans found during the search, and to search for plans with less communication,
            for up to ``TRADING`` further CPU seconds.
        close: relative to the lower bound: a quick search that leaves no more than this to gain is the last one.

    Raises:
        InfeasibleError: there are more seats than atoms, or no plan meets the memory limits and fixed stages.
        PlanError: no such plan was found, and the search was not exhaustive.
    """
    begin = thread_time()
    _refuse_impossible(problem)
    search = _Search(problem, _filled(lossless(problem), problem), Deadline.after(budget), close)
    search.run(thorough=others)
    if search.stage_of is None:
        _refuse(problem, search.lower == inf)
    check(problem, search.stage_of)
    kept = search.others() if others else ()
    quality = Quality(search.upper, min(search.lower, search.upper), thread_time() - begin)
    return Solution(search.stage_of, quality, kept)


class _Search:
    """The best plan and the best lower bound so far."""

    def __init__(self, problem: Problem, base: Contraction, deadline: Deadline, close: float) -> None:
        self.close = close
        self.problem, self.end, self.deadline = problem, deadline, deadline.part(SEARCHING)
        self.base = base  # the problem in which plans are searched
        self.stage_of: tuple[int, ...] | None = None
        self.plans: list[tuple[int, ...]] = []  # plans of the base, the best first
        self.upper, self.lower = problem.upper_bound * BEYOND or 1.0, problem.lower_bound

    @cached_property
    def relaxed(self) -> Contraction:
        """The problem without memory limits, and with empty stages allowed."""
        nothing = (0.0,) * len(self.problem)
        idle = tuple(replace(seat, may_idle=True) for seat in self.problem.seats)
        return lossless(replace(self.problem, kept_bytes=nothing, saved_bytes=nothing, seats=idle))

    def _contractions(self) -> Iterator[Contraction]:
        """The relaxed problem, and the problem itself."""
        yield self.relaxed
        if self.problem.must_fill:
            yield Contraction.identity(self.problem)
        elif self.problem.bounded:
            yield lossless(self.problem)

    def run(self, thorough: bool) -> None:
        """Searches until the plan is proven optimal, or soon found to be close, or time or effort is used up.

        Args:
            thorough: whether to search with all efforts, even if a quick search is enough.
        """
        if not thorough and len(self.base.problem) <= MOST_EXACT_ATOMS:
            with suppress(OutOfTime):
                self._first_plan(self.deadline.part(SHARE), FEW_ORDERS)
                self._bound()
                self._prove(QUICKLY, self.deadline.part(SHARE))
        if thorough or not self._is_close:
            self._search()
        self._break_tie()

    def _search(self) -> None:
        """Searches with all efforts, the cheapest first."""
        with suppress(OutOfTime):
            self._first_plan(self.deadline.part(SHARE))
        with suppress(OutOfTime):
            if len(self.base.problem) <= MOST_EXACT_ATOMS:
                self._bound()
                with suppress(OutOfTime):
                    self._prove(QUICKLY, self.deadline.part(SHARE))
                self._refine(BEAMS)
                self._prove(PATIENTLY, self.deadline)
            elif self.plans:
                self._zoom()

    def others(self) -> tuple[tuple[int, ...], ...]:
        """Up to ``MOST_OTHERS`` other plans: plans with less communication, and plans of single orders."""
        plans = dict.fromkeys(
            self.base.expand(plan) for plan in [*self._traded(SLACKS, Deadline.after(TRADING)), *self.plans]
        )
        return tuple(plan for plan in plans if plan != self.stage_of)[:MOST_OTHERS]

    def _traded(self, slacks: Sequence[float], deadline: Deadline) -> list[tuple[int, ...]]:
        """Plans of the base with less communication whose bottleneck is at most a slack times the best one."""
        found: list[tuple[int, ...]] = []
        if self.stage_of is not None and self.plans and len(self.base.problem) <= MOST_NEAR:
            limits = [self.upper * slack for slack in slacks]
            with suppress(OutOfTime):
                for chain in traded(self.base.problem, self.plans, limits, deadline):
                    found.append(chain.stage_of)
        return found

    @property
    def _is_done(self) -> bool:
        return self.lower == inf or (self.stage_of is not None and self.upper <= self.lower * (1 + SLACK))

    @property
    def _is_close(self) -> bool:
        """Whether a better plan would be better by less than ``close``."""
        return self._is_done or (self.stage_of is not None and self.upper <= self.lower * (1 + self.close))

    def _improve(self, stage_of: tuple[int, ...]) -> bool:
        """Records a plan if it is better than all before."""
        seconds = bottleneck(self.problem, stage_of)
        if self.stage_of is not None and seconds >= self.upper:
            return False
        self.stage_of, self.upper = stage_of, seconds
        return True

    def _follow(self, chains: Iterator[Chain], coarse: Contraction | None = None) -> None:
        """Records plans of the base, or of its contraction ``coarse``."""
        for chain in chains:
            stage_of = coarse.expand(chain.stage_of) if coarse else chain.stage_of
            self.plans.insert(0 if self._improve(self.base.expand(stage_of)) else len(self.plans), stage_of)

    def _first_plan(self, deadline: Deadline, most: int = MOST_ORDERS) -> None:
        """Finds a first plan, without contraction if contracted atoms leave a required stage empty.

        Args:
            deadline: when to stop.
            most: orders to try.
        """
        for base in (self.base, Contraction.identity(self.problem)):
            self.base, coarse = base, Contraction.identity(base.problem)
            if len(base.problem) > MOST_ATOMS:
                coarse = _filled(lossy(base.problem, MOST_ATOMS), base.problem)
            self._follow(pooled(coarse.problem, deadline, most), coarse)
            if self.plans:
                return

    def _break_tie(self) -> None:
        """Takes the plan with the least communication among those with the best bottleneck."""
        for plan in self._traded([1.0], self.end if self.end.at < inf else Deadline.after(TRADING)):
            assert self.stage_of is not None
            found = self.base.expand(plan)
            sent = [sum(stage_transfers(self.problem, plan)) for plan in (found, self.stage_of)]
            if bottleneck(self.problem, found) <= self.upper and sent[0] < sent[1] * (1 - SLACK):
                self.stage_of = found

    def _bound(self) -> None:
        self.lower = max(self.lower, stage_bound(self.relaxed.problem))

    def _prove(self, effort: Effort, deadline: Deadline) -> None:
        """Finds an optimum or a better lower bound, which is infinite if no plan exists."""
        for contraction in self._contractions():
            if self._is_done or len(contraction.problem) > MOST_EXACT_ATOMS:
                return
            best = None
            for lower, chain in exact(contraction.problem, self.lower, self.upper, effort, deadline):
                self.lower, best = max(self.lower, lower), chain
            if best and _is_plan(self.problem, found := contraction.expand(best.stage_of)):
                self._improve(found)
            elif not best and self.lower < self.upper:
                return  # the harder problem will not finish either
        if self.stage_of is None and self.lower >= self.upper:
            self.lower = inf

    def _refine(self, efforts: Sequence[int]) -> None:
        """Alternates walks and beams, as long as a beam improves on the walk."""
        for seed, effort in enumerate(efforts):
            if not self.plans or self._is_done:
                return
            problem = self.base.problem
            self._follow(walked(problem, self.plans, self.lower, seed, self.deadline))
            before = self.upper
            self._follow(cheapest(problem, Chain(before, self.plans[0]), self.lower, effort, self.deadline))
            if self.upper == before:
                return

    def _zoom(self) -> None:
        """Refines the best plan near its boundaries."""
        best = self.plans[0]
        near = near_boundaries(self.base.problem, best, MOST_NEAR)
        inner = _Search(near.problem, Contraction.identity(near.problem), self.deadline, self.close)
        inner.lower = self.lower
        stages = dict(zip(near.atom_of, best, strict=True))
        inner._follow(iter([Chain(self.upper, tuple(stages[atom] for atom in range(len(near.problem))))]))
        try:
            inner._refine(ZOOMED)
        finally:
            self._follow(iter([Chain(inner.upper, inner.plans[0])]), near)


def _filled(contraction: Contraction, problem: Problem) -> Contraction:
    """The contraction, if it has enough atoms for all required stages; otherwise none."""
    return contraction if len(contraction.problem) >= problem.must_fill else Contraction.identity(problem)


def _is_plan(problem: Problem, stage_of: tuple[int, ...]) -> bool:
    try:
        check(problem, stage_of)
    except PlanError:
        return False
    return True


def _refuse_impossible(problem: Problem) -> None:
    if not len(problem) and problem.must_fill:
        raise InfeasibleError(
            "no operation of this call depends on the model's weights and inputs, so there is nothing to cut into "
            "stages; call the unsplit model, pipe.pipeline.model"
        )
    if len(problem) < problem.must_fill:
        raise InfeasibleError(
            f"the model cannot be cut into {problem.must_fill} stages: it can be cut into at most {len(problem)}, "
            f"since the rest must stay together; use {len(problem)} stages or fewer"
        )
    held, limit = sum(problem.kept_bytes), sum(seat.memory for seat in problem.seats)
    if held > limit:
        raise InfeasibleError(
            f"the stages together need {held:,.0f} bytes (weights, gradients, optimizer state), but the "
            f"{problem.num_stages} devices have only {limit:,.0f}; use more devices, or devices with more memory"
        )
    for stage, seat in enumerate(problem.seats):
        if not seat.may_idle and not ((problem.earliest <= stage) & (stage <= problem.latest)).any():
            raise InfeasibleError(
                f"stage {stage} would be empty: with these pins, every node must come before or after it; use fewer "
                f"stages or fewer pins"
            )


def _refuse(problem: Problem, proven: bool) -> NoReturn:
    kind, what = (InfeasibleError, "exists") if proven else (PlanError, "was found")
    wants, advice = [f"fills {problem.must_fill} of {problem.num_stages} stages"], ["fewer stages"]
    if problem.fixed_stages:
        wants.append("meets the pins")
        advice.append("fewer pins")
    if problem.bounded:
        wants.append("keeps each stage within its memory")
        advice += ["more devices", "devices with more memory", "fewer microbatches in flight"]
    raise kind(f"no plan {what} that {' and '.join(wants)}; use {' or '.join(advice)}")
