"""Losses as papers and libraries write them: over pairs, over ranks, over the whole batch, of several networks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


class Encodes(nn.Module):
    """Two layers."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, width))


def labelled(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.ids(3)), {}


def two_views(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.floats(D)), {}


@idiom(labelled)
class SupervisedContrastive(Encodes):
    """SupCon: all positives of an anchor, a mask of the diagonal, a mean over those that have any."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = F.normalize(self.body(x), dim=-1)
        logits = z @ z.t() / 0.5
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = ~torch.eye(len(x), dtype=torch.bool)
        positive = (y[:, None] == y[None]) & others
        logp = logits - torch.log((logits.exp() * others).sum(1, keepdim=True) + 1e-9)
        each = (logp * positive).sum(1) / positive.sum(1).clamp(min=1)
        return {"loss": -each[positive.any(1)].sum() / positive.any(1).sum().clamp(min=1), "z": z}


@idiom(two_views)
class BarlowTwins(Encodes):
    """Cross-correlation of standardised features; the off-diagonal by a flattened view."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        za, zb = self.body(a), self.body(b)
        za, zb = (za - za.mean(0)) / (za.std(0) + 1e-3), (zb - zb.mean(0)) / (zb.std(0) + 1e-3)
        c = za.T @ zb / a.shape[0]
        off = c.flatten()[:-1].view(D - 1, D + 1)[:, 1:].flatten()
        return (torch.diagonal(c) - 1).pow(2).sum() + 0.01 * off.pow(2).sum()


@idiom(two_views)
class SwavSinkhorn(Encodes):
    """SwAV: prototypes, Sinkhorn-Knopp over the batch under no_grad, swapped predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(D, 5, bias=False)

    @torch.no_grad()
    def sinkhorn(self, scores: Tensor) -> Tensor:
        q = torch.exp(scores / 0.5).t()
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * q.shape[0]
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).t()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        sa, sb = (self.prototypes(F.normalize(self.body(x), dim=1)) for x in (a, b))
        qa, qb = self.sinkhorn(sa), self.sinkhorn(sb)
        return -0.5 * ((qa * sb.log_softmax(1)).sum(1).mean() + (qb * sa.log_softmax(1)).sum(1).mean())


@idiom(two_views, stream=False)
class DinoCentre(Encodes):
    """DINO: a teacher by ``deepcopy`` moved in forward, a centre by momentum, temperatures."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).requires_grad_(False)
        self.teacher.load_state_dict(self.body.state_dict())
        self.register_buffer("centre", torch.zeros(1, D))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            t = ((self.teacher(b) - self.centre) / 0.1).softmax(-1)
        loss = -(t * (self.body(a) / 0.3).log_softmax(-1)).sum(-1).mean()
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(self.teacher(b).mean(0, keepdim=True), alpha=0.1)
        return loss


@idiom(labelled)
class SemiHardTriplets(Encodes):
    """All triplets by broadcasting to three dimensions, a mean over those that are positive."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.body(x)
        d = torch.cdist(z, z, p=2.0, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        same = y[:, None] == y[None]
        valid = same[:, :, None] & ~same[:, None, :] & ~torch.eye(len(x), dtype=torch.bool)[:, :, None]
        losses = F.relu(d[:, :, None] - d[:, None, :] + 0.5) * valid
        return {"loss": losses.sum() / ((losses > 1e-16).sum() + 1e-16), "z": z}


@idiom(lambda draw: ((draw.floats(D), draw.floats().abs(), draw.ids(2)), {}))
class CoxPartialLikelihood(Encodes):
    """Survival: risks sorted by time, a cumulative log-sum-exp, events alone."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, time: Tensor, event: Tensor) -> dict[str, Tensor]:
        risk = self.body(x).squeeze(-1)
        order = time.argsort(descending=True)
        ordered = risk[order]
        seen = ordered - torch.logcumsumexp(ordered, 0)
        return {"loss": -(seen * event[order]).sum() / event.sum().clamp(min=1), "risk": risk}


@idiom(takes(5, D))
class ListNetAndLambda(Wrapped):
    """Ranking losses within each list: ListNet, pairwise hinge over upper triangles, NDCG's discounts."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.leave(torch.tanh(self.enter(x)))[..., 0]
        relevance = x[..., 0].detach().argsort(-1).argsort(-1).to(x.dtype)
        listnet = -(relevance.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()
        i, j = torch.triu_indices(5, 5, 1)
        sign = torch.sign(relevance[:, i] - relevance[:, j])
        pairs = F.softplus(-sign * (scores[:, i] - scores[:, j])).mean()
        ranks = scores.argsort(-1, descending=True).argsort(-1) + 1
        gains = (2**relevance - 1) / torch.log2(1.0 + ranks)
        return {"loss": listnet + pairs - 0.001 * gains.mean() * scores.mean(), "scores": scores}


@idiom(lambda draw: ((draw.floats(D), draw.floats(3)), {}))
class MixtureDensity(nn.Module):
    """A mixture density network: ``MixtureSameFamily`` of independent normals, its likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2 + 2 * 2 * 3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        pi, mean, scale = self.net(x).split([2, 6, 6], -1)
        parts = torch.distributions.Independent(
            torch.distributions.Normal(mean.view(-1, 2, 3), F.softplus(scale).view(-1, 2, 3) + 0.1), 1
        )
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=pi), parts)
        return {"loss": -mixture.log_prob(y).mean(), "mean": mixture.mean}


@idiom(lambda draw: ((draw.floats(D), draw.floats(3)), {}))
class QuantilesAndCrps(nn.Module):
    """Pinball losses of quantiles that a cumulative softplus keeps in order, weights by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, 9)
        self.register_buffer("levels", torch.tensor([0.1, 0.5, 0.9]))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        raw = self.net(x).view(-1, 3, 3)
        q = torch.cat([raw[..., :1], F.softplus(raw[..., 1:])], -1).cumsum(-1)
        e = y[..., None] - q
        pinball = torch.maximum(self.levels * e, (self.levels - 1) * e).sum(-1).mean(-1)
        weight = y.abs().sum(-1)
        return {"loss": (pinball * weight).sum() / weight.sum(), "q": q}


@idiom(labelled)
class PerSampleWeights(Encodes):
    """Losses without reduction, the hardest half of the batch kept (OHEM by ``topk``)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(self.body(x), y, reduction="none", label_smoothing=0.1)
        return each.topk(max(1, len(each) // 2)).values.mean()


@idiom(labelled)
class FocalTversky(Encodes):
    """Tversky's index of each class over the batch, to a power; a log-cosh beside it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.body(x).softmax(-1)
        t = F.one_hot(y, D).to(p)
        tp, fp, fn = (p * t).sum(0), (p * (1 - t)).sum(0), ((1 - p) * t).sum(0)
        tversky = (tp + 1) / (tp + 0.7 * fn + 0.3 * fp + 1)
        return (1 - tversky).pow(0.75).sum() + torch.log(torch.cosh(p - t)).mean()


@idiom(two_views)
class DistillationInside(Encodes):
    """A frozen teacher inside, ``KLDivLoss(reduction="batchmean")`` at a temperature, features matched by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).eval()
        for p in self.teacher.parameters():
            p.requires_grad = False
        self.kl = nn.KLDivLoss(reduction="batchmean", log_target=True)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self.teacher(x)
        out = self.body(x)
        soft = self.kl(F.log_softmax(out / 2, -1), F.log_softmax(target / 2, -1)) * 4
        return {"loss": soft + 0.5 * F.mse_loss(out, y) + 0.1 * (1 - F.cosine_similarity(out, target)).mean()}


@idiom(two_views)
class MaximumMeanDiscrepancy(Encodes):
    """Domain adaptation: MMD with kernels of several widths whose scale is the batch's mean distance."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([self.body(a), self.body(b)])
        d = (z[None] - z[:, None]).pow(2).sum(2)
        n = len(z)
        width = d.detach().sum() / (n * n - n)
        k = sum(torch.exp(-d / (width * 2.0**i)) for i in range(-1, 2))
        half = len(a)
        return (k[:half, :half] + k[half:, half:] - k[:half, half:] - k[half:, :half]).mean()


@idiom(two_views)
class CoralAndCentred(Encodes):
    """Deep CORAL: covariances of two batches by ``torch.cov``; centred kernel alignment beside it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        za, zb = self.body(a), self.body(b)
        coral = (torch.cov(za.T) - torch.cov(zb.T)).pow(2).sum() / (4 * D * D)
        ka, kb = za @ za.T, zb @ zb.T
        h = torch.eye(len(a)) - 1 / len(a)
        h = h.to(ka)
        return coral - 0.01 * (h @ ka @ h * kb).sum() / (ka.norm() * kb.norm())


@idiom(labelled)
class MixtureOfLosses(Encodes):
    """Losses in an ``nn.ModuleDict`` weighed by a dict of numbers, some of them off by a weight of nought."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.ModuleDict({"ce": nn.CrossEntropyLoss(), "mm": nn.MultiMarginLoss(), "nll": nn.NLLLoss()})
        self.weights = {"ce": 1.0, "mm": 0.5, "nll": 0.0}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.body(x)
        parts = {k: f(out.log_softmax(-1) if k == "nll" else out, y) for k, f in self.losses.items()}
        return {"loss": sum(self.weights[k] * v for k, v in parts.items() if self.weights[k]), **parts}


@idiom(labelled)
class GenerativeAdversarial(nn.Module):
    """Two losses of one forward in a tuple, each with gradients for its own network alone."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.d = nn.Sequential(nn.Linear(D, D), nn.LeakyReLU(0.2), nn.Linear(D, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.g(x)
        frozen = {name: p.detach() for name, p in self.d.named_parameters()}
        g = F.softplus(-torch.func.functional_call(self.d, frozen, (fake,))).mean()
        d = F.softplus(-self.d(x)).mean() + F.softplus(self.d(fake.detach())).mean()
        return g, d


@idiom(lambda draw: ((draw.floats(3, D), draw.ids(4, 3), draw.floats(3), draw.mask(3)), {}))
class ActorCritic(nn.Module):
    """A2C over rollouts: returns by a backwards loop, advantages detached, entropy, masked means."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pi, self.v = nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, 1)

    def forward(self, s: Tensor, a: Tensor, r: Tensor, alive: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(s))
        dist = torch.distributions.Categorical(logits=self.pi(h))
        value = self.v(h).squeeze(-1)
        returns = torch.zeros_like(r)
        running = value[:, -1].detach()
        for t in reversed(range(r.shape[1])):
            running = r[:, t] + 0.9 * running * alive[:, t]
            returns[:, t] = running
        advantage = (returns - value).detach()
        count = alive.sum()
        policy = -(dist.log_prob(a) * advantage * alive).sum() / count
        loss = policy + 0.5 * ((value - returns) ** 2 * alive).sum() / count - 0.01 * dist.entropy()[alive].mean()
        return {"loss": loss, "value": value}


@idiom(lambda draw: ((draw.floats(D), draw.floats(D), draw.ids(2)), {}))
class PreferencePairs(Encodes):
    """DPO: policy and frozen reference on chosen and rejected in one concatenated batch, split again."""

    def __init__(self) -> None:
        super().__init__(1)
        self.reference = nn.Linear(D, 1).requires_grad_(False)

    def forward(self, chosen: Tensor, rejected: Tensor, flip: Tensor) -> dict[str, Tensor]:
        both = torch.cat([chosen, rejected], 0)
        policy = self.body(both).squeeze(-1)
        with torch.no_grad():
            reference = self.reference(both).squeeze(-1)
        c, r = (policy - reference).chunk(2)
        margin = (c - r) * (1 - 2 * flip)
        return {"loss": -F.logsigmoid(0.1 * margin).mean(), "accuracy": (margin > 0).float().mean()}


@idiom(takes(6, D))
class ConnectedTime(Wrapped):
    """Masked prediction of time series: instance scaling by each series' own mean, denormalised, a masked error."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean = x.mean(1, keepdim=True).detach()
        std = torch.sqrt(torch.var(x, dim=1, keepdim=True, unbiased=False) + 1e-5).detach()
        mask = torch.arange(x.shape[1])[None, :, None] % 3 == 0
        h = self.leave(torch.tanh(self.enter(((x - mean) / std).masked_fill(mask, 0.0))))
        out = h * std + mean
        error = (out - x).abs() * mask
        return {"loss": error.sum() / mask.expand_as(error).sum(), "out": out}


@idiom(labelled)
class EvidentialAndCalibration(Encodes):
    """Evidential classification: ``digamma``, ``lgamma``, an annealed KL; entropy of the batch's mean prediction."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        alpha = F.softplus(self.body(x)) + 1
        s = alpha.sum(-1, keepdim=True)
        t = F.one_hot(y, D)
        fit = (t * (s.digamma() - alpha.digamma())).sum(-1).mean()
        a = t + (1 - t) * alpha
        kl = torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1) - math.lgamma(D)
        p = (alpha / s).mean(0)
        return fit + 0.1 * kl.mean() + 0.1 * (p * p.log()).sum()
