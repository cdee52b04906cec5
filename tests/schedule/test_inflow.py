"""A stream of forwards, tick by tick: a stage runs each of its microbatches once, other stages run others."""

from __future__ import annotations

from collections import Counter

import pytest
from plans import dag, rows, units

from pipecompile.ir.instruction import Forward, Instruction, Recv
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.inflow import inflow, lifetime, period
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

PLANS = {
    "one stage": Plan.chain(1),
    "chain": Plan.chain(4),
    "a rank twice": Plan.chain(3, (0, 1, 0)),
    "skip": dag([(0, 1), (1, 2), (0, 2)], range(3)),
    "branches": dag([(0, 1), (0, 2), (1, 3), (2, 3)], range(4)),
    "replicas": Plan.chain(3, replicas=(1, 2, 1)),
    "replicas first": Plan.chain(2, replicas=(3, 2)),
}


def streamed(plan: Plan, count: int) -> list[tuple[Program, dict[int, int]]]:
    """The lowered program of each tick, with the microbatch of the stream behind each number."""
    ticks = []
    done: dict[int, set[Instruction]] = {}
    entered = {k: k for k in range(count)}  # microbatch -> the tick in which it enters
    for tick in range(count - 1 + lifetime(plan)):
        flying = [k for k, start in entered.items() if 0 <= tick - start < lifetime(plan)]
        numbers = {k % period(plan): k for k in flying}
        assert len(numbers) == len(flying), "two microbatches in flight have one number"
        ages = [(k % period(plan), tick - entered[k]) for k in flying]
        carried = set().union(*(done.get(k, set()) for k in flying))
        bare = inflow(plan, ages, carried)
        program = lower(bare, simulate(bare, units(plan, 1.0, 1.0)))
        for i in program.instructions:
            number = i.result.microbatch if hasattr(i, "result") else i.microbatch
            done.setdefault(numbers[number], set()).add(i)
        ticks.append((program, numbers))
    return ticks


@pytest.mark.parametrize("name", PLANS)
def test_every_stage_runs_each_of_its_microbatches_once(name: str) -> None:
    plan, count = PLANS[name], 9
    ran = Counter(
        (i.stage, numbers[i.microbatch])
        for program, numbers in streamed(plan, count)
        for i in program.instructions
        if isinstance(i, Forward)
    )
    period_of = {k: k % period(plan) for k in range(count)}
    assert ran == Counter((s, k) for s in range(plan.num_stages) for k in range(count) if plan.runs(s, period_of[k]))


@pytest.mark.parametrize("name", PLANS)
def test_what_a_tick_reads_comes_from_earlier_ticks(name: str) -> None:
    """So the stages of a tick do not wait for one another, and no transfer is pending between two ticks."""
    plan = PLANS[name]
    for program, _ in streamed(plan, 9):
        made = {i for i in program.instructions if isinstance(i, Forward)}
        read = {Forward(source, i.microbatch) for i in made for source in plan.sources(i.stage, i.microbatch)}
        assert not made & read
        assert {i.result for i in program.instructions if isinstance(i, Recv)} <= made


def test_a_full_pipeline_has_another_microbatch_in_each_stage() -> None:
    (program, _) = streamed(PLANS["chain"], 9)[5]
    assert str(program) == rows("""
        0: 0F1 0F1>1
        1: 1F0 1<0F1 1F0>2
        2: 2F3 2<1F0 2F3>3
        3: 3F2 3<2F3
    """)


def test_programs_repeat() -> None:
    texts = [str(program) for program, _ in streamed(PLANS["chain"], 12)]
    assert texts[4] == texts[8] != texts[5]
