"""What it takes to split a backward: only nodes that are split are charged, and simulator and auto read one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from pairs import pipe_of
from torch import nn
from torch.nn import functional as F

from pipecompile import PlanOptions
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.halves import Halves
from pipecompile.ir.plan import Plan, members, stage_costs
from pipecompile.ir.program import Program
from pipecompile.ir.split_nodes import (
    CONVOLUTION,
    ELSEWHERE,
    PRODUCT,
    THIN,
    Splitting,
    split_nodes,
    stage_halves,
)
from pipecompile.ops.split_backward import Queue
from pipecompile.planning.calibration import Times, corrected, stage_times
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.predict import predict
from pipecompile.planning.schedule_choice import Weighing, weigh
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES, one_f_one_b
from pipecompile.schedule.simulator import simulate
from pipecompile.schedule.stage_costs import OVERHEAD

# Function, shape of the weight, what it takes to split a node that reads (2, 8, 4, 4).
KINDS: tuple[tuple[str, tuple[int, ...], Splitting | None], ...] = (
    ("linear", (4, 4), PRODUCT),
    ("addmm", (4, 4), PRODUCT),
    ("matmul", (4, 4), PRODUCT),
    ("embedding", (9, 4), PRODUCT),
    ("conv2d", (8, 8, 3, 3), CONVOLUTION),
    ("conv2d", (8, 8, 1, 1), THIN),
    ("conv2d", (8, 2, 3, 3), THIN),
    ("conv2d", (8, 1, 1, 1), THIN),
    ("layer_norm", (4,), None),
    ("gelu", (), None),
)


def drawn(seed: int, kinds: tuple[int, ...] = tuple(range(len(KINDS))), nodes: int = 12) -> tuple[CostedGraph, list]:
    """A random chain with skips, and what it takes to split each node; None for those that are not split."""
    draw = Random(seed)
    made = [Node("x", "input", outputs=(TensorSpec((2, 8, 4, 4), "float32"),), rematerialized=True)]
    costs, prints, parameters, expected = [Cost()], [Footprint()], [], [None]
    for i in range(1, nodes + 1):
        op, shape, by = KINDS[draw.choice(kinds)]
        sources = tuple(sorted({i - 1, draw.randrange(i)}))
        trained = draw.random() < 0.8
        stretch, repeats = 7 if draw.random() < 0.1 else None, draw.random() < 0.8
        if shape:
            parameters.append(Parameter(f"w{i}", TensorSpec(shape, "float32", trained)))
        spec = TensorSpec((2, 8, 4, 4), "float32", requires_grad=True)
        made.append(Node(f"n{i}", op, sources, (spec,), (f"w{i}",) if shape else ()))
        costs.append(Cost(draw.uniform(0, 1e-3), draw.uniform(0, 2e-3), 100))
        prints.append(Footprint(stretch=stretch, repeats=repeats))
        expected.append(by if trained and stretch is None else None)
    graph = Graph(tuple(made), (0,), (nodes,), tuple(parameters))
    return CostedGraph(graph, tuple(costs), "drawn", (), tuple(prints)), expected


@pytest.mark.parametrize("seed", range(40))
def test_seconds_of_split_stages_are_those_of_their_nodes(seed: int) -> None:
    costed, expected = drawn(seed)
    plan = Plan.of(costed.graph, [None, *sorted(Random(seed).choices(range(3), k=9)), 0 if seed < 0 else 2, 2, 2])
    plan = replace(plan, recomputed=(1,) if seed % 2 and 1 in plan.stage_of else ())
    cluster = Cluster.of(["cpu", "cuda:0", "cpu"][: plan.num_stages])
    for stage, it in enumerate(stage_halves(costed, plan, cluster)):
        forward = backward = weights = 0.0
        for i, (node, cost) in enumerate(zip(costed.graph.nodes, costed.costs, strict=True)):
            if plan.stage_of[i] != stage:
                continue
            again, by = stage in plan.recomputed, expected[i]
            forward += cost.forward
            backward += cost.forward * again
            if by is None or (again and costed.footprints[i].repeats):
                backward += cost.backward
                continue
            on_cpu = cluster.devices[plan.rank_of[stage]].is_cpu
            by = by if on_cpu else ELSEWHERE
            forward += by.forward
            alone = all(source == 0 for source in node.inputs)  # x needs no gradient
            backward += by.backward + by.factor * cost.backward * (0 if alone else 0.5)
            weights += by.weights + by.factor * cost.backward * (1 if alone else 0.5)
        assert (it.forward, it.backward, it.weights) == pytest.approx((forward, backward, weights))


def test_the_graphs_that_are_drawn_have_all_kinds() -> None:
    found = Counter(by for seed in range(40) for by in drawn(seed)[1])
    assert {PRODUCT, CONVOLUTION, THIN, None} == set(found)


def test_a_stage_without_nodes_to_split_takes_what_it_took() -> None:
    costed, _ = drawn(0, kinds=(8, 9))
    plan = Plan.of(costed.graph, [None, *[0] * 6, *[1] * 6])
    for cost, it in zip(stage_costs(costed, plan), stage_halves(costed, plan), strict=True):
        assert (it.forward, it.backward, it.weights) == (cost.forward, cost.backward, 0.0)


def test_a_simulated_microbatch_takes_the_split_seconds() -> None:
    program = Program.parse("0: 0F0 0B0 0W0\n1: 1F0 1B0 1W0", Plan.chain(2))
    halves = [Halves(1.25, 2.5, 0.75), Halves(3.5, 4.25, 40.0)]
    costs = [Cost(1.0, 2.0), Cost(3.0, 4.0)]
    assert simulate(program, costs, halves=halves).makespan == 1.25 + 3.5 + 4.25 + 40.0
    part = Program.parse("0: 0F0 0F1 0B0 0W0 0B1\n1: 1F0 1B0 1F1 1B1", Plan.chain(2))
    spans = {str(span.instruction): span.seconds for span in simulate(part, costs, halves=halves).spans}
    assert (spans["0F0"], spans["0B0"], spans["0W0"]) == (1.25, 2.5, 0.75)
    assert (spans["0F1"], spans["0B1"], spans["1B0"]) == (1.0, 2.0, 4.0)  # whole backwards


def chosen(costed: CostedGraph, count: int = 8) -> str:
    work = Workload(schedule=one_f_one_b, microbatches=count, optimizer_state=0.0, recompute="never")
    return weigh(costed, Cluster.of(["cpu"] * 2), work, PlanOptions(stages_per_rank=1))[0].schedule


def equal(op: str, weight: tuple[int, ...], forward: float) -> CostedGraph:
    spec = TensorSpec((2, 8, 4, 4), "float32", requires_grad=True)
    made = [Node("x", "input", outputs=(replace(spec, requires_grad=False),), rematerialized=True)]
    made += [Node(f"n{i}", op, (i,), (spec,), (f"w{i}",)) for i in range(8)]
    parameters = tuple(Parameter(f"w{i}", TensorSpec(weight, "float32", True)) for i in range(8))
    graph = Graph(tuple(made), (0,), (8,), parameters)
    return CostedGraph(graph, (Cost(), *[Cost(forward, 2 * forward, 100)] * 8), "by hand")


def test_auto_splits_products_and_not_depthwise_convolutions() -> None:
    products, depthwise = equal("linear", (4, 4), 2e-2), equal("conv2d", (8, 1, 3, 3), 2e-2)
    assert chosen(products).startswith("zb")
    assert chosen(depthwise) in ("1f1b", "gpipe")
    assert chosen(equal("linear", (4, 4), 1e-4)) in ("1f1b", "gpipe")  # what F notes is more than the bubble


@pytest.mark.parametrize("seed", range(3))
def test_auto_weighs_what_the_simulator_predicts(seed: int) -> None:
    costed, _ = drawn(seed)
    cluster = Cluster.of(["cpu"] * 2)
    work = Workload(schedule=one_f_one_b, microbatches=4, optimizer_state=0.0, recompute="never")
    weighing = Weighing(costed=costed, cluster=cluster, work=work, options=PlanOptions(search_seconds=0.1))
    for name in ("1f1b", "zb-h1", "zb-v"):
        placement = SCHEDULES[name].placement
        found = weighing.of(name, placement)
        plan = weighing.plans[placement]
        program = SCHEDULES[name].program(plan, 4)
        per_rank = plan.num_stages // 2
        overhead = OVERHEAD * (max(map(len, program.ranks)) + 2 * (plan.num_stages - per_rank))
        assert found.seconds == pytest.approx(predict(program, costed, cluster).makespan + overhead)


def test_a_corrected_split_stage_takes_what_was_measured() -> None:
    costed, _ = drawn(3, kinds=(0, 4, 8))
    plan = Plan.of(costed.graph, [None, *[0] * 6, *[1] * 6])
    halves = stage_halves(costed, plan)
    assert all(split_nodes(costed, members(costed.graph, plan, stage)) for stage in range(2))
    program = SCHEDULES["zb-h1"].program(plan, 4)
    slow = [Halves(1.5 * it.forward, 2 * it.backward, 2 * it.weights) for it in halves]
    measured = simulate(program, stage_costs(costed, plan), halves=slow)
    times = stage_times(stage_costs(costed, plan), measured, halves)
    assert [it.predicted for it in times] == [it.cost for it in halves]
    fixed = stage_halves(corrected(costed, plan, times), plan)
    for it, now in zip(times, fixed, strict=True):
        assert now.cost.backward == pytest.approx(it.measured.backward)
        assert now.cost.forward == pytest.approx(it.measured.forward)
    whole = stage_times(stage_costs(costed, plan), simulate(one_f_one_b(plan, 4), stage_costs(costed, plan)), halves)
    assert [it.predicted for it in whole] == list(stage_costs(costed, plan))
    tiny = Times(Cost(2.0, 2.0), Cost(1e-9, 1e-9), Cost(1.0, 1.0))  # less than what is fixed
    assert all(cost.seconds >= 0 for cost in corrected(costed, plan, [tiny, tiny]).costs)


def convolved(h: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.conv1d(h.transpose(1, 2), weight, **options).transpose(1, 2)


class Middle(nn.Module):
    """A function with weights between two linear layers."""

    def __init__(self, run: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.run, self.first, self.last = run, nn.Linear(8, 8), nn.Linear(8, 8)
        self.own = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.run(h, *self.own))).square().mean((1, 2)).sum()


MIDDLES: dict[str, tuple[int, Callable[[], Middle]]] = {  # gradients that are left by the function between the layers
    "x @ w": (1, lambda: Middle(lambda h, w: h @ w, (8, 8))),
    "w @ x": (0, lambda: Middle(lambda h, w: (w @ h.transpose(1, 2)).transpose(1, 2), (8, 8))),
    "a batch of weights": (0, lambda: Middle(torch.matmul, (1, 8, 8))),
    "torch.mm": (0, lambda: Middle(lambda h, w: torch.mm(h.flatten(0, 1), w).view_as(h), (8, 8))),
    "baddbmm": (0, lambda: Middle(lambda h, w, b: torch.baddbmm(b, h, w.expand(len(h), 8, 8)), (1, 8, 8), (1, 1, 8))),
    "addmm": (1, lambda: Middle(lambda h, w, b: torch.addmm(b, h.flatten(0, 1), w).view_as(h), (8, 8), (8,))),
    "addmm, scaled": (
        0,
        lambda: Middle(lambda h, w, b: torch.addmm(b, h.flatten(0, 1), w, beta=2).view_as(h), (8, 8), (8,)),
    ),
    "a bias that is computed": (0, lambda: Middle(lambda h, w, b: F.linear(h, w, 2 * b), (8, 8), (8,))),
    "a convolution": (1, lambda: Middle(partial(convolved, padding=1), (8, 8, 3))),
    "of the same size": (0, lambda: Middle(partial(convolved, padding="same"), (8, 8, 3))),
    "transposed": (0, lambda: Middle(lambda h, w: F.conv_transpose1d(h.mT, w, padding=1).mT, (8, 8, 3))),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_a_node_is_charged_if_it_leaves_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves, make = MIDDLES[name]
    model = make().double()
    unsplit, x, left, empty = deepcopy(model), torch.randn(8, 5, 8, dtype=torch.float64), list[int](), Queue.empty
    pipe = pipe_of(model, 2, schedule="zb-h1", microbatches=4)
    pipe(x)  # the first call runs twice, to verify the other
    monkeypatch.setattr(Queue, "empty", lambda queue: (left.append(len(queue.waiting)), empty(queue)))
    pipe(x).backward()
    unsplit(x).backward()
    planned = pipe.pipeline._capture_in_use.planned
    charged = [split_nodes(planned.costed, members(planned.costed.graph, planned.plan, s)) for s in range(2)]
    assert sum(left) == 4 * sum(map(len, charged)) == 4 * (2 + leaves)
    mine = dict(pipe.named_parameters())
    for path, parameter in unsplit.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(mine[path].grad, parameter.grad)


class Mixed(nn.Module):
    """All kinds of nodes that are split, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.first, self.deep = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.norm, self.frozen = nn.LayerNorm(8), nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 8)
        self.square = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.deep(torch.relu(self.first(self.words(x).transpose(1, 2)))).transpose(1, 2)
        h = self.last(self.frozen(self.norm(h)) @ self.square)
        return h.square().mean()


class MixedInBfloat16(Mixed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("casts", ["no", "the caller", "the model"])
def test_the_nodes_that_are_charged_are_those_that_leave_something(casts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left: Counter[int] = Counter()
    empty = Queue.empty
    model = {"no": Mixed().double, "the caller": Mixed, "the model": MixedInBfloat16}[casts]()
    pipe = pipe_of(model, 2, schedule="zb-h1", microbatches=4)
    for _ in range(2):  # the first call runs twice, to verify the other
        left.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts == "the caller"):
            loss = pipe(torch.randint(11, (8, 5)))
        loss.backward()
        monkeypatch.setattr(Queue, "empty", lambda queue: (left.update([len(queue.waiting)]), empty(queue)))
    planned = pipe.pipeline._capture_in_use.planned
    charged = [split_nodes(planned.costed, members(planned.costed.graph, planned.plan, s)) for s in range(2)]
    assert sum(map(len, charged)) == 5  # embedding, two convolutions, a product, a linear layer
    assert left == Counter({len(charged[0]): 4}) + Counter({len(charged[1]): 4})


def test_a_plan_for_a_v_has_its_halves() -> None:
    costed, _ = drawn(5)
    cluster = Cluster.of(["cpu"] * 2)
    placement = SCHEDULES["zb-v"].placement
    work = Workload(schedule=SCHEDULES["zb-v"].steady, microbatches=4, optimizer_state=0.0, placement=placement)
    plan = make_plan(costed, Request.of(PlanOptions(search_seconds=0.1), placement, 2), cluster, work)
    assert plan.times is not None
    assert plan.times.halves == stage_halves(costed, plan, cluster)
    assert Plan.from_json(plan.to_json()).times == plan.times
