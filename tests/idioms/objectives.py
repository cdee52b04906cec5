"""Losses, and models that are hardly more than their loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom


class Encoder(nn.Module):
    """Two layers, of which ``features`` gives the embedding."""

    def __init__(self, outputs: int = D) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, outputs))


def labelled(classes: int) -> Any:
    return lambda draw: ((draw.floats(D), draw.ids(classes)), {})


def two_views(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.floats(D)), {}


@idiom(two_views, refused_stream="no batch dimension")
class Clip(nn.Module):
    """CLIP: two towers, a learned temperature, cross entropy both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(D, D), nn.Linear(D, D)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        a = self.image(image)
        b = self.text(text)
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        logits = self.logit_scale.exp().clamp(max=100) * a @ b.t()
        labels = torch.arange(len(logits), device=logits.device)
        return {"loss": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2, "logits": logits}


@idiom(two_views)
class SimClr(Encoder):
    """SimCLR: views behind one another, the diagonal removed by a mask and ``view``."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(self.body(torch.cat([a, b], dim=0)), dim=1)
        n = z.shape[0]
        similar = z @ z.T
        labels = torch.cat([torch.arange(n // 2) for _ in range(2)])
        same = (labels[None] == labels[:, None]).double()
        off = ~torch.eye(n, dtype=torch.bool)
        same, similar = same[off].view(n, -1), similar[off].view(n, -1)
        logits = torch.cat([similar[same.bool()].view(n, -1), similar[~same.bool()].view(n, -1)], dim=1)
        return F.cross_entropy(logits / 0.5, torch.zeros(n, dtype=torch.long))


@idiom(labelled(3))
class TripletHardMining(Encoder):
    """Batch-hard triplets: the furthest positive and the nearest negative of each sample."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.body(x)
        far = torch.cdist(z, z)
        same = y[:, None] == y[None]
        positive = (far * same).max(1).values
        negative = far.masked_fill(same, float("inf")).min(1).values
        negative = torch.where(torch.isinf(negative), far.max(1).values, negative)
        return F.relu(positive - negative + 0.3).mean()


@idiom(lambda draw: ((draw.floats(D), draw.floats(D), draw.ids(2)), {}))
class Siamese(Encoder):
    """Contrastive loss of Siamese twins: one encoder for both."""

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        far = F.pairwise_distance(self.body(a), self.body(b))
        return torch.mean(same * far.pow(2) + (1 - same) * torch.clamp(1.0 - far, min=0.0).pow(2))


@idiom(labelled(4))
class Focal(Encoder):
    """Focal loss over one-hot targets, with a weight for each class."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("alpha", torch.tensor([0.25, 0.5, 1.0, 2.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ce = F.cross_entropy(self.body(x), y, reduction="none")
        return (self.alpha[y] * (1 - torch.exp(-ce)) ** 2 * ce).mean()


@idiom(lambda draw: ((draw.floats(5, D), draw.ids(2, 5)), {}))
class DiceAndBinary(Encoder):
    """Soft Dice over the whole batch with binary cross entropy, as segmentation models are trained."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.body(x).squeeze(-1)
        p, y = logits.sigmoid(), y.to(logits.dtype)
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        return dice + F.binary_cross_entropy_with_logits(logits, y, pos_weight=torch.tensor(2.0))


def lovasz(gradient_of: Tensor) -> Tensor:
    total = gradient_of.sum()
    intersection = total - gradient_of.cumsum(0)
    union = total + (1 - gradient_of).cumsum(0)
    jaccard = 1.0 - intersection / union
    if len(gradient_of) > 1:
        jaccard[1:] = jaccard[1:] - jaccard[:-1]
    return jaccard


@idiom(lambda draw: ((draw.floats(5, D), draw.ids(2, 5)), {}))
class Lovasz(Encoder):
    """Lovasz hinge: errors sorted over all pixels, a piecewise gradient in place."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits, labels = self.body(x).reshape(-1), y.reshape(-1).double()
        errors = 1.0 - logits * (2.0 * labels - 1.0)
        ordered, order = torch.sort(errors, dim=0, descending=True)
        return torch.dot(F.relu(ordered), lovasz(labels[order]))


def speech(draw: Draw) -> Inputs:
    return (draw.floats(9, D), draw.ids(4, 3) + 1, draw.lengths(3)), {}


@idiom(speech)
class Ctc(Encoder):
    """CTC: log probabilities with time first, lengths of targets."""

    def __init__(self) -> None:
        super().__init__(5)

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
        log = self.body(x).log_softmax(-1).transpose(0, 1)
        inputs = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return F.ctc_loss(log, y, inputs, lengths, blank=0, zero_infinity=True)


def tokens(draw: Draw) -> Inputs:
    ids = draw.ids(9, 6)
    labels = ids.masked_fill(~draw.mask(6), -100)
    return (ids, labels), {}


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, D)
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.head = nn.Linear(D, 9)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


@idiom(tokens)
class IgnoredLabels(Language):
    """Shifted cross entropy with -100, mean over those that count, and a perplexity."""

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(ids)
        loss = F.cross_entropy(
            logits[..., :-1, :].contiguous().view(-1, 9), labels[..., 1:].contiguous().view(-1), ignore_index=-100
        )
        return loss, torch.exp(loss.detach())


@idiom(tokens, stream=False)
class LabelSmoothingByHand(Language):
    """fairseq's label smoothing: sums over tokens that are no padding, divided by their number."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Any]:
        log = self.logits(ids).log_softmax(-1).view(-1, 9)
        target = labels.view(-1, 1)
        pad = target.eq(-100)
        nll = -log.gather(dim=-1, index=target.masked_fill(pad, 0)).masked_fill_(pad, 0.0)
        smooth = -log.sum(dim=-1, keepdim=True).masked_fill_(pad, 0.0)
        count = (~pad).sum()
        loss = (0.9 * nll.sum() + 0.1 / 9 * smooth.sum()) / count
        return {"loss": loss, "nll": nll.sum().detach(), "tokens": count}


@idiom(tokens)
class ClassWeights(Language):
    """Cross entropy with weights of classes and label smoothing in the module ``nn.CrossEntropyLoss``."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 9), label_smoothing=0.1, ignore_index=-100)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.logits(ids).flatten(0, 1), labels.flatten())


@dataclass
class Result:
    """A dataclass as libraries return it."""

    loss: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


@idiom(tokens)
class DataclassOutput(Language):
    """A dataclass with a loss, logits and optional hidden states."""

    def forward(self, ids: Tensor, labels: Tensor) -> Result:
        hidden = self.embedding(ids)
        logits = self.head(self.body(hidden))
        return Result(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, (hidden,))


class Output:
    """A class of the user's own with tensors in attributes."""

    def __init__(self, loss: Tensor, extra: dict[str, Tensor]) -> None:
        self.loss = loss
        self.extra = extra

    def shown(self) -> dict[str, Any]:
        return {"loss": self.loss, "extra": self.extra}


@idiom(tokens, refused="holds tensors")
class OwnClassOutput(Language):
    """An object of one's own class as the output."""

    def forward(self, ids: Tensor, labels: Tensor) -> Output:
        logits = self.logits(ids)
        return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), {"logits": logits})


@idiom(tokens)
class TransformersOutput(Language):
    """A ModelOutput of transformers."""

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        logits = self.logits(ids)
        return CausalLMOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def weighted(model: Any, output: dict[str, Tensor]) -> Tensor:
    return sum(output[name] * weight for name, weight in (("boxes", 1.0), ("classes", 0.5), ("extra", 0.1)))  # type: ignore


@idiom(
    lambda draw: ((draw.floats(D), draw.floats(4), draw.ids(3)), {}),
    loss=weighted,
    refused_stream="could each be the loss",
)
class LossDict(nn.Module):
    """detectron2: a dict of losses in training, which the caller sums up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.boxes, self.classes = nn.Linear(D, 4), nn.Linear(D, 3)

    def forward(self, x: Tensor, boxes: Tensor, classes: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {
            "boxes": F.smooth_l1_loss(self.boxes(h), boxes, beta=0.1),
            "classes": F.cross_entropy(self.classes(h), classes),
            "extra": h.pow(2).sum(-1).mean(),
        }


@idiom(lambda draw: ((draw.floats(D), draw.floats(4), draw.ids(3)), {}))
class LearnedTaskWeights(nn.Module):
    """Kendall et al.: tasks weighed by learned uncertainties, collected in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.heads = nn.ModuleList([nn.Linear(D, 4), nn.Linear(D, 3)])
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, boxes: Tensor, classes: Tensor) -> dict[str, Any]:
        h = self.body(x).tanh()
        losses = [F.mse_loss(self.heads[0](h), boxes), F.cross_entropy(self.heads[1](h), classes)]
        total = 0
        for i, loss in enumerate(losses):
            total = total + torch.exp(-self.log_vars[i]) * loss + self.log_vars[i]
        return {"loss": total, "losses": [loss.detach() for loss in losses]}


def rollout(draw: Draw) -> Inputs:
    return (draw.floats(D), draw.ids(3), draw.floats(), draw.floats(), draw.floats()), {}


@idiom(rollout, refused_parts="samples|microbatch", stream=False)  # a spread of one row
class Ppo(nn.Module):
    """PPO (cleanrl): a clipped ratio, normalised advantages, an entropy bonus, a clipped value loss."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
        self.critic = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, obs: Tensor, action: Tensor, old: Tensor, advantage: Tensor, returns: Tensor) -> Tensor:
        policy = torch.distributions.Categorical(logits=self.actor(obs))
        ratio = (policy.log_prob(action) - old).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        loss = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.2)).mean()
        value = self.critic(obs).view(-1)
        return loss - 0.01 * policy.entropy().mean() + 0.5 * 0.5 * ((value - returns) ** 2).mean()


@idiom(rollout)
class GaussianPolicy(nn.Module):
    """SAC's actor: a squashed Gaussian with a state-free deviation, log probabilities of given actions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))
        self.log_std = nn.Parameter(torch.zeros(1, 1))

    def forward(self, obs: Tensor, action: Tensor, old: Tensor, advantage: Tensor, returns: Tensor) -> Tensor:
        mean = self.mean(obs)
        std = self.log_std.clamp(-2, 2).expand_as(mean).exp()
        dist = torch.distributions.Normal(mean, std)
        log = dist.log_prob(returns[:, None]).sum(1) - torch.log(1 - torch.tanh(returns) ** 2 + 1e-6)
        return -(log * advantage).mean() - 0.01 * dist.entropy().sum(1).mean()


@idiom()
class TwoHeadedGan(nn.Module):
    """A generator and a discriminator in one model: hinge losses of both, the fake detached for one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.discriminator = nn.Sequential(nn.Linear(D, D), nn.LeakyReLU(0.2), nn.Linear(D, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fake = self.generator(x.flip(1))
        d = F.relu(1 - self.discriminator(x)).mean() + F.relu(1 + self.discriminator(fake.detach())).mean()
        g = -self.discriminator(fake).mean()
        return {"loss": d + g, "d": d.detach(), "g": g.detach()}


@idiom(labelled(4))
class MultiLabelMargin(Encoder):
    """Losses of torch as modules: margins, KL, cosine embedding, Huber, one after another."""

    def __init__(self) -> None:
        super().__init__(4)
        self.margin, self.huber = nn.MultiMarginLoss(), nn.HuberLoss(delta=0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.body(x)
        hot = F.one_hot(y, 4).to(x.dtype)
        same = torch.where(y > 1, 1, -1)
        cosine = F.cosine_embedding_loss(out, hot, same, margin=0.1)
        return self.margin(out, y) + self.huber(out, hot) + cosine + F.multilabel_soft_margin_loss(out, hot)


@idiom(labelled(3))
class CenterLoss(Encoder):
    """Centres of classes as parameters, distances to one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, D))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body(x)
        spread = (h - self.centres.index_select(0, y)).pow(2).sum(1).clamp(min=1e-12, max=1e12).sum() / x.shape[0]
        return F.cross_entropy(self.head(h), y) + 0.1 * spread


@idiom(labelled(3))
class ArcFace(Encoder):
    """Angular margins: normalised weights, ``acos`` by hand, the margin where the class is right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cos = F.linear(F.normalize(self.body(x)), F.normalize(self.weight)).clamp(-0.999, 0.999)
        turned = cos * math.cos(0.3) - torch.sqrt(1 - cos.pow(2)) * math.sin(0.3)
        hot = torch.zeros_like(cos)
        hot.scatter_(1, y.view(-1, 1).long(), 1)
        return F.cross_entropy((hot * turned + (1 - hot) * cos) * 8.0, y)


@idiom(lambda draw: ((draw.floats(6, D), draw.mask(6)), {}))
class MaskedMeans(Wrapped):
    """A mean of rows' masked means, and one over all that counts."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        each = self.leave(self.enter(x).tanh()).square().mean(-1)
        rows = (each * mask).sum(1) / mask.sum(1)
        return rows.mean() + each[mask].mean() + (each * mask).sum() / mask.sum()


@idiom(two_views, stream=False)  # a spread of one row
class VicReg(Encoder):
    """VICReg: invariance, variance over the batch, covariance off the diagonal."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.body(a), self.body(b)
        loss = F.mse_loss(a, b)
        for z in (a, b):
            z = z - z.mean(dim=0)
            loss = loss + F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()
            cov = (z.T @ z) / (len(z) - 1)
            off = cov.flatten()[:-1].view(D - 1, D + 1)[:, 1:].flatten()
            loss = loss + off.pow(2).sum() / D
        return loss
