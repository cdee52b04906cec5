"""Memory over time agrees with the peaks that planning computes, for any plan and schedule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from costed import by_time, gpt2, unet
from long import some

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.instruction import Forward
from pipecompile.ir.plan import Plan, stage_costs, with_replicas
from pipecompile.planning.memory import TailBytes
from pipecompile.planning.training_spec import Workload
from pipecompile.render.memory_levels import STEP_SHARE, memory_levels
from pipecompile.render.page import Level
from pipecompile.schedule import SCHEDULES, one_f_one_b
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

COSTED = {"gpt2": gpt2(layers=4, width=48, words=600), "unet": unet()}


def levels_of(
    costed: CostedGraph,
    plan: Plan,
    work: Workload,
    cluster: Cluster,
    buffers: tuple[int, ...] = (),
    lowered: bool = False,
) -> tuple[tuple[Level, ...], ...]:
    program, costs = work.schedule(plan, work.microbatches), stage_costs(costed, plan)
    timeline = simulate(program, costs, cluster)
    if lowered:
        program = lower(program, timeline)
    return memory_levels(costed, plan, program, timeline, work, cluster, buffers)


def plans(costed: CostedGraph) -> dict[str, Plan]:
    plain = by_time(costed, 4)
    replica_of = with_replicas((1, 2, 1, 3))
    first = sorted(set(replica_of))
    stage_of = [None if stage is None else first[stage] for stage in plain.stage_of]
    return {
        "plain": plain,
        "replicas": Plan.of(costed.graph, stage_of, replica_of=replica_of),
        "two a rank": replace(plain, rank_of=(0, 1, 1, 0)),
        "recomputed": replace(plain, recomputed=(1, 2)),
    }


def is_possible(model: str, kind: str, schedule: str) -> bool:
    """Whether a schedule takes a plan: GPT-2's tied weights and replicas are refused by some; V shapes need two."""
    if SCHEDULES[schedule].is_asynchronous:
        return (model, kind) in (("unet", "plain"), ("unet", "recomputed"))
    if SCHEDULES[schedule].placement.turns:
        return kind == "two a rank"
    return kind != "replicas" or schedule in ("sequential", "gpipe", "1f1b")


CASES = [
    (model, kind, schedule)
    for model in COSTED
    for kind in ("plain", "replicas", "two a rank", "recomputed")
    for schedule in SCHEDULES
    if is_possible(model, kind, schedule)
]


@pytest.mark.parametrize(("model", "kind", "schedule"), CASES)
def test_the_highest_level_is_the_planned_peak(model, kind, schedule):
    costed, policy = COSTED[model], SCHEDULES[schedule]
    plan = plans(costed)[kind]
    for devices, fused, lowered in some([("cpu", False, False), ("cuda:0", False, False), ("cuda:0", True, True)]):
        cluster = Cluster.of([devices] * plan.num_ranks)
        work = Workload(
            policy.program, 5, 1.5, tail=TailBytes(1 << 20), fused=fused, asynchronous=policy.is_asynchronous
        )
        buffers = tuple(range(plan.num_stages))
        levels = levels_of(costed, plan, work, cluster, buffers, lowered)
        peaks = work.memory(costed, plan, cluster, buffers).ranks
        assert tuple(max(level.nbytes for level in of_rank) for of_rank in levels) == peaks


def test_levels_cover_the_timeline_and_the_step_after_it():
    costed = COSTED["gpt2"]
    plan, work = by_time(costed, 3), Workload(one_f_one_b, 4)
    cluster = Cluster.of(["cpu"] * 3)
    timeline = simulate(one_f_one_b(plan, 4), stage_costs(costed, plan), cluster)
    for rank, levels in enumerate(levels_of(costed, plan, work, cluster)):
        assert levels[0].start == 0
        assert all(a.end == pytest.approx(b.start) for a, b in pairwise(levels))
        assert levels[-1].end == pytest.approx((1 + STEP_SHARE) * timeline.makespan)
        said = [level.words for level in levels]
        for span in timeline.spans:
            if span.rank == rank and isinstance(span.instruction, Forward):
                assert f"during {span.instruction}" in said


def test_a_program_without_backwards_has_no_memory_of_training():
    costed = COSTED["gpt2"]
    plan = by_time(costed, 2)
    program = one_f_one_b(plan, 2)
    forwards = replace(program, ranks=tuple(tuple(i for i in row if isinstance(i, Forward)) for row in program.ranks))
    timeline = simulate(forwards, [Cost(1.0, 2.0)] * 2)
    assert memory_levels(costed, plan, forwards, timeline, Workload(one_f_one_b, 2), Cluster.of(["cpu"] * 2)) == ()
