"""What forwards keep and move: banks, queues, averages, counters, caches, and tensors written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


def numbered(draw: Draw) -> Inputs:
    return (draw.floats(D), torch.randperm(20, generator=draw.generator)[: draw.rows]), {}


@idiom(numbered)
class MemoryBank(Wrapped):
    """Instance discrimination: a bank of one row per sample, read for negatives and moved by index."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", F.normalize(torch.randn(20, D), dim=-1))

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        z = F.normalize(self.leave(torch.tanh(self.enter(x))), dim=-1)
        loss = F.cross_entropy(z @ self.bank.clone().t() / 0.5, index)
        if self.training:
            with torch.no_grad():
                moved = 0.5 * self.bank.index_select(0, index) + 0.5 * z
                self.bank.index_copy_(0, index, F.normalize(moved, dim=-1))
        return {"loss": loss, "z": z}


@idiom()
class MemoryRead(Wrapped):
    """A bank of keys and values that attention reads, whose usage is counted by ``scatter_add_``."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.randn(5, D))
        self.register_buffer("usage", torch.zeros(5), persistent=False)

    def middle(self, h: Tensor) -> Tensor:
        scores = h @ self.keys.t()
        if self.training:
            with torch.no_grad():
                self.usage += scores.softmax(-1).sum(0)
        return scores.softmax(-1) @ self.values


@idiom()
class AverageInABuffer(Wrapped):
    """An exponential average of activations' means that is written and not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.1)
                self.steps += 1
        return h


@idiom(refused_parts="samples|written|reads|microbatch")
class RunningMedian(Wrapped):
    """Reward normalisation by a running median: of the batch while training, kept for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("median", torch.zeros(D))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            centre = h.detach().median(0).values
            self.median.mul_(0.9).add_(0.1 * centre)
        else:
            centre = self.median
        return h - centre


@idiom(refused_parts="samples|written|reads|microbatch")
class WelfordNormalizer(Wrapped):
    """Observations normalised by Welford's running moments, updated before they are read (RL)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(1e-4))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("m2", torch.ones(D))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                n = h.shape[0]
                delta = h.mean(0) - self.mean
                total = self.count + n
                self.m2.add_(h.var(0, unbiased=False) * n + delta.square() * self.count * n / total)
                self.mean.add_(delta * n / total)
                self.count.copy_(total)
        return (h - self.mean) / (self.m2 / self.count + 1e-3).sqrt()


@idiom(takes(4, D), refused_parts="samples|written|reads|statistics|microbatch")
class BatchRenorm(Wrapped):
    """Batch renormalisation: r and d by running statistics, clamped by a step counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("std", torch.ones(D))
        self.register_buffer("tracked", torch.tensor(0, dtype=torch.long))

    def middle(self, h: Tensor) -> Tensor:
        if not self.training:
            return (h - self.mean) / self.std
        mean, std = h.mean((0, 1)), h.std((0, 1), unbiased=False) + 1e-3
        most = 1 + self.tracked.double() / 10
        r = torch.minimum(torch.maximum(std.detach() / self.std, 1 / most), most)
        d = ((mean.detach() - self.mean) / self.std).clamp(-0.5, 0.5)
        self.mean += 0.1 * (mean.detach() - self.mean)
        self.std += 0.1 * (std.detach() - self.std)
        self.tracked += 1
        return (h - mean) / std * r + d


@idiom(stream=False)
class BuffersInAList(Wrapped):
    """Buffers reached through ``getattr(self, f"stat_{i}")`` and rebound by assignment."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(2):
            self.register_buffer(f"stat_{i}", torch.zeros(D))

    def middle(self, h: Tensor) -> Tensor:
        for i in range(2):
            old = getattr(self, f"stat_{i}")
            h = h + old
            if self.training:
                setattr(self, f"stat_{i}", 0.5 * old + 0.5 * (i + 1))
        return h


@idiom(refused="make it a buffer")
class WarmupTensor(Wrapped):
    """A coefficient as a plain tensor attribute, replaced by a new tensor in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = torch.tensor(0.1, dtype=torch.float64)

    def middle(self, h: Tensor) -> Tensor:
        out = h * self.beta
        if self.training:
            self.beta = torch.clamp(self.beta * 1.5, max=1.0)
        return out + h


@idiom(stream=False)
class AverageWeights(Wrapped):
    """A shadow copy of a layer moved inside forward with ``torch._foreach_lerp_``, used in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shadow = nn.Linear(D, D), nn.Linear(D, D).requires_grad_(False)

    def middle(self, h: Tensor) -> Tensor:
        if not self.training:
            return self.shadow(h)
        out = self.layer(h)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.shadow.parameters()), list(self.layer.parameters()), 0.1)
        return out


@idiom(refused="copy the values")
class SwitchesParameters(Wrapped):
    """Weights exchanged for the time of a call: ``p.data`` saved, changed and put back (stochastic weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        kept = self.layer.weight.data
        self.layer.weight.data = kept.sign()
        out = self.layer(h)
        self.layer.weight.data = kept
        return out


@idiom()
class WeightInterpolation(Wrapped):
    """``functional_call`` with a dict of averaged parameters of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def middle(self, h: Tensor) -> Tensor:
        other = dict(self.two.named_parameters())
        mixed = {name: torch.lerp(p, other[name], self.alpha) for name, p in self.one.named_parameters()}
        return torch.func.functional_call(self.one, mixed, (h,))


@idiom(takes(5, D), refused_parts="samples")
class IndexPut(Wrapped):
    """``index_put_`` with accumulation, ``index_fill_``, ``scatter_reduce_``, ``put_along_dim`` within samples."""

    def middle(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        rows = torch.arange(h.shape[0])[:, None]
        places = h.argsort(1)[..., 0]
        out.index_put_((rows, places), h, accumulate=True)
        out.index_put_((rows, (places + 1) % 5), h * 2, accumulate=True)
        out.scatter_reduce_(1, places[..., None].expand_as(h), h, "amax", include_self=True)
        return out.index_fill(1, torch.tensor([2]), 0.5) + out


@idiom(takes(5, D))
class WritesThroughChunks(Wrapped):
    """Writes through slices, ``unbind``, ``tensor_split``, ``diagonal``, ``select`` and ``narrow`` of one tensor."""

    def middle(self, h: Tensor) -> Tensor:
        out = h.clone()
        a, b = out[..., :4], out[..., 4:]
        a.mul_(2)
        b += a
        *_, last = out.unbind(1)
        out[:, 0].copy_(last)
        out.tensor_split(2, 1)[1].data.neg_()
        out.narrow(2, 1, 2).mul_(0.3)
        out.select(1, 3).masked_fill_(out.select(1, 3) > 0.5, 0.25)
        torch.diagonal(out, 0, 1, 2).zero_()
        return out


@idiom(takes(5, D))
class WritesWithOut(Wrapped):
    """``out=`` of ``gt``, ``cat``, ``sum`` and ``max`` under no_grad, ``addcmul_``, ``clamp_``, ``swapaxes`` views."""

    def middle(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.empty_like(h)
            torch.gt(h, 0, out=mask)
            both = torch.empty(h.shape[0], 5, 2 * D, dtype=h.dtype)
            torch.cat([mask, mask], -1, out=both)
            both.swapaxes(1, 2)[:, :3].fill_(0.5)
            total, largest = torch.empty(len(h), dtype=h.dtype), torch.empty(len(h), D, dtype=h.dtype)
            torch.sum(h, (1, 2), out=total)
            values, _ = torch.max(h, 1, out=(largest, torch.empty(len(h), D, dtype=torch.long)))
        h = h + (total[:, None] * values * largest)[:, None]
        return h.addcmul_(both[..., :D], both[..., D:], value=0.3).clamp_(-1, 1)


@idiom(takes(5, D))
class GrowsATensor(Wrapped):
    """A result grown by ``cat`` in a loop, popped, reversed, and stacked with ``zip(*...)``."""

    def middle(self, h: Tensor) -> Tensor:
        grown = h[:, :0]
        pairs = []
        for t in range(h.shape[1]):
            grown = torch.cat([grown, h[:, t : t + 1] + (grown.sum(1, keepdim=True) if t else 0)], 1)
            pairs.append((grown[:, -1], grown.mean(1)))
        pairs.pop()
        last, mean = zip(*reversed(pairs), strict=True)
        return torch.stack(last, 1).sum(1, keepdim=True) + torch.stack(mean, 1).cumsum(1)[:, -1:] + grown


@idiom(stream=False)
class ReadOnceBuffers(Wrapped):
    """A key-value memory of the last call, detached, in a buffer of the batch's own size that changes shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1, D))

    def middle(self, h: Tensor) -> Tensor:
        return h + self.last.mean(0)


@idiom(takes(4, D), stream=False, warns="as one microbatch")
class SegmentRecurrence(Wrapped):
    """Transformer-XL: the states of the segment before, kept as a buffer of the batch's size, read and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(6, 2, D))

    def middle(self, h: Tensor) -> Tensor:
        memory = self.memory[: h.shape[0]]
        both = torch.cat([memory, h], 1)
        if self.training:
            self.memory = both[:, -2:].detach()
        weights = (h @ both.mT).softmax(-1)
        return weights @ both


@idiom(stream=False)
class CountsTokens(nn.Module):
    """Counters as Python numbers and a ``Counter``: calls, rows seen, the largest batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.calls, self.rows, self.largest = 0, 0, 0
        self.by_mode: dict[str, int] = {"train": 0, "eval": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rows += x.size(0)
        self.largest = max(self.largest, x.size(0))
        self.by_mode["train" if self.training else "eval"] += 1
        return self.head(torch.tanh(self.layer(x))) / self.calls


@idiom(stream=False)
class QueueWithPointer(Wrapped):
    """A ring of recent embeddings: the pointer is a Python number, slots written by slices that wrap around."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(16, D))
        self.pointer = 0

    def middle(self, h: Tensor) -> Tensor:
        out = h + (h @ self.queue.clone().t()).softmax(-1) @ self.queue.clone()
        if self.training:
            n = h.shape[0]
            with torch.no_grad():
                index = (torch.arange(n) + self.pointer) % 16
                self.queue[index] = h.detach()
            self.pointer = (self.pointer + n) % 16
        return out
