"""Small hand-written models of the shapes that networks take: skips, towers, ties, nested inputs and outputs.

All take floats of (batch, length, ``D``) or token ids of (batch, length), and are deep enough for three stages. ``D``
differs from every batch size, so that a row of weights is not taken for a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D = 10
VOCABULARY = 13


def blocks(count: int, width: int = D) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)))


def mean_square(output: Tensor) -> Tensor:
    return output.pow(2).mean()


class UNet(nn.Module):
    """Two levels down and up, each level's features skipping to the other side; group norm, so that rows are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = self._level(3, 8)
        self.down = self._level(8, 16)
        self.bottom = self._level(16, 16)
        self.up = self._level(32, 8)
        self.leave = self._level(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _level(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.ReLU(inplace=True))

    def forward(self, image: Tensor) -> Tensor:
        high = self.enter(image)
        low = self.down(F.max_pool2d(high, 2))
        bottom = self.bottom(F.avg_pool2d(low, 2))
        low = self.up(torch.cat([F.interpolate(bottom, scale_factor=2.0), low], dim=1))
        high = self.leave(torch.cat([F.interpolate(low, size=high.shape[-2:], mode="bilinear"), high], dim=1))
        return self.head(high)


class TwoTowers(nn.Module):
    """Text and picture meet only at the end; the output is the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.text = blocks(3)
        self.picture = nn.Sequential(nn.Linear(5, D), blocks(3))

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        text = F.normalize(self.text(self.words(ids)).mean(dim=1), dim=-1)
        picture = F.normalize(self.picture(features), dim=-1)
        return (1 - (text * picture).sum(dim=-1)).mean()


class DictInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        first = self.body[0](batch["x"]) * batch["mask"].unsqueeze(-1)
        last = self.body[1:](first)
        logits = self.head(last)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        return {"loss": loss, "logits": logits, "hidden": [first, last]}


class Tied(nn.Module):
    """The head reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.body = blocks(3)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(self.embedding(ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Sparse(nn.Module):
    """An embedding with sparse gradients; the output is the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, D, sparse=True), blocks(3)

    def forward(self, ids: Tensor) -> Tensor:
        return mean_square(self.body(self.words(ids)))


class Sundry(nn.Module):
    """A tied weight, a frozen one, and a buffer that one stage writes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(6))
        self.norm = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        self.frozen = nn.Parameter(torch.full((D,), 0.5), requires_grad=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        h = self.words(ids) * self.frozen
        for layer in self.layers:
            h = torch.tanh(layer(h))
        logits = self.head(self.norm(h))
        return {"loss": F.cross_entropy(logits, ids), "logits": logits}


class TiedThrice(nn.Module):
    """One weight in the first, the middle and the last layer, one bias in the first and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(D, D) for _ in range(3))
        self.between = blocks(2)
        self.middle.weight = self.last.weight = self.first.weight
        self.last.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        h = self.between[0](torch.tanh(self.first(x)))
        return self.last(self.between[1](torch.tanh(self.middle(h))))


class UsedTwice(nn.Module):
    """One block at the start and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = blocks(1)
        self.between = blocks(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.between(self.shared(x)))


class LongSkip(nn.Module):
    """The first block's result is read again at the end, the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(6)

    def forward(self, x: Tensor, late: Tensor) -> Tensor:
        first = self.body[0](x)
        return self.body[1:](first) + first + late


class SkipToLoss(LongSkip):
    """The same with its loss inside."""

    def forward(self, x: Tensor, late: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(super().forward(x, late), target)


@dataclass
class Scores:
    loss: Tensor
    scores: Tensor
    note: str = "mean square"


class Halves(NamedTuple):
    left: Tensor
    right: Tensor


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, x: Tensor) -> Scores:
        h = self.body(x)
        return Scores(h.pow(2).mean(), h)


class NamedTupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, x: Tensor) -> Halves:
        first = self.body[0](x)
        return Halves(first[..., 0], self.body[1:](first))


class NestedOutput(nn.Module):
    """Outputs of several stages, a detached one, an input handed through, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = [x]
        for block in self.body:
            hidden.append(block(hidden[-1]))
        return {"hidden": tuple(hidden), "last": {"detached": hidden[-1].detach(), "none": None, "layers": len(hidden)}}


class NestedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, pair: tuple[Tensor, dict[str, list[Tensor]]]) -> Tensor:
        x, rest = pair
        return self.body[2:](self.body[:2](x) + rest["more"][0]) * rest["more"][1]


class Options(nn.Module):
    """Keyword arguments that are flags, numbers, ``None``, and a tensor without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(
        self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, flag: bool = False, times: int = 1
    ) -> Tensor:
        h = self.body[:2](x)
        if scale is not None:
            h = h * scale
        if shift is not None:
            h = h + shift
        for _ in range(times):
            h = self.body[2](h)
        return self.body[3](h) if flag else h


class Integers(nn.Module):
    """Indices and masks made of activations, read several layers later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(5)
        self.choice = nn.Embedding(D, D)

    def forward(self, x: Tensor) -> Tensor:
        first = self.body[0](x)
        best = first.argmax(dim=-1)
        positive = first > 0
        h = self.body[1:4](first)
        return self.body[4](torch.where(positive, h, -h)) + self.choice(best)


class Frozen(nn.Module):
    """The start and a layer in the middle do not train; gradients pass through the middle only."""

    def __init__(self) -> None:
        super().__init__()
        self.start = blocks(2)
        self.body = blocks(4)
        self.start.requires_grad_(False)
        self.body[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.start(x))


class Unused(nn.Module):
    """A layer that is never called, and one whose result is dropped: their gradients are ``None``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.never, self.dropped = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        self.dropped(h)
        return self.body[2:](h)


class Sizes(nn.Module):
    """Sizes used as numbers: positions of columns, a reshape by the batch size, a scale by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(32, D)
        self.body = blocks(4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.body[:2](x + self.positions(torch.arange(length)))
        h = h.reshape(batch * length, width) / length**0.5
        causal = torch.tril(torch.ones(length, length, dtype=h.dtype))
        return causal @ self.body[2:](h).view(batch, length, -1)


class Bad(torch.autograd.Function):
    """A copy whose backward fails while it is told to."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Bad.fails:
            raise ValueError("on purpose")
        return gradient
