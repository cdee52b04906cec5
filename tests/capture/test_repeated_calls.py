"""A trace that does not run repeated calls is the trace that runs them all: nodes, sizes, strides, types, guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D

from pipecompile.capture import Captured, capture, read_call
from pipecompile.capture.origin import origin_of
from pipecompile.capture.repeated_calls import RepeatedCalls, Result
from pipecompile.ops.torch_internals import pytree


def facts(captured: Captured) -> dict[str, Any]:
    """All that a trace says, in comparable form."""
    return {
        "nodes": [
            (node.format_node(), [_of(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))], origin_of(node))
            for node in captured.graph.nodes
        ],
        "guards": sorted(map(str, captured.guards)),
        "assumed": sorted(map(str, captured.assumed)),
        "outputs": captured.outputs,
        "groups": captured.groups,
        "notes": captured.notes,
        "symbolic": captured.symbolic,
    }


def _of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    stride = tuple(map(str, value.stride())) if value.layout == torch.strided else ()
    return str(value.shape), stride, value.dtype, value.device, value.requires_grad, value.layout


class Counted:
    """How many calls were not run."""

    count = 0


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted, original = Counted(), Result.again

    def count(self: Result, sources: Any) -> Any:
        counted.count += 1
        return original(self, sources)

    monkeypatch.setattr(Result, "again", count)
    return counted


def both(make: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The facts of a trace that runs all calls, and of one that does not."""

    def traced() -> Any:
        model = make()
        return facts(capture(model, read_call(model.forward, args, kwargs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepeatedCalls, "known", lambda self, key: None)
        whole = traced()
    return whole, traced()


@pytest.mark.parametrize("name", list(MODELS))
def test_traces_are_equal(name: str, again: Counted) -> None:
    args, kwargs = MODELS[name].inputs(4, MODELS[name].lengths[0])
    whole, short = both(MODELS[name].build, args, kwargs)
    assert short == whole


class Layers(nn.Module):
    """Three equal layers of a function of a linear layer's result and the layer's input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function(layer(x), x)
        return x.square().mean()


def written(y: Tensor, x: Tensor) -> Tensor:
    h = torch.sin(y)
    h.add_(x)
    return torch.cos(h) * y


def in_views(y: Tensor, x: Tensor) -> Tensor:
    h = y * 2
    h[:, 0].mul_(3)
    h.view(-1)[1:].sigmoid_()
    return h + x


def under_autocast(y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.linear(y, torch.ones(D, D))
    return inside.float() + F.linear(y, torch.ones(D, D))


def without_gradient(y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = y.exp().mean()
    return y.exp().mean() * x / scale + y.max(dim=1, keepdim=True).values


def by_data(y: Tensor, x: Tensor) -> Tensor:
    return y + y[y > 0].sum() + x[x > 0].sum()


def of_kinds(y: Tensor, x: Tensor) -> Tensor:
    return y * 1 + y * 1.0 + y * True + (y > 0) * 1 + torch.full_like(y, 2) + y.int() / 2


def drawn(y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(y, 0.5) + torch.rand_like(x) + F.dropout(y, 0.5, training=False)


def transposed(y: Tensor, x: Tensor) -> Tensor:
    return (y.t().contiguous() + y.t()).t() + y.t().clone().t() + x


def in_pieces(y: Tensor, x: Tensor) -> Tensor:
    half = y.shape[0] // 2
    pieces = y[: half * 2].reshape(half, 2, D)
    return (pieces * 2 + pieces.sin()).sum(dim=1).repeat_interleave(2, dim=0) + x[: half * 2]


@pytest.mark.parametrize(
    "function", [written, in_views, under_autocast, without_gradient, by_data, of_kinds, drawn, transposed, in_pieces]
)
def test_functions_that_write_view_draw_or_change_their_kind(
    function: Callable[[Tensor, Tensor], Tensor], again: Counted
) -> None:
    whole, short = both(lambda: Layers(function), (torch.randn(4, D),), {})
    assert short == whole
    assert again.count > 0


def test_a_repeated_layer_is_not_run(again: Counted) -> None:
    class Deep(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    def count(layers: int) -> int:
        again.count, model = 0, Deep(layers)
        capture(model, read_call(model.forward, (torch.ones(4, D),), {}))
        return again.count

    assert count(9) - count(4) == 2 * 5


def test_a_gradient_inside_forward_is_recorded(again: Counted) -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            h = x
            for layer in self.layers:
                h = torch.tanh(layer(h))
            (gradient,) = torch.autograd.grad(h.sum(), x, create_graph=True)
            return h.mean() + gradient.square().mean()

    x = torch.randn(4, D)
    whole, short = both(Penalty, (x,), {})
    assert short["outputs"] == whole["outputs"]
    model = Penalty()
    captured = capture(model, read_call(model.forward, (x,), {}))
    assert any("backward" in node.name for node in captured.graph.nodes)
