"""Plans weigh what optimizers inside the pipeline take."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipecompile import PlanOptions
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, Setting, TensorSpec
from pipecompile.ir.instruction import Step, Update
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.planning.updates import UpdateCost, update_seconds_of, updates_per_microbatch
from pipecompile.profile.update_cost import update_cost
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.simulator import simulate

COST = UpdateCost(per_parameter=0.05, per_byte=1e-3)
COUNT = 4


def drawn(seed: int, nodes: int = 8) -> CostedGraph:
    draw = Random(seed)
    spec = TensorSpec((1,), "float32", requires_grad=True)
    made, parameters = [Node("x", "input", outputs=(spec,), rematerialized=True)], []
    for i in range(1, nodes + 1):
        names = tuple(f"w{i}.{k}" for k in range(draw.randint(0, 2)))
        parameters += [
            Parameter(name, TensorSpec((draw.choice([1, 100, 900]),), "float32", draw.random() < 0.8)) for name in names
        ]
        made.append(Node(f"n{i}", "linear", (i - 1,), (spec,), names))
    costs = (Cost(), *(Cost(draw.uniform(0.5, 1.5), draw.uniform(1, 3)) for _ in range(nodes)))
    return CostedGraph(Graph(tuple(made), (0,), (nodes,), tuple(parameters)), costs, "drawn")


def work(schedule: str, update: UpdateCost | None = COST) -> Workload:
    it = SCHEDULES[schedule]
    return Workload(
        schedule=it.steady,
        microbatches=COUNT,
        optimizer_state=0.0,
        recompute="never",
        asynchronous=it.is_asynchronous,
        update=update,
    )


def slowest(costed: CostedGraph, stage_of: list[int | None], share: float) -> float:
    """The seconds per microbatch of the busiest stage, with its part of updates."""
    found: dict[int, float] = {}
    for i, stage in enumerate(stage_of):
        if stage is not None:
            mine = [p for p in costed.graph.parameters if p.name in costed.graph.nodes[i].parameters]
            trained = [p for p in mine if p.spec.requires_grad]
            update = sum(0.05 + 1e-3 * 4 * p.spec.shape[0] for p in trained)
            found[stage] = found.get(stage, 0.0) + costed.costs[i].seconds + share * update
    return max(found.values())


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("pipedream", 1.0), ("pipedream-vertical-sync", 1.0), ("pipedream-2bw", 1 / COUNT), ("1f1b", 0.0)],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_best_of_all_cuts_with_their_updates(schedule: str, share: float, seed: int) -> None:
    costed, cluster = drawn(seed), Cluster.of(["cpu"] * 3)
    plan = make_plan(
        costed, Request.of(PlanOptions(search_seconds=0.2), work(schedule).placement, 3), cluster, work(schedule)
    )
    cuts = combinations(range(1, 8), 2)
    best = min(slowest(costed, [None, *(int(i >= a) + int(i >= b) for i in range(8))], share) for a, b in cuts)
    assert slowest(costed, list(plan.stage_of), share) == pytest.approx(best)
    assert updates_per_microbatch(work(schedule).schedule, COUNT) == share


def test_an_update_of_a_stage_that_is_slow_by_it_moves_the_cut() -> None:
    spec = TensorSpec((1,), "float32", requires_grad=True)
    nodes = [Node("x", "input", rematerialized=True)]
    nodes += [Node(f"n{i}", "linear", (i,), (spec,), (f"w{i}",)) for i in range(4)]
    sizes = (5000, 1, 1, 1)
    parameters = tuple(Parameter(f"w{i}", TensorSpec((n,), "float32", True)) for i, n in enumerate(sizes))
    costed = CostedGraph(Graph(tuple(nodes), (0,), (4,), parameters), (Cost(), *[Cost(1.0, 2.0)] * 4), "by hand")
    cluster = Cluster.of(["cpu"] * 2)
    found = {}
    for name, update in (("pipedream", COST), ("pipedream", None), ("1f1b", COST)):
        it = work(name, update)
        found[name, update is None] = make_plan(
            costed, Request.of(PlanOptions(), it.placement, 2), cluster, it
        ).stage_of
    assert found["pipedream", False] == (None, 0, 1, 1, 1)
    assert found["pipedream", True] == found["1f1b", False] == (None, 0, 0, 1, 1)


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-vertical-sync", "pipedream-2bw", "1f1b"])
def test_a_predicted_step_has_its_updates(schedule: str) -> None:
    costed, cluster, it = drawn(7), Cluster.of(["cpu"] * 2), work(schedule)
    plan = Plan.of(costed.graph, [None, *[0] * 4, *[1] * 4])
    seconds = update_seconds_of(costed, plan, COST)
    assert min(seconds) > 0
    program = it.schedule(plan, COUNT)
    timeline = simulate(program, stage_costs(costed, plan), cluster, seconds)
    inside = any(isinstance(i, Step | Update) for i in program.instructions)
    assert inside == (schedule != "1f1b")
    assert it.step_seconds(costed, plan, cluster) == pytest.approx(timeline.makespan)
    more = it.step_seconds(costed, plan, cluster) - work(schedule, None).step_seconds(costed, plan, cluster)
    assert (more > 0.01) == inside
    assert it.update_seconds(costed, plan, Cluster.from_name("2xH100")) == (0.0, 0.0)  # seconds are of a CPU


class Ticking(torch.optim.SGD):
    """An optimizer whose steps take 2 s for each parameter, and 0.25 s for each byte, of a clock of its own."""

    now = 0.0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            Ticking.now += sum(2.0 + 0.25 * parameter.nbytes for parameter in group["params"])
        return super().step(closure)


def test_the_seconds_of_an_optimizer_are_a_line_over_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=lambda: Ticking.now)
    monkeypatch.setattr(sys.modules["pipecompile.profile.update_cost"], "time", clock)
    found = update_cost(partial(Ticking, lr=0.1), threads=1)
    assert found is not None
    assert (found.per_parameter, found.per_byte) == pytest.approx((2.0, 0.25))
    assert found.seconds(8) == pytest.approx(4.0)


def test_an_optimizer_that_cannot_step_has_no_seconds() -> None:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise RuntimeError("only matrices")

    assert update_cost(make, threads=1) is None


class Noisy(torch.optim.SGD):
    """An optimizer that draws random numbers, and steps on matrices only, as Muon does."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        Noisy.steps += 1
        Ticking.now += 3.0
        for group in self.param_groups:
            assert all(parameter.ndim == 2 for parameter in group["params"])
            torch.randn(3), random.random()
        return super().step(closure)


def test_a_slow_optimizer_steps_once_and_leaves_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=lambda: Ticking.now)
    monkeypatch.setattr(sys.modules["pipecompile.profile.update_cost"], "time", clock)
    monkeypatch.setattr(Noisy, "steps", 0)
    before, python = torch.get_rng_state(), random.getstate()
    assert update_cost(partial(Noisy, lr=0.1), threads=1) is not None
    assert Noisy.steps == 2  # with small parameters, and with a large one
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_updates_are_measured_with_the_threads_of_the_other_costs() -> None:
    found = []

    class Counting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    it = replace(work("pipedream"), update=partial(update_cost, partial(Counting, lr=0.1)))
    setting = Setting(device="cpu", torch="", threads=before + 1, date="", model="", inputs=())
    costed = replace(drawn(0), measured=True, setting=setting)
    it.update_seconds(costed, Plan.of(costed.graph, [None, *[0] * 8]), Cluster.of(["cpu"] * 2))
    assert {*found} == {before + 1}
    assert torch.get_num_threads() == before
