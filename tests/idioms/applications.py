"""Whole small models of a field: recommenders, tables, graphs, fields, flows, generative and sequential models."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def clicks(draw: Draw) -> Inputs:
    return (draw.floats(4), draw.ids(10, 3), draw.ids(2).double()), {}


@idiom(clicks)
class Dlrm(nn.Module):
    """DLRM: a bag per feature, pairwise dot products of a lower triangle, two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.top = mlp(4, D, D), mlp(D + 6, D, 1)
        self.tables = nn.ModuleList(nn.EmbeddingBag(10, D, mode="sum") for _ in range(3))

    def forward(self, dense: Tensor, ids: Tensor, y: Tensor) -> dict[str, Tensor]:
        x = self.bottom(dense)
        offsets = torch.arange(ids.shape[0])
        rows = [table(ids[:, i], offsets) for i, table in enumerate(self.tables)]
        t = torch.stack([x, *rows], 1)
        z = torch.bmm(t, t.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        logit = self.top(torch.cat([x, z[:, i, j]], 1)).squeeze(1)
        return {"loss": F.binary_cross_entropy_with_logits(logit, y), "p": logit.sigmoid()}


@idiom(lambda draw: ((draw.ids(10, 4), draw.floats(4).abs()), {}))
class WeightedBags(Wrapped):
    """Bags of two dimensions with weights by sample and padding, a mean bag beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, D, mode="sum", padding_idx=0)
        self.mean = nn.EmbeddingBag(10, D, mode="mean", scale_grad_by_freq=False)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(self.bag(ids, per_sample_weights=weights) + self.mean(ids))

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom(lambda draw: ((draw.ids(10, 4), draw.lengths(4)), {}), refused_parts="samples|rows|microbatch|parts|counts")
class RaggedBags(Wrapped):
    """Bags by offsets over ids that a mask has made flat (torchrec's layout)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, D, mode="mean", include_last_offset=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(4) < lengths[:, None]
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        return super().forward(self.bag(ids[mask], offsets))

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom(clicks)
class FactorizationMachine(nn.Module):
    """DeepFM and cross layers: offsets of fields into one table, the square of sums less the sum of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(30, D), nn.Embedding(30, 1)
        self.register_buffer("offsets", torch.arange(3) * 10, persistent=False)
        self.cross = nn.ModuleList(nn.Linear(3 * D, 3 * D) for _ in range(2))
        self.deep = mlp(3 * D + 4, D, 1)

    def forward(self, dense: Tensor, ids: Tensor, y: Tensor) -> dict[str, Tensor]:
        ids = ids + self.offsets
        e = self.table(ids)
        fm = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1)
        x0 = x = e.flatten(1)
        for layer in self.cross:
            x = x0 * layer(x) + x
        logit = fm + self.linear(ids).sum((1, 2)) + self.deep(torch.cat([x, dense], 1))[:, 0]
        return {"loss": F.binary_cross_entropy(logit.sigmoid(), y, weight=1 + y), "logit": logit}


@idiom(lambda draw: ((draw.floats(5), draw.ids(4, 3)), {}))
class TabTransformer(nn.Module):
    """Tabular: an embedding for each column in a ModuleList, numeric tokens by a weight per feature, a [CLS]."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(4, D) for _ in range(3))
        self.weight, self.bias = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.zeros(5, D))
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.block = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(D, 2)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        c = torch.stack([e(col) for e, col in zip(self.columns, categories.unbind(1), strict=True)], 1)
        n = numbers[:, :, None] * self.weight + self.bias
        return self.head(self.block(torch.cat([self.cls.expand(len(n), -1, -1), n, c], 1))[:, 0])


@idiom(takes(D))
class NeuralTrees(nn.Module):
    """Soft oblivious trees: feature choices by softmax over parameters, leaves by outer products of gates."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.at = nn.Parameter(torch.randn(2, 3, D)), nn.Parameter(torch.zeros(2, 3))
        self.leaves = nn.Parameter(torch.randn(2, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.einsum("bd,tkd->btk", x, self.choice.softmax(-1)) - self.at
        p = torch.stack([g.sigmoid(), 1 - g.sigmoid()], -1)
        leaf = torch.einsum("bti,btj,btk->btijk", *p.unbind(2)).flatten(2)
        return torch.einsum("btl,tlc->bc", leaf, self.leaves)


@idiom(lambda draw: ((draw.floats(5, 3),), {}))
class PointNet(nn.Module):
    """Points: neighbours by ``cdist`` and ``topk``, edges' features, a learned alignment, a max over points."""

    def __init__(self) -> None:
        super().__init__()
        self.align, self.edge, self.head = nn.Linear(3, 9), nn.Linear(6, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        m = self.align(x.mean(1)).view(-1, 3, 3) + torch.eye(3).to(x)
        x = x @ m
        index = torch.cdist(x, x).topk(3, largest=False).indices
        near = x[:, None].expand(-1, 5, -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 3))
        e = torch.cat([near - x[:, :, None], x[:, :, None].expand_as(near)], -1)
        h = F.leaky_relu(self.edge(e)).amax(2).amax(1)
        penalty = torch.linalg.matrix_norm(torch.eye(3).to(x) - m @ m.mT).mean()
        return {"loss": self.head(h).square().mean() + 0.1 * penalty, "h": h}


@idiom(lambda draw: ((draw.floats(5, 3),), {}), refused_parts="expand_as")
class EquivariantGraph(nn.Module):
    """EGNN: all pairs of atoms, squared distances, positions moved by weighted differences."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Parameter(torch.randn(5, D))
        self.message, self.move, self.update = mlp(2 * D + 1, D, D), nn.Linear(D, 1), mlp(2 * D, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.nodes.expand(x.shape[0], -1, -1)
        i, j = (~torch.eye(5, dtype=torch.bool)).nonzero(as_tuple=True)
        for _ in range(2):
            r = x[:, i] - x[:, j]
            m = self.message(torch.cat([h[:, i], h[:, j], r.pow(2).sum(-1, keepdim=True)], -1))
            x = x + torch.zeros_like(x).index_add(1, i, r * self.move(m).tanh()) / 4
            total = h.new_zeros(h.shape).scatter_add(1, i[None, :, None].expand_as(m), m)
            h = h + self.update(torch.cat([h, total], -1))
        return {"x": x, "h": h}


def shared_graph(draw: Draw) -> Inputs:
    return (draw.floats(5, D),), {"edges": torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])}


@idiom(shared_graph)
class GraphAttention(Wrapped):
    """GAT over edges that all samples share: softmax by ``scatter_reduce`` over the targets, GCN's normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2 * D))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        s, t = edges
        h = torch.tanh(self.enter(x))
        e = F.leaky_relu(torch.cat([h[:, s], h[:, t]], -1) @ self.a, 0.2)
        most = e.new_full((len(x), 5), -1e9).scatter_reduce(1, t.expand_as(e), e, "amax")
        w = (e - most[:, t]).exp()
        total = torch.zeros_like(most).index_add(1, t, w)
        out = torch.zeros_like(h).index_add(1, t, h[:, s] * (w / total[:, t])[..., None])
        degree = torch.bincount(t, minlength=5).clamp(min=1).to(h.dtype).rsqrt()
        return self.leave(out * degree[:, None])


@idiom(lambda draw: ((draw.floats(3), draw.floats(3), draw.floats(3)), {}))
class RadianceField(nn.Module):
    """NeRF: samples along rays, positional encodings, weights by a cumulative product of transmittances."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.colour = mlp(3 * 5, D, D), mlp(D + 3, D, 3)
        self.register_buffer("freqs", 2.0 ** torch.arange(2), persistent=False)

    def encode(self, p: Tensor) -> Tensor:
        angles = (p[..., None] * self.freqs).flatten(-2)
        return torch.cat([p, angles.sin(), angles.cos()], -1)

    def forward(self, origin: Tensor, direction: Tensor, target: Tensor) -> dict[str, Tensor]:
        t = torch.linspace(0.1, 1.0, 6, dtype=origin.dtype)
        p = origin[:, None] + t[:, None] * direction[:, None]
        h = self.field(self.encode(p))
        density = F.relu(h[..., 0])
        rgb = self.colour(torch.cat([h, direction[:, None].expand_as(p)], -1)).sigmoid()
        gap = torch.cat([t[1:] - t[:-1], t.new_full((1,), 1e10)])
        alpha = 1 - torch.exp(-density * gap)
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)[:, :-1]
        image = ((alpha * through)[..., None] * rgb).sum(1)
        return {"loss": F.mse_loss(image, target), "image": image}


@idiom(lambda draw: ((draw.floats(2).sigmoid(),), {}))
class HashGrid(nn.Module):
    """Instant-NGP: corners of cells hashed with primes and ``bitwise_xor``, bilinear weights, levels joined."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(2, 16, 4))
        self.net = mlp(8, D, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for level, size in enumerate((4, 8)):
            scaled = x * size
            low = scaled.floor()
            f = scaled - low
            total: Any = 0.0
            for dx in (0, 1):
                for dy in (0, 1):
                    corner = (low + torch.tensor([dx, dy])).long()
                    index = torch.bitwise_xor(corner[:, 0], corner[:, 1] * 2654435761) % 16
                    w = (f[:, 0] if dx else 1 - f[:, 0]) * (f[:, 1] if dy else 1 - f[:, 1])
                    total = total + w[:, None] * self.tables[level][index]
            out.append(total)
        return self.net(torch.cat(out, -1))


@idiom(takes(2, 8, 8))
class UNetWithAttentionGate(nn.Module):
    """A U-Net: skips in a list, transposed convolutions, sizes matched by padding, gated skips, a Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(6, 4, 2, 2), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)])
        self.gate = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skips = []
        h = x
        for conv in self.down:
            h = F.silu(conv(h))
            skips.append(h)
            h = F.max_pool2d(h, 2, ceil_mode=True)
        h = self.up[0](h)
        skip = skips[-2]
        h = F.interpolate(h, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        h = h * torch.sigmoid(self.gate(torch.cat([h, skip], 1)))
        p = self.up[1](F.avg_pool2d(h, 2)).sigmoid()
        t = (x > 0).to(p.dtype)
        dims = (2, 3)
        dice = (2 * (p * t).sum(dims) + 1) / (p.sum(dims) + t.sum(dims) + 1)
        return {"loss": 1 - dice.mean(), "p": p}


@idiom(lambda draw: ((draw.ids(9, 4), draw.ids(9, 3)), {}))
class TeacherForcing(nn.Module):
    """Seq2seq: a GRU encoder, a GRUCell decoder with attention, ``random.random() < ratio`` between words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, D)
        self.encoder = nn.GRU(D, D, batch_first=True)
        self.decoder = nn.GRUCell(2 * D, D)
        self.head = nn.Linear(D, 9)
        self.ratio = 1.0

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        memory, state = self.encoder(self.words(source))
        h = state[0]
        token = torch.zeros_like(target[:, 0])
        logits = []
        for t in range(target.shape[1]):
            context = torch.einsum("bn,bnd->bd", (memory @ h[..., None]).squeeze(-1).softmax(-1), memory)
            h = self.decoder(torch.cat([self.words(token), context], -1), h)
            logits.append(self.head(h))
            token = target[:, t] if self.training and random.random() < self.ratio else logits[-1].argmax(-1)
        out = torch.stack(logits, 1)
        return {"loss": F.cross_entropy(out.permute(0, 2, 1), target, ignore_index=0), "logits": out}


@idiom(lambda draw: ((draw.floats(6, 2),), {}))
class ForecastByDecomposition(nn.Module):
    """DLinear and N-BEATS: a moving average with replicated ends, residual blocks that back-cast and forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.trend, self.season = nn.Linear(6, 3), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(mlp(6, D, 9) for _ in range(2))
        self.average = nn.AvgPool1d(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.cat([x[:, :1], x, x[:, -1:]], 1).transpose(1, 2)
        trend = self.average(padded)
        rest = x.transpose(1, 2) - trend
        out = self.trend(trend) + self.season(rest)
        for block in self.blocks:
            back, forth = block(rest).split([6, 3], -1)
            rest, out = rest - back, out + forth
        return out.transpose(1, 2) + x[:, -1:].detach()


@idiom(takes(6, D))
class SpectralMixer(Wrapped):
    """Autoformer's way within a series: correlation by ``rfft``, the strongest lags, rolled by ``gather``."""

    def middle(self, h: Tensor) -> Tensor:
        f = torch.fft.rfft(h, dim=1)
        corr = torch.fft.irfft(f * f.conj(), n=h.shape[1], dim=1).mean(-1)
        weight, lag = corr.topk(2, 1)
        index = (torch.arange(h.shape[1])[None] + lag[..., None]) % h.shape[1]
        parts = h[:, None].expand(-1, 2, -1, -1).gather(2, index[..., None].expand(-1, -1, -1, D))
        return (parts * weight.softmax(-1)[..., None, None]).sum(1)


@idiom(takes(D))
class SplineFlow(nn.Module):
    """A rational-quadratic spline coupling: bins by softmax and cumsum, ``searchsorted``, a log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(D // 2, D, D // 2 * 11)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = x.chunk(2, -1)
        w, h, d = self.net(a).view(-1, D // 2, 11).split([4, 4, 3], -1)
        w, h = w.softmax(-1), h.softmax(-1)
        d = F.pad(F.softplus(d), (1, 1), value=1.0)
        cw, ch = (F.pad(t.cumsum(-1), (1, 0)) for t in (w, h))
        u = b.sigmoid()
        k = torch.searchsorted(cw[..., 1:-1].contiguous(), u[..., None].contiguous())
        pick = [t.gather(-1, k)[..., 0] for t in (cw, w, ch, h)]
        d0, d1 = d.gather(-1, k)[..., 0], d.gather(-1, k + 1)[..., 0]
        theta = (u - pick[0]) / pick[1]
        s = pick[3] / pick[1]
        both = theta * (1 - theta)
        low = s + (d1 + d0 - 2 * s) * both
        y = pick[2] + pick[3] * (s * theta.square() + d0 * both) / low
        slope = s.square() * (d1 * theta.square() + 2 * s * both + d0 * (1 - theta).square()) / low.square()
        logdet = slope.log().sum(-1)
        return {"loss": y.square().sum(-1).mean() - logdet.mean(), "y": torch.cat([a, y], -1)}


@idiom(takes(D))
class ContinuousFlow(nn.Module):
    """FFJORD: an exact trace of the Jacobian by ``autograd.grad`` for each dimension, inside Euler steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(D + 1, D, D)

    def forward(self, x: Tensor) -> Tensor:
        logdet = torch.zeros_like(x[:, 0])
        with torch.enable_grad():
            z = x if x.requires_grad else x.clone().requires_grad_()
            for step in range(2):
                v = self.net(torch.cat([z, torch.full_like(z[:, :1], step / 2)], -1))
                trace = sum(torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(3))
                z, logdet = z + 0.5 * v, logdet + 0.5 * trace
        loss = (0.5 * z.square().sum(-1) - logdet).mean() + 0.5 * D * math.log(2 * math.pi)
        return loss if self.training else loss.detach()


@idiom(lambda draw: ((draw.floats(D), draw.ids(10), draw.floats(D)), {}))
class DiffusionWithSnr(nn.Module):
    """A diffusion loss with given times and noise: tables by ``np``-like cumprods, min-SNR weights, v-prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("abar", (1 - torch.linspace(1e-3, 0.2, 10)).cumprod(0))
        self.time, self.net = nn.Linear(4, D), mlp(2 * D, D, D)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        a = self.abar.gather(0, t).view(-1, *[1] * (x.dim() - 1))
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        angles = t[:, None].to(x) * torch.exp(-torch.arange(2).to(x))
        out = self.net(torch.cat([noisy, self.time(torch.cat([angles.sin(), angles.cos()], -1))], -1))
        v = a.sqrt() * noise - (1 - a).sqrt() * x
        snr = (a / (1 - a)).squeeze(-1)
        each = F.mse_loss(out, v, reduction="none").mean(list(range(1, out.dim())))
        return {"loss": (each * torch.clamp(snr, max=5.0) / (snr + 1)).mean(), "out": out}


@idiom(takes(D), refused_parts="samples")
class VectorFieldBySolver(nn.Module):
    """An adaptive solver: steps halved while the error of any sample is too large (``while``, ``.item()``)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.solver, self.head = nn.Linear(D, D), AdaptiveSolver(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.solver(self.enter(x)))


class AdaptiveSolver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Linear(D, D)

    def forward(self, z: Tensor) -> Tensor:
        t, step = 0.0, 0.5
        while t < 1.0 - 1e-9:
            k = torch.tanh(self.field(z))
            error = (torch.tanh(self.field(z + step * k)) - k).abs().max().item() * step
            if error > 0.05 and step > 0.1:
                step /= 2
                continue
            z, t = z + step * k, t + step
            step = min(step, 1.0 - t)
        return z


@idiom(lambda draw: ((draw.floats(4, D), draw.ids(2, 4)), {}))
class ConditionalField(nn.Module):
    """A linear-chain CRF: the forward algorithm in a loop, the score of a path by gathers, Viterbi in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.emit, self.moves = nn.Linear(D, 2), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, tags: Tensor) -> dict[str, Tensor]:
        e = self.emit(x)
        alpha = e[:, 0]
        score = e[:, 0].gather(1, tags[:, :1])[:, 0]
        best, back = e[:, 0], []
        for t in range(1, x.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + self.moves, 1) + e[:, t]
            score = score + self.moves[tags[:, t - 1], tags[:, t]] + e[:, t].gather(1, tags[:, t, None])[:, 0]
            values, index = (best[:, :, None] + self.moves).max(1)
            best = values + e[:, t]
            back.append(index)
        path = [best.argmax(-1)]
        for index in reversed(back):
            path.append(index.gather(1, path[-1][:, None])[:, 0])
        return {"loss": (alpha.logsumexp(-1) - score).mean(), "path": torch.stack(path[::-1], 1)}


@idiom(lambda draw: ((draw.floats(D), draw.floats(D)), {}))
class NeuralProcess(nn.Module):
    """Siamese and triplet towers with ``nn.PairwiseDistance``, a bilinear head, cosine heads by ``F.normalize``."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(D, D, D)
        self.bilinear, self.distance = nn.Bilinear(D, D, 2), nn.PairwiseDistance(p=1, keepdim=True)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        za, zb = self.tower(torch.cat([a, b])).tensor_split(2)
        return {"score": self.bilinear(za, zb), "d": self.distance(za, zb), "cos": F.cosine_similarity(za, zb)}
