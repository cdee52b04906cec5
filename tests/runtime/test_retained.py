"""Gradients at outputs of a call that reach them through other outputs: ``retain_grad()`` on hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import D, blocks

import pipecompile
from pipecompile.errors import CaptureError, ExactnessError, ExecutionError


class Hidden(nn.Module):
    """Returns what its parts compute, one from the other, and the loss if it gets targets; or keeps the first part."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = blocks(2), blocks(2), blocks(2)
        self.keeps = keeps
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h = self.one(x)
        if self.keeps:
            h.retain_grad()
            self.kept = h
        k = self.two(h)
        last = self.three(k)
        found = {"h": h, "k": k, "mean": x.mean() * h.sum(), "last": last + k}
        return found if y is None else {"loss": (last - y).square().mean(), **found}


def data(seed: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, y


def both(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Hidden(**options).double()
    return pipecompile.compile(copy.deepcopy(model), ["cpu"] * 2, microbatches=2, costs="count"), model


ROOTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "the loss": lambda out: out["loss"] * 3,
    "the loss and others": lambda out: out["loss"] + out["h"].sin().sum() + out["k"].square().sum(),
    "another output": lambda out: out["last"].square().sum(),
    "itself": lambda out: out["h"].square().sum(),
}


@pytest.mark.parametrize(
    ("root", "inside"), [(root, inside) for root in ROOTS for inside in (True, False) if inside or "loss" not in root]
)
def test_retained_gradients_are_the_unsplit_models(root: str, inside: bool) -> None:
    seen = []
    for module in both():
        found: list[Tensor | None] = []
        for seed in range(2):
            x, y = data(seed)
            out = module(x, y if inside else None)
            for name in ("h", "k", "last"):
                out[name].retain_grad()
            ROOTS[root](out).backward()
            found += [out[name].grad for name in ("h", "k", "last")]
        seen.append((found, {name: p.grad for name, p in module.named_parameters()}))
    assert seen[1][0][0] is not None
    torch.testing.assert_close(*seen)


def test_a_second_backward_adds_to_them() -> None:
    seen = []
    for module in both():
        out = module(data(0)[0])
        out["h"].retain_grad()
        out["last"].sum().backward(retain_graph=True)
        (out["k"].square().sum() + out["h"].sum()).backward()
        seen.append(out["h"].grad)
    torch.testing.assert_close(*seen)


def test_a_forward_may_ask_for_them() -> None:
    """As Grad-CAM does, in a hook."""
    seen = []
    for module in both(keeps=True):
        module(*data(0))["loss"].backward()
        seen.append(module.kept.grad)
    assert seen[1] is not None
    torch.testing.assert_close(*seen)


def test_what_cannot_be_known_is_refused() -> None:
    pipe, _ = both()
    out = pipe(data(0)[0])
    seen: list[Tensor] = []
    out["h"].register_hook(seen.append)
    with pytest.raises(
        ExecutionError, match=r"a hook on output .* of shape \(5, 10\) waits for .*call retain_grad\(\)"
    ):
        out["last"].sum().backward()


class Shared(nn.Module):
    """Returns a value of its weights alone, and a later one that is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.body = nn.Parameter(torch.rand(3)), blocks(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale.exp()
        return scale, self.body(x) * scale.sum()


def test_an_output_without_rows_is_refused() -> None:
    pipe = pipecompile.compile(Shared().double(), ["cpu"] * 2, microbatches=2, costs="count")
    scale, last = pipe(data(0)[0])
    scale.retain_grad()
    with pytest.raises(ExecutionError, match=r"of shape \(3,\), which has no batch dimension.*microbatches=1"):
        last.sum().backward()


def test_a_forward_hook_retains_the_gradient_of_a_layer() -> None:
    """As for a class activation map."""
    found = []
    for module in both():
        kept: dict[str, Tensor] = {}

        def hook(layer: nn.Module, args: Any, out: Tensor, kept: dict[str, Tensor] = kept) -> None:
            out.retain_grad()
            kept["out"] = out

        module.two.register_forward_hook(hook)
        module(data(0)[0])["last"].square().sum().backward()
        found.append((kept["out"].detach(), kept["out"].grad))
    torch.testing.assert_close(*found)
    assert found[1][1].abs().max() > 0


def test_a_backward_hook_that_stores_the_gradient_of_a_microbatch_is_refused() -> None:
    pipe, _ = both()
    kept: dict[str, Tensor] = {}
    pipe.two[0].register_full_backward_hook(lambda module, given, come: kept.__setitem__("gradient", come[0]))
    with pytest.raises(ExactnessError, match=r"hook of module 'two\.0' runs once per microbatch, .*retain_grad"):
        pipe(*data(0))
    assert kept == {}


def test_numbers_that_a_hook_reads_are_refused_with_the_line_and_what_to_do() -> None:
    pipe, _ = both()
    seen: list[float] = []
    pipe.two[0].register_forward_hook(lambda module, args, out: seen.append(out.std().item()))
    with pytest.raises(CaptureError, match=r"test_retained\.py:\d+: .* changes seen, .*in a hook, store the tensor"):
        pipe(*data(0))
    assert seen == []


def test_a_forward_hook_beside_a_backward_hook_is_refused_with_what_gives_the_gradient() -> None:
    pipe, _ = both()
    kept: dict[str, Tensor] = {}
    pipe.two[0].register_forward_hook(lambda module, args, out: kept.__setitem__("out", out))
    pipe.two[0].register_full_backward_hook(lambda module, given, come: kept.__setitem__("gradient", come[0]))
    with pytest.raises(CaptureError, match=r"'two\.0' is kept whole for its backward hook: .* call retain_grad\(\)"):
        pipe(*data(0))
    assert kept == {}
