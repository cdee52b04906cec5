"""Two towers: stages that are a graph, against the same stages in a row, by simulated and measured makespan.

    python benchmarks/stage_dag.py
    python benchmarks/stage_dag.py --stages 4 --layers 8 --rounds 20

    graph    each tower reads an input of its own, and a small head reads both
    row      the first tower also hands on what the second reads, as where a stage may read only the one before it

Both train the same weights on the same batch to the same loss, which is checked. Three stages: a tower, a tower, the
head; four: two halves of a tower, two halves of a tower, the second with the head. Stages are threads: three need two
idle cores (the head takes no time), four need four. Both ways run in turn in every round; medians are shown.
"Predicted" is the simulation with the profile; "from stages", with the times of stages that the rounds have measured.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from predicted import Others
from predicted_makespan import measured_stages, simulated
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pipecompile
from pipecompile import PlanOptions
from pipecompile.ir.timeline import Timeline

WARM_UP = 2  # rounds


class Part(nn.Sequential):
    """Layers of a tower."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(*(module for _ in range(layers) for module in (nn.Linear(width, width), nn.Tanh())))


class First(nn.Module):
    """The last part of the first tower, which in a row hands on what the second tower reads."""

    def __init__(self, layers: int, width: int, hands_on: bool) -> None:
        super().__init__()
        self.body, self.scale, self.hands_on = Part(layers, width), nn.Parameter(torch.ones(())), hands_on

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), y * self.scale if self.hands_on else y


class Head(nn.Module):
    """The loss of the two towers' values."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean()


class Second(nn.Module):
    """The first part of the second tower, which reads its own input."""

    def __init__(self, layers: int, width: int, scales: bool) -> None:
        super().__init__()
        self.body, self.scale = Part(layers, width), nn.Parameter(torch.ones(())) if scales else None

    def forward(self, y: Tensor) -> Tensor:
        return self.body(y if self.scale is None else y * self.scale)


class Towers(nn.Module):
    """Two towers in one or two parts each, and the head."""

    def __init__(self, layers: int, width: int, parts: int, in_a_row: bool) -> None:
        super().__init__()
        self.before = Part(layers * (parts - 1), width)
        self.first = First(layers, width, in_a_row)
        self.second = Second(layers, width, not in_a_row)
        self.second_rest = Part(layers * (parts - 1), width)
        self.head = Head()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.first(self.before(x), y)
        return self.head(x, self.second_rest(self.second(y)))


def compiled(options: argparse.Namespace, in_a_row: bool, call: tuple[Tensor, Tensor]) -> Any:
    torch.manual_seed(0)
    halves = options.stages == 4
    model = Towers(options.layers // (2 if halves else 1), options.width, 2 if halves else 1, in_a_row)
    if halves:
        pins = {"before": 0, "first": 1, "second": 2, "second_rest": 3, "head": 3}
    else:
        pins = {"first": 0, "second": 1, "head": 2}
    return pipecompile.compile(
        model,
        ["cpu"] * options.stages,
        microbatches=options.microbatches,
        plan=PlanOptions(pins=pins, tune="never", recompute="never"),
        verify="never",
        example_inputs=call,
    )


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    call = tuple(torch.randn(2, options.rows, options.width, generator=torch.Generator().manual_seed(0)).unbind())
    pipes = {name: compiled(options, name == "row", call) for name in ("graph", "row")}
    timelines: dict[str, list[Timeline]] = {name: [] for name in pipes}
    losses: dict[str, list[float]] = {name: [] for name in pipes}
    optimizers = {name: torch.optim.SGD(pipe.parameters(), lr=0.01) for name, pipe in pipes.items()}
    others = Others()
    for _ in range(WARM_UP + options.rounds):
        for name, pipe in pipes.items():
            loss = pipe(*call)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            losses[name].append(loss.item())
            timelines[name].append(pipe.pipeline.timeline)
    torch.testing.assert_close(losses["graph"], losses["row"])
    share = others.share()

    table = Table("stages", "channels", "depth", "predicted, ms", "from stages, ms", "measured, ms")
    measured: dict[str, tuple[float, float, float]] = {}
    for name, pipe in pipes.items():
        plan, ran = pipe.pipeline.plan, timelines[name][WARM_UP:]
        stages = measured_stages(ran, plan.num_stages)
        seconds = (
            pipe.pipeline.predicted.makespan,
            simulated(pipe, pipe.pipeline.program, stages),
            median(timeline.makespan for timeline in ran),
        )
        measured[name] = seconds
        channels = " ".join(f"{channel.source}>{channel.target}" for channel in plan.channels)
        table.add_row(name, channels, str(max(plan.depth)), *(f"{1e3 * each:.1f}" for each in seconds))
    ratios = [graph / row for graph, row in zip(measured["graph"], measured["row"], strict=True)]
    table.add_row("graph / row", "", "", *(f"{ratio:.3f}" for ratio in ratios))
    console = Console(width=120)
    console.print(table)
    console.print(f"{torch.__version__}; other processes took {'?' if share is None else f'{share:.0%}'} of the CPUs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, choices=(3, 4), default=3)
    defaults = (("layers", 6), ("width", 768), ("rows", 512), ("microbatches", 4), ("rounds", 15))
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
