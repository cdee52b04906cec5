"""Without ``schedule=``, backwards are split where that is predicted to save time; results are the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_microbatch_count import LAYERS, Seconds, assert_same_gradients, built, data, took

import pipecompile
from pipecompile import PlanOptions
from pipecompile.ir.graph import Cost
from pipecompile.ops.split_backward import Queue
from pipecompile.planning.best_schedule import under_best
from pipecompile.planning.candidates import DEFAULT
from pipecompile.planning.planned import Planned
from pipecompile.planning.predict import predict
from pipecompile.schedule import SYNCHRONOUS

__all__ = ["took"]

Took = Callable[[Seconds], list[int]]


def piped(**options: Any) -> Any:
    return pipecompile.compile(built(), ["cpu", "cpu"], **options)


def called(**options: Any) -> Any:
    pipe = piped(**options)
    pipe(*data())
    return pipe.pipeline


def test_zb_h1_is_taken_where_it_is_shorter(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    expected = built()
    pipe = piped(microbatches=4)
    loss, wanted = pipe(*data()), expected(*data())
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(pipe.pipeline.model, expected)
    assert pipe.pipeline.schedule == "zb-h1"
    assert pipe.pipeline.program.split, "the call ran under it"
    schedule, split, whole = pipe.pipeline.report.schedule
    assert schedule.startswith("zb-h1, ")
    assert split.startswith("zb-h1, one stage on each rank, 4 microbatches: predicted step ")
    assert whole.startswith("1f1b, one stage on each rank, 4 microbatches: predicted step ")


def test_steps_are_those_of_the_closed_forms(took: Took) -> None:
    """Zero Bubble (Qi et al. 2024), table 2: bubbles of (p - 1)(F + B + W) and (p - 1)(F + B - W); all are equal."""
    took(lambda rows: 0.02 * rows)
    split, whole = called(microbatches=4)._capture_in_use.planned.weighed
    each = LAYERS / 2 * 0.02 * 4
    assert whole.seconds == pytest.approx(each * (4 * 3 + 3), rel=0.01)
    assert split.seconds == pytest.approx(each * (4 * 3 + 1), rel=0.01)


def test_the_number_of_microbatches_is_compared_under_both(took: Took) -> None:
    took(lambda rows: 0.02 + 0.004 * rows)
    best, tried = called(), {}
    for it in best._capture_in_use.planned.counted.tried:
        tried[it.microbatches] = it.step
    for number in (2, 4):
        found = called(microbatches=number)._capture_in_use.planned.weighed
        assert tried[number] == pytest.approx(min(it.seconds for it in found), rel=0.01)
    assert (best.schedule, best.microbatches) == ("zb-h1", min(tried, key=lambda number: tried[number]))


def test_1f1b_stays_where_splitting_takes_longer_than_the_bubble(took: Took) -> None:
    took(lambda rows: 2.5e-3)
    pipeline = called(microbatches=16)
    assert pipeline.schedule == "1f1b"
    assert [it.schedule for it in pipeline._capture_in_use.planned.weighed] == ["1f1b", "zb-h1"]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"costs": "count"},
        {"stage_compile": "eager"},
        {"plan": PlanOptions(replicas=[1, 1])},
        {"microbatches": 4, "seconds": 1e-5},
    ],
    ids=["named", "counted", "compiled stages", "replicas", "short steps"],
)
def test_1f1b_stays(options: dict[str, Any], took: Took) -> None:
    seconds = options.pop("seconds", 0.02)
    took(lambda rows: seconds * rows)
    pipeline = called(**options)
    assert pipeline.schedule == "1f1b"
    assert not pipeline.program.split


def test_1f1b_stays_in_deterministic_runs(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    torch.use_deterministic_algorithms(True)
    try:
        assert called().schedule == "1f1b"
    finally:
        torch.use_deterministic_algorithms(False)


def test_1f1b_stays_if_the_caller_computes_the_loss(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"])
    pipe(data()[0]).sum().backward()
    assert pipe.pipeline.schedule == "1f1b"


def test_the_choice_stays_for_other_captures_and_copies(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    pipe = piped(microbatches=4)
    for rows in (16, 6):
        loss = pipe(*data(rows))
        torch.testing.assert_close(loss, built()(*data(rows)))
        assert pipe.pipeline.schedule == "zb-h1"
    again = pipecompile.compile(pipe.pipeline.model, ["cpu", "cpu"], schedule="1f1b")
    again(*data())
    assert again.pipeline.schedule == "1f1b"


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_copy_keeps_the_choice_with_the_plan_and_a_pickle_chooses_again(took: Took, asked: str | None) -> None:
    took(lambda rows: 0.02 * rows)
    options = {"microbatches": 4, "schedule": asked, "plan": PlanOptions(stages_per_rank=1)}
    pipe, expected = piped(**options), built()
    before = pipe.pipeline.schedule
    pipe(*data())
    chosen = pipe.pipeline.schedule
    assert chosen.startswith("zb-")
    copy, loaded = deepcopy(pipe), pickle.loads(pickle.dumps(pipe))
    assert (copy.pipeline.schedule, loaded.pipeline.schedule) == (chosen, before)
    expected(*data()).backward()
    for other in (copy, loaded):
        other(*data()).backward()
        assert_same_gradients(other.pipeline.model, expected)
        assert other.pipeline.schedule == chosen
        assert other.pipeline.program.split


def test_what_is_chosen_does_not_bind(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    pipe = piped(microbatches=4)
    pipe(*data())
    pipe.pipeline.replan(plan=PlanOptions(replicas=[2]), costs=pipe.pipeline.costs)
    torch.testing.assert_close(pipe(*data()), built()(*data()))
    assert pipe.pipeline.schedule == "1f1b"
    assert not pipe.pipeline.program.split


def test_a_verification_before_the_first_call_runs_what_is_chosen(took: Took, monkeypatch: pytest.MonkeyPatch) -> None:
    took(lambda rows: 0.02 * rows)
    ran: list[int] = []
    empty = Queue.empty
    monkeypatch.setattr(Queue, "empty", lambda queue: (ran.append(len(queue.waiting)), empty(queue)))
    assert piped(microbatches=4).pipeline.verify(*data()).exact
    assert sum(ran), "it ran split backwards"


@pytest.mark.parametrize("asked", [None, "auto"])
def test_predicted_steps_are_those_of_the_present_plan(took: Took, asked: str | None) -> None:
    """A cut that moves, and costs that are corrected, leave no step of the plan before."""
    took(lambda rows: 0.02 * rows)
    found: Planned = called(microbatches=4, schedule=asked)._capture_in_use.planned
    last = max(i for i, cost in enumerate(found.costed.costs) if cost.forward)
    costs = [Cost(3 * it.forward, 3 * it.backward) if i == last else it for i, it in enumerate(found.costed.costs)]
    slower = replace(found.costed, costs=tuple(costs))
    moved, same = found.again(slower), found.recosted(slower)
    assert moved.plan.stage_of != found.plan.stage_of
    for it in (moved, same):
        assert it.weighed[0].schedule == found.schedule
        assert {"1f1b", "zb-h1"} <= {other.schedule for other in it.weighed} or it.plan.num_stages > 2
        for other in it.weighed:
            program = SYNCHRONOUS[other.schedule](it.plan, 4)
            assert other.seconds == pytest.approx(predict(program, slower, it.cluster).makespan, rel=0.02)


def test_what_does_not_fit_is_not_taken(took: Took) -> None:
    took(lambda rows: 0.02 * rows)
    found: Planned = called(microbatches=4)._capture_in_use.planned
    needed = found.work.under("zb-h1", found.work.placement).memory(found.costed, found.plan, found.cluster).ranks

    def within(limits: list[int]) -> str:
        pairs = zip(found.cluster.devices, limits, strict=True)
        devices = tuple(replace(device, memory=limit) for device, limit in pairs)
        return under_best(replace(found, cluster=replace(found.cluster, devices=devices)), DEFAULT).schedule

    assert within(list(needed)) == "zb-h1"
    assert within([needed[0], needed[1] - 1]) == "1f1b"
