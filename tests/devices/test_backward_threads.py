"""A pipeline's backward runs in the thread that calls it, and is refused where it would wait for itself."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import pytest
import torch
from machines import LATE
from scenes import Net, built, floats, piped
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipecompile.errors import ExecutionError
from pipecompile.runtime import steps


def test_it_runs_in_the_thread_that_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    seen: list[threading.Thread] = []
    right = steps.give_gradients

    def spy(*args: Any) -> None:
        seen.append(threading.current_thread())
        right(*args)

    pipe(floats(0)[0]).sum().backward()  # the first call is compared with the unsplit model's
    monkeypatch.setattr(steps, "give_gradients", spy)
    pipe(floats(0)[0]).sum().backward()
    assert seen == [threading.current_thread()]


class CallsInItsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            ctx.call()
        return gradient, None


def test_a_call_inside_a_backward_on_a_device_is_refused_where_it_would_never_return() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    x, y = floats(0)
    loss = pipe(x, y)
    loss.backward()
    inner = torch.ones(2, device=LATE[0], requires_grad=True)
    with pytest.raises(ExecutionError, match="called inside a backward on an accelerator"):
        CallsInItsBackward.apply(inner, lambda: pipe(x, y)).sum().backward()
    assert torch.equal(pipe(x, y).detach(), loss.detach())


def test_a_thread_that_python_does_not_know_may_call_the_pipeline() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    expected = pipe(*floats(0)).detach().cpu()
    found: list[Any] = []
    done = threading.Event()

    def call() -> None:
        try:
            loss = pipe(*floats(0))
            loss.backward()
            found.append(loss.detach().cpu())
        except Exception as error:
            found.append(error)
        done.set()

    _thread.start_new_thread(call, ())
    assert done.wait(60)
    assert torch.equal(found[0], expected), found


def test_a_checkpoint_around_the_pipeline_is_refused_too() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    x = floats(0)[0].to(LATE[0]).requires_grad_()
    pipe(x)
    out = checkpoint(lambda h: pipe(h * 1.0), x, use_reentrant=True)
    with pytest.raises(ExecutionError, match="called inside a backward"):
        F.mse_loss(out, torch.zeros_like(out)).backward()
