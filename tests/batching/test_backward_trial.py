"""Functions that keep samples apart, and whose own backward does not: refused, or run where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError

WIDTH = 5


def custom(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity, as a custom function of autograd."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return backward(gradient)

    return lambda x: Identity.apply(x)


def hook(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, as a hook on the gradient."""

    def hooked(x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(backward)
        return x

    return hooked


torch.library.define("pipecompile_backward::identity", "(Tensor x, int kind) -> Tensor")
torch.library.impl("pipecompile_backward::identity", "CPU", lambda x, kind: x.clone())
torch.library.register_fake("pipecompile_backward::identity", lambda x, kind: torch.empty_like(x))
KINDS: list[Callable[[Tensor], Tensor]] = []


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.kind = inputs[1]


torch.library.register_autograd(
    "pipecompile_backward::identity", lambda ctx, g: (KINDS[ctx.kind](g), None), setup_context=_remember
)


def operator(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, as a custom operator."""
    KINDS.append(backward)
    kind = len(KINDS) - 1
    return lambda x: torch.ops.pipecompile_backward.identity(x, kind)  # type: ignore[no-any-return]


MIX: dict[str, Callable[[Tensor], Tensor]] = {
    "divided by the norm": lambda g: g / (g.norm() + 1),
    "centred": lambda g: g - g.mean(0),
    "divided by the rows": lambda g: g / g.shape[0],
    "clipped by norm": lambda g: g * (0.01 / g.norm()).clamp(max=1),
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "turned round": lambda g: -g,
    "clamped": lambda g: g.clamp(-0.01, 0.01),
    "a row's norm": lambda g: g / (g.norm(dim=-1, keepdim=True) + 1),
}
WAYS = [custom, hook, operator]


class OnSamples(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x))).square().mean()  # type: ignore[no-any-return]


class OnWeights(OnSamples):
    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.function(self.first.weight * 1))
        return self.last(hidden).square().mean()  # type: ignore[no-any-return]


def trained(model: nn.Module, microbatches: int = 3) -> None:
    """Holds a pipeline to the unsplit model."""
    model = model.double()
    inputs = (torch.randn(8, WIDTH, dtype=torch.float64),), {}
    expected = step(model, model, lambda out: out, inputs)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
    assert_same(step(pipe, model, lambda out: out, inputs), expected)


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("name", MIX)
def test_a_backward_that_mixes_samples_is_refused(make: Callable[..., Any], name: str) -> None:
    model = OnSamples(make(MIX[name]))
    with pytest.raises(CaptureError, match="samples of the batch mix"):
        trained(model)
    trained(model, microbatches=1)


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("name", APART)
def test_a_backward_that_keeps_samples_apart_is_exact(make: Callable[..., Any], name: str) -> None:
    trained(OnSamples(make(APART[name])))


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("backward", [MIX["divided by the norm"], APART["clamped"]])
def test_gradients_of_weights_that_do_not_add_up_are_refused(
    make: Callable[..., Any], backward: Callable[[Tensor], Tensor]
) -> None:
    model = OnWeights(make(backward))
    with pytest.raises(CaptureError, match="is not linear in the incoming gradients"):
        trained(model)
    trained(model, microbatches=1)


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("place", [OnSamples, OnWeights])
def test_a_backward_that_writes_into_its_gradient_is_refused_for_that(place: Any, make: Callable[..., Any]) -> None:
    model = place(make(lambda gradient: gradient.mul_(2)))
    with pytest.raises(CaptureError, match=r"writes into the gradient that comes into it.*return a new tensor"):
        trained(model)
    trained(place(make(lambda gradient: gradient * 2)))


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("backward", [MIX["centred"], APART["turned round"]])
def test_gradients_of_weights_that_add_up_are_exact(
    make: Callable[..., Any], backward: Callable[[Tensor], Tensor]
) -> None:
    trained(OnWeights(make(backward)))


class Scaled(torch.autograd.Function):
    """Rows times one more than an integer each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kinds: Tensor) -> Tensor:
        ctx.save_for_backward(kinds)
        return x * (1 + kinds[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kinds,) = ctx.saved_tensors
        return gradient * (1 + kinds[:, None]), None


class OnKinds(OnSamples):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scaled.apply(self.first(x), (x.sum(-1) > 0).long())).square().mean()  # type: ignore[no-any-return]


def test_integers_beside_what_has_a_gradient_are_tried_out_too() -> None:
    trained(OnKinds(lambda x: x))
