"""Small hand-written models that do more than compute: they write in place, keep state, and change autograd's rules.

All take floats of (batch, length, ``D``) and are deep enough for three stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D, blocks


class InPlace(nn.Module):
    """Updates of fresh tensors; one of them is made early and updated late."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        early = self.layers[0](x)
        before = early + 1
        h = self.layers[1](x).relu_()
        h = self.layers[2](h)
        h.masked_fill_(x > 1, 0.5)
        h[:, 0] = before[:, -1]
        late = self.layers[3](h)
        early.add_(late).mul_(0.5)
        out = torch.zeros_like(late)
        out[..., : D // 2] = late[..., D // 2 :]
        out += before
        return self.layers[4](early) + out


class InPlaceViews(nn.Module):
    """The same through views: of a view, of a transpose, of a reshape; the base is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        base = self.layers[0](x)
        view = base[..., 2:][..., :4]
        h = torch.tanh(self.layers[1](x))
        h = self.layers[2](h)
        h.view(-1, D)[:, 0] = 0.25
        h.transpose(0, 1)[0].mul_(3)
        view.add_(h[..., :4])
        view[:, 0].zero_()
        return self.layers[3](base) + h


class BuffersInPlace(nn.Module):
    """Running statistics that nothing reads; ``last`` keeps a slice of the latest rows."""

    seen: Tensor
    mean: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("last", torch.zeros(2, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        self.seen += x.shape[0]
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * h.mean(dim=(0, 1)))
            self.last[1] = h[-1, -1]
        return self.body[2:](h)


class BuffersRebound(nn.Module):
    """A counter and a mean that become new tensors in each forward."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:3](x)
        self.count = self.count + 1
        self.mean = torch.lerp(self.mean, h.detach().mean(dim=(0, 1)), 0.1)
        return self.body[3:](h)


class BufferRead(nn.Module):
    """The output reads a buffer that forward changes: each microbatch meets another value."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        before = self.scale.clone()
        self.scale.mul_(0.5)
        return self.body[2:](self.body[:2](x) * before) + self.scale


class StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes, three times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Blend(torch.autograd.Function):
    """Two outputs from two inputs and a number; each gradient goes to the wrong input, on purpose."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        return share * x + (1 - share) * y, x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, y, ctx.share = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, blend: Tensor, product: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        return (1 - ctx.share) * blend + x * product, ctx.share * blend + y * product, None


class CustomFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, x: Tensor) -> Tensor:
        h = StraightThrough.apply(self.body[0](x))
        blend, product = Blend.apply(self.body[1](h), self.body[2](x), 0.25)
        return StraightThrough.apply(self.body[3](blend)) + product


class NoGrad(nn.Module):
    """A gate, a target and a distance under ``no_grad``: recorded without it, the gate would get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.gate = nn.Linear(D, D)

    @torch.no_grad()
    def target(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(h))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        with torch.no_grad():
            scale = 1 + self.gate(h).abs()
            with torch.enable_grad():
                h = self.body[2](h)
        return self.body[3](h * scale) - self.target(h)


class Autocast(nn.Module):
    """A layer in bfloat16 between layers in double; inside it a layer that opts out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)
        self.low = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[0](x)
        weight, bias = self.low.weight.float(), self.low.bias.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = F.linear(h.float(), weight, bias)
            with torch.autocast("cpu", enabled=False):
                full = F.linear(low.float(), weight)
        assert low.dtype == torch.bfloat16
        assert full.dtype == torch.float32
        return self.body[1:](h + low.double() + full.double())


class LabelShift(nn.Module):
    """Labels become the decoder's inputs by updates in place, as mBART does it; the last label of a row is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.encoder, self.decoder = blocks(2), blocks(2)
        self.head = nn.Linear(D, VOCABULARY)

    @staticmethod
    def shift(labels: Tensor, padding: int) -> Tensor:
        previous = labels.clone()
        previous.masked_fill_(previous == -100, padding)
        end = (previous.ne(padding).sum(dim=1) - 1).unsqueeze(-1)
        start = previous.gather(1, end).squeeze()
        previous[:, 1:] = previous[:, :-1].clone()
        previous[:, 0] = start
        return previous

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        context = self.encoder(self.embedding(ids)).mean(dim=1, keepdim=True)
        logits = self.head(self.decoder(self.embedding(self.shift(labels, 1)) + context))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class TimesTwo(torch.autograd.Function):
    """Doubles, with a gradient that no one could derive from that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


class Remembers(nn.Module):
    """Asks an activation, and binds a new tensor to the name of a buffer."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        if h.detach().abs().max() > self.largest:
            self.largest = h.detach().abs().max()
        return h / (1 + self.largest)
