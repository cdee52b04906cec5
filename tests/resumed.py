"""A training whose state is hard to keep: a tied weight, dropout, batch normalization, two groups, a scheduler.

``trained`` runs some of its steps, and its losses and weights are compared with those of a training that was resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D, Sundry

import pipecompile

ROWS = 8
ALL = slice(None)


class Net(Sundry):
    """Its layers can be cut into four stages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unsaved", torch.ones(D), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) * self.frozen * self.unsaved
        for layer in self.layers:
            h = F.dropout(torch.tanh(layer(h)), 0.2, self.training)
        return F.cross_entropy(self.head(self.norm(h)), ids)


@dataclass(frozen=True)
class Way:
    """A way to step.

    Attributes:
        make: the optimizer of named parameters.
    """

    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None


def two_groups(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    decayed = [p for name, p in named if name.endswith("weight")]
    rest = [p for name, p in named if not name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2)


def _all(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    return lambda named: make([p for _, p in named], **options)


def stepped(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


WAYS = {
    "two groups and a scheduler": Way(two_groups, stepped),
    "foreach": Way(_all(torch.optim.AdamW, lr=1e-2, foreach=True)),
    "fused": Way(_all(torch.optim.AdamW, lr=1e-2, fused=True)),
    "amsgrad": Way(_all(torch.optim.Adam, lr=1e-2, amsgrad=True)),
    "momentum": Way(_all(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "no state": Way(_all(torch.optim.SGD, lr=0.1)),
    "a rate that is a tensor": Way(_all(torch.optim.AdamW, lr=torch.tensor(1e-2), foreach=False)),
    "adafactor": Way(_all(torch.optim.Adafactor, lr=1e-2)),
    "with another parameter": Way(
        lambda named: torch.optim.AdamW([*(p for _, p in named), nn.Parameter(torch.zeros(()))], lr=1e-2)
    ),
    "one cycle": Way(
        _all(torch.optim.AdamW), lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10)
    ),
}


@dataclass
class Training:
    """A model with its optimizer, after some steps.

    Attributes:
        losses: by step.
        rows: of each batch that this process gets.
    """

    pipe: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    losses: dict[int, float]
    rows: slice = field(default_factory=lambda: ALL)
    step: int = 0

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            loss = self.pipe(batch(self.step)[self.rows])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler:
                self.scheduler.step()
            self.losses[self.step] = loss.item()
            self.step += 1
        return self

    def save(self, folder: Path | str, **options: Any) -> Any:
        extra = {"step": self.step}
        return pipecompile.save(folder, self.pipe, self.optimizer, self.scheduler, extra=extra, **options)

    def load(self, folder: Path | str) -> Training:
        self.step = pipecompile.load(folder, self.pipe, self.optimizer, self.scheduler)["step"]
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.pipe.state_dict().items()}


FIRST = next(iter(WAYS))


def begun(way: str = FIRST, seed: int = 0, model: nn.Module | None = None, rows: slice = ALL, **place: Any) -> Training:
    """A training before its first step; without a place, of the model that is not split."""
    torch.manual_seed(seed)
    net = Net() if model is None else model
    options = {"microbatches": 4, "costs": "count", "example_inputs": batch(0)[rows], "verify": "never", **place}
    pipe = pipecompile.compile(net, **options) if place else net
    optimizer = WAYS[way].make(list(pipe.named_parameters()))
    scheduler = WAYS[way].scheduler
    return Training(pipe, optimizer, None if scheduler is None else scheduler(optimizer), {}, rows)


def batch(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(step))


def on(stages: int) -> dict[str, Any]:
    """A place in threads; none for the model that is not split."""
    return {"devices": ["cpu"] * stages} if stages else {}
