"""What a forward keeps: buffers, counters, caches, teachers, normalised weights."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


@idiom(refused_parts="samples|microbatch", refused_stream="several versions")
class ActNormByData(Wrapped):
    """Glow's ActNorm: scale and shift are set by the first batch, through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))
        self.shift = nn.Parameter(torch.zeros(D))
        self.ready = False

    def middle(self, h: Tensor) -> Tensor:
        if not self.ready:
            self.scale.data = 1 / (h.detach().std(0) + 1e-3)
            self.shift.data = -(h.detach() * self.scale.data).mean(0)
            self.ready = True
        return h * self.scale + self.shift


@idiom(refused_parts="samples|microbatch", refused="reads buffer|reads .*ready")
class ActNormCopied(Wrapped):
    """The same with ``.data.copy_`` under no_grad and a flag that is a buffer, as normflows has it."""

    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(D))
        self.register_buffer("ready", torch.tensor(0.0))

    def middle(self, h: Tensor) -> Tensor:
        if not self.ready > 0.5:
            with torch.no_grad():
                self.s.data.copy_(-torch.log(h.std(0) + 1e-6))
                self.ready.data.fill_(1.0)
        return h * self.s.exp()


@idiom(refused_stream="several versions")
class ScaledUnderNoGrad(Wrapped):
    """``self.s.data.mul_(0.9)`` under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(D))

    def middle(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.s.data.mul_(0.9)
        return h * self.s


@idiom(refused_stream="several versions")
class WeightNormalisedInPlace(Wrapped):
    """EDM2's forced weight normalisation: the weight is normalised in place in each forward of training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1) * math.sqrt(D))
        return F.linear(h, F.normalize(self.weight, dim=1))


@idiom(refused_stream="several versions")
class MaxNormByData(Wrapped):
    """``self.conv.weight.data = torch.renorm(...)``, EEGNet's constraint in speechbrain."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        self.w.weight.data = torch.renorm(self.w.weight.data, p=2, dim=0, maxnorm=0.5)
        return self.w(h)


@idiom()
class SpectralNorm(Wrapped):
    """``parametrizations.spectral_norm``, which does a power iteration in each forward of training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(D, D))

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


@idiom()
class WeightNorm(Wrapped):
    """``parametrizations.weight_norm`` on a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(D, D))

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


@idiom()
class Orthogonal(Wrapped):
    """``parametrizations.orthogonal``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.orthogonal(nn.Linear(D, D, bias=False), orthogonal_map="cayley")

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@idiom()
class OwnParametrization(Wrapped):
    """A parametrization of one's own, cached over a block of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        parametrize.register_parametrization(self.inner, "weight", Symmetric())

    def middle(self, h: Tensor) -> Tensor:
        with parametrize.cached():
            return self.inner(torch.tanh(self.inner(h)))


@idiom(takes(3, 6, 6))
class WeightStandardised(nn.Module):
    """Weight standardisation: a convolution whose weight is centred and scaled in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D, 3)
        self.gain = nn.Parameter(torch.ones(D, 1, 1, 1))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True)
        w = (w - mean) * torch.rsqrt(var * w[0].numel() + 1e-4) * self.gain
        h = F.conv2d(x, w, self.conv.bias, self.conv.stride)
        return self.head(F.gelu(h).mean((2, 3)))


@idiom()
class MergedLora(nn.Module):
    """LoRA: merged on eval(), apart in training, by overriding ``train``."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D)
        self.a = nn.Parameter(torch.randn(2, D) / 3)
        self.b = nn.Parameter(torch.randn(D, 2) / 3)
        self.head = nn.Linear(D, D)
        self.merged = False

    def train(self, mode: bool = True) -> MergedLora:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        if not self.merged:
            h = h + F.linear(F.linear(x, self.a), self.b)
        return self.head(torch.tanh(h))


@idiom()
class MomentumTeacher(nn.Module):
    """BYOL: a teacher without gradients, moved towards the student in each forward, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.teacher = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).requires_grad_(False)
        self.predictor = nn.Linear(D, D)

    @torch.no_grad()
    def move(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        p = self.predictor(self.student(x))
        with torch.no_grad():
            if self.training:
                self.move()
            target = self.teacher(x)
        return 2 - 2 * F.cosine_similarity(p, target, dim=-1).mean()


@idiom(refused_parts="samples|microbatch|written|writes", refused="reads buffer")
class MomentumQueue(nn.Module):
    """MoCo: a key encoder by momentum, and a queue of keys in a buffer with a pointer."""

    queue: Tensor
    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4))
        self.key = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4, 12), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.copy_(slow * 0.99 + fast * 0.01)
            k = F.normalize(self.key(x + 0.1), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach()], dim=1) / 0.2
        if self.training:
            at = int(self.pointer)
            self.queue[:, at : at + k.shape[0]] = k.T
            self.pointer[0] = (at + k.shape[0]) % self.queue.shape[1]
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


def transitions(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.floats(D), draw.ids(3, 1), draw.floats(), draw.ids(2)), {}


@idiom(transitions)
class TargetNetwork(nn.Module):
    """DQN: bootstrapped targets of a target network, Huber loss on the chosen actions."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
        self.target = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).requires_grad_(False)

    def forward(self, state: Tensor, following: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Tensor:
        value = self.q(state).gather(1, action).squeeze(1)
        with torch.no_grad():
            best = self.q(following).argmax(1, keepdim=True)
            bootstrap = self.target(following).gather(1, best).squeeze(1)
            target = reward + 0.99 * bootstrap * (1 - done.double())
        return F.smooth_l1_loss(value, target)


@idiom(takes(5, D), refused_parts="samples|microbatch|written|writes")
class VectorQuantizedByMeans(nn.Module):
    """VQ-VAE with a codebook in buffers, moved by the running means of what was assigned to each code."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 4)
        self.decoder = nn.Linear(4, D)
        self.register_buffer("codes", torch.randn(6, 4))
        self.register_buffer("counts", torch.ones(6))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        flat = z.reshape(-1, 4)
        index = torch.cdist(flat, self.codes).argmin(-1)
        hot = F.one_hot(index, 6).to(flat.dtype)
        quantized = F.embedding(index, self.codes).view_as(z)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(hot.T @ flat, alpha=0.1)
                self.codes.copy_(self.sums / (self.counts[:, None] + 1e-5))
        commit = F.mse_loss(z, quantized.detach())
        out = self.decoder(z + (quantized - z).detach())
        return {"loss": F.mse_loss(out, x) + 0.25 * commit, "codes": index.view(x.shape[:2])}


@idiom(takes(5, D), refused_parts="samples|microbatch|written|writes")
class VectorQuantizedByData(nn.Module):
    """The same with an ``nn.Embedding`` whose ``weight.data`` is assigned, as MONAI and others do it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 4)
        self.book = nn.Embedding(6, 4)
        self.book.weight.requires_grad_(False)
        self.register_buffer("size", torch.zeros(6))
        self.means = nn.Parameter(self.book.weight.detach().clone(), requires_grad=False)
        self.decoder = nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        flat = z.flatten(0, 1)
        far = flat.pow(2).sum(1, keepdim=True) + self.book.weight.pow(2).sum(1) - 2 * flat @ self.book.weight.T
        hot = torch.zeros_like(far).scatter_(1, far.argmin(1, keepdim=True), 1)
        quantized = (hot @ self.book.weight).view(z.shape)
        if self.training:
            with torch.no_grad():
                self.size.data.mul_(0.9).add_(hot.sum(0) * 0.1)
                self.means.data.mul_(0.9).add_((hot.T @ flat) * 0.1)
                self.book.weight.data.copy_(self.means / (self.size + 1e-1).unsqueeze(1))
        loss = F.mse_loss(quantized.detach(), z)
        return F.mse_loss(self.decoder(z + (quantized - z).detach()), x) + loss


@idiom(takes(5, D))
class VectorQuantizedByGradient(nn.Module):
    """VQ-VAE whose codebook is trained by its loss, with a perplexity that the caller may print."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 4)
        self.codes = nn.Embedding(6, 4)
        self.decoder = nn.Linear(4, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        flat = z.reshape(-1, 4)
        index = torch.cdist(flat, self.codes.weight).argmin(-1)
        quantized = self.codes(index).view_as(z)
        loss = F.mse_loss(quantized, z.detach()) + 0.25 * F.mse_loss(quantized.detach(), z)
        share = F.one_hot(index, 6).double().mean(0)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        out = self.decoder(z + (quantized - z).detach())
        return F.mse_loss(out, x) + loss, perplexity


@idiom(stream=False)
class CountingAttribute(Wrapped):
    """``self.calls += 1``, and a schedule computed from it: warm-up of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def middle(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * min(1.0, self.calls / 10)


@idiom()
class CountingBuffer(Wrapped):
    """A counter in a buffer, of which an annealed temperature is made, without Python reading it."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            self.step += 1
        return h / (0.5 + 0.5 * torch.exp(-0.1 * self.step.to(h.dtype)))


@idiom(refused="reads buffer")
class CounterAsNumber(Wrapped):
    """``self.step.item()`` of a buffer in forward."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def middle(self, h: Tensor) -> Tensor:
        self.step += 1
        weight = 1.0 / (1 + self.step.item())
        return h * weight


@idiom()
class HistoryList(Wrapped):
    """Numbers appended to a list on the module: shapes seen."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def middle(self, h: Tensor) -> Tensor:
        self.shapes.append(tuple(h.shape[1:]))
        return h


@idiom()
class ActivationKept(Wrapped):
    """``self.attention = scores.detach()``, for whoever wants to look."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        scores = h.softmax(-1)
        self.attention = scores.detach()
        return scores * h


@idiom()
class ActivationsInADict(Wrapped):
    """Features that forward hooks put into a dict outside of the model (feature extraction)."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.enter.register_forward_hook(lambda module, args, out: self.features.__setitem__("enter", out.detach()))

    def middle(self, h: Tensor) -> Tensor:
        return h + self.features["enter"]


def aux_loss(model: Any, output: Tensor) -> Tensor:
    return output.square().mean() + model.aux


@idiom(loss=aux_loss, stream=False)
class LossInAnAttribute(Wrapped):
    """A balancing loss left on ``self.aux`` for the caller to add."""

    def middle(self, h: Tensor) -> Tensor:
        gate = h.softmax(-1)
        self.aux = 0.1 * gate.square().sum(-1).mean()
        return gate * h


def listed_losses(model: Any, output: Tensor) -> Tensor:
    total = output.square().mean() + torch.stack(model.losses).sum()
    model.losses.clear()
    return total


@idiom(loss=listed_losses, stream=False)
class LossesInAList(Wrapped):
    """Losses appended to ``self.losses``, which the caller adds and clears."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def middle(self, h: Tensor) -> Tensor:
        for scale in (0.1, 0.2):
            self.losses.append(scale * h.square().mean())
        return h.sin()


def of_all_modules(model: nn.Module, output: Tensor) -> Tensor:
    return output.square().mean() + sum(m.penalty for m in model.modules() if hasattr(m, "penalty"))  # type: ignore


class Penalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.penalty = 0.01 * out.abs().mean()
        return out


@idiom(loss=of_all_modules, stream=False)
class PenaltiesOnLayers(nn.Module):
    """Activity regularisation: each layer keeps its penalty, the caller walks ``model.modules()``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(3) for m in (Penalised(D, D), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# Caches


TABLES: dict[int, Tensor] = {}


@idiom(takes(7, D))
class TableInAGlobal(Wrapped):
    """A module-level dict filled in forward: ``TABLES[n] = torch.arange(n)``."""

    def __init__(self) -> None:
        super().__init__()
        TABLES.clear()

    def outside(self) -> Any:
        return list(TABLES.items())

    def middle(self, h: Tensor) -> Tensor:
        length = h.shape[1]
        if length not in TABLES:
            TABLES[length] = torch.arange(length, dtype=h.dtype)
        return h + TABLES[length][:, None] / 10


@functools.lru_cache(maxsize=8)
def positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64)


@idiom(takes(7, D))
class CachedFunction(Wrapped):
    """Positions from a function under ``lru_cache``."""

    def middle(self, h: Tensor) -> Tensor:
        return h * torch.cos(positions(h.shape[1]))[:, None]


@idiom(takes(7, D))
class CachedMethod(Wrapped):
    """``functools.lru_cache`` on a method, ``cached_property`` on another."""

    @functools.cached_property
    def scale(self) -> float:
        return D**-0.5

    @functools.lru_cache  # noqa: B019
    def mask(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()

    def middle(self, h: Tensor) -> Tensor:
        scores = (h @ h.transpose(1, 2) * self.scale).masked_fill(~self.mask(h.shape[1]), float("-inf"))
        return scores.softmax(-1) @ h


@idiom(takes(7, D), refused_stream="no batch dimension")
class RotaryCache(Wrapped):
    """Cosines and sines kept on the module as plain attributes, made anew when a longer sequence comes."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        length = h.shape[1]
        if self.cos is None or length > self.cached:
            angles = torch.arange(length)[:, None] / 10 ** torch.arange(0, D, 2).div(D)
            self.cos, self.sin, self.cached = angles.cos(), angles.sin(), length
        cos, sin = self.cos[:length].to(h.dtype), self.sin[:length].to(h.dtype)
        a, b = h[..., ::2], h[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


@idiom(takes(7, D), refused_stream="cannot be joined")
class MaskBuffer(Wrapped):
    """A causal mask that forward registers as a buffer that is not persistent, as x-transformers did."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None, persistent=False)

    def causal(self, n: int) -> Tensor:
        if self.mask is not None and self.mask.shape[-1] >= n:
            return self.mask[:n, :n]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        return mask

    def middle(self, h: Tensor) -> Tensor:
        scores = h @ h.transpose(1, 2)
        return scores.masked_fill(self.causal(h.shape[1]), -1e9).softmax(-1) @ h


@idiom(takes(7, D))
class BufferOfMask(Wrapped):
    """A mask of the longest length, registered in ``__init__``, of which forward takes a corner (nanoGPT)."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(12, 12)).view(1, 1, 12, 12), persistent=False)
        self.qkv = nn.Linear(D, 3 * D)

    def middle(self, h: Tensor) -> Tensor:
        b, t, c = h.size()
        q, k, v = self.qkv(h).split(D, dim=2)
        q, k, v = (part.view(b, t, 2, c // 2).transpose(1, 2) for part in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(dim=-1)
        return (att @ v).transpose(1, 2).contiguous().view(b, t, c)


@idiom(takes(7, D))
class AlibiCache(Wrapped):
    """ALiBi slopes in a buffer, biases cached in a plain attribute by length."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, 3), persistent=False)
        self._bias: dict[int, Tensor] = {}

    def middle(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        if n not in self._bias:
            far = torch.arange(n)[None] - torch.arange(n)[:, None]
            self._bias[n] = far.abs().neg()[None] * self.slopes[:, None, None]
        heads = h.unflatten(-1, (2, D // 2)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) + self._bias[n]
        return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


@idiom(takes(5, D))
class RelativePositions(Wrapped):
    """T5's buckets: distances, logarithms, ``torch.where`` and a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def bias(self, n: int) -> Tensor:
        far = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        half = 4
        buckets = (far > 0).long() * half
        far = far.abs()
        large = 2 + (torch.log(far.float().clamp(min=1) / 2) / math.log(8) * 2).long()
        buckets += torch.where(far < 2, far, large.clamp(max=half - 1))
        return self.table(buckets).permute(2, 0, 1)

    def middle(self, h: Tensor) -> Tensor:
        heads = h.unflatten(-1, (2, D // 2)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) + self.bias(h.shape[1])
        return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


@idiom(takes(4, D))
class SwinIndex(Wrapped):
    """Swin's relative position index in a buffer and a bias table of parameters, with ``meshgrid``."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        far = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", far[..., 0] * 3 + far[..., 1])

    def middle(self, h: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        heads = h.unflatten(-1, (2, D // 2)).transpose(1, 2)
        return ((heads @ heads.mT + bias).softmax(-1) @ heads).transpose(1, 2).flatten(2)


@idiom(takes(4, D), refused="buffer|attribute|kept", stream=False)
class StatefulRecurrent(nn.Module):
    """A GRU whose last hidden state is kept, detached, for the next call (truncated backpropagation)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.head = nn.Linear(D, 3)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is not None and self.hidden.shape[1] != x.shape[0]:
            self.hidden = None
        out, hidden = self.rnn(x, self.hidden)
        self.hidden = hidden.detach()
        return self.head(out)


@idiom(refused_parts="samples")
class RunningStatisticsByHand(Wrapped):
    """Batch renormalisation of one's own: means of the batch in training, running ones in eval."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(D))

    def middle(self, h: Tensor) -> Tensor:
        if self.training:
            mean = h.mean(0)
            self.running_mean += 0.1 * (mean.detach() - self.running_mean)
        else:
            mean = self.running_mean
        return h - mean


@idiom()
class DeferredByFlag(Wrapped):
    """``if not self.initialized`` around plain attributes: a shape learnt at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.initialized = False
        self.features = None

    def middle(self, h: Tensor) -> Tensor:
        if not self.initialized:
            self.features, self.initialized = h.shape[-1], True
        return h / self.features**0.5


@idiom(takes(2, 6, 6))
class InstanceStatistics(nn.Module):
    """AdaIN: channel means and deviations of one picture given to another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(2, 4, 3, padding=1)
        self.decoder = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        content, style = self.encoder(x), self.encoder(x.flip(-1) * 2)
        mean, std = content.mean((2, 3), keepdim=True), content.std((2, 3), keepdim=True) + 1e-5
        other = style.flatten(2)
        scale = other.std(-1).view(*mean.shape), other.mean(-1).view(*mean.shape)
        return self.decoder((content - mean) / std * scale[0] + scale[1])
