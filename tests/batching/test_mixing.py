"""What mixes samples in the middle of a model, what only seems to, and buffers that the whole batch writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import WIDTH, assert_step_equal
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError


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
    "standardised": lambda x: (x - x.mean(0)) / x.std(0),
    "running sum": lambda x: x.cumsum(0),
    "turned round": lambda x: x + x.flip(0),
    "largest": lambda x: x / x.abs().max(),
    "share of all": lambda x: x / x.norm(),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_samples_in_the_middle_is_refused_or_accepted_by_name(name: str) -> None:
    model = MixesInside(MIXES[name]).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    with pytest.raises(CaptureError, match=r"module 'centre'.*test_mixing\.py:\d+.*samples of the batch mix"):
        pipe(x)
    whole = pipecompile.compile(model, ["cpu", "cpu"], microbatches=1, costs="count")
    assert_step_equal(model, whole, {"x": x})
    accepted = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=3, costs="count", batching=pipecompile.Batching(allow_mixing=["centre"])
    )
    parts = torch.stack([model(part) for part in x.split(2)]).mean()
    torch.testing.assert_close(accepted(x), parts)


def test_numbers_of_rows_are_those_of_the_whole_batch() -> None:
    model = MixesInside(lambda x: x + torch.arange(x.shape[0], dtype=x.dtype)[:, None]).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
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
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    assert_step_equal(model, pipe, {"x": torch.randn(7, 4, WIDTH, dtype=torch.float64)})
    assert any("found by experiment" in line and "'experts'" in line for line in pipe.pipeline.report.microbatches)


class Places(nn.Module):
    """Each of two experts takes so many of the batch's rows; those that come too late go without."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        expert = torch.stack([x[:, 0] > 0, x[:, 0] <= 0], dim=1).long()
        before = (expert.cumsum(0) - 1) * expert
        return x * (before.sum(1) < self.places)[:, None]


class WithPlaces(nn.Module):
    def __init__(self, places: int) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), Places(places), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x))).square().mean()


def test_places_enough_for_a_microbatch_but_not_for_the_batch_are_refused() -> None:
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    model = WithPlaces(4).double()
    with pytest.raises(CaptureError, match=r"module 'experts'.*samples of the batch mix here"):
        pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")(x)
    fits = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    assert_step_equal(model, fits, {"x": x[:4]})
    with pytest.raises(CaptureError, match=r"module 'experts'.*samples of the batch mix here"):
        fits(x)  # a batch larger than the one that was tried out is tried out anew
    roomy = WithPlaces(16).double()
    pipe = pipecompile.compile(roomy, ["cpu", "cpu"], microbatches=4, costs="count")
    assert_step_equal(roomy, pipe, {"x": x})
    assert any("found by experiment" in line and "'experts'" in line for line in pipe.pipeline.report.microbatches)


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


class Capacity(nn.Module):
    """So many tokens of the whole batch are worked on, the first of them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.work, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        place = torch.argsort(torch.argsort((tokens[:, 0] > -1e9).long(), stable=True))
        done = self.dropout(self.work(tokens)) * (place < 40).to(tokens.dtype)[:, None]
        return x + done.reshape(x.shape)


class WithCapacity(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(WIDTH, WIDTH), Capacity(dropout)
        self.last = nn.Linear(WIDTH, 3 * WIDTH)  # more than may run behind the stages

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x))).square().mean()


def test_what_was_tried_out_on_short_samples_is_tried_out_anew_on_long_ones() -> None:
    model = WithCapacity().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    assert_step_equal(model, pipe, {"x": torch.randn(8, 4, WIDTH, dtype=torch.float64)})
    with pytest.raises(CaptureError, match=r"module 'experts'.*samples of the batch mix here"):
        pipe(torch.randn(8, 16, WIDTH, dtype=torch.float64))
    model.zero_grad()
    assert_step_equal(model, pipe, {"x": torch.randn(8, 3, WIDTH, dtype=torch.float64)})


def test_dropout_hides_no_mixing() -> None:
    pipe = pipecompile.compile(WithCapacity(0.3).double(), ["cpu", "cpu"], microbatches=4, costs="count")
    with pytest.raises(CaptureError, match=r"module 'experts'.*samples of the batch mix here"):
        pipe(torch.randn(8, 16, WIDTH, dtype=torch.float64))
    pipe(torch.randn(8, 4, WIDTH, dtype=torch.float64)).backward()
    assert any("found by experiment" in line and "'experts'" in line for line in pipe.pipeline.report.microbatches)


def test_buffers_are_written_once_a_batch_from_the_whole_batch() -> None:
    model, twin = Remembers().double(), Remembers().double()
    twin.load_state_dict(model.state_dict())
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
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


# Branches on the batch


def stops_early(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + x.sin()
        if x.abs().max() > 5.0:
            break
    return x


def clips_if_any(x: Tensor) -> Tensor:
    return x.clamp(-1, 1) if bool((x > 3.0).any()) else x


def by_the_mean(x: Tensor) -> Tensor:
    return x.tanh() if x.mean().item() > 0.3 else x.sin()


def skips_what_nobody_wants(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(WIDTH):
        chosen = x.argmax(-1) == i
        if chosen.any():
            out = out + chosen[:, None] * x * (i + 1)
    return out


def row_by_row(x: Tensor) -> Tensor:
    return torch.stack([row.tanh() if row.abs().max() > 1.0 else row.sin() for row in x])


def halves_the_huge(x: Tensor) -> Tensor:
    return x / 2 if x.abs().max().item() > 1e4 else x.tanh()


def smooths_the_tiny(x: Tensor) -> Tensor:
    return x * 2 if x.abs().min() < 1e-9 else x.tanh()


def solves(x: Tensor) -> Tensor:
    """Some steps beyond the first, for the samples of any trial."""
    z = torch.zeros_like(x)
    for _ in range(40):
        new = torch.tanh(z / 3 + x)
        error, z = (new - z).norm(), new
        if error.item() / z.norm().item() < 0.3:
            break
    return z


def refuses_the_huge(x: Tensor) -> Tensor:
    if x.abs().max().item() > 1e4:
        raise ValueError("diverged")
    return x.tanh()


def stops_when_all_have(x: Tensor) -> Tensor:
    """A sample that has stopped stays as it is."""
    for _ in range(80):
        if x.abs().max().item() < 0.5:
            break
        x = torch.where(x.abs().amax(-1, keepdim=True) < 0.5, x, x * 0.7)
    return x


def stops_by_their_norm(x: Tensor) -> Tensor:
    for _ in range(20):
        left = x.norm(dim=-1, keepdim=True) > 0.1
        if left.double().mean().item() == 0 or (x * left).norm().detach() < 0.1:
            break
        x = torch.where(left, x * 0.5, x)
    return x


@pytest.mark.parametrize(
    "branches", [stops_early, clips_if_any, by_the_mean, halves_the_huge, smooths_the_tiny, solves]
)
def test_a_branch_that_the_batch_decides_for_all_rows_is_refused(branches: Callable[[Tensor], Tensor]) -> None:
    """Though on this batch all microbatches take the same way, as the whole does: no comparison would tell."""
    model = MixesInside(branches).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64) * 1e-3
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    with pytest.raises(CaptureError, match="samples of the batch mix"):
        pipe(x)
    whole = pipecompile.compile(model, ["cpu", "cpu"], microbatches=1, costs="count")
    for size in (1e-3, 1.0, 100.0):
        assert_step_equal(model, whole, {"x": x * size})


@pytest.mark.parametrize(
    "branches", [skips_what_nobody_wants, row_by_row, refuses_the_huge, stops_when_all_have, stops_by_their_norm]
)
def test_a_branch_that_decides_for_the_rows_that_it_asked_is_exact(branches: Callable[[Tensor], Tensor]) -> None:
    model = MixesInside(branches).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    for size in (1e-3, 1.0, 100.0):
        assert_step_equal(model, pipe, {"x": torch.randn(6, WIDTH, dtype=torch.float64) * size})


class Doubled(torch.autograd.Function):
    """Has no batching rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class BesideWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.words = nn.Linear(WIDTH, WIDTH), nn.Embedding(8, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return Doubled.apply(self.first(x)) + self.words(ids).sum(1)  # type: ignore[no-any-return]


def test_an_experiment_limits_only_the_sizes_that_it_has_seen() -> None:
    model = BesideWords().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    for rows, length, captures in ((4, 5, 1), (4, 50, 1), (40, 5, 2)):
        x, ids = torch.randn(rows, WIDTH, dtype=torch.float64), torch.randint(8, (rows, length))
        torch.testing.assert_close(pipe(x, ids), model(x, ids))
        assert pipe.pipeline.captures == captures
    assert "samples were shown not to mix only up to size" in pipe.pipeline.report.captures[1]


class SizeBehindTheStages(nn.Module):
    """What has no rule runs behind the stages, and takes a number that follows from the sizes of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(self.first(x)))
        return h.contiguous().as_strided(h.shape, (h.shape[1] * WIDTH, WIDTH, 1))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_size_of_an_input_that_requires_a_gradient_is_known_behind_the_stages(wants_gradient: bool) -> None:
    torch.manual_seed(0)
    model = SizeBehindTheStages().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    for shape in ((8, 5), (5, 4)):
        values = torch.randn(*shape, WIDTH, dtype=torch.float64)
        found = []
        for call in (pipe, model):
            model.zero_grad()
            x = values.clone().requires_grad_(wants_gradient)
            call(x).square().sum().backward()
            found.append({**{name: p.grad for name, p in model.named_parameters()}, "x": x.grad})
        assert (found[0]["x"] is not None) == wants_gradient
        for name, gradient in found[1].items():
            if gradient is not None:
                torch.testing.assert_close(found[0][name], gradient, msg=name)
    assert pipe.pipeline.captures == 1


class HasAHead(nn.Module):
    """The batch's mean is subtracted, then come weights: so many of ``width`` columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(hidden - hidden.mean(0)).square().mean()


def test_a_third_of_the_weights_may_work_on_the_whole_batch() -> None:
    model, x = HasAHead(WIDTH).double(), torch.randn(7, WIDTH, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    assert_step_equal(model, pipe, {"x": x})
    assert len(pipe.pipeline.stages) == 2
    assert "work on the whole batch, behind the stages: head.weight" in pipe.pipeline.report.microbatches
    tail = [stage.tail for stage in pipe.pipeline.memory.stages]
    assert tail[0] == 0
    assert tail[1] >= model.head.weight.nbytes


def test_more_of_the_weights_are_refused_with_their_share() -> None:
    pipe = pipecompile.compile(HasAHead(2 * WIDTH).double(), ["cpu", "cpu"], microbatches=3, costs="count")
    with pytest.raises(CaptureError, match=r"goes through head\.weight .* has 4\d% of the weights \(a third at most"):
        pipe(torch.randn(7, WIDTH, dtype=torch.float64))


class Normalized(HasAHead):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.norm(self.headed(hidden - hidden.mean(0))).square().mean()

    def headed(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class NormalizedAlone(Normalized):
    def headed(self, hidden: Tensor) -> Tensor:
        return hidden


class NormalizedBySample(Normalized):
    """The statistics of each channel of each sample, as style transfer computes them."""

    def headed(self, hidden: Tensor) -> Tensor:
        channels = self.head(hidden).reshape(1, -1, WIDTH // 2)
        return F.batch_norm(channels, None, None, training=True).reshape(hidden.shape)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.headed(hidden - hidden.mean(0)).exp().mean()


@pytest.mark.parametrize("model", [Normalized(WIDTH), NormalizedAlone(WIDTH)], ids=["of weights", "alone"])
def test_a_batch_normalization_behind_the_mixing_is_refused(model: nn.Module) -> None:
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    pipe = pipecompile.compile(model.double(), ["cpu", "cpu"], microbatches=3, costs="count")
    with pytest.raises(CaptureError, match=r"goes through a batch normalization \(module 'norm'"):
        pipe(x)
    pipe.eval()
    torch.testing.assert_close(pipe(x), model(x))


def test_a_batch_normalization_of_channels_of_samples_may_follow_the_mixing() -> None:
    model, x = NormalizedBySample(WIDTH).double(), torch.randn(7, WIDTH, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    assert_step_equal(model, pipe, {"x": x})
    assert "work on the whole batch, behind the stages: head.weight" in pipe.pipeline.report.microbatches


def test_a_module_may_not_see_microbatches_of_what_needs_the_whole_batch() -> None:
    model, x = NormalizedAlone(WIDTH).double(), torch.randn(7, WIDTH, dtype=torch.float64)
    batching = pipecompile.Batching(allow_mixing=["norm"])
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count", batching=batching)
    with pytest.raises(CaptureError, match=r"reads what needs the whole batch \(the model's own forward.* use micro"):
        pipe(x)
