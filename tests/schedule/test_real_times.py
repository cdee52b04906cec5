"""Orders for V shapes on plans that know the times of their stages: never longer, no more memory, ascending."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from oracle import assert_same, step
from pairs import pipe_of
from torch import nn

from pipecompile import PlanOptions
from pipecompile.ir.graph import Cost
from pipecompile.ir.halves import Halves
from pipecompile.ir.instruction import BackwardWeight, Recv, Send
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_times import Times
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.simulator import simulate

V_SHAPES = ("zb-v", "v-half", "v-min", "dualpipe-v")


def v_plan(ranks: int, forward: list[float], backward: list[float], saved: list[int], transfer: float = 0.0) -> Plan:
    """A chain on a V whose first stages are not on rank 0, 1, ..."""
    down = [(rank + 1) % ranks for rank in range(ranks)]
    plan = Plan.chain(2 * ranks, (*down, *reversed(down)), nbytes=1)
    times = Times(
        forward=tuple(forward),
        backward=tuple(backward),
        saved_bytes=tuple(saved),
        transfer=(transfer,) * len(plan.channels),
    )
    return replace(plan, times=times)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", V_SHAPES)
def test_a_step_is_never_longer_and_needs_no_more_memory(name: str, seed: int) -> None:
    random = Random(seed)
    ranks, microbatches = random.choice((1, 2, 3, 4)), random.choice((1, 2, 3, 8))
    forward = [random.choice((0.0, 1.0, 2.0, random.random())) for _ in range(2 * ranks)]
    backward = [seconds * random.choice((1.0, 2.0, 3.0)) for seconds in forward]
    saved = [random.randrange(1, 9) for _ in forward]
    costs = [Cost(*cost) for cost in zip(forward, backward, saved, strict=True)]
    plan = v_plan(ranks, forward, backward, saved)
    program = SCHEDULES[name].program(plan, microbatches)
    before = simulate(SCHEDULES[name].program(replace(plan, times=None), microbatches), costs)
    after = simulate(program, costs)
    assert after.makespan <= before.makespan * (1 + 1e-9)
    assert all(a <= b for a, b in zip(after.peak_bytes, before.peak_bytes, strict=True))
    for rank in program.ranks:
        for key in {(type(i), i.stage) for i in rank}:
            found = [i.microbatch for i in rank if (type(i), i.stage) == key]
            assert found == sorted(set(found))
            assert key[0] is BackwardWeight or len(found) == microbatches


@pytest.mark.parametrize("name", V_SHAPES)
def test_unequal_stages_gain(name: str) -> None:
    forward, backward = [1.0, 2.0, 4.0, 1.0, 1.0, 3.0], [2.0, 6.0, 4.0, 3.0, 1.0, 3.0]
    costs = [Cost(f, b, 1) for f, b in zip(forward, backward, strict=True)]
    plan = v_plan(3, forward, backward, [1] * 6)
    before, after = (simulate(SCHEDULES[name].program(it, 4), costs) for it in (replace(plan, times=None), plan))
    assert after.makespan < 0.98 * before.makespan


@pytest.mark.parametrize("off", [0.0, 0.01])
@pytest.mark.parametrize("name", V_SHAPES)
def test_no_backward_is_split_for_less_than_that_takes(name: str, off: float) -> None:
    forward = [1.0 + off * stage for stage in range(4)]
    backward = [2 * seconds for seconds in forward]
    costs = [Cost(f, b, 1) for f, b in zip(forward, backward, strict=True)]
    plan = v_plan(2, forward, backward, [1] * 4)
    halves = tuple(Halves(f, 0.51 * b, 0.51 * b) for f, b in zip(forward, backward, strict=True))
    assert plan.times is not None
    plan = replace(plan, times=replace(plan.times, halves=halves))
    before, after = (SCHEDULES[name].program(it, 4) for it in (replace(plan, times=None), plan))
    assert simulate(after, costs, halves=halves).makespan <= simulate(before, costs, halves=halves).makespan * (
        1 + 1e-9
    )


@pytest.mark.parametrize("name", V_SHAPES)
def test_stages_that_recompute_keep_the_order(name: str) -> None:
    schedule = SCHEDULES[name]
    again = replace(v_plan(2, [1.0, 2.0, 3.0, 4.0], [2.0] * 4, [1] * 4), recomputed=(1,))
    assert schedule.program(again, 4).ranks == schedule.program(replace(again, times=None), 4).ranks


def test_plans_with_other_times_are_equal_and_times_are_kept_in_json() -> None:
    plan = v_plan(2, [1.0] * 4, [2.0] * 4, [1] * 4, transfer=0.5)
    assert plan == replace(plan, times=None)
    assert Plan.from_json(plan.to_json()).times == plan.times


class Uneven(nn.Module):
    """Stages of very different times, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((4, 64), (64, 48), (48, 48), (48, 2))
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


@pytest.mark.parametrize("name", V_SHAPES)
def test_a_pipeline_on_a_v_runs_the_order_for_its_times(name: str) -> None:
    torch.manual_seed(0)
    model, x = Uneven().double(), torch.randn(8, 4, dtype=torch.float64)
    pins = PlanOptions(pins={f"body.{layer}": layer for layer in range(4)})
    pipe = pipe_of(model, 2, schedule=name, microbatches=4, plan=pins)
    expected = step(model, model, lambda loss: loss, ((x,), {}))
    assert_same(step(pipe, model, lambda loss: loss, ((x,), {})), expected)
    plan = pipe.pipeline.plan
    assert plan.times is not None
    assert plan.times.transfer[1] == 0.0  # between stages of one rank
    ran = [[i for i in rank if not isinstance(i, Send | Recv)] for rank in pipe.pipeline.program.ranks]
    assert ran == [list(rank) for rank in SCHEDULES[name].program(plan, 4).ranks]


def test_a_chain_needs_no_times() -> None:
    pipe = pipe_of(Uneven().double(), 2, schedule="zb-h1", microbatches=4)
    pipe(torch.randn(8, 4, dtype=torch.float64)).backward()
    assert pipe.pipeline.plan.times is None
