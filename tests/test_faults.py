"""Nothing hangs: a pipeline that is called by what it runs, by forked processes, and by several threads at once.

A hang ends the test run after ``conftest.HANG`` seconds, with all stacks printed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import ExecutionError, ReentryError


class Net(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.body = blocks(layers).double()

    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.body(x))


class Raising:
    """Calls a function the next time that it is told to; a capture sees nothing of when that is."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], Any]] = SimpleQueue()

    def next(self, what: Callable[[], Any]) -> None:
        self.queue.put(what)

    def __call__(self) -> None:
        if not self.queue.empty():
            self.queue.get()()


class Square(torch.autograd.Function):
    forward_calls, backward_calls = Raising(), Raising()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Square.forward_calls()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Square.backward_calls()
        return 2 * gradient * ctx.saved_tensors[0]


class WithFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.body[2:](Square.apply(self.body[:2](x))))


class Kept(nn.Module):
    """Kept whole."""

    calls = Raising()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        Kept.calls()
        return self.linear(x)


def pipe_of(model: nn.Module, stages: int = 2, **options: Any) -> Any:
    return pipecompile.compile(model, devices=["cpu"] * stages, **{"microbatches": 2, "costs": "count", **options})


def floats(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, D)), dtype=torch.float64)


def works(pipe: Any, x: Tensor | None = None) -> None:
    x = floats() if x is None else x
    expected = step(pipe.pipeline.model, pipe.pipeline.model, lambda output: output, ((x,), {}))
    assert_same(step(pipe, pipe.pipeline.model, lambda output: output, ((x,), {})), expected)


# Called by what it runs itself


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward_calls", "backward_calls"])
def test_a_function_that_calls_its_own_pipeline_is_refused(where: str, stages: int) -> None:
    pipe, x = pipe_of(WithFunction(), stages), floats()
    works(pipe)
    getattr(Square, where).next(lambda: pipe(x))
    with pytest.raises(ExecutionError, match=r"called by code that it runs itself.*pipe\.pipeline\.model") as caught:
        pipe(x)
    assert isinstance(caught.value.__cause__, ReentryError)
    works(pipe)


def test_a_module_kept_whole_that_calls_its_own_pipeline_is_refused() -> None:
    model = Net()
    model.body[1] = Kept()
    pipe = pipe_of(model, leaf_modules=["body.1"])
    works(pipe)
    Kept.calls.next(lambda: pipe(floats()))
    with pytest.raises(ExecutionError, match="called by code that it runs itself"):
        pipe(floats())
    works(pipe)


@pytest.mark.parametrize("method", ["__call__", "prepare", "verify", "replan", "flush"])
def test_a_hook_that_calls_its_own_pipeline_is_refused(method: str) -> None:
    model = Net()
    pipe = pipe_of(model)
    works(pipe)
    arguments = (floats(),) if method in ("__call__", "prepare", "verify") else ()
    handle = model.body[1].register_forward_hook(lambda *_: getattr(pipe.pipeline, method)(*arguments) and None)
    with pytest.raises(ReentryError, match="called by code that it runs itself"):
        pipe(floats())
    handle.remove()
    works(pipe)


def test_a_backward_of_an_earlier_call_within_a_stage() -> None:
    model, x = WithFunction(), floats()
    pipe, waiting = pipe_of(model), pipe_of(Body(model))
    works(pipe)
    first, second = waiting(x).sum(), waiting(x).sum()
    Square.forward_calls.next(first.backward)  # nothing waits for that
    pipe(x)
    Square.forward_calls.next(second.backward)
    with pytest.raises(ExecutionError, match="called by code that it runs itself"):
        waiting(x)


class Body(nn.Module):
    def __init__(self, model: Net) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.body[2:](Square.apply(self.inner.body[:2](x)))


def test_another_pipeline_within_a_stage_works_and_one_that_calls_back_is_refused() -> None:
    outer, inner, x = pipe_of(WithFunction()), pipe_of(WithFunction()), floats()
    works(outer)
    works(inner)
    seen: list[float] = []
    Square.forward_calls.next(lambda: seen.append(inner(x).item()))
    outer(x)
    assert seen == [pytest.approx(inner.pipeline.model(x).item(), rel=1e-12)]

    def there_and_back() -> None:
        Square.forward_calls.next(lambda: outer(x))
        inner(x)

    Square.forward_calls.next(there_and_back)
    with pytest.raises(ExecutionError, match="called by code that it runs itself"):
        outer(x)
    works(outer)
    works(inner)


def test_parameter_hooks_call_the_pipeline_while_gradients_are_delivered() -> None:
    model, x = Net(), floats()
    pipe = pipe_of(model)
    seen: list[float] = []

    def again(_: Any) -> None:
        with torch.enable_grad():
            seen.append(pipe(x).item())

    handle = next(model.parameters()).register_hook(again)
    pipe(x).backward()
    handle.remove()
    assert seen == [pytest.approx(model(x).item(), rel=1e-12)]
    works(pipe)


# Forked processes


def in_child(function: Callable[[], object]) -> None:
    """Runs a function in a forked process; its failure is the test's."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@needs_fork
def test_a_forked_process_runs_the_pipeline() -> None:
    pipe = pipe_of(Net())
    works(pipe)
    in_child(lambda: works(pipe))
    works(pipe)


@needs_fork
def test_a_forked_process_makes_the_first_call() -> None:
    pipe = pipe_of(Net())
    in_child(lambda: works(pipe))
    works(pipe)


@needs_fork
def test_a_process_forked_while_another_thread_is_in_the_midst_of_a_call_runs_the_pipeline() -> None:
    pipe, x = pipe_of(WithFunction()), floats()
    works(pipe)
    begun, go_on = threading.Event(), threading.Event()

    def waiting() -> None:
        begun.set()
        go_on.wait()

    Square.backward_calls.next(waiting)
    thread = threading.Thread(target=lambda: pipe(x))
    thread.start()
    begun.wait()
    try:
        in_child(lambda: works(pipe))
    finally:
        go_on.set()
        thread.join()
    works(pipe)


@needs_fork
def test_a_stream_goes_on_in_a_forked_process() -> None:
    options: dict[str, Any] = {"schedule": "pipedream", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    torch.manual_seed(0)
    model, xs = Net(), [floats() for _ in range(3)]
    pipe = pipe_of(model, **options)
    pipe(xs[0])
    receive, send = os.pipe()

    def there() -> None:
        losses = [pipe(x).item() for x in xs[1:]]
        pipe.pipeline.flush()
        os.write(send, repr([*losses, *(p.sum().item() for p in model.parameters())]).encode())

    in_child(there)
    here = [pipe(x).item() for x in xs[1:]]
    pipe.pipeline.flush()
    assert os.read(receive, 100_000).decode() == repr([*here, *(p.sum().item() for p in model.parameters())])


class FromPipeline(torch.utils.data.Dataset[Tensor]):
    def __init__(self, pipe: pipecompile.Pipeline) -> None:
        self.pipe = pipe

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Tensor:
        with torch.no_grad():
            return self.pipe(torch.full((4, D), float(row), dtype=torch.float64))


@needs_fork
def test_a_loaders_workers_run_the_pipeline() -> None:
    pipe = pipe_of(Net())
    works(pipe)
    loader = torch.utils.data.DataLoader(
        FromPipeline(pipe), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    with torch.no_grad():
        expected = [pipe.pipeline.model(torch.full((4, D), float(row), dtype=torch.float64)) for row in range(4)]
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(expected))


# Several threads


def together(*functions: Callable[[], object]) -> None:
    """Runs functions at once, each in a thread; what one raises is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Pausing(Net):
    """Stops in the midst of the run that ``thread`` makes, once."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on, self.thread = threading.Event(), threading.Event(), -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:2](x)
        if threading.get_ident() == self.thread:
            self.entered.set()
            self.go_on.wait()
        return mean_square(self.body[2:](x))


def test_a_model_runs_eagerly_in_another_thread_while_it_is_captured() -> None:
    model, x = Pausing(), floats()
    expected = step(model, model, lambda output: output, ((x,), {}))
    names = [name for name, _ in model.named_parameters()]
    seen: list[Any] = []

    def capturing() -> None:
        model.thread = threading.get_ident()
        pipe_of(model).pipeline.prepare(x)

    def eager() -> None:
        model.entered.wait()  # the trace stands in the middle of the forward
        try:
            seen.append(step(model, model, lambda output: output, ((x,), {})))
            seen.append([name for name, _ in model.named_parameters()])
            seen.append({kind for t in model.state_dict().values() for kind in [type(t)]})
            seen.append(dict(model.body[0][0]._parameters)["weight"] is model.body[0][0].weight)
        finally:
            model.thread = -1
            model.go_on.set()

    together(capturing, eager)
    assert_same(seen[0], expected, exact=True)
    assert seen[1:] == [names, {Tensor}, True]


def test_a_forward_that_has_begun_in_another_thread_ends_while_the_model_is_captured() -> None:
    model, x = Pausing(), floats()
    expected = model(x).item()
    seen: list[float] = []

    def eager() -> None:
        model.thread = threading.get_ident()
        seen.append(model(x).item())

    def capturing() -> None:
        model.entered.wait()
        model.body[3].register_forward_pre_hook(lambda *_: hooked())
        pipe_of(model).pipeline.prepare(x)

    def hooked() -> None:
        if threading.get_ident() != model.thread:
            model.go_on.set()

    together(eager, capturing)
    assert seen == [expected]


def test_two_threads_make_the_first_call() -> None:
    pipe, xs = pipe_of(Net()), [floats() for _ in range(3)]
    seen: dict[int, float] = {}
    together(*(lambda i=i: seen.__setitem__(i, pipe(xs[i]).item()) for i in range(3)))
    assert pipe.pipeline.captures == 1
    assert [seen[i] for i in range(3)] == pytest.approx([pipe.pipeline.model(x).item() for x in xs], rel=1e-12)


def test_several_pipelines_of_one_model_are_captured_at_once() -> None:
    model, x = Net(), floats()
    pipes = [pipe_of(model, stages) for stages in (1, 2, 3)]
    together(*(lambda pipe=pipe: pipe(x) for pipe in pipes))
    for pipe in pipes:
        works(pipe)
        assert pipe.pipeline.captures == 1
