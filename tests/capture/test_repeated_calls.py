"""A trace that does not run repeated calls is the trace that runs them all: nodes, sizes, memory, types, guards."""

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
from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.origin import origin_of
from pipecompile.capture.repeated_calls import RepeatedCalls, Result
from pipecompile.capture.repeated_views import RepeatedViews, Views
from pipecompile.ops.torch_internals import TorchDispatchMode, pytree


def facts(captured: Captured) -> dict[str, Any]:
    """All that a trace says, in comparable form."""
    memory: dict[Any, int] = {}
    return {
        "memory": [
            memory.setdefault(storage_key(leaf), len(memory))
            for node in captured.graph.nodes
            for leaf in pytree.tree_leaves(node.meta.get("val"))
            if isinstance(leaf, Tensor)
        ],
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
    offset = str(value.storage_offset()) if value.layout == torch.strided else ""
    return (
        str(value.shape),
        stride,
        offset,
        value.dtype,
        value.device,
        value.requires_grad,
        value.layout,
        value.is_conj(),
    )


class Counted:
    """How many calls were not run, and how many views were made again."""

    count = views = 0


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted, original, original_of = Counted(), Result.again, Views.of

    def count(self: Result, sources: Any) -> Any:
        counted.count += 1
        return original(self, sources)

    def count_views(self: Views, base: Any) -> Any:
        counted.views += 1
        return original_of(self, base)

    monkeypatch.setattr(Result, "again", count)
    monkeypatch.setattr(Views, "of", count_views)
    return counted


def both(make: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The facts of a trace that runs all calls, and of one that does not."""

    def traced() -> Any:
        model = make()
        return facts(capture(model, read_call(model.forward, args, kwargs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepeatedCalls, "known", lambda self, key: None)
        patch.setattr(RepeatedViews, "run", lambda self, func, args, kwargs: func(*args, **kwargs))
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


def of_views(y: Tensor, x: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    first, *_ = y.unbind(1)
    spread = first.unsqueeze(-1).expand(-1, D).transpose(0, 1).permute(1, 0)
    parts = y.split([1, D - 1], dim=1)
    last = x[:, -1:].squeeze(1).view(-1, 1).expand_as(y)
    corners = y.unfold(1, 2, 1).select(-1, 0).sum(dim=1, keepdim=True) + y.diagonal().sum()
    return torch.cat([b, a], dim=1) + spread + parts[1].sum() * parts[0] + last + y.detach() + corners


def in_views_of_views(y: Tensor, x: Tensor) -> Tensor:
    h = y.clone()
    rows = h.view(-1, 2, D // 2).transpose(0, 1)
    rows[0].mul_(2)
    rows.select(2, 1).add_(x[:, 0])
    h.narrow(1, 1, 2).t()[0].copy_(x[:, 1])
    return h * y


def of_complex_views(y: Tensor, x: Tensor) -> Tensor:
    z = torch.view_as_complex(y.view(-1, D // 2, 2).contiguous())
    return torch.view_as_real(z.conj() * z.conj().mT.mT).reshape(-1, D) + z.real.repeat(1, 2) + z.imag.repeat(1, 2)


def of_data_sized_views(y: Tensor, x: Tensor) -> Tensor:
    kept = y[y[:, 0] > 0]
    return y + kept.view(-1, 1, D).transpose(0, 2).sum() + kept[:, 1:].sum()


@pytest.mark.parametrize("function", [of_views, in_views_of_views, of_complex_views, of_data_sized_views])
def test_views_that_are_made_again(function: Callable[[Tensor, Tensor], Tensor], again: Counted) -> None:
    whole, short = both(lambda: Layers(function), (torch.randn(4, D),), {})
    assert short == whole
    assert again.views > 0


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


def test_a_dispatch_mode_of_the_models_own_sees_the_views_of_every_layer() -> None:
    class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
        views = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.views += func is torch.ops.aten.transpose.int
            return func(*args, **(kwargs or {}))

    def turned(y: Tensor, x: Tensor) -> Tensor:
        with Counts() as counts:  # type: ignore[no-untyped-call]
            y = y.transpose(0, 1).transpose(0, 1)
        return y * counts.views

    model, x = Layers(turned), torch.randn(4, D)
    captured = capture(model, read_call(model.forward, (x,), {}))
    numbers = [node.args[1] for node in captured.graph.nodes if node.op == "call_function" and "mul" in node.name]
    assert numbers == [2] * len(model.layers)
