"""Operations in turn: what is timed between what, on a clock that the operations themselves turn."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from queue import SimpleQueue
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from pipecompile.capture import capture, read_call, summarize
from pipecompile.errors import ExecutionError
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.profile import profile
from pipecompile.profile.used_memory import used_memory

in_turn = importlib.import_module("pipecompile.profile.in_turn")
CPU = torch.device("cpu")


class Hand:
    """A clock that stands, but for what moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = 0.0  # seconds of other programs at each operation
        self.did: list[str] = []

    def moves(self, name: str, seconds: float) -> None:
        self.did.append(name)
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    hand = Hand()
    monkeypatch.setattr(time, "thread_time", lambda: hand.now)
    monkeypatch.setattr(in_turn, "_adding", lambda: lambda nbytes: 1000.0 * nbytes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield hand
    torch.set_num_threads(before)


class Slow(torch.autograd.Function):
    """``2 * x``, which takes as many seconds of the clock as it is told."""

    hand: Hand
    seeds: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx, x: Tensor, name: str, seconds: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.name, ctx.seconds = name, seconds
        Slow.hand.moves(name, seconds)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        Slow.seeds.append(float(gradient.flatten()[0]))
        Slow.hand.moves(f"{ctx.name}'", 10 * ctx.seconds)
        return 2 * gradient, None, None


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = Slow.apply(x * self.weight, "a", 1.0)
        y = Slow.apply(x, "b", 2.0)
        return (y + x).sum()


def costed(model: nn.Module, *args: Tensor) -> CostedGraph:
    captured = capture(model, read_call(model.forward, args, {}))
    return profile(captured, summarize(captured), "measure", CPU, threads=1)


def costs(found: CostedGraph, op: str) -> list[Cost]:
    return [cost for node, cost in zip(found.graph.nodes, found.costs, strict=True) if op in node.op.lower()]


@pytest.fixture
def slow(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> Hand:
    monkeypatch.setattr(in_turn, "is_opaque", lambda function: False)
    Slow.hand, Slow.seeds = hand, []
    return hand


def test_a_stretch_runs_forward_then_backward_with_its_gradients(slow: Hand) -> None:
    found = costed(Chain(), torch.ones(2, 4))
    turns = [name for name in slow.did if name.endswith("'")]
    assert slow.did[-8:] == ["a", "b", "b'", "a'"] * in_turn.RUNS
    assert set(turns) == {"a'", "b'"}
    # d(sum) is 1 for b, and for a the 1 of the addition and the 2 that b returns
    assert Slow.seeds[-4:] == [1.0, 3.0] * in_turn.RUNS
    seconds = [(cost.forward, cost.backward) for cost in costs(found, "slow")]
    assert seconds == [(1.0, 10.0), (2.0, 20.0)]


def test_the_addition_of_weight_gradients_counts_for_who_reads_the_weight(slow: Hand) -> None:
    found = costed(Chain(), torch.ones(2, 4))
    assert [cost.backward for cost in costs(found, "mul")] == [1000.0 * 4 * 4]
    assert [cost.backward for cost in costs(found, "add")] == [0.0]


def test_equal_operations_have_the_median_of_their_runs(slow: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, moves = SimpleQueue[float](), slow.moves

    def moving(name: str, _: float) -> None:
        moves(name, 0.0 if name.endswith("'") or seconds.empty() else seconds.get())

    monkeypatch.setattr(slow, "moves", moving)

    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = Slow.apply(x, "a", 1.0)
            return x

    monkeypatch.setattr("pipecompile.profile.call.Call.allocated", lambda self: (0, 0))
    captured = capture(Three(), read_call(Three().forward, (torch.ones(2, 4, requires_grad=True),), {}))
    for each in (*[5.0] * 3, 1.0, 2.0, 9.0, 3.0, 4.0, 8.0):
        seconds.put(each)
    found = profile(captured, summarize(captured), "measure", CPU, threads=1)
    assert [cost.forward for cost in costs(found, "slow")] == [3.5] * 3


@pytest.mark.parametrize("stretch", [1, 1 << 30])
def test_all_nodes_have_seconds_whatever_a_stretch_keeps(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    monkeypatch.setattr(in_turn, "STRETCH", stretch)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.relu_(self.norm(self.linear(x))).chunk(2, dim=1)
            return (a * b).sum()

    model = Parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = costed(model, torch.randn(16, 8))
    for op in ("linear", "batch_norm", "relu_", "chunk", "mul", "sum"):
        for cost in costs(found, op):
            assert cost.forward > 0, op
            assert cost.backward > 0 or op in ("sum", "chunk", "relu_"), op
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Counted(nn.Module):
    """Writes to a buffer of the model, and to a part of a value, which later operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.linear = nn.Embedding(3, 4), nn.Linear(4, 4)
        self.register_buffer("cache", torch.full((2, 4), -1.0))
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * 2
        self.cache.index_fill_(0, self.step, 7.0)
        self.step += 1
        self.cache.index_fill_(0, self.step, 8.0)
        self.step += 1
        first = y[:, :2]
        first.zero_()
        read = Reading.apply(y)
        cached = Reading.apply(self.cache + 0 * self.rows.weight[:2])
        return (read + Reading.apply(self.rows(self.step)) + cached.sum()).sum()


class Reading(torch.autograd.Function):
    """What it reads, unchanged, which is noted in the backward."""

    seen: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        Reading.seen += ctx.saved_tensors
        return gradient


@pytest.mark.parametrize("stretch", [1, 1 << 30])
def test_every_run_reads_what_was_written_in_place_before(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    monkeypatch.setattr(in_turn, "STRETCH", stretch)
    torch.manual_seed(0)
    model, x = Counted(), torch.randn(3, 4)
    y = model.linear(x).detach() * 2
    y[:, :2] = 0
    expected = [y, model.rows.weight[2:].detach(), torch.tensor([[7.0] * 4, [8.0] * 4])]
    captured = capture(model, read_call(model.forward, (x,), {}))
    Reading.seen = []
    monkeypatch.setattr("pipecompile.profile.call.Call.allocated", lambda self: (0, 0))
    profile(captured, summarize(captured), "measure", CPU, threads=1, seconds=60.0)  # enough for all runs
    assert len(Reading.seen) == 3 * in_turn.RUNS
    for seen in Reading.seen:
        assert any(seen.shape == each.shape and torch.equal(seen, each) for each in expected), seen
    assert int(model.step) == 0


def test_a_thread_that_waits_for_a_processor_is_told_where_the_wall_clock_is_read(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = iter(range(1_000_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(wall)))
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    assert costed(model, torch.ones(2, 8)).waited == 0.0  # the thread's own clock stands meanwhile
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert costed(model, torch.ones(2, 8)).waited == 1.0


def test_a_coarse_clock_of_threads_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = time.get_clock_info("thread_time")
    coarse.resolution = 0.0156
    monkeypatch.setattr(time, "get_clock_info", lambda name: coarse)
    in_turn._is_fine.cache_clear()
    assert in_turn.clock_of(torch.add) is time.perf_counter
    monkeypatch.undo()
    in_turn._is_fine.cache_clear()
    assert in_turn.clock_of(torch.add) in (time.thread_time, time.perf_counter)


def test_an_operation_that_fails_in_its_second_run_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    run = in_turn.InTurn._timed

    def failing(self: object, it: object, call: object) -> object:
        if "tanh" in str(it.node):  # type: ignore[attr-defined]
            raise ValueError("no more memory")
        return run(self, it, call)

    monkeypatch.setattr(in_turn.InTurn, "_timed", failing)
    with pytest.raises(ExecutionError, match=r"module '1'.*cannot run a microbatch of 2 rows \(ValueError: no more"):
        costed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.ones(2, 8))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_are_no_backwards(mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode():
        found = costed(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.ones(2, 8))
    assert all(cost.forward > 0 and cost.backward == 0 for cost in costs(found, "linear") + costs(found, "tanh"))


def test_used_memory_is_free_inside() -> None:
    with used_memory(1 << 20):
        assert torch.ones(1 << 18).sum() == 1 << 18


def test_another_size_is_measured_relative_to_known_costs(slow: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "STRETCH", 1)
    captured = capture(Chain(), read_call(Chain().forward, (torch.ones(4, 4),), {}))
    known = profile(captured, summarize(captured), "measure", CPU, threads=1)
    moves = slow.moves  # now another program slows all down to a third
    monkeypatch.setattr(slow, "moves", lambda name, seconds: moves(name, 3 * seconds))
    half = replace(captured, microbatch=2)
    slow.did.clear()
    found = profile(half, summarize(half), "measure", CPU, threads=1, beside=(captured, known))
    assert [(cost.forward, cost.backward) for cost in costs(found, "slow")] == [(1.0, 10.0), (2.0, 20.0)]
    assert slow.did[: slow.did.index("b")].count("a'") == 2 * (1 + in_turn.RUNS)  # both sizes, before the next one
    saved, before = (sum(cost.saved_bytes for cost in it.costs) for it in (found, known))
    assert saved < before
