"""What the examples share: the training loop, and the comparison of a split model with its unsplit twin."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Course:
    """The loss of each step, and the gradients of the first one by the parameters' names."""

    losses: list[float]
    gradients: dict[str, Tensor]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Any]],
    loss_of: Callable[[Any, Any], Tensor] = lambda model, batch: model(**batch).loss,
) -> Course:
    """An ordinary loop, the same for a pipe and a plain model; ``loss_of(model, batch)`` is a step's loss."""
    course = Course([], {})
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if not course.losses:
            course.gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        course.losses.append(loss.item())
    return course


def report(pipe: nn.Module, split: Course, unsplit: Course) -> None:
    """Prints both courses of the loss, the largest difference of a gradient, and where the model was cut."""
    for step, (ours, theirs) in enumerate(zip(split.losses, unsplit.losses, strict=True)):
        print(f"step {step:3d}   loss {ours:.5f}   unsplit {theirs:.5f}   difference {abs(ours - theirs):.0e}")
    assert split.gradients.keys() == unsplit.gradients.keys(), "a parameter has a gradient on one side only"
    largest = max(gradient.abs().max() for gradient in unsplit.gradients.values())
    apart = max((split.gradients[n] - g).abs().max() for n, g in unsplit.gradients.items()) / largest
    print(f"{len(unsplit.gradients)} gradients of step 0 differ by {apart:.0e} of the largest entry, at most")
    print(pipe.pipeline.plan)


def options(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """``--steps``, ``--batch`` and other whole numbers, with their defaults, and the number of stages."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 10, "batch": 8, "stages": 2, "microbatches": 4, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one per stage
    return parser
