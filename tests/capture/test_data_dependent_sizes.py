"""Sizes that only data tells: what a mask lets through, what is not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, microbatched, step
from torch import Tensor, nn
from toys import D

import pipecompile
from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.errors import CaptureError
from pipecompile.ops.symbols import resolve


class Aligned(nn.Module):
    """An alignment loss in the root's own forward; its targets are what the mask of the labels lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        log_probs = F.log_softmax(self.body(x), -1).transpose(0, 1)
        mask = labels >= 0
        frames = torch.full((x.shape[0],), x.shape[1])
        return F.ctc_loss(log_probs, labels.masked_select(mask), frames, mask.sum(-1), blank=4, zero_infinity=True)


class Routed(nn.Module):
    """Each token goes through one of two layers, by a language id among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.adapters = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.last = nn.Linear(D, D)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        h = self.first(x)
        out = torch.zeros_like(h)
        for i, adapter in enumerate(self.adapters):
            out[language == i] = adapter(h[language == i])
        return self.last(out).pow(2).mean()


def _aligned(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + length)
    labels = torch.randint(0, 4, (batch, 3), generator=generator)
    labels[0, 2] = -1
    return torch.randn(batch, length, D, generator=generator, dtype=torch.float64), labels


def _routed(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + length)
    x = torch.randn(batch, length, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (batch, length), generator=generator)


@pytest.mark.parametrize(("kind", "inputs"), [(Aligned, _aligned), (Routed, _routed)], ids=["aligned", "routed"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_steps_with_sizes_that_data_tells_equal_the_unsplit_model(kind: Any, inputs: Any, microbatches: int) -> None:
    model = kind().double()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=microbatches, costs="count")
    for batch, length in ((4, 8), (6, 8), (4, 12)):
        args = inputs(batch, length), {}
        expected = microbatched(model, lambda loss: loss, args, microbatches, inside=True)
        assert_same(step(pipe, model, lambda loss: loss, args), expected)
    assert pipe.pipeline.captures == 1


def test_an_assignment_to_rows_by_number_is_not_taken_for_one_by_a_mask() -> None:
    class Zeroed(Routed):
        def forward(self, x: Tensor, language: Tensor) -> Tensor:
            h = self.first(x)
            h[language[:, 0]] = 0
            return self.last(h).pow(2).mean()

    model = Zeroed().double()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    with pytest.raises(CaptureError, match="an assignment to rows by index"):
        pipe(*_routed(4, 8))


def _captured(forward: Any, *args: Tensor) -> Captured:
    model = nn.Linear(1, 1)
    model.forward = forward
    return capture(model, read_call(forward, args, {}))


def test_planning_takes_a_size_that_data_tells_for_the_largest() -> None:
    trace = _captured(lambda x: x[x[:, 0] > 0].sum(), torch.ones(4, 3))
    assert (4, 3) in [spec.shape for node in summarize(trace).nodes if node.op != "input" for spec in node.outputs]
    assert list(trace.data_sizes.values()) == [4]


def test_a_size_that_must_equal_one_that_data_tells_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"depends on the model.s data"):
        _captured(lambda x: x[x[:, 0] > 0] + torch.ones(3, 3), torch.ones(4, 3))


def test_a_number_without_a_value_is_an_error_of_ours() -> None:
    trace = _captured(lambda x: x[x[:, 0] > 0].sum(), torch.ones(4, 3))
    (symbol,) = trace.data_sizes
    with pytest.raises(CaptureError, match="depends on the model's data"):
        resolve(symbol + 1, {})


def _kept_rows(h: Tensor, ids: Tensor) -> Tensor:
    """As graph convolutions drop self-loops of a graph without any: as many rows as there were, which data tells."""
    kept = h[ids[:, 0] >= 0]
    return kept + torch.ones(h.shape[0], 1, dtype=h.dtype)


def _through_csr(h: Tensor, ids: Tensor) -> Tensor:
    rows = torch.arange(h.shape[1] + 1)
    matrix = torch.sparse_csr_tensor(rows, rows[:-1].flip(0), torch.ones(h.shape[1], dtype=h.dtype))
    return h @ matrix.to_dense()


class Through(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), ids)).pow(2).mean()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("function", [_kept_rows, _through_csr])
def test_a_function_that_no_graph_holds_is_kept_whole(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Through(function).double()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    inputs = torch.randn(4, 4, dtype=torch.float64), torch.arange(4)[:, None]
    assert_same(step(pipe, model, lambda loss: loss, (inputs, {})), step(model, model, lambda loss: loss, (inputs, {})))
    assert any(f"function {function.__name__}" in note for note in pipe.pipeline.report.notes)
