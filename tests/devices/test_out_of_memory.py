"""A stage that does not fit says so and where; nothing is left half-written, and the next call works."""

from __future__ import annotations

import copy
import gc
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import scenes
import torch
import virtual_device as vd
from long import LONG
from machines import LATE
from scenes import Net, built, floats, piped
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile import OutOfMemoryError

Step = Callable[[nn.Module], Tensor]


def loss_inside(pipe: nn.Module) -> Tensor:
    loss = pipe(*floats(0))
    loss.backward()
    return loss.detach()


def loss_outside(pipe: nn.Module) -> Tensor:
    out = pipe(floats(0)[0])
    loss = F.mse_loss(out, floats(0)[1].to(out.device))
    loss.backward()
    return loss.detach()


def with_norm() -> nn.Module:
    return Net(lambda: nn.BatchNorm1d(scenes.D), lambda: nn.Dropout(0.2))


KINDS: dict[str, tuple[Callable[[], nn.Module], Step, dict[str, Any]]] = {
    "loss inside": (with_norm, loss_inside, {}),
    "loss outside": (Net, loss_outside, {}),
    "gpipe": (with_norm, loss_inside, {"schedule": "gpipe", "where": (0, 1, 2)}),
    "tail": (scenes.Contrastive, loss_inside, {}),
    "recomputed": (Net, loss_inside, {"plan": pipecompile.PlanOptions(recompute="always")}),
}
EACH = 10 if LONG else 4  # allocations that fail, of each kind


def state(model: nn.Module) -> dict[str, Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"generator": torch.get_rng_state(), "device generator": torch.virt.get_rng_state(0)}
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_allocations_that_fail_at_random(kind: str) -> None:
    make, step, options = KINDS[kind]
    LATE.start()
    model = built(make)
    pipe = piped(model, LATE, **options)
    step(pipe)
    pipe.zero_grad()
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    before = state(model)
    vd.fail_after(-1)
    wanted = step(pipe)
    count = vd.fail_after(-1)
    expected = state(model)
    assert count > 20
    for number in sorted(random.Random(kind).sample(range(count), EACH)):
        pipe.zero_grad()
        model.load_state_dict(start)
        torch.manual_seed(3)
        vd.fail_after(number)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            step(pipe)
        vd.fail_after(-1)
        after = state(model)
        after = {name: value for name, value in after.items() if not name.startswith("gradient")}
        if kind != "loss outside":  # the caller's own loss may have failed, after the pipeline had drawn its numbers
            assert same(after, before), f"allocation {number}: {caught.value}"
        if isinstance(caught.value, OutOfMemoryError):
            assert re.match(r"stage \d, \d[FB]\d|outside the stages", str(caught.value)), str(caught.value)
            assert "tried to allocate" in str(caught.value)
        pipe.zero_grad()
        torch.manual_seed(3)
        assert torch.equal(step(pipe), wanted)
        assert same(state(model), expected), f"allocation {number}"


def test_the_error_names_stage_instruction_module_bytes_and_remedies() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    loss_inside(pipe)
    said: list[str] = []
    for number in range(60):
        vd.fail_after(number)
        with pytest.raises(OutOfMemoryError) as caught:
            loss_inside(pipe)
        said.append(str(caught.value))
    vd.fail_after(-1)
    forward = [
        text for text in said if re.match(r"stage [01], [01]F\d: module '[\w.]+', \S+scenes.py:\d+: OutOf", text)
    ]
    backward = [text for text in said if re.match(r"stage [01], [01]B\d: in the backward of modules '\w", text)]
    sent = [text for text in said if re.match(r"stage 0, 0F\d>1: OutOfMemoryError", text)]
    assert forward
    assert backward
    assert sent
    assert all(re.search(r"tried to allocate \d+ bytes on virt:[01]", text) for text in said)
    options = "PlanOptions(recompute='always'), PlanOptions(offload='always')"
    remedies = f"what takes less memory: {options}, more than 4 microbatches"
    assert all(remedies in text for text in (*forward, *backward, *sent))


def test_memory_of_a_step_that_failed_is_free_again() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    loss_inside(pipe)
    pipe.zero_grad()
    loss_inside(pipe)
    pipe.zero_grad()
    gc.collect()  # of tests before this one
    held = [torch.accelerator.memory_allocated(device) for device in range(2)]
    for number in (5, 40):
        vd.fail_after(number)
        with pytest.raises(torch.OutOfMemoryError):
            loss_inside(pipe)
        vd.fail_after(-1)
        assert [torch.accelerator.memory_allocated(device) for device in range(2)] == held
