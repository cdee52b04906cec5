"""The cut moves once while a model trains, if measured times promise enough; the model does not notice.

Times are made up: node i takes ``factors`` times what was profiled, by the half of the graph that it is in. Tiny models
take less time than is worth it; here all are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.compiler import learn
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.plan import stage_costs
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.timeline import Timeline
from pipecompile.planning import best_schedule, candidates
from pipecompile.planning.calibration import Times
from pipecompile.planning.planned import planned
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.optimizer_follows import OptimizersFollow

WIDTH, ROWS = 12, 16
BEFORE = learn.WARM_UP + learn.STEPS  # training steps before the cut moves


class Deep(nn.Module):
    def __init__(self, loss: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(16))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(self.drop(layer(x)))
        x = self.norm(x)
        return x.square().mean() if self.loss else x


class Devices:
    """Gives what the stages of a capture take, whatever they took."""

    def __init__(self) -> None:
        self.factors = (1.0, 1.0)
        self.costed: CostedGraph | None = None
        self.asked = 0

    def costs(self, compiled: Compiled) -> tuple[Cost, ...]:
        if self.costed is None:
            self.costed = compiled.planned.costed
        half = len(self.costed.costs) // 2
        costs = tuple(
            Cost(c.forward * self.factors[i >= half], c.backward * self.factors[i >= half], c.saved_bytes)
            for i, c in enumerate(self.costed.costs)
        )
        return stage_costs(CostedGraph(self.costed.graph, costs, ""), compiled.plan)

    def times(self, compiled: Compiled, timeline: Timeline) -> tuple[Times, ...]:
        self.asked += 1
        return tuple(map(Times, compiled.planned.stage_costs, self.costs(compiled)))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Costs are equal for all functions, so that plans do not depend on this machine."""
    found = Devices()
    monkeypatch.setattr(learn, "all_short", lambda costs: False)
    monkeypatch.setattr(Compiled, "times", _bound(found))
    monkeypatch.setattr("pipecompile.compiler.plan_call.planned", _evenly)
    return found


def _bound(found: Devices) -> Callable[[Compiled, Timeline], tuple[Times, ...]]:
    return lambda compiled, timeline: found.times(compiled, timeline)


def _evenly(costed: CostedGraph, *args: Any) -> Any:
    costs = tuple(Cost(1e-3 * (c.forward > 0), 2e-3 * (c.backward > 0), c.saved_bytes) for c in costed.costs)
    return planned(CostedGraph(costed.graph, costs, costed.source, measured=True), *args)


def piped(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, **options)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(ROWS, WIDTH, generator=generator)


def train(pipe: Any, steps: int, optimizer: Any = None, feed: Iterator[Tensor] | None = None) -> list[float]:
    feed, losses = feed or batches(), []
    for _ in range(steps):
        loss = pipe(next(feed))
        loss = loss if loss.ndim == 0 else loss.square().mean()
        loss.backward()
        losses.append(loss.item())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def stages(pipe: Any) -> tuple[int | None, ...]:
    found: tuple[int | None, ...] = pipe.pipeline.plan.stage_of
    return found


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "sequential"])
def test_the_cut_moves_once_and_relieves_the_slow_stage(devices: Devices, loss: bool, schedule: str) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep(loss), schedule=schedule)
    train(pipe, BEFORE)
    first = stages(pipe)
    assert pipe.pipeline.report.learned == ()
    train(pipe, 1)
    moved = stages(pipe)
    assert moved.count(0) < first.count(0)
    assert "the cut moved over" in pipe.pipeline.report.learned[0]
    assert pipe.pipeline.costs.origin.endswith(", corrected by training steps")
    assert pipe.pipeline.captures == 1
    train(pipe, BEFORE + 3)
    assert stages(pipe) == moved
    assert len(pipe.pipeline.report.learned) == 2
    assert pipe.pipeline.report.learned[1].startswith("since then, stages took")
    asked = devices.asked
    train(pipe, 3)
    assert devices.asked == asked


def test_training_is_that_of_a_pipeline_whose_cut_stays(devices: Devices) -> None:
    def run(factors: tuple[float, float]) -> tuple[list[float], dict[str, Tensor], bool]:
        devices.factors, devices.costed = factors, None
        model = Deep().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pipe = piped(model)
        parameters = dict(model.named_parameters())
        feed = (x.double() for x in batches())
        torch.manual_seed(3)
        losses = train(pipe, 1, optimizer, feed)
        first, kept = stages(pipe), [optimizer.state[p]["exp_avg"] for p in model.parameters()]
        losses += train(pipe, BEFORE + 4, optimizer, feed)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(optimizer.state[p]["exp_avg"] is it for p, it in zip(model.parameters(), kept, strict=True))
        return losses, {name: t.detach().clone() for name, t in model.state_dict().items()}, stages(pipe) != first

    still, moving = run((1.0, 1.0)), run((1.0, 4.0))
    assert (still[2], moving[2]) == (False, True)
    assert moving[0] == still[0]
    assert len(still[1]) > 30
    assert all(torch.equal(moving[1][name], tensor) for name, tensor in still[1].items())


def test_the_new_stages_are_verified(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    train(pipe, BEFORE)
    (proof,) = pipe.pipeline.proofs
    train(pipe, 1)
    (again,) = pipe.pipeline.proofs
    assert again is not proof
    assert again.rows == proof.rows


def test_a_cut_that_made_it_worse_comes_back(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    train(pipe, BEFORE)
    first = stages(pipe)
    train(pipe, 1)
    assert stages(pipe) != first
    devices.factors = (9.0, 30.0)
    train(pipe, BEFORE)
    assert stages(pipe) == first
    assert pipe.pipeline.report.learned[1].endswith("longer than before: the first cut is back")
    train(pipe, BEFORE + 2)
    assert stages(pipe) == first
    assert len(pipe.pipeline.report.learned) == 2


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.04, 1.0)])
def test_a_cut_that_saves_too_little_stays(devices: Devices, factors: tuple[float, float]) -> None:
    devices.factors = factors
    pipe = piped(Deep())
    train(pipe, BEFORE)
    first = stages(pipe)
    train(pipe, BEFORE)
    assert stages(pipe) == first
    assert pipe.pipeline.report.learned[0].endswith("no plan found saves 5%")
    assert pipe.pipeline.costs.corrections == ()


def test_other_captures_follow_without_a_trace(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    feed = batches()
    train(pipe, 2)
    pipe.eval()
    with torch.no_grad():
        expected = pipe(next(feed))
    pipe.train()
    assert pipe.pipeline.captures == 2
    train(pipe, BEFORE)  # the step before the evaluation was not timed
    assert pipe.pipeline.report.learned
    moved = {name for name, _ in pipe.pipeline.stages[1].named_parameters()}
    pipe.eval()
    with torch.no_grad():
        pipe(next(feed))
    assert pipe.pipeline.captures == 2
    assert {name for name, _ in pipe.pipeline.stages[1].named_parameters()} == moved
    assert expected.isfinite()


def test_a_backward_that_waits_runs_in_the_stages_of_its_forward(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    model = Deep(loss=False)
    model.drop.p = 0.0
    pipe = piped(model)
    train(pipe, BEFORE)
    feed = batches()
    x, y = next(feed), next(feed)
    pipe.zero_grad()
    # the timed step is over; the cut moves at the second of these calls, or at the first
    waiting = pipe(x).square().mean()
    other = pipe(y).square().mean()
    assert pipe.pipeline.report.learned
    (waiting + other).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pipe.zero_grad()
    for each in (x, y):
        pipe(each).square().mean().backward()
    assert found.keys() == {name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[name])


def test_a_forward_before_the_move_is_followed_by_its_backward_after_it(devices: Devices) -> None:
    model = Deep(loss=False)
    model.drop.p = 0.0
    pipe = piped(model)
    feed = batches()
    x = next(feed)
    early = pipe(x).square().mean()
    early.backward(retain_graph=True)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pipe.zero_grad()
    devices.factors = (3.0, 1.0)
    train(pipe, BEFORE + 1)
    assert "the cut moved over" in pipe.pipeline.report.learned[0]
    pipe.zero_grad()
    early.backward()  # runs the call again, in the stages that it had
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 30
    for grad, was in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, was)


def test_weights_of_the_old_stages_are_let_go(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    train(pipe, BEFORE)
    old = [weakref.ref(weights) for weights in pipe.pipeline._session.weights.values()]
    train(pipe, 2)
    assert pipe.pipeline.report.learned
    assert [weights() for weights in old] == [None, None]


def test_what_is_learnt_is_remembered(devices: Devices, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path))
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    train(pipe, BEFORE + 1)
    learnt = pipe.pipeline.plan
    again = piped(Deep())
    train(again, 1)
    assert again.pipeline.plan == learnt
    assert again.pipeline.costs.origin.endswith(", corrected by training steps")
    assert len(DiskCache(tmp_path).entries()) == 2
    train(again, BEFORE)
    assert again.pipeline.plan == learnt
    assert again.pipeline.report.learned[0].endswith("no plan found saves 5%")


def test_what_is_learnt_under_a_chosen_schedule_is_remembered_for_it_alone(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(best_schedule, "all_short", lambda costs: False)
    monkeypatch.setattr(candidates, "DEFAULT", replace(candidates.DEFAULT, pays=-9.0))
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    train(pipe, 1)
    first = pipe.pipeline.plan
    train(pipe, BEFORE)
    learnt = pipe.pipeline.plan
    assert pipe.pipeline.schedule == "zb-h1"
    assert learnt != first
    found = [piped(Deep(), **options) for options in ({}, {"schedule": "zb-h1"}, {"schedule": "1f1b"})]
    for other in found:
        train(other, 1)
    chosen, named, whole = (other.pipeline for other in found)
    assert (chosen.schedule, chosen.plan, named.plan) == ("zb-h1", learnt, learnt)
    assert (whole.schedule, whole.plan) == ("1f1b", first)
    assert [line.split(",")[0] for line in chosen.report.schedule] == ["zb-h1"] * 2 + ["1f1b"]
    assert [line.split(",")[0] for line in chosen.report.remembered] == ["plan"] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"plan": PlanOptions(tune="never")},
        {"plan": PlanOptions(tune="rehearse")},
        {"costs": "count"},
        {"cluster": "2xA100-40GB"},
        {"schedule": "pipedream", "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)},
    ],
)
def test_nothing_moves_where_it_was_not_asked_for(devices: Devices, options: dict[str, Any]) -> None:
    devices.factors = (9.0, 1.0)
    pipe = piped(Deep(), **options)
    train(pipe, 1) if "optimizer" not in options else pipe(next(batches()))
    first = stages(pipe)
    for _ in range(BEFORE + 1):
        loss = pipe(next(batches()))
        if "optimizer" not in options:
            loss.backward()
    assert stages(pipe) == first
    assert pipe.pipeline.report.learned == ()


def test_evaluation_and_other_tensors_move_nothing(devices: Devices) -> None:
    devices.factors = (3.0, 1.0)
    pipe = piped(Deep())
    feed = batches()
    train(pipe, BEFORE)
    first = stages(pipe)
    pipe.eval()
    with torch.no_grad():
        pipe(next(feed))
    pipe.train()
    train(pipe, 1)
    other = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    torch.func.functional_call(pipe, other, (next(feed),))
    assert stages(pipe) == first


def test_a_plan_of_the_users_own_stays(devices: Devices) -> None:
    pipe = piped(Deep())
    train(pipe, 1)
    plan = pipe.pipeline.replan(PlanOptions(pins={"layers.12": 0}), pipe.pipeline.costs)
    devices.factors = (9.0, 1.0)
    train(pipe, BEFORE + 2)
    assert pipe.pipeline.plan == plan


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizer_state_follows_a_parameter_to_its_device(kind: Any) -> None:
    model = nn.Linear(3, 2)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    follow = OptimizersFollow()
    optimizer.zero_grad()
    with follow.moving(model):  # the same object, in other memory
        torch.utils.swap_tensors(model.weight, nn.Parameter(model.weight.detach().to("meta")))
    assert model.weight.is_meta
    model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
    optimizer.step()
    state = {name: value.device.type for name, value in optimizer.state[model.weight].items() if torch.is_tensor(value)}
    assert state.pop("step", "cpu") == "cpu"
    assert set(state.values()) == {"meta"}
    others = [value for value in optimizer.state[model.bias].values() if torch.is_tensor(value)]
    assert others
    assert all(value.device.type == "cpu" for value in others)
    assert follow._hook is None


def test_a_bad_word_is_refused() -> None:
    with pytest.raises(pipecompile.InputError, match="tune='later' is not known"):
        PlanOptions(tune="later")  # type: ignore[arg-type]
