"""Plans within memory, saved profiles, and plans made anew from a measured step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import InfeasibleError, InputError, PlanError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan import stage_costs
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.planning.calibration import Times, corrected, stage_times

WIDTH = 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.narrow(torch.nn.functional.gelu(self.wide(x))))


class Model(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(x, y)


def compiled(blocks: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    model, x = Model(blocks), torch.randn(64, WIDTH)
    defaults: dict[str, Any] = {"microbatches": 4, "costs": "count", "example_inputs": {"x": x, "y": -x}}
    return pipecompile.compile(model, ["cpu", "cpu", "cpu"], **(defaults | options))


def tight(batch: int = 512) -> dict[str, Any]:
    """A batch whose activations weigh, and devices that have room for little more than what is computed again."""
    x = torch.randn(batch, WIDTH)
    pipe = compiled(plan=pipecompile.PlanOptions(recompute="always"), example_inputs={"x": x, "y": x})
    return {"example_inputs": {"x": x, "y": x}, "cluster": of_memory(int(1.15 * max(pipe.pipeline.memory.ranks)))}


def of_memory(nbytes: int) -> Cluster:
    return Cluster((Device("cpu", memory=nbytes),) * 3)


def gradients(pipe: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, WIDTH)
    pipe(x=x, y=-x).backward()
    return {name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}


# Memory


def test_recomputed_stages_give_the_same_gradients_bit_for_bit() -> None:
    kept, again = (
        compiled(plan=pipecompile.PlanOptions(recompute="never")),
        compiled(plan=pipecompile.PlanOptions(recompute="always")),
    )
    assert (kept.pipeline.plan.recomputed, again.pipeline.plan.recomputed) == ((), (0, 1, 2))
    before, after = gradients(kept), gradients(again)
    assert before.keys() == after.keys() == dict(kept.named_parameters()).keys()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_a_recomputed_stage_takes_its_forward_twice() -> None:
    pipe = compiled(plan=pipecompile.PlanOptions(recompute="always"))
    plain = stage_costs(pipe.pipeline.costs, replace(pipe.pipeline.plan, recomputed=()))
    again = stage_costs(pipe.pipeline.costs, pipe.pipeline.plan)
    assert [b.backward for b in again] == [a.backward + a.forward for a in plain]


def test_what_does_not_fit_otherwise_is_computed_again_and_reported() -> None:
    pipe = compiled(**tight())
    assert 0 < len(pipe.pipeline.plan.recomputed) <= 3
    assert any("to fit its memory" in line for line in pipe.pipeline.report.recomputed)
    assert "activations recomputed" in str(pipe.pipeline.plan)
    assert len(pipe.pipeline.report.memory) == 3


def test_a_model_that_fits_is_not_computed_again() -> None:
    assert compiled(cluster=of_memory(2**30)).pipeline.plan.recomputed == ()


def test_what_fits_nowhere_says_where_how_much_and_what_would_help() -> None:
    least = max(compiled(plan=pipecompile.PlanOptions(recompute="always")).pipeline.memory.ranks)
    with pytest.raises(PlanError, match=r"stage \d would hold .* too much .*parameters .*such devices instead of 3"):
        compiled(cluster=of_memory(int(0.7 * least)))


def test_recomputing_is_a_remedy_where_it_is_not_allowed() -> None:
    with pytest.raises(PlanError, match="recompute='auto'"):
        compiled(**tight(), plan=pipecompile.PlanOptions(recompute="never"))


def test_weights_that_fit_nowhere_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="too much"):
        compiled(cluster=of_memory(1000))


@pytest.mark.parametrize("cluster", [Cluster.of(["a", "b"]), "2xH100"])
def test_a_cluster_has_a_device_for_each_stage(cluster: Any) -> None:
    with pytest.raises(InputError, match="must have the same number"):
        compiled(cluster=cluster)


def test_unknown_ways_to_recompute_are_refused() -> None:
    with pytest.raises(InputError, match="'never', 'always', 'auto'"):
        compiled(plan=pipecompile.PlanOptions(recompute="sometimes"))


# Profiles


def test_a_saved_profile_gives_the_same_plan(tmp_path: Path) -> None:
    first = compiled()
    first.pipeline.costs.save(tmp_path / "profile.json")
    again = compiled(costs=tmp_path / "profile.json")
    assert again.pipeline.costs == first.pipeline.costs == CostedGraph.load(tmp_path / "profile.json")
    assert again.pipeline.plan == first.pipeline.plan
    setting = again.pipeline.costs.setting
    assert setting is not None
    assert (setting.model, setting.torch, setting.inputs[0]) == ("Model", torch.__version__, "x: float32[16, 48]")
    assert setting.date
    assert setting.threads == torch.get_num_threads()


def test_a_profile_of_another_model_is_refused_with_the_node(tmp_path: Path) -> None:
    compiled().pipeline.costs.save(tmp_path / "profile.json")
    with pytest.raises(
        InputError, match=r"the given costs \(Model on .*\) are not of .*node 33, .*blocks.6.*in the given costs"
    ):
        compiled(blocks=7, costs=str(tmp_path / "profile.json"))


def test_a_profile_of_other_sizes_is_refused(tmp_path: Path) -> None:
    compiled().pipeline.costs.save(tmp_path / "profile.json")
    x = torch.randn(32, WIDTH)
    with pytest.raises(
        InputError, match=r"node 0, .*outputs is float32\[8, 48\], but float32\[16, 48\] in the given costs"
    ):
        compiled(costs=str(tmp_path / "profile.json"), example_inputs={"x": x, "y": x})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "does not contain costs"), ("word", "does not contain costs"), (None, "is not a file that can be read")],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        compiled(costs=path)


# Calibration


def slowed(pipe: Any, slow: int, factor: float) -> Timeline:
    """A step in which one stage took longer than was predicted."""
    spans = []
    for stage, cost in enumerate(stage_costs(pipe.pipeline.costs, pipe.pipeline.plan)):
        times = factor if stage == slow else 1.0
        for k in range(4):
            spans.append(Span(stage, Forward(stage, k), float(k), k + times * cost.forward))
            spans.append(Span(stage, Backward(stage, k), float(k), k + times * cost.backward))
    return Timeline(tuple(spans), 3)


def test_times_are_corrected_stage_by_stage() -> None:
    pipe = compiled()
    predicted = stage_costs(pipe.pipeline.costs, pipe.pipeline.plan)
    times = stage_times(predicted, slowed(pipe, 1, 3.0))
    assert [t.ratio for t in times] == [pytest.approx(1), pytest.approx(3), pytest.approx(1)]
    fixed = stage_costs(corrected(pipe.pipeline.costs, pipe.pipeline.plan, times), pipe.pipeline.plan)
    assert [c.seconds for c in fixed] == [pytest.approx(t.measured.seconds) for t in times]


@pytest.mark.parametrize(("recompute", "error"), [("never", 5 / 3), ("always", 7 / 4)])
def test_forward_and_backward_are_corrected_each(recompute: str, error: float) -> None:
    pipe = compiled(plan=pipecompile.PlanOptions(recompute=recompute))
    costs = tuple(Cost() if stage is None else Cost(1.0, 2.0) for stage in pipe.pipeline.plan.stage_of)
    costed = replace(pipe.pipeline.costs, costs=costs)
    before = stage_costs(costed, pipe.pipeline.plan)
    times = [Times(cost, Cost(2 * cost.forward, 3 * cost.backward)) for cost in before]
    assert [it.error for it in times] == [pytest.approx(error)] * 3  # seconds off, of those predicted
    once = corrected(costed, pipe.pipeline.plan, times, "a test")
    for cost, it in zip(stage_costs(once, pipe.pipeline.plan), times, strict=True):
        assert cost.forward == pytest.approx(it.measured.forward)
        assert cost.backward == pytest.approx(it.measured.backward)
    twice = corrected(once, pipe.pipeline.plan, times, "a test")
    assert once.origin == twice.origin == f"{costed.origin}, corrected by a test"


def test_a_recomputed_stage_whose_backward_took_less_than_its_forward_is_corrected_as_a_whole() -> None:
    pipe = compiled(plan=pipecompile.PlanOptions(recompute="always"))
    costs = tuple(Cost() if stage is None else Cost(1.0, 2.0) for stage in pipe.pipeline.plan.stage_of)
    costed = replace(pipe.pipeline.costs, costs=costs)
    times = [Times(cost, Cost(cost.forward, cost.forward / 2)) for cost in stage_costs(costed, pipe.pipeline.plan)]
    fixed = stage_costs(corrected(costed, pipe.pipeline.plan, times), pipe.pipeline.plan)
    assert [c.seconds for c in fixed] == [pytest.approx(it.measured.seconds) for it in times]
    assert all(c.backward > c.forward > 0 for c in fixed)


def test_times_of_a_step_without_a_backward_say_nothing() -> None:
    assert stage_times([Cost(1.0)], Timeline((Span(0, Forward(0, 0), 0.0, 1.0),), 1)) == ()


def assert_same_gradients(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, msg=lambda message, name=name: f"{name}: {message}")


def test_replan_takes_other_constraints_and_costs() -> None:
    pipe = compiled()
    before = gradients(pipe)
    costs = pipe.pipeline.costs
    pipe.pipeline.replan(pipecompile.PlanOptions(max_stages=2), costs)
    assert pipe.pipeline.costs == costs
    assert pipe.pipeline.captures == 1
    assert pipe.pipeline.plan.num_stages == 2
    pipe.zero_grad()
    assert_same_gradients(gradients(pipe), before)


def test_a_replan_that_cannot_be_leaves_the_plan_as_it_was() -> None:
    pipe = compiled()
    before, plan = gradients(pipe), pipe.pipeline.plan
    with pytest.raises(InputError, match="no module 'nothing'"):
        pipe.pipeline.replan(pipecompile.PlanOptions(no_split=["nothing"]), pipe.pipeline.costs)
    with pytest.raises(InputError, match="costs='measure' needs a batch"):
        pipe.pipeline.replan(costs="measure")
    assert pipe.pipeline.plan is plan
    pipe.zero_grad()
    assert_same_gradients(gradients(pipe), before)
    assert pipe.pipeline.captures == 1


def test_replan_relieves_the_slow_stage_and_stays_exact() -> None:
    pipe = compiled()
    before = gradients(pipe)
    assert len(pipe.pipeline.report.calibration) == 3
    sizes = [pipe.pipeline.plan.stage_of.count(stage) for stage in range(3)]
    pipe.pipeline._session.measured = slowed(pipe, 0, 4.0)
    plan = pipe.pipeline.replan()
    assert plan == pipe.pipeline.plan
    assert plan.stage_of.count(0) < sizes[0]
    assert "corrected" in pipe.pipeline.costs.origin
    assert pipe.pipeline.report.calibration == ()
    pipe.zero_grad()
    assert_same_gradients(gradients(pipe), before)


def test_replan_needs_a_step() -> None:
    with pytest.raises(InputError, match="training step"):
        compiled().pipeline.replan()


def test_replan_leaves_optimizers_inside_alone() -> None:
    with pytest.raises(InputError, match="optimizers that step inside"):
        compiled(schedule="pipedream", optimizer=torch.optim.Adam).pipeline.replan()
