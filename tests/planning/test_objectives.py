"""What a plan makes least: a stage's pace, with transfers added or overlapped, a step, or what a function says."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from plans import layers
from test_plan_search import compiled
from torch import Tensor, nn
from typer.testing import CliRunner

import pipecompile
from pipecompile.cli.main import app
from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.partition import partition
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.replicas import with_best_replicas
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SYNCHRONOUS

LINK = Link(bandwidth=1.0)  # a byte a second


def row(seconds: list[float], sends: list[int]) -> CostedGraph:
    """Nodes in a row, with the seconds of each and the bytes of its value."""
    specs = [TensorSpec((n,), "uint8") for n in sends]
    nodes = tuple(Node(f"n{i}", "relu", (i - 1,) if i else (), (spec,)) for i, spec in enumerate(specs))
    return CostedGraph(Graph(nodes, outputs=(len(nodes) - 1,)), tuple(map(Cost, seconds)), "by hand")


def ends(plan: Plan) -> list[int]:
    """The first node of each stage but the first."""
    return [i for i in range(1, len(plan.stage_of)) if plan.stage_of[i] != plan.stage_of[i - 1]]


def all_plans(costed: CostedGraph, stages: int) -> list[Plan]:
    count = len(costed.graph)
    plans = []
    for cut in combinations(range(1, count), stages - 1):
        plans.append(Plan.of(costed.graph, [sum(i >= end for end in cut) for i in range(count)]))
    return plans


def test_transfers_count_on_top_of_the_pace_or_beside_it() -> None:
    costed = row([4, 4, 2, 2, 4, 4], [1, 3, 9, 1, 1, 1])
    cluster = Cluster.of(["a", "b"], LINK)
    assert ends(partition(costed, 2, cluster)) == [4]  # 12 + 1, where the even cut takes 10 + 9
    assert ends(partition(costed, 2, cluster, objective="overlap")) == [3]  # 10 and 9 at once
    twice = row([4, 4, 2, 2, 4, 4], [1, 3, 19, 1, 1, 1])
    assert ends(partition(twice, 2, cluster, objective="overlap")) != [3]  # the link takes 19 then


def test_a_step_of_few_microbatches_would_rather_send_less() -> None:
    costed = row([6, 1, 5, 2, 6], [1, 1, 3, 40, 1])
    cluster = Cluster.of(["a", "b", "c"], LINK)
    steps = {}
    for microbatches in (1, 8):
        work = Workload(SYNCHRONOUS["1f1b"], microbatches)
        plans = [
            make_plan(costed, Request((1,) * 3, PlanOptions(objective=goal)), cluster, work)
            for goal in ("pace", "step")
        ]
        steps[microbatches] = [work.step_seconds(costed, plan, cluster) for plan in plans]
        least = min(work.step_seconds(costed, plan, cluster) for plan in all_plans(costed, 3))
        assert steps[microbatches][1] == pytest.approx(least)
    assert any(step < pace for pace, step in steps.values())


@pytest.mark.parametrize("seed", range(12))
def test_a_step_is_never_longer_for_having_been_asked_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.randint(1, 9, (9,), generator=generator).double().tolist()
    costed = row(seconds, torch.randint(1, 20, (9,), generator=generator).tolist())
    cluster, work = Cluster.of(["a", "b", "c"], LINK), Workload(SYNCHRONOUS["gpipe"], 2)
    pace, step = (
        make_plan(costed, Request((1,) * 3, PlanOptions(objective=goal)), cluster, work) for goal in ("pace", "step")
    )
    assert work.step_seconds(costed, step, cluster) <= work.step_seconds(costed, pace, cluster)
    assert step.quality is not None
    assert pace.quality is not None
    assert step.quality.bottleneck >= pace.quality.bottleneck
    assert step.quality.lower_bound == pace.quality.lower_bound


def test_a_function_of_plans_chooses_among_those_that_were_found() -> None:
    costed = row([5, 1, 3, 1, 5, 4], [9, 2, 1, 3, 7, 1])
    seen: list[Plan] = []

    def sent(plan: Plan) -> float:
        seen.append(plan)
        return sum(channel.nbytes for channel in plan.channels)

    found = partition(costed, 3, Cluster.of(["a", "b", "c"], Link(1e9)), objective=sent)
    assert len({plan.stage_of for plan in seen}) > 1
    scores = [sent(plan) for plan in tuple(seen)]
    assert sent(found) == min(scores) < scores[0]


def test_a_function_sees_the_ranks_that_the_plan_will_have() -> None:
    costed = row([3, 3, 3, 3], [1, 1, 1, 1])
    devices = tuple(Device(str(i), host=host) for i, host in enumerate((0, 1, 0, 1)))
    cluster = Cluster(devices, Link(bandwidth=100.0), Link(bandwidth=1.0))
    seen: list[tuple[int, ...]] = []

    def score(plan: Plan) -> float:
        seen.append(plan.rank_of)
        return cost(plan)

    def cost(plan: Plan) -> float:
        return Workload(SYNCHRONOUS["1f1b"], 4).step_seconds(costed, plan, cluster)

    plan = make_plan(costed, Request((1,) * 4, PlanOptions(objective=score)), cluster, Workload(SYNCHRONOUS["1f1b"], 4))
    assert plan.rank_of in seen
    hosts = [devices[rank].host for rank in plan.rank_of]
    assert sum(here != there for here, there in pairwise(hosts)) == 1


@pytest.mark.parametrize("nothing", [None, float("nan"), "much"])
def test_a_function_that_gives_no_number_is_refused(nothing: Any) -> None:
    with pytest.raises(InputError, match="must return a number"):
        partition(row([1, 2, 3], [1, 1, 1]), 2, objective=lambda plan: nothing)


def test_the_best_replicas_are_planned_for_the_objective() -> None:
    seen: list[Plan] = []

    def score(plan: Plan) -> float:
        seen.append(plan)
        return sum(channel.nbytes for channel in plan.channels)

    costed, work = row([3, 9, 3, 3], [5, 1, 7, 1]), Workload(SYNCHRONOUS["1f1b"], 8)
    plan, _ = with_best_replicas(costed, Cluster.of(["a", "b", "c"], Link(1e9)), work, PlanOptions(objective=score))
    assert seen
    assert score(plan) == min(score(other) for other in tuple(seen))


def test_of_plans_with_the_same_pace_the_one_that_sends_less_is_taken() -> None:
    costed = row([1, 1, 1, 1, 1, 50], [5, 2, 5, 3, 1, 1])
    plan = partition(costed, 3, Cluster.of(["a", "b", "c"], LINK))
    assert plan.quality is not None
    assert plan.quality.bottleneck == 51  # the last stage sets the pace, wherever the rest is cut
    assert ends(plan) == [2, 5]


def test_unknown_objectives_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="'pace', 'overlap', 'step', or a function of a plan"):
        compiled(plan=PlanOptions(objective="speed"))
    result = CliRunner().invoke(app, ["plan", "hf:gpt2", "--objective", "speed"])
    assert result.exit_code != 0
    assert "overlap" in result.output


@pytest.mark.parametrize("objective", ["overlap", "step", lambda plan: -plan.num_stages])
def test_a_pipeline_with_an_objective_gives_the_gradients_of_the_unsplit_model(objective: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.randn(12, 8, requires_grad=True)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    pipe = pipecompile.compile(
        model,
        ["cpu"] * 3,
        microbatches=3,
        loss_fn=loss,
        plan=PlanOptions(objective=objective),
        costs="count",
    )
    pipe(x, target=x.detach()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss(model(x), x.detach()).backward()
    assert len(found) == 12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_stages_compute_again_where_that_makes_a_shorter_step_and_the_others_are_given_more() -> None:
    costed = layers(*[3.0] * 16, weights=400, saved=10_000)
    cluster = Cluster((Device("a", memory=110_000),) * 4)
    steps, plans = {}, {}
    for recompute in ("never", "always", "auto"):
        work = Workload(SYNCHRONOUS["1f1b"], 8, recompute=recompute, offload="never")
        plans[recompute] = make_plan(costed, Request((1,) * 4), cluster, work)
        steps[recompute] = work.step_seconds(costed, plans[recompute], cluster)
        assert max(work.memory(costed, plans[recompute], cluster, bound=True).ranks) <= 110_000
    assert steps["auto"] < min(steps["never"], steps["always"])
    assert plans["auto"].recomputed == (0,)  # which has four microbatches in flight
    sizes = [plans["auto"].stage_of.count(stage) for stage in range(4)]
    assert sizes[0] < 4 < max(sizes)
