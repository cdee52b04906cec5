import pytest
from plans import branches, rows

from pipecompile.errors import DeadlockError, InputError, ProgramError
from pipecompile.ir.between_stages import Tied
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Backward, BackwardWeight, Forward, Recv, Send, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.weight_versions import versions
from pipecompile.schedule import gpipe, one_f_one_b, pipedream
from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.order_program import order_of, program_of
from pipecompile.schedule.policy import merge
from pipecompile.schedule.policy import one_f_one_b as one_f_one_b_policy
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import chain, shape_of
from pipecompile.schedule.simulator import peak_bytes, simulate
from pipecompile.schedule.stage_costs import StageCosts


def plan_of(order):
    return Plan.chain(order.shape.num_stages, order.shape.rank_of)


def test_zb_h1_as_a_program():
    order = RECIPES["zb-h1"].order(2, 2)
    assert str(program_of(order, plan_of(order), step=True)) == rows("""
        0: 0F0 0F1 0B0 0W0 0B1 0W1 0S1
        1: 1F0 1B0 1F1 1B1 1W0 1W1 1S1
    """)


@pytest.mark.parametrize("name", RECIPES)
def test_two_simulators_agree_on_times_and_memory(name):
    order = RECIPES[name].order(3, 7)
    program, stages = program_of(order, plan_of(order), step=True), order.shape.num_stages
    costs = [Cost(2.0, 5.0, saved_bytes=1)] * stages
    timeline = simulate(program, costs, weight_part=0.4)
    run = replay(order, StageCosts((2.0,) * stages, (3.0,) * stages, (2.0,) * stages))
    assert timeline.makespan == pytest.approx(run.makespan)
    assert timeline.peak_bytes == run.peaks
    lowered = lower(program, timeline)
    assert simulate(lowered, costs, weight_part=0.4).makespan == pytest.approx(run.makespan)
    assert order_of(program) == order_of(lowered) == order
    assert Program.parse(str(lowered), program.plan) == lowered


def test_policies_make_the_programs_of_the_clocks_where_each_rank_has_one_stage():
    for plan in (Plan.chain(4), branches()):
        shape = shape_of(plan)
        for n in (1, 3, 9):
            assert program_of(merge(one_f_one_b_policy(shape, n), shape, n), plan) == one_f_one_b(plan, n)
            assert order_of(gpipe(plan, n)).num_microbatches == n


def test_tied_parameters_are_reduced_after_all_weights():
    order = RECIPES["zb-h1"].order(2, 2)
    program = program_of(order, Plan((), (0, 1), plan_of(order).channels, (Tied("w", (0, 1)),)))
    assert str(program).splitlines()[1] == "1: 1F0 1B0 1F1 1B1 1W0 1W1 1R1"


def test_a_backward_weight_is_an_instruction_without_a_result():
    assert parse("2W0") == BackwardWeight(2, 0)
    assert str(BackwardWeight(2, 0)) == "2W0"
    with pytest.raises(ProgramError, match="a BackwardWeight has no result to send or receive"):
        parse("2W0>1")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("0: 0F0 0W0 0B0", DeadlockError, "waits at 0W0 for 0B0"),
        ("0: 0F0 0B0 0S0 0W0", ProgramError, "0W0 is after 0S0, which reads its gradients"),
        ("0: 0F0 0B0 0W0 0W0", ProgramError, "0W0 occurs 2 times"),
        ("0: 0W0", DeadlockError, "waits at 0W0 for 0B0"),
    ],
)
def test_a_backward_weight_out_of_place_is_refused(text, kind, words):
    with pytest.raises(kind, match=words):
        Program.parse(text, Plan.chain(1)).validate()


def test_what_a_forward_saves_is_held_until_its_weights_are_done():
    program = Program.parse("0: 0F0 0B0 0F1 0W0 0B1 0W1", Plan.chain(1))
    program.validate()
    assert program.split == {Backward(0, 0), Backward(0, 1)}
    assert peak_bytes(program, [Cost(1, 2, saved_bytes=10)]) == (20,)
    assert versions(program).in_flight == (1,)
    one = Program.parse("0: 0F0 0B0 0F1 0B1", Plan.chain(1))
    assert peak_bytes(one, [Cost(1, 2, saved_bytes=10)]) == (10,)


def test_no_transfer_waits_for_weights():
    order = RECIPES["zb-h1"].order(2, 3)
    program = program_of(order, plan_of(order))
    lowered = lower(program, simulate(program, [Cost(1, 2)] * 2))
    row = lowered.ranks[1]
    assert row.index(Send(Backward(1, 0), 0)) < row.index(BackwardWeight(1, 0))
    assert not any(isinstance(i, Send | Recv) and isinstance(i.result, BackwardWeight) for i in lowered.instructions)


def test_what_is_no_whole_step_is_no_order():
    with pytest.raises(ProgramError, match="carries instructions"):
        order_of(Program(Plan.chain(1), ((Backward(0, 0),),), frozenset({Forward(0, 0)})))
    with pytest.raises(ProgramError, match="0B1 is missing"):
        order_of(pipedream(Plan.chain(2), range(2)))
    with pytest.raises(InputError, match="replicas"):
        program_of(RECIPES["gpipe"].order(3, 1), Plan.chain(2, replicas=(2, 1)))
    with pytest.raises(ProgramError, match="but the plan has ranks"):
        program_of(RECIPES["zb-v"].order(2, 1), Plan.chain(4))
    assert shape_of(Plan.chain(3)) == chain(3)
