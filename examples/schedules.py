"""The loss against the step under four schedules, as a table and a plot.

    python examples/schedules.py --output out/schedules.png

Sequential, GPipe and 1F1B train alike to the last digits: they differ in time and memory only. PipeDream never waits:
each microbatch is a minibatch with a step of its own, taken with weights that are some steps old in the early stages.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pipecompile

SCHEDULES = ("sequential", "gpipe", "1f1b", "pipedream")
LENGTH = 32


class Letters(nn.Module):
    """Predicts the next byte from those before it: an embedding, some causal convolutions with skips, a head."""

    def __init__(self, width: int = 64, layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel_size=3) for _ in range(layers))
        self.head = nn.Linear(width, 128)

    def forward(self, letters: Tensor) -> Tensor:
        h = self.embedding(letters[:, :-1]).transpose(1, 2)
        for layer in self.layers:
            h = h + torch.relu(layer(nn.functional.pad(h, (2, 0))))
        logits = self.head(h.transpose(1, 2))
        return nn.functional.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Letters()
    batches = list(draw(options.steps, options.batch))
    losses = {
        schedule: train(deepcopy(model), schedule, batches, options)
        for schedule in track(SCHEDULES, description="training")
    }
    show(losses)
    plot(losses, options.output)


def train(model: nn.Module, schedule: str, batches: list[Tensor], options: argparse.Namespace) -> list[float]:
    """The loss of each batch; under PipeDream the mean over its minibatches, each before its own step."""

    def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=options.learning_rate, momentum=0.9)

    devices = ["cpu"] * options.stages
    if schedule == "pipedream":
        pipe = pipecompile.compile(
            model, devices=devices, schedule=schedule, microbatches=options.microbatches, optimizer=optimizer
        )
        losses = [pipe(batch).item() for batch in batches]
        pipe.pipeline.flush()
        return losses
    pipe = pipecompile.compile(model, devices=devices, schedule=schedule, microbatches=options.microbatches)
    outer = optimizer(pipe.parameters())
    losses = []
    for batch in batches:
        outer.zero_grad()
        loss = pipe(batch)
        loss.backward()
        outer.step()
        losses.append(loss.item())
    return losses


def draw(count: int, size: int) -> Iterator[Tensor]:
    """Batches of pieces of Python's documentation, as bytes."""
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
    for _ in range(count):
        starts = torch.randint(len(text) - LENGTH, (size, 1))
        yield text[starts + torch.arange(LENGTH)]


def show(losses: dict[str, list[float]]) -> None:
    table = Table("step", *losses, title="Loss of a batch")
    steps = len(losses["sequential"])
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
        table.add_row(str(step), *(f"{losses[schedule][step]:.4f}" for schedule in losses))
    Console().print(table)


def plot(losses: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {"sequential": ("-", 5), "gpipe": ("-", 2.5), "1f1b": ("--", 1), "pipedream": ("-", 1.5)}
    for schedule, values in losses.items():
        line, width = styles[schedule]
        axes.plot(values, line, linewidth=width, label=schedule)
    axes.set(xlabel="batch", ylabel="loss (nats a byte)", title="Four schedules, one model, the same batches")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    Console().print(f"plot: {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--output", type=Path, default=Path("out/schedules.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
