"""Tied parameters of ranks in several processes: their values travel before all else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from plans import WHOLE, dag, plans, rows, units

from pipecompile.ir.instruction import Forward, Recv, Refresh, Send
from pipecompile.ir.plan import Plan, Tied
from pipecompile.ir.program import Program
from pipecompile.schedule import backward_only, forward_only, one_f_one_b
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.several_processes import refreshed
from pipecompile.schedule.simulator import simulate


def lowered(program: Program) -> Program:
    return lower(program, simulate(program, units(program.plan)))


def test_an_owner_sends_the_values_before_the_first_microbatch() -> None:
    plan = dag([(0, 1), (1, 2)], (0, 1, 2), [Tied("wte", (0, 2))])
    program = lowered(refreshed(one_f_one_b(plan, 1)))
    assert str(program) == rows(
        """
        0: 0P0 0P0>2 0F0 0F0>1 0<2R0 0<1B0 0B0 0R0
        1: 1<0F0 1F0 1F0>2 1<2B0 1B0 1B0>0
        2: 2<0P0 2P0 2<1F0 2F0 2B0 2B0>1 2R0 2R0>0
        """
    )
    assert Program.parse(str(program), plan) == program


def test_a_program_without_ties_or_without_forwards_stays_as_it_is() -> None:
    free = one_f_one_b(Plan.chain(3), 2)
    assert refreshed(free) == free
    plan = dag([(0, 1)], (0, 1), [Tied("wte", (0, 1))])
    assert refreshed(backward_only(plan, 2)) == backward_only(plan, 2)


@given(plan=plans(tied=True), microbatches=st.integers(1, 4), make=st.sampled_from([*WHOLE.values(), forward_only]))
def test_every_follower_has_the_values_before_its_first_forward(plan: Plan, microbatches: int, make: object) -> None:
    program = lowered(refreshed(make(plan, microbatches)))  # which validates it
    for tied in plan.tied:
        for follower in tied.followers:
            row = program.ranks[plan.rank_of[follower]]
            first = min(place for place, i in enumerate(row) if isinstance(i, Forward) and i.stage == follower)
            taken = row.index(Refresh(follower, 0))
            assert taken < first
            if plan.rank_of[tied.owner] != plan.rank_of[follower]:
                given_away = Refresh(tied.owner, 0)
                assert Send(given_away, follower) in program.ranks[plan.rank_of[tied.owner]]
                assert row.index(Recv(given_away, follower)) < taken
