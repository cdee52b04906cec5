"""PipeDream, vertical sync and 2BW: bit for bit the sequential recurrence, with no more versions than it needs.

The recurrence runs on the unsplit model (``oracle.delayed``): a stage's gradients are those of weights that lag by the
updates that the schedule says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Inputs, Recurrence, delayed, split
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile import PlanOptions
from pipecompile.runtime.weights import Version, Weights

WIDTH, ROWS, UPDATES = 6, 6, 30
OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
EACH, SYNC, BATCH = "pipedream", "pipedream-vertical-sync", "pipedream-2bw"


class Chain(nn.Module):
    """Six layers in a row, with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, y)


class Branches(nn.Module):
    """A source that two branches read, one of them longer, and a sink that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.sink = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.left, self.left2, self.right = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.source(x))
        left = torch.tanh(self.left2(torch.tanh(self.left(x))))
        return F.mse_loss(self.sink(left * torch.sigmoid(self.right(x))), y)


@dataclass(frozen=True)
class Training:
    """A training of ``UPDATES`` updates.

    Args:
        make: the model.
        stages: for each stage, the modules whose parameters it trains.
        microbatches: of a call.
        depths: the stages on the longest path from each stage to the last one, itself included.
    """

    make: Callable[[], nn.Module]
    stages: Sequence[Sequence[str]]
    microbatches: int
    depths: Sequence[int]

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    @property
    def plan(self) -> PlanOptions:
        return PlanOptions(pins={module: stage for stage, mine in enumerate(self.stages) for module in mine})

    def calls(self, schedule: str) -> list[Inputs]:
        generator = torch.Generator().manual_seed(1)
        count = UPDATES if schedule == BATCH else UPDATES // self.microbatches
        return [
            (tuple(torch.randn(ROWS * self.microbatches, WIDTH, generator=generator) for _ in range(2)), {})
            for _ in range(count)
        ]

    def delays(self, schedule: str) -> list[int]:
        """The updates by which each stage's weights lag."""
        every = len(self.depths)
        return {
            EACH: [depth - 1 for depth in self.depths],
            SYNC: [max(self.depths) - 1] * every,
            BATCH: [1] * every,
        }[schedule]

    def expected(self, schedule: str, optimizer: Callable[..., torch.optim.Optimizer]) -> Recurrence:
        parts = [split(call, self.microbatches) for call in self.calls(schedule)]
        batches = parts if schedule == BATCH else [[part] for call in parts for part in call]
        assert len(batches) == UPDATES
        model = self.built()
        names = [
            [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in mine] for mine in self.stages
        ]
        return delayed(model, lambda output: output, batches, names, self.delays(schedule), optimizer)

    def trained(self, schedule: str, optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[Any, list[float]]:
        pipe = pipecompile.compile(
            self.built(),
            devices=["cpu"] * len(self.stages),
            schedule=schedule,
            microbatches=self.microbatches,
            optimizer=optimizer,
            costs="count",
            plan=self.plan,
        )
        losses = [pipe(*args).item() for args, _ in self.calls(schedule)]
        pipe.pipeline.flush()
        return pipe, losses


def chain(stages: int, microbatches: int) -> Training:
    """Six layers in stages as even as possible."""
    of = [[f"layers.{i}" for i in range(6) if i * stages // 6 == stage] for stage in range(stages)]
    return Training(Chain, of, microbatches, range(stages, 0, -1))


BRANCHES = Training(Branches, [["source"], ["left"], ["left2"], ["right"], ["sink"]], 3, [4, 3, 2, 2, 1])


class Memories:
    """How many memories the weights of each stage have at once, at most: those of living leaves after each update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.living: dict[int, weakref.WeakSet[Version]] = {}  # by ``id`` of the stage's weights
        self.most: dict[int, int] = {}
        make, optimize = Weights._version, Weights._optimize

        def made(weights: Weights) -> Version:
            version = make(weights)
            self.living.setdefault(id(weights), weakref.WeakSet()).add(version)
            return version

        def optimized(weights: Weights, needed: Set[Version]) -> None:
            optimize(weights, needed)
            del needed
            alive = {next(iter(version.leaves.values())).data_ptr() for version in self.living[id(weights)]}
            self.most[id(weights)] = max(self.most.get(id(weights), 0), len(alive))

        monkeypatch.setattr(Weights, "_version", made)
        monkeypatch.setattr(Weights, "_optimize", optimized)

    def of(self, pipe: Any) -> list[int]:
        return [self.most[id(weights)] for _, weights in sorted(pipe.pipeline._session.weights.items())]


def same(pipe: Any, losses: Sequence[float], expected: Recurrence) -> None:
    """Holds every parameter to the recurrence, bit for bit, and the losses of the calls to its means."""
    for name, parameter in pipe.named_parameters():
        assert torch.equal(parameter, expected.parameters[name]), name
    for name, value in pipe.state_dict().items():
        assert torch.equal(value, expected.parameters.pop(name)), name
    assert not expected.parameters
    each = len(expected.losses) // len(losses)
    means = [sum(expected.losses[i : i + each]) / each for i in range(0, len(expected.losses), each)]
    torch.testing.assert_close(losses, means)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("schedule", [EACH, SYNC, BATCH])
@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6])
def test_thirty_updates_are_bit_for_bit_those_of_the_recurrence(
    stages: int,
    schedule: str,
    optimizer: Callable[..., torch.optim.Optimizer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memories, training = Memories(monkeypatch), chain(stages, microbatches=3)
    pipe, losses = training.trained(schedule, optimizer)
    assert pipe.pipeline.plan.num_stages == stages
    same(pipe, losses, training.expected(schedule, optimizer))
    due = {EACH: [*range(stages, 0, -1)], SYNC: [stages] * stages, BATCH: [2] * stages}[schedule]
    assert memories.of(pipe) == due
    assert list(pipe.pipeline.versions) == due


@pytest.mark.parametrize("schedule", [EACH, SYNC, BATCH])
def test_thirty_updates_of_stages_in_branches_are_those_of_the_recurrence(schedule: str) -> None:
    pipe, losses = BRANCHES.trained(schedule, OPTIMIZERS["adam"])
    assert tuple(pipe.pipeline.plan.depth) == tuple(BRANCHES.depths)
    assert {(c.source, c.target) for c in pipe.pipeline.plan.channels} == {(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)}
    same(pipe, losses, BRANCHES.expected(schedule, OPTIMIZERS["adam"]))
