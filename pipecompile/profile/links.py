"""Measures the links between the available devices: latency and bandwidth, from copies of two sizes.

A copy of n bytes takes ``latency + n / bandwidth`` seconds, so two sizes determine both. A link is assumed equal in
both directions: it has the mean of their seconds. Ranks on the same device pass a reference, so nothing is copied or
measured.

Copies run as in a step: on a stream of the sender, or of the receiver if the sender is the CPU, from and to pinned
memory. Their time is that between two events of this stream. Longer copies run before the first event, so that the host
has queued everything by then, and the stream does not wait for it in between:

    host     queues  . . busy . .  begin  copies  end
    stream           |  busy  . . . . . . . . . | begin |  copies  | end

Figures that differ by no more than measurement noise are made equal, so that links of one kind stay equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import inf
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from pipecompile.ir.cluster import HANDED_OVER, Cluster, Link, Pair
from pipecompile.ops.accelerators import is_accelerator
from pipecompile.profile.meters import Clock

Place = TypeVar("Place", bound=Hashable)
Copy = Callable[[Place, Place, int], float]  # (source, target, nbytes) -> seconds of a copy

SIZES = (1 << 12, 1 << 23)  # bytes
COPIES = 2  # per timed run
BUSY = 4  # copies of the larger size before it, on an accelerator
ALIKE = 1.25  # figures up to this factor above the smallest are of one kind


def with_measured_links(
    cluster: Cluster, places: Sequence[Place], copy: Copy[Place], sizes: tuple[int, int] = SIZES
) -> Cluster:
    """The cluster with measured links between its devices. Each pair of places is measured once.

    Args:
        cluster: the devices.
        places: where each rank is, such as its torch device; ranks may share one.
        copy: how to measure.
        sizes: of the copies.
    """
    apart = list(combinations(dict.fromkeys(places), 2))
    lines = [_line([copy(*pair, nbytes) for nbytes in sizes], sizes) for pair in apart]
    latency, slope = alike(line[0] for line in lines), alike(line[1] for line in lines)
    links = {frozenset(ends): _link(latency[a], slope[b]) for ends, (a, b) in zip(apart, lines, strict=True)}
    pairs = [
        Pair(one, two, links.get(frozenset((places[one], places[two])), HANDED_OVER))
        for one, two in combinations(range(len(places)), 2)
    ]
    usual = Counter(pair.link for pair in pairs).most_common(1)[0][0] if pairs else HANDED_OVER
    return replace(cluster, link=usual, pairs=tuple(p for p in pairs if p.link != usual), origin="measured")


def with_measured_host(cluster: Cluster, devices: Sequence[torch.device]) -> Cluster:
    """The cluster with the measured link between its first accelerator and the host's memory, if it has one."""
    device = next(filter(is_accelerator, devices), None)
    if device is None:
        return cluster
    seconds = [copy_seconds(torch.device("cpu"), device, nbytes) for nbytes in SIZES]
    return replace(cluster, host=_link(*_line(seconds, SIZES)))


def copy_seconds(source: torch.device, target: torch.device, nbytes: int) -> float:
    """Seconds of one copy, the mean of both directions; of each, the median of several runs."""
    return (_one_way(source, target, nbytes) + _one_way(target, source, nbytes)) / 2


def _one_way(source: torch.device, target: torch.device, nbytes: int) -> float:
    """Seconds of one copy: by the clock of the device that copies, or of the host if there is none."""
    copier = source if is_accelerator(source) else target
    later = is_accelerator(copier)

    def run(value: Tensor, count: int) -> None:
        for _ in range(count):
            value.to(target, non_blocking=later)

    with torch.Stream(copier) if later else nullcontext():
        value, large = (
            torch.empty(size, dtype=torch.uint8, device=source, pin_memory=later and copier is target)
            for size in (nbytes, SIZES[-1])
        )
        return Clock(copier).repeated(partial(run, value, COPIES), partial(run, large, BUSY * later)) / COPIES


def _line(seconds: Sequence[float], sizes: tuple[int, int]) -> tuple[float, float]:
    """The latency and the seconds per byte, from the seconds of copies of two sizes."""
    (small, large), (short, long) = sizes, seconds
    slope = max(0.0, long - short) / (large - small)
    return max(0.0, short - small * slope), slope


def _link(latency: float, slope: float) -> Link:
    return Link(1 / slope if slope else inf, latency)


def alike(figures: Iterable[float]) -> dict[float, float]:
    """For each figure, the median of its kind: the figures up to ``ALIKE`` times the smallest."""
    kinds: list[list[float]] = []
    for figure in sorted(figures):
        if not kinds or figure > ALIKE * kinds[-1][0]:
            kinds.append([])
        kinds[-1].append(figure)
    return {figure: median(kind) for kind in kinds for figure in kind}
