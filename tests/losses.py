"""What tests of losses share: a small model of tokens around a loss, and a step beside the unsplit model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.ir.instruction import Backward

WIDTH, CLASSES = 6, 8
IGNORED = -100


class Tokens(nn.Module):
    """Logits and hidden states for each token, and whatever a loss makes of them and of the other arguments."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.loss = loss

    def forward(self, ids: Tensor, **targets: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids))
        return self.loss(self.head(hidden), hidden, **targets)


def assert_step_equal(model: nn.Module, pipe: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Holds the loss and every gradient of a pipeline, by name, to the unsplit model's on the whole batch."""
    expected = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert any(g is not None and bool(g.abs().max() > 0) for g in gradients)
    model.zero_grad()
    found = pipe(**inputs)
    torch.testing.assert_close(found, expected, msg=lambda text: f"loss: {text}")
    found.backward()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    model.zero_grad()


def cut_into(pipe: Any, microbatches: int) -> None:
    """Lets a pipeline cut its next batches into so many microbatches; the captures that it has stay."""
    batches = pipe.pipeline._batches
    batches.options = replace(batches.options, microbatches=microbatches)


def microbatches_of(pipe: nn.Module) -> int:
    """Into how many microbatches the last training step was cut."""
    return len({done.microbatch for rank in pipe.pipeline.program.ranks for done in rank if isinstance(done, Backward)})
