"""Random functions in a split model, and hooks on gradients, which a graph could lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile

D = 8


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().mean()


def gradients(stages: int, schedule: str, seed: int = 7, microbatches: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Drops().double()
    x = torch.randn(8, D, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu"] * stages, schedule=schedule, microbatches=microbatches, costs="count")
    torch.manual_seed(seed)
    pipe(x).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_seed_gives_one_step_on_any_schedule_and_number_of_stages() -> None:
    first = gradients(2, "1f1b")
    assert len(first) == 8
    for stages, schedule in [(2, "1f1b"), (3, "1f1b"), (4, "gpipe"), (1, "sequential")]:
        for name, gradient in gradients(stages, schedule).items():
            torch.testing.assert_close(gradient, first[name], msg=f"{name} at {stages} stages, {schedule}")


def test_another_seed_gives_another_step() -> None:
    one, other = gradients(2, "1f1b"), gradients(2, "1f1b", seed=8)
    assert not torch.equal(one["body.0.0.weight"], other["body.0.0.weight"])


def test_each_microbatch_and_each_step_draws_anew() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, D, bias=False), nn.Dropout(0.5))
    nn.init.eye_(model[1].weight)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    first, second = (pipe(torch.ones(2, 64 * D).view(2, 64, D)) for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    kept = (first != 0).double().mean().item()
    assert 0.15 < kept < 0.35  # two dropouts of one half


def test_a_step_draws_one_number_from_the_callers_generator_whatever_the_stages_draw() -> None:
    states = []
    for stages in (1, 2):
        gradients(stages, "1f1b")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_model_without_randomness_leaves_the_generator_alone() -> None:
    pipe = pipecompile.compile(nn.Linear(D, D), ["cpu"], costs="count")
    before = torch.get_rng_state()
    pipe(torch.ones(4, D))
    assert torch.equal(torch.get_rng_state(), before)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(D, D) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[1](self.body[0](x).tanh())
        h.register_hook(lambda gradient: gradient * 3)
        return (self.body[3](self.body[2](h)) + h).square().mean()


def hooked_module() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(4)))
    model[1].register_full_backward_hook(lambda module, given, taken: (given[0] * 3,))
    return model


@pytest.mark.parametrize("make", [Hooked, hooked_module])
def test_hooks_on_gradients_act_in_a_split_model(make: Any) -> None:
    model, inputs = make().double(), ((torch.randn(8, D, dtype=torch.float64),), {})

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    pipe = pipecompile.compile(model, ["cpu"] * 3, microbatches=2, costs="count")
    assert_same(step(pipe, model, loss, inputs), step(model, model, loss, inputs))


def test_a_forward_hook_that_is_removed_no_longer_acts() -> None:
    model, x = nn.Sequential(*(nn.Linear(D, D) for _ in range(4))), torch.randn(4, D)
    handle = model[1].register_forward_hook(lambda module, args, out: out * 2)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    torch.testing.assert_close(pipe(x), model(x))
    handle.remove()
    torch.testing.assert_close(pipe(x), model(x))


def test_a_backward_hook_on_the_model_itself_is_refused_where_a_loss_function_follows() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model.register_full_backward_hook(lambda module, given, taken: None)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count", loss_fn=nn.functional.mse_loss)
    with pytest.raises(pipecompile.PipecompileError, match="backward hook"):
        pipe(torch.ones(4, D), target=torch.ones(4, D))
