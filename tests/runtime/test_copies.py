"""Copies of a pipeline, and calls of one from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import assert_same, step
from torch import nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.capture.origin import origin_of
from pipecompile.errors import PipecompileError
from pipecompile.ops.modes import PLAIN

NAMES = ("sequential", "tied", "buffers_in_place", "dict_in_out", "gpt2_padded")


def pipe_of(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, devices=["cpu", "cpu"], microbatches=1, costs="count", **options)


def all_at_once(count: int, run: Callable[[int], Any]) -> list[Any]:
    start = threading.Barrier(count)

    def wait_and_run(number: int) -> Any:
        start.wait()
        return run(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(wait_and_run, range(count)))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_a_pipeline_of_a_copy(name: str, captured: bool) -> None:
    entry = MODELS[name]
    pipe = pipe_of(entry.build())
    inputs = entry.inputs(4, entry.lengths[0])
    if captured:
        pipe.pipeline.prepare(*inputs[0], **inputs[1])
    copy = deepcopy(pipe)
    reference = deepcopy(pipe.pipeline.model)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    assert before.keys() == copy.state_dict().keys()
    assert not {id(p) for p in pipe.parameters()} & {id(p) for p in copy.parameters()}
    assert_same(step(copy, copy.pipeline.model, entry.loss, inputs), step(reference, reference, entry.loss, inputs))
    entry.loss(copy(*inputs[0], **inputs[1])).backward()
    torch.optim.SGD(copy.parameters(), lr=0.5).step()
    assert all(p.grad is None for p in pipe.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in copy.state_dict().items())


def test_a_copy_keeps_the_placement_and_the_options() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    pipe = pipe_of(blocks(6).double(), loss_fn=lambda output, target: (output - target).square().mean())
    pipe(x, target=x)
    copy = deepcopy(pipe).eval()
    copy(x, target=x)
    assert copy.pipeline.plan.stage_of == pipe.pipeline.plan.stage_of
    assert (copy.pipeline.schedule, copy.pipeline.microbatches, copy.pipeline.devices) == (
        pipe.pipeline.schedule,
        pipe.pipeline.microbatches,
        pipe.pipeline.devices,
    )
    assert pipe.training
    assert not copy.pipeline.model.training


def test_a_copy_of_a_copy_keeps_the_placement() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    pipe = pipe_of(blocks(6).double())
    pipe(x)
    copy = deepcopy(deepcopy(pipe))
    copy(x)
    assert copy.pipeline.plan.stage_of == pipe.pipeline.plan.stage_of


def test_a_pipeline_inside_a_module_is_copied_with_it() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    around = nn.Sequential(nn.Linear(D, D).double(), pipe_of(blocks(4).double()))
    copy = deepcopy(around)
    assert torch.equal(copy(x), around(x))
    assert not {id(p) for p in around.parameters()} & {id(p) for p in copy.parameters()}


def test_an_asynchronous_pipeline_is_not_copied() -> None:
    pipe = pipe_of(blocks(4), schedule="pipedream", optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(PipecompileError, match=r"cannot be copied.*copy\.deepcopy\(pipe\.pipeline\.model\)"):
        deepcopy(pipe)


def test_two_threads_make_one_capture() -> None:
    model = blocks(4).double()
    pipe = pipe_of(model)
    inputs = [torch.randn(4, D, dtype=torch.float64) for _ in range(4)]
    outputs = all_at_once(4, lambda number: pipe(inputs[number]))
    assert pipe.pipeline.captures == 1
    assert len(outputs) == 4
    for x, output in zip(inputs, outputs, strict=True):
        assert torch.equal(output, model(x))


def test_threads_train_pipelines_of_their_own_at_once() -> None:
    models = [blocks(4).double() for _ in range(4)]
    pipes = [pipe_of(model) for model in models]
    x = torch.randn(4, D, dtype=torch.float64)
    runs = all_at_once(4, lambda number: step(pipes[number], models[number], mean_square, ((x,), {})))
    for model, run in zip(models, runs, strict=True):
        reference = deepcopy(model)
        assert_same(run, step(reference, reference, mean_square, ((x,), {})))


def test_a_trace_does_not_see_what_another_thread_runs() -> None:
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = blocks(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.set()
            assert done.wait(60)
            return self.layers(x)

    class Lasts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            done.set()
            captured.result(60)
            return x

    x = torch.randn(4, D)
    pipe = pipe_of(Waits())
    with ThreadPoolExecutor(1) as thread:
        captured = thread.submit(pipe.pipeline.prepare, x)
        assert inside.wait(60)
        with torch.autocast("cpu", torch.bfloat16):
            Lasts()(x)
    origins = [
        origin_of(node) for node in pipe.pipeline._batches.first.captured.graph.nodes if node.op == "call_function"
    ]
    assert origins
    assert {origin.path.split(".")[0] for origin in origins} == {"layers"}
    assert {origin.region for origin in origins} == {PLAIN}
