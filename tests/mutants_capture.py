"""Mutants of the capture: one thing in the graph, its regions or its effects is not what the model does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from broken import ROWS, WIDTH, Mutant, bypass, calls, captured, reads, wrap
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipecompile.capture import Captured, trace
from pipecompile.capture.input_reads import Values
from pipecompile.capture.origin import origin_of
from pipecompile.ops.modes import PLAIN, Region


class Net(nn.Module):
    """Four layers, with what a mutant is about in the middle; the output is the loss, beside the last features."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor], prepare: Callable[[Net], Any] = lambda net: None):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.middle = middle
        prepare(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        h = self.middle(self, h)
        out = self.last(torch.tanh(self.third(h)))
        return out.pow(2).mean(), out


def net(middle: Callable[[Net, Tensor], Tensor], prepare: Callable[[Net], Any] = lambda net: None) -> Callable[[], Net]:
    return lambda: Net(middle, prepare)


def x() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH)}


class Rounded(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def regions(graph: torch.fx.Graph, change: Callable[[Region], Region]) -> None:
    for node in graph.nodes:
        if "origin" in node.meta:
            node.meta["origin"] = replace(origin_of(node), region=change(origin_of(node).region))


def unwrite(graph: torch.fx.Graph, name: str) -> None:
    written = [node for node in graph.nodes if name in origin_of(node).writes]
    assert written
    for node in reversed(written):
        bypass(node)


def retarget(graph: torch.fx.Graph, name: str, function: Callable[..., Any]) -> None:
    for node in calls(graph, name):
        node.target = function


def stop_rounding(it: Captured) -> None:
    retarget(it.graph, "Rounded_apply", lambda x: torch.round(4 * x) / 4)


def lose_count(it: Captured) -> None:
    unwrite(it.graph, "count")


def lose_parameter_write(it: Captured) -> None:
    unwrite(it.graph, "gain")


def lose_hook(it: Captured) -> None:
    bypass(calls(it.graph, "with_hook")[0])


def swap_arguments(it: Captured) -> None:
    (node,) = calls(it.graph, "sub")
    node.args = node.args[::-1]


def no_region(it: Captured) -> None:
    regions(it.graph, lambda region: PLAIN)


def no_grad_around(it: Captured) -> None:
    node = calls(it.graph, "linear")[1]
    node.meta["origin"] = replace(origin_of(node), region=Region(False))


def detach_one_use(it: Captured) -> None:
    last = calls(it.graph, "linear")[-1]
    for node in reads(it.graph, "words.weight"):
        wrap(node, Tensor.detach, lambda user: user is last)


def other_parameter(it: Captured) -> None:
    (node,) = reads(it.graph, "third.bias")
    node.target = "second.bias"


def lose_dropout(it: Captured) -> None:
    bypass(calls(it.graph, "dropout")[0])


def other_probability(it: Captured) -> None:
    (node,) = calls(it.graph, "dropout")
    node.args, node.kwargs = (node.args[0],), {"p": 0.2, "training": True}


def lose_clones(it: Captured) -> None:
    for node in calls(it.graph, "clone"):
        bypass(node)


def lose_updates(it: Captured) -> Captured:
    assert it.attributes.updates
    return replace(it, attributes=replace(it.attributes, updates=()))


def other_left(it: Captured) -> None:
    node = calls(it.graph, "pow")[0]
    node.args = (node.args[0], 4)


def detach_left(it: Captured) -> Captured:
    output = next(node for node in it.graph.nodes if node.op == "output")
    (left,) = it.left
    node = next(n for n in it.graph.nodes if n.name == left.node)
    wrap(node, halved_gradient, lambda user: user is output)
    name = str(output.args[0][-1])
    updates = tuple(replace(update, to=lambda state: state.tensors[name]) for update in it.attributes.updates)
    return replace(it, left=(replace(left, node=name, name=name),), attributes=replace(it.attributes, updates=updates))


def halved_gradient(value: Tensor) -> Tensor:
    return value.detach() + 0.5 * (value - value.detach())


def freeze_numbers(it: Captured) -> Captured:
    assert it.numbers
    return replace(it, numbers={name: lambda state: 0.25 for name in it.numbers})


def lose_keyword(it: Captured) -> None:
    (node,) = calls(it.graph, "gelu")
    node.kwargs = {}


def lose_residual(it: Captured) -> None:
    bypass(calls(it.graph, "add")[0])


def lose_index(it: Captured) -> None:
    (node,) = calls(it.graph, "setitem")
    bypass(node)


def freeze_buffer(it: Captured) -> Captured:
    (node,) = reads(it.graph, "scale")
    node.target = "_constant0"
    return replace(it, constants={**it.constants, "_constant0": it.tensors["scale"] + 1})


@contextmanager
def stale_read() -> Iterator[None]:
    """What Python reads is what the first three rows say, where the batch's holds for all."""

    def of_three(whole: Mapping[str, Tensor], parts: Any, *more: Any) -> Values:
        first = {name: tensor[:3] for name, tensor in whole.items()}
        return Values(first, [first], *more)

    with patch.object(trace, "Values", of_three), patch.object(Captured, "misread", lambda *given: ""):
        yield


# What the models do in the middle


def count(net: Net, h: Tensor) -> Tensor:
    net.count.add_(1)
    return h


def clamp(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.gain.clamp_(max=0.5)
    return h * net.gain


def hook(net: Net, h: Tensor) -> Tensor:
    h = h * 1.5
    h.register_hook(lambda gradient: 3 * gradient)
    return h


def difference(net: Net, h: Tensor) -> Tensor:
    return torch.sub(h, net.third(h))


def teacher(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        target = net.second(h)
    return h * target


def number_of_calls(net: Net, h: Tensor) -> Tensor:
    net.calls += 1
    return h


def one_left(net: Net, h: Tensor) -> Tensor:
    net.aux = h.pow(2).mean()
    return h


def write_row(net: Net, h: Tensor) -> Tensor:
    new = h * 2
    new[:, 0] = h[:, 1]
    return new


def renamed(net: Net, h: Tensor) -> Tensor:
    """A view of what is written afterwards, and its copy from before."""
    before = net.state.clone()
    net.state.mul_(2)
    return h * before + net.state


def buffer(name: str, value: float) -> Callable[[Net], None]:
    return lambda net: net.register_buffer(name, torch.full((WIDTH,), value))


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.last(h)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.middle(self.words(ids))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def ids() -> dict[str, Tensor]:
    labels = torch.randint(9, (ROWS, 4))
    padding = torch.arange(4) >= torch.tensor([4, 1, 2, 3, 1, 2, 4, 1, 3, 2])[:, None]
    return {"ids": torch.randint(9, (ROWS, 4)), "labels": labels.masked_fill(padding, -100)}


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) / lengths.max().item())


def lengths() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH), "lengths": torch.tensor([2, 1, 2, 1, 3, 7, 3, 2, 1, 2])}


class Repeated(Net):
    """With what the backward computes again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        h = checkpoint(lambda h: torch.tanh(self.second(torch.tanh(self.third(h)))), h, use_reentrant=False)
        out = self.last(h)
        return out.pow(2).mean(), out


def of_capture(
    name: str,
    broken: str,
    edit: Callable[[Captured], Any],
    model: Callable[[], nn.Module],
    inputs: Callable[[], Mapping[str, Tensor]] = x,
    **more: Any,
) -> Mutant:
    return Mutant(name, broken, captured(edit), model, inputs, **more)


CAPTURE = (
    of_capture(
        "custom backward lost",
        "a custom function is captured as the torch functions of its forward, without its backward",
        stop_rounding,
        net(lambda net, h: Rounded.apply(h)),
    ),
    of_capture(
        "buffer write forgotten",
        "`self.count.add_(1)` is not in the graph",
        lose_count,
        net(count, buffer("count", 0.0)),
    ),
    of_capture(
        "parameter write forgotten",
        "`self.gain.clamp_(max=0.5)` under `no_grad` is not in the graph",
        lose_parameter_write,
        net(clamp, lambda net: setattr(net, "gain", nn.Parameter(torch.ones(WIDTH)))),
        options={"microbatches": 1},
    ),
    of_capture("tensor hook dropped", "`h.register_hook(lambda g: 3 * g)` is not in the graph", lose_hook, net(hook)),
    of_capture("arguments swapped", "the graph computes `b - a` instead of `a - b`", swap_arguments, net(difference)),
    Mutant(
        "stale read",
        "a number that Python reads from an input is that of the first microbatch, and no guard checks it",
        stale_read,
        Lengths,
        lengths,
    ),
    of_capture("no_grad dropped", "a region under `no_grad` runs with gradients", no_region, net(teacher)),
    of_capture("no_grad added", "one layer runs without gradients", no_grad_around, net(lambda net, h: h)),
    of_capture(
        "autocast dropped",
        "the model's own autocast to bfloat16 is not entered",
        no_region,
        Cast,
        dtype=torch.float32,
        far=0.05,
    ),
    of_capture("tied weight detached", "one of two uses of a tied weight gets no gradient", detach_one_use, Tied, ids),
    of_capture(
        "wrong parameter read",
        "`second.bias` is read instead of `third.bias`, which has the same shape",
        other_parameter,
        net(lambda net, h: h),
        blamed="third",
    ),
    of_capture(
        "dropout dropped",
        "`F.dropout` is not in the graph",
        lose_dropout,
        net(lambda net, h: F.dropout(h, 0.5, net.training)),
        draws=True,
    ),
    of_capture(
        "dropout with another rate",
        "the rate is 0.2 instead of 0.5",
        other_probability,
        net(lambda net, h: F.dropout(h, 0.5, net.training)),
        draws=True,
    ),
    of_capture(
        "clone before a write dropped",
        "a buffer that is read before a write is read after it",
        lose_clones,
        net(renamed, buffer("state", 1.0)),
    ),
    of_capture(
        "attribute update dropped",
        "`self.calls += 1` has no effect",
        lose_updates,
        net(number_of_calls, lambda net: setattr(net, "calls", 0)),
    ),
    of_capture(
        "wrong stored value",
        "`self.aux`, an auxiliary loss, gets a wrong value",
        other_left,
        net(one_left),
        left=("aux",),
    ),
    of_capture(
        "half the gradient of a stored value",
        "`self.aux` has the right value, but passes on half of its gradient",
        detach_left,
        net(one_left),
        left=("aux",),
    ),
    of_capture(
        "random number frozen",
        "`random.random()` returns 0.25 in each call",
        freeze_numbers,
        net(lambda net, h: h * random.random()),
    ),
    of_capture(
        "keyword lost",
        '`F.gelu(h, approximate="tanh")` is captured without its keyword',
        lose_keyword,
        net(lambda net, h: F.gelu(h, approximate="tanh")),
    ),
    of_capture(
        "residual lost", "`h + layer(h)` becomes `h`", lose_residual, net(lambda net, h: torch.add(h, net.second(h)))
    ),
    of_capture("item write forgotten", "`new[:, 0] = ...` is not in the graph", lose_index, net(write_row)),
    of_capture(
        "buffer frozen",
        "a buffer is replaced by a wrong constant",
        freeze_buffer,
        net(lambda net, h: h * net.scale, buffer("scale", 0.7)),
    ),
)
