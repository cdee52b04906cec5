"""What ``stage_compile=True`` gains and costs: steps of GPT-2 on two CPU devices, with and without it.

    python benchmarks/stage_compile.py --json out/stage_compile.json

Forward and backward of one batch under 1F1B, one thread per stage. Both pipelines run in turn in every round, so that a
busy machine hits both; medians are shown. Seconds of the processor count both threads, and vary less on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpt import Setting, hugging_face
from rich.console import Console
from rich.table import Table
from step_time import environment
from torch import Tensor, nn

import pipecompile

console = Console(width=120)


@dataclass
class Way:
    """A pipeline, and what its steps took.

    Attributes:
        seconds, busy: of each step, by the clock and of the processor.
        first: seconds of the first call, which captures, plans, compiles and verifies.
    """

    name: str
    pipe: Any
    inputs: dict[str, Tensor]
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.pipe.zero_grad()
        torch.manual_seed(0)
        start, busy = time.perf_counter(), time.process_time()
        loss = self.pipe(**self.inputs).loss
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        self.busy.append(time.process_time() - busy)
        self.losses.append(loss.item())


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    setting = Setting(
        options.layers, options.width, options.vocabulary, options.length, options.batch, options.microbatches
    )
    console.print(environment(), setting, "", sep="\n")
    results = [compare(setting, dropout, options.rounds) for dropout in options.dropout]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), "setting": asdict(setting), "results": results}
        options.json.write_text(json.dumps(report, indent=1))


def compare(setting: Setting, dropout: float, rounds: int) -> dict[str, Any]:
    """Measures both pipelines in turn and prints them; the numbers as JSON."""
    ways = [way(name, setting, dropout, given) for name, given in (("uncompiled", False), ("compiled", True))]
    for it in ways:
        start = time.perf_counter()
        it.step()
        it.first = time.perf_counter() - start
    for _ in range(rounds):
        for it in ways:
            it.step()
    table = Table("", "step", "processor", "first call", "loss", title=f"dropout {dropout}")
    for it in ways:
        times = (median(it.seconds[1:]), median(it.busy[1:]), it.first)
        table.add_row(it.name, *(f"{seconds:.3f} s" for seconds in times), f"{it.losses[-1]:.6f}")
    console.print(table, *ways[1].pipe.pipeline.report.compiled, "", sep="\n")
    numbers = [{"name": it.name, "seconds": it.seconds, "busy": it.busy, "first": it.first} for it in ways]
    return {"dropout": dropout, "ways": numbers}


def way(name: str, setting: Setting, dropout: float, stage_compile: bool) -> Way:
    model = hugging_face(setting)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=setting.microbatches, costs="count", stage_compile=stage_compile
    )
    return Way(name, pipe, dict(zip(("input_ids", "labels"), setting.tokens(), strict=True)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--dropout", type=float, nargs="*", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
