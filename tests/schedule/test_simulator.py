from collections import defaultdict
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import NBYTES, SHAPES, WHOLE, branches, costs, dag, plans, unet, units

from pipecompile.errors import DeadlockError, InputError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Recv, Send, Step, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, reads
from pipecompile.ir.timeline import Span
from pipecompile.schedule import forward_only, gpipe, one_f_one_b, pipedream, sequential
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

SIZES = [(1, 1), (2, 3), (4, 4), (4, 8), (8, 32)]


@pytest.mark.parametrize(("p", "n"), SIZES)
@pytest.mark.parametrize(("f", "b"), [(1.0, 1.0), (1.0, 2.0), (3.0, 4.0)])
def test_equal_stages_take_what_the_closed_forms_say(p, n, f, b):
    plan, stage_costs = Plan.chain(p), units(Plan.chain(p), f, b)
    assert simulate(sequential(plan, n), stage_costs).makespan == n * p * (f + b)
    assert simulate(gpipe(plan, n), stage_costs).makespan == (n + p - 1) * (f + b)
    assert simulate(one_f_one_b(plan, n), stage_costs).makespan == (n + p - 1) * (f + b)
    assert simulate(forward_only(plan, n), stage_costs).makespan == (n + p - 1) * f
    assert simulate(pipedream(plan, range(n)), stage_costs).makespan == (p - 1) * f + n * (f + b)


@pytest.mark.parametrize(("p", "n"), SIZES)
def test_the_bubble_of_equal_stages_is_p_minus_1_over_n_plus_p_minus_1(p, n):
    for schedule in (gpipe, one_f_one_b):
        timeline = simulate(schedule(Plan.chain(p), n), units(Plan.chain(p), 1, 2))
        assert timeline.bubble == pytest.approx((p - 1) / (n + p - 1))


def test_sequential_keeps_one_device_busy_at_a_time():
    timeline = simulate(sequential(Plan.chain(4), 3), units(Plan.chain(4), 1, 2))
    spans = sorted(timeline.spans, key=lambda span: span.start)
    assert len(spans) == 24
    assert all(first.end == second.start for first, second in pairwise(spans))


def test_parallel_branches_shorten_the_bubble():
    def idle(plan: Plan) -> float:
        return simulate(one_f_one_b(plan, 16), units(plan, 1, 2)).makespan - 16 * 3

    assert idle(branches()) == 12  # (depth - 1)(f + b), depth 5
    assert idle(Plan.chain(8)) == 21
    assert idle(unet(8)) == 21


@pytest.mark.parametrize(
    ("p", "n", "f", "b", "w", "c", "bubble"),
    [
        (8, 24, 18522, 18086, 9337, 601, 0.2431),
        (8, 64, 18546, 18097, 9321, 762, 0.1240),
        (8, 32, 29802, 29428, 19530, 577, 0.1898),
        (16, 64, 11307, 11254, 8101, 379, 0.2082),
    ],
)
def test_1f1b_has_the_bubbles_published_for_measured_profiles(p, n, f, b, w, c, bubble):
    # Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), the table of 1F1B in efficiency.py
    cluster = Cluster.of(["gpu"] * p, Link(bandwidth=1e30, latency=c))
    timeline = simulate(one_f_one_b(Plan.chain(p), n), [Cost(f, b + w)] * p, cluster)
    assert round(timeline.bubble, 4) == bubble


def longest_path(program: Program, stage_costs: list[Cost], seconds: float) -> float:
    """The makespan as the longest path through rows, reads and links.

    A read is an edge over a transfer, which takes ``seconds`` if it is of another rank. A link is a row of transfers:
    what a rank makes for another goes over in the order of its row.
    """
    graph = nx.DiGraph()
    rank_of = program.plan.rank_of
    transfers = {(result, i.stage) for i in program.instructions for result in reads(i, program.plan)}
    links: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for row in program.ranks:
        graph.add_edges_from((((i, "end"), (j, "start")) for i, j in pairwise(row)), weight=0.0)
        for i in row:
            cost = stage_costs[i.stage]
            graph.add_edge((i, "start"), (i, "end"), weight=cost.forward if "F" in str(i) else cost.backward)
            for result in reads(i, program.plan):
                graph.add_edge(((result, i.stage), "end"), (i, "start"), weight=0.0)
            for target in sorted(target for result, target in transfers if result == i):
                apart = rank_of[target] != rank_of[i.stage]
                graph.add_edge((i, "end"), ((i, target), "start"), weight=0.0)
                graph.add_edge(((i, target), "start"), ((i, target), "end"), weight=seconds * apart)
                if apart:
                    links[rank_of[i.stage], rank_of[target]].append((i, target))
    for link in links.values():
        graph.add_edges_from((((i, "end"), (j, "start")) for i, j in pairwise(link)), weight=0.0)
    return nx.dag_longest_path_length(graph)


plans_and_costs = plans().flatmap(lambda plan: st.tuples(st.just(plan), costs(plan)))
names = st.sampled_from(sorted(WHOLE))


@given(plans_and_costs, names, st.integers(1, 5), st.integers(0, 4))
def test_the_makespan_is_the_longest_path(plan_and_costs, name, num_microbatches, seconds):
    plan, stage_costs = plan_and_costs
    program = WHOLE[name](plan, num_microbatches)
    cluster = Cluster.of(["gpu"] * plan.num_ranks, Link(bandwidth=1e30, latency=seconds))
    timeline = simulate(program, stage_costs, cluster)
    assert timeline.makespan == pytest.approx(longest_path(program, stage_costs, seconds), rel=1e-12)


@given(plans_and_costs, names, st.integers(1, 5), st.integers(0, 4))
def test_a_lowered_program_computes_at_the_times_of_the_bare_one(plan_and_costs, name, num_microbatches, seconds):
    plan, stage_costs = plan_and_costs
    program = WHOLE[name](plan, num_microbatches)
    cluster = Cluster.of(["gpu"] * plan.num_ranks, Link(bandwidth=1e30, latency=seconds))
    bare = simulate(program, stage_costs, cluster)
    lowered = simulate(lower(program, bare), stage_costs, cluster)
    assert [span for span in lowered.spans if not isinstance(span.instruction, Send | Recv)] == list(bare.spans)
    assert lowered.peak_bytes == bare.peak_bytes


@given(plans_and_costs, names, st.integers(1, 5))
def test_a_rank_does_one_thing_at_a_time_in_the_order_of_its_row(plan_and_costs, name, num_microbatches):
    plan, stage_costs = plan_and_costs
    program = WHOLE[name](plan, num_microbatches)
    timeline = simulate(program, stage_costs)
    for rank, row in enumerate(program.ranks):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert tuple(span.instruction for span in spans) == row
        assert all(first.end <= second.start for first, second in pairwise(spans))


def test_a_transfer_takes_the_time_of_its_channel_both_ways_and_overlaps_with_computation():
    cluster = Cluster.of(["gpu"] * 2, Link(bandwidth=NBYTES, latency=1.0))  # 2 s a transfer
    program = one_f_one_b(Plan.chain(2, nbytes=NBYTES), 2)
    bare = simulate(program, [Cost(1.0, 1.0)] * 2, cluster)
    lowered = simulate(lower(program, bare), [Cost(1.0, 1.0)] * 2, cluster)
    times = {str(span.instruction): (span.start, span.end) for span in lowered.spans}
    assert times["0F0"] == (0, 1)
    assert times["0F0>1"] == times["1<0F0"] == (1, 3)
    assert times["0F1"] == (1, 2)
    assert times["1B0>0"] == times["0<1B0"] == (5, 7)
    assert times["0B0"] == (7, 8)


def test_a_link_carries_one_transfer_at_a_time_in_the_order_of_their_results():
    cluster = Cluster.of(["gpu"] * 3, Link(bandwidth=1e30, latency=2.0))
    plan = dag([(0, 1), (0, 2), (1, 2)], (0, 1, 2))
    program = gpipe(plan, 3)
    bare = simulate(program, [Cost(1.0, 1.0)] * 3, cluster)
    lowered = simulate(lower(program, bare), [Cost(1.0, 1.0)] * 3, cluster)
    times = {str(span.instruction): (span.start, span.end) for span in lowered.spans}
    assert [times[f"0F{k}>1"] for k in range(3)] == [(1, 3), (3, 5), (5, 7)]
    assert [times[f"0F{k}>2"] for k in range(3)] == [(1, 3), (3, 5), (5, 7)]  # over another link at the same time
    assert [times[f"1F{k}"] for k in range(3)] == [(3, 4), (5, 6), (7, 8)]
    assert times["2B0>1"] == (times["2B0"][1], times["2B0"][1] + 2)  # the way back is a link of its own


@given(plans_and_costs, names, st.integers(1, 5), st.integers(1, 4))
def test_no_two_transfers_are_on_a_link_at_once(plan_and_costs, name, num_microbatches, seconds):
    plan, stage_costs = plan_and_costs
    program = WHOLE[name](plan, num_microbatches)
    cluster = Cluster.of(["gpu"] * plan.num_ranks, Link(bandwidth=1e30, latency=seconds))
    lowered = simulate(lower(program, simulate(program, stage_costs, cluster)), stage_costs, cluster)
    ends = {span.instruction: span.end for span in lowered.spans}
    links: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in lowered.spans:
        if isinstance(span.instruction, Send):
            links[span.rank, plan.rank_of[span.instruction.target]].append(span)
    for link in links.values():
        ready = [ends[span.instruction.result] for span in sorted(link, key=lambda span: span.start)]
        assert ready == sorted(ready)
        assert all(first.end <= second.start for first, second in pairwise(sorted(link, key=lambda span: span.start)))


def test_nothing_is_transferred_within_a_rank():
    slow = Cluster.of(["cpu"], Link(bandwidth=1.0, latency=1e6))
    assert simulate(gpipe(Plan.chain(3, (0, 0, 0), NBYTES), 2), [Cost(1.0, 2.0)] * 3, slow).makespan == 18


def test_a_fast_device_divides_the_seconds():
    cluster = Cluster((Device("slow"), Device("fast", speed=2.0)), Link(1e30))
    timeline = simulate(sequential(Plan.chain(2), 1, step=True), [Cost(1.0, 2.0)] * 2, cluster, step_seconds=1.0)
    assert [timeline.busy(rank) for rank in range(2)] == [4.0, 2.0]


def test_steps_take_their_time_at_the_end():
    without = simulate(one_f_one_b(Plan.chain(2), 2, step=True), units(Plan.chain(2))).makespan
    assert (
        simulate(one_f_one_b(Plan.chain(2), 2, step=True), units(Plan.chain(2)), step_seconds=5).makespan == without + 5
    )


def test_the_step_of_a_slow_optimizer_is_that_of_its_stage():
    plan = Plan.chain(2)
    spans = simulate(one_f_one_b(plan, 2, step=True), units(plan), step_seconds=[1.0, 4.0]).spans
    assert [span.seconds for span in spans if isinstance(span.instruction, Step)] == [1.0, 4.0]
    with pytest.raises(InputError, match="got 1 step_seconds for 2 stages; give one per stage"):
        simulate(one_f_one_b(plan, 2, step=True), units(plan), step_seconds=[1.0])


def test_pipedream_never_idles_once_it_is_full():
    timeline = simulate(pipedream(Plan.chain(4), range(30)), units(Plan.chain(4), 1, 2))
    for rank in range(4):
        spans = [span for span in timeline.spans if span.rank == rank and span.seconds and span.start >= 12]
        assert len(spans) > 40
        assert all(first.end == second.start for first, second in pairwise(spans))


@given(plans(), st.integers(1, 8))
def test_1f1b_saves_depth_microbatches_and_gpipe_all(plan, num_microbatches):
    stage_costs = [Cost(1, 1, saved_bytes=10 ** (2 * stage)) for stage in range(plan.num_stages)]
    alone = Plan((), tuple(range(plan.num_stages)), plan.channels)
    expected = [min(depth, num_microbatches) * 10 ** (2 * stage) for stage, depth in enumerate(plan.depth)]
    assert list(simulate(one_f_one_b(alone, num_microbatches), stage_costs).peak_bytes) == expected
    expected = [num_microbatches * 10 ** (2 * stage) for stage in range(plan.num_stages)]
    assert list(simulate(gpipe(alone, num_microbatches), stage_costs).peak_bytes) == expected


def test_parameters_count_once_and_under_pipedream_once_a_version():
    plan, stage_costs = Plan.chain(3), [Cost(1, 2, saved_bytes=1, parameter_bytes=100)] * 3
    assert simulate(one_f_one_b(plan, 9), stage_costs).peak_bytes == (103, 102, 101)
    assert simulate(pipedream(plan, range(9)), stage_costs).peak_bytes == (303, 202, 101)


def test_the_stages_of_a_rank_add_up_at_the_time_of_their_peak():
    plan = Plan.chain(2, (0, 0))
    stage_costs = [Cost(1, 1, saved_bytes=1, parameter_bytes=100), Cost(1, 1, saved_bytes=10, parameter_bytes=1000)]
    assert simulate(sequential(plan, 2), stage_costs).peak_bytes == (1111,)
    assert simulate(gpipe(plan, 2), stage_costs).peak_bytes == (1122,)


def test_what_is_carried_is_there_at_the_start():
    program = Program.parse("0: 0B0\n1:", Plan.chain(2), carried=map(parse, ["0F0", "1F0", "1B0"]))
    timeline = simulate(program, [Cost(1, 2, saved_bytes=7)] * 2)
    assert [(span.start, span.end) for span in timeline.spans] == [(0, 2)]
    assert timeline.peak_bytes == (7, 7)


def test_an_empty_program_takes_no_time():
    timeline = simulate(Program(Plan.chain(2), ((), ())), units(Plan.chain(2)))
    assert (timeline.makespan, timeline.bubble, timeline.spans) == (0.0, 0.0, ())


def test_a_timeline_prints_its_spans_by_rank_and_start():
    timeline = simulate(sequential(Plan.chain(2), 1), [Cost(1.5, 2.0)] * 2)
    assert str(timeline) == rows_as_printed


rows_as_printed = """7 s, bubble 50.0%
  rank 0  0 - 1.5  0F0
  rank 0  5 - 7  0B0
  rank 1  1.5 - 3  1F0
  rank 1  3 - 5  1B0"""


def test_one_cost_is_needed_for_each_stage():
    with pytest.raises(InputError, match="got 3 costs for 2 stages; give one per stage"):
        simulate(gpipe(Plan.chain(2), 1), units(Plan.chain(3)))


def test_a_device_is_needed_for_each_rank():
    with pytest.raises(InputError, match="the cluster has 1 devices, but the plan has 2 ranks"):
        simulate(gpipe(Plan.chain(2), 1), units(Plan.chain(2)), Cluster.of(["cpu"]))


def test_a_program_that_cannot_end_is_a_deadlock_here_too():
    with pytest.raises(DeadlockError, match="rank 0 waits at 0B0 for 1B0"):
        simulate(Program.parse("0: 0F0 0B0\n1: 1F0", Plan.chain(2)), units(Plan.chain(2)))


@pytest.mark.parametrize("name", SHAPES)
def test_no_shape_beats_its_busiest_rank_or_its_longest_microbatch(name):
    plan = SHAPES[name]
    timeline = simulate(one_f_one_b(plan, 6), units(plan, 1, 2))
    assert timeline.makespan >= max(map(timeline.busy, range(plan.num_ranks)))
    assert timeline.makespan >= 3 * max(plan.depth)
