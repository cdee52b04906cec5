"""Layers as libraries write them: attentions, norms, recurrences, scans, quantised and sparse weights, routing."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes

HEADS = 2


class Attends(Wrapped):
    """Queries, keys and values of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(h).chunk(3, -1)
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))  # type: ignore[return-value]

    @staticmethod
    def merged(h: Tensor) -> Tensor:
        return h.transpose(1, 2).flatten(2)


def padded(draw: Draw) -> Inputs:
    return (draw.floats(5, D), draw.mask(5)), {}


@idiom(padded)
class MaskOfSdpa(Attends):
    """``scaled_dot_product_attention`` with a boolean mask of keys, a causal one and a float bias together."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        q, k, v = self.heads(h)
        causal = torch.ones(5, 5, dtype=torch.bool, device=h.device).tril()
        allowed = mask[:, None, None, :] & causal
        bias = torch.zeros_like(allowed, dtype=h.dtype).masked_fill_(~allowed, float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias) + F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3
        )
        return self.leave(self.merged(out))


@idiom(takes(6, D))
class SlidingWindow(Attends):
    """A banded causal mask, learned sinks beside the keys, soft-capped scores."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        n = h.shape[1]
        scores = 20 * torch.tanh(q @ k.mT / math.sqrt(D) / 20)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        scores = scores.masked_fill((j > i) | (i - j >= 3), torch.finfo(scores.dtype).min)
        sink = self.sinks.view(1, -1, 1, 1).expand(h.shape[0], -1, n, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        return self.merged(weights @ v)


@idiom(takes(6, D))
class LinearAttention(Attends):
    """Kernel feature maps, a causal sum of outer products by ``cumsum`` and einsum, a running denominator."""

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
        out = torch.einsum("bhnd,bhnde->bhne", q, states)
        norm = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
        return self.merged(out / norm[..., None])


@idiom(takes(6, D))
class DeltaRule(Attends):
    """DeltaNet: a state matrix that is corrected token by token, keys normalised, a write strength."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Linear(D, HEADS)

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        k, beta = F.normalize(k, dim=-1), self.beta(h).sigmoid().transpose(1, 2)
        state = h.new_zeros(h.shape[0], HEADS, D // HEADS, D // HEADS)
        outs = []
        for t in range(h.shape[1]):
            old = torch.einsum("bhd,bhde->bhe", k[:, :, t], state)
            state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], beta[:, :, t, None] * (v[:, :, t] - old))
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return self.merged(torch.stack(outs, 2))


@idiom(takes(6, D))
class RetentionByChunks(Attends):
    """Retention over chunks: a decay matrix in a buffer, a state carried from chunk to chunk."""

    def __init__(self) -> None:
        super().__init__()
        decay = 0.9 ** (torch.arange(3)[:, None] - torch.arange(3)).double()
        self.register_buffer("decay", decay.tril(), persistent=False)

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        state: Any = 0
        outs = []
        for qc, kc, vc in zip(q.split(3, 2), k.split(3, 2), v.split(3, 2), strict=True):
            outs.append((qc @ kc.mT * self.decay) @ vc + (qc @ state if torch.is_tensor(state) else 0))
            state = state * 0.9**3 + kc.mT @ vc
        return self.merged(torch.cat(outs, 2))


@idiom(lambda draw: ((draw.floats(4, D), draw.floats(6, D)), {}))
class PerceiverResampler(Attends):
    """Learned latents that read two inputs of different lengths, and are read by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, D))
        self.read, self.write = (nn.MultiheadAttention(D, HEADS, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = torch.cat([self.enter(x), memory], 1)
        latents = self.latents.unsqueeze(0).repeat(x.size(0), 1, 1)
        latents = latents + self.read(latents, h, h, need_weights=False)[0]
        out, weights = self.write(x, latents, latents, average_attn_weights=False)
        return self.leave(out) * weights.mean()


@idiom(takes(6, D))
class RotaryInterleaved(Attends):
    """GPT-J's rotary embedding: even and odd entries, ``stack`` and ``flatten``, frequencies not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv", 1.0 / (100 ** (torch.arange(0, 4, 2).float() / 4)), persistent=False)

    def rotate(self, t: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(t.shape[2], device=t.device).to(self.inv.dtype), self.inv)
        a, b = t[..., ::2], t[..., 1::2]
        return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        return self.merged(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v))


@idiom(takes(6, D))
class DisentangledPositions(Attends):
    """Transformer-XL's relative shift: pad, view, slice."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(D, D)
        self.u = nn.Parameter(torch.randn(HEADS, 1, D // HEADS))

    def middle(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        n = h.shape[1]
        steps = torch.arange(n - 1, -1, -1.0).to(h)[:, None] / torch.arange(1.0, D + 1).to(h)
        r = self.position(steps.sin()).view(n, HEADS, -1).transpose(0, 1)
        shifted = F.pad((q + self.u) @ r.mT, (1, 0)).view(h.shape[0], HEADS, n + 1, n)[:, :, 1:].view_as(q @ k.mT)
        weights = (q @ k.mT + shifted).tril().softmax(-1)
        return self.merged(weights @ v)


@idiom(takes(4, D))
class NormsOfMany(Wrapped):
    """RMS norm by hand in float32, ``F.rms_norm``, ``F.group_norm`` and local response norms, ``nn.Softplus``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.group = nn.GroupNorm(2, 4)
        self.local = nn.LocalResponseNorm(2)
        self.instance = nn.InstanceNorm1d(4, affine=True)

    def middle(self, h: Tensor) -> Tensor:
        x = h.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.weight * x.to(h.dtype)
        return self.local(self.group(self.instance(h))) + F.rms_norm(h, (D,), self.weight)


@idiom(takes(4, D))
class InstanceNormTracked(Wrapped):
    """``InstanceNorm1d`` with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h)


@idiom(takes(4, D))
class CumulativeBatchNorm(Wrapped):
    """A batch norm without momentum that stays in evaluation (in training, it is tested with the others)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)

    def train(self, mode: bool = True) -> CumulativeBatchNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h)


@idiom(takes(4, D), parts=True)
class UntrackedBatchNorm(Wrapped):
    """A batch norm without running statistics, and a converted ``SyncBatchNorm`` in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.still = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(4)).eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.still.eval()
        return self

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(self.still(h)) if self.training else self.still(h)


@idiom(takes(4, D), refused_parts="samples")
class GhostBatchNorm(Wrapped):
    """Ghost batch norm: chunks of the batch, each with statistics of its own (TabNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def middle(self, h: Tensor) -> Tensor:
        return torch.cat([self.norm(chunk) for chunk in h.chunk(2, 0)], 0)


@idiom(takes(5, D))
class LstmWithProjection(Wrapped):
    """An LSTM with ``proj_size``, bidirectional, whose states are joined, then a GRU seeded with them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, 6, proj_size=4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(D, D, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        out, (state, _) = self.lstm(h)
        self.gru.flatten_parameters()
        out, last = self.gru(out, torch.cat(list(state), -1)[None])
        return out + last.transpose(0, 1)


@idiom(takes(5, D))
class MinimalGru(Wrapped):
    """minGRU by a scan in log space: ``logcumsumexp``, ``softplus``."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(D, 2 * D)

    def middle(self, h: Tensor) -> Tensor:
        hidden, gate = self.gates(h).chunk(2, -1)
        decay = -F.softplus(gate)
        values = -F.softplus(-gate) + torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        star = decay.cumsum(1)
        return (star + (values - star).logcumsumexp(1)).exp()


@idiom(takes(8, D))
class FftConvolution(Wrapped):
    """Hyena: a filter made by a network of positions, a causal convolution through ``rfft`` of twice the length."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, D))

    def middle(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        t = torch.linspace(0, 1, n, dtype=h.dtype)[:, None]
        kernel = torch.fft.rfft(self.filter(t), n=2 * n, dim=0)
        return torch.fft.irfft(torch.fft.rfft(h, n=2 * n, dim=1) * kernel, n=2 * n, dim=1)[:, :n]


@idiom(takes(5, D))
class DiagonalStateSpace(Wrapped):
    """S5 and LRU: a complex diagonal recurrence from polar parameters, real part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.radius, self.angle = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))
        self.b = nn.Parameter(torch.randn(D, D, 2) / 3)

    def middle(self, h: Tensor) -> Tensor:
        pole = torch.polar(torch.exp(-self.radius.exp()), self.angle)
        inputs = h.to(torch.complex128) @ torch.view_as_complex(self.b)
        state = torch.zeros_like(inputs[:, 0])
        outs = []
        for u in inputs.unbind(1):
            state = pole * state + u
            outs.append(state.real * state.abs())
        return torch.stack(outs, 1)


class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


@idiom()
class BitLinear(Wrapped):
    """Ternary weights and 8-bit activations by straight-through rounding, scales by row."""

    def middle(self, h: Tensor) -> Tensor:
        w = self.enter.weight
        scale = w.abs().mean().clamp(min=1e-5)
        ternary = w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()
        s = 127 / h.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear(RoundThrough.apply(h * s).clamp(-128, 127) / s, ternary)


@idiom(rounding=1e-5)
class FakeQuantize(Wrapped):
    """``torch.fake_quantize_per_tensor_affine`` and per channel, in float32, learned scale (LSQ)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def middle(self, h: Tensor) -> Tensor:
        a = torch.fake_quantize_per_tensor_affine(h.float(), 0.05, 0, -128, 127)
        n = F.linear(a, self.enter.weight.float()).to(h.dtype)
        grad = 1.0 / math.sqrt(h.shape[-1] * 127)
        s = (self.scale - self.scale * grad).detach() + self.scale * grad
        q = (h / s).clamp(-128, 127)
        return ((q.round() - q).detach() + q) * s + n


@idiom(lambda draw: ((draw.ids(12, 4),), {}))
class IntEightTable(nn.Module):
    """An embedding table in int8 with scales, gathered and made float; a low-rank part that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(-127, 127, (12, D), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(12, 1) / 100)
        self.a, self.b = nn.Embedding(12, 2), nn.Linear(2, D, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        base = self.table[ids].to(self.scales.dtype) * F.embedding(ids, self.scales)
        return torch.tanh(base + self.b(self.a(ids)))


@idiom(takes(4, D))
class MixtureByCapacity(Wrapped):
    """Switch with capacity per sample: places by ``cumsum`` of one-hots, tokens over capacity dropped, aux losses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3, bias=False)
        self.w1 = nn.Parameter(torch.randn(3, D, D) / 3)

    def middle(self, h: Tensor) -> Tensor:
        probs = self.gate(h).softmax(-1)
        weight, chosen = probs.max(-1)
        onehot = F.one_hot(chosen, 3)
        place = (onehot.cumsum(1) * onehot).sum(-1) - 1
        kept = place < 2
        slot = torch.where(kept, chosen * 2 + place, 6)
        buffer = h.new_zeros(h.shape[0], 7, D).scatter(1, slot[..., None].expand_as(h), h)
        out = torch.einsum("becd,edf->becf", buffer[:, :6].unflatten(1, (3, 2)), self.w1).flatten(1, 2)
        out = torch.cat([out, out.new_zeros(h.shape[0], 1, D)], 1).gather(1, slot[..., None].expand_as(h))
        return h + torch.tanh(out) * (weight * kept)[..., None]


@idiom(takes(4, D), refused="depends on the parameter")
class GroupedExperts(Wrapped):
    """Tokens sorted by expert over the whole batch, ``bincount``, ``split`` by counts, put back by ``argsort``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def middle(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, D)
        weight, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=3).tolist()
        rows = flat.repeat_interleave(2, 0)[order].split(counts)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        out = out[order.argsort()].view(-1, 2, D)
        return (out * weight[..., None]).sum(1).view_as(h)


@idiom(takes(4, D))
class SoftMixture(Wrapped):
    """Soft MoE: slots are softmax mixtures of a sample's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(D, 3, 2))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def middle(self, h: Tensor) -> Tensor:
        logits = torch.einsum("bnd,des->bnes", h, self.phi)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        slots = torch.einsum("bnd,bnes->besd", h, dispatch)
        outs = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1)
        return torch.einsum("besd,bnes->bnd", outs, combine)


@idiom(lambda draw: ((draw.ids(97, 5),), {}))
class HashRouting(nn.Module):
    """Experts by a hash of the token's id; hashed n-gram embeddings by shifts and a remainder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.grams = nn.Embedding(97, D), nn.Embedding(31, D)
        self.experts = nn.Parameter(torch.randn(4, D, D) / 3)

    def forward(self, ids: Tensor) -> Tensor:
        before = F.pad(ids, (1, 0))[:, :-1]
        h = self.words(ids) + self.grams((ids * 31 + before * 17).remainder(31))
        expert = torch.bitwise_xor(ids * 2654435761, ids >> 3) % 4
        return torch.tanh(torch.einsum("bnd,bnde->bne", h, self.experts[expert]))


@idiom(takes(6, D), refused_parts="samples")
class ExpertChoice(Wrapped):
    """Experts choose their tokens from the whole batch (``topk`` over tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def middle(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, D)
        scores = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            weight, rows = scores[:, i].topk(4)
            out.index_add_(0, rows, expert(flat[rows]) * weight[:, None])
        return out.view_as(h)


@idiom(takes(6, D))
class MixtureOfDepths(Wrapped):
    """The tokens of each sample that a router takes go through the layer, the others around it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(D, 1), nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        weight, places = self.router(h).squeeze(-1).topk(3, dim=1, sorted=False)
        places, order = places.sort(1)
        index = places[..., None].expand(-1, -1, D)
        done = self.layer(h.gather(1, index)) * weight.gather(1, order)[..., None]
        return torch.scatter_add(h, 1, index, done)


@idiom(takes(6, D))
class CapsuleRouting(Wrapped):
    """Dynamic routing by agreement: squash, three rounds, couplings detached."""

    def __init__(self) -> None:
        super().__init__()
        self.votes = nn.Parameter(torch.randn(6, 2, D, D // 2) / 3)

    def middle(self, h: Tensor) -> Tensor:
        votes = torch.einsum("bid,ijde->bije", h, self.votes)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(3):
            s = (logits.softmax(2)[..., None] * votes).sum(1)
            norm = (s**2).sum(-1, keepdim=True)
            v = norm / (1 + norm) * s / (norm.sqrt() + 1e-8)
            logits = logits + (votes.detach() * v.detach()[:, None]).sum(-1)
        return v.flatten(1)[:, None] + h
