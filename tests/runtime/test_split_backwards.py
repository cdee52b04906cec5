"""Schedules that compute the gradients of weights later: the numbers are those of the unsplit model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import assert_same, step
from pairs import pipe_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pipecompile
from pipecompile import Batching, PlanOptions
from pipecompile.errors import InputError
from pipecompile.ir.instruction import Backward, BackwardWeight
from pipecompile.ops import split_backward

SCHEDULES = ["zb-h1", "zb-h2"]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["gpt2", "t5", "label_shift"])
def test_a_step_equals_the_unsplit_model(name: str, schedule: str, stages: int) -> None:
    model = MODELS[name]
    pipe, inputs = pipe_of(model.build(), stages, schedule=schedule, microbatches=3), model.inputs(6, model.lengths[0])
    for _ in range(2):
        assert_same(
            step(pipe, pipe.pipeline.model, model.loss, inputs),
            step(pipe.pipeline.model, pipe.pipeline.model, model.loss, inputs),
        )
    program = pipe.pipeline.program
    assert sum(isinstance(i, BackwardWeight) for i in program.instructions) == 3 * stages
    assert len(program.split) == sum(isinstance(i, Backward) for i in program.instructions)


class Convolutions(nn.Module):
    """A first stage with weights that nothing before waits for, batch statistics, dropout, and a loss at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2)
        )
        self.head = nn.Linear(8, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.frozen(self.head(self.body(x).mean((2, 3)))), y)


def pictures() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return ((x, torch.randint(5, (8,), generator=generator)), {})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"plan": PlanOptions(recompute="always")},
    "kept whole": {"leaf_modules": ["body.0", "head"]},
    "deferred statistics": {"batching": Batching(batch_norm="deferred")},
    "compiled": {"stage_compile": "aot_eager"},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_convolutions_train_as_under_1f1b(how: str) -> None:
    found = []
    for schedule in ("1f1b", "zb-h1"):
        torch.manual_seed(0)
        model = Convolutions().double()
        pipe = pipe_of(model, 2, schedule=schedule, microbatches=4, **OPTIONS[how])
        found.append(step(pipe, model, lambda loss: loss, pictures()))
    assert_same(found[1], found[0])


def test_the_backward_leaves_weights_and_the_queue_is_emptied_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    empty = split_backward.Queue.empty

    def seen(queue: split_backward.Queue) -> None:
        emptied.append(sum(weight.requires_grad for left in queue.waiting for weight in left.weights))
        empty(queue)

    monkeypatch.setattr(split_backward.Queue, "empty", seen)
    torch.manual_seed(0)
    model = Convolutions().double()
    pipe = pipe_of(model, 2, schedule="zb-h1", microbatches=4, plan=PlanOptions(pins={"body": 0, "head": 1}))
    args, _ = pictures()
    pipe(*args).backward()
    assert sorted(emptied[-8:]) == [3] * 4 + [4] * 4  # head 2 and a bias of frozen; two convolutions with biases


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_and_accumulation_are_as_under_1f1b(schedule: str) -> None:
    gradients = []
    for name in ("1f1b", schedule):
        torch.manual_seed(0)
        model = Convolutions()
        pipe = pipe_of(model, 2, schedule=name, microbatches=4)
        (x, y), _ = pictures()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pipe(x.float(), y)
        loss.backward()
        pipe(x.float(), y).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class Casts(nn.Module):
    """Functions whose weights autocast casts, one that it does not cast, a cast that two calls share, and a region."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.left, self.right, self.shared, self.full, self.out = (nn.Linear(16, 16) for _ in range(5))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        h = h + self.left(h) * self.right(h)
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = self.shared(torch.tanh(self.shared(self.norm(h))))
        with torch.autocast("cpu", enabled=False):
            h = self.full(h.float())
        return F.cross_entropy(self.out(h).flatten(0, 1), y.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_gradients_have_the_bits_of_whole_backwards(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    empty = split_backward.Queue.empty
    monkeypatch.setattr(split_backward.Queue, "empty", lambda queue: (left.append(len(queue.waiting)), empty(queue)))
    gradients = []
    for schedule in ("1f1b", "zb-h1", "zb-v"):
        torch.manual_seed(0)
        model, x, y = Casts(), torch.randint(11, (8, 5)), torch.randint(11, (8, 5))
        pipe = pipe_of(model, 2, schedule=schedule, microbatches=4)
        for _ in range(2):
            left.clear()
            with torch.autocast("cpu", dtype):
                loss = pipe(x, y)
            loss.backward()
        assert loss.dtype == torch.float32
        assert sum(left) == (0 if schedule == "1f1b" else 4 * 8)  # eight calls in each of four microbatches
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert all(torch.equal(each[name], gradient) for each in gradients[1:]), name


class Recurrent(nn.Module):
    """A cell with an autocast of its own, or all of its runs in one; ``gap``: a call between two of them."""

    def __init__(self, each: bool, gap: bool, shares: bool) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
        self.each, self.gap, self.shares = each, gap, shares

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[:, 0]
        with self._casts() if not self.each else nullcontext():
            for now in x.unbind(1):
                with self._casts() if self.each else nullcontext():
                    h = self.cell(h + now).tanh()
                h = h.float() if self.gap else h
        return (self.head(h.float()) ** 2).mean()

    def _casts(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=self.shares)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "own casts"])
@pytest.mark.parametrize(("each", "gap"), [(True, True), (True, False), (False, False)])
def test_gradients_of_casts_are_added_up_within_one_autocast(
    each: bool, gap: bool, shares: bool, schedule: str
) -> None:
    gradients = []
    for splits in (False, True):
        torch.manual_seed(0)
        model, x = Recurrent(each, gap, shares), torch.randn(4, 24, 16) + 0.5
        step = pipe_of(model, 1, schedule=schedule, microbatches=1) if splits else model
        step(x).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradients[1][name], gradient), name


class Nested(Recurrent):
    """An autocast that goes on behind one that is off inside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._casts():
            h = self.cell(x[:, 0])
            with torch.autocast("cpu", enabled=False):
                h = h.float() * 2
            h = self.cell(h)
        return (self.head(h.float()) ** 2).mean()


class Again(Recurrent):
    """Each run of the cell is recomputed in the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(h: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            with self._casts():
                return self.cell(h + now).tanh()

        h = x[:, 0]
        for now in x.unbind(1):
            h = checkpoint(run, h, now, use_reentrant=False)
        return (self.head(h.float()) ** 2).mean()


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize(("kind", "steps"), [(Nested, 1), (Again, 2)])
def test_casts_live_as_long_as_their_autocast(kind: type[Recurrent], steps: int, schedule: str) -> None:
    gradients = []
    for splits in (False, True):
        torch.manual_seed(0)
        model, x = kind(False, False, True), torch.randn(4, 6, 16) + 0.5
        step = pipe_of(model, 1, schedule=schedule, microbatches=1) if splits else model
        for _ in range(steps):
            step(x).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradients[1][name], gradient), name


Used = Callable[[nn.Linear, torch.Tensor], torch.Tensor]


def gradients_of(
    use: Used, splits: bool, hooks: AbstractContextManager[None] | None = None
) -> list[torch.Tensor | None]:
    """The gradients of an input and of a layer's weights after ``use(layer, input)``."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    queue = split_backward.Queue() if splits else None
    with hooks or nullcontext(), split_backward.queued(queue):
        use(layer, x).backward()
    if queue is not None:
        assert layer.weight.grad is None
        queue.empty()
    return [x.grad, layer.weight.grad, layer.bias.grad]


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return split_backward.linear(x, layer.weight, layer.bias)


def scaled_in_part(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, 1].mul_(3)
    return tensor


def hooked(tensor: torch.Tensor) -> torch.Tensor:
    tensor.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
    return tensor


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


USES: dict[str, Used] = {
    "its output is changed in place": lambda layer, x: linear(layer, x * 2).relu_().sum(),
    "its output is used twice": lambda layer, x: (linear(layer, x) * linear(layer, x.sin()).exp()).sum(),
    "its output gets no gradient": lambda layer, x: (WithoutGradient.apply(linear(layer, x)) + x.sum()).sum(),
    "its gradient has one element in memory": lambda layer, x: linear(layer, x).sum(),
    "its rows in two dimensions are changed in place": lambda layer, x: linear(layer, (x * 2)[None]).relu_().sum(),
    "some of its rows are changed in place": lambda layer, x: scaled_in_part(linear(layer, (x * 2)[None])).sum(),
    "its rows without a gradient are changed in place": lambda layer, x: (
        linear(layer, x.detach()[None]).relu_().sum() + x.sum()
    ),
    "a hook changes its gradient": lambda layer, x: hooked(linear(layer, x)).sum(),
    "a hook changes the gradient of its rows": lambda layer, x: hooked(linear(layer, x[None])).sum(),
    "its input is added to its output": lambda layer, x: (linear(layer, x)[:, :3] + x).square().sum(),
}


@pytest.mark.parametrize("name", USES)
def test_a_layer_whose_weights_wait_has_the_gradients_of_one_that_does_not(name: str) -> None:
    for found, expected in zip(gradients_of(USES[name], True), gradients_of(USES[name], False), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_an_input_that_is_changed_in_place_is_an_error_as_in_torch() -> None:
    def use(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        out = linear(layer, doubled)
        doubled.add_(1)
        return out.sum()

    for splits in (True, False):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients_of(use, splits)


@pytest.mark.parametrize("written", ["input", "gradient"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_what_waits_and_is_changed_in_place_is_an_error(written: str, has_gradient: bool) -> None:
    layer, x = nn.Linear(3, 4), torch.ones(5, 3)
    queue, ones = split_backward.Queue(), torch.ones(5, 4)
    with split_backward.queued(queue):
        linear(layer, x.requires_grad_(has_gradient)).backward(ones)
    {"input": x.detach(), "gradient": ones}[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation, but gradients of weights need it"):
        queue.empty()


class Rows(nn.Module):
    """Rows of several tokens, activations in place, and parameters that autograd gives a gradient that others have."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.places, self.of_places = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)
        self.shift, self.late = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        places = self.shift.view(5, 8) + self.of_places(self.places)
        x = self.relu(self.middle(self.relu(self.enter(x)))) + places
        return F.mse_loss(self.leave(torch.tanh(x) + (self.late.view(5, 8) + self.of_places(self.places))), y)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", *SCHEDULES, "zb-v"])
def test_memory_that_gradients_share_is_not_added_to(schedule: str) -> None:
    torch.manual_seed(0)
    model = Rows().double()
    x, y = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    pipe = pipe_of(model, 2, schedule=schedule, microbatches=3)
    for _ in range(2):
        found, expected = (step(each, model, lambda loss: loss, ((x, y), {})) for each in (pipe, model))
        assert_same(found, expected)


def test_hooks_on_saved_tensors_pack_what_waits() -> None:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor + 1

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor - 1)
    split, whole = (gradients_of(lambda layer, x: linear(layer, x).sum(), splits, hooks) for splits in (True, False))
    assert packed.count(torch.Size([5, 3])) == 2
    for found, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_loss_outside_and_an_evaluation_run_whole_backwards() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    pipe = pipe_of(model, 2, schedule="zb-h1")
    x = torch.randn(4, 4, dtype=torch.float64)
    assert_same(
        step(pipe, model, lambda out: out.pow(2).mean(), ((x,), {})),
        step(model, model, lambda out: out.pow(2).mean(), ((x,), {})),
    )
    assert not pipe.pipeline.program.split
    with torch.no_grad():
        torch.testing.assert_close(pipe(x), model(x))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replicas_are_refused(schedule: str) -> None:
    with pytest.raises(InputError, match=r"replicas=.* does not work with schedule='zb-h"):
        pipecompile.compile(
            nn.Linear(2, 2), ["cpu"] * 3, schedule=schedule, plan=PlanOptions(replicas=[1, 2]), costs="count"
        )


def test_an_error_in_gradients_of_weights_names_stage_and_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(queue: split_backward.Queue) -> None:
        raise ValueError("as asked")

    pipe = pipe_of(Convolutions().double(), 2, schedule="zb-h1")
    args, _ = pictures()
    pipe(*args).backward()
    monkeypatch.setattr(split_backward.Queue, "empty", fails)
    with pytest.raises(
        pipecompile.ExecutionError, match=r"stage \d, \dW\d: in the gradients of weights of modules .*as"
    ):
        pipe(*args)
    monkeypatch.undo()
    pipe(*args).backward()
