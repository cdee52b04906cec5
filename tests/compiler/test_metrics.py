"""``pipe.pipeline.metrics()`` against the timelines of known programs, and of steps that ran."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.compiler.metrics import metrics
from pipecompile.ir.between_stages import Made
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Forward, Share, Step
from pipecompile.ir.plan import Plan
from pipecompile.ir.timeline import Timeline
from pipecompile.schedule import SCHEDULES, backward_only, forward_only
from pipecompile.schedule.several_processes import shared
from pipecompile.schedule.simulator import simulate

STAGES, MICROBATCHES = 3, 6
COSTS = [Cost(1.0, 2.0), Cost(2.0, 4.0), Cost(1.0, 1.0)]


def simulated(schedule: str = "1f1b", costs: list[Cost] = COSTS, **options: Any) -> Timeline:
    return simulate(SCHEDULES[schedule].program(Plan.chain(STAGES), MICROBATCHES), costs, **options)


def test_a_step_of_equal_stages_has_the_known_length_and_bubble() -> None:
    found = metrics([simulated(costs=[Cost(1.0, 2.0)] * STAGES)], STAGES, {})
    assert found["step_seconds"] == (1 + 2) * (MICROBATCHES + STAGES - 1)
    assert found["bubble"] == pytest.approx((STAGES - 1) / (MICROBATCHES + STAGES - 1))
    assert found["microbatches"] == MICROBATCHES


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b", "zb-h1"])
def test_seconds_of_a_stage_are_those_of_all_its_microbatches(schedule: str) -> None:
    timeline = simulated(schedule)
    found = metrics([timeline], STAGES, {})
    for stage, cost in enumerate(COSTS):
        assert found[f"stage_{stage}_forward_seconds"] == pytest.approx(MICROBATCHES * cost.forward)
        assert found[f"stage_{stage}_backward_seconds"] == pytest.approx(MICROBATCHES * cost.backward)
    assert found["step_seconds"] == timeline.makespan
    assert found["bubble"] == pytest.approx(timeline.bubble)


def test_transfers_are_part_of_the_step_and_idle_time() -> None:
    slow = simulated(cluster=Cluster.of(["cpu"] * STAGES, Link(float("inf"), 0.5)))
    found, fast = metrics([slow], STAGES, {}), metrics([simulated()], STAGES, {})
    assert found["step_seconds"] > fast["step_seconds"]
    assert found["bubble"] == pytest.approx(slow.bubble) != fast["bubble"]


def test_outputs_on_their_way_to_all_ranks_are_no_seconds_of_their_stage() -> None:
    plan = replace(Plan.chain(STAGES), made=(Made(2, once=4),))
    timeline = simulate(shared(SCHEDULES["1f1b"].program(plan, MICROBATCHES), STAGES), COSTS)
    assert any(isinstance(span.instruction, Share) for span in timeline.spans)
    assert metrics([timeline], STAGES, {}) == metrics([simulated()], STAGES, {})


def test_optimizer_steps_are_apart() -> None:
    timeline = simulated("pipedream", step_seconds=0.25)
    steps = sum(isinstance(span.instruction, Step) and span.instruction.stage == 1 for span in timeline.spans)
    assert steps > 1
    assert metrics([timeline], STAGES, {})["stage_1_other_seconds"] == pytest.approx(0.25 * steps)
    assert "stage_1_other_seconds" in metrics([simulated("pipedream")], STAGES, {})
    assert "stage_1_other_seconds" not in metrics([simulated()], STAGES, {})


def test_forwards_and_backwards_of_one_step_add_up() -> None:
    plan = Plan.chain(STAGES)
    parts = [simulate(make(plan, MICROBATCHES), COSTS) for make in (forward_only, backward_only)]
    found = metrics(parts, STAGES, {})
    assert found["step_seconds"] == sum(part.makespan for part in parts)
    busy = MICROBATCHES * sum(cost.seconds for cost in COSTS)
    assert found["bubble"] == pytest.approx(1 - busy / (STAGES * found["step_seconds"]))
    assert found["microbatches"] == MICROBATCHES
    assert "stage_0_backward_seconds" not in metrics(parts[:1], STAGES, {})


def test_what_is_not_known_is_absent() -> None:
    assert metrics([], STAGES, {"cuda:0": 1}) == {}
    assert metrics([Timeline((), STAGES)], STAGES, {}) == {}
    found = metrics([simulated()], STAGES, {"cpu": None, "cuda:1": 2048})
    assert found["cuda_1_peak_bytes"] == 2048
    assert not any("cpu" in name for name in found)
    assert "sent_bytes" not in found


# Of steps that ran


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


X = torch.linspace(-1, 1, 6 * 8).reshape(6, 8)


@pytest.fixture
def pipe() -> Iterator[Any]:
    it = pipecompile.compile(Net(), ["cpu", "cpu"], microbatches=3, costs="count", loss_fn=loss_of)
    with it.pipeline:
        yield it


def test_a_step_that_ran_is_told_as_its_timeline_tells_it(pipe: Any) -> None:
    assert pipe.pipeline.metrics() == {"captures": 0.0, "reruns": 0.0}
    pipe(X, target=X).backward()
    found, timeline = pipe.pipeline.metrics(), pipe.pipeline.timeline
    assert found["step_seconds"] == timeline.makespan > 0
    assert found["bubble"] == pytest.approx(timeline.bubble)
    assert found["microbatches"] == 3
    assert found["captures"] == 1
    for stage in range(2):
        forwards = [s for s in timeline.spans if isinstance(s.instruction, Forward) and s.instruction.stage == stage]
        seconds = sum(span.seconds for span in forwards)
        assert found[f"stage_{stage}_forward_seconds"] == pytest.approx(seconds)
    assert all(type(number) is float for number in found.values())
    assert json.loads(json.dumps(found)) == found


def test_sent_bytes_are_those_of_values_and_gradients(pipe: Any) -> None:
    pipe(X, target=X).backward()
    (channel,) = pipe.pipeline.plan.channels
    assert channel.nbytes == 2 * 8 * 4
    assert pipe.pipeline.metrics()["sent_bytes"] == 2 * 3 * channel.nbytes
    with torch.no_grad():
        pipe(X[:3], target=X[:3])
    found = pipe.pipeline.metrics()
    assert found["sent_bytes"] == 3 * 8 * 4
    assert "stage_0_backward_seconds" not in found


def test_a_loss_outside_makes_one_step_of_two_programs() -> None:
    pipe = pipecompile.compile(Net(), ["cpu", "cpu"], microbatches=3, costs="count")
    output = pipe(X)
    before = pipe.pipeline.metrics()
    loss_of(output, X).backward()
    after = pipe.pipeline.metrics()
    assert after["step_seconds"] > before["step_seconds"]
    assert after["sent_bytes"] == 2 * before["sent_bytes"]
    assert {"stage_0_forward_seconds", "stage_0_backward_seconds"} <= after.keys() > before.keys()
    pipe.pipeline.close()


def test_steps_inside_the_pipeline_are_told() -> None:
    pipe = pipecompile.compile(
        Net(), ["cpu", "cpu"], microbatches=3, costs="count", loss_fn=loss_of, schedule="pipedream",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )  # fmt: skip
    pipe(X, target=X)
    assert pipe.pipeline.metrics()["stage_1_other_seconds"] > 0
    pipe.pipeline.close()


def test_a_replanned_pipeline_has_no_step_yet(pipe: Any) -> None:
    pipe(X, target=X).backward()
    pipe.pipeline.replan()
    assert "step_seconds" not in pipe.pipeline.metrics()


def test_print_lists_stages_and_the_last_step(pipe: Any) -> None:
    head = "Pipeline(Net, schedule='1f1b', microbatches=3, devices=(cpu, cpu), {})"
    assert str(pipe.pipeline) == repr(pipe.pipeline) == head.format("not captured yet")
    pipe(X, target=X).backward()
    first, *stages, costs, last = str(pipe.pipeline).splitlines()
    assert first == repr(pipe.pipeline) == head.format("stages=2")
    assert [line.split(":")[0] for line in stages] == ["  stage 0 on rank 0, cpu", "  stage 1 on rank 1, cpu"]
    assert all(re.search(r": layers\S*; \d+ parameters, peak .*B; .* forward, .* per microbatch$", s) for s in stages)
    assert costs == "  predicted from costs: counted"
    assert last.startswith("  last step: ")
    assert last.endswith("; 1 capture")
    assert repr(pipe).splitlines()[:2] == [f"{first} of", "Net("]
