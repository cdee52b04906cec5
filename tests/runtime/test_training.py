"""Training a GPT-2 by padded batches: after many steps of Adam a pipeline's parameters are the unsplit model's.

"Equal within rounding" is measured, not guessed. In float64 another order of additions changes a gradient by about
1e-16 of its size, and training carries that on from step to step. How far it gets is shown by the unsplit model
itself, trained beside the pipeline on the same rows in reverse order, which has the same sums in another order. The
pipeline, whose microbatches add in yet another order, may end ``WITHIN`` times as far from the unsplit model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from long import LONG, some
from pairs import pipe_of
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, LENGTH, VOCABULARY = 6, 12, 97  # six rows in four microbatches: two of two, two of one
WITHIN = 8


@dataclass(frozen=True)
class Loop:
    """One way to write a training loop."""

    scale: bool | None = None  # a GradScaler, on or off
    accumulate: int = 1
    clip: float | None = None


LOOPS = {
    "plain": Loop(),
    "scaler off": Loop(scale=False),
    "scaler on": Loop(scale=True),
    "accumulation of 4": Loop(accumulate=4),
    "clipped at 1": Loop(clip=1.0),
    "all at once": Loop(True, 4, 1.0),
}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, n_embd=64, n_layer=3, n_head=4, **off, **ids))
    model.loss_function = next_token_loss
    return model.double()


def next_token_loss(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
    """That of transformers, which rounds the logits to float32 first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def batch(number: int) -> dict[str, Tensor]:
    """Rows of between one and ``LENGTH`` tokens that follow a rule, padded; padding is no label."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    ids = (start + 5 * torch.arange(LENGTH)) % VOCABULARY
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def reversed_rows(call: Callable[..., object]) -> Callable[..., object]:
    return lambda **inputs: call(**{name: tensor.flip(0) for name, tensor in inputs.items()})


def train(call: Callable[..., object], model: nn.Module, loop: Loop, steps: int) -> list[float]:
    """Trains a model through ``call``; gives the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = None if loop.scale is None else torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=loop.scale)
    losses = []
    for step in range(steps):
        for part in range(loop.accumulate):
            loss = call(**batch(step * loop.accumulate + part)).loss
            losses.append(loss.item())
            loss = loss / loop.accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if loop.clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return losses


@cache
def unsplit(loop: Loop, steps: int) -> tuple[dict[str, Tensor], list[float], float]:
    """Parameters and losses of the unsplit model, and how far the order of rows moves its parameters."""
    model, other = gpt2(), gpt2()
    losses = train(model, model, loop, steps)
    train(reversed_rows(other), other, loop, steps)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, losses, distance(other, parameters)


def distance(model: nn.Module, parameters: dict[str, Tensor]) -> float:
    """The largest difference of any number of any parameter."""
    found = dict(model.named_parameters())
    assert list(found) == list(parameters)
    return max((found[name] - value).abs().max().item() for name, value in parameters.items())


def trained(stages: int, loop: Loop, steps: int) -> tuple[float, float, list[float]]:
    """How far a pipeline ends from the unsplit model, how far the order of rows takes that, and the losses."""
    parameters, expected, rounding = unsplit(loop, steps)
    pipe = pipe_of(gpt2(), stages, microbatches=4)
    losses = train(pipe, pipe.pipeline.model, loop, steps)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    return distance(pipe.pipeline.model, parameters), rounding, losses


@pytest.mark.parametrize(("loop", "stages"), some([(loop, stages) for loop in LOOPS for stages in (3, 2)]))
def test_training_ends_where_the_unsplit_model_ends(loop: str, stages: int) -> None:
    ours, rounding, _ = trained(stages, LOOPS[loop], steps=10)
    assert 0 < ours < WITHIN * rounding


@pytest.mark.skipif(not LONG, reason="200 steps take 20 seconds: make long")
def test_two_hundred_steps_end_where_the_unsplit_model_ends() -> None:
    ours, rounding, losses = trained(3, LOOPS["plain"], steps=200)
    assert 0 < ours < WITHIN * rounding
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
