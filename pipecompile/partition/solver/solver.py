"""From a problem to the best plan that can be found for it, and how good it is known to be.

    contract what is free -> interval programmes over many orders -> minimum cuts -> one programme over all of them
        -> the exact programme, first without the bounds that make it slow, then with them

The bottleneck never exceeds that of the best interval plan, since its boundaries are among the candidates. The exact
programme is asked twice: a problem without memory limits, whose seats may idle, has fewer atoms and a lower optimum. If
its plan happens to be one of the problem itself, all is done; else its optimum is where the second search begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from time import process_time
from typing import NoReturn

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.plan_quality import SLACK, Quality
from pipecompile.partition.solver.candidate_pool import pooled
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
MOST_EXACT_ATOMS = 5_000  # for the exact programme, whose tables grow with the square
MOST_NEAR = 1_500  # near the boundaries of a larger problem's plan
BEAMS, ZOOMED = (150_000, 500_000), (60_000,)  # sets in one window that are followed up, times free atoms
MOST_OTHERS = 40
SEARCHING = 0.95  # of the time; the rest is for a plan as good that sends less
SHARE = 0.4  # of the time that is left, for a first plan, and for a quick proof
TRADING = 1.0  # CPU seconds for plans that send less
SLACKS = (1.02, 1.05, 1.1, 1.2, 1.4)  # times the least load
BEYOND = 1.001  # a search up to so many times the load of any plan proves that there is none


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan of a problem and how good it is."""

    stage_of: tuple[int, ...]  # atom -> stage
    quality: Quality
    others: tuple[tuple[int, ...], ...] = ()  # further plans, if they were asked for


def solve(problem: Problem, budget: float | None = None, others: bool = False) -> Solution:
    """The best plan found; the same problem has the same plan, unless the budget ends the search.

    Args:
        others: whether to keep other plans found on the way, and to look for such as send less, for up to ``TRADING``
            CPU seconds more.
        budget: CPU seconds after which the search ends with the best plan so far; a first plan is always looked for.

    Raises:
        InfeasibleError: there are more seats than atoms, or no plan keeps the memory limits and pins.
        PlanError: no such plan was found, and the search was not exhaustive.
    """
    begin = process_time()
    _refuse_impossible(problem)
    search = _Search(problem, _filled(lossless(problem), problem), Deadline.after(budget))
    search.run()
    if search.stage_of is None:
        _refuse(problem, search.lower == inf)
    check(problem, search.stage_of)
    kept = search.others() if others else ()
    quality = Quality(search.upper, min(search.lower, search.upper), process_time() - begin)
    return Solution(search.stage_of, quality, kept)


class _Search:
    """The best plan so far, and the best bound."""

    def __init__(self, problem: Problem, base: Contraction, deadline: Deadline) -> None:
        self.problem, self.end, self.deadline = problem, deadline, deadline.part(SEARCHING)
        self.base = base  # where plans are looked for
        self.stage_of: tuple[int, ...] | None = None
        self.plans: list[tuple[int, ...]] = []  # of the base, the best first
        self.upper, self.lower = problem.upper_bound * BEYOND or 1.0, problem.lower_bound

    @cached_property
    def relaxed(self) -> Contraction:
        """The problem without what makes it hard: bytes, and seats that may not idle."""
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

    def run(self) -> None:
        """Searches until the plan is proven, or time or effort are spent."""
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
        self._break_tie()

    def others(self) -> tuple[tuple[int, ...], ...]:
        """Up to ``MOST_OTHERS`` plans beside the best: those that send less, and those of single orders."""
        plans = dict.fromkeys(
            self.base.expand(plan) for plan in [*self._traded(SLACKS, Deadline.after(TRADING)), *self.plans]
        )
        return tuple(plan for plan in plans if plan != self.stage_of)[:MOST_OTHERS]

    def _traded(self, slacks: Sequence[float], deadline: Deadline) -> list[tuple[int, ...]]:
        """Plans of the base that send less, if the busiest stage takes up to so many times as long as the best's."""
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

    def _improve(self, stage_of: tuple[int, ...]) -> bool:
        """Notes a plan, if it is better than all before."""
        seconds = bottleneck(self.problem, stage_of)
        if self.stage_of is not None and seconds >= self.upper:
            return False
        self.stage_of, self.upper = stage_of, seconds
        return True

    def _follow(self, chains: Iterator[Chain], coarse: Contraction | None = None) -> None:
        """Notes plans of the base, or of what it was contracted to."""
        for chain in chains:
            stage_of = coarse.expand(chain.stage_of) if coarse else chain.stage_of
            self.plans.insert(0 if self._improve(self.base.expand(stage_of)) else len(self.plans), stage_of)

    def _first_plan(self, deadline: Deadline) -> None:
        """Where what has joined leaves a seat without an atom that must have one, nothing joins."""
        for base in (self.base, Contraction.identity(self.problem)):
            self.base, coarse = base, Contraction.identity(base.problem)
            if len(base.problem) > MOST_ATOMS:
                coarse = _filled(lossy(base.problem, MOST_ATOMS), base.problem)
            self._follow(pooled(coarse.problem, deadline), coarse)
            if self.plans:
                return

    def _break_tie(self) -> None:
        """Of the plans whose busiest stage takes as long as the best's takes one that sends less."""
        for plan in self._traded([1.0], self.end if self.end.at < inf else Deadline.after(TRADING)):
            assert self.stage_of is not None
            found = self.base.expand(plan)
            sent = [sum(stage_transfers(self.problem, plan)) for plan in (found, self.stage_of)]
            if bottleneck(self.problem, found) <= self.upper and sent[0] < sent[1] * (1 - SLACK):
                self.stage_of = found

    def _bound(self) -> None:
        self.lower = max(self.lower, stage_bound(self.relaxed.problem))

    def _prove(self, effort: Effort, deadline: Deadline) -> None:
        """Finds an optimum, or a better bound; an infinite one if there is no plan."""
        for contraction in self._contractions():
            if self._is_done or len(contraction.problem) > MOST_EXACT_ATOMS:
                return
            best = None
            for lower, chain in exact(contraction.problem, self.lower, self.upper, effort, deadline):
                self.lower, best = max(self.lower, lower), chain
            if best and _is_plan(self.problem, found := contraction.expand(best.stage_of)):
                self._improve(found)
            elif not best and self.lower < self.upper:
                return  # what is harder will not end either
        if self.stage_of is None and self.lower >= self.upper:
            self.lower = inf

    def _refine(self, efforts: Sequence[int]) -> None:
        """Walks and beams in turn, as long as a beam finds what the walk has not."""
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
        inner = _Search(near.problem, Contraction.identity(near.problem), self.deadline)
        inner.lower = self.lower
        stages = dict(zip(near.atom_of, best, strict=True))
        inner._follow(iter([Chain(self.upper, tuple(stages[atom] for atom in range(len(near.problem))))]))
        try:
            inner._refine(ZOOMED)
        finally:
            self._follow(iter([Chain(inner.upper, inner.plans[0])]), near)


def _filled(contraction: Contraction, problem: Problem) -> Contraction:
    """The contraction, if it leaves enough atoms for all seats."""
    return contraction if len(contraction.problem) >= problem.must_fill else Contraction.identity(problem)


def _is_plan(problem: Problem, stage_of: tuple[int, ...]) -> bool:
    try:
        check(problem, stage_of)
    except PlanError:
        return False
    return True


def _refuse_impossible(problem: Problem) -> None:
    if len(problem) < problem.must_fill:
        raise InfeasibleError(
            f"{problem.must_fill} stages were asked for, but the model can be cut into at most {len(problem)}: "
            f"the rest of it must stay together; ask for {len(problem)} stages or fewer"
        )
    held, limit = sum(problem.kept_bytes), sum(seat.memory for seat in problem.seats)
    if held > limit:
        raise InfeasibleError(
            f"all stages together must hold {held:,.0f} bytes (weights, gradients, optimizer state), and the "
            f"{problem.num_stages} devices have {limit:,.0f}; use more devices, or devices with more memory"
        )
    for stage, seat in enumerate(problem.seats):
        if not seat.may_idle and not ((problem.earliest <= stage) & (stage <= problem.latest)).any():
            raise InfeasibleError(
                f"stage {stage} would be empty: all that is not pinned elsewhere must come before or after it; "
                f"ask for fewer stages, or pin less"
            )


def _refuse(problem: Problem, proven: bool) -> NoReturn:
    kind, what = (InfeasibleError, "exists") if proven else (PlanError, "was found")
    wants, advice = [f"fills {problem.must_fill} of {problem.num_stages} stages"], ["fewer stages"]
    if problem.pins:
        wants.append("has in each stage what is pinned to it")
        advice.append("fewer pins")
    if problem.bounded:
        wants.append("keeps each stage within its memory")
        advice += ["more devices", "devices with more memory", "fewer microbatches in flight"]
    raise kind(f"no plan {what} that {' and '.join(wants)}; use {' or '.join(advice)}")
