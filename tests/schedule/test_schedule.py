from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import SHAPES, WHOLE, branches, costs, dag, plans, rows, stage_row, units
from torch.distributed.pipelining import schedules as torch_schedules

from pipecompile.errors import InputError, PlanError, ProgramError
from pipecompile.ir.between_stages import Tied
from pipecompile.ir.instruction import Backward, Forward, Recv, Reduce, Step
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule import (
    SCHEDULES,
    SYNCHRONOUS,
    backward_only,
    carried_after,
    drain,
    forward_only,
    gpipe,
    one_f_one_b,
    pipedream,
    sequential,
)
from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

every = pytest.mark.parametrize("schedule", WHOLE.values(), ids=WHOLE)


# synchronous


def test_sequential_finishes_a_microbatch_before_the_next():
    assert str(sequential(Plan.chain(2), 2)) == rows("""
        0: 0F0 0B0 0F1 0B1
        1: 1F0 1B0 1F1 1B1
    """)


def test_gpipe_does_all_forwards_then_all_backwards():
    assert str(gpipe(Plan.chain(3), 3)) == rows("""
        0: 0F0 0F1 0F2 0B0 0B1 0B2
        1: 1F0 1F1 1F2 1B0 1B1 1B2
        2: 2F0 2F1 2F2 2B0 2B1 2B2
    """)


def test_1f1b_warms_up_by_depth_and_then_alternates():
    assert str(one_f_one_b(Plan.chain(3), 4)) == rows("""
        0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
        1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
        2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """)


def test_1f1b_on_branches_warms_up_by_the_longest_path_not_by_the_stage_number():
    program = one_f_one_b(branches(), 5)
    assert stage_row(program, 0) == "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4"
    assert stage_row(program, 1) == stage_row(program, 4) == "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4"
    assert stage_row(program, 7) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"


def test_1f1b_merges_the_stages_of_a_rank_into_one_row():
    assert str(one_f_one_b(Plan.chain(4, (0, 1, 0, 1)), 3)) == rows("""
        0: 0F0 0F1 2F0 0F2 2F1 2B0 2F2 0B0 2B1 0B1 2B2 0B2
        1: 1F0 1F1 3F0 3B0 1F2 3F1 1B0 3B1 3F2 1B1 3B2 1B2
    """)


def order_of_torch(kind: type, num_stages: int, num_microbatches: int) -> list[str]:
    """The compute rows of torch's own generator."""
    schedule = kind.__new__(kind)
    schedule._num_stages, schedule._n_microbatches = num_stages, num_microbatches
    order = schedule._get_pipeline_order()
    texts = [[str(action) for action in order[rank] if action is not None] for rank in range(num_stages)]
    return [" ".join(text for text in row if "REDUCE" not in text) for row in texts]


SIZES = [(1, 1), (2, 2), (2, 5), (4, 4), (4, 8), (4, 10), (8, 16)]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_gpipe_equals_torch(num_stages, num_microbatches):
    expected = order_of_torch(torch_schedules.ScheduleGPipe, num_stages, num_microbatches)
    assert [" ".join(map(str, row)) for row in gpipe(Plan.chain(num_stages), num_microbatches).ranks] == expected


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES[1:])
def test_1f1b_equals_torch_but_for_its_last_rank_which_lists_microbatches_that_do_not_exist(
    num_stages, num_microbatches
):
    expected = order_of_torch(torch_schedules.Schedule1F1B, num_stages, num_microbatches)
    program = one_f_one_b(Plan.chain(num_stages), num_microbatches)
    assert [" ".join(map(str, row)) for row in program.ranks[:-1]] == expected[:-1]
    assert f"F{num_microbatches}" in expected[-1]
    assert stage_row(program, num_stages - 1) == " ".join(f"F{k} B{k}" for k in range(num_microbatches))


@every
@given(plan=plans(tied=True), num_microbatches=st.integers(1, 5), step=st.booleans())
def test_every_instruction_stands_once(schedule, plan, num_microbatches, step):
    program = schedule(plan, num_microbatches, step=step)
    program.validate()
    tied = {stage for tied in plan.tied for stage in tied.stages}
    expected = [
        kind(s, k) for kind in (Forward, Backward) for s in range(plan.num_stages) for k in range(num_microbatches)
    ]
    expected += [Reduce(stage, num_microbatches - 1) for stage in tied]
    expected += [Step(stage, num_microbatches - 1) for stage in range(plan.num_stages)] * step
    assert Counter(program.instructions) == Counter(expected)


@every
@given(plan=plans(), num_microbatches=st.integers(1, 6))
def test_backwards_keep_the_order_of_microbatches_so_that_gradients_add_up_alike(schedule, plan, num_microbatches):
    program = schedule(plan, num_microbatches)
    for stage in range(plan.num_stages):
        done = [i.microbatch for i in program.row_of(stage) if isinstance(i, Backward)]
        assert done == list(range(num_microbatches))


def most_in_flight(program: Program, stage: int) -> int:
    flying = [0]
    for i in program.row_of(stage):
        flying.append(flying[-1] + isinstance(i, Forward) - isinstance(i, Backward))
    return max(flying)


@given(plans(), st.integers(1, 9))
def test_1f1b_keeps_exactly_depth_microbatches_in_flight_if_there_are_as_many(plan, num_microbatches):
    program = one_f_one_b(plan, num_microbatches)
    for stage, depth in enumerate(plan.depth):
        assert most_in_flight(program, stage) == min(depth, num_microbatches)


@given(plans(), st.integers(1, 6))
def test_gpipe_keeps_all_and_sequential_one(plan, num_microbatches):
    for stage in range(plan.num_stages):
        assert most_in_flight(gpipe(plan, num_microbatches), stage) == num_microbatches
        assert most_in_flight(sequential(plan, num_microbatches), stage) == 1


@given(plans(), st.integers(1, 6))
def test_no_rank_starts_a_backward_under_gpipe_before_its_last_forward(plan, num_microbatches):
    for row in gpipe(plan, num_microbatches).ranks:
        assert [type(i) for i in row] == sorted((type(i) for i in row), key=[Forward, Backward].index)


@every
@pytest.mark.parametrize("num_microbatches", [0, -3])
def test_a_step_without_microbatches_is_refused(schedule, num_microbatches):
    with pytest.raises(InputError, match=f"num_microbatches must be at least 1; got {num_microbatches}"):
        schedule(Plan.chain(2), num_microbatches)


# tied parameters, steps, halves


def test_gradients_of_tied_parameters_are_summed_after_the_last_backward_followers_first():
    plan = dag([(0, 1), (1, 2)], (0, 1, 2), [Tied("wte", (0, 2))])
    assert str(one_f_one_b(plan, 2)) == rows("""
        0: 0F0 0F1 0B0 0B1 0R1
        1: 1F0 1F1 1B0 1B1
        2: 2F0 2B0 2F1 2B1 2R1
    """)


def test_a_stage_that_owns_one_tied_parameter_and_follows_another_reduces_in_between():
    plan = dag([(0, 1), (1, 2)], (0, 0, 0), [Tied("a", (0, 1)), Tied("b", (1, 2))])
    assert str(gpipe(plan, 1, step=True)) == "0: 0F0 1F0 2F0 2B0 1B0 0B0 2R0 1R0 0R0 0S0 1S0 2S0"


def test_step_ends_each_row():
    assert str(one_f_one_b(Plan.chain(2), 2, step=True)) == rows("""
        0: 0F0 0F1 0B0 0B1 0S1
        1: 1F0 1B0 1F1 1B1 1S1
    """)


def test_the_two_halves_hold_forwards_and_backwards_and_the_second_carries_the_first():
    plan = dag([(0, 1)], (0, 1), [Tied("wte", (0, 1))])
    forward, backward = forward_only(plan, 2), backward_only(plan, 2)
    assert str(forward) == "0: 0F0 0F1\n1: 1F0 1F1"
    assert str(backward) == "0: 0B0 0B1 0R1\n1: 1B0 1B1 1R1"
    assert backward.carried == set(forward.instructions)


@given(plans(tied=True), st.integers(1, 5))
def test_the_two_halves_make_gpipe(plan, num_microbatches):
    halves = zip(forward_only(plan, num_microbatches).ranks, backward_only(plan, num_microbatches).ranks, strict=True)
    assert tuple(forward + backward for forward, backward in halves) == gpipe(plan, num_microbatches).ranks


def test_halves_without_microbatches_are_refused():
    for half in (forward_only, backward_only):
        with pytest.raises(InputError, match="num_microbatches must be at least 1; got 0"):
            half(Plan.chain(2), 0)


# pipedream


def stream(depth: int, num_microbatches: int) -> list[str]:
    """The endless stream of one stage, straight from its definition: warm-ups, then B S F for ever."""
    warm_ups = depth - 1
    words = [f"F{k}" for k in range(warm_ups + 1)]
    for k in range(num_microbatches):
        words += [f"B{k}", f"S{k}", f"F{warm_ups + 1 + k}"]
    return words[: words.index(f"F{num_microbatches}")]


def segments(plan: Plan, ends: list[int], lowered: bool = False) -> list[Program]:
    """Programs that follow one another; each takes the microbatches up to the next end."""
    programs: list[Program] = []
    carried: frozenset = frozenset()
    for first, last in pairwise([0, *ends]):
        program = pipedream(plan, range(first, last), carried)
        programs.append(lower(program, simulate(program, units(plan))) if lowered else program)
        carried = carried_after(programs[-1])
    program = drain(plan, carried)
    return [*programs, lower(program, simulate(program, units(plan))) if lowered else program]


cuts = st.sets(st.integers(1, 14), min_size=1, max_size=5).map(sorted)


def test_pipedream_steps_after_each_backward():
    assert str(pipedream(Plan.chain(3), range(4))) == rows("""
        0: 0F0 0F1 0F2 0B0 0S0 0F3 0B1 0S1
        1: 1F0 1F1 1B0 1S0 1F2 1B1 1S1 1F3 1B2 1S2
        2: 2F0 2B0 2S0 2F1 2B1 2S1 2F2 2B2 2S2 2F3 2B3 2S3
    """)


def test_pipedream_goes_on_where_the_last_segment_ended():
    plan = Plan.chain(3)
    carried = carried_after(pipedream(plan, range(4)))
    assert sorted(map(str, carried)) == ["0F2", "0F3", "1B2", "1F3", "2B3"]
    assert str(pipedream(plan, range(4, 6), carried)) == rows("""
        0: 0F4 0B2 0S2 0F5 0B3 0S3
        1: 1F4 1B3 1S3 1F5 1B4 1S4
        2: 2F4 2B4 2S4 2F5 2B5 2S5
    """)


def test_a_segment_with_fewer_microbatches_than_warm_ups_has_no_backward_upstream():
    assert str(pipedream(Plan.chain(3), range(1))) == "0: 0F0\n1: 1F0\n2: 2F0 2B0 2S0"


def test_drain_does_the_backwards_that_are_left_and_leaves_nothing():
    plan = Plan.chain(3)
    program = drain(plan, carried_after(pipedream(plan, range(4))))
    assert str(program) == "0: 0B2 0S2 0B3 0S3\n1: 1B3 1S3\n2: "
    assert carried_after(program) == frozenset()


def test_after_a_drain_the_stream_starts_with_a_new_warm_up():
    assert str(pipedream(Plan.chain(2), range(7, 9))) == "0: 0F7 0F8 0B7 0S7\n1: 1F7 1B7 1S7 1F8 1B8 1S8"


@given(plans(), cuts, st.booleans())
def test_segments_put_together_are_the_stream_however_they_are_cut(plan, ends, lowered):
    *programs, rest = segments(plan, ends, lowered)
    for stage, depth in enumerate(plan.depth):
        words = [word for program in programs for word in stage_row(program, stage).split()]
        assert words == stream(depth, ends[-1])
        left = range(max(0, ends[-1] - depth + 1), ends[-1])
        assert stage_row(rest, stage) == " ".join(f"B{k} S{k}" for k in left)
    assert carried_after(rest) == frozenset()


@given(plans(), cuts)
def test_a_transfer_stands_whole_in_the_segment_that_makes_its_result(plan, ends):
    received = Counter(
        i for program in segments(plan, ends, lowered=True) for i in program.instructions if isinstance(i, Recv)
    )
    apart = [c for c in plan.channels if plan.rank_of[c.source] != plan.rank_of[c.target]]
    assert set(received.values()) <= {1}
    assert len(received) == 2 * len(apart) * ends[-1]


@given(plans(), cuts)
def test_bare_segments_can_be_lowered_later(plan, ends):
    for program in segments(plan, ends):
        lower(program, simulate(program, units(plan))).validate()


@given(plans().flatmap(lambda plan: st.tuples(st.just(plan), costs(plan))), st.integers(1, 12))
def test_a_synchronous_program_carries_nothing(plan_and_costs, num_microbatches):
    plan, stage_costs = plan_and_costs
    program = one_f_one_b(plan, num_microbatches)
    assert carried_after(program) == frozenset()
    assert carried_after(lower(program, simulate(program, stage_costs))) == frozenset()


@given(plans(), st.integers(1, 4))
def test_what_forwards_alone_carry_are_the_forwards(plan, num_microbatches):
    program = forward_only(plan, num_microbatches)
    assert carried_after(program) == set(program.instructions)


def test_pipedream_refuses_tied_parameters_and_names_them():
    plan = dag([(0, 1), (1, 2)], (0, 1, 2), [Tied("wte.weight", (0, 2))])
    with pytest.raises(PlanError, match=r"wte\.weight is tied across stages 0, 2.*use schedule='1f1b' or 'gpipe'"):
        pipedream(plan, range(2))


@pytest.mark.parametrize("microbatches", [range(0), range(3, 3), range(0, 4, 2), range(-1, 2)])
def test_a_segment_takes_the_next_microbatches_and_no_others(microbatches):
    with pytest.raises(InputError, match="one or more consecutive microbatches"):
        pipedream(Plan.chain(2), microbatches)


def test_a_segment_that_does_not_fit_what_was_carried_is_refused():
    plan = Plan.chain(2)
    carried = carried_after(pipedream(plan, range(3)))
    with pytest.raises(ProgramError, match="0F2 occurs 2 times"):
        pipedream(plan, range(2, 4), carried)


def test_the_registry_names_all_schedules():
    asynchronous = ["pipedream", "pipedream-vertical-sync", "pipedream-2bw"]
    assert [name for name, it in SCHEDULES.items() if it.is_asynchronous] == asynchronous
    assert [name for name in SCHEDULES if name not in RECIPES] == ["sequential", *asynchronous]
    assert set(RECIPES) <= set(SYNCHRONOUS)


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize("plan", SHAPES.values(), ids=SHAPES)
def test_every_step_of_a_synchronous_schedule_is_the_same(name, plan):
    schedule = SCHEDULES[name]
    if schedule.placement.turns and plan.rank_of != schedule.placement.rank_of(plan.num_ranks):
        with pytest.raises(ProgramError, match="give both the same stages on each rank"):
            schedule.program(plan, 3)
    else:
        assert schedule.program(plan, 3) == schedule.steady(plan, 3) == SYNCHRONOUS[name](plan, 3)


def test_an_asynchronous_schedule_warms_up_in_its_first_step_only():
    plan, schedule = Plan.chain(3), SCHEDULES["pipedream"]
    assert schedule.program(plan, 4) == pipedream(plan, range(4))
    steady = schedule.steady(plan, 4)
    assert [stage_row(steady, stage).count("B") for stage in range(3)] == [4, 4, 4]
    assert not {Forward(0, 0), Backward(0, 0)} & set(steady.instructions)


@pytest.mark.parametrize("plan", SHAPES.values(), ids=SHAPES)
def test_every_shape_can_be_scheduled(plan):
    for schedule in WHOLE.values():
        assert len(schedule(plan, 3).instructions) == 6 * plan.num_stages
