"""Sequences: recurrent layers, attention, loops over time, decoding, experts, graphs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


def padded(draw: Draw) -> Inputs:
    return (draw.floats(6, D), draw.lengths(6)), {}


@idiom(takes(6, D))
class BidirectionalLstm(nn.Module):
    """Two bidirectional layers, outputs and last states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(D, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.enter, self.head = nn.Linear(D, D), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (h, c) = self.rnn(self.enter(x).tanh())
        return self.head(out), torch.cat([h[-2], c[-1]], dim=-1)


@idiom(takes(6, D))
class StackedCells(nn.Module):
    """LSTMCell and GRUCell in a loop over time, states made with ``zeros``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(D, D), nn.GRUCell(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), D, dtype=x.dtype, device=x.device)
        c, g, outputs = torch.zeros_like(h), torch.zeros_like(h), []
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
            outputs.append(self.head(g))
        return torch.stack(outputs, dim=1)


@idiom(takes(6, D))
class InitialStateParameters(nn.Module):
    """A GRU whose initial state is a parameter expanded over the batch, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(2, 1, D))
        self.rnn, self.head = nn.GRU(D, D, num_layers=2), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.rnn(x.permute(1, 0, 2), self.h0.expand(-1, x.size(0), -1).contiguous())
        return self.head(out[-1] + last[0])


@idiom(padded, refused_parts="samples|lengths|parts|microbatch|reads", refused="known only while a step runs")
class PackedSequences(nn.Module):
    """``pack_padded_sequence`` by lengths and back."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn, self.head = nn.Linear(D, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.enter(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.size(1))
        return self.head(out)


@idiom(padded, warns="as one microbatch", refused_parts="from one microbatch")
class PaddedAgain(Wrapped):
    """Rows cut to their lengths and padded again with ``pad_sequence``."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = [row[: int(length)] for row, length in zip(self.enter(x), lengths, strict=True)]
        return self.leave(pad_sequence(rows, batch_first=True).tanh())


@idiom(takes(6, D))
class SelectiveScan(nn.Module):
    """A state space scan (Mamba) in a Python loop: decay by input, states of (rows, width, states)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D + 2 * 3)
        self.dt = nn.Parameter(torch.zeros(D))
        self.log_a = nn.Parameter(torch.log(torch.arange(1.0, 4.0)).repeat(D, 1))
        self.leave = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        u, b, c = self.enter(x).split([D, 3, 3], dim=-1)
        delta = F.softplus(u + self.dt)
        decay = torch.exp(delta[..., None] * -self.log_a.exp())
        state, out = x.new_zeros(x.shape[0], D, 3), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(-1))
        return self.leave(torch.stack(out, 1))


@idiom(takes(6, D))
class ParallelScan(nn.Module):
    """A linear recurrence by doubling: shifts with ``F.pad`` in a loop over powers of two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.leave = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b, step = self.gate(x).sigmoid(), x, 1
        while step < x.shape[1]:
            b = b + a * F.pad(b, (0, 0, step, 0))[:, :-step]
            a = a * F.pad(a, (0, 0, step, 0), value=1.0)[:, :-step]
            step *= 2
        return self.leave(b)


@idiom(takes(6, D))
class AttentionByHand(nn.Module):
    """Heads by view and transpose, a causal mask by ``triu``, dropout with a rate of nought."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores + torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
        return self.out((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(b, n, -1))


@idiom(padded)
class AttentionOfTorch(nn.Module):
    """TransformerEncoderLayer, MultiheadAttention and scaled_dot_product_attention with padding masks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.cross = nn.MultiheadAttention(D, 2, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pad = torch.arange(x.size(1))[None] >= lengths[:, None]
        h = self.layer(x, src_key_padding_mask=pad)
        h, _ = self.cross(h, x, x, key_padding_mask=pad, need_weights=False)
        h = F.scaled_dot_product_attention(h, h, h, attn_mask=~pad[:, None, :].expand(-1, x.size(1), -1))
        return self.head(h)


@idiom(takes(6, D))
class WithoutGradientCache(nn.Module):
    """A key-value cache made in forward: a list of pairs that grows by each step and is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(x).chunk(3, -1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        return F.scaled_dot_product_attention(q, k, v), (k, v)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        cache, outputs = None, []
        for t in range(x.size(1)):
            out, cache = self.step(x[:, t : t + 1], cache)
            outputs.append(out)
        assert cache is not None
        return self.out(torch.cat(outputs, 1)), cache


@idiom(takes(6, D))
class GreedyDecoding(nn.Module):
    """A decoder loop that feeds back its own argmax through an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(5, D), nn.GRUCell(D, D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        state, token, out = x.mean(1), x.new_zeros(x.size(0), dtype=torch.long), []
        for _ in range(4):
            state = self.cell(self.embedding(token), state)
            out.append(self.head(state))
            token = out[-1].argmax(-1)
        return torch.stack(out, 1)


@idiom(takes(6, D))
class BeamLoop(nn.Module):
    """A beam of two over four steps: topk over beams and tokens, states reordered by gather."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(5, D), nn.GRUCell(D, D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        state = x.mean(1)[:, None].repeat(1, 2, 1)
        scores = x.new_zeros(b, 2) + torch.tensor([0.0, -1e9], dtype=x.dtype)
        token = torch.zeros(b, 2, dtype=torch.long)
        for _ in range(3):
            state = self.cell(self.embedding(token).flatten(0, 1), state.flatten(0, 1)).view(b, 2, D)
            total = scores[..., None] + self.head(state).log_softmax(-1)
            scores, flat = total.flatten(1).topk(2, dim=-1)
            token = flat % 5
            state = state.gather(1, (flat // 5)[..., None].expand(-1, -1, D))
        return -scores[:, 0].mean()


@idiom(takes(6, D))
class PointerNetwork(nn.Module):
    """A pointer decoder: additive attention, visited positions masked, the input gathered by argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(D, D, batch_first=True), nn.GRUCell(D, D)
        self.w, self.v = nn.Linear(2 * D, D), nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        memory, last = self.encoder(x)
        state, step = last[0], x.mean(1)
        visited, logs = torch.zeros(x.shape[:2], dtype=torch.bool), []
        for _ in range(3):
            state = self.cell(step, state)
            both = torch.cat([memory, state[:, None].expand_as(memory)], -1)
            log = self.v(self.w(both).tanh()).squeeze(-1).masked_fill(visited, -1e9).log_softmax(-1)
            index = log.argmax(-1, keepdim=True)
            logs.append(log.gather(1, index).squeeze(1))
            visited = visited.scatter(1, index, True)
            step = x.gather(1, index[..., None].expand(-1, -1, D)).squeeze(1)
        return -torch.stack(logs, 1).sum(1).mean()


@idiom(takes(6, D), warns="", refused_parts="samples")
class EarlyExit(nn.Module):
    """Layers until the whole batch is confident: ``if confidence.min() > t: break``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.exits = Exits()
        self.leave = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.exits(self.enter(x)))


class Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + layer(h).tanh()
            if h.detach().abs().max() > 2.0:
                break
        return h


@idiom(takes(6, D))
class HaltingByMask(nn.Module):
    """Adaptive computation with a mask in place of a branch, a fixed number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt, self.leave = nn.Linear(D, D), nn.Linear(D, 1), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, total, out = x, torch.zeros_like(x[..., :1]), torch.zeros_like(x)
        steps = torch.zeros_like(total)
        for _ in range(3):
            p = self.halt(state).sigmoid()
            running = (total < 0.9).to(p.dtype)
            out = out + running * p * state
            total, steps = total + running * p, steps + running
            state = self.cell(state).tanh()
        return self.leave(out), steps


class WhileConverging(nn.Module):
    """Newton's iteration for a square root until it stands still."""

    def forward(self, h: Tensor) -> Tensor:
        target = h.abs() + 1
        root = target
        while (root * root - target).abs().max() > 1e-3:
            root = 0.5 * (root + target / root)
        return root


@idiom(takes(6, D), refused_parts="samples")
class LoopOnAValue(Wrapped):
    """A while loop on an activation's value (deep equilibrium solvers)."""

    def __init__(self) -> None:
        super().__init__()
        self.solver = WhileConverging()

    def middle(self, h: Tensor) -> Tensor:
        return self.solver(h)


@idiom(takes(6, D))
class NeuralOde(nn.Module):
    """Euler and Runge-Kutta steps of a learned field, time appended."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.leave = nn.Linear(D + 1, D), nn.Linear(D, D)

    def f(self, t: float, h: Tensor) -> Tensor:
        return self.field(torch.cat([h, torch.full_like(h[..., :1], t)], -1)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        dt, h = 0.25, x
        for t in torch.linspace(0, 1, 5)[:-1].tolist():
            k1 = self.f(t, h)
            k2 = self.f(t + dt / 2, h + dt / 2 * k1)
            h = h + dt * k2
        return self.leave(h)


# Experts


@idiom(takes(4, D), refused_parts="samples")
class ExpertsByLoop(Wrapped):
    """Mixtral's block of old: for each expert the tokens that chose it, ``torch.where``, ``index_add_``."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.gate = nn.Linear(D, 3, bias=False)

    def middle(self, h: Tensor) -> Tensor:
        flat = h.view(-1, D)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        hot = F.one_hot(chosen, 3).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            slot, token = torch.where(hot[i])
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(h)


@idiom(takes(4, D))
class ExpertsByMask(Wrapped):
    """Switch: each expert on ``h[mask]``, written back with ``out[mask] =``; a balancing loss returned."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(D, D) for i in range(3)})
        self.router = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.enter(x)
        p = self.router(h).softmax(-1)
        value, index = p.max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts.values()):
            mask = index == i
            out[mask] = expert(h[mask])
        share = F.one_hot(index, 3).double().mean((0, 1))
        balance = 3 * (share * p.mean((0, 1))).sum()
        loss = self.leave(out * value[..., None]).square().mean() + 0.1 * balance
        return loss, balance.detach()


@idiom(takes(4, D))
class ExpertsByEinsum(Wrapped):
    """GShard's dense dispatch: one-hot places by cumsum within a capacity, einsum both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, D, D) / 3)
        self.gate = nn.Linear(D, 3)

    def middle(self, h: Tensor) -> Tensor:
        p = self.gate(h).softmax(-1)
        hot = F.one_hot(p.argmax(-1), 3).to(h.dtype)
        place = (hot.cumsum(1) - 1) * hot
        fits = hot * (place < 2)
        dispatch = fits[..., None] * F.one_hot(place.long().clamp(max=1), 2).to(h.dtype)
        inside = torch.einsum("bsec,bsd->becd", dispatch, h)
        out = torch.einsum("becd,edf->becf", inside, self.w)
        return torch.einsum("becf,bsec->bsf", out, dispatch * p[..., None])


# Graphs and sets


def ring(draw: Draw) -> Inputs:
    edges = torch.stack([torch.arange(5), (torch.arange(5) + 1) % 5])
    return (draw.floats(5, D), edges), {}


@idiom(ring)
class MessagePassing(Wrapped):
    """A GNN over shared edges: gather, messages, ``index_add_`` and degrees."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.enter(x)
        messages = torch.cat([h[:, source], h[:, target]], -1)[..., :D].tanh()
        out = torch.zeros_like(h).index_add_(1, target, messages)
        degree = torch.bincount(target, minlength=x.shape[1]).clamp(min=1)
        return self.leave(out / degree[:, None])


def flat_graph(draw: Draw) -> Inputs:
    source = torch.randint(draw.rows, (9,), generator=draw.generator)
    target = torch.randint(draw.rows, (9,), generator=draw.generator)
    return (draw.floats(D), torch.stack([source, target])), {}


@idiom(flat_graph, refused_parts="samples|microbatch|batch", stream=False)
class NodesAreTheBatch(Wrapped):
    """PyG: nodes in the first dimension, edges between any of them, attention by scatter softmax."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        h = self.enter(x)
        score = F.leaky_relu((h[source] * h[target]).sum(-1))
        score = torch.exp(score - score.max())
        total = torch.zeros(x.size(0), dtype=x.dtype).scatter_add(0, target, score)
        weight = score / (total[target] + 1e-16)
        out = torch.zeros_like(h).scatter_add(0, target[:, None].expand(-1, D), weight[:, None] * h[source])
        return self.leave(out.relu())


@idiom(padded)
class DeepSets(Wrapped):
    """Set pooling: sums, means and maxima behind a mask, induced points attend."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(x.size(1)) < lengths[:, None])[..., None]
        h = self.enter(x) * mask
        pooled = h.sum(1) + h.sum(1) / lengths[:, None] + h.masked_fill(~mask, float("-inf")).max(1)[0]
        scores = (self.points @ h.mT).masked_fill(~mask.mT, float("-inf"))
        return self.leave(pooled + (scores.softmax(-1) @ h).sum(1))


# Flows


@idiom()
class CouplingFlow(nn.Module):
    """RealNVP: affine couplings with permutations, log-determinants summed up, a Gaussian prior."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(D // 2, D) for _ in range(3))
        self.register_buffer("order", torch.randperm(D))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z, log_det = x, x.new_zeros(x.shape[0])
        for net in self.nets:
            a, b = z.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            s = s.tanh()
            z = torch.cat([a, b * s.exp() + t], 1)[:, self.order]
            log_det = log_det + s.sum(1)
        log = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1) + log_det
        return {"loss": -log.mean() / (D * math.log(2)), "z": z}


@idiom()
class InvertibleLinear(nn.Module):
    """Glow's 1x1 convolution: ``slogdet`` of a weight, an LU form with masks in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(D, D))[0])
        self.lower = nn.Parameter(torch.randn(D, D) / 9)
        self.register_buffer("mask", torch.tril(torch.ones(D, D), -1))
        self.scale = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight)
        log_det = torch.slogdet(self.weight)[1]
        triangular = self.lower * self.mask + torch.eye(D, dtype=x.dtype)
        z = (z @ triangular) * self.scale.exp()
        return (0.5 * z.pow(2).sum(1) - log_det - self.scale.sum()).mean()
