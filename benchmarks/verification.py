"""What it costs that a capture proves itself: the first call beside the same call without, and an eager step.

    python benchmarks/verification.py
    python benchmarks/verification.py --models gpt2,t5 --rounds 3

Models of real depth and little width, two stages on CPU devices, a batch of 64 in 4 microbatches. ``check`` is what
``report.verified`` says, ``slice`` the rows that it runs, ``eager step`` the unsplit model's forward and
backward on the whole batch. Medians of some pipelines, each captured anew; ratios are of one run, taken side by side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pipecompile

sys.path.insert(0, str(Path(__file__).parent))
from guards import MODELS

BATCH, MICROBATCHES = 64, 4


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with as many rows as the batch."""
    return {n: t.repeat(BATCH // t.shape[0], *(1,) * (t.ndim - 1)) for n, t in inputs.items() if isinstance(t, Tensor)}


def loss_of(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else output.loss
    return loss if loss.ndim == 0 else loss.square().mean()


def seconds(run: Any) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def step(call: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    loss_of(call(**inputs)).backward()
    model.zero_grad()


def measured(name: str, rounds: int) -> tuple[float, float, float, float, int]:
    """Seconds of preparing, of the check, of a step and of the unsplit model's, and the rows that the check has run."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    inputs = widened(inputs)
    found = []
    for _ in range(rounds):
        pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=MICROBATCHES, costs="count")
        preparing = seconds(lambda pipe=pipe: pipe.pipeline.prepare(**inputs))
        step(pipe, model, inputs)
        (proof,) = pipe.pipeline.proofs
        ours = min(seconds(lambda pipe=pipe: step(pipe, model, inputs)) for _ in range(2))
        eager = min(seconds(lambda: step(model, model, inputs)) for _ in range(2))
        found.append((preparing, proof.seconds, ours, eager, proof.rows))
    preparing, check, ours, eager, rows = (statistics.median(each) for each in zip(*found, strict=True))
    return preparing, check, ours, eager, int(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "prepare", "check", "slice", "step", "eager step", "check / prepare", "check / eager step")
    for name in options.models.split(","):
        preparing, check, ours, eager, rows = measured(name, options.rounds)
        table.add_row(
            name, f"{preparing:.2f} s", f"{check:.2f} s", f"{rows} of {BATCH} rows", f"{ours:.2f} s", f"{eager:.2f} s",
            f"{check / preparing:.2f}", f"{check / eager:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
