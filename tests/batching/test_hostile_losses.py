"""Losses that microbatches get wrong when they are averaged: each must be that of the whole batch.

The oracle is the unsplit model on the whole batch: loss and every gradient by name, in float64, with uneven
microbatches, and targets of which some microbatches have none that counts. The classes of torch.nn are in
``test_torch_losses``; here is what people write by hand.
"""

# ruff: noqa: E501 - a table, one loss a line

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from losses import CLASSES, IGNORED, WIDTH, Tokens, assert_step_equal, cut_into, microbatches_of
from torch import Tensor, nn

import pipecompile

LENGTH = 5
# Of the model, logits x (rows, length, classes), hidden states h (rows, length, width), labels y and mask k (rows,
# length), and the number n of labels that count.
Loss = Callable[..., Tensor]


class Model(Tokens):
    """Tokens with what some losses want beside them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(lambda x, h, y, k, n: loss(self, x, h, y, k, n))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("class_weights", torch.linspace(0.5, 2.0, CLASSES))


def flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.reshape(-1, CLASSES), y.reshape(-1)


def each(x: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of each token, zero where it is ignored: (rows, length)."""
    return F.cross_entropy(x.transpose(1, 2), y, reduction="none")


def entropy(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*flat(x, y))


def like(x: Tensor) -> Tensor:
    """Real-valued targets that depend on the sample alone, and are known in the step only."""
    return torch.tanh(x.detach()).cumsum(-1)


def two_views(h: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(h.mean(1), dim=-1), F.normalize(h[:, 0], dim=-1)


def contrastive(m: Model, h: Tensor) -> Tensor:
    one, other = two_views(h)
    similar = one @ other.T * m.scale.exp()
    numbers = torch.arange(similar.shape[0])
    return (F.cross_entropy(similar, numbers) + F.cross_entropy(similar.T, numbers)) / 2


def siglip(m: Model, h: Tensor) -> Tensor:
    similar = h.mean(1) @ h[:, 0].T * m.scale
    signs = 2 * torch.eye(similar.shape[0], dtype=similar.dtype) - 1
    return -F.logsigmoid(signs * similar).sum(-1).mean()


def nt_xent(h: Tensor) -> Tensor:
    """Both views behind one another, each sample's partner half a batch away."""
    views = torch.cat(two_views(h))
    rows = h.shape[0]
    similar = (views @ views.T / 0.5).masked_fill(torch.eye(2 * rows, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similar, torch.arange(2 * rows).roll(rows))


def supervised_contrastive(h: Tensor, y: Tensor) -> Tensor:
    one, _ = two_views(h)
    alike = (y[:, -1, None] == y[None, :, -1]).double()
    log = (one @ one.T).log_softmax(-1)
    return -((alike * log).sum(-1) / alike.sum(-1)).mean()


def barlow(h: Tensor) -> Tensor:
    a, b = h.mean(1), h[:, 0]
    a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
    cross = a.T @ b / a.shape[0]
    return (cross - torch.eye(WIDTH, dtype=cross.dtype)).square().sum()


def vicreg(h: Tensor) -> Tensor:
    a, b = h.mean(1), h[:, 0]
    spread = F.relu(1 - (a.var(0) + 1e-4).sqrt()).mean()
    centred = a - a.mean(0)
    return F.mse_loss(a, b) + spread + 0.1 * (centred.T @ centred / (a.shape[0] - 1)).square().sum()


def balancing(x: Tensor, y: Tensor) -> Tensor:
    """Fedus et al., "Switch Transformers", equation 4, over all tokens."""
    probabilities = x.softmax(-1).reshape(-1, CLASSES)
    chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, CLASSES).sum(1).to(x.dtype)
    return entropy(x, y) + 0.01 * CLASSES * (chosen.mean(0) * probabilities.mean(0)).sum()


def balancing_masked(x: Tensor, k: Tensor) -> Tensor:
    """The same over the tokens that are no padding, of two layers behind one another."""
    layers = torch.cat([x.reshape(-1, CLASSES), 2 * x.reshape(-1, CLASSES)], dim=0).softmax(-1)
    count = layers.shape[0] // (k.shape[0] * k.shape[1])
    weights = k[None, :, :, None].expand(count, *k.shape, CLASSES).reshape(-1, CLASSES).to(x.dtype)
    share = (layers * weights).sum(0) / weights.sum(0)
    return (share * layers.amax(0)).sum()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return 1 - (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def dice(p: Tensor, t: Tensor) -> Tensor:
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def counted_in_python(x: Tensor, y: Tensor) -> Tensor:
    count = int((y != IGNORED).sum())
    return each(x, y).sum() / count if count else x.sum() * 0


def advantages(x: Tensor, y: Tensor, k: Tensor) -> Tensor:
    """A policy gradient whose advantages, known from the inputs, are standardised over the batch."""
    reward = k.sum(1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    return (advantage[:, None] * each(x, y)).mean()


MEANS: dict[str, Loss] = {
    "valid mean": lambda m, x, h, y, k, n: each(x, y).sum() / (y != IGNORED).sum(),
    "valid mean, at least one": lambda m, x, h, y, k, n: each(x, y).sum() / (y != IGNORED).sum().clamp(min=1),
    "valid mean where": lambda m, x, h, y, k, n: torch.where(y != IGNORED, each(x, y), 0.0).sum() / torch.count_nonzero(y != IGNORED),
    "valid mean of picked logits": lambda m, x, h, y, k, n: F.cross_entropy(x[y != IGNORED], y[y != IGNORED]),
    "valid mean, shifted": lambda m, x, h, y, k, n: each(x[:, :-1], y[:, 1:]).sum() / (y[:, 1:] != IGNORED).sum(),
    "valid mean of a product": lambda m, x, h, y, k, n: torch.dot(each(x, y).flatten(), k.flatten()) / k.sum(),
    "mean corrected by the count": lambda m, x, h, y, k, n: each(x, y).mean() * y.numel() / (y != IGNORED).sum(),
    "items in batch": lambda m, x, h, y, k, n: F.cross_entropy(*flat(x, y), reduction="sum") / n,
    "items in batch, shifted": lambda m, x, h, y, k, n: F.cross_entropy(*flat(x, F.pad(y, (0, 1), value=IGNORED)[:, 1:]), reduction="sum") / n,
    "class weights by hand": lambda m, x, h, y, k, n: (each(x, y) * m.class_weights[y.clamp(min=0)] * (y >= 0)).sum() / (m.class_weights[y.clamp(min=0)] * (y >= 0)).sum(),
    "cross entropy, shifted": lambda m, x, h, y, k, n: entropy(x[:, :-1], y[:, 1:]),
    "cross entropy, unreduced": lambda m, x, h, y, k, n: each(x, y).mean(),
    "cross entropy, its own targets": lambda m, x, h, y, k, n: F.cross_entropy(x.reshape(-1, CLASSES), like(x).softmax(-1).reshape(-1, CLASSES)),
    "cross entropy a token": lambda m, x, h, y, k, n: torch.stack([F.cross_entropy(x[:, i], y[:, i].clamp(min=0)) for i in range(LENGTH)]).mean(),
    "likelihood gathered": lambda m, x, h, y, k, n: -(x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * (y >= 0)).sum() / (y >= 0).sum(),
    "binary, its own targets": lambda m, x, h, y, k, n: F.binary_cross_entropy(x.sigmoid(), like(x).sigmoid()),
    "divergence a row": lambda m, x, h, y, k, n: F.kl_div(x.log_softmax(-1), like(x).softmax(-1), reduction="batchmean"),
    "mean": lambda m, x, h, y, k, n: x.square().mean(),
    "sum over rows": lambda m, x, h, y, k, n: x.square().sum() / x.shape[0],
    "sum over len": lambda m, x, h, y, k, n: x.square().mean((1, 2)).sum() / len(x),
    "sum over numel": lambda m, x, h, y, k, n: x.square().sum() / x.numel(),
    "sum over valid rows": lambda m, x, h, y, k, n: (each(x, y).sum(1) / (y >= 0).sum(1).clamp(min=1)).sum() / (y >= 0).any(1).sum(),
    "mean, then mean": lambda m, x, h, y, k, n: x.square().mean(-1).mean(),
    "mean over rows, then sum": lambda m, x, h, y, k, n: x.square().mean(0).sum(),
    "mean of row means": lambda m, x, h, y, k, n: ((x.square().mean(-1) * k).sum(1) / k.sum(1).clamp(min=1)).mean(),
    "masked mean": lambda m, x, h, y, k, n: (x.square().mean(-1) * k).sum() / k.sum(),
    "weighted rows": lambda m, x, h, y, k, n: (x.square().mean((1, 2)) * k.sum(1)).sum() / k.sum(),
    "einsum": lambda m, x, h, y, k, n: torch.einsum("blc,bl->", x.square(), k) / k.sum(),
    "quantity a token": lambda m, x, h, y, k, n: x.logsumexp(-1).square().mean(),
}  # fmt: skip
SUMS: dict[str, Loss] = {
    "two tasks": lambda m, x, h, y, k, n: entropy(x, y) + 0.3 * F.mse_loss(h, like(h)) + h.sum() * 1e-3,
    "two tasks, difference": lambda m, x, h, y, k, n: 2 - entropy(x, y) - 0.5 * F.l1_loss(h, like(h)),
    "two tasks, each by its count": lambda m, x, h, y, k, n: entropy(x, y) + (h.square().mean(-1) * k).sum() / k.sum(),
    "two tasks, learnt weights": lambda m, x, h, y, k, n: (-m.scale).exp() * entropy(x, y) + m.scale.exp() * h.square().mean() + m.scale,
    "two heads": lambda m, x, h, y, k, n: entropy(x, y) + 0.1 * entropy(x.flip(1), y),
    "regularised": lambda m, x, h, y, k, n: entropy(x, y) + 0.1 * m.head.weight.square().sum() + 2.0,
    "regularised by a norm": lambda m, x, h, y, k, n: entropy(x, y) + 0.1 * sum(p.norm() for p in m.body.parameters()),
    "scaled": lambda m, x, h, y, k, n: m.scale.exp() * entropy(x, y) / 3,
    "stacked": lambda m, x, h, y, k, n: torch.stack([entropy(x, y), h.square().mean()]).mean(),
    "summed as a list": lambda m, x, h, y, k, n: sum([entropy(x, y), h.square().mean(), h.abs().sum()]),
    "logits kept small": lambda m, x, h, y, k, n: entropy(x, y) + 1e-2 * (x.logsumexp(-1).square() * k).sum() / k.sum(),
    "entropy bonus": lambda m, x, h, y, k, n: entropy(x, y) + 0.1 * (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "distillation": lambda m, x, h, y, k, n: 0.5 * entropy(x, y) + 2.0 * F.kl_div((x / 2).log_softmax(-1), like(x / 2).softmax(-1), reduction="batchmean"),
    "focal": lambda m, x, h, y, k, n: ((1 - torch.exp(-each(x, y))) ** 2 * each(x, y)).mean(),
    "focal, by its count": lambda m, x, h, y, k, n: ((1 - torch.exp(-each(x, y))) ** 2 * each(x, y)).sum() / n,
    "preference": lambda m, x, h, y, k, n: -F.logsigmoid(0.1 * (each(x, y) - each(x.flip(1), y)).sum(1)).mean(),
    "triplets, learnt distance": lambda m, x, h, y, k, n: F.triplet_margin_with_distance_loss(
        h[:, 0], h[:, 1], h[:, 2], distance_function=lambda a, b: (m.body[0](a) - b).square().sum(-1)
    ),
    "standardised advantages": lambda m, x, h, y, k, n: advantages(x, y, k),
}  # fmt: skip
# From a value on that only the whole batch gives, a loss is computed once, from the joined values.
MIXING: dict[str, Loss] = {
    "valid mean of picked": lambda m, x, h, y, k, n: each(x, y)[y != IGNORED].mean(),
    "valid mean of selected": lambda m, x, h, y, k, n: torch.masked_select(each(x, y), y != IGNORED).mean(),
    "valid mean of the rest": lambda m, x, h, y, k, n: each(x, y).masked_fill(y == IGNORED, float("nan")).nanmean(),
    "cross entropy of the best": lambda m, x, h, y, k, n: entropy(x, x.argmax(-1)),
    "cross entropy of confident ones": lambda m, x, h, y, k, n: entropy(x, torch.where(x.softmax(-1).amax(-1) > 0.15, y, IGNORED)),
    "masked mean of picked": lambda m, x, h, y, k, n: x.square().mean(-1)[k.bool()].mean(),
    "masked mean, by numbers": lambda m, x, h, y, k, n: x.flatten(0, 1)[k.flatten().nonzero().squeeze(1)].square().mean(),
    "largest of means": lambda m, x, h, y, k, n: x.square().mean((0, 1)).amax(),
    "perplexity": lambda m, x, h, y, k, n: entropy(x, y).exp(),
    "product of two": lambda m, x, h, y, k, n: entropy(x, y) * h.square().mean(),
    "ratio of two": lambda m, x, h, y, k, n: entropy(x, y) / h.square().mean(),
    "one in units of the other": lambda m, x, h, y, k, n: entropy(x, y) + h.square().mean() * entropy(x, y).detach(),
    "clipped": lambda m, x, h, y, k, n: entropy(x, y).clamp(max=2.0) + (h.square().mean() - 0.1).abs(),
    "worse of two": lambda m, x, h, y, k, n: torch.maximum(entropy(x, y), 10 * h.square().mean()),
    "root mean square": lambda m, x, h, y, k, n: x.square().mean().sqrt(),
    "logarithm of a mean": lambda m, x, h, y, k, n: x.exp().mean().log(),
    "norm": lambda m, x, h, y, k, n: h.norm(),
    "largest": lambda m, x, h, y, k, n: x.max() + x.logsumexp(0).mean(),
    "median": lambda m, x, h, y, k, n: x.square().mean((1, 2)).median(),
    "variance": lambda m, x, h, y, k, n: entropy(x, y) + h.var(0).mean(),
    "hardest tokens": lambda m, x, h, y, k, n: each(x, y).flatten().topk(3).values.mean(),
    "hardest rows": lambda m, x, h, y, k, n: each(x, y).mean(1).sort().values[-2:].mean(),
    "weighted by activations": lambda m, x, h, y, k, n: (h.sigmoid() * like(h)).sum() / h.sigmoid().sum() + entropy(x, y),
    "softmax over losses": lambda m, x, h, y, k, n: (each(x, y).mean(1).softmax(0) * each(x, y).mean(1)).sum(),
    "correlation": lambda m, x, h, y, k, n: correlation(x.mean(-1), k),
    "rank pairs": lambda m, x, h, y, k, n: F.relu(1 - (x[:, None, 0, 0] - x[None, :, 0, 0]) * (k.sum(1)[:, None] - k.sum(1)[None]).sign()).mean(),
    "dice": lambda m, x, h, y, k, n: dice(x.sigmoid(), like(x).gt(0).double()),
    "contrastive": lambda m, x, h, y, k, n: contrastive(m, h),
    "contrastive and labels": lambda m, x, h, y, k, n: contrastive(m, h) + 0.5 * entropy(x, y),
    "siglip": lambda m, x, h, y, k, n: siglip(m, h),
    "nt-xent": lambda m, x, h, y, k, n: nt_xent(h),
    "supervised contrastive": lambda m, x, h, y, k, n: supervised_contrastive(h, y),
    "barlow twins": lambda m, x, h, y, k, n: barlow(h),
    "covariance of torch": lambda m, x, h, y, k, n: entropy(x, y) + torch.cov(h[:, 0].T).square().sum(),
    "correlation of torch": lambda m, x, h, y, k, n: entropy(x, y) + torch.corrcoef(h[:, 0].T)[0, 1],
    "vicreg": lambda m, x, h, y, k, n: vicreg(h),
    "balancing": lambda m, x, h, y, k, n: balancing(x, y),
    "balancing, masked": lambda m, x, h, y, k, n: balancing_masked(x, k),
}  # fmt: skip
# Where Python has counted labels, a microbatch would run another program: the batch is not cut.
WHOLE: dict[str, Loss] = {
    "valid mean counted in Python": lambda m, x, h, y, k, n: counted_in_python(x, y),
    "valid rows counted in Python": lambda m, x, h, y, k, n: each(x, y).sum(1).sum() / max(1, (y >= 0).any(1).sum().item()),
}  # fmt: skip
LOSSES = {**MEANS, **SUMS, **MIXING, **WHOLE}


def batch(rows: int) -> dict[str, Tensor]:
    """The first two rows, a microbatch where five are cut into four, have no label that counts and are all padding."""
    ids, y = torch.randint(CLASSES, (2, rows, LENGTH))
    y[:2], y[rows // 2, 2:] = IGNORED, IGNORED
    k = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (rows, 1))).double()
    k[:2] = 0
    return {"ids": ids, "y": y, "k": k, "n": (y != IGNORED).sum()}


@pytest.mark.filterwarnings("ignore:.*run as one microbatch")
@pytest.mark.parametrize("name", LOSSES)
def test_a_hostile_loss_is_the_whole_batchs(name: str) -> None:
    torch.manual_seed(0)
    model = Model(LOSSES[name]).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    for rows, microbatches in ((5, 4), (7, 3)):
        cut_into(pipe, microbatches)
        assert_step_equal(model, pipe, batch(rows))
        assert microbatches_of(pipe) == (1 if name in WHOLE else microbatches)
    assert any("computed once" in line for line in pipe.pipeline.report.microbatches) == (name in MIXING)


def test_a_number_of_items_given_as_a_python_number_is_the_callers() -> None:
    model = Model(LOSSES["items in batch"]).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    for items in (9, 9.5):
        assert_step_equal(model, pipe, {**batch(5), "n": items})


def test_the_model_has_its_own_len_again() -> None:
    model = Model(LOSSES["sum over len"]).double()
    pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")(**batch(5))
    assert "len" not in globals()
