"""The joint choice of a schedule and a number of microbatches is the best of all candidates, each planned alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, TensorSpec
from pipecompile.ir.plan_options import DEFAULT_PLAN, PlanOptions
from pipecompile.planning.best_schedule import for_first, with_best_pair
from pipecompile.planning.by_rows import ByRows
from pipecompile.planning.candidates import EVERY
from pipecompile.planning.joint_choice import counted, told, weigh_jointly
from pipecompile.planning.predict import predict
from pipecompile.planning.schedule_choice import ALIKE, Weighed, least_seconds, weigh
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES, one_f_one_b

BATCH, COUNTS = 16, (1, 2, 4, 8)


def graph_at(seed: int, rows: int) -> CostedGraph:
    """A random graph of layers, some with two inputs, with seconds and bytes that are lines over rows."""
    draw = random.Random(seed)
    nodes = [Node("x", "input", outputs=(TensorSpec((rows, 4), "float32"),), rematerialized=True)]
    costs, per_call, per_row = [Cost()], draw.choice([0.0, 1e-3, 8e-3]), draw.choice([1e-3, 4e-3])
    for index in range(1, 8):
        sources = tuple(sorted({max(0, index - 1), draw.randrange(index)}))
        spec = TensorSpec((rows, draw.choice([4, 64])), "float32")
        nodes.append(Node(f"n{index}", "linear", inputs=sources, outputs=(spec,)))
        seconds = draw.uniform(0.5, 1.5) * (per_call + per_row * rows)
        costs.append(Cost(seconds, 2 * seconds, 1000 * rows))
    graph = Graph(tuple(nodes), inputs=(0,), outputs=(7,))
    return CostedGraph(graph=graph, costs=tuple(costs), source="drawn")


def by_rows(seed: int) -> ByRows:
    one, other = graph_at(seed, 4), graph_at(seed, 2)
    return ByRows(one=one, other=other, rows=(4, 2), batch=BATCH, at=lambda rows: graph_at(seed, rows).graph)


def workload(count: int = 4) -> Workload:
    return Workload(schedule=one_f_one_b, microbatches=count, optimizer_state=0.0, recompute="never")


def alone(seed: int, cluster: Cluster, options: PlanOptions) -> list[Weighed]:
    """Each candidate, from the true costs of each number of microbatches by itself."""
    return [
        it
        for count in COUNTS
        for it in weigh(graph_at(seed, BATCH // count), cluster, workload(count), options)
        if it.seconds is not None
    ]


def devices(memory: int | None, count: int = 2) -> Cluster:
    cluster = Cluster.of(["cpu"] * count)
    return replace(cluster, devices=tuple(replace(device, memory=memory) for device in cluster.devices))


ONE_EACH = PlanOptions(stages_per_rank=1)  # fewer schedules


@pytest.mark.parametrize(
    ("seed", "memory", "options"),
    [(0, None, DEFAULT_PLAN), (1, None, DEFAULT_PLAN), (2, None, ONE_EACH), (0, 60_000, ONE_EACH)],
    ids=["by row", "both", "by call", "limited"],
)
def test_the_choice_is_the_best_of_all_candidates(seed: int, memory: int | None, options: PlanOptions) -> None:
    cluster = devices(memory)
    expected = alone(seed, cluster, options)
    least = min(it.seconds for it in expected if it.seconds is not None)
    found = weigh_jointly(by_rows(seed), cluster, workload(), options, COUNTS, seconds=1e9)
    assert len({(it.schedule, it.microbatches) for it in found}) == len(found) == len(list(EVERY.placed(options))) * 4
    best = found[0]
    assert best.seconds is not None
    assert least * (1 - 1e-4) <= best.seconds <= least * ALIKE * (1 + 1e-4)
    near = [it for it in expected if it.seconds is not None and it.seconds <= least * ALIKE * (1 - 1e-4)]
    assert best.peak_bytes <= min(it.peak_bytes for it in near)
    known = {(it.schedule, it.microbatches): it.seconds for it in expected}
    for it in found:
        if it.seconds is not None:
            assert it.seconds == pytest.approx(known[it.schedule, it.microbatches], rel=1e-4), it


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_step_is_shorter_than_its_bound(ranks: int) -> None:
    cluster, compared = devices(None, ranks), 0
    for seed, options in ((0, DEFAULT_PLAN), (1, ONE_EACH), (2, ONE_EACH)):
        for count in (1, 3, 8):
            costed = graph_at(seed, 2)
            placed = dict(EVERY.placed(options))
            for it in weigh(costed, cluster, workload(count), options):
                if it.seconds is not None:
                    bound = least_seconds(costed, cluster, it.schedule, placed[it.schedule], count)
                    assert 0 < bound <= it.seconds * (1 + 1e-9), it
                    compared += 1
    assert compared > 20


def test_memory_forces_a_larger_number() -> None:
    options, tight = ONE_EACH, devices(30_000)
    free = weigh_jointly(by_rows(1), devices(None), workload(), options, COUNTS)
    found = weigh_jointly(by_rows(1), tight, workload(), options, COUNTS)
    assert found[0].seconds is not None
    assert found[0].peak_bytes <= 30_000 < max(it.peak_bytes for it in free)
    refused = {it.microbatches for it in found if it.refused and not it.left_out}
    assert 1 in refused
    assert found[0].microbatches > 1
    plan = for_first(found, by_rows(1).costed(found[0].microbatches), tight, workload(found[0].microbatches), options)
    assert plan.schedule == found[0].schedule
    assert max(plan.memory().ranks) <= 30_000


def test_the_step_that_is_told_is_that_of_the_plan_that_runs() -> None:
    """Its own costs, of a microbatch of its size, are not those on the line through two other sizes."""
    of_all, own = by_rows(0), {count: graph_at(2, BATCH // count) for count in COUNTS}
    found = with_best_pair(of_all, devices(None), workload(), DEFAULT_PLAN, COUNTS, own.__getitem__)
    first, count = found.weighed[0], found.work.microbatches
    assert (first.schedule, first.microbatches) == (found.schedule, count)
    program = SCHEDULES[found.schedule].program(found.plan, count)
    step = predict(program, own[count], found.cluster).makespan
    assert first.seconds == pytest.approx(step, rel=0.05)  # with the runtime's seconds
    before = weigh_jointly(of_all, devices(None), workload(), DEFAULT_PLAN, COUNTS)[0].seconds
    assert before is not None
    assert abs(before / step - 1) > 0.05


def test_what_is_left_out_is_said_with_its_bound() -> None:
    found = weigh_jointly(by_rows(0), devices(None), workload(), DEFAULT_PLAN, COUNTS, seconds=0.0)
    planned = [it for it in found if it.seconds is not None]
    out = [it for it in found if it.left_out]
    assert len(planned) == 1
    assert len(out) > 30
    lines = list(told(found))
    assert lines[0] == str(planned[0])
    said = [line for line in lines if line.startswith("not planned with ")]
    assert len({line.partition(",")[0] for line in said}) == len(COUNTS)
    assert all("; at least " in line for line in said)
    names = [name for line in said for name in line.partition(": ")[2].partition(";")[0].split(", ")]
    assert sorted(names) == sorted(it.schedule for it in out)
    assert {it.refused for it in out} == {"since they cannot be shorter", "since the search took 0"}
    assert all(it.least is not None and it.least > planned[0].seconds for it in out if "shorter" in it.refused)
    steps = counted(found, by_rows(0))
    assert steps is not None
    assert (steps.chosen, steps.step) == (planned[0].microbatches, planned[0].seconds)


def test_the_best_have_lines_of_their_own_and_the_others_share_them() -> None:
    planned = [Weighed(f"s{index}", 1, seconds=0.001 * index, microbatches=2 + index % 2) for index in range(1, 13)]
    refused = [Weighed(f"r{index}", 1, refused=f"why {index}", microbatches=4) for index in range(10)]
    assert list(told([*planned, *refused])) == [
        *map(str, planned[:8]),
        "longer with 2 microbatches: s10, s12; 10.0 ms to 12.0 ms",
        "longer with 3 microbatches: s9, s11; 9.00 ms to 11.0 ms",
        *map(str, refused[:8]),
        "refused too with 4 microbatches: r8, r9",
    ]


def test_sizes_that_keep_other_values_have_no_fewer_microbatches_within_memory() -> None:
    one, other = graph_at(0, 4), graph_at(0, 2)
    odd = replace(other, storages=(*other.storages, 8))
    rows = ByRows(one=one, other=odd, rows=(4, 2), batch=BATCH, at=lambda rows: graph_at(0, rows).graph)
    assert not rows.knows_memory
    found = weigh_jointly(rows, devices(10**9), workload(), ONE_EACH, COUNTS)
    assert {it.microbatches for it in found} == {4, 8}
