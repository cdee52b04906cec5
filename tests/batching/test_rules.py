"""Arguments by which a rule could be misled: every way to give a dimension, to move the batch, to count rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError

BATCH, LENGTH, WIDTH = 7, 4, 6


class Model(nn.Module):
    """``x`` (batch, length, width) and ``labels`` (batch, length): what is done to them is between two layers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))  # as it is beside what is made of it, so that each sample has its place
        return (self.last(self.function(hidden, labels)) + hidden).square().mean()  # type: ignore[no-any-return]


class Ending(Model):
    """The same as a loss: nothing with weights comes after."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.function(self.last(torch.tanh(self.first(x))), labels)


def is_exact(model: Model, microbatches: int = 3) -> bool:
    """Whether a pipeline trains as the unsplit model does; False if it is refused."""
    torch.manual_seed(0)
    model = model.double()
    inputs = (torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (BATCH, LENGTH))), {}
    inputs[0][1][0, 1:] = 3
    expected = step(model, model, lambda out: out, inputs)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
    try:
        actual = step(pipe, model, lambda out: out, inputs)
    except CaptureError:
        return False
    assert_same(actual, expected)
    return True


def put(x: Tensor, index: Any, values: Any) -> Tensor:
    x = x.clone()
    x[index] = values
    return x


def rows(x: Tensor) -> Tensor:
    return torch.arange(len(x))


def convolved(x: Tensor, y: Tensor) -> Tensor:
    return F.conv1d(x.permute(1, 2, 0), x.new_ones(WIDTH, WIDTH, 3) / 9, padding=1).permute(2, 0, 1)


def product(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("blw,clw->bc", x, x).softmax(-1) @ x.flatten(1) @ x.new_ones(LENGTH * WIDTH, WIDTH)


def attended(x: Tensor, y: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return F.scaled_dot_product_attention(x, x, x).transpose(0, 1)


def histogram(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.zeros(WIDTH, dtype=x.dtype).scatter_add(0, y[:, 0], torch.ones_like(y[:, 0], dtype=x.dtype)).add(1)


def transformed(x: Tensor, y: Tensor) -> Tensor:
    waves = torch.stft(x.transpose(1, 2).flatten(1), 8, return_complex=True, window=x.new_ones(8))
    return torch.view_as_real(waves).flatten(1)[:, : LENGTH * WIDTH].view(x.shape)


def triplets(mixing: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).norm(dim=-1) / ((a - b).norm() if mixing else 2.0)

    return lambda x, y: F.triplet_margin_with_distance_loss(x[:, 0], x[:, 1], x[:, 2], distance_function=distance)


EYE = torch.eye(WIDTH).double() * 2


def both_ways(x: Tensor, y: Tensor) -> Tensor:
    """Two views in one batch, from one first state: of zeros, or one row spread over all."""
    views = torch.cat([x, x.flip(1)])
    state, other = torch.zeros(len(views), WIDTH, dtype=x.dtype), x.new_ones(1, WIDTH).expand(len(views), -1)
    states = []
    for k in range(LENGTH):
        state = torch.tanh(
            F.linear(torch.cat([views[:, k], other], 1), EYE.repeat(1, 2)) + F.linear(state * other, EYE)
        )
        states.append(state)
    ahead, back = torch.stack(states, 1).chunk(2)
    return ahead + 2 * back.flip(1)


MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flip of several dimensions": lambda x, y: x.transpose(0, 1).flip(0, 1).transpose(0, 1),
    "flip of a list": lambda x, y: torch.flip(x.transpose(0, 1), (0, 1)).transpose(0, 1),
    "roll without dimensions": lambda x, y: x.roll(1),
    "softmax over the implicit dimension": lambda x, y: F.softmax(x),
    "negative row numbers": lambda x, y: x[-torch.arange(x.shape[0])],
    "row numbers turned round": lambda x, y: x[x.shape[0] - 1 - torch.arange(x.shape[0])],
    "where, by numbers": lambda x, y: x + x[torch.where(y[:, 0] > 2)[0]].mean(0),
    "nonzero": lambda x, y: x + x[(y[:, 0] > 2).nonzero(as_tuple=True)[0]].mean(0),
    "sum of flat tokens": lambda x, y: x / x.reshape(-1, WIDTH).sum(0).abs().add(9),
    "sorted tokens": lambda x, y: x.reshape(-1, WIDTH).sort(0).values.view_as(x),
    "running sum over samples": lambda x, y: x.cumsum(0),
    "running sum over moved samples": lambda x, y: x.permute(2, 1, 0).cumsum(-1).permute(2, 1, 0),
    "batch statistics": lambda x, y: torch.where(x > x.mean(0), x, -x),
    "a mean over an expanded batch": lambda x, y: x - x[None].expand(3, -1, -1, -1).mean((0, 1)),
    "rows by labels": lambda x, y: x.index_select(0, y[:, 0].clamp(max=x.shape[0] - 1)),
    "gather over samples": lambda x, y: x.gather(0, y[..., None].expand_as(x) % x.shape[0]),
    "the first sample": lambda x, y: x + x[:1],
    "the last sample": lambda x, y: x + x[-1],
    "every other sample": lambda x, y: x + x[::2].mean(0),
    "a view across samples": lambda x, y: x.reshape(LENGTH, -1, WIDTH).softmax(0).reshape(x.shape),
    "samples as channels": lambda x, y: F.layer_norm(x.transpose(0, 1), (x.shape[0], WIDTH)).transpose(0, 1),
    "normalised over samples": lambda x, y: F.normalize(x, dim=0),
    "normalised over several": lambda x, y: F.normalize(x, dim=(0, 2)),
    "the batch's largest": lambda x, y: x / x.abs().amax((0, 1)),
    "a pool over samples": lambda x, y: F.avg_pool1d(x.permute(2, 1, 0), 3, 1, 1).permute(2, 1, 0),
    "a convolution over samples": convolved,
    "a product over samples": lambda x, y: product(x, y)[:, None],
    "attention over samples": attended,
    "rows set by their labels": lambda x, y: put(x, y[:, 0] % 3, x[:, 0, :1, None]),
    "entries set by the numbers of other rows": lambda x, y: put(x, (rows(x).flip(0), y[:, 0] % LENGTH), x[:, 0]),
    "entries set in the order of rows": lambda x, y: put(x, (rows(x), y[:, 0] % LENGTH), rows(x)[:, None].to(x)),
    "a shift by a mask of samples": lambda x, y: put(x, y[:, 0] > 2, x[0]),
    "a tensor product over samples": lambda x, y: x + torch.tensordot(x, x, ([0, 1], [0, 1])).sum(0) / 9,
    "a tensor product of samples": lambda x, y: x + torch.tensordot(x, x, ([1, 2], [1, 2])).sum(0)[:, None, None],
    "distances": lambda x, y: x + torch.cdist(x.flatten(1), x.flatten(1)).sum(1)[:, None, None],
    "unique labels": lambda x, y: x * y.unique().numel(),
    "median": lambda x, y: x - x.median(0).values,
    "a quantile": lambda x, y: x - x.quantile(0.5, dim=0),
    "the batch's variance": lambda x, y: x / x.var((0, 1), keepdim=True),
    "logsumexp over samples": lambda x, y: x - x.logsumexp((0, 1)),
    "unfolded samples": lambda x, y: x + F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(0, 3, 1).sum(-1),
    "differences of samples": lambda x, y: x + torch.diff(x, dim=0, prepend=x[:1]),
    "views beside copies": lambda x, y: (torch.cat([x, -x]) + x.repeat_interleave(2, 0)).chunk(2)[0],
    "views beside copies of a row": lambda x, y: (torch.cat([x, -x]) + x[:1].expand(2 * len(x), -1, -1)).chunk(2)[0],
    "a shuffle": lambda x, y: x.view(x.shape[0], 2, -1).transpose(0, 1).reshape(x.shape),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_never_taken_for_something_else(name: str) -> None:
    assert not is_exact(Model(MIXING[name]))


APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flip of several dimensions": lambda x, y: x.flip(1, 2),
    "squeeze of several dimensions": lambda x, y: x[:, None, :, None].squeeze(1, 3),
    "squeeze of a tuple": lambda x, y: x[:, None, :, None].squeeze((1, 3)),
    "divided by the rows": lambda x, y: x / x.shape[0],
    "divided by the length": lambda x, y: x / len(x),
    "counts of labels": lambda x, y: x * y.flatten().bincount(minlength=WIDTH).double(),
    "numbers of rows": lambda x, y: x * torch.arange(x.shape[0])[:, None, None],
    "numbers of rows, turned round": lambda x, y: x * (x.shape[0] - torch.arange(x.shape[0]))[:, None, None],
    "rows and labels": lambda x, y: x + x[torch.arange(x.shape[0]), y[:, 0] % LENGTH][:, None],
    "softmax moved": lambda x, y: x.permute(2, 0, 1).softmax(0).permute(1, 2, 0),
    "flat tokens": lambda x, y: x.reshape(-1, WIDTH).softmax(-1).view(x.shape),
    "two batches": lambda x, y: torch.cat([x, -x]).relu().chunk(2)[0],
    "repeated samples": lambda x, y: x.repeat_interleave(2, 0).view(-1, 2, LENGTH, WIDTH).mean(1),
    "repeated samples, so many in all": lambda x, y: x.repeat_interleave(2, 0, output_size=2 * x.shape[0])
    .view(-1, 2, LENGTH, WIDTH)
    .mean(1),
    "tiled samples": lambda x, y: x.repeat(2, 1, 1).view(2, -1, LENGTH, WIDTH).mean(0),
    "a table by labels": lambda x, y: x + torch.eye(WIDTH).double()[y],
    "masked": lambda x, y: torch.where((y > 2)[..., None], x, -x),
    "a mask picked and put back": lambda x, y: put(x, y > 2, x[y > 2] * 2),
    "squeezed itself": lambda x, y: (x[:, :1] * 2).squeeze_(1)[:, None] + x,
    "unsqueezed itself": lambda x, y: (x[:, 0] * 2).unsqueeze_(1) + x,
    "transposed itself": lambda x, y: (x * 2).transpose_(1, 2).softmax(-1).mT + x,
    "transposed itself, the batch too": lambda x, y: (x * 2).transpose_(0, 1).flip(0).transpose_(0, 1) + x,
    "a matrix for each row": lambda x, y: torch.vmap(lambda h, w: F.linear(h, w))(x[:, 0], x[:, :1].mT @ x[:, 1:2])[
        :, None
    ] + x,
    "an entry of each row set": lambda x, y: put(x, (rows(x), y[:, 0] % LENGTH), 2.0),
    "entries of each row set": lambda x, y: put(x, (rows(x)[:, None], y[:, :2] % LENGTH, slice(2)), x[:, 2:, 3:5]),
    "entries of each row set behind": lambda x, y: put(x, (rows(x), slice(None), y[:, 1]), x[..., 0]),
    "an entry of each row put": lambda x, y: x.index_put((rows(x), y[:, 0] % LENGTH), x[:, 0]),
    "entries of each row added": lambda x, y: x.index_put((rows(x)[:, None], y % LENGTH), x, accumulate=True),
    "power by a number": lambda x, y: 2**x,
    "remainder": lambda x, y: x % 0.3,
    "addcmul": lambda x, y: torch.addcmul(x, x, x),
    "a power of the rows": lambda x, y: x * x.size(0) ** 0.5,
    "one sample's place": lambda x, y: x * (y[:, 0].argmax() + 1),
    "a histogram": histogram,
    "stft": transformed,
    "both ways": both_ways,
    "a tensor product": lambda x, y: torch.tensordot(x, EYE, 1),
    "a tensor product, the other way": lambda x, y: torch.tensordot(EYE, x, dims=([0], [-1])).movedim(0, -1),
    "a tensor product of complex numbers": lambda x, y: torch.tensordot(torch.fft.fft(x), EYE + 0j, ([2], [1])).real,
}  # fmt: skip


REAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of floats": lambda x, y: x.sum() * x.size(0) ** 0.5,
    "of a sum": lambda x, y: x.sum() / (x.size(0) / 3),
    "of integers": lambda x, y: x.sum() + (x.argmax(-1) * x.size(0) ** 0.5).to(x.dtype).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REAL)
def test_a_real_number_of_rows_keeps_its_precision_and_promotes_nothing(name: str, dtype: torch.dtype) -> None:
    model = Ending(REAL[name]).to(dtype)
    x, labels = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype), torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count", verify="never")
    torch.testing.assert_close(pipe(x, labels), model(x, labels))


@pytest.mark.parametrize("name", APART)
def test_what_keeps_samples_apart_is_exact(name: str) -> None:
    assert is_exact(Model(APART[name]))


def token(function: Callable[..., Tensor], **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: function(x.reshape(-1, WIDTH), y.reshape(-1), **options)


WEIGHTS = torch.arange(1.0, WIDTH + 1).double()
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class weights": token(F.cross_entropy, weight=WEIGHTS),
    "ignored labels": token(F.cross_entropy, ignore_index=3),
    "ignored, weighted, smoothed": token(F.cross_entropy, ignore_index=3, weight=WEIGHTS, label_smoothing=0.1),
    "summed": token(F.cross_entropy, reduction="sum"),
    "summed, the old way": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), None, False),
    "summed squares, the old way": lambda x, y: F.mse_loss(x, x.detach() * y[..., None], False),
    "a mean for each": lambda x, y: F.mse_loss(x, x.detach() * y[..., None], None, False).sum(0).mean(),
    "weighted squares": lambda x, y: F.mse_loss(x, x.detach() * 2, weight=y[..., None].expand_as(x) + 1.0),
    "weighted differences": lambda x, y: F.l1_loss(x, x.detach() * 2, weight=y[..., None].expand_as(x) + 1.0),
    "weighted Huber": lambda x, y: F.huber_loss(x, x.detach() * 2, weight=y[..., None].expand_as(x) + 1.0),
    "divergence by number": lambda x, y: torch.kl_div(x.log_softmax(-1), x.detach().softmax(-1), 2) / 9,
    "divergence, a mean by number": lambda x, y: torch.kl_div(x.log_softmax(-1), x.detach().softmax(-1), 1),
    "aten's squares, summed": lambda x, y: torch.ops.aten.mse_loss(x, x.detach() * 2, 2),
    "margins by number": lambda x, y: torch.margin_ranking_loss(x[:, 0, 0], x[:, 1, 1], y[:, 0].sign(), 0.1, 2),
    "triplets by a distance that mixes": triplets(True),
    "triplets by a distance": triplets(False),
    "a mean over valid tokens": lambda x, y: (x.square().sum(-1) * (y != 3)).sum() / (y != 3).sum(),
    "a mean over what is picked": lambda x, y: x[y != 3].square().mean(),
    "a mean of means": lambda x, y: ((x.square().sum(-1) * (y != 3)).sum(1) / (y != 3).sum(1).clamp(min=1)).mean(),
    "a rounded sum": lambda x, y: x.sum().to(torch.int64) * 0.1 + x.mean(),
    "a sum to a power": lambda x, y: x.sum() ** 2,
    "a mean over the batch alone": lambda x, y: x.mean(0).square().sum(),
    "variance": lambda x, y: x.var(),
    "divided by rows": lambda x, y: x.square().sum() / x.shape[0] / x.shape[1],
    "a norm": lambda x, y: x.norm(),
    "contrast": lambda x, y: F.cross_entropy(x[:, 0] @ x[:, 1].T, torch.arange(x.shape[0])),
    "covariance": lambda x, y: torch.cov(x[:, 0].T).square().sum(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_whole_batchs(name: str) -> None:
    assert is_exact(Ending(LOSSES[name]))


@pytest.mark.parametrize("bags", [False, True])
def test_gradients_by_frequency_are_refused(bags: bool) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = nn.EmbeddingBag if bags else nn.Embedding
            self.words, self.last = kind(4, WIDTH, scale_grad_by_freq=True), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.words(ids)).square().mean()  # type: ignore[no-any-return]

    model, inputs = Words().double(), ((torch.randint(0, 4, (7, 3)),), {})
    with pytest.raises(CaptureError, match=r"frequency|how often"):
        step(pipecompile.compile(model, ["cpu"] * 2, microbatches=3, costs="count"), model, lambda out: out, inputs)
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=1, costs="count")
    assert_same(step(pipe, model, lambda out: out, inputs), step(model, model, lambda out: out, inputs))


def test_a_seed_set_in_forward_is_refused() -> None:
    def noisy(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x + torch.rand_like(x)

    model = Model(noisy).double()
    x, y = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with pytest.raises(CaptureError, match=r"test_rules\.py:\d+.*forward seeds torch's generator"):
        pipecompile.compile(model, ["cpu", "cpu"], costs="count")(x, y)


def test_a_row_loss_without_rows_is_not_taken_for_one() -> None:
    def margins(x: Tensor, y: Tensor) -> Tensor:
        return F.multi_margin_loss(x[:, 0, 0], y[0, 0])

    assert is_exact(Ending(margins))


@pytest.mark.parametrize(
    "turned",
    [
        lambda h: h.t() * 2,
        lambda h: h.transpose(0, 1) * 2,
        lambda h: h.adjoint() * 2,
        lambda h: h.expand(2, *h.shape).sum(0).t(),
    ],
)
def test_a_matrix_is_turned_and_copied_by_rules_not_by_experiment(turned: Callable[[Tensor], Tensor]) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(turned(self.first(x)).mT).square().mean()

    x = torch.randn(BATCH, WIDTH)
    pipe = pipecompile.compile(Turning(), ["cpu", "cpu"], microbatches=3, costs="count", example_inputs=x)
    assert not any("found by experiment" in line for line in pipe.pipeline.report.microbatches)
