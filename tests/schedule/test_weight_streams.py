"""Vertical sync and 2BW as programs: where the Steps stand decides versions, and what waits is counted."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import branches, plans, rows, units

from pipecompile.errors import ProgramError
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Backward, BackwardWeight, Forward, Step, Update, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, linearize
from pipecompile.ir.weight_versions import Versions, delays, versions
from pipecompile.schedule import (
    SCHEDULES,
    carried_after,
    drain,
    drain_batch,
    pipedream,
    pipedream_2bw,
    vertical_sync,
)
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate


def ran(name: str, plan: Plan, sizes: list[int]) -> tuple[list[Program], list[Versions]]:
    """The segments of microbatches of these numbers and the drain, with their versions."""
    schedule = SCHEDULES[name]
    programs: list[Program] = []
    found: list[Versions] = []
    for first, last in pairwise(accumulate([0, *sizes])):
        carried = carried_after(programs[-1]) if programs else frozenset()
        programs.append(schedule.next_segment(plan, range(first, last), carried))
        found.append(versions(programs[-1], found[-1] if found else None))
    programs.append(schedule.drain(plan, carried_after(programs[-1])))
    found.append(versions(programs[-1], found[-1]))
    return programs, found


def used(found: list[Versions], stage: int) -> list[int]:
    """The version of each microbatch in a stage."""
    table = {i.microbatch: version for each in found for i, version in each.used.items() if i.stage == stage}
    return [table[k] for k in sorted(table)]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(max_examples=50)
@given(plans(), SIZES)
def test_vertical_sync_uses_the_version_of_the_first_stage_in_all(plan: Plan, sizes: list[int]) -> None:
    programs, found = ran("pipedream-vertical-sync", plan, sizes)
    behind = max(plan.depth) - 1
    for stage in range(plan.num_stages):
        assert used(found, stage) == [max(0, k - behind) for k in range(sum(sizes))]
        assert max(each.live[stage] for each in found) <= behind + 1
    assert found[-1].latest == (sum(sizes),) * plan.num_stages
    assert carried_after(programs[-1]) == frozenset()


@settings(max_examples=50)
@given(plans(), SIZES)
def test_2bw_uses_the_version_before_the_batch_before_and_holds_two(plan: Plan, sizes: list[int]) -> None:
    programs, found = ran("pipedream-2bw", plan, sizes)
    expected = [max(0, t - 1) for t, size in enumerate(sizes) for _ in range(size)]
    for stage in range(plan.num_stages):
        assert used(found, stage) == expected
        assert max(each.live[stage] for each in found) <= 2
    assert found[-1].latest == (len(sizes),) * plan.num_stages
    assert carried_after(programs[-1]) == frozenset()


@settings(max_examples=50)
@given(plans(), SIZES, st.sampled_from(["pipedream-vertical-sync", "pipedream-2bw"]))
def test_each_computation_runs_once_and_lowered_programs_run_to_their_end(
    plan: Plan, sizes: list[int], name: str
) -> None:
    programs, _ = ran(name, plan, sizes)
    done = [i for program in programs for i in program.instructions]
    assert len(set(done)) == len(done)
    every = {(stage, k) for stage in range(plan.num_stages) for k in range(sum(sizes))}
    for kind in (Forward, Backward):
        assert {(i.stage, i.microbatch) for i in done if isinstance(i, kind)} == every
    ends = list(accumulate(sizes)) if name == "pipedream-2bw" else range(1, sum(sizes) + 1)
    assert {(i.stage, i.microbatch + 1) for i in done if isinstance(i, Step)} == {
        (stage, end) for stage in range(plan.num_stages) for end in ends
    }
    for program in programs:
        lowered = lower(program, simulate(program, units(plan)))
        assert len(list(linearize(lowered))) == len(lowered.instructions)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("name", "live"),
    [("pipedream", [4, 3, 2, 1]), ("pipedream-vertical-sync", [4] * 4), ("pipedream-2bw", [2] * 4)],
)
def test_a_segment_in_steady_state_holds_as_many_versions_as_the_formula(
    name: str, live: list[int], microbatches: int
) -> None:
    program = SCHEDULES[name].steady(Plan.chain(4), microbatches)
    assert list(versions(program).live) == live
    assert program.microbatches == tuple(
        range(program.microbatches[0], program.microbatches[0] + microbatches)
    )  # a segment of its own, which knows what it carries


@settings(max_examples=30)
@given(plans(), st.integers(1, 8))
def test_gradients_are_as_old_as_the_formula(plan: Plan, microbatches: int) -> None:
    expected = {
        "pipedream": [depth - 1 for depth in plan.depth],
        "pipedream-vertical-sync": [max(plan.depth) - 1] * plan.num_stages,
        "pipedream-2bw": [1] * plan.num_stages,
    }
    for name, due in expected.items():
        assert delays(SCHEDULES[name].steady(plan, microbatches)) == dict(enumerate(due))


def test_stages_in_branches_hold_as_many_versions_as_the_longest_path_has_stages() -> None:
    plan = branches()
    assert versions(vertical_sync(plan, range(30))).live == (5,) * 8
    assert versions(pipedream(plan, range(30))).live == (5, 4, 3, 2, 4, 3, 2, 1)


def test_a_late_stage_updates_at_once_and_steps_with_the_first() -> None:
    assert str(vertical_sync(Plan.chain(3), range(5))) == rows("""
        0: 0F0 0F1 0F2 0B0 0S0 0F3 0B1 0S1 0F4 0B2 0S2
        1: 1F0 1F1 1B0 1U0 1F2 1S0 1B1 1U1 1F3 1S1 1B2 1U2 1F4 1S2 1B3 1U3
        2: 2F0 2B0 2U0 2F1 2B1 2U1 2F2 2S0 2B2 2U2 2F3 2S1 2B3 2U3 2F4 2S2 2B4 2U4
    """)


def test_2bw_updates_after_a_batch_and_steps_before_the_one_after_the_next() -> None:
    plan = Plan.chain(2)
    first = pipedream_2bw(plan, range(2))
    second = pipedream_2bw(plan, range(2, 4), carried_after(first))
    assert str(first) == "0: 0F0 0F1 0B0\n1: 1F0 1B0 1F1 1B1 1U1"
    assert str(second) == "0: 0F2 0B1 0U1 0F3 0B2 0S1\n1: 1F2 1B2 1F3 1B3 1S1 1U3"
    assert str(drain_batch(plan, carried_after(second))) == "0: 0B3 0S3\n1: 1S3"


def test_a_drain_steps_what_waits_before_all_else() -> None:
    plan = Plan.chain(2)
    assert str(drain(plan, carried_after(vertical_sync(plan, range(3))))) == "0: 0B2 0S2\n1: 1S2"


@pytest.mark.parametrize("name", ["pipedream", "pipedream-vertical-sync", "pipedream-2bw"])
def test_optimizers_take_their_time_once_in_an_update_or_its_step(name: str) -> None:
    plan = Plan.chain(1) if name == "pipedream" else Plan.chain(2)
    program = SCHEDULES[name].steady(plan, 4)
    spent = sum(span.seconds for span in simulate(program, units(plan, 0, 0), step_seconds=7.0).spans)
    each = 1 if name == "pipedream-2bw" else 4
    assert spent == 7.0 * each * plan.num_stages


def test_versions_that_wait_take_the_memory_of_weights() -> None:
    plan = Plan.chain(3)
    costs = [Cost(1.0, 1.0, saved_bytes=1, parameter_bytes=100)] * 3
    names = [name for name, schedule in SCHEDULES.items() if schedule.placement.is_plain]
    held = {name: simulate(SCHEDULES[name].steady(plan, 4), costs).peak_bytes for name in names}
    assert held["pipedream"] == (303, 202, 101)
    assert held["pipedream-vertical-sync"] == (303, 302, 301)
    assert held["pipedream-2bw"] == (203, 202, 201)


# Programs by hand


def test_an_update_is_text_like_the_others() -> None:
    assert parse("2U7") == Update(2, 7)
    assert str(Update(2, 7)) == "2U7"
    with pytest.raises(ProgramError, match="an Update has no result to send or receive"):
        parse("2U7>3")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("0F0 0B0 0S0 0U0", "0U0 is after 0S0, which has made the weights by then"),
        ("0F0 0B0 0U0 0F1 0B1 0S1", "0S1 is before 0S0, whose weights 0U0 has made; put 0S0 first"),
        ("0F0 0B0 0U0 0F1 0B1 0U1 0S1 0S0", "0S1 is before 0S0"),
        ("0F0 0U0 0B0 0S0", "0B0 is after 0U0, which reads its gradients"),
        ("0F0 0B0 0U0 0U0", "0U0 occurs 2 times"),
        ("0F0 0B0 0U0 0W0 0S0", "0W0 is after 0U0, which reads its gradients"),
    ],
)
def test_updates_that_do_not_fit_their_steps_are_refused(text: str, refused: str) -> None:
    with pytest.raises(ProgramError, match=refused):
        Program.parse(f"0: {text}", Plan.chain(1)).validate()


def test_an_update_of_an_earlier_program_is_stepped_first() -> None:
    before = Program.parse("0: 0F0 0B0 0U0", Plan.chain(1))
    carried = carried_after(before)
    assert carried == {Backward(0, 0), Update(0, 0)}
    Program.parse("0: 0F1 0S0 0B1 0S1", Plan.chain(1), carried).validate()
    with pytest.raises(ProgramError, match="0S1 is before 0S0"):
        Program.parse("0: 0F1 0B1 0S1", Plan.chain(1), carried).validate()


def test_gradients_of_weights_that_are_left_for_later_go_with_updates() -> None:
    program = Program.parse("0: 0F0 0B0 0W0 0U0 0F1 0S0 0B1 0W1 0S1", Plan.chain(1))
    program.validate()
    assert BackwardWeight(0, 1) in program.instructions
    assert versions(program).live == (2,)
