"""Every optimizer of torch over a pipeline's parameters ends where it ends over the unsplit model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from models import MODELS
from pairs import INSIDE, both, loss_of
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from toys import Sparse

import pipecompile

MakeOptimizer = Callable[[Iterable[Any]], optim.Optimizer]
STEPS = 4

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "SGD maximize": partial(optim.SGD, lr=0.01, maximize=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "Adam fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW amsgrad": partial(optim.AdamW, lr=0.01, amsgrad=True),
    "AdamW foreach": partial(optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": partial(optim.AdamW, lr=0.01, fused=True),
    "AdamW tensor lr": partial(optim.AdamW, lr=torch.tensor(0.01)),
    "Adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.01),
    "Adagrad fused": partial(optim.Adagrad, lr=0.1, fused=True),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.1),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
    "LBFGS": partial(optim.LBFGS, lr=0.1, max_iter=3),
    "LBFGS line search": partial(optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}


def train(module: nn.Module, optimizer: optim.Optimizer, scheduler: LRScheduler | None = None) -> Iterator[Tensor]:
    """Steps over ``STEPS`` batches, with the optimizer's closure; gives each step's loss."""
    for seed in range(STEPS):
        inputs = MODELS[INSIDE].inputs(5, 6, seed)

        def closure(inputs: Any = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(INSIDE, module, inputs)
            loss.backward()
            return loss

        yield optimizer.step(closure).detach()
        if scheduler is not None:
            scheduler.step()


def assert_same_parameters(pipe: nn.Module, model: nn.Module, start: nn.Module) -> None:
    moved = dict(start.named_parameters())
    expected = dict(model.named_parameters())
    assert list(dict(pipe.named_parameters())) == list(expected)
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
        assert not torch.equal(parameter, moved[name]), name


def started(**options: Any) -> tuple[Any, nn.Module, nn.Module]:
    """A pipeline, its model once more, and how both began."""
    pipe, model, _ = both(INSIDE, **options)
    return pipe, model, deepcopy(model)


def test_every_optimizer_of_torch_is_here() -> None:
    known = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    tried = {name.split()[0] for name in OPTIMIZERS}
    assert known - tried == {"Optimizer", "SparseAdam", "Muon"}  # those have tests of their own, below


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_ends_where_it_ends_over_the_unsplit_model(kind: str) -> None:
    pipe, model, start = started(microbatches=3)
    losses = [list(train(module, OPTIMIZERS[kind](module.parameters()))) for module in (pipe, model)]
    torch.testing.assert_close(*losses)
    assert_same_parameters(pipe, model, start)


def test_muon_takes_the_matrices_and_adam_the_rest() -> None:
    pipe, model, start = started()
    for module in (pipe, model):
        matrices = optim.Muon([p for p in module.parameters() if p.ndim == 2], lr=0.01)
        rest = optim.Adam([p for p in module.parameters() if p.ndim != 2], lr=0.01)
        for seed in range(STEPS):
            loss_of(INSIDE, module, MODELS[INSIDE].inputs(5, 6, seed)).backward()
            for optimizer in (matrices, rest):
                optimizer.step()
                optimizer.zero_grad()
    for parameter, same in zip(pipe.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=0.02, atol=1e-4)  # it orthogonalises in bfloat16
    assert not torch.equal(pipe.head.weight, start.head.weight)


def test_sparse_adam_takes_sparse_gradients_and_torch_refuses_it_dense_ones() -> None:
    pipe, model = pipecompile.compile(Sparse().double(), ["cpu"] * 2, costs="count"), Sparse().double()
    model.load_state_dict(pipe.state_dict())
    for module in (pipe, model):
        optimizer = optim.SparseAdam(module.words.parameters(), lr=0.1)
        for seed in range(STEPS):
            optimizer.zero_grad()
            module(torch.randint(20, (5, 3), generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
    torch.testing.assert_close(pipe.words.weight, model.words.weight)
    assert not torch.equal(pipe.words.weight, Sparse().double().words.weight)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optim.SparseAdam(pipe.body.parameters()).step()


def decayed(module: nn.Module, **options: Any) -> optim.Optimizer:
    """Groups by name: biases do not decay, the head has a learning rate of its own."""
    named = dict(module.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("weight") and n != "head.weight"], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
        {"params": [named["head.weight"]], "lr": 0.002},
    ]
    return optim.AdamW(groups, lr=0.01, **options)


@pytest.mark.parametrize("foreach", [False, True])
def test_groups_of_parameters_go_by_name(foreach: bool) -> None:
    pipe, model, start = started()
    losses = [list(train(module, decayed(module, foreach=foreach))) for module in (pipe, model)]
    torch.testing.assert_close(*losses)
    assert_same_parameters(pipe, model, start)


def test_an_optimizer_of_named_parameters_keeps_their_names() -> None:
    pipe, model, start = started()
    states = []
    for module in (pipe, model):
        optimizer = optim.Adam(module.named_parameters(), lr=0.01)
        list(train(module, optimizer))
        states.append(optimizer.state_dict()["param_groups"][0]["param_names"])
    assert states[0] == states[1] == [name for name, _ in start.named_parameters()]
    assert_same_parameters(pipe, model, start)


def test_a_group_may_be_added_between_two_steps() -> None:
    pipe, model, start = started()
    for module in (pipe, model):
        optimizer = optim.SGD(module.body.parameters(), lr=0.1)
        list(train(module, optimizer))
        optimizer.add_param_group({"params": list(module.head.parameters()), "lr": 0.01})
        list(train(module, optimizer))
    assert_same_parameters(pipe, model, start)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, STEPS),
    "warm-up": lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)),
    "one cycle": lambda o: OneCycleLR(o, max_lr=[0.1] * len(o.param_groups), total_steps=STEPS + 1),
    "average": lambda o: SWALR(o, swa_lr=0.05),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_of_the_learning_rate_is_followed(kind: str) -> None:
    pipe, model, start = started()
    rates = []
    for module in (pipe, model):
        optimizer = decayed(module)
        list(train(module, optimizer, SCHEDULERS[kind](optimizer)))
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[1] != [0.01, 0.01, 0.002]
    assert_same_parameters(pipe, model, start)


def test_a_scheduler_that_reads_the_loss_decides_alike() -> None:
    pipe, model, start = started()
    for module in (pipe, model):
        optimizer = optim.SGD(module.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        for loss in train(module, optimizer):
            scheduler.step(loss)
        assert optimizer.param_groups[0]["lr"] < 0.1
    assert_same_parameters(pipe, model, start)


def test_an_average_of_a_pipelines_weights_is_a_pipeline() -> None:
    pipe, model, start = started()
    averages = []
    for module in (pipe, model):
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        for _ in train(module, optim.Adam(module.parameters(), lr=0.05)):
            average.update_parameters(module)
        averages.append(average)
    ours, theirs = averages
    assert isinstance(ours.module.pipeline, pipecompile.Pipeline)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_parameters(ours.module, theirs.module, start)
    assert not torch.equal(ours.module.head.weight, pipe.head.weight)
    inputs = MODELS[INSIDE].inputs(5, 6, 9)
    torch.testing.assert_close(loss_of(INSIDE, ours, inputs), loss_of(INSIDE, theirs, inputs))
    assert ours.module.pipeline.plan.stage_of == pipe.pipeline.plan.stage_of


def test_a_copy_of_a_pipeline_trains_by_itself() -> None:
    pipe, model, start = started()
    list(train(pipe, optim.SGD(pipe.parameters(), lr=0.1)))
    copy, before = deepcopy(pipe), deepcopy(pipe.state_dict())
    list(train(copy, optim.SGD(copy.parameters(), lr=0.1)))
    for name, value in pipe.state_dict().items():
        assert torch.equal(value, before[name]), name
    for _ in range(2):
        list(train(model, optim.SGD(model.parameters(), lr=0.1)))
    assert_same_parameters(copy, model, start)


def test_a_copy_keeps_what_compile_was_told() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix, self.last = nn.Linear(10, 10), nn.Softmax(dim=0), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.mix(self.first(x)))

    pipe = pipecompile.compile(
        Mixes(), ["cpu"] * 2, microbatches=2, costs="count", batching=pipecompile.Batching(allow_mixing=["mix"])
    )
    x = torch.randn(4, 10)
    torch.testing.assert_close(deepcopy(pipe)(x), pipe(x))
