from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import SHAPES, WHOLE, costs, dag, plans, rows, units

from pipecompile.errors import ProgramError
from pipecompile.ir.between_stages import Tied
from pipecompile.ir.instruction import Instruction, Recv, Send, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, dependencies, linearize, reads
from pipecompile.schedule import (
    backward_only,
    carried_after,
    drain,
    forward_only,
    gpipe,
    one_f_one_b,
    pipedream,
)
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate


def lowered(program: Program, forward: float = 1.0, backward: float = 2.0) -> Program:
    return lower(program, simulate(program, units(program.plan, forward, backward)))


def test_1f1b_receives_before_it_goes_on_computing():
    assert str(lowered(one_f_one_b(Plan.chain(2), 2))) == rows("""
        0: 0F0 0F0>1 0F1 0F1>1 0<1B0 0B0 0<1B1 0B1
        1: 1<0F0 1F0 1<0F1 1B0 1B0>0 1F1 1B1 1B1>0
    """)


def test_a_transfer_stands_where_the_clock_stands_when_its_result_is_ready():
    assert str(lowered(one_f_one_b(Plan.chain(2), 3), forward=4.0, backward=1.0)) == rows("""
        0: 0F0 0F0>1 0F1 0F1>1 0<1B0 0B0 0F2 0<1B1 0F2>1 0B1 0<1B2 0B2
        1: 1<0F0 1F0 1<0F1 1B0 1B0>0 1F1 1B1 1B1>0 1<0F2 1F2 1B2 1B2>0
    """)


def test_a_skip_goes_straight_to_the_stage_that_reads_it():
    assert str(lowered(gpipe(dag([(0, 1), (1, 2), (0, 2)], range(3)), 1))) == rows("""
        0: 0F0 0F0>1 0F0>2 0<2B0 0<1B0 0B0
        1: 1<0F0 1F0 1F0>2 1<2B0 1B0 1B0>0
        2: 2<0F0 2<1F0 2F0 2B0 2B0>0 2B0>1
    """)


def test_stages_of_one_rank_hand_over_without_a_transfer():
    assert str(lowered(gpipe(Plan.chain(3, (0, 0, 1)), 1))) == rows("""
        0: 0F0 1F0 1F0>2 1<2B0 1B0 0B0
        1: 2<1F0 2F0 2B0 2B0>1
    """)


def test_gradients_of_tied_parameters_go_to_the_owner():
    plan = dag([(0, 1)], (0, 1), [Tied("wte", (0, 1))])
    assert str(lowered(gpipe(plan, 1))) == rows("""
        0: 0F0 0F0>1 0<1B0 0<1R0 0B0 0R0
        1: 1<0F0 1F0 1B0 1B0>0 1R0 1R0>0
    """)


def test_the_halves_transfer_what_they_make():
    plan = Plan.chain(2)
    assert str(lowered(forward_only(plan, 1))) == "0: 0F0 0F0>1\n1: 1<0F0 1F0"
    assert str(lowered(backward_only(plan, 1))) == "0: 0<1B0 0B0\n1: 1B0 1B0>0"


def test_a_segment_receives_what_only_the_next_one_reads():
    plan = Plan.chain(2)
    first = lowered(pipedream(plan, range(1)))
    assert str(first) == "0: 0F0 0F0>1 0<1B0\n1: 1<0F0 1F0 1B0 1B0>0 1S0"
    assert str(lowered(drain(plan, carried_after(first)))) == "0: 0B0 0S0\n1: "


def test_results_of_a_bare_program_are_sent_first_thing_by_the_next():
    plan = Plan.chain(2)
    program = drain(plan, carried_after(pipedream(plan, range(1))))
    assert str(lowered(program)) == "0: 0<1B0 0B0 0S0\n1: 1B0>0"


# no rank waits for ever, even if a transfer needs both ranks at once


def queues_end(plan: Plan, queues: list[list[Instruction]], carried: frozenset[Instruction] = frozenset()) -> bool:
    """Whether in-order queues come to their end if a Send and its Recv are done only while both are first in theirs."""
    queues, done = [list(queue) for queue in queues], set(carried)
    while any(queues):
        first = {queue[0] for queue in queues if queue}
        ready = {i for i in first if not isinstance(i, Recv) and done.issuperset(dependencies(i, plan))}
        ready = {i for i in ready if not isinstance(i, Send) or Recv(i.result, i.target) in first}
        if not ready:
            return False
        done |= ready | {Recv(i.result, i.target) for i in ready if isinstance(i, Send)}
        queues = [queue[1:] if queue and queue[0] in done else queue for queue in queues]
    return True


def in_one_queue(program: Program) -> bool:
    """A rank waits in each transfer."""
    return queues_end(program.plan, [list(row) for row in program.ranks], program.carried)


def in_two_queues(program: Program) -> bool:
    """A rank has one queue for computations and one for transfers."""
    transfers = [[i for i in row if isinstance(i, Send | Recv)] for row in program.ranks]
    computations = [[i for i in row if not isinstance(i, Send | Recv)] for row in program.ranks]
    return queues_end(program.plan, transfers + computations, program.carried)


def naive(program: Program) -> Program:
    """Each Send right after what makes the result and each Recv right before what reads it."""
    plan = program.plan
    apart = {
        (result, i.stage)
        for i in program.instructions
        for result in reads(i, plan)
        if plan.rank_of[result.stage] != plan.rank_of[i.stage]
    }
    ranks: list[list[Instruction]] = [[] for _ in program.ranks]
    for rank, row in enumerate(program.ranks):
        for i in row:
            ranks[rank] += [Recv(result, i.stage) for result in reads(i, plan) if (result, i.stage) in apart]
            ranks[rank] += [i, *(Send(i, target) for result, target in sorted(apart, key=str) if result == i)]
    return Program(plan, tuple(map(tuple, ranks)))


@pytest.mark.parametrize("shape", ["chain", "unet", "branches", "looped"])
def test_the_naive_order_hangs_1f1b_with_one_queue_of_transfers_a_rank(shape):
    program = naive(one_f_one_b(SHAPES[shape], 6))
    program.validate()  # it would end if sends never waited
    assert not in_two_queues(program)
    assert not in_one_queue(program)


@pytest.mark.parametrize("schedule", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_schedule_hangs_on_any_shape_once_it_is_lowered(schedule, shape):
    program = lowered(schedule(SHAPES[shape], 6))
    assert program.instructions
    assert in_one_queue(program)
    assert in_two_queues(program)


plans_and_costs = plans(tied=True).flatmap(lambda plan: st.tuples(st.just(plan), costs(plan)))


@given(plans_and_costs, st.sampled_from(sorted(WHOLE)), st.integers(1, 5))
def test_no_schedule_hangs_on_any_plan_with_any_costs(plan_and_costs, name, num_microbatches):
    plan, stage_costs = plan_and_costs
    program = WHOLE[name](plan, num_microbatches, step=True)
    assert in_one_queue(lower(program, simulate(program, stage_costs)))


@given(plans().flatmap(lambda plan: st.tuples(st.just(plan), costs(plan))), st.integers(1, 6), st.integers(1, 6))
def test_no_segment_of_pipedream_hangs(plan_and_costs, first, second):
    plan, stage_costs = plan_and_costs
    carried = frozenset()
    for microbatches in (range(first), range(first, first + second)):
        program = pipedream(plan, microbatches, carried)
        program = lower(program, simulate(program, stage_costs))
        assert in_one_queue(program)
        carried = carried_after(program)
    rest = drain(plan, carried)
    assert in_one_queue(lower(rest, simulate(rest, stage_costs)))


@given(plans_and_costs, st.sampled_from(sorted(WHOLE)), st.integers(1, 5))
def test_what_is_read_on_another_rank_is_sent_once_and_nothing_else(plan_and_costs, name, num_microbatches):
    plan, stage_costs = plan_and_costs
    bare = WHOLE[name](plan, num_microbatches, step=True)
    program = lower(bare, simulate(bare, stage_costs))
    read = Counter(
        (result, i.stage)
        for i in bare.instructions
        for result in reads(i, plan)
        if plan.rank_of[result.stage] != plan.rank_of[i.stage]
    )
    for half in (Send, Recv):
        assert Counter((i.result, i.target) for i in program.instructions if isinstance(i, half)) == read
    rest = tuple(tuple(i for i in row if not isinstance(i, Send | Recv)) for row in program.ranks)
    assert rest == bare.ranks
    assert len(list(linearize(program))) == len(program.instructions)


def test_a_measured_timeline_serves_as_well_as_a_simulated_one():
    program = one_f_one_b(Plan.chain(3), 4)
    timeline = simulate(program, units(program.plan, 0.1, 0.3))
    assert in_one_queue(lower(program, timeline))


def test_a_program_is_lowered_once():
    program = lowered(gpipe(Plan.chain(2), 1))
    with pytest.raises(ProgramError, match="it has transfers"):
        lower(program, simulate(program, units(program.plan)))


def test_the_timeline_must_be_that_of_the_program():
    program = gpipe(Plan.chain(2), 2)
    timeline = simulate(gpipe(Plan.chain(2), 1), units(program.plan))
    with pytest.raises(ProgramError, match="the timeline has no 0F1, so it belongs to another program"):
        lower(program, timeline)


def test_a_program_on_one_rank_stays_as_it_is():
    program = one_f_one_b(Plan.chain(3, (0, 0, 0)), 2)
    assert lowered(program) == program


def test_the_checker_sees_a_wait_that_cannot_end():
    crossed = [["0F0", "1F0>2", "0F0>1"], ["1<0F0", "1F0"]]
    assert not queues_end(Plan.chain(3), [[parse(word) for word in queue] for queue in crossed])
