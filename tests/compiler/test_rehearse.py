"""Rehearsals: they leave no mark, end where times hold, and are made where they tell something.

Tiny models take less time than is worth a rehearsal; here all are.
"""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile.compiler import rehearse
from pipecompile.errors import ExecutionError, PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.weight_versions import versions
from pipecompile.planning.calibration import Times
from pipecompile.planning.plan_search import make_plan
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.session import Session
from pipecompile.schedule import SYNCHRONOUS

WIDTH, ROWS = 12, 24
Truth = dict[str, float]


@pytest.fixture(autouse=True)
def _everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "all_short", lambda costs: False)


class Kept(nn.Module):
    """Asks its activations, so it is kept whole. Draws from every generator, keeps a note, writes its buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seen = [0.0]
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.detach().abs().max()))
        self.steps += 1
        noise = random.random() + float(np.random.random()) + torch.rand(())
        return F.dropout(self.linear(x), 0.5) + noise if self.seen[-1] > 0 else x


class Marked(nn.Module):
    """Leaves a mark wherever a model can."""

    def __init__(self, kept: bool, loss: bool) -> None:
        super().__init__()
        self.calls = 0
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.kept = Kept() if kept else nn.Identity()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = torch.tanh(self.drop(layer(self.norm(x))))
        x = self.kept(x)
        return x.square().mean() if self.loss else x


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module | None = None, **options: Any) -> Any:
    model = model or Marked(kept=False, loss=True)
    tuned = pipecompile.PlanOptions(tune="rehearse")
    defaults: dict[str, Any] = {"microbatches": 4, "example_inputs": (rows(),), "plan": tuned}
    return pipecompile.compile(model, ["cpu", "cpu"], **(defaults | options))


def is_rehearsed(pipe: pipecompile.Pipeline) -> bool:
    return pipe.pipeline.costs.origin.endswith((", corrected by a rehearsal", ", confirmed by a rehearsal"))


def generators() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


def marks(model: nn.Module) -> dict[str, Any]:
    """All that a step may change of a model."""
    kept = model.get_submodule("kept")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "gradients": [p.grad for p in model.parameters()],
        "values": {name: (tensor.tolist(), tensor._version) for name, tensor in tensors},
        "attributes": (model.calls, list(getattr(kept, "seen", []))),
        "modes": [module.training for module in model.modules()],
    }


# No mark


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "sequential"])
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_rehearsal_leaves_no_mark(kept: bool, loss: bool, schedule: str) -> None:
    model, x = Marked(kept, loss), rows().requires_grad_()
    leaves = ["kept"] if kept else []
    with torch.no_grad():
        model(rows())  # else buffers are zeros and ones
    before, drawn = marks(model), generators()
    options = {"leaf_modules": leaves, "batching": pipecompile.Batching(allow_mixing=leaves), "example_inputs": (x,)}
    one_part = pytest.warns(UserWarning, match="draws random numbers of Python") if kept else nullcontext()
    with one_part:
        pipe = compiled(model, schedule=schedule, **options)
    assert is_rehearsed(pipe)
    assert marks(model) == before
    assert generators() == drawn
    assert x.grad is None
    assert torch.is_grad_enabled()
    assert pipe.pipeline.program is None
    assert pipe.pipeline.timeline is None


def test_the_first_step_is_that_of_a_pipeline_without_one() -> None:
    def step(**options: Any) -> tuple[bool, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = Marked(kept=False, loss=True).double()
        pipe = compiled(model, example_inputs=None, **options)
        torch.manual_seed(5)
        pipe(rows().double()).backward()
        assert model.calls == 1
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return is_rehearsed(pipe), {**gradients, **dict(model.named_buffers())}

    (with_one, found), (without, expected) = step(), step(costs="count")
    assert with_one
    assert not without
    assert len(expected) == len(found) > 10
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_modes_of_the_caller_are_those_of_a_rehearsal() -> None:
    seen: SimpleQueue[tuple[bool, bool]] = SimpleQueue()  # of a set, a rehearsal would undo the changes

    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                seen.put((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().forward(x)

    model = nn.Sequential(*(Asks(WIDTH, WIDTH) for _ in range(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe = compiled(model, leaf_modules=["0", "1", "2"])
    assert is_rehearsed(pipe)
    assert {seen.get() for _ in range(seen.qsize())} == {(True, True)}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("microbatches", "run"), [(2, 2), (4, 4), (12, 5)])
@pytest.mark.parametrize("schedule", [name for name in SYNCHRONOUS if not name.endswith("-4")])  # has too few parts
def test_no_more_is_in_flight_than_in_a_step(
    schedule: str, microbatches: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = []
    original = Session.run

    def noted(self: Session, compiled: Any, program: Any, microbatches: Any, **others: Any) -> None:
        programs.append(program)
        original(self, compiled, program, microbatches, **others)

    monkeypatch.setattr(Session, "run", noted)
    pipe = compiled(schedule=schedule, microbatches=microbatches, verify="never")
    pipe(rows()).backward()
    assert len(programs) > 1
    *rehearsed, step = programs
    for program in rehearsed:
        numbers = {i.microbatch for row in program.ranks for i in row if isinstance(i, Forward)}
        assert numbers == set(range(run))
        in_flight, most = versions(program).in_flight, versions(step).in_flight
        assert all(a <= b for a, b in zip(in_flight, most, strict=True))


def test_nothing_steps_in_a_rehearsal_of_an_asynchronous_pipeline() -> None:
    model = Marked(kept=False, loss=True)
    before = marks(model)
    pipe = compiled(model, schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    assert is_rehearsed(pipe)
    assert marks(model) == before


# What becomes of the times


class Stages:
    """Devices on which node i takes ``truth[i]`` times what was profiled: gives what a plan's stages take there."""

    def __init__(self, slow: float) -> None:
        self.slow = slow
        self.first: CostedGraph | None = None
        self.plans: list[tuple[int | None, ...]] = []

    def __call__(self, batch: Batch) -> tuple[Times, ...]:
        costed, plan = batch.compiled.planned.costed, batch.compiled.plan
        self.first = self.first or costed
        self.plans.append(plan.stage_of)
        return tuple(map(Times, stage_costs(costed, plan), self.measured(plan)))

    def measured(self, plan: Any) -> Any:
        """The first half of the nodes is slow, the rest is as profiled."""
        assert self.first is not None
        half = len(self.first.costs) // 2
        costs = [
            type(c)(c.forward * factor, c.backward * factor, c.saved_bytes)
            for c, factor in zip(self.first.costs, [self.slow] * half + [1.0] * half + [1.0], strict=False)
        ]
        return stage_costs(CostedGraph(self.first.graph, tuple(costs), ""), plan)


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(16)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def test_a_plan_is_made_from_what_its_stages_took(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(slow=3.0)
    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: stages(batch))
    pipe = compiled(Deep(), costs="measure")
    assert 2 <= len(stages.plans) <= rehearse.REHEARSALS
    assert pipe.pipeline.plan.stage_of.count(0) < stages.plans[0].count(0)
    assert is_rehearsed(pipe)
    assert pipe.pipeline.costs.origin.count("corrected by") == 1
    assert pipe.pipeline.report.costs == (pipe.pipeline.costs.origin,)
    predicted, measured = stage_costs(pipe.pipeline.costs, pipe.pipeline.plan), stages.measured(pipe.pipeline.plan)
    for guess, truth in zip(predicted, measured, strict=True):
        assert guess.seconds == pytest.approx(truth.seconds, rel=0.15)
    busiest = max(cost.seconds for cost in measured)
    assert pipe.pipeline.plan.quality is not None
    assert pipe.pipeline.plan.quality.bottleneck >= 0.99 * max(cost.seconds for cost in predicted)
    first = pipe.pipeline.plan.of(pipe.pipeline.costs.graph, stages.plans[0])
    assert busiest < 0.9 * max(cost.seconds for cost in stages.measured(first))


def test_a_plan_whose_times_hold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(slow=1.0)
    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: stages(batch))
    pipe = compiled(Deep())
    assert stages.plans == [pipe.pipeline.plan.stage_of]
    assert stages.first is not None
    assert pipe.pipeline.costs.costs == stages.first.costs
    assert pipe.pipeline.costs.origin.endswith(", confirmed by a rehearsal")


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_where_times_never_hold_the_best_plan_that_was_rehearsed_is_taken(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[tuple[float, tuple[int | None, ...]]] = []

    def now_one_now_the_other(batch: Batch) -> tuple[Times, ...]:
        plan = batch.compiled.plan
        costs, halves = batch.compiled.planned.run_costs, batch.compiled.planned.stage_halves
        slow = len(took) % 2
        measured = [Cost(4 * c.forward, 4 * c.backward) if s == slow else c for s, c in enumerate(costs)]
        took.append((max(cost.seconds for cost in measured), plan.stage_of))
        fixed = [it.fixed if schedule == "zb-h1" else Cost() for it in halves]
        return tuple(map(Times, costs, measured, fixed))

    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: now_one_now_the_other(batch))
    pipe = compiled(Deep(), schedule=schedule)
    assert len(took) == rehearse.REHEARSALS
    seconds, stage_of = min(took)
    assert pipe.pipeline.plan.stage_of == stage_of
    taken = pipe.pipeline._capture_in_use.planned.run_costs
    assert max(cost.seconds for cost in taken) == pytest.approx(seconds)
    pipe(rows()).backward()


def test_the_best_plan_is_that_which_took_least_with_what_it_takes_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(rank_of: tuple[int, int], nodes: float, run: float) -> Any:
        planned = SimpleNamespace(costed=None, stage_costs=[Cost(nodes)] * 2, run_costs=[Cost(run)] * 2)
        it = SimpleNamespace(plan=Plan((), rank_of), planned=planned)
        it.recosted = lambda costed: it
        return it

    plans = [tried((0, 1), nodes=2.0, run=3.0), tried((1, 0), nodes=1.0, run=4.0), tried((0, 0), nodes=3.0, run=5.0)]
    following, off = iter([*plans[1:], tried((1, 1), 9.0, 9.0)]), (Times(Cost(1.0), Cost(2.0)),) * 2
    rehearsal = SimpleNamespace(times=lambda batch: off)
    monkeypatch.setattr(rehearse, "corrected", lambda *_: None)
    monkeypatch.setattr(rehearse, "Batch", lambda *_: None)
    found = rehearse.rehearsed(plans[0], None, None, rehearsal, lambda costed: next(following))
    assert found is plans[0]


def test_later_steps_are_predicted_by_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(slow=4.0)
    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: stages(batch))
    pipe = compiled(Deep())
    pipe(rows()).backward()
    costs = stage_costs(pipe.pipeline.costs, pipe.pipeline.plan)
    for span in pipe.pipeline.predicted.spans:
        if isinstance(span.instruction, Forward | Backward):
            cost = costs[span.instruction.stage]
            expected = cost.forward if isinstance(span.instruction, Forward) else cost.backward
            assert span.seconds == pytest.approx(expected)


# Where there is none


def test_costs_that_are_not_measured_here_are_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiled()
    known = asked.pipeline.costs

    def never(*_: Any) -> None:
        raise AssertionError("a rehearsal")

    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: never(batch))
    asked.eval()
    asked(rows(6))  # a second capture, on the placement of the first
    assert asked.pipeline.captures == 2
    for options in ({"costs": "count"}, {"costs": known}, {"cluster": Cluster.of(["cpu", "cpu"])}):
        pipe = compiled(Marked(kept=False, loss=True), **options)
        assert pipe.pipeline.plan.num_stages == 2
    compiled(Marked(kept=False, loss=True).to("meta"), example_inputs=(rows().to("meta"),))


def test_what_tells_nothing_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Session, *_: Any) -> None:
        raise AssertionError("a run")

    monkeypatch.setattr(Session, "run", none)
    alone = pipecompile.compile(Deep(), ["cpu"], example_inputs=(rows(),), plan=PlanOptions(tune="rehearse"))
    never = compiled(Deep(), plan=PlanOptions(tune="never"))
    later = compiled(Deep(), plan=PlanOptions())
    with torch.no_grad():
        evaluated = compiled(Deep())
    frozen = compiled(Deep().requires_grad_(False))
    monkeypatch.setattr(rehearse, "all_short", lambda costs: True)
    short = compiled(Deep())
    for pipe in (alone, never, later, evaluated, frozen, short):
        assert pipe.pipeline.costs.origin == f"measured: cpu, torch {torch.__version__}"


# Errors


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.table(ids)).square().mean()


def test_a_model_that_raises_says_so_in_the_report_and_in_the_step() -> None:
    ids = torch.tensor([0, 1, 2, 3, 9, 3, 2, 1])  # no row of the table is the third microbatch's
    pipe = compiled(Looks(), example_inputs=(ids,))
    assert pipe.pipeline.plan.num_stages == 2
    assert "not rehearsed, since stage 0, 0F2: module 'table'" in pipe.pipeline.report.costs[0]
    assert "IndexError: index out of range" in pipe.pipeline.report.costs[0]
    with pytest.raises(ExecutionError, match=r"stage 0, 0F2: module 'table'.*IndexError: index out of range"):
        pipe(ids)
    pipe(ids % 4).backward()


def test_where_no_other_plan_is_found_the_rehearsed_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(slow=3.0)
    monkeypatch.setattr(rehearse.Rehearsal, "times", lambda _, batch: stages(batch))
    plans = []

    def make(*args: Any) -> Plan:
        if plans:
            raise PlanError("no plan was found")
        plans.append(make_plan(*args))
        return plans[0]

    monkeypatch.setattr("pipecompile.planning.planned.make_plan", make)
    pipe = compiled(Deep())
    assert pipe.pipeline.plan.stage_of == plans[0].stage_of
    assert is_rehearsed(pipe)
