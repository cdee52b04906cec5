"""Where a microbatch could pass for the batch: each model gives the whole batch's numbers, or is refused by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile
from pipecompile.batching.rules.batch_types import Batched
from pipecompile.batching.rules.shape_ops import reshaped
from pipecompile.errors import CaptureError, ExecutionError

D = 6
Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """Something between two layers."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.body = body
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def floats(rows: int, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, *sizes, D, dtype=torch.float64, generator=generator)


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def pipe_of(model: nn.Module, microbatches: int = 4) -> Any:
    return pipecompile.compile(model, devices=["cpu", "cpu"], microbatches=microbatches, costs="count")


EXACT: dict[str, Body] = {
    "a squeeze that one row would lose its batch in": lambda h: h.unsqueeze(1).squeeze(),
    "a squeeze of the batch, which is none": lambda h: h.squeeze(0),
    "a squeeze of several": lambda h: h[:, None, None].squeeze((1, 2)),
    "the number of rows as a fill": lambda h: h * torch.full((D,), h.shape[0], dtype=h.dtype),
    "the number of rows as a tensor": lambda h: h / torch.tensor(float(h.shape[0]), dtype=h.dtype),
    "the number of rows": lambda h: h / h.shape[0] + h.shape[0],
    "the row before last, from the end": lambda h: h + torch.arange(h.shape[0], 0, -1, dtype=h.dtype)[:, None],
    "rows put side by side": lambda h: h.repeat(1, 2)[:, D:],
    "rows twice": lambda h: h.repeat(2, 1).view(2, -1, D).sum(0),
    "rows interleaved": lambda h: h.repeat_interleave(3, dim=0).view(-1, 3, D).mean(1),
    "halves of two copies": lambda h: sum(torch.cat([h, h * 2]).chunk(2)),
    "each row's own entry": lambda h: h * h[torch.arange(len(h.T[0])), h.argmax(-1)][:, None],
    "transposed": lambda h: (h.T.reshape(D, -1) * 2).T,
    "a table of entries": lambda h: h * torch.linspace(0, 1, 8, dtype=h.dtype)[h.argmax(-1)][:, None],
    "gathered": lambda h: h.gather(1, h.argsort(1)),
    "scattered": lambda h: torch.zeros_like(h).scatter(1, h.argsort(1), h),
}


@pytest.mark.filterwarnings("ignore:.*run as one microbatch")
@pytest.mark.parametrize("name", EXACT)
def test_a_step_is_the_whole_batchs(name: str) -> None:
    model = Around(EXACT[name])
    pipe = pipe_of(model)
    for rows in (5, 8, 1):
        inputs = (floats(rows),), {}
        assert_same(step(pipe, model, square, inputs), step(model, model, square, inputs))


MIXING: dict[str, Body] = {
    "gathered from one table by row": lambda h: h + torch.eye(12, D, dtype=h.dtype).gather(1, h.argsort(1)),
    "the largest by the number of rows": lambda h: h.topk(h.shape[0] // 2, dim=-1).values.sum(-1, keepdim=True) * h,
    "rolled by the number of rows": lambda h: h.roll(h.shape[0], -1),
    "scattered into other rows": lambda h: torch.zeros_like(h).index_add(0, h.argmax(-1).clamp(max=3), h),
    "rows assigned by number": lambda h: h.clone().index_fill(0, h.argmax(-1)[:1].clamp(max=1), 0.0),
    "a norm of all": lambda h: h / h.norm(),
    "a mean of all rows": lambda h: h - h.mean(0),
    "products of rows": lambda h: (h @ h.T) @ h,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_before_weights_is_refused_by_line(name: str) -> None:
    with pytest.raises(CaptureError, match=r"test_batching\.py:\d+: samples of the batch mix here"):
        pipe_of(Around(MIXING[name]))(floats(8))


def test_values_of_inputs_alone_give_gradients_to_inputs_that_want_them() -> None:
    class Penalty(Around):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean() + x.square().mean() + x.exp().sum() / x.shape[0]

    model = Penalty(torch.tanh)
    pipe = pipe_of(model)
    ours, theirs = floats(7).requires_grad_(), floats(7).requires_grad_()
    found, expected = pipe(ours), model(theirs)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


class Inserts(nn.Module):
    """Puts the features of pictures in the places that a mask marks, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pictures, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        inserted = self.words(x).masked_scatter(mask[..., None].expand_as(x), self.pictures(picture))
        return self.last(torch.tanh(inserted))


def _mask(places: list[list[int]]) -> Tensor:
    mask = torch.zeros(len(places), 4, dtype=torch.bool)
    for row, columns in enumerate(places):
        mask[row, columns] = True
    return mask


def test_entries_inserted_in_places_are_each_microbatchs_own_or_refused() -> None:
    model = Inserts()
    pipe = pipe_of(model, microbatches=2)
    even = (floats(4, 4), floats(4, 2), _mask([[0, 1], [2, 3], [0, 3], [1, 2]])), {}
    assert_same(step(pipe, model, square, even), step(model, model, square, even))
    uneven = (floats(4, 4), floats(4, 2), _mask([[0], [1], [0, 1, 2], [1, 2, 3]])), {}
    with pytest.raises(ExecutionError, match=r"8 entries|24 entries.*microbatches=1"):
        pipe(*uneven[0])
    whole = pipe_of(model, microbatches=1)
    assert_same(step(whole, model, square, uneven), step(model, model, square, uneven))


@pytest.mark.parametrize(
    ("kind", "before", "after", "expected"),
    [
        (Batched(0), (4, 3, 5), (12, 5), Batched(0, 1, 3)),
        (Batched(0, 1, 3), (12, 5), (4, 3, 5), Batched(0)),
        (Batched(1), (3, 4, 5), (12, 5), Batched(0, 3, 1)),
        (Batched(0, 3, 1), (12, 5), (3, 4, 5), Batched(1)),
        (Batched(1), (3, 4, 6), (3, 8, 3), Batched(1, 1, 2)),
        (Batched(0), (4, 6), (8, 3), Batched(0, 1, 2)),
        (Batched(0), (4, 3), (3, 4), None),
        (Batched(0), (4, 6), (2, 12), None),
    ],
)
def test_a_view_keeps_samples_in_their_blocks(
    kind: Batched, before: tuple[int, ...], after: tuple[int, ...], expected: Batched | None
) -> None:
    """Four rows; each entry's sample, by number, is where the kind says."""
    assert reshaped(kind, before, after, 4) == expected
    samples = torch.arange(4).repeat_interleave(kind.inner).repeat(kind.outer)
    shape = [1] * len(before)
    shape[kind.dim] = -1
    viewed = samples.view(shape).expand(before).reshape(after)
    if expected is not None:
        blocks = viewed.movedim(expected.dim, 0).reshape(expected.outer, 4, -1)
        assert (blocks == torch.arange(4)[None, :, None]).all()


def test_losses_of_rows_that_do_not_go_together_are_taken_whole() -> None:
    class Ranked(Around):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return F.triplet_margin_loss(h, h.flip(0), torch.zeros_like(h))

    model = Ranked(torch.tanh)
    inputs = (floats(7),), {}
    assert_same(step(pipe_of(model), model, lambda loss: loss, inputs), step(model, model, lambda loss: loss, inputs))
