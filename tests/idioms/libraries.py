"""What packages of models do: attentions of linear cost, quantizers, flows, spiking networks, operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idioms.declare import D, Wrapped, idiom

KNOWN: dict[type, float] = {}  # by the class of a tensor


class Asking(nn.Module):
    """Python that depends on a parameter, so that the module is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh())

    def asked(self, h: Tensor) -> Tensor:
        return -h if self.net[0].weight.sum() > 1e9 else h

    def forward(self, h: Tensor) -> Tensor:
        return self.net(self.asked(h))


@idiom()
class NetUnderTwoNames(Wrapped):
    """A helper that holds the network beside it, in a module kept whole, as Performer's redraws of projections."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Asking()
        self.body.add_module("watched", self.body.net)

    def middle(self, h: Tensor) -> Tensor:
        return self.body(h)


class Noting(nn.Module):
    """A layer that notes the generator's state, to draw the same numbers when it runs again."""

    state: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D // 2, D // 2), nn.Tanh())

    def forward(self, h: Tensor, again: bool = False) -> Tensor:
        if not again:
            self.state = torch.get_rng_state()
            return self.net(h)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            return self.net(h)


class Reversed(torch.autograd.Function):
    """Keeps the output only: the backward computes the input from it, and runs both layers again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + first(b)
        b = b + second(a)
        ctx.layers, ctx.out = (first, second), torch.cat([a, b], -1).detach()
        return ctx.out.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        first, second = ctx.layers
        (a, b), (to_a, to_b) = ctx.out.chunk(2, -1), gradient.chunk(2, -1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            out = second(a, again=True)
            torch.autograd.backward(out, to_b)
        to_a, b = to_a + a.grad, (b - out).detach()
        with torch.enable_grad():
            b.requires_grad_()
            out = first(b, again=True)
            torch.autograd.backward(out, to_a)
        return torch.cat([to_a, to_b + b.grad], -1), None, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Noting(), Noting()

    def forward(self, h: Tensor) -> Tensor:
        return Reversed.apply(h, self.first, self.second)


@idiom()
class ReversibleLayers(Wrapped):
    """A reversible block, as of Reformer: its backward runs layers again, which have noted the generator's state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Reversible()

    def middle(self, h: Tensor) -> Tensor:
        return self.body(h)


class Scaled(Asking):
    def forward(self, h: Tensor) -> Tensor:
        if type(h) not in KNOWN:
            KNOWN[type(h)] = 2.0
        return KNOWN[type(h)] * super().forward(h)


@idiom()
class TableByClass(Wrapped):
    """A module kept whole that fills a table by the class of its argument, as einops does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Scaled()

    def middle(self, h: Tensor) -> Tensor:
        return self.body(h)


@idiom()
class PackedAlone(Wrapped):
    """``einops.pack`` of one tensor: a concatenation of one part along heads and rows."""

    def middle(self, h: Tensor) -> Tensor:
        heads = h.unflatten(-1, (2, -1)).transpose(0, 1)
        packed = torch.cat([heads.reshape(-1, D // 2)], dim=0)
        return packed.unflatten(0, (2, -1)).mul(torch.arange(1.0, 3.0).to(h).view(2, 1, 1)).transpose(0, 1).flatten(1)


@contextmanager
def other_mask(model: Any) -> Iterator[None]:
    model.mask.copy_(model.mask.flip(0))
    yield


@idiom(between=other_mask)
class CouplingByMask(Wrapped):
    """A flow's coupling: halves by a mask and by its positions, both from a buffer, which then changes."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, True, False, True, False, False, True, False]))
        self.net = nn.Linear(D // 2, D // 2)

    def middle(self, h: Tensor) -> Tensor:
        kept, moved = h[:, self.mask], h[..., (~self.mask).nonzero().squeeze(-1)]
        out = torch.zeros_like(h)
        out[:, self.mask] = kept
        out[..., torch.where(~self.mask)[0]] = moved * self.net(kept).exp()
        return out


@contextmanager
def larger_mask(model: Any) -> Iterator[None]:
    model.mask.fill_(True)
    yield


@idiom(between=larger_mask)
class FeaturesByMask(Wrapped):
    """Features that a buffer selects, for an attention over as many; more of them after the first step."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(D) < D // 2)
        self.scale = nn.Parameter(torch.randn(D))

    def middle(self, h: Tensor) -> Tensor:
        chosen = h[:, self.mask] * self.scale[self.mask]
        weights = (chosen.unsqueeze(-1) @ chosen.unsqueeze(-2)).softmax(-1)
        assert weights.shape[-1] == int(self.mask.sum())
        return h + (weights @ chosen.unsqueeze(-1)).sum(1)


@idiom(refused_parts="samples|microbatch", refused_stream="asynchronous|several versions|samples|stages")
class BankOfValidRows(Wrapped):
    """A memory of past features of which a buffer that forward writes tells the valid ones."""

    bank: Tensor
    valid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(10, D))
        self.register_buffer("valid", torch.zeros(10, dtype=torch.bool))

    def middle(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.bank[: h.shape[0]] = h
            self.valid[: h.shape[0]] = True
        seen = self.bank[self.valid]
        return (h @ seen.T).softmax(-1) @ seen


@idiom()
class AssignedByIndex(Wrapped):
    """Assignments by lists, index tensors apart from each other, and masks, all shared; samples are last."""

    def middle(self, h: Tensor) -> Tensor:
        out, late = torch.zeros_like(h), torch.zeros_like(h.T)
        out[:, [0, 2]] = h[:, [1, 3]]
        out[..., torch.tensor([4, 5])] = h[:, 6:]
        late[torch.tensor([1, 0])] = h.T[2:4]
        blocks = torch.zeros(h.shape[0], 2, 3, 2, dtype=h.dtype)
        blocks[:, torch.tensor([0, 1]), :, torch.tensor([1, 0])] = h[:, :3].expand(2, -1, -1)
        late[torch.arange(D) > 5] = h.T[:2] + blocks.sum((1, 2, 3))
        return out + late.T


@idiom(parts=True, refused_stream="several versions|asynchronous|stages")
class TwoViewsNormalized(Wrapped):
    """Two views of each sample in one batch, normalized together, as SimCLR and BYOL do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def middle(self, h: Tensor) -> Tensor:
        one, other = self.norm(torch.cat([h, h.sin()])).chunk(2)
        return one * other


class Fields(NamedTuple):
    value: Tensor
    scale: Tensor


class Quantized(Fields):
    """Whole numbers with a scale, which takes part in torch functions; a float may stand for the scale."""

    def __new__(cls, value: Tensor, scale: Any) -> Quantized:
        return super().__new__(cls, value, torch.tensor(float(scale), dtype=value.dtype))  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.value * arg.scale if isinstance(arg, Quantized) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


@idiom()
class QuantizedByFields(Wrapped):
    """A named tuple with ``__new__`` and ``__torch_function__`` of its own passes between layers, as of brevitas."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.body = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        whole = h + (h * self.scale * 16).round().detach() / 16 - h.detach()
        return torch.tanh(self.body(Quantized(whole, 0.5)))


class Labelled(Fields):
    def __new__(cls, value: Tensor) -> Labelled:
        return super().__new__(cls, value, value.sin())  # type: ignore[no-any-return]


@idiom()
class NamedPairInACall(Wrapped):
    """A named tuple that its class makes of one tensor is the argument of a torch function."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.stack(Labelled(h)).prod(0)


class Pattern:
    """An object that a function inside its constructor fills, as einops has of a pattern."""

    def __init__(self, text: str) -> None:
        self.names: set[str] = set()

        def add(name: str) -> None:
            self.names.add(name)

        for name in text.split():
            add(name)


class Parsing(Asking):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * len(Pattern("b d").names)


@idiom()
class PatternParsedInALeaf(Wrapped):
    """A module kept whole that parses a pattern into a new object, by a function with an outer variable."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Parsing()

    def middle(self, h: Tensor) -> Tensor:
        return self.body(h)


class FirstMean(Asking):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, h: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = self.net[0].weight.detach().mean(0)
        return super().forward(h - self.mean)


@idiom(refused="has been None")
class FirstTensorOfABuffer(Wrapped):
    """A module kept whole gives a buffer its first tensor in the first call, as quantizers with an affine scale."""

    def __init__(self) -> None:
        super().__init__()
        self.body = FirstMean()

    def middle(self, h: Tensor) -> Tensor:
        return self.body(h)


@idiom(lambda draw: ((draw.floats(7, D),), {}))
class SegmentsRoundedUp(nn.Module):
    """Sequences padded to whole segments: how many is ``math.ceil`` of a length, which several layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        count = math.ceil(x.shape[1] / 3)
        h = F.pad(self.first(x).tanh(), (0, 0, 0, count * 3 - x.shape[1]))
        h = self.second(h.unflatten(1, (count, 3)).mean(2)).tanh()
        h = self.last(h.repeat_interleave(3, 1).view(-1, count, 3, D)).tanh()
        return (h.sum() / count).square() + h.square().mean()


@idiom(parts=True, refused_stream="several versions|asynchronous|stages")
class StackedViewsNormalized(TwoViewsNormalized):
    """Two views of each sample, stacked and flattened before they are normalized together."""

    def middle(self, h: Tensor) -> Tensor:
        one, other = self.norm(torch.stack([h, h.sin()]).flatten(0, 1)).chunk(2)
        return one * other


@idiom(parts=True, refused_stream="several versions|asynchronous|stages")
class RepeatedViewsNormalized(TwoViewsNormalized):
    """Each sample twice in one batch, normalized together."""

    def middle(self, h: Tensor) -> Tensor:
        one, other = self.norm(h.repeat(2, 1) * 0.5).chunk(2)
        return one * other.sin()


class ThroughNet(torch.autograd.Function):
    """Runs a network again in the backward, as solvers do that keep no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:
        ctx.x, ctx.net = x.detach(), net
        return net(x).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.net(x), gradient)
        return x.grad, None


@idiom(refused="of its own")
class AdjointInTheModelItself(Wrapped):
    """A function with a backward of its own takes a module, in the model's own forward, as adjoints of solvers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        return ThroughNet.apply(h, self.net)
