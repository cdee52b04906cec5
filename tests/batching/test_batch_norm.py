"""Batch normalisation over microbatches: each one's statistics, and running ones of each or of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipecompile
from pipecompile.errors import CaptureError, InputError

ROWS = [3, 2, 2]  # what 7 rows in 3 microbatches are


class Deep(nn.Module):
    """Two normalisations, of images and of features, with the first module's output read twice."""

    def __init__(self, momentum: float | None = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.first = nn.BatchNorm2d(5, momentum=momentum)
        self.linear = nn.Linear(5, 4)
        self.second = nn.BatchNorm1d(4, momentum=momentum, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.conv(x)).relu()
        return self.second(self.linear(hidden.mean((2, 3)) + hidden.amax((2, 3))))


class Shared(nn.Module):
    """One normalisation, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(x)))


class Checkpointed(nn.Module):
    """A normalisation whose forward is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


def whole_batch_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What torch's own normalisation makes of the running statistics if it is given all rows of a batch at once.

    The model itself runs on microbatches; what each call of a normalisation is given is collected, joined, and given
    to a copy of it. Returns the buffers of the copies, by name.
    """
    norms = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    }
    copies = deepcopy(norms)
    for batch in batches:
        given: dict[tuple[str, int], list[Tensor]] = {}
        for part in batch.split(ROWS):
            handles = [module.register_forward_pre_hook(_collecting(path, given)) for path, module in norms.items()]
            model(part)
            for handle in handles:
                handle.remove()
        for path, _ in sorted(given, key=lambda key: key[1]):
            copies[path](torch.cat(given[path, _]))
    return {f"{path}.{name}": buffer for path, copy in copies.items() for name, buffer in copy.named_buffers()}


def _collecting(path: str, given: dict[tuple[str, int], list[Tensor]]) -> Callable[..., None]:
    """A hook that keeps what each call of a module is given, under the path and the number of the call."""
    calls = count(1)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.setdefault((path, next(calls)), []).append(args[0].detach())

    return hook


def batches(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    shape = (7, 2, 6, 6) if isinstance(model, Deep) else (7, 4)
    return [torch.randn(shape, dtype=torch.float64) * (1 + i) + i for i in range(3)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("make", [Deep, Shared, Checkpointed])
def test_deferred_running_statistics_are_those_of_all_rows(make: Callable[[], nn.Module], stages: int) -> None:
    torch.manual_seed(0)
    model = make().double()
    data = batches(model)
    expected = whole_batch_statistics(deepcopy(model), data)
    pipe = pipecompile.compile(
        model, ["cpu"] * stages, microbatches=3, batching=pipecompile.Batching(batch_norm="deferred")
    )
    for x in data:
        pipe(x).square().sum().backward()
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert found
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_normalisation_of_a_model_has_the_unsplit_models_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    unsplit = deepcopy(model)
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=3, batching=pipecompile.Batching(batch_norm="deferred")
    )
    for x in batches(model):
        pipe(x).sum().backward()
        unsplit(x).sum().backward()
    for (name, buffer), expected in zip(model.named_buffers(), unsplit.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("batch_norm", ["microbatch", "deferred"])
def test_gradients_are_those_of_microbatches_either_way(batch_norm: str) -> None:
    torch.manual_seed(0)
    model = Deep().double()
    unsplit = deepcopy(model)
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=3, batching=pipecompile.Batching(batch_norm=batch_norm)
    )  # type: ignore[arg-type]
    x = batches(model)[0]
    pipe(x).square().sum().backward()
    for part in x.split(ROWS):
        unsplit(part).square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), unsplit.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    once = pipe.pipeline.report.microbatches
    assert any("each microbatch's statistics" in line for line in once)
    moved = [line for line in once if "first.running_mean" in line]
    assert len(moved) == 1
    assert moved[0].startswith("written once per batch" if batch_norm == "deferred" else "written once per microbatch")


def test_by_default_running_statistics_move_with_each_microbatch() -> None:
    torch.manual_seed(0)
    model = Deep().double()
    unsplit = deepcopy(model)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3)
    x = batches(model)[0]
    pipe(x).sum().backward()
    for part in x.split(ROWS):
        unsplit(part)
    for name in ("first.running_mean", "first.running_var", "second.running_mean", "second.running_var"):
        torch.testing.assert_close(model.get_buffer(name), unsplit.get_buffer(name), rtol=1e-12, atol=1e-13)
    assert model.first.num_batches_tracked == 1


def test_evaluation_reads_deferred_statistics_and_moves_none() -> None:
    torch.manual_seed(0)
    model = Deep().double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=3, batching=pipecompile.Batching(batch_norm="deferred")
    )
    x = batches(model)[0]
    pipe(x).sum().backward()
    pipe.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        torch.testing.assert_close(pipe(x), model(x), rtol=1e-12, atol=1e-13)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    pipe.train()
    assert pipe.pipeline.verify(x).exact


def test_statistics_without_running_ones_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=3, batching=pipecompile.Batching(batch_norm="deferred")
    )
    pipe(batches(model)[0]).sum().backward()
    assert any("each microbatch's statistics" in line for line in pipe.pipeline.report.microbatches)


class Reads(nn.Module):
    """A model that reads the statistics that its normalisation has just moved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))).square().mean() + self.norm.running_mean.sum()


def test_without_momentum_statistics_are_the_average_of_those_of_microbatches() -> None:
    torch.manual_seed(0)
    model = Deep(momentum=None).double()
    unsplit, pipe = deepcopy(model), pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    for _ in range(3):
        x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
        output, expected = pipe(x), torch.cat([unsplit(part) for part in x.split(2)])
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    gradients = dict(unsplit.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)
    assert model.first.num_batches_tracked == 9
    torch.testing.assert_close(dict(model.named_buffers()), dict(unsplit.named_buffers()))
    assert any(
        "uses each microbatch's statistics (module 'first'" in line for line in pipe.pipeline.report.microbatches
    )


class Mixes(nn.BatchNorm1d):
    """Not what the classes of torch compute."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0) if float(x.detach().mean()) < 1e9 else x


@pytest.mark.parametrize("how", ["subclass", "hook", "forward of its own"])
def test_what_a_normalization_kept_whole_does_in_addition_is_not_taken_for_one(how: str) -> None:
    norm = Mixes(4) if how == "subclass" else nn.BatchNorm1d(4, momentum=None)
    if how == "hook":
        norm.register_forward_hook(lambda module, args, out: out * args[0].softmax(0))
    if how == "forward of its own":
        norm.forward = lambda x: Mixes.forward(norm, x)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2))
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=3, costs="count")
    with pytest.raises(CaptureError, match="samples of the batch mix here"):
        pipe(torch.randn(6, 4))


def test_deferred_statistics_that_the_model_reads_are_refused() -> None:
    pipe = pipecompile.compile(
        Reads(), ["cpu", "cpu"], microbatches=3, batching=pipecompile.Batching(batch_norm="deferred")
    )
    with pytest.raises(CaptureError, match=r"the model reads norm.running_mean, which batch_norm='deferred' updates"):
        pipe(torch.randn(7, 4))


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_norm='synced' is not known; it must be 'microbatch' or 'deferred'"):
        pipecompile.compile(Deep(), ["cpu"], batching=pipecompile.Batching(batch_norm="synced"))  # type: ignore[arg-type]
