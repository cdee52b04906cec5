"""What repositories of papers do once: memories that are addressed, layers made for each sample, physics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Wrapped, idiom, takes


@idiom(takes(5, D))
class TuringMachine(Wrapped):
    """NTM: a memory in a buffer repeated by row, cosine addressing, a circular shift, erased and added to."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2 * D, D), nn.Linear(D, 3 * D + 6)
        self.register_buffer("memory", torch.randn(6, D) * 0.1)

    def middle(self, x: Tensor) -> Tensor:
        memory, read, state = self.memory.clone().repeat(len(x), 1, 1), x.new_zeros(len(x), D), None
        weights = x.new_zeros(len(x), 6)
        weights[:, 0] = 1.0
        reads = []
        for step in x.unbind(1):
            state = self.cell(torch.cat([step, read], 1), state)
            key, beta, gate, shift, sharp, erase, add = self.head(state[0]).split([D, 1, 1, 3, 1, D, D], 1)
            content = (F.softplus(beta) * F.cosine_similarity(memory, key.unsqueeze(1), dim=-1)).softmax(1)
            weights = torch.lerp(weights, content, gate.sigmoid())
            moved = shift.softmax(1)
            weights = sum(moved[:, j : j + 1] * torch.roll(weights, j - 1, dims=1) for j in range(3))
            weights = weights ** (1 + F.softplus(sharp))
            weights = weights / (weights.sum(1, keepdim=True) + 1e-16)
            read = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            memory = memory * (1 - weights.unsqueeze(2) * erase.sigmoid().unsqueeze(1))
            memory = memory + weights.unsqueeze(2) * add.unsqueeze(1)
            reads.append(read)
        return torch.stack(reads, 1)


@idiom(takes(5, D))
class FreeSlotsFirst(Wrapped):
    """DNC's allocation: usage sorted, a product of what is used before, scattered back; links without a diagonal."""

    def middle(self, x: Tensor) -> Tensor:
        usage, order = (1e-6 + (1 - 1e-6) * x[..., :6].sigmoid()).sort(-1)
        before = torch.cumprod(torch.cat([torch.ones_like(usage[..., :1]), usage[..., :-1]], -1), -1)
        free = torch.zeros_like(usage).scatter_(-1, order, (1 - usage) * before)
        links = (free.unsqueeze(-1) * usage.unsqueeze(-2)) * (1 - torch.eye(6, dtype=x.dtype))
        return torch.cat([links.sum(-1), x[..., 6:]], -1)


@idiom(lambda draw: ((draw.floats(D), draw.floats(4)), {}))
class LinearForEachSample(nn.Module):
    """Weights for each sample from a condition: ``baddbmm``, and a linear layer under ``torch.vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(D, D), nn.Linear(D, D)
        self.maker = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, D * D + D))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        made = self.maker(condition)
        weight, bias = made[:, : D * D].view(-1, D, D), made[:, D * D :]
        h = torch.baddbmm(bias.unsqueeze(1), self.enter(x).unsqueeze(1), weight).squeeze(1)
        return self.leave(torch.vmap(lambda h, w, b: F.linear(h, w, b))(h.tanh(), weight, bias))


@idiom(takes(2))
class BurgersResidual(nn.Module):
    """A PINN: columns that require gradients, first and second derivatives by ``autograd.grad``, a viscosity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
        self.viscosity = nn.Parameter(torch.tensor(0.1))

    def forward(self, points: Tensor) -> Tensor:
        return self.residual(points) if self.training else self.net(points).square().mean()

    def residual(self, points: Tensor) -> Tensor:
        def slope(of: Tensor, at: Tensor) -> Tensor:
            return torch.autograd.grad(of, at, torch.ones_like(of), create_graph=True)[0]

        x, t = (column.clone().requires_grad_(True) for column in points.split(1, 1))
        u = self.net(torch.cat([x, t], 1))
        along = slope(u, x)
        residual = slope(u, t) + u * along - self.viscosity * slope(along, x)
        return residual.pow(2).mean() + F.mse_loss(u, torch.zeros_like(u))


@idiom(takes(4))
class HamiltonianSteps(nn.Module):
    """Steps along a learned energy, whose gradient at each sample is ``vmap(grad(energy))``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.leave = nn.Linear(4, D), nn.Linear(D, 1), nn.Linear(4, 4)

    def energy(self, state: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(state))).squeeze(-1)

    def forward(self, state: Tensor) -> Tensor:
        for _ in range(2):
            gradient = torch.func.vmap(torch.func.grad(self.energy))(state)
            state = state + 0.1 * torch.cat([gradient[:, 2:], -gradient[:, :2]], 1)
        return self.leave(state)


@idiom(takes(6, D))
class HashedBuckets(Wrapped):
    """Reformer: buckets by rotations in a buffer, a stable order by bucket, attention in chunks, the order undone."""

    rotations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotations", torch.randn(D, 2))

    def middle(self, h: Tensor) -> Tensor:
        turned = h @ self.rotations
        bucket = torch.cat([turned, -turned], -1).argmax(-1) * h.shape[1] + torch.arange(h.shape[1])
        order = bucket.argsort(-1)
        chunks = h.gather(1, order[..., None].expand_as(h)).view(len(h), 3, 2, D)
        out = ((chunks @ chunks.mT).softmax(-1) @ chunks).flatten(1, 2)
        return out.gather(1, order.argsort(-1)[..., None].expand_as(h))


@idiom(takes(3, D))
class GreedyMatching(Wrapped):
    """A matching for each sample: the best pair again and again, its row and column struck by row numbers."""

    def middle(self, h: Tensor) -> Tensor:
        costs = torch.cdist(h, h.flip(1))
        matched, left, rows = torch.zeros_like(costs), costs.detach().clone(), torch.arange(len(h))
        for _ in range(costs.shape[1]):
            best = left.flatten(1).argmin(1)
            matched[rows, best // 3, best % 3] = 1.0
            left[rows, best // 3] = float("inf")
            left[rows, :, best % 3] = float("inf")
        return (matched @ h) * (costs * matched).sum((1, 2))[:, None, None]


class StepSize(torch.autograd.Function):
    """LSQ's rounding: numbers kept beside tensors, and a gradient of the step that sums over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, bits: int, name: str = "") -> Tensor:
        ctx.most, ctx.name = 2 ** (bits - 1), name
        rounded = (x / step).round().clamp(-ctx.most, ctx.most - 1)
        ctx.save_for_backward(x, step, rounded)
        return rounded * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, rounded = ctx.saved_tensors
        inside = (x / step).abs() < ctx.most
        of_step = (gradient * torch.where(inside, rounded - x / step, rounded)).sum().reshape(step.shape)
        return gradient * inside, of_step, None, None


@idiom(takes(D))
class LearnedSteps(Wrapped):
    """Quantisation with a learned step, of an activation and of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor([0.3]))

    def middle(self, h: Tensor) -> Tensor:
        step = self.step.abs() + 1e-3
        return StepSize.apply(h, step, 4, "activation") + F.linear(h, StepSize.apply(self.leave.weight, step, 3))


@idiom(lambda draw: ((draw.floats(D), draw.ids(4)), {}))
class BalancedByTheBatch(nn.Module):
    """Weights of classes by how many labels of each the batch has, and a mean over valid labels beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.body(x)
        weight = (1 - 0.9) / (1 - 0.9 ** torch.bincount(y, minlength=4).to(x).clamp(min=1))
        valid = y != 3
        picked = F.cross_entropy(logits, y, reduction="none") * valid
        return F.cross_entropy(logits, y, weight=weight / weight.sum() * 4) + picked.sum() / valid.sum().clamp(min=1)
