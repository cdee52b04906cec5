"""The default number of microbatches is the one with the shortest predicted step; results are the same for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile import Batching, PlanOptions
from pipecompile.compiler import plan_call
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.planning.by_rows import costs_at
from pipecompile.planning.counted import numbers
from pipecompile.profile import profile

WIDTH, ROWS, LAYERS = 8, 16, 4
Seconds = Callable[[int], float]  # of a layer's forward, by rows


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(self.norm(layer(x)))
        return nn.functional.mse_loss(x, y)


def built(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm).double()


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, rows, WIDTH, generator=generator).double().unbind())  # type: ignore[return-value]


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], list[int]]:
    """A function that sets what a profile measures; the rows that were profiled."""
    profiled: list[int] = []

    def let(seconds: Seconds) -> list[int]:
        def measured(captured: Any, graph: Any, *args: Any, **kwargs: Any) -> CostedGraph:
            profiled.append(captured.microbatch)
            counted = profile(captured, graph, "count")
            costs = tuple(
                Cost(seconds(captured.microbatch), 2 * seconds(captured.microbatch), cost.saved_bytes)
                if node.op == "linear"
                else Cost()
                for node, cost in zip(graph.nodes, counted.costs, strict=True)
            )
            return replace(counted, costs=costs, measured=True)

        monkeypatch.setattr(plan_call, "profile", measured)
        return profiled

    return let


ONE_EACH = PlanOptions(stages_per_rank=1)  # fewer schedules


def compiled(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, ["cpu", "cpu"], **{"schedule": "1f1b", **options})


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    assert len(gradients) == 2 * LAYERS
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def simulated(seconds: Seconds, count: int, stages: int = 2) -> float:
    """The 1F1B step of two stages of equal time: the bubble is one microbatch (PipeDream-flush, Megatron)."""
    return 3 * LAYERS / stages * seconds(ROWS // count) * (count + stages - 1)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [(lambda rows: 0.02 * rows, 16), (lambda rows: 0.02 + 0.004 * rows, 2), (lambda rows: 0.02 + 0.01 * rows, 4)],
    ids=["by rows", "by call", "both"],
)
def test_the_shortest_step_is_taken(
    seconds: Seconds, best: int, took: Callable[[Seconds], list[int]], recwarn: pytest.WarningsRecorder
) -> None:
    profiled = took(seconds)
    steps = {count: simulated(seconds, count) for count in (1, 2, 4, 8, 16)}
    assert min(steps, key=lambda count: steps[count]) == best
    model = built()
    x, y = data()
    expected = Net().double()
    expected.load_state_dict(model.state_dict())
    pipe = compiled(model)
    loss = pipe(x, y)
    assert pipe.pipeline.microbatches == best
    assert profiled[:2] == [4, 2]
    assert str(pipe.pipeline.report.microbatches[0]).startswith(f"{best}, predicted to take ")
    loss.backward()
    wanted = expected(x, y)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(model, expected)


class Squeezed(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1).squeeze(), y)


def test_a_squeeze_is_compared_too_down_to_microbatches_of_one_row(took: Callable[[Seconds], list[int]]) -> None:
    took(lambda rows: 0.02 * rows)
    torch.manual_seed(0)
    model = Squeezed().double()
    expected = Squeezed().double()
    expected.load_state_dict(model.state_dict())
    pipe = compiled(model)
    for rows in (ROWS, ROWS // 2):
        x, y = data(rows)
        loss, wanted = pipe(x, y), expected(x, y)
        if rows == ROWS:
            assert pipe.pipeline.microbatches == ROWS
        loss.backward()
        wanted.backward()
        torch.testing.assert_close(loss, wanted)
    assert_same_gradients(model, expected)


def test_later_batches_keep_the_number(took: Callable[[Seconds], list[int]]) -> None:
    profiled = took(lambda rows: 0.02 + 0.01 * rows)
    model = built()
    pipe = compiled(model)
    for rows in (ROWS, 5, 24):
        x, y = data(rows)
        torch.testing.assert_close(pipe(x, y), model.forward(x, y))
    assert pipe.pipeline.microbatches == 4
    assert len(profiled) == 2


def test_a_much_larger_batch_gets_no_fewer_than_the_usual_number(took: Callable[[Seconds], list[int]]) -> None:
    took(lambda rows: 0.02 + 0.004 * rows)
    model = built()
    pipe = compiled(model)
    ran = []
    for rows in (ROWS, ROWS + 2, 2 * ROWS, ROWS):
        x, y = data(rows)
        torch.testing.assert_close(pipe(x, y), model.forward(x, y))
        ran.append(len(pipe.pipeline.program.microbatches))
    assert ran == [2, 2, 4, 2]


def test_a_size_that_cannot_run_leaves_the_usual_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(captured: Any, graph: Any, *args: Any, **kwargs: Any) -> CostedGraph:
        if captured.microbatch != ROWS // 4:
            raise pipecompile.ExecutionError(f"cannot run a microbatch of {captured.microbatch} rows")
        found = profile(captured, graph, "count")
        return replace(found, costs=tuple(Cost(0.1, 0.2) for _ in found.costs), measured=True)

    monkeypatch.setattr(plan_call, "profile", measured)
    model = built()
    pipe = compiled(model)
    torch.testing.assert_close(pipe(*data()), model.forward(*data()))
    assert pipe.pipeline.microbatches == 4


@pytest.mark.parametrize("schedule", ["1f1b", "auto"])
def test_a_chosen_size_that_cannot_run_is_dropped(
    schedule: str, took: Callable[[Seconds], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profiled = took(lambda rows: 0.02 * rows)
    measured = plan_call.profile

    def of_two_rows(captured: Any, *args: Any, **kwargs: Any) -> CostedGraph:
        if captured.microbatch == 1:
            profiled.append(1)
            raise pipecompile.ExecutionError("cannot run a microbatch of 1 row")
        return measured(captured, *args, **kwargs)

    monkeypatch.setattr(plan_call, "profile", of_two_rows)
    model, (x, y) = built(), data()
    pipe = compiled(model, schedule=schedule, plan=ONE_EACH)
    torch.testing.assert_close(pipe(x, y), model.forward(x, y))
    assert profiled[:3] == [4, 2, 1]
    assert pipe.pipeline.microbatches in ((8,) if schedule == "auto" else (4,))
    assert str(pipe.pipeline.report.microbatches[0]).startswith(f"{pipe.pipeline.microbatches}, predicted to take ")


def test_a_chosen_size_whose_own_costs_exceed_memory_is_dropped(
    took: Callable[[Seconds], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profiled = took(lambda rows: 0.02 * rows)
    measured = plan_call.profile

    def more_of_one_row(captured: Any, *args: Any, **kwargs: Any) -> CostedGraph:
        found = measured(captured, *args, **kwargs)
        if captured.microbatch > 1:
            return found
        prints = tuple(replace(each, forward_bytes=1 << 40) for each in found.footprints)
        return replace(found, footprints=prints)

    monkeypatch.setattr(plan_call, "profile", more_of_one_row)
    cluster = Cluster.of(["cpu", "cpu"])
    cluster = replace(cluster, devices=tuple(replace(device, memory=1 << 30) for device in cluster.devices))
    model, (x, y) = built(), data()
    pipe = compiled(model, schedule="auto", cluster=cluster, plan=ONE_EACH)
    torch.testing.assert_close(pipe(x, y), model.forward(x, y))
    assert profiled[:3] == [4, 2, 1]
    assert pipe.pipeline.microbatches == 8


def test_a_step_that_one_device_does_faster_is_told(took: Callable[[Seconds], list[int]]) -> None:
    took(lambda rows: 0.02)
    pipe = compiled(built())
    with pytest.warns(UserWarning, match=r"on one device that runs the batch at once: small microbatches"):
        pipe(*data())


def test_a_number_that_is_given_stays(took: Callable[[Seconds], list[int]]) -> None:
    profiled = took(lambda rows: 0.02 * rows)
    pipe = compiled(built(), microbatches=4)
    pipe(*data())
    assert (pipe.pipeline.microbatches, profiled) == (4, [4])


@pytest.mark.parametrize(
    "options",
    [
        {"costs": "count"},
        {"batching": Batching(allow_mixing=["norm"])},
        {"schedule": "pipedream", "optimizer": lambda params: torch.optim.SGD(params, lr=0.1)},
    ],
    ids=["counted", "may mix", "pipedream"],
)
def test_it_stays_where_numbers_cannot_be_compared(
    options: dict[str, Any], took: Callable[[Seconds], list[int]]
) -> None:
    took(lambda rows: 0.02 * rows)
    pipe = compiled(built(), **options)
    pipe(*data())
    assert pipe.pipeline.microbatches == 4


def test_it_stays_in_deterministic_runs_and_for_short_steps(took: Callable[[Seconds], list[int]]) -> None:
    took(lambda rows: 0.02 * rows)
    torch.use_deterministic_algorithms(True)
    try:
        pipe = compiled(built())
        pipe(*data())
    finally:
        torch.use_deterministic_algorithms(False)
    took(lambda rows: 1e-5 * rows)
    short = compiled(built())
    short(*data())
    assert pipe.pipeline.microbatches == short.pipeline.microbatches == 4


def test_batch_statistics_get_no_smaller_microbatches(took: Callable[[Seconds], list[int]]) -> None:
    took(lambda rows: 0.02 * rows)
    pipe = compiled(built(norm=True))
    pipe(*data())
    assert pipe.pipeline.microbatches == 4


@pytest.mark.parametrize(
    ("batch", "expected"), [(16, [1, 2, 4, 8, 16]), (12, [1, 2, 4]), (7, [1, 4]), (6, [1, 2, 4]), (1, [1, 4])]
)
def test_numbers_divide_the_batch(batch: int, expected: list[int]) -> None:
    assert numbers(batch, ranks=2, usual=4, most=batch) == expected


def test_costs_between_two_sizes_lie_on_a_line_and_are_never_negative(took: Callable[[Seconds], list[int]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = compiled(built(), costs="count", microbatches=4, example_inputs=data())
    costed = pipe.pipeline.costs
    count = len(costed.costs)
    one = replace(costed, costs=(Cost(3.0, 8.0, 5),) * count)
    other = replace(costed, costs=(Cost(5.0, 4.0, 9),) * count)
    assert costs_at(one, other, (4, 8), 6) == (Cost(4.0, 8.0, 7),) * count
    assert costs_at(one, other, (4, 8), 16) == (Cost(9.0, 8.0, 17),) * count
    assert costs_at(one, replace(other, costs=(Cost(9.0, 20.0, 9),) * count), (4, 8), 1)[0] == Cost(0.0, 0.0, 2)


def test_a_larger_number_needs_no_margin_but_a_smaller_one_does(took: Callable[[Seconds], list[int]]) -> None:
    for seconds, best in ((lambda rows: 0.02 + 0.0415 * rows, 8), (lambda rows: 0.02 + 0.0095 * rows, 4)):
        took(seconds)
        steps = {count: simulated(seconds, count) for count in (2, 4, 8)}
        other = 8 if best == 8 else 2
        assert 0.98 * steps[4] < steps[other] < steps[4], steps
        pipe = compiled(built())
        pipe(*data())
        assert pipe.pipeline.microbatches == best


@pytest.mark.parametrize(
    ("seconds", "fixed"), [(lambda rows: 0.02 * rows, {4, 8, 16}), (lambda rows: 0.02 + 0.001 * rows, {1, 2})]
)
def test_auto_chooses_the_number_with_the_schedule(
    seconds: Seconds, fixed: set[int], took: Callable[[Seconds], list[int]], recwarn: pytest.WarningsRecorder
) -> None:
    took(seconds)
    model, (x, y) = built(), data()
    pipe = compiled(model, schedule="auto")
    expected = Net().double()
    expected.load_state_dict(model.state_dict())
    loss, wanted = pipe(x, y), expected(x, y)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(model, expected)
    assert pipe.pipeline.microbatches in fixed
    said = pipe.pipeline.report.schedule
    count = pipe.pipeline.microbatches
    assert f"{count} microbatch" in said[1]
    assert said[1].startswith(f"{pipe.pipeline.schedule}, ")
    assert sum("not planned with" in line for line in said) >= 1
    if count > 1:
        assert str(pipe.pipeline.report.microbatches[0]).startswith(f"{count}, predicted to take ")
    steps = {count: simulated(seconds, count) for count in (1, 2, 4, 8, 16)}
    planned = pipe.pipeline._capture_in_use.planned
    assert planned.weighed[0].seconds <= min(steps.values()) * 1.02  # 1F1B is among the candidates
    given = compiled(built(), schedule="auto", microbatches=4, plan=ONE_EACH)
    given(x, y)
    assert given.pipeline.microbatches == 4
    assert {it.microbatches for it in given.pipeline._capture_in_use.planned.weighed} == {4}
