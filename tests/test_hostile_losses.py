"""Losses that microbatches get wrong when they are averaged: each must be that of the whole batch.

The oracle is the unsplit model on the whole batch: loss and every gradient by name, in float64, with uneven
microbatches, and targets of which some microbatches have none that counts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError

ROWS, LENGTH, WIDTH, CLASSES = 7, 5, 6, 8
IGNORED = -100
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of logits, hidden states, labels, mask


class Model(nn.Module):
    """Logits for each token, and a loss of them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("class_weights", torch.linspace(0.5, 2.0, CLASSES))
        self.gaussian = nn.GaussianNLLLoss()
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids))
        return self.loss(self, self.head(hidden), hidden, labels, mask)  # type: ignore[call-arg]


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.reshape(-1, CLASSES), labels.reshape(-1)


def like(logits: Tensor) -> Tensor:
    """Real-valued targets that depend on the sample alone."""
    return torch.tanh(logits.detach()).cumsum(-1)


def contrastive(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    one, other = F.normalize(hidden.mean(1), dim=-1), F.normalize(hidden[:, 0], dim=-1)
    similar = one @ other.T * m.scale.exp()
    numbers = torch.arange(similar.shape[0])
    return (F.cross_entropy(similar, numbers) + F.cross_entropy(similar.T, numbers)) / 2


def siglip(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    similar = hidden.mean(1) @ hidden[:, 0].T * m.scale
    signs = 2 * torch.eye(similar.shape[0], dtype=similar.dtype) - 1
    return -F.logsigmoid(signs * similar).sum(-1).mean()


def balancing(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    probabilities = logits.softmax(-1).reshape(-1, CLASSES)
    chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, CLASSES).sum(1).to(logits.dtype)
    aux = CLASSES * (chosen.mean(0) * probabilities.mean(0)).sum()
    return F.cross_entropy(*flat(logits, labels)) + 0.01 * aux


def balancing_masked(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    layers = torch.cat([logits.reshape(-1, CLASSES), 2 * logits.reshape(-1, CLASSES)], dim=0).softmax(-1)
    count = layers.shape[0] // (mask.shape[0] * mask.shape[1])
    weights = mask[None, :, :, None].expand(count, *mask.shape, CLASSES).reshape(-1, CLASSES).to(logits.dtype)
    share = (layers * weights).sum(0) / weights.sum(0)
    return (share * layers.amax(0)).sum()


def barlow(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    a, b = hidden.mean(1), hidden[:, 0]
    a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
    cross = a.T @ b / a.shape[0]
    return (cross - torch.eye(WIDTH, dtype=cross.dtype)).square().sum()


def valid_mean(m: Model, logits: Tensor, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    each = F.cross_entropy(*flat(logits, labels), reduction="none")
    return each.sum() / (labels != IGNORED).sum()


LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y)),
    "cross_entropy_sum": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y), reduction="sum"),
    "cross_entropy_none": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y), reduction="none").mean(),
    "cross_entropy_weights": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y), weight=m.class_weights),
    "cross_entropy_smooth": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y), label_smoothing=0.1),
    "cross_entropy_smooth_weights": lambda m, x, h, y, k: F.cross_entropy(
        *flat(x, y), weight=m.class_weights, label_smoothing=0.1
    ),
    "cross_entropy_other_index": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y.clamp(min=0)), ignore_index=0),
    "cross_entropy_dense": lambda m, x, h, y, k: F.cross_entropy(x.transpose(1, 2), y),
    "cross_entropy_shifted": lambda m, x, h, y, k: F.cross_entropy(*flat(x[:, :-1], y[:, 1:])),
    "cross_entropy_probabilities": lambda m, x, h, y, k: F.cross_entropy(
        x.reshape(-1, CLASSES), like(x).softmax(-1).reshape(-1, CLASSES)
    ),
    "nll": lambda m, x, h, y, k: F.nll_loss(x.log_softmax(-1).reshape(-1, CLASSES), y.reshape(-1)),
    "nll_weights": lambda m, x, h, y, k: F.nll_loss(
        x.log_softmax(-1).reshape(-1, CLASSES), y.reshape(-1), m.class_weights
    ),
    "mse": lambda m, x, h, y, k: F.mse_loss(x, like(x)),
    "mse_sum": lambda m, x, h, y, k: F.mse_loss(x, like(x), reduction="sum"),
    "l1": lambda m, x, h, y, k: F.l1_loss(x, like(x)),
    "smooth_l1": lambda m, x, h, y, k: F.smooth_l1_loss(x, like(x), beta=0.5),
    "huber": lambda m, x, h, y, k: F.huber_loss(x, like(x), delta=0.5),
    "bce": lambda m, x, h, y, k: F.binary_cross_entropy(x.sigmoid(), like(x).sigmoid()),
    "bce_logits": lambda m, x, h, y, k: F.binary_cross_entropy_with_logits(x, like(x).sigmoid()),
    "bce_logits_sum": lambda m, x, h, y, k: F.binary_cross_entropy_with_logits(x, like(x).sigmoid(), reduction="sum"),
    "kl_div": lambda m, x, h, y, k: F.kl_div(x.log_softmax(-1), like(x).softmax(-1), reduction="mean"),
    "kl_div_batchmean": lambda m, x, h, y, k: F.kl_div(x.log_softmax(-1), like(x).softmax(-1), reduction="batchmean"),
    "poisson": lambda m, x, h, y, k: F.poisson_nll_loss(x, like(x).exp()),
    "gaussian": lambda m, x, h, y, k: m.gaussian(x, like(x), x.detach().square() + 0.1),
    "margin_ranking": lambda m, x, h, y, k: F.margin_ranking_loss(
        x[:, 0, 0], x[:, 1, 1], torch.sign(x[:, 0, 2].detach()), margin=0.5
    ),
    "triplet": lambda m, x, h, y, k: F.triplet_margin_loss(h[:, 0], h[:, 1], h[:, 2], margin=2.0),
    "cosine_embedding": lambda m, x, h, y, k: F.cosine_embedding_loss(
        h[:, 0], h[:, 1], torch.sign(x[:, 0, 2].detach()), margin=0.1
    ),
    "multi_margin": lambda m, x, h, y, k: F.multi_margin_loss(x[:, 0], y[:, 0].clamp(min=0)),
    "multilabel_soft_margin": lambda m, x, h, y, k: F.multilabel_soft_margin_loss(x[:, 0], like(x[:, 0]).sigmoid()),
    "mean": lambda m, x, h, y, k: x.square().mean(),
    "sum_over_rows": lambda m, x, h, y, k: x.square().sum() / x.shape[0],
    "sum_over_numel": lambda m, x, h, y, k: x.square().sum() / x.numel(),
    "mean_then_mean": lambda m, x, h, y, k: x.square().mean(-1).mean(),
    "valid_mean": valid_mean,
    "masked_mean": lambda m, x, h, y, k: (x.square().mean(-1) * k).sum() / k.sum(),
    "masked_rows": lambda m, x, h, y, k: x.square().mean(-1)[k.bool()].mean(),
    "two_tasks": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y)) + 0.3 * F.mse_loss(h, like(h)) + h.sum() * 1e-3,
    "regularised": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y)) + 0.1 * m.head.weight.square().sum() + 2.0,
    "scaled": lambda m, x, h, y, k: m.scale.exp() * F.cross_entropy(*flat(x, y)) / 3,
    "stacked": lambda m, x, h, y, k: torch.stack([F.cross_entropy(*flat(x, y)), h.square().mean()]).mean(),
    "focal": lambda m, x, h, y, k: (
        (1 - torch.exp(-F.cross_entropy(*flat(x, y), reduction="none"))) ** 2
        * F.cross_entropy(*flat(x, y), reduction="none")
    ).mean(),
    "perplexity": lambda m, x, h, y, k: F.cross_entropy(*flat(x, y)).exp(),
    "root_mean_square": lambda m, x, h, y, k: x.square().mean().sqrt(),
    "norm": lambda m, x, h, y, k: h.norm(),
    "largest": lambda m, x, h, y, k: x.max() + x.logsumexp(0).mean(),
    "weighted_by_activations": lambda m, x, h, y, k: (
        (h.sigmoid() * like(h)).sum() / h.sigmoid().sum() + F.cross_entropy(*flat(x, y))
    ),
    "contrastive": contrastive,
    "siglip": siglip,
    "balancing": balancing,
    "balancing_masked": balancing_masked,
    "barlow_twins": barlow,
}


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(CLASSES, (rows, LENGTH))
    labels = torch.randint(CLASSES, (rows, LENGTH))
    labels[: rows // 3] = IGNORED
    labels[rows // 2, 2:] = IGNORED
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (rows, 1))).double()
    return {"ids": ids, "labels": labels, "mask": mask}


def assert_step_equal(model: nn.Module, pipe: nn.Module, inputs: dict[str, Tensor]) -> None:
    expected = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert any(g is not None and bool(g.abs().max() > 0) for g in gradients)
    model.zero_grad()
    found = pipe(**inputs)
    torch.testing.assert_close(found, expected, msg=lambda text: f"loss: {text}")
    found.backward()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("name", LOSSES)
def test_a_hostile_loss_is_the_whole_batchs(name: str) -> None:
    model = Model(LOSSES[name]).double()
    for stages, microbatches in ((2, 3), (3, 4)):
        pipe = pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, profile="count")
        for rows in (ROWS, 8):
            assert_step_equal(model, pipe, batch(rows))


class MixesInside(nn.Module):
    """The batch's mean is subtracted in the middle."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.centre = Centre(mix)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.centre(self.first(x))).square().mean()


class Centre(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "softmax": lambda x: x.softmax(0),
    "sort": lambda x: x.sort(0).values,
    "attention": lambda x: (x @ x.T).softmax(-1) @ x,
    "roll": lambda x: x.roll(1, 0),
    "first": lambda x: x * x[0],
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_samples_in_the_middle_is_refused_or_accepted_by_name(name: str) -> None:
    model = MixesInside(MIXES[name]).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, profile="count")
    with pytest.raises(CaptureError, match=r"module 'centre'.*test_hostile_losses\.py:\d+.*samples of the batch mix"):
        pipe(x)
    whole = pipecompile.compile(model, ["cpu", "cpu"], microbatches=1, profile="count")
    assert_step_equal(model, whole, {"x": x})
    accepted = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, profile="count", allow_microbatch=["centre"])
    parts = torch.stack([model(part) for part in x.split(2)]).mean()
    torch.testing.assert_close(accepted(x), parts)


def test_numbers_of_rows_are_those_of_the_whole_batch() -> None:
    model = MixesInside(lambda x: x + torch.arange(x.shape[0], dtype=x.dtype)[:, None]).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, profile="count")
    assert_step_equal(model, pipe, {"x": torch.randn(7, WIDTH, dtype=torch.float64)})


class Experts(nn.Module):
    """Sorts the tokens of all samples by their expert, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.weights = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        expert = self.router(tokens).argmax(-1)
        order = expert.argsort()
        done = torch.bmm(tokens[order].unsqueeze(1), self.weights[expert[order]]).squeeze(1)
        return done[order.argsort()].reshape(x.shape)


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), Experts(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x))).square().mean()


def test_a_module_that_sorts_all_samples_and_puts_them_back_is_tried_out() -> None:
    model = WithExperts().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, profile="count")
    assert_step_equal(model, pipe, {"x": torch.randn(7, 4, WIDTH, dtype=torch.float64)})
    assert any("tried out" in line and "'experts'" in line for line in pipe.report["microbatches"])


class Remembers(nn.Module):
    """Keeps a running mean of what it sees, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(x)
        self.calls += 1
        self.seen.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return (hidden - self.seen.clone()).square().mean()


def test_buffers_are_written_once_a_batch_from_the_whole_batch() -> None:
    model, twin = Remembers().double(), Remembers().double()
    twin.load_state_dict(model.state_dict())
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, profile="count")
    for rows in (7, 8, 7):
        x = torch.randn(rows, WIDTH, dtype=torch.float64)
        found, expected = pipe(x), twin(x)
        torch.testing.assert_close(found, expected)
        for one, other in ((found, model), (expected, twin)):
            other.zero_grad()
            one.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
        for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    assert int(model.calls) == 3
