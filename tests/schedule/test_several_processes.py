"""What ranks in several processes send each other beside results: tied parameters before all else, and outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import WHOLE, dag, plans, rows, units

from pipecompile.ir.between_stages import Made, Tied
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.instruction import Forward, Recv, Refresh, Send, Share
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, linearize, reads
from pipecompile.runtime.outputs import Outputs
from pipecompile.schedule import backward_only, forward_only, one_f_one_b
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.several_processes import refreshed, shared
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


def made(plan: Plan, *stages: Made) -> Plan:
    return replace(plan, made=stages)


def test_a_loss_comes_to_all_ranks_along_a_tree() -> None:
    program = shared(one_f_one_b(made(Plan.chain(3), Made(2, once=4)), 2), 4)
    assert str(program) == rows(
        """
        0: 0F0 0F1 0B0 0B1 2A1@0/4
        1: 1F0 1F1 1B0 1B1 2A1@1/4
        2: 2F0 2B0 2F1 2A1@2/4 2B1
        3: 2A1@3/4
        """
    )
    found = lowered(program)
    assert "2F1 2A1@2/4 2A1@2/4>0 2A1@2/4>3 2B1" in str(found).splitlines()[2], "beside the backwards"
    assert "2A1@0/4 2A1@0/4>1" in str(found).splitlines()[0]
    assert str(found).splitlines()[3] == "3: 3<2A1@2/4 2A1@3/4"
    assert Program.parse(str(found), program.plan) == found


def test_a_program_without_outputs_or_without_forwards_or_of_one_rank_stays_as_it_is() -> None:
    plan = made(Plan.chain(3), Made(2))
    assert shared(one_f_one_b(Plan.chain(3), 2), 3) == one_f_one_b(Plan.chain(3), 2)
    assert shared(backward_only(plan, 2), 3) == backward_only(plan, 2)
    alone = one_f_one_b(made(Plan.chain(1), Made(0)), 2)
    assert shared(alone, 1) == alone


@st.composite
def sharing(draw: st.DrawFn) -> tuple[Plan, int]:
    """A plan of which some stages make outputs, and a number of ranks."""
    plan = draw(plans(tied=True))
    stages = draw(st.sets(st.integers(0, plan.num_stages - 1), min_size=1))
    return made(plan, *map(Made, sorted(stages))), plan.num_ranks + draw(st.integers(0, 3))


@given(drawn=sharing(), microbatches=st.integers(1, 4), make=st.sampled_from([*WHOLE.values(), forward_only]))
def test_every_rank_gets_what_each_rank_makes_in_one_message(drawn: Any, microbatches: int, make: Any) -> None:
    plan, ranks = drawn
    program = lowered(shared(refreshed(make(plan, microbatches)), ranks))  # which validates it
    makers = {plan.rank_of[it.stage] for it in plan.made}
    for maker in makers if ranks > 1 else ():
        last = max(it.stage for it in plan.made if plan.rank_of[it.stage] == maker)
        for rank, row in enumerate(program.ranks):
            assert row.count(Share(last, microbatches - 1, rank, ranks)) == 1
        row = [i for i in program.ranks[maker] if not isinstance(i, Send | Recv)]
        making = {it.stage for it in plan.made if plan.rank_of[it.stage] == maker}
        ends = [place for place, i in enumerate(row) if isinstance(i, Forward) and i.stage in making]
        assert row.index(Share(last, microbatches - 1, maker, ranks)) == 1 + max(ends)
    sent = [i for i in program.instructions if isinstance(i, Send) and isinstance(i.result, Share)]
    assert len(sent) == len(makers) * (ranks - 1)


@given(drawn=sharing(), microbatches=st.integers(1, 3))
def test_all_processes_have_all_outputs_or_their_shapes(drawn: Any, microbatches: int) -> None:
    plan, ranks = drawn
    program = shared(forward_only(plan, microbatches), ranks)
    makers = {f"{what} of {it.stage}": plan.rank_of[it.stage] for it in plan.made for what in ("loss", "logits")}
    values = {name: torch.rand(() if "loss" in name else (2, 3)).requires_grad_() for name in makers}
    wanted = {name for name in makers if "loss" in name}
    each = [Outputs(lambda names: {name: values[name] for name in names}, makers, wanted) for _ in range(ranks)]
    passed: dict[object, Any] = {}
    for rank, i in linearize(program):
        if isinstance(i, Share):
            maker = plan.rank_of[i.stage]
            for source in reads(i, plan):
                each[rank].take(maker, passed[source])
            passed[i] = passed[source] if rank != maker else each[rank].made(maker)
    for rank, outputs in enumerate(each if ranks > 1 else ()):
        assert outputs.found.keys() == values.keys()
        for name, value in outputs.found.items():
            assert (value.shape, value.requires_grad) == (values[name].shape, True)
            assert value.is_meta == (makers[name] != rank and "loss" not in name)
            assert value.is_meta or torch.equal(value, values[name])


@pytest.mark.parametrize(("how", "seconds"), [(Made(1, nbytes=100), 4.0), (Made(1, once=100), 1.0), (Made(1), 0.0)])
def test_outputs_take_their_time_on_the_links(how: Made, seconds: float) -> None:
    plan = made(Plan.chain(2), how)
    program, cluster = shared(forward_only(plan, 4), 3), Cluster.of(["a", "b", "c"], Link(100, 0.0))
    for found in (program, lowered(program)):
        timeline = simulate(found, units(plan), cluster)
        spans = {span.instruction: span for span in timeline.spans}
        assert spans[Share(1, 3, 1, 3)].end == 5.0
        assert spans[Share(1, 3, 0, 3)].end == 5.0 + seconds
        assert spans[Share(1, 3, 2, 3)].end == 5.0 + seconds
        assert timeline.makespan == 5.0 + seconds
        assert timeline.num_ranks == 3
