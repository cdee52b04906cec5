"""What measured steps say of the stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node
from pipecompile.ir.instruction import Step, Update
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.planning.calibration import Times, corrected, stage_times, update_seconds
from pipecompile.schedule.simulator import simulate


def test_the_seconds_of_a_backward_include_those_of_its_weights() -> None:
    plan = Plan.chain(1)
    program = Program.parse("0: 0F0 0B0 0F1 0B1 0W1 0W0", plan)
    timeline = simulate(program, [Cost(2.0, 6.0)], weight_part=0.25)
    (it,) = stage_times([Cost(1.0, 1.0)], timeline)
    assert (it.measured.forward, it.measured.backward) == (2.0, 6.0)


def test_the_pace_of_a_plan_is_that_of_its_busiest_rank() -> None:
    assert Plan.chain(4, (0, 1, 1, 0)).pace([5.0, 1.0, 2.0, 1.0]) == 6.0
    assert Plan.chain(2, replicas=(2, 1)).pace([8.0, 8.0, 3.0]) == 4.0


def test_an_update_is_not_averaged_with_the_step_that_only_takes_its_weights() -> None:
    updates = [Span(0, Update(0, k), 0.0, seconds) for k, seconds in enumerate([2.0, 3.0, 9.0])]
    steps = [Span(0, Step(0, k), 9.0, 9.0) for k in range(4)]
    own = Span(1, Step(1, 0), 1.0, 6.0)
    timeline = Timeline((*updates, *steps, own), 3)
    assert update_seconds(timeline, 3) == (3.0, 5.0, 0.0)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("above", [-1e-3, 0.0, 1e-9, 1e-3, 1.0])
def test_what_is_about_as_long_as_what_is_fixed_does_not_become_free(above: float, recomputes: bool) -> None:
    nodes = (Node("x", "input", rematerialized=True), Node("a", "tanh", (0,)), Node("b", "tanh", (1,)))
    costed = CostedGraph(Graph(nodes, (0,), (2,)), (Cost(), Cost(1.0, 2.0), Cost(1.0, 2.0)), "by hand")
    plan = Plan.of(costed.graph, [None, 0, 0])
    plan = replace(plan, recomputed=(0,) if recomputes else ())
    again, fixed = 2.0 * recomputes, Cost(0.5, 0.5)
    times = Times(Cost(2.5, 4.5 + again), Cost(0.5 + above, 0.5 + above + recomputes * (0.5 + above)), fixed)
    found = [cost.seconds for cost in corrected(costed, plan, [times]).costs[1:]]
    assert found == [pytest.approx(found[0])] * 2
    assert min(found) >= 0.5 * 3.0 * times.ratio * (1 - 1e-9)
    assert max(found) <= 3.0
