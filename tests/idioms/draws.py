"""What forwards draw. A model gives what it has drawn as an output, and takes it as an argument to be compared."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom


@idiom(draws=("noise",))
class NoiseInjection(Wrapped):
    """``h + torch.randn_like(h)``, in training alone."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        h = self.enter(x)
        if noise is None:
            noise = torch.randn_like(h) if self.training else torch.zeros_like(h)
        return {"h": self.leave(h + 0.3 * noise), "noise": noise}


@idiom(draws=("noise",))
class Reparametrised(nn.Module):
    """A VAE: mean and logarithm of the variance, noise, the evidence bound of a sum and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 6))
        self.decoder = nn.Sequential(nn.Linear(3, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        mean, log = self.encoder(x).chunk(2, dim=-1)
        noise = torch.randn_like(mean) if noise is None else noise
        out = self.decoder(mean + noise * torch.exp(0.5 * log))
        kl = -0.5 * torch.sum(1 + log - mean.pow(2) - log.exp(), dim=1).mean()
        return {"loss": F.mse_loss(out, x, reduction="sum") / x.size(0) + 0.1 * kl, "noise": noise}


@idiom(draws=("noise",))
class DistributionObjects(nn.Module):
    """The same with ``torch.distributions``: ``rsample``, ``log_prob``, ``kl_divergence``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 6)
        self.decoder = nn.Linear(3, D)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        mean, log = self.encoder(x).chunk(2, dim=-1)
        q = torch.distributions.Normal(mean, log.exp())
        z = q.rsample() if noise is None else mean + log.exp() * noise
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = torch.distributions.kl_divergence(q, p).sum(-1)
        bound = torch.distributions.Normal(self.decoder(z), 1.0).log_prob(x).sum(-1) - kl
        return {"loss": -bound.mean(), "noise": ((z - mean) / log.exp()).detach()}


@idiom(draws=("t", "noise"))
class DiffusionStep(nn.Module):
    """A training step of DDPM: timesteps by ``randint``, noise, a table of cumulative products."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.cumprod(1 - torch.linspace(1e-2, 0.2, 10), 0))
        self.time = nn.Embedding(10, D)
        self.net = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, x: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> dict[str, Tensor]:
        t = torch.randint(0, 10, (x.shape[0],), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        a = self.table[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        guess = self.net(noisy + self.time(t))
        return {"loss": F.mse_loss(guess, noise), "t": t, "noise": noise}


@idiom(draws=("uniform",))
class GumbelStraightThrough(Wrapped):
    """Gumbel noise by hand, a hard one-hot with the gradient of the soft one."""

    def forward(self, x: Tensor, uniform: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.enter(x)
        uniform = torch.rand_like(logits) if uniform is None else uniform
        soft = ((logits - torch.log(-torch.log(uniform + 1e-10) + 1e-10)) / 0.7).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return {"h": self.leave(hard - soft.detach() + soft), "uniform": uniform}


@idiom(draws=("mask",))
class StochasticDepth(Wrapped):
    """timm's DropPath: a Bernoulli mask of rows, ``new_empty(shape).bernoulli_``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        if mask is None:
            mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6 if self.training else 1.0)
        h = x + self.enter(x).tanh() * mask / 0.6
        return {"h": self.leave(h), "mask": mask}


@idiom(draws=("mask",))
class DropoutOfOnes(Wrapped):
    """``F.dropout`` of ones as a mask shared over the sequence (variational dropout)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = F.dropout(torch.ones_like(x), 0.5, self.training) if mask is None else mask
        return {"h": self.leave(self.enter(x * mask).tanh() * mask), "mask": mask}


@idiom(lambda draw: ((draw.floats(4, D),), {}), draws=("mask",))
class MaskedTokens(Wrapped):
    """BERT's and MAE's masking: ``torch.rand(...) < p`` and a mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.rand(x.shape[:2], device=x.device) < 0.4 if mask is None else mask
        h = torch.where(mask[..., None], self.token, self.enter(x))
        out = self.leave(h.tanh())
        loss = (F.mse_loss(out, x, reduction="none").mean(-1) * mask).sum() / mask.sum().clamp(min=1)
        return {"loss": loss, "mask": mask}


@idiom(lambda draw: ((draw.floats(6, D),), {}), draws=("noise",))
class RandomMasking(Wrapped):
    """MAE: noise, argsort, the first half gathered, order restored with mask tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        n, length, dim = x.shape
        noise = torch.rand(n, length, device=x.device) if noise is None else noise
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        kept = torch.gather(x, 1, shuffle[:, :3].unsqueeze(-1).repeat(1, 1, dim))
        h = torch.cat([self.enter(kept), self.token.repeat(n, length - 3, 1)], dim=1)
        h = torch.gather(h, 1, restore.unsqueeze(-1).repeat(1, 1, dim))
        return {"h": self.leave(h), "noise": noise}


@idiom()
class LayerDropByPython(nn.Module):
    """Layer drop with ``random.random()``, as wav2vec 2.0 and fairseq do it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() > 0.5:
                x = x + layer(x).tanh()
        return self.head(x)


@idiom(stream=False)
class MixingWeightByPython(Wrapped):
    """``random.uniform`` as a weight."""

    def middle(self, h: Tensor) -> Tensor:
        weight = random.uniform(0, 1)
        return h * weight + h.sin() * (1 - weight)


@idiom(refused_parts="samples")
class MixupByNumpy(Wrapped):
    """Mixup: a weight of ``np.random.beta``, rows exchanged with a flip of the batch."""

    def middle(self, h: Tensor) -> Tensor:
        weight = np.random.beta(1.0, 1.0) if self.training else 1.0
        return h * weight + h.flip(0) * (1 - weight)


@idiom()
class LayerDropByNumpy(Wrapped):
    """LayerDrop with ``np.random.uniform``, as older transformers have it."""

    def middle(self, h: Tensor) -> Tensor:
        for _ in range(3):
            if self.training and np.random.uniform(0, 1) < 0.5:
                continue
            h = h.sin() + 0.1
        return h


@idiom(refused="random|number|reads|draw")
class LayerDropByTorch(nn.Module):
    """``if torch.rand([]) < p: continue``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = layer(x).tanh()
        return self.head(x)


@idiom(refused="random|draw")
class ShuffledLayers(Wrapped):
    """``random.sample`` of modules, ``random.choice`` of an activation."""

    def middle(self, h: Tensor) -> Tensor:
        act = random.choice([torch.sin, torch.cos, torch.tanh])
        return act(h) * random.randint(1, 5)


@idiom()
class FixedProjection(Wrapped):
    """A seeded generator for fixed random features (a random projection that is the same in each call)."""

    def middle(self, h: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return h @ torch.randn(D, D, generator=generator, dtype=h.dtype)


@idiom(refused="seed|random|generator")
class ManualSeedInForward(Wrapped):
    """``torch.manual_seed(0)`` in forward, then noise of a shape that no row has a share in."""

    def middle(self, h: Tensor) -> Tensor:
        torch.manual_seed(3)
        return h + torch.rand(D, dtype=h.dtype)


@idiom(draws=("noise",), refused_parts="samples|random")
class NegativesByPermutation(Wrapped):
    """Negatives by ``torch.randperm`` of the batch."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        h = self.enter(x)
        noise = torch.randperm(x.shape[0]) if noise is None else noise
        loss = F.softplus(-(h * h.detach()).sum(1) + (h * h[noise]).sum(1)).mean()
        return {"loss": loss + self.leave(h).square().mean(), "noise": noise}


def conditions(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.ids(4)), {}


@idiom(conditions, draws=("dropped",))
class ClassifierFreeGuidance(Wrapped):
    """Labels that are dropped at random for the unconditional class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, D)

    def forward(self, x: Tensor, y: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
        dropped = torch.rand(y.shape[0]) < 0.3 if dropped is None else dropped
        h = self.enter(x) + self.classes(torch.where(dropped, 4, y))
        return {"h": self.leave(h.tanh()), "dropped": dropped}


@idiom(draws=("noise",))
class NoisyTopKGate(Wrapped):
    """Noisy top-k gating of experts (Shazeer et al.): noise scaled by softplus, only the chosen experts' softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.gate, self.spread = nn.Linear(D, 3), nn.Linear(D, 3)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Any]:
        h = self.enter(x)
        clean = self.gate(h)
        noise = torch.randn_like(clean) if noise is None else noise
        logits = clean + noise * F.softplus(self.spread(h))
        values, index = logits.topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))
        out = torch.stack([expert(h) for expert in self.experts], dim=1)
        load = gates.sum(0)
        balance = load.var() / load.mean() ** 2
        loss = self.leave((gates[..., None] * out).sum(1)).square().mean() + 0.1 * balance
        return {"loss": loss, "noise": noise}


@idiom(draws=("action",))
class PolicyGradient(nn.Module):
    """REINFORCE: ``torch.multinomial`` of each sample's policy, without replacement, and the actions' logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 5))
        self.register_buffer("reward", torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor, action: Tensor | None = None) -> dict[str, Tensor]:
        log = F.log_softmax(self.policy(x), dim=-1)
        action = torch.multinomial(log.exp(), 2) if action is None else action
        return {"loss": -(log.gather(1, action) * self.reward[action]).sum(1).mean(), "action": action}


@idiom(draws=("counts",))
class PoissonSpikes(Wrapped):
    """A rate that is drawn from, and a straight-through gradient."""

    def forward(self, x: Tensor, counts: Tensor | None = None) -> dict[str, Tensor]:
        rate = F.softplus(self.enter(x))
        counts = torch.poisson(rate.detach()) if counts is None else counts
        return {"h": self.leave(counts - rate.detach() + rate), "counts": counts}
