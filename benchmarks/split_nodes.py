"""What it takes to split the backward of a node, by function and size: seconds beside those of the whole backward.

    python benchmarks/split_nodes.py
    python benchmarks/split_nodes.py --only conv2d --seconds 5

A chain of equal nodes with a GELU after each, whole and split (``ops/split_backward.py``), on one thread. Both run in
turn; figures are medians per node, in microseconds of the thread.

    F           a forward, and what it takes longer if the backward is to be split
    B           a whole backward, the addition to the gradient included
    B + W       what both halves take longer, and relative to the whole
    W           its part of both
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from pipecompile.ops.split_backward import SPLIT, Queue, queued

NODES = 8  # of a chain
LEAST = 6  # runs


@dataclass(frozen=True)
class Case:
    """A chain of one function: the shape of its input, and those of the weights of each node."""

    function: str
    x: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    groups: int = 1

    def __str__(self) -> str:
        shape = " ".join(map(str, self.weights[0]))
        return f"{self.function}, input {' x '.join(map(str, self.x))}, weight {shape.replace(' ', ' x ')}"


def dense(rows: int, width: int) -> Case:
    return Case("linear", (rows, width), ((width, width), (width,)))


def convolution(batch: int, channels: int, size: int, kernel: int, groups: int = 1, dims: int = 2) -> Case:
    shape = (channels, channels // groups, *(kernel,) * dims)
    return Case(f"conv{dims}d", (batch, channels, *(size,) * dims), (shape, (channels,)), groups)


CASES = (
    *(dense(rows, width) for rows, width in ((4, 16), (64, 64), (64, 256), (128, 256), (256, 512), (64, 1024))),
    Case("addmm", (128, 256), ((256, 256), (256,))),
    Case("matmul", (128, 256), ((256, 256),)),
    Case("embedding", (128,), ((2000, 256),)),
    Case("embedding", (2048,), ((2000, 256),)),
    convolution(2, 4, 8, 3),
    convolution(4, 16, 16, 3),
    convolution(4, 32, 32, 3),
    convolution(8, 64, 14, 3),
    convolution(4, 64, 28, 3),
    convolution(2, 256, 14, 3),
    convolution(4, 64, 28, 1),
    convolution(4, 256, 14, 1),
    convolution(4, 64, 128, 3, dims=1),
    convolution(2, 8, 8, 3, dims=3),
    convolution(2, 32, 14, 3, dims=3),
    convolution(4, 16, 16, 3, groups=16),
    convolution(4, 64, 28, 3, groups=64),
    convolution(4, 256, 14, 3, groups=256),
    convolution(4, 256, 128, 3, groups=256, dims=1),
)


@dataclass(frozen=True)
class Found:
    """Seconds per node."""

    whole: tuple[float, float]  # F, B
    split: tuple[float, float, float]  # F, B, W


def chain(case: Case, weights: Sequence[Sequence[Tensor]], x: Tensor, splits: bool) -> Tensor:
    """The output of a chain."""
    home = torch if case.function in ("addmm", "matmul") else F
    function: Callable[..., Tensor] = getattr(home, case.function)
    if splits:
        function = SPLIT[function]
    if case.function == "embedding":  # all read the same rows
        return torch.stack([function(x, w[0]) for w in weights]).sum(0)
    for w in weights:
        if case.function == "addmm":
            x = function(w[1], x, w[0])
        elif case.function.startswith("conv"):
            x = function(x, *w, padding=w[0].shape[-1] // 2, groups=case.groups)
        else:
            x = function(x, *w)
        x = F.gelu(x)
    return x


def timed(case: Case, seconds: float) -> Found:
    """The medians of runs in turn."""
    weights = [[nn.Parameter(0.05 * torch.randn(shape)) for shape in case.weights] for _ in range(NODES)]
    is_rows = case.function == "embedding"
    x = torch.randint(len(weights[0][0]), case.x) if is_rows else torch.randn(case.x, requires_grad=True)
    gradient = torch.randn_like(chain(case, weights, x, False))
    runs: dict[bool, list[list[float]]] = {False: [], True: []}
    began = time.perf_counter()
    while len(runs[True]) < LEAST or time.perf_counter() - began < seconds:
        for splits in (False, True):
            queue, x.grad = Queue(), None
            times = [time.thread_time()]
            with queued(queue) if splits else nullcontext():
                out = chain(case, weights, x, splits)
            times.append(time.thread_time())
            torch.autograd.backward(out, gradient)
            times.append(time.thread_time())
            assert len(queue.waiting) == splits * NODES
            queue.empty()
            times.append(time.thread_time())
            runs[splits].append([(b - a) / NODES for a, b in pairwise(times)])
            del out
    whole, split = ([median(column) for column in zip(*runs[it][1:], strict=True)] for it in (False, True))
    return Found((whole[0], whole[1]), (split[0], split[1], split[2]))


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    for case in CASES:
        if options.only not in str(case):
            continue
        it = timed(case, options.seconds)
        (f, b), (split_f, split_b, w) = it.whole, it.split
        us = [f"{1e6 * s:.0f}" for s in (f, b)]
        more = [f"{1e6 * s:+.0f}" for s in (split_f - f, split_b + w - b)]
        part = f"{w / (split_b + w):.2f}"
        name = "depthwise " * (case.groups > 1) + str(case)
        yield name, us[0], more[0], us[1], more[1], f"{(split_b + w) / b:.3f}", part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("node", "F, us", "longer", "B, us", "B + W longer", "relative", "W")
    for row in rows(options):
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
