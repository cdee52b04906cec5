"""``pipe.pipeline.map``: the outputs of a loader's batches, while the stages work on different batches."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from decoders import built, prompts
from long import LONG
from torch import Tensor, nn
from toys import D

import pipecompile
from pipecompile import PlanOptions
from pipecompile.errors import CaptureError, ExecutionError, InputError

ROWS = (4, 4, 4, 4, 3, 4, 1)


class Net(nn.Module):
    """Four layers, and a skip connection from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.head = nn.Linear(2 * D, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        first = h = self.layers[0](x)
        for layer in self.layers[1:]:
            h = layer(h).tanh()
        out = self.head(torch.cat([first, h], -1))
        return {"out": out if scale is None else out * scale, "norm": h.norm()}


def floats(rows: int) -> Tensor:
    return torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def net(ranks: int = 3, model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = (model or Net()).double()
    return pipecompile.compile(model, ["cpu"] * ranks, costs="count", **options)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "dicts"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_outputs_are_the_models_in_order(kind: str, ranks: int) -> None:
    pipe = net(ranks)
    scales = [torch.rand(rows, 1, dtype=torch.float64) for rows in ROWS]
    batches: dict[str, list[Any]] = {
        "tensors": [floats(rows) for rows in ROWS],
        "tuples": [(floats(rows), scale) for rows, scale in zip(ROWS, scales, strict=True)],
        "dicts": [{"scale": scale, "x": floats(rows)} for rows, scale in zip(ROWS, scales, strict=True)],
    }
    model, threads = pipe.pipeline.model, set(threading.enumerate())
    found = list(pipe.pipeline.map(iter(batches[kind])))
    assert set(threading.enumerate()) <= threads
    assert len(found) == len(ROWS)
    for output, batch in zip(found, batches[kind], strict=True):
        wanted = model(batch) if kind == "tensors" else model(*batch) if kind == "tuples" else model(**batch)
        torch.testing.assert_close(output, {name: value.detach() for name, value in wanted.items()})
        assert not output["out"].requires_grad
    assert pipe.pipeline.report.mapped == ()


def test_batches_overlap() -> None:
    """The last stage waits with each batch until the first one has begun the next."""
    begun = [SimpleQueue[None]() for _ in ROWS]  # queues, in which a capture sees nothing
    first, last = SimpleQueue[int](), SimpleQueue[int]()

    class First(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not first.empty():
                begun[first.get()].put(None)
            return super().forward(x)

    class Last(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not last.empty() and (number := last.get()) + 1 < len(ROWS):
                begun[number + 1].get(timeout=60)  # which raises if the next batch waits for this one
            return super().forward(x)

    model = nn.Sequential(First(D, D), nn.Tanh(), Last(D, D)).double()
    options = {"plan": PlanOptions(pins={"0": 0, "2": 1}), "leaf_modules": ["0", "2"]}
    pipe = net(2, model, verify="never", **options)
    list(pipe.pipeline.map([floats(4)]))  # captures
    for number in range(len(ROWS)):
        first.put(number)
        last.put(number)
    found = list(pipe.pipeline.map(floats(4) for _ in ROWS))
    for output in found:
        torch.testing.assert_close(output, model(floats(4)).detach())


def test_a_replicated_stage_takes_every_second_batch() -> None:
    pipe = net(3, plan=PlanOptions(replicas=[1, 2]))
    batches = [floats(rows) for rows in ROWS]
    for output, batch in zip(pipe.pipeline.map(batches), batches, strict=True):
        torch.testing.assert_close(output["out"], pipe.pipeline.model(batch)["out"].detach())
    assert pipe.pipeline.report.mapped == ()


def test_other_kinds_of_batches_wait_for_those_before() -> None:
    pipe = net(2)
    batches = [(floats(4),), (floats(3),), (floats(4), torch.ones(4, 1, dtype=torch.float64) * 2), (floats(2),)] * 2
    found = list(pipe.pipeline.map(batches))
    for output, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(output["out"], pipe.pipeline.model(*batch)["out"].detach())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).tanh()) + self.seen
        self.seen += x.mean()
        return out


def test_what_the_next_batch_reads_is_written_before_it_begins() -> None:
    pipe, alone = net(2, Counts()), Counts().double()
    alone.load_state_dict(pipe.state_dict())
    batches = [floats(rows) for rows in ROWS]
    for output, batch in zip(pipe.pipeline.map(batches), batches, strict=True):
        torch.testing.assert_close(output, alone(batch).detach())
    torch.testing.assert_close(pipe.seen, alone.seen)
    assert pipe.pipeline.report.mapped == ("the forward writes 'seen', which the next batch reads (batches: 7)",)


def test_the_mode_is_the_models() -> None:
    """Batch normalization writes its running statistics in training, which the next batch does not read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)).double()
    alone, pipe = copy.deepcopy(model), net(2, model, microbatches=2)
    batches = [floats(rows + 1) for rows in ROWS[:5]]
    for training in (True, False):
        alone.train(training)
        pipe.train(training)
        for found, batch in zip(pipe.pipeline.map(batches), batches, strict=True):
            torch.testing.assert_close(found, alone(batch).detach())
        torch.testing.assert_close(dict(pipe.named_buffers()), dict(alone.named_buffers()))
    assert len(pipe.pipeline.report.mapped) == 1
    assert "(batches: 5)" in pipe.pipeline.report.mapped[0]


@pytest.mark.skipif(not LONG, reason="only in long runs")
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_transformers_outputs_keep_their_types(name: str) -> None:
    model = built(name)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    batches = [{**prompts(rows), "labels": prompts(rows)["input_ids"]} for rows in (4, 4, 2)]
    for found, batch in zip(pipe.pipeline.map(batches), batches, strict=True):
        with torch.no_grad():
            wanted = model(**batch, use_cache=False)
        assert type(found) is type(wanted)
        torch.testing.assert_close(found.loss, wanted.loss)
        torch.testing.assert_close(found.logits, wanted.logits)


def test_threads_end_with_the_consumer() -> None:
    pipe = net(3)
    before = {*threading.enumerate()}
    outputs = pipe.pipeline.map(floats(rows) for rows in ROWS)
    next(outputs)
    assert torch.is_grad_enabled()
    assert {*threading.enumerate()} - before
    outputs.close()
    assert not {*threading.enumerate()} - before


def test_a_batch_that_does_not_fit_is_named_after_those_before() -> None:
    pipe = net(2)
    with pytest.raises(CaptureError, match=r"^batch 2 of the loader: the model cannot be captured"):
        list(pipe.pipeline.map([floats(4), floats(3), torch.ones(4, D + 1, dtype=torch.float64)]))
    with pytest.raises(InputError, match="batch 0 of the loader: the loader yields a str, of which a call cannot be"):
        next(pipe.pipeline.map(["text"]))
    outputs = pipe.pipeline.map([floats(4), floats(3), {"y": floats(4)}])
    assert len([next(outputs), next(outputs)]) == 2
    with pytest.raises(InputError, match="batch 2 of the loader: the model's forward cannot be called"):
        next(outputs)


def test_a_stage_that_fails_names_the_batch() -> None:
    armed = threading.Event()

    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if armed.is_set() and (x.abs() > 1e6).any():
                raise ArithmeticError("too large")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(D, D), Picky(D, D)).double()
    options = {"plan": PlanOptions(pins={"0": 0, "1": 1}), "leaf_modules": ["1"], "verify": "never"}
    pipe = net(2, model, **options)
    list(pipe.pipeline.map([floats(4)]))  # captures
    armed.set()
    batches = [floats(4), floats(4), floats(4) * 1e9, floats(4), floats(4)]
    threads = {*threading.enumerate()}
    with pytest.raises(ExecutionError, match=r"^batch 2 of the loader: stage 1, 1F\d: .*ArithmeticError: too large"):
        list(pipe.pipeline.map(batches))
    assert {*threading.enumerate()} <= threads
    (output,) = pipe.pipeline.map(batches[:1])
    torch.testing.assert_close(output, model(batches[0]).detach())


def test_training_while_batches_are_in_the_pipeline_is_refused() -> None:
    pipe = net(2)

    def batches() -> Iterator[Tensor]:
        yield floats(4)
        yield floats(4)
        with torch.no_grad():
            pipe.head.weight.mul_(2)
        yield floats(4)

    with pytest.raises(ExecutionError, match=r"changed with batch 1 in the pipeline"):
        list(pipe.pipeline.map(batches()))
    (output,) = pipe.pipeline.map([floats(4)])
    torch.testing.assert_close(output["out"], pipe.pipeline.model(floats(4))["out"].detach())
    pipe.pipeline.close()
    with pytest.raises(ExecutionError, match="has been closed"):
        pipe.pipeline.map([floats(4)])
