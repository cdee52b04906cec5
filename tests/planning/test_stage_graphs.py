"""Two branches: a plan whose stages are a graph has a shorter step than one in which they are in a row."""

from __future__ import annotations

import pytest
import torch
from costed import Builder
from plans import branches, units
from torch import Tensor, nn

import pipecompile
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.planning.planned import planned
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.simulator import simulate

LAYERS = 6


def towers(in_a_row: bool) -> CostedGraph:
    """Two towers on two inputs and a head that reads both. In a row, a tower hands on what the other one reads."""
    b = Builder()
    left, right = b.input("left", 1, 8, dtype="float32"), b.input("right", 1, 8, dtype="float32")
    label = b.input("label", 1, 8, dtype="float32")
    left = _tower(b, "left", left)
    right = b.call("handed_on", [left, right], 1, 8) if in_a_row else right
    right = _tower(b, "right", right)
    b.path = "head"
    out = b.call("loss", [left, right, label], 1)
    costed = b.costed([out])
    costs = tuple(Cost(1.0, 2.0, 32) if node.op == "linear" else Cost() for node in costed.graph.nodes)
    return CostedGraph(costed.graph, costs, "by hand")


def _tower(b: Builder, name: str, value: int) -> int:
    for layer in range(LAYERS):
        b.path = f"{name}.{layer}"
        value = b.call("linear", [value], 1, 8, weights={f"{name}.{layer}.weight": (8, 8)})
    return value


@pytest.mark.parametrize(("schedule", "shorter"), [("1f1b", 9.0), ("gpipe", 9.0), ("zb-h1", 3.0)])
def test_a_plan_of_two_towers_is_a_graph_and_its_step_is_shorter_than_in_a_row(schedule: str, shorter: float) -> None:
    cluster = Cluster(tuple(Device(f"rank {rank}") for rank in range(4)))
    work = Workload(SCHEDULES[schedule].steady, 4)
    found = {row: planned(towers(row), cluster, work, PlanOptions()) for row in (False, True)}
    seconds = {row: work.step_seconds(each.costed, each.plan, cluster) for row, each in found.items()}
    for each in found.values():  # equal stages of three layers
        assert [cost.seconds for cost in stage_costs(each.costed, each.plan)] == [9.0] * 4
    assert {row: max(each.plan.depth) for row, each in found.items()} == {False: 3, True: 4}
    assert seconds[True] - seconds[False] == pytest.approx(shorter, abs=0.01)  # what one stage adds to the bubble


def test_eight_stages_in_two_branches_wait_as_long_as_five_in_a_row() -> None:
    microbatches, (graph, row) = 16, (branches(), Plan.chain(8))
    for plan, waits in ((graph, 4 * 3), (row, 7 * 3)):
        program = SCHEDULES["1f1b"].with_flush(plan, microbatches)
        assert simulate(program, units(plan, 1, 2)).makespan - 3 * microbatches == waits


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Bilinear(8, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.left(x), self.right(y)).square().mean()


def test_stages_of_a_captured_model_are_a_graph_too() -> None:
    pins = {"left": 0, "right": 1, "head": 2}
    example = {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}
    pipe = pipecompile.compile(
        Towers(), ["cpu"] * 3, microbatches=4, costs="count", plan=PlanOptions(pins=pins), example_inputs=example
    )
    assert {(c.source, c.target) for c in pipe.pipeline.plan.channels} == {(0, 2), (1, 2)}
    for plan, seconds in ((pipe.pipeline.plan, 4 * 3 + 3), (Plan.chain(3), 4 * 3 + 2 * 3)):
        program = SCHEDULES["1f1b"].with_flush(plan, 4)
        assert simulate(program, units(plan, 1, 2)).makespan == seconds
