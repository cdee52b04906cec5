"""What a step costs beside its computation: two layers of width 32 in two stages, on two CPU devices.

    python benchmarks/overhead.py --rounds 100

The layers compute for some microseconds, so nearly all of a step is overhead. All ways run in turn in every round;
medians are shown, in milliseconds per microbatch. The *bare* ways are loops written by hand for this model alone:
linear layers, the engine of autograd, and queues between two threads. The second table has, for each kind of
instruction, the median time in a step, and what is left of it without the functions of torch that the instruction
calls, timed alone in one thread.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from queue import SimpleQueue
from statistics import median
from typing import Any

import torch
from peers import Step, Task, TorchPipelining, torchgpipe_step
from rich.console import Console
from rich.table import Table
from step_time import Way, environment, take_turns, whole
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile import PlanOptions

WIDTH, ROWS = 32, 2  # of a layer, and rows of a microbatch
console = Console(width=120)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def batch(microbatches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, ROWS * microbatches, WIDTH, generator=generator).unbind()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    console.print(environment(), "")
    task = Task(model, partial(batch, options.microbatches), F.mse_loss, options.microbatches)
    pipe = pipecompile.compile(
        task.model(),
        ["cpu", "cpu"],
        schedule="1f1b",
        microbatches=options.microbatches,
        loss_fn=F.mse_loss,
        plan=PlanOptions(pins={"0": 0, "1": 1}),
    )
    inputs, targets = task.batch()
    ways = [
        Way("bare, one thread", bare(task, _alone), "the same calls of torch, one after another"),
        Way("bare, two threads", bare(task, _in_two_threads), "1F1B by hand"),
        Way("pipecompile", whole(pipe, lambda loss: loss, {"input": inputs, "target": targets}), "1F1B, two threads"),
    ]
    with ExitStack() as stack:
        pipelining = stack.enter_context(closing(TorchPipelining(task, 1)))
        ways.append(Way("torch.distributed.pipelining", pipelining, "1F1B, two gloo processes"))
        try:
            ways.append(Way("torchgpipe", torchgpipe_step(task, 1), "GPipe, backward on one thread"))
        except ImportError as missing:
            console.print(f"torchgpipe is left out: {missing}")
        timelines = take_turns("two layers", ways, options.rounds, lambda: pipe.pipeline.timeline)
    show(ways, options.microbatches)
    show_instructions(timelines, alone(task))


def bare(task: Task, run: Callable[[list[tuple[Tensor, Tensor]], nn.Sequential], Tensor]) -> Step:
    """A step of the two layers without a library."""
    layers = task.model()
    pairs = list(zip(*(t.chunk(task.microbatches) for t in task.batch()), strict=True))

    def step() -> tuple[float, float]:
        layers.zero_grad()
        start = time.perf_counter()
        loss = run(pairs, layers)
        return time.perf_counter() - start, loss.item()

    return step


def _alone(pairs: list[tuple[Tensor, Tensor]], layers: nn.Sequential) -> Tensor:
    total = torch.zeros(())
    for x, y in pairs:
        loss = F.mse_loss(layers(x), y) / len(pairs)
        loss.backward()
        total += loss.detach()
    return total


def _in_two_threads(pairs: list[tuple[Tensor, Tensor]], layers: nn.Sequential) -> Tensor:
    activations: SimpleQueue[Tensor] = SimpleQueue()
    gradients: SimpleQueue[Tensor] = SimpleQueue()
    total = torch.zeros(())

    def first() -> None:
        torch.set_num_threads(1)
        waiting: list[Tensor] = []
        for x, _ in pairs:
            waiting.append(layers[0](x))
            activations.put(waiting[-1].detach())
            if len(waiting) > 1:
                waiting.pop(0).backward(gradients.get())
        waiting.pop(0).backward(gradients.get())

    def second() -> None:
        torch.set_num_threads(1)
        for _, y in pairs:
            h = activations.get().requires_grad_()
            loss = F.mse_loss(layers[1](h), y) / len(pairs)
            loss.backward()
            gradients.put(h.grad)
            total.add_(loss.detach())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total


def alone(task: Task) -> dict[str, float]:
    """Median seconds of the functions of torch behind each kind of instruction, in one thread."""
    layers, seconds = task.model(), defaultdict[str, list[float]](list)
    for x, y in zip(*(t.chunk(task.microbatches) for t in task.batch()), strict=True):
        for name, run in _calls(x, y, layers):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def _calls(x: Tensor, y: Tensor, layers: nn.Sequential) -> Iterator[tuple[str, Callable[[], Any]]]:
    made: dict[str, Tensor] = {}
    yield "0F", lambda: made.update(h=layers[0](x))
    leaf = made["h"].detach().requires_grad_()
    yield "1F", lambda: made.update(loss=F.mse_loss(layers[1](leaf), y))
    yield "1B", lambda: made["loss"].backward()
    yield "0B", lambda: made["h"].backward(leaf.grad)


def show(ways: list[Way], microbatches: int) -> None:
    table = Table("", "ms per microbatch", "spread", "of pipecompile", "loss", "")
    ours = next(way for way in ways if way.name == "pipecompile").median
    for way in ways:
        numbers = (f"{1e3 * way.median / microbatches:.3f}", f"{way.spread:.0%}", f"{way.median / ours:.2f}")
        table.add_row(way.name, *numbers, f"{way.losses[-1]:.5f}", way.note)
    console.print(table)


def show_instructions(timelines: list[Any], alone: dict[str, float]) -> None:
    seconds = defaultdict[str, list[float]](list)
    for timeline in timelines:
        for span in timeline.spans:
            i = span.instruction
            result = getattr(i, "result", i)
            kind = f"{result.stage}{type(result).__name__[0]}"
            name = kind if result is i else f"{type(i).__name__} of {kind}"
            seconds[name].append(span.end - span.start)
    table = Table("instruction", "in a step, us", "torch alone, us", "the rest, us")
    for name, values in sorted(seconds.items()):
        spent, torch_alone = median(values), alone.get(name, 0.0)
        table.add_row(name, *(f"{1e6 * value:.0f}" for value in (spent, torch_alone, spent - torch_alone)))
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
