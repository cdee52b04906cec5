"""Custom functions of autograd keep their own backwards, however a model has come by ``apply``."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from pairs import pipe_of
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from toys import D, blocks, mean_square
from trained import WAYS, assert_trains_alike, floats

import pipecompile
from pipecompile.capture import capture, read_call
from pipecompile.errors import CaptureError


class Square(Function):
    """The gradient is another than that of a square, as in all functions here: a lost backward shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * gradient * x


class Scale(Function):
    @staticmethod
    def forward(x: Tensor, factor: float = 3.0) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor * 2, None


class Doubled(Function):
    """Writes to its argument and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


class Clamped(Function):
    """Writes to its argument and does not say so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.clamp_(-0.5, 0.5)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class Scan(Function):
    """Writes inside, as ``mambapy.pscan`` does: to copies, through views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., 0] = x[..., 0]
        view = out[:, 1:]
        view.add_(x[:, :-1]).mul_(y[:, 1:])
        ctx.save_for_backward(x.clone(), out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, out = ctx.saved_tensors
        return gradient * out, gradient * x


class Several(Function):
    """Two tensors, a number and nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int, None]:
        ctx.save_for_backward(x, y)
        return x * y, x + y, 7, None

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor, *rest: None) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return product * y + 2 * total, product * x + 3 * total


class Largest(Function):
    """A value with a gradient, and an index without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        value, index = x.max(-1, keepdim=True)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)
        ctx.size = x.shape
        return value, index

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, none: None) -> Tensor:
        assert none is None
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size).scatter_(-1, index, 2 * gradient)


class Pair(Function):
    """Asks which of its outputs have got a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x * 1, x * 2

    @staticmethod
    def backward(ctx: Any, one: Tensor | None, two: Tensor | None) -> Tensor | None:
        return one * 10 if one is not None and two is None else two


class Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x


class Reversed(Function):
    """Hands its argument on: the gradient alone is another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Nested(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return square(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return square(gradient) * x * 11


class OwnApply(Function):
    """An ``apply`` of its own around that of torch."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args) * 2

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class Listed(Function):
    @staticmethod
    def forward(ctx: Any, count: int, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(sum(xs) * (i + 1) for i in range(count))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *(sum(gradients) * (i + 2) for i in range(2))


@wraps(Square.apply)
def decorated(*args: Any) -> Any:
    return Square.apply(*args)


square, scale, doubled, clamped, scan, own = (kind.apply for kind in (Square, Scale, Doubled, Clamped, Scan, OwnApply))
several, largest, pair, once, reversed_, nested, listed = (
    kind.apply for kind in (Several, Largest, Pair, Once, Reversed, Nested, Listed)
)
TABLE = {"square": Square.apply}


class Holder:
    kept = staticmethod(Square.apply)


def read_before(layer: nn.Module, h: Tensor) -> Tensor:
    t = layer(h) * 1
    before = t + 1
    return before + doubled(t)


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "alias": lambda layer, h: layer(square(h)),
    "attribute": lambda layer, h: layer(Square.apply(h)),
    "partial": lambda layer, h: layer(partial(Scale.apply, factor=2.0)(h)),
    "staticmethod": lambda layer, h: layer(Holder.kept(h)),
    "table": lambda layer, h: layer(TABLE["square"](h)),
    "decorated": lambda layer, h: layer(decorated(h)),
    "own apply": lambda layer, h: layer(own(h)),
    "setup_context with a default": lambda layer, h: layer(scale(h)),
    "mark_dirty": lambda layer, h: doubled(layer(h) * 1),
    "mark_dirty of what was read": read_before,
    "unmarked write": lambda layer, h: clamped(layer(h) * 1),
    "writes inside": lambda layer, h: scan(h, layer(h)),
    "outputs of several kinds": lambda layer, h: sum(several(h, layer(h))[:3]),
    "non-differentiable output": lambda layer, h: layer(h) * largest(h)[0] + largest(h)[1],
    "one of two gradients": lambda layer, h: layer(pair(h)[0]),
    "both gradients": lambda layer, h: layer(sum(pair(h))),
    "once_differentiable": lambda layer, h: layer(once(h)),
    "reversed gradient": lambda layer, h: layer(reversed_(h)),
    "nested": lambda layer, h: layer(nested(h)),
    "as many as asked": lambda layer, h: layer(sum(listed(3, h, h * 2))),
    "in a checkpoint": lambda layer, h: checkpoint(lambda t: layer(square(t)), h, use_reentrant=False),
    "in a reentrant checkpoint": lambda layer, h: checkpoint(lambda t: layer(square(t)), h, use_reentrant=True),
}


class Around(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = blocks(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.body[3](self.function(self.body[2], self.body[:2](x)))


@WAYS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_custom_function_has_its_own_backward(name: str, way: dict[str, Any]) -> None:
    assert_trains_alike(Around(FUNCTIONS[name]), way, steps=2)


class HeldByModule(nn.Module):
    """``self.function = Square.apply``, and a weight among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = blocks(4), nn.Parameter(torch.ones(D))
        self.function = Several.apply

    def forward(self, x: Tensor) -> Tensor:
        product, total, *_ = self.function(self.body[:2](x), self.scale.expand_as(x))
        return self.body[2:](product + total)


@WAYS
def test_a_module_may_hold_the_function(way: dict[str, Any]) -> None:
    assert_trains_alike(HeldByModule(), way)


def test_other_threads_run_the_function_meanwhile() -> None:
    stop, wrong = threading.Event(), []

    def other() -> None:
        while not stop.is_set():
            x = torch.ones(3, dtype=torch.float64, requires_grad=True)
            y = square(x)
            y.sum().backward()
            if type(y) is not Tensor or x.grad is None or x.grad.tolist() != [3.0] * 3:
                wrong.append((y, x.grad))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(5):
            assert_trains_alike(Around(FUNCTIONS["alias"]), {"stages": 2}, steps=1)
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_the_function_is_as_before_when_a_trace_has_ended_or_failed() -> None:
    code = Function.apply.__func__.__code__

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert Function.apply.__func__.__code__ is not code
            raise ValueError("not today")

    model = nn.Sequential(nn.Linear(D, D).double(), Fails())
    with pytest.raises(CaptureError, match="not today"):
        capture(model, read_call(model.forward, floats(0), {}))
    assert Function.apply.__func__.__code__ is code


# What reaches autograd past the tracer


def past_the_tracer(h: Tensor) -> Tensor:
    """As a C++ extension does: not by ``Function.apply``."""
    return super(Function, Square).apply(h)


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return past_the_tracer(self.layer(x))


class Hidden(nn.Module):
    """Torch does not tell the tracer of what runs here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            h = self.layer(x)
        return h * 2


@WAYS
@pytest.mark.parametrize("kind", [Unseen, Hidden])
def test_a_module_with_an_unseen_function_is_kept_whole(kind: type[nn.Module], way: dict[str, Any]) -> None:
    assert_trains_alike(nn.Sequential(blocks(2), kind(), blocks(2)), way)


def test_an_unseen_function_in_the_models_own_forward_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body[2:](past_the_tracer(self.body[:2](x)))

    with pytest.raises(CaptureError, match=r"gets its gradient from SquareBackward.*test_custom_functions\.py"):
        pipe_of(Own().double())(*floats(0))


class Noisy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class NoiseAtBothEnds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(6)

    def forward(self, x: Tensor) -> Tensor:
        return Noisy.apply(self.body(Noisy.apply(x)))


def test_random_numbers_of_a_custom_function_are_the_same_for_any_number_of_stages() -> None:
    losses = []
    for stages in (1, 2, 3):
        torch.manual_seed(0)
        pipe = pipe_of(NoiseAtBothEnds().double(), stages=stages, microbatches=4, schedule="1f1b")
        torch.manual_seed(1)
        losses.append([mean_square(pipe(*floats(0))).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(losses[2])
    assert len(set(losses[0])) == 3


# Parameters that a forward freezes


class Freezes(nn.Module):
    def __init__(self, freeze: Callable[[nn.Parameter, bool], Any], again: bool) -> None:
        super().__init__()
        self.body = blocks(4)
        self.freeze, self.again = freeze, again

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.body[1].parameters():
            self.freeze(parameter, False)
        out = self.body(x)
        if self.again:
            for parameter in self.body[1].parameters():
                self.freeze(parameter, True)
        return out


@WAYS
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("freeze", [nn.Parameter.requires_grad_, lambda p, on: setattr(p, "requires_grad", on)])
def test_a_forward_freezes_parameters(freeze: Callable[..., Any], again: bool, way: dict[str, Any]) -> None:
    model = Freezes(freeze, again)
    assert_trains_alike(model, way)
    assert model.body[1][0].weight.requires_grad is again


@pytest.mark.parametrize("again", [False, True])
def test_what_a_forward_has_frozen_stays_frozen(again: bool) -> None:
    pipe = pipe_of(Freezes(nn.Parameter.requires_grad_, again).double())
    pipe(*floats(0))
    assert pipe.body[1][0].weight.requires_grad is again


def test_the_variables_of_a_frame_that_failed_in_a_trace_can_be_read() -> None:
    """Debuggers and test runners ask each frame of a traceback for its variables."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            raise ZeroDivisionError("in a custom function")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Failing.apply(self.linear(x))

    pipe = pipecompile.compile(Model(), ["cpu", "cpu"], microbatches=1, costs="count")
    with pytest.raises(Exception, match="in a custom function") as caught:
        pipe(torch.randn(4, 4))
    error: BaseException | None = caught.value
    frames = 0
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            assert isinstance(frame.f_locals, dict)
            frames += 1
        error = error.__cause__
    assert frames > 5
