"""PipeDream, vertical sync and 2BW: bit for bit the sequential recurrence, with no more versions than it needs.

The recurrence runs on the unsplit model (``oracle.delayed``): a stage's gradients are those of weights that lag by the
updates that the schedule says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from long import LONG, some
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
    """A training.

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
    updates: int = UPDATES

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    @property
    def plan(self) -> PlanOptions:
        return PlanOptions(pins={module: stage for stage, mine in enumerate(self.stages) for module in mine})

    def calls(self, schedule: str) -> list[Inputs]:
        generator = torch.Generator().manual_seed(1)
        count = self.updates if schedule == BATCH else self.updates // self.microbatches
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
        assert len(batches) == self.updates
        model = self.built()
        return delayed(model, lambda output: output, batches, self.names(model), self.delays(schedule), optimizer)

    def names(self, model: nn.Module) -> list[list[str]]:
        """The parameters of each stage."""
        all_of = [name for name, _ in model.named_parameters()]
        return [[name for name in all_of if name.rpartition(".")[0] in mine] for mine in self.stages]

    def compiled(self, schedule: str, optimizer: Callable[..., torch.optim.Optimizer]) -> Any:
        return pipecompile.compile(
            self.built(),
            devices=["cpu"] * len(self.stages),
            schedule=schedule,
            microbatches=self.microbatches,
            optimizer=optimizer,
            costs="count",
            plan=self.plan,
        )

    def trained(self, schedule: str, optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[Any, list[float]]:
        pipe = self.compiled(schedule, optimizer)
        losses = [pipe(*args).item() for args, _ in self.calls(schedule)]
        pipe.pipeline.flush()
        return pipe, losses


def chain(stages: int, microbatches: int, updates: int = UPDATES) -> Training:
    """Six layers in stages as even as possible."""
    of = [[f"layers.{i}" for i in range(6) if i * stages // 6 == stage] for stage in range(stages)]
    return Training(Chain, of, microbatches, range(stages, 0, -1), updates)


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


@pytest.mark.parametrize(
    ("stages", "schedule", "optimizer"),
    some(product([2, 3, 4, 5, 6], [EACH, SYNC, BATCH], OPTIMIZERS), 5),
)
def test_thirty_updates_are_bit_for_bit_those_of_the_recurrence(
    stages: int,
    schedule: str,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memories, training = Memories(monkeypatch), chain(stages, microbatches=3)
    pipe, losses = training.trained(schedule, OPTIMIZERS[optimizer])
    assert pipe.pipeline.plan.num_stages == stages
    same(pipe, losses, training.expected(schedule, OPTIMIZERS[optimizer]))
    due = {EACH: [*range(stages, 0, -1)], SYNC: [stages] * stages, BATCH: [2] * stages}[schedule]
    assert memories.of(pipe) == due
    assert list(pipe.pipeline.versions) == due


@pytest.mark.parametrize("optimizer", OPTIMIZERS if LONG else ["adam"])
@pytest.mark.parametrize("schedule", [EACH, SYNC, BATCH])
def test_thirty_updates_of_stages_in_branches_are_those_of_the_recurrence(schedule: str, optimizer: str) -> None:
    pipe, losses = BRANCHES.trained(schedule, OPTIMIZERS[optimizer])
    assert tuple(pipe.pipeline.plan.depth) == tuple(BRANCHES.depths)
    assert {(c.source, c.target) for c in pipe.pipeline.plan.channels} == {(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)}
    same(pipe, losses, BRANCHES.expected(schedule, OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("schedule", [SYNC, BATCH])
def test_the_recurrence_without_its_delays_is_another(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = chain(3, microbatches=3, updates=12)
    pipe, losses = training.trained(schedule, OPTIMIZERS["momentum"])
    for wrong in ([0, 0, 0], [2, 1, 0]):
        monkeypatch.setattr(Training, "delays", lambda self, schedule, wrong=wrong: wrong)
        with pytest.raises(AssertionError, match=r"layers\.0\.weight"):
            same(pipe, losses, training.expected(schedule, OPTIMIZERS["momentum"]))


def test_batches_of_any_number_of_microbatches_are_those_of_the_recurrence() -> None:
    momentum, training = OPTIMIZERS["momentum"], chain(4, microbatches=4)
    generator = torch.Generator().manual_seed(2)
    rows = [8, 1, 8, 2, 3, 6, 1, 1, 8, 5]  # 4, 1, 4, 2, 3, 4, 1, 1, 4 and 4 microbatches, of unequal rows
    calls = [(tuple(torch.randn(n, WIDTH, generator=generator) for _ in range(2)), {}) for n in rows]
    pipe = training.compiled(BATCH, momentum)
    losses = [pipe(*args).item() for args, _ in calls]
    pipe.pipeline.flush()
    batches = [split(call, min(4, n)) for call, n in zip(calls, rows, strict=True)]
    model = training.built()
    expected = delayed(model, lambda output: output, batches, training.names(model), [1] * 4, momentum)
    same(pipe, losses, expected)


def clipped(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """An optimizer that clips the gradients of its stage, and warms up its rate."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 10))
    optimizer.register_step_pre_hook(lambda *_: _clip(parameters))
    optimizer.register_step_post_hook(lambda *_: warmup.step())
    return optimizer


def _clip(parameters: list[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


@pytest.mark.parametrize("schedule", [EACH, SYNC, BATCH])
def test_schedulers_of_rates_and_clipping_work_stage_by_stage_inside_the_optimizer(schedule: str) -> None:
    training = chain(3, microbatches=3, updates=15)
    pipe, losses = training.trained(schedule, clipped)
    same(pipe, losses, training.expected(schedule, clipped))
    assert [optimizer.param_groups[0]["lr"] for optimizer in pipe.pipeline.optimizers] == [0.1] * 3
    with pytest.raises(pipecompile.InputError, match="clip the gradients of each stage in its optimizer"):
        pipe.pipeline.clip_grad_norm_(1.0)


@pytest.mark.parametrize("schedule", [SYNC, BATCH])
def test_evaluations_between_use_the_newest_weights_and_leave_the_stream_alone(schedule: str) -> None:
    momentum, training = OPTIMIZERS["momentum"], chain(3, microbatches=2, updates=18)
    expected, _ = training.trained(schedule, momentum)
    pipe, model = training.compiled(schedule, momentum), training.built()
    for number, (args, _) in enumerate(training.calls(schedule)):
        pipe(*args)
        assert pipe.pipeline.is_in_flight
        if number in (4, 5):
            model.load_state_dict(pipe.state_dict())
            with torch.no_grad():
                torch.testing.assert_close(pipe(*args), model(*args))
        if number in (0, 6):  # with the numbers of microbatches in flight, and with others
            pipe.eval()
            pipe(*args).backward()
            assert all(parameter.grad is not None for parameter in pipe.parameters())
            pipe.zero_grad()
            pipe.train()
    pipe.pipeline.flush()
    assert not pipe.pipeline.is_in_flight
    for (name, parameter), other in zip(pipe.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("schedule", [SYNC, BATCH])
def test_a_state_between_calls_has_each_stage_after_its_own_last_update(schedule: str) -> None:
    momentum, training = OPTIMIZERS["momentum"], chain(3, microbatches=3)
    calls = training.calls(schedule)[:5]
    pipe = training.compiled(schedule, momentum)
    for args, _ in calls:
        pipe(*args)
    state = pipe.state_dict()
    parts = [split(call, 3) for call in calls]
    batches = parts if schedule == BATCH else [[part] for call in parts for part in call]
    model = training.built()
    names, delays = training.names(model), training.delays(schedule)
    behind = [1, 1, 0] if schedule == BATCH else [2, 1, 0]  # updates whose gradients come with the next call
    for stage, missing in enumerate(behind):
        done = batches[: len(batches) - missing]
        expected = delayed(model, lambda output: output, done, names, delays, momentum)
        for name in names[stage]:
            assert torch.equal(state[name], expected.parameters[name]), name


def test_2bw_on_one_stage_lags_by_a_batch_too() -> None:
    training = chain(1, microbatches=3, updates=12)
    pipe, losses = training.trained(BATCH, OPTIMIZERS["adam"])
    assert pipe.pipeline.versions == (2,)
    assert pipe.pipeline.report.updates == (
        "stage 0: by its own optimizer, with gradients of weights that are 1 update older; 2 versions of the weights; "
        "gradients are clipped by the norm of this stage, if at all",
    )
    same(pipe, losses, training.expected(BATCH, OPTIMIZERS["adam"]))


class Guarded(Chain):
    """A chain that does not take large values."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = Guard()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.guard(x), y)


class Guard(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.detach().abs().max() > 1e6:
            raise ValueError("too large")
        return x * 1.0


@pytest.mark.parametrize("schedule", [EACH, SYNC, BATCH])
def test_an_evaluation_that_fails_between_leaves_the_stream_alone(schedule: str) -> None:
    momentum, whole = OPTIMIZERS["momentum"], chain(2, microbatches=3, updates=12)
    training = replace(whole, make=Guarded)
    pipe = pipecompile.compile(
        training.built(),
        devices=["cpu"] * 2,
        schedule=schedule,
        microbatches=3,
        optimizer=momentum,
        costs="count",
        plan=whole.plan,
        leaf_modules=["guard"],
    )
    losses = []
    for args, _ in training.calls(schedule):
        losses.append(pipe(*args).item())
        with torch.no_grad(), pytest.raises(pipecompile.ExecutionError, match="too large"):
            pipe(args[0] + 1e9, args[1])
        with torch.no_grad():
            pipe(*args)
    pipe.pipeline.flush()
    same(pipe, losses, training.expected(schedule, momentum))


@pytest.mark.parametrize("schedule", [SYNC, BATCH])
def test_after_a_flush_a_stream_starts_anew_from_the_newest_weights(schedule: str) -> None:
    sgd = partial(torch.optim.SGD, lr=0.05)  # without a state, so that the second half is a training of its own
    training = chain(3, microbatches=3, updates=18)
    calls = training.calls(schedule)
    pipe = training.compiled(schedule, sgd)
    state = training.built().state_dict()
    for half in (calls[: len(calls) // 2], calls[len(calls) // 2 :]):
        for args, _ in half:
            pipe(*args)
        pipe.pipeline.flush()
        parts = [split(call, 3) for call in half]
        batches = parts if schedule == BATCH else [[part] for call in parts for part in call]
        model = training.built()
        model.load_state_dict(state)
        delays = training.delays(schedule)
        expected = delayed(model, lambda output: output, batches, training.names(model), delays, sgd)
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        for name, value in state.items():
            assert torch.equal(value, expected.parameters[name]), name


class Padded(nn.Module):
    """A mean over the valid targets of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.layers[1](torch.tanh(self.layers[0](x))), y, ignore_index=-1)


def test_2bw_divides_by_what_is_valid_in_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    momentum = OPTIMIZERS["momentum"]
    calls = []
    for _ in range(8):
        x = torch.randn(8, WIDTH, generator=generator)
        y = torch.randint(WIDTH, (8,), generator=generator)
        y[1:5] = -1  # the second microbatch has no target at all
        calls.append(((x, y), {}))
    training = Training(Padded, [["layers.0"], ["layers.1"]], 4, [2, 1])
    pipe = training.compiled(BATCH, momentum)
    losses = [pipe(*args).item() for args, _ in calls]
    pipe.pipeline.flush()
    model = training.built()
    whole = delayed(model, lambda output: output, [[call] for call in calls], training.names(model), [1, 1], momentum)
    torch.testing.assert_close(losses, whole.losses)
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.detach(), whole.parameters[name], msg=name)


class Contrastive(Padded):
    """A loss of pairs of samples."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.layers[1](torch.tanh(self.layers[0](x)))
        return F.cross_entropy(out @ out.T, torch.arange(len(x))) + 0 * y.sum()


def test_2bw_refuses_a_loss_of_the_whole_batch_in_words() -> None:
    training = Training(Contrastive, [["layers.0"], ["layers.1"]], 2, [2, 1])
    pipe = training.compiled(BATCH, OPTIMIZERS["momentum"])
    with pytest.raises(pipecompile.ExecutionError, match=r"the loss of Contrastive is computed from the whole batch"):
        pipe(torch.randn(4, WIDTH), torch.randn(4))
