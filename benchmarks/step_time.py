"""How long a 1F1B step takes on two CPU devices, beside the unsplit model, other pipelines and the simulator's ideal.

    python benchmarks/step_time.py --layers 12 --width 256 --json out/step_time.json

Forward and backward of one batch; the optimizer's step is left out, since no pipeline changes it. All ways run in turn
in every round, so that a busy machine hits all of them; medians are shown. The unsplit model runs the same microbatches
on one thread. The ideal is the simulated program with the stage times that were profiled one operation at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from gpt import Setting, WithLoss, cross_entropy, hugging_face, sequential
from peers import Step, Task, TorchPipelining, torchgpipe_step
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pipecompile

Loss = Callable[[Any], Tensor]
console = Console(width=120)


@dataclass
class Way:
    """One way to run a step."""

    name: str
    step: Step
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def measure(self) -> None:
        seconds, loss = self.step()
        self.seconds.append(seconds)
        self.losses.append(loss)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def main() -> None:
    options = _options()
    setting = Setting(
        options.layers, options.width, options.vocabulary, options.length, options.batch, options.microbatches
    )
    torch.set_num_threads(1)
    console.print(environment(), setting, "", sep="\n")
    results = [
        compare("nn.Sequential", WithLoss(sequential(setting)), lambda output: output, setting, options.rounds, True),
        compare(
            "transformers GPT-2", hugging_face(setting), lambda output: output.loss, setting, options.rounds, False
        ),
    ]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), "setting": asdict(setting), "results": results}
        options.json.write_text(json.dumps(report, indent=1))


def compare(title: str, model: nn.Module, loss_of: Loss, setting: Setting, rounds: int, peers: bool) -> dict[str, Any]:
    """Measures all ways in turn and prints them; the numbers as JSON."""
    inputs = dict(zip(("input_ids", "labels"), setting.tokens(), strict=True))
    pipe = pipecompile.compile(
        model,
        devices=["cpu", "cpu"],
        schedule="1f1b",
        microbatches=setting.microbatches,
        example_inputs=((), inputs),
    )
    by_microbatches = microbatched(model, loss_of, inputs, setting.microbatches)
    ways = [
        Way("unsplit", by_microbatches, "one thread, same microbatches"),
        Way("pipecompile", whole(pipe, loss_of, inputs), "1F1B, two threads"),
    ]
    with ExitStack() as stack:
        if peers:
            ways += peer_ways(setting, layer_cut(pipe, model), stack)
        timelines = take_turns(title, ways, rounds, lambda: pipe.pipeline.timeline)
    show(title, ways, pipe, timelines)
    return {
        "model": title,
        "ideal": pipe.pipeline.predicted.makespan,
        "plan": str(pipe.pipeline.plan),
        "ways": [{"name": way.name, "seconds": way.seconds, "loss": way.losses[-1]} for way in ways],
    }


def peer_ways(setting: Setting, cut: int, stack: ExitStack) -> list[Way]:
    """torchgpipe only where it is installed."""
    task = Task(partial(sequential, setting), setting.tokens, cross_entropy, setting.microbatches)
    pipelining = stack.enter_context(closing(TorchPipelining(task, cut)))
    ways = [Way("torch.distributed.pipelining", pipelining, f"1F1B, two processes, cut at layer {cut}")]
    try:
        ways.append(Way("torchgpipe", torchgpipe_step(task, cut), "GPipe, backward on one thread"))
    except ImportError as missing:
        console.print(f"torchgpipe is left out: {missing}")
    return ways


def take_turns(title: str, ways: list[Way], rounds: int, timeline: Callable[[], Any]) -> list[Any]:
    """Runs each way once a round, after a round that does not count; the pipeline's timelines."""
    for way in ways:
        way.step()
    timelines = []
    for _ in track(range(rounds), description=title, console=console, transient=True):
        for way in ways:
            way.measure()
        timelines.append(timeline())
    return timelines


def whole(model: Callable[..., Any], loss_of: Loss, inputs: dict[str, Tensor]) -> Step:
    def step() -> tuple[float, float]:
        model.zero_grad()
        start = time.perf_counter()
        loss = loss_of(model(**inputs))
        loss.backward()
        return time.perf_counter() - start, loss.item()

    return step


def microbatched(model: nn.Module, loss_of: Loss, inputs: dict[str, Tensor], count: int) -> Step:
    parts = zip(*(tensor.chunk(count) for tensor in inputs.values()), strict=True)
    chunks = [dict(zip(inputs, part, strict=True)) for part in parts]

    def step() -> tuple[float, float]:
        model.zero_grad()
        start = time.perf_counter()
        total = 0.0
        for chunk in chunks:
            loss = loss_of(model(**chunk)) / count
            loss.backward()
            total += loss.item()
        return time.perf_counter() - start, total

    return step


def layer_cut(pipe: Any, model: WithLoss) -> int:
    """The boundary between layers that is nearest to our cut: layers with most of their parameters in stage 0."""
    first = {name for name, _ in pipe.pipeline.stages[0].named_parameters()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cut = 0
    for layer in range(len(model.body)):
        names = [name for name in sizes if name.startswith(f"body.{layer}.")]
        inside = sum(sizes[name] for name in names if name in first)
        cut += 2 * inside > sum(sizes[name] for name in names)
    return cut


def show(title: str, ways: list[Way], pipe: Any, timelines: list[Any]) -> None:
    ideal, base = pipe.pipeline.predicted.makespan, ways[0].median
    table = Table("", "seconds", "spread", "speed", "of ideal", "loss", "", title=title)
    for way in ways:
        numbers = (f"{way.median:.4f}", f"{way.spread:.0%}", f"{base / way.median:.2f}", f"{ideal / way.median:.2f}")
        table.add_row(way.name, *numbers, f"{way.losses[-1]:.5f}", way.note)
    table.add_row("ideal", f"{ideal:.4f}", "", f"{base / ideal:.2f}", "1.00", "", "1F1B, simulated from the profile")
    console.print(table)
    where_the_rest_is(pipe.pipeline.predicted, timelines, ways[1].median)
    console.print(str(pipe.pipeline.plan), "", sep="\n")


def where_the_rest_is(predicted: Any, timelines: list[Any], step: float) -> None:
    """Splits the distance to the ideal: slower computation, longer waits, and time outside the program."""
    makespan = median(timeline.makespan for timeline in timelines)
    table = Table("", "profiled", "measured", title="Where the time goes")
    for rank in range(predicted.num_ranks):
        measured = median(timeline.busy(rank) for timeline in timelines)
        table.add_row(f"rank {rank} computes", f"{predicted.busy(rank):.4f}", f"{measured:.4f}")
        waits = median(timeline.makespan - timeline.busy(rank) for timeline in timelines)
        table.add_row(f"rank {rank} waits", f"{predicted.makespan - predicted.busy(rank):.4f}", f"{waits:.4f}")
    table.add_row("program", f"{predicted.makespan:.4f}", f"{makespan:.4f}")
    table.add_row("outside the program", "", f"{step - makespan:.4f}")
    console.print(table)


def environment() -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    gain = parallel_gain()
    busy = "; the machine is busy, so the ideal is out of reach" if gain < 1.8 else ""
    return f"{versions}, {os.cpu_count()} cores; two threads at once do {gain:.2f} times the work of one{busy}"


def parallel_gain() -> float:
    """What two devices can gain on this machine, now: matrix products by two threads against one."""
    matrix = torch.randn(512, 512)

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(100):
            matrix @ matrix

    def seconds(count: int) -> float:
        threads = [threading.Thread(target=work) for _ in range(count)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    return median(2 * seconds(1) / seconds(2) for _ in range(5))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
