"""What an entry of ``make wild`` is: a model of another library, made deterministic, in float64 if it can be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from models import Draw, Inputs
from oracle import Loss, tree_map
from torch import Tensor, nn
from zoo.entry import Entry, all_square


@dataclass(frozen=True)
class Wild(Entry):
    """A model of another library.

    ``mixes`` and ``dtype`` are found out from the model itself (``settled``).

    Attributes:
        quiet: sets what is random in training to zero, on each module of the model.
    """

    loss: Loss = all_square
    inside: bool = False
    lengths: tuple[int, ...] = (8, 12)

    def build(self) -> nn.Module:
        random.seed(0)
        np.random.seed(0)
        model = super().build()
        for module in model.modules():
            without_dropout(module)
        return model


def wild(
    library: str,
    name: str,
    make: Callable[[], nn.Module],
    sample: Callable[[Draw], Inputs],
    *,
    inside: bool = False,
    **facts: Any,
) -> Wild:
    """An entry; with ``inside`` the loss is computed by the model, in its forward."""
    loss: Loss = facts.pop("loss", all_square)
    if inside:
        return Wild(name, lambda: WithLoss(make(), loss), sample, itself, True, family=library, **facts)
    return Wild(name, make, sample, loss, False, family=library, **facts)


def alternating(entries: list[Wild]) -> tuple[Wild, ...]:
    """Every other entry with the loss inside its model."""
    return tuple(with_loss_inside(e) if i % 2 and not e.inside else e for i, e in enumerate(entries))


def with_loss_inside(entry: Wild) -> Wild:
    make, loss = entry.make, entry.loss
    return replace(entry, make=lambda: WithLoss(make(), loss), loss=itself, inside=True)


def itself(output: Tensor) -> Tensor:
    return output


class WithLoss(nn.Module):
    """A model that ends in its loss, as people write it who train by ``loss = model(batch)``."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(self.model(*args, **kwargs))


def settled(entry: Wild) -> Wild:
    """The entry with what its model tells of itself: whether it mixes samples by batch norm, and its dtype."""
    model = entry.build()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    return replace(entry, mixes=entry.mixes or ("batch norm" if norms else ""), dtype=_dtype(entry, model))


def _dtype(entry: Wild, model: nn.Module) -> torch.dtype:
    args, kwargs = entry.inputs(2, entry.lengths[0])
    try:
        value = entry.loss(model(*args, **kwargs))
    except Exception:
        return torch.float32  # what fails in that too, says so when it is run as a reference
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def without_dropout(module: nn.Module) -> None:
    """Sets to zero what is a probability of dropping something, whatever it is called."""
    if type(module).__name__.endswith(("Dropout", "DropPath", "DropBlock2d", "StochasticDepth")):
        for name in ("p", "drop_prob", "drop_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(module, name, 0.0)


def as_float(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
