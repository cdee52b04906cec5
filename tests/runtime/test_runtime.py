"""The runtime: failures surface and leave nothing behind, weights have the versions they need, passes do not mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from itertools import permutations
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import ExecutionError
from pipecompile.ir.instruction import Forward, Recv, Send
from pipecompile.ir.plan import Plan
from pipecompile.runtime import Lane, LocalTransport, Microbatch, Weights
from pipecompile.runtime.gradients import _input_gradient
from pipecompile.runtime.transport import Aborted

STAGES = 3
CPU = torch.device("cpu")


class Stop(BaseException):
    """As a KeyboardInterrupt comes: no Exception."""


class Fuse(torch.autograd.Function):
    """Passes values and gradients on, unless it is lit, of which a capture sees nothing."""

    wire: SimpleQueue[tuple[str, BaseException]] = SimpleQueue()
    one_at_a_time = threading.Lock()

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        Fuse._burn(f"forward {name}")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        Fuse._burn(f"backward {ctx.name}")
        return gradient.clone(), None

    @staticmethod
    def _burn(place: str) -> None:
        for lit, error in Fuse.on_the_wire():
            if lit == place:
                raise error

    @staticmethod
    def on_the_wire() -> list[tuple[str, BaseException]]:
        with Fuse.one_at_a_time:
            found = Fuse.taken()
            for each in found:
                Fuse.wire.put(each)
        return found

    @staticmethod
    def taken() -> list[tuple[str, BaseException]]:
        """What was on the wire, which is empty then."""
        found = []
        while not Fuse.wire.empty():
            found.append(Fuse.wire.get_nowait())
        return found


class Fused(nn.Module):
    """A layer and its fuse."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.name = nn.Linear(D, D), name

    def forward(self, x: Tensor) -> Tensor:
        return Fuse.apply(self.layer(x), self.name)


class Net(nn.Module):
    """One layer with a fuse for each stage; the first one's result skips to the end."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fused(str(stage)) for stage in range(STAGES))
        self.inside = inside
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        out = self.layers[2](self.layers[1](first).tanh() + first) + first
        return mean_square(out) if self.inside else out


def pipe_of(model: nn.Module, stages: int = STAGES, **options: Any) -> Any:
    options = {"microbatches": 4, "costs": "count", **options}
    return pipecompile.compile(model, devices=["cpu"] * stages, **options)


def floats(batch: int = 4) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64)


def loss_of(pipe: Any, x: Tensor) -> Tensor:
    output = pipe(x)
    return mean_square(output) if output.ndim else output


def works(pipe: Any) -> None:
    x = floats()
    inputs = ((x,), {})
    model = pipe.pipeline.model
    ours = step(lambda x: loss_of(pipe, x), model, lambda loss: loss, inputs)
    assert_same(ours, step(lambda x: loss_of(model, x), model, lambda loss: loss, inputs))


def stage_of_fuse(pipe: Any, number: int) -> int | None:
    graph, _, _ = summary(pipe)
    index = next(i for i, n in enumerate(graph.nodes) if n.op == "Fuse_apply" and n.path == f"layers.{number}")
    return pipe.pipeline.plan.stage_of[index]


def summary(pipe: Any) -> Any:
    """The graph, the captured graph and the stages behind a pipeline."""
    compiled = pipe.pipeline._capture_in_use
    return compiled.graph, compiled.captured.graph, compiled.stages


@pytest.fixture
def light() -> Iterator[Callable[..., None]]:
    def lit(place: str, error: BaseException | None = None) -> None:
        Fuse.taken()
        Fuse.wire.put((place, error or ValueError("too hot")))

    yield lit
    Fuse.taken()


# Failure


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("where", range(STAGES))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_failure_in_any_stage_names_stage_instruction_module_and_line(
    direction: str, where: int, inside: bool, light: Callable[..., None]
) -> None:
    pipe = pipe_of(Net(inside))
    works(pipe)
    stage = stage_of_fuse(pipe, where)
    light(f"{direction} {where}")
    place = rf"stage {stage}, {stage}{direction[0].upper()}\d: .*"
    module = rf"module 'layers\.{where}', .*test_runtime\.py:\d+: " if direction == "forward" else ""
    with pytest.raises(ExecutionError, match=f"{place}{module}ValueError: too hot") as caught:
        loss_of(pipe, floats()).backward()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b"])
@pytest.mark.parametrize("place", [f"{way} {stage}" for way in ("forward", "backward") for stage in range(STAGES)])
def test_a_pipeline_works_again_after_a_failure(place: str, schedule: str, light: Callable[..., None]) -> None:
    pipe = pipe_of(Net(), schedule=schedule)
    works(pipe)
    light(place)
    with pytest.raises(ExecutionError):
        loss_of(pipe, floats()).backward()
    Fuse.taken()
    works(pipe)
    works(pipe)


@pytest.mark.parametrize("place", ["forward 1", "backward 1", "backward 0"])
@pytest.mark.parametrize("error", [Stop("stop"), KeyboardInterrupt()], ids=["own", "keyboard"])
def test_what_is_no_exception_comes_through_as_it_is(
    place: str, error: BaseException, light: Callable[..., None]
) -> None:
    pipe = pipe_of(Net())
    works(pipe)
    light(place, error)
    with pytest.raises(type(error)):
        loss_of(pipe, floats())
    Fuse.taken()
    works(pipe)


def test_an_interrupt_while_ranks_are_started_stops_those_that_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipe_of(Net())
    works(pipe)
    started = iter([copy_context])

    def interrupted() -> Any:
        for copied in started:
            return copied()
        raise KeyboardInterrupt

    monkeypatch.setattr("pipecompile.runtime.executor.copy_context", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss_of(pipe, floats())
    monkeypatch.undo()
    for lane in pipe.pipeline._session.lanes.values():
        lane.thread.settle()  # none of them waits for a rank that has never begun
    works(pipe)


def test_a_failure_leaves_no_gradient_behind(light: Callable[..., None]) -> None:
    pipe = pipe_of(Net())
    works(pipe)
    light("backward 0")
    with pytest.raises(ExecutionError):
        loss_of(pipe, floats())
    assert {parameter.grad for parameter in pipe.parameters()} == {None}


@pytest.mark.parametrize("place", ["forward 0", "forward 1"])
def test_a_failure_leaves_no_autocast_behind(light: Callable[..., None], place: str) -> None:
    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Fused("0"), Fused("1")

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first.layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.last(self.first(x))
            return self.last.layer(x.float()).square().mean()

    pipe, x = pipecompile.compile(Lowered(), ["cpu"] * 2, microbatches=2, costs="count"), torch.randn(4, D)
    before = pipe(x)
    light(place)
    with pytest.raises(ExecutionError, match="too hot"):
        pipe(x)
    Fuse.taken()
    assert torch.equal(pipe(x), before)
    assert not torch.is_autocast_enabled("cpu")


def test_a_failure_of_a_deferred_backward_may_be_repaired_by_another_call(light: Callable[..., None]) -> None:
    pipe = pipe_of(Net(inside=False))
    loss = loss_of(pipe, floats())
    light("backward 1")
    with pytest.raises(ExecutionError, match="too hot"):
        loss.backward()
    Fuse.taken()
    works(pipe)


def test_an_asynchronous_pipeline_works_again_after_a_failure(light: Callable[..., None]) -> None:
    pipe = pipe_of(Net(), schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    x = floats()
    pipe(x)
    for place in ("forward 1", "backward 0"):
        light(place)
        with pytest.raises(ExecutionError, match="too hot"):
            pipe(x)
        Fuse.taken()
        before = [parameter.detach().clone() for parameter in pipe.parameters()]
        assert torch.isfinite(pipe(x))
        pipe.pipeline.flush()
        assert all(not torch.equal(b, p) for b, p in zip(before, pipe.parameters(), strict=True))


def test_a_failure_in_a_flush_surfaces(light: Callable[..., None]) -> None:
    pipe = pipe_of(Net(), schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    pipe(floats())
    light("backward 0")
    with pytest.raises(ExecutionError, match="too hot"):
        pipe.pipeline.flush()
    Fuse.taken()
    pipe.pipeline.flush()
    assert torch.isfinite(pipe(floats()))


def test_a_failure_of_the_optimizer_names_its_step() -> None:
    class Bad(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError("no rate")

    pipe = pipe_of(Net(), schedule="pipedream", optimizer=lambda p: Bad(p, lr=0.01))
    with pytest.raises(ExecutionError, match=r"stage \d, \dS\d: ZeroDivisionError: no rate"):
        pipe(floats())


def test_threads_do_not_grow_with_calls() -> None:
    pipe = pipe_of(Net())
    works(pipe)
    before = set(threading.enumerate())
    for _ in range(3):
        works(pipe)
    assert set(threading.enumerate()) <= before


def test_threads_end_with_their_pipeline() -> None:
    import gc

    gc.collect()
    before = set(threading.enumerate())
    pipe = pipe_of(Net())
    works(pipe)
    started = set(threading.enumerate()) - before
    assert len(started) == STAGES
    del pipe
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


# Passes that are under way at once


@pytest.mark.parametrize("inside", [True, False])
def test_two_passes_are_outstanding_before_either_backward(inside: bool) -> None:
    pipe, model = pipe_of(Net(inside)), Net(inside)
    model.load_state_dict(pipe.state_dict())
    first, second = floats(), floats(6)
    for module in (pipe, model):
        losses = [loss_of(module, first), loss_of(module, second)]
        (losses[0] * 3).backward()
        losses[1].backward()
    for (name, parameter), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, msg=name)


@pytest.mark.parametrize("inside", [True, False])
def test_an_evaluation_between_forward_and_backward_changes_nothing(inside: bool) -> None:
    pipe, model = pipe_of(Net(inside)), Net(inside)
    model.load_state_dict(pipe.state_dict())
    x, other = floats(), floats(8)
    loss = loss_of(pipe, x)
    with torch.no_grad():
        loss_of(pipe.eval(), other)
    pipe.train()
    loss.backward()
    loss_of(model, x).backward()
    for (name, parameter), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, msg=name)


def test_an_output_that_is_dropped_frees_what_its_backward_needed() -> None:
    import gc
    import weakref

    pipe = pipe_of(Net(inside=False))
    works(pipe)
    x = floats()
    output = pipe(x)
    nodes = weakref.ref(output.grad_fn)
    assert nodes() is not None
    del output
    gc.collect()
    assert nodes() is None


def test_a_step_between_two_calls_is_seen_by_the_second() -> None:
    pipe, x = pipe_of(Net()), floats()
    before = pipe(x).detach()
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))
    assert not torch.allclose(pipe(x), before)


def watched(pipe: Any) -> list[int]:
    return [i for i, node in enumerate(summary(pipe)[0].nodes) if node.op == "Watch_apply"]


def test_every_stage_runs_in_a_thread_of_its_own() -> None:
    seen: SimpleQueue[int] = SimpleQueue()  # no container, which is left as unsplit

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.put(threading.get_ident())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return Watch.apply(self.layer(x))

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(STAGES)).double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    pipe = pipe_of(Watched())
    pipe(floats())
    while not seen.empty():
        seen.get()
    pipe(floats())
    threads = {seen.get() for _ in range(seen.qsize())}
    assert len(threads) == len({pipe.pipeline.plan.stage_of[i] for i in watched(pipe)}) > 1
    assert threading.get_ident() not in threads


# Weights


def parameters(*values: float) -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(torch.full((3,), float(value))) for i, value in enumerate(values)}


def stepping(tensors: dict[str, nn.Parameter], rate: float = 1.0) -> Weights:
    return Weights(tensors, CPU, lambda params: torch.optim.SGD(params, lr=rate))


def accumulate(weights: Weights, gradient: float) -> None:
    for leaf in weights.current.leaves.values():
        leaf.grad = torch.full_like(leaf, gradient)
    weights.touch(weights.current)


def test_a_version_shares_its_memory_with_the_parameters() -> None:
    tensors = parameters(1, 2)
    leaves = stepping(tensors).current.leaves
    for name, parameter in tensors.items():
        assert leaves[name].data_ptr() == parameter.data_ptr()
        assert leaves[name] is not parameter


def test_a_step_that_nobody_waits_for_keeps_the_memory() -> None:
    tensors = parameters(1)
    weights, place = stepping(tensors), tensors["w0"].data_ptr()
    accumulate(weights, 0.25)
    weights.step([])
    assert tensors["w0"].data_ptr() == place
    assert torch.equal(tensors["w0"].data, torch.full((3,), 0.75))
    assert weights.peak == 1


def test_a_step_leaves_a_version_that_is_needed_as_it_was() -> None:
    tensors = parameters(1)
    weights = stepping(tensors)
    old = weights.current
    accumulate(weights, 0.25)
    weights.step([old])
    assert torch.equal(old.leaves["w0"].data, torch.ones(3))
    assert torch.equal(weights.current.leaves["w0"].data, torch.full((3,), 0.75))
    assert weights.peak == 2


def test_versions_are_counted_while_they_are_needed() -> None:
    weights = stepping(parameters(1))
    needed = []
    for _ in range(3):
        needed.append(weights.current)
        accumulate(weights, 0.25)
        weights.step(needed)
    assert [v.leaves["w0"][0].item() for v in needed] == [1.0, 0.75, 0.5]
    assert weights.current.leaves["w0"][0] == 0.25
    weights.step([])
    assert weights.peak == 4


def test_a_step_takes_gradients_of_every_version_since_the_last_one() -> None:
    tensors = parameters(1)
    weights = stepping(tensors)
    for gradient in (0.25, 0.5):
        accumulate(weights, gradient)
        weights.current = weights._version()
    weights.step([])
    assert torch.equal(tensors["w0"].data, torch.full((3,), 0.25))
    assert tensors["w0"].grad is None


def test_a_frozen_parameter_has_a_leaf_without_gradient() -> None:
    tensors = parameters(1, 2)
    tensors["w1"].requires_grad_(False)
    weights = Weights(tensors, CPU)
    assert [leaf.requires_grad for leaf in weights.current.leaves.values()] == [True, False]


def test_a_stage_whose_parameters_are_frozen_has_no_optimizer() -> None:
    tensors = {"w": nn.Parameter(torch.ones(3), requires_grad=False)}
    weights = stepping(tensors)
    weights.step([])
    assert torch.equal(tensors["w"].data, torch.ones(3))


def test_a_version_of_changed_parameters_is_refused() -> None:
    tensors = parameters(1, 2)
    weights = Weights(tensors, CPU)
    version = weights.current
    weights.check(version)
    with torch.no_grad():
        tensors["w1"].add_(1)
    with pytest.raises(ExecutionError, match=r"parameter 'w1' was changed in place.*before optimizer\.step"):
        weights.check(version)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_pipedream_holds_one_version_for_each_stage_from_here_on(stages: int) -> None:
    pipe = pipe_of(Net(), stages, schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    for _ in range(3):
        pipe(floats(8))
    pipe.pipeline.flush()
    assert pipe.pipeline.versions == tuple(range(stages, 0, -1))


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b"])
def test_a_schedule_with_a_flush_holds_one_version(schedule: str) -> None:
    pipe = pipe_of(Net(), schedule=schedule)
    for _ in range(2):
        pipe(floats()).backward()
    assert pipe.pipeline.versions == (1,) * STAGES


# Transfers


def lanes(count: int = 2) -> dict[int, Lane]:
    return {rank: Lane(CPU) for rank in range(count)}


def sent(number: int, target: int = 1) -> Send:
    return Send(Forward(0, number), target)


def received(number: int, target: int = 1) -> Recv:
    return Recv(Forward(0, number), target)


def test_values_arrive_as_they_were_sent_in_any_order() -> None:
    transport = LocalTransport(lanes(), Plan.chain(2))
    values = [(torch.ones(2), None, torch.zeros(0)), (torch.eye(2),)]
    for number, content in enumerate(values):
        transport.send(sent(number), content)
    for number in (1, 0):
        got = transport.recv(received(number))()
        assert [a is b for a, b in zip(got, values[number], strict=True)] == [True] * len(got)


def test_a_receive_waits_only_once_its_values_are_asked_for() -> None:
    transport = LocalTransport(lanes(), Plan.chain(2))
    take = transport.recv(received(0))
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(take()))
    thread.start()
    assert not got
    transport.send(sent(0), (torch.ones(1),))
    thread.join(timeout=60)
    assert torch.equal(got[0][0], torch.ones(1))


def test_an_abort_wakes_everyone_who_waits() -> None:
    transport = LocalTransport(lanes(3), Plan.chain(3))
    woken: list[bool] = []

    def wait(target: int) -> None:
        with pytest.raises(Aborted):
            transport.recv(received(0, target))()
        woken.append(True)

    threads = [threading.Thread(target=wait, args=(target,)) for target in (1, 2)]
    for thread in threads:
        thread.start()
    transport.abort()
    for thread in threads:
        thread.join(timeout=60)
    assert woken == [True, True]


def test_after_a_reset_nothing_of_before_is_left() -> None:
    transport = LocalTransport(lanes(), Plan.chain(2))
    transport.send(sent(0), (torch.ones(1),))
    transport.abort()
    transport.reset()
    assert not transport.boxes
    transport.send(sent(0), (torch.zeros(1),))
    assert torch.equal(transport.recv(received(0))()[0], torch.zeros(1))


def test_values_without_a_gradient_cross_between_stages() -> None:
    model = MODELS["integers"]
    crossed = set()
    for stages in (2, 3, 5):
        pipe, inputs = pipe_of(model.build(), stages), model.inputs(4, 6)
        assert_same(
            step(pipe, pipe.pipeline.model, model.loss, inputs),
            step(pipe.pipeline.model, pipe.pipeline.model, model.loss, inputs),
        )
        _, graph, parts = summary(pipe)
        sent_values = {value for part in parts for values in part.sends.values() for value in values}
        crossed |= {n.meta["val"].dtype for n in graph.nodes if n.name in sent_values}
    assert crossed - {torch.float64}


def test_two_towers_send_to_one_stage_from_two() -> None:
    model = MODELS["two_towers"]
    pipe, inputs = pipe_of(model.build(), stages=3), model.inputs(4, 6)
    assert_same(
        step(pipe, pipe.pipeline.model, model.loss, inputs),
        step(pipe.pipeline.model, pipe.pipeline.model, model.loss, inputs),
    )
    assert isinstance(pipe.pipeline.plan, Plan)


def test_stages_of_one_rank_need_no_transfer() -> None:
    model = nn.Module()
    model.body = blocks(3)
    model.forward = lambda x: model.body(x)
    pipe = pipecompile.compile(model, ["cpu"], microbatches=2, costs="count")
    pipe(torch.ones(4, D))
    assert not any(isinstance(i, Send | Recv) for i in pipe.pipeline.program.instructions)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_gradients_of_an_input_are_added_by_stage_whatever_thread_ended_first(order: tuple[int, ...]) -> None:
    """The latest use first, as autograd adds them; in another order the sum of these three is 0 or 2."""
    x = torch.zeros(1, dtype=torch.float64)
    values = {2: 1e16, 1: -1e16, 0: 1.0}
    microbatch = Microbatch({"x": x}, input_gradients={"x": {s: torch.full_like(x, values[s]) for s in order}})
    batch: Any = SimpleNamespace(call=SimpleNamespace(tensors={"x": x}, batched=frozenset({"x"})))
    assert _input_gradient("x", batch, {0: microbatch}) == 1.0
