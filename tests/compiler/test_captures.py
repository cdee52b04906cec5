"""What a pipeline keeps of the calls that it was captured from."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile


class Memory(np.ndarray):
    """An array that a weak reference can watch: it lives as long as any tensor that shares its memory."""


class Kept(nn.Module):
    """A module that is kept whole, since it branches on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.sum() > 0 else -self.lin(x)


class Masked(nn.Module):
    """Reads a value of its input, and normalizes over the batch at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if (x > 10).any():
            h = h.relu()
        return F.normalize(self.last(h), dim=0)


MODELS = {
    "layers": lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))),
    "kept whole": lambda: nn.Sequential(nn.Linear(6, 6), Kept(), nn.Linear(6, 6)),
    "reads and mixes": Masked,
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("costs", ["count", "measure"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_no_batch_is_kept_alive(make: Any, costs: Any, microbatches: int) -> None:
    model = make()
    options = {"batching": pipecompile.Batching(allow_mixing=["1"])} if make is MODELS["kept whole"] else {}
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=microbatches, costs=costs, **options)
    memory = np.ones((4, 6), np.float32).view(Memory)
    alive = weakref.ref(memory)
    loss = pipe(torch.from_numpy(memory)).square().sum()
    loss.backward()
    assert pipe.pipeline.captures == 1
    del memory, loss
    gc.collect()
    assert alive() is None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(20, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(self.table(ids))).flatten(0, 1), ids.flatten())


def test_a_head_may_be_tied_to_the_embedding_after_the_first_call() -> None:
    torch.manual_seed(0)
    model = Words().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    ids, seen = torch.arange(12).reshape(4, 3), []
    for module in (pipe, model):
        module(ids).backward()
        module.head.weight = module.table.weight
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(module(ids))
            losses[-1].backward()
            optimizer.step()
        seen.append((torch.stack(losses), dict(module.named_parameters())))
    torch.testing.assert_close(*seen)
    assert pipe.pipeline.captures == 2
