from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import WHOLE, branches, plans, rows, unet

from pipecompile.ir.instruction import Backward, Forward, Step
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, linearize
from pipecompile.ir.weight_versions import Versions, versions
from pipecompile.schedule import backward_only, carried_after, drain, gpipe, one_f_one_b, pipedream


def used(found: Versions, stage: int) -> list[int]:
    """The versions of a stage by microbatch."""
    return [
        version for i, version in sorted(found.used.items(), key=lambda item: item[0].microbatch) if i.stage == stage
    ]


@given(plans(), st.integers(1, 6), st.sampled_from(sorted(WHOLE)), st.booleans())
def test_schedules_with_a_flush_hold_one_version(plan, num_microbatches, name, step):
    found = versions(WHOLE[name](plan, num_microbatches, step=step))
    assert len(found.used) == plan.num_stages * num_microbatches
    assert set(found.used.values()) == {0}
    assert found.live == (1,) * plan.num_stages
    assert found.latest == (int(step),) * plan.num_stages


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_stage_s_of_a_pipedream_chain_holds_stages_minus_s_versions_and_no_more(num_stages):
    found = versions(pipedream(Plan.chain(num_stages), range(3 * num_stages)))
    assert found.live == tuple(num_stages - stage for stage in range(num_stages))


@given(plans(), st.integers(1, 15))
def test_pipedream_delays_by_depth_minus_one(plan, num_microbatches):
    found = versions(pipedream(plan, range(num_microbatches)))
    for stage, depth in enumerate(plan.depth):
        assert used(found, stage) == [max(0, k - depth + 1) for k in range(num_microbatches)]


@given(plans(), st.sets(st.integers(1, 14), min_size=1, max_size=5).map(sorted))
def test_versions_of_segments_go_on_from_one_to_the_next(plan, ends):
    whole = versions(pipedream(plan, range(ends[-1])))
    before, carried = None, frozenset()
    for first, last in pairwise([0, *ends]):
        program = pipedream(plan, range(first, last), carried)
        carried, before = carried_after(program), versions(program, before)
        for stage in range(plan.num_stages):
            assert used(before, stage)[-(last - first) :] == used(whole, stage)[first:last]
    assert before.latest == whole.latest
    assert versions(drain(plan, carried), before).latest == (ends[-1],) * plan.num_stages


def test_the_live_versions_of_a_segment_count_those_that_it_carries():
    plan = Plan.chain(3)
    first = pipedream(plan, range(5))
    second = pipedream(plan, range(5, 6), carried_after(first))
    found = versions(second, versions(first))
    assert used(found, 0) == [1, 2, 3]
    assert found.live == (3, 2, 1)


def test_a_step_every_second_microbatch_holds_two_versions():
    program = Program.parse(
        """
        0: 0F0 0F1 0B0 0F2 0B1 0S1 0F3 0B2 0F4 0B3 0S3 0F5
        1: 1F0 1B0 1F1 1B1 1S1 1F2 1B2 1F3 1B3 1S3 1F4 1F5
        """,
        Plan.chain(2),
    )
    found = versions(program)
    assert used(found, 0) == [0, 0, 0, 1, 1, 2]
    assert used(found, 1) == [0, 0, 1, 1, 2, 2]
    assert found.live == (2, 1)


def test_a_step_between_a_forward_and_its_backward_stashes_a_version():
    found = versions(Program.parse("0: 0F0 0F1 0B0 0S0 0B1 0S1", Plan.chain(1)))
    assert (used(found, 0), found.live, found.latest) == ([0, 0], (2,), (2,))


def test_forwards_that_are_carried_used_the_version_at_the_start():
    found = versions(backward_only(Plan.chain(2), 3, step=True))
    assert (used(found, 0), found.live, found.latest) == ([0, 0, 0], (1, 1), (1, 1))


def test_a_next_step_starts_at_the_version_that_the_last_one_left():
    plan = Plan.chain(2)
    found = versions(one_f_one_b(plan, 2, step=True), versions(gpipe(plan, 2, step=True)))
    assert (used(found, 0), used(found, 1), found.latest) == ([1, 1], [1, 1], (2, 2))


def test_versions_print_as_a_table():
    assert str(versions(pipedream(Plan.chain(2), range(4)))) == rows("""
        stage 0: F0:0 F1:0 F2:1 F3:2; at most 2 live, 3 at the end
        stage 1: F0:0 F1:1 F2:2 F3:3; at most 1 live, 4 at the end
    """)


# numbers: stages multiply what they read, summed, by one weight; the loss is the square of the sum of the sinks


def trained(program: Program, rate: float = 0.01) -> list[float]:
    """The weights after a program, each Forward with the version that ``versions`` says."""
    plan, table = program.plan, versions(program).used
    weights = [[1.0 + stage / 10] for stage in range(plan.num_stages)]
    inputs, grads, gradient = {}, {}, {}
    for _, i in linearize(program):
        key, stage = (i.stage, i.microbatch), i.stage
        if isinstance(i, Forward):
            read = sum(inputs[c.source, i.microbatch][1] for c in plan.incoming[stage])
            x = read if plan.incoming[stage] else 1.0 + i.microbatch / 7
            inputs[key] = (x, x * weights[stage][table[i]])
        elif isinstance(i, Backward):
            g = sum(grads[c.target, i.microbatch] for c in plan.outgoing[stage])
            g = g if plan.outgoing[stage] else 2 * inputs[key][1]
            grads[key] = g * weights[stage][table[Forward(*key)]]
            gradient[stage] = g * inputs[key][0]
        elif isinstance(i, Step):
            weights[stage].append(weights[stage][-1] - rate * gradient[stage])
    return [history[-1] for history in weights]


def trained_by_recurrence(plan: Plan, num_microbatches: int, rate: float = 0.01) -> list[float]:
    """w_s^(k+1) = w_s^k - rate * grad_s L(... w_s^max(0, k - delay(s)) ...; k), with delay(s) = depth(s) - 1."""
    stages = range(plan.num_stages)
    history = [[1.0 + stage / 10] for stage in stages]
    for k in range(num_microbatches):
        w = [history[s][max(0, k - plan.depth[s] + 1)] for s in stages]
        x, y, g = {}, {}, {}
        for s in stages:
            x[s] = sum(y[c.source] for c in plan.incoming[s]) if plan.incoming[s] else 1.0 + k / 7
            y[s] = x[s] * w[s]
        for s in reversed(stages):
            g[s] = sum(g[c.target] * w[c.target] for c in plan.outgoing[s]) if plan.outgoing[s] else 2 * y[s]
            history[s].append(history[s][-1] - rate * (g[s] * x[s]))
    return [weights[-1] for weights in history]


@pytest.mark.parametrize(
    "plan", [Plan.chain(1), Plan.chain(4), unet(6), branches()], ids=["1", "4", "unet", "branches"]
)
def test_training_with_these_versions_is_the_recurrence_of_pipedream(plan):
    program = pipedream(plan, range(20))
    rest = drain(plan, carried_after(program))
    whole = Program(plan, tuple(a + b for a, b in zip(program.ranks, rest.ranks, strict=True)))
    assert trained(whole) == trained_by_recurrence(plan, 20)
    if plan.num_stages > 1:
        assert trained(whole) != trained_by_recurrence(Plan((), plan.rank_of), 20)
