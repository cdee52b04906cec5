"""What Python reads from inputs, over several microbatches: theirs, the whole batch's, or each one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Run, assert_same, step
from torch import Tensor, nn
from toys import D, mean_square

import pipecompile
from pipecompile.capture import captured


class Reads(nn.Module):
    """Two layers with a function of their result and a mask between them."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(D, D), Between(body), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), mask))


class Between(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        return self.body(h, mask)


def _checked(h: Tensor, mask: Tensor) -> Tensor:
    if mask.sum().item() != h.shape[0] * 3:
        raise ValueError("not three a row")
    return h * mask.sum().item()


def _longest(h: Tensor, mask: Tensor) -> Tensor:
    return h * int(mask.sum(1).max())


def _share(h: Tensor, mask: Tensor) -> Tensor:
    return h / mask.sum().item()


def _padded(h: Tensor, mask: Tensor) -> Tensor:
    return h * 2 if mask.all() else h * mask.sum(1, keepdim=True)


def _mask(*lengths: int) -> Tensor:
    return (torch.arange(5) < torch.tensor(lengths)[:, None]).long()


def _floats(batch: int) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def _two(body: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> tuple[Run, nn.Module, Any, pipecompile.Pipeline]:
    model = Reads(body)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    inputs = (_floats(4), mask), {}
    return step(pipe, model, mean_square, inputs), model, inputs, pipe


def test_a_number_is_the_whole_batch_s_even_where_the_microbatches_agree_in_another() -> None:
    actual, model, inputs, pipe = _two(_checked, _mask(3, 3, 3, 3))
    assert_same(actual, step(model, model, mean_square, inputs))
    assert pipe.pipeline.report.guards


@pytest.mark.parametrize("body", [_longest, _padded])
def test_a_largest_number_and_a_yes_or_no_are_the_whole_batch_s(body: Any) -> None:
    actual, model, inputs, pipe = _two(body, _mask(5, 5, 2, 4))
    assert_same(actual, step(model, model, mean_square, inputs))
    assert not pipe.pipeline.report.notes


def test_where_microbatches_read_other_counts_the_batch_is_one_microbatch() -> None:
    with pytest.warns(UserWarning, match="run as one microbatch"):
        actual, model, inputs, _ = _two(_share, _mask(1, 5, 2, 3))
    assert_same(actual, step(model, model, mean_square, inputs))


def test_a_later_call_whose_microbatches_no_longer_agree_is_captured_again() -> None:
    actual, model, inputs, pipe = _two(_share, _mask(2, 3, 3, 2))
    assert_same(actual, step(model, model, mean_square, inputs))
    later = (_floats(4), _mask(1, 5, 2, 3)), {}
    with pytest.warns(UserWarning, match="run as one microbatch"):
        found = step(pipe, model, mean_square, later)
    assert_same(found, step(model, model, mean_square, later))
    assert pipe.pipeline.captures == 2


def test_microbatches_of_two_sizes_go_by_the_whole_batch_too() -> None:
    model = Reads(_longest)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    inputs = (_floats(5), _mask(1, 2, 3, 4, 5)), {}
    assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))


def _short(h: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.size(1)).expand(mask.size(0), -1)
    return h * 2 if (places < 6).all() else h * 3


def test_what_sizes_alone_decide_is_computed_once_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _, pipe = _two(_short, _mask(1, 5, 2, 3))
    computed, bare = list[Any](), captured.called_bare
    monkeypatch.setattr(captured, "called_bare", lambda *args: computed.append(args) or bare(*args))
    for widths in ([5, 5, 6, 6, 7, 7], [5, 6, 7]):
        for width in widths:
            inputs = (_floats(4), torch.ones(4, width).long()), {}
            assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))
        assert bool(computed) == (widths[1] == 5)
        computed.clear()


def test_what_values_decide_is_computed_in_each_call() -> None:
    _, model, _, pipe = _two(_padded, _mask(5, 5, 5, 5))
    for lengths in ((5, 5, 5, 5), (1, 5, 2, 3), (5, 5, 5, 5)):
        inputs = (_floats(4), _mask(*lengths)), {}
        assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))


class GuardsAgainstNan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h if torch.isfinite(h).all() else torch.nan_to_num(h))


def test_a_read_in_the_models_own_forward_is_not_advised_to_keep_the_model_whole() -> None:
    pipe = pipecompile.compile(GuardsAgainstNan(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(
        pipecompile.CaptureError,
        match=r"own forward.*'first\.\w+', which training changes; move it into a module.*store the tensor",
    ):
        pipe(torch.randn(4, 4))
