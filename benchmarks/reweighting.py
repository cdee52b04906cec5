"""What exact microbatches cost: a 1F1B step with means weighed by their true share, beside one of plain microbatches.

    python benchmarks/reweighting.py --rounds 60

Both run the same model on two CPU devices, on the same padded batch: GPT-2 with labels of which a third is padding. The
plain way takes each microbatch for a batch of its own and averages their losses by rows, as other pipelines do: its
loss and gradients are another loss's. A round runs each way once, in turns that alternate; medians and the median of
the rounds' ratios are shown. ``gpt2, small`` is a model so small that little but overhead is measured.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from gpt import Setting, hugging_face
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pipecompile
from pipecompile import pipeline
from pipecompile.compiler.compile_call import compile_call

SETTINGS = {
    "gpt2": Setting(layers=8, width=256, vocabulary=2048, length=128, batch=8, microbatches=4),
    "gpt2, small": Setting(layers=2, width=32, vocabulary=128, length=16, batch=8, microbatches=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("model", "plain, ms", "exact, ms", "exact / plain", "quartiles", "loss: unsplit", "exact", "plain")
    for name, setting in SETTINGS.items():
        table.add_row(name, *compare(setting, rounds))
    Console(width=120).print(table)


def compare(setting: Setting, rounds: int) -> list[str]:
    model = hugging_face(setting)
    inputs = padded(setting)
    unsplit = model(**inputs).loss.item()
    ways = {"exact": piped(copy.deepcopy(model), setting, inputs, whole=True)}
    ways["plain"] = piped(copy.deepcopy(model), setting, inputs, whole=False)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {name: step(pipe, inputs)[0] for name, pipe in ways.items()}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            seconds[name].append(step(ways[name], inputs)[1])
    ratios = [a / b for a, b in zip(seconds["exact"], seconds["plain"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    shown = [f"{1e3 * median(seconds[name]):.2f}" for name in ("plain", "exact")]
    return [
        *shown,
        f"{median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        *(f"{loss:.6f}" for loss in (unsplit, losses["exact"], losses["plain"])),
    ]


def padded(setting: Setting) -> dict[str, Tensor]:
    """A batch whose rows are padded to a third on the average, the last rows most."""
    ids, labels = setting.tokens()
    valid = torch.linspace(setting.length, setting.length / 3, setting.batch).int()
    padding = torch.arange(setting.length) >= valid[:, None]
    return {"input_ids": ids, "attention_mask": (~padding).long(), "labels": labels.masked_fill(padding, -100)}


def piped(model: nn.Module, setting: Setting, inputs: dict[str, Tensor], whole: bool) -> Any:
    pipe = pipecompile.compile(model, ["cpu", "cpu"], schedule="1f1b", microbatches=setting.microbatches)
    with patch.object(pipeline, "compile_call", compile_call if whole else apart):
        pipe(**inputs)
    return pipe


def apart(*args: object, whole: bool, **kwargs: object) -> object:
    """Captures with each microbatch as a batch of its own."""
    return compile_call(*args, whole=False, **kwargs)  # type: ignore[arg-type]


def step(pipe: Any, inputs: dict[str, Tensor]) -> tuple[float, float]:
    pipe.zero_grad()
    begin = time.perf_counter()
    loss = pipe(**inputs).loss
    loss.backward()
    return loss.item(), time.perf_counter() - begin


if __name__ == "__main__":
    main()
