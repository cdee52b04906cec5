"""What an idiom is: a small model written as people write theirs, and what its test must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

D = 8  # the width of all models; no batch is as long
ROWS = 6  # of a batch
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Draw:
    """Random inputs of one batch."""

    rows: int
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, rows: int = ROWS) -> Draw:
        return cls(rows, torch.Generator().manual_seed(seed))

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, dtype=torch.float64, generator=self.generator)

    def ids(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, (self.rows, *shape), generator=self.generator)

    def lengths(self, most: int) -> Tensor:
        """From 1 to ``most``, and one row that is full."""
        lengths = torch.randint(1, most + 1, (self.rows,), generator=self.generator)
        lengths[0] = most
        return lengths

    def mask(self, most: int) -> Tensor:
        return torch.arange(most) < self.lengths(most)[:, None]


def loss_of(model: nn.Module, output: Any) -> Tensor:
    """The loss that an output has or gives: itself, its part of that name, or the mean square of its tensors."""
    if isinstance(output, Tensor):
        return output if output.ndim == 0 else output.abs().square().mean()
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    if hasattr(output, "loss"):
        return output.loss
    parts = output.values() if isinstance(output, Mapping) else output
    return torch.stack([loss_of(model, part) for part in parts if is_float(part)]).sum()


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.requires_grad


def one_batch(draw: Draw) -> Inputs:
    return (draw.floats(D),), {}


@dataclass(frozen=True)
class Idiom:
    """A model, and what its test must know of it.

    Attributes:
        sample: the arguments of a call.
        loss: of the model and its output.
        draws: names in a dict output of what the model has drawn; given those as arguments, the model draws nothing.
        between: what happens to the model after the first step, and is undone by the context at the end.
        parts: the step over microbatches is meant to be another than over the whole batch, such as batch
            normalisation's: it is compared with the unsplit model over the same microbatches.
        refused: why no pipeline is possible; a pattern of the message. Without a refusal the step must be exact.
        refused_parts: why no several microbatches are.
        refused_stream: why no asynchronous schedule is.
        stream: whether an asynchronous schedule is tried: Python state is set once a call, not for each microbatch.
        rounding: what may differ, absolutely and as a part, where the model rounds to less than its dtype.
        stages: whether the pipeline must have as many stages as were asked for.
        warns: a pattern of a warning of the pipeline's that is right here.
        held: what is still wrong, for idioms that the tests leave out.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[Draw], Inputs] = one_batch
    loss: Callable[[nn.Module, Any], Tensor] = loss_of
    draws: tuple[str, ...] = ()
    between: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    parts: bool = False
    refused: str = ""
    refused_parts: str = ""
    refused_stream: str = "tied across|asynchronous|stages"
    warns: str = ""
    stream: bool = True
    rounding: float = 0.0
    stages: bool = True
    held: str = ""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()


IDIOMS: dict[str, Idiom] = {}


def idiom(sample: Callable[[Draw], Inputs] | None = None, **options: Any) -> Callable[[type[nn.Module]], Any]:
    """Declares the model class as an idiom, under its name."""
    if sample is not None:
        options["sample"] = sample

    def declare(model: type[nn.Module]) -> type[nn.Module]:
        assert model.__name__ not in IDIOMS, f"there are two idioms {model.__name__}"
        assert (model.__doc__ or "").strip(), f"the idiom {model.__name__} has no line that tells it"
        IDIOMS[model.__name__] = Idiom(model.__name__, model, **options)
        return model

    return declare


def takes(*shape: int) -> Callable[[Draw], Inputs]:
    """One argument of floats of this shape behind the rows."""
    return lambda draw: ((draw.floats(*shape),), {})


class Wrapped(nn.Module):
    """A layer before and a layer after what a subclass does in ``middle``, so that a gradient must pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.leave = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.leave(torch.tanh(self.middle(torch.tanh(self.enter(x)))))

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError
