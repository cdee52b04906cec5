"""Measures the links between the available devices: latency and bandwidth, from copies of two sizes.

A copy of n bytes takes ``latency + n / bandwidth`` seconds, so two sizes determine both. Copies go back and forth in a
row: a link is assumed equal in both directions, and the overhead of timing is small. Ranks on the same device pass a
reference, so nothing is copied or measured.

Figures that differ by no more than measurement noise are made equal, so that links of one kind stay equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf
from statistics import median

import torch

from pipecompile.ir.cluster import HANDED_OVER, Cluster, Link, Pair
from pipecompile.ops.accelerators import is_accelerator
from pipecompile.profile.meters import Clock

Copy = Callable[[torch.device, torch.device, int], float]  # (source, target, nbytes) -> seconds of a copy

SIZES = (1 << 12, 1 << 23)  # bytes
ROUNDS = 2  # round trips per timed run
ALIKE = 1.25  # figures up to this factor above the smallest are of one kind


def with_measured_links(cluster: Cluster, devices: Sequence[torch.device], copy: Copy | None = None) -> Cluster:
    """The cluster with measured links between its devices. Each pair of devices is measured once.

    Args:
        cluster: the devices.
        devices: the torch device of each rank; ranks may share one.
        copy: how to measure; by default ``copy_seconds``.
    """
    apart = list(combinations(dict.fromkeys(devices), 2))
    lines = [_line([(copy or copy_seconds)(*pair, nbytes) for nbytes in SIZES]) for pair in apart]
    latency, slope = _alike(line[0] for line in lines), _alike(line[1] for line in lines)
    links = {frozenset(ends): _link(latency[a], slope[b]) for ends, (a, b) in zip(apart, lines, strict=True)}
    pairs = [
        Pair(one, two, links.get(frozenset((devices[one], devices[two])), HANDED_OVER))
        for one, two in combinations(range(len(devices)), 2)
    ]
    usual = Counter(pair.link for pair in pairs).most_common(1)[0][0] if pairs else HANDED_OVER
    return replace(cluster, link=usual, pairs=tuple(p for p in pairs if p.link != usual), origin="measured")


def copy_seconds(source: torch.device, target: torch.device, nbytes: int) -> float:
    """Seconds of one copy, the median of several runs."""
    value = torch.empty(nbytes, dtype=torch.uint8, device=source)

    def run() -> None:
        for _ in range(ROUNDS):
            there = value.to(target, non_blocking=is_accelerator(target))
            there.to(source, non_blocking=is_accelerator(source))

    last = source if is_accelerator(source) else target  # a copy to the CPU waits by itself
    return Clock(last).repeated(run) / (2 * ROUNDS)


def _line(seconds: Sequence[float]) -> tuple[float, float]:
    """The latency and the seconds per byte, from the seconds of copies of ``SIZES``."""
    (small, large), (short, long) = SIZES, seconds
    slope = max(0.0, long - short) / (large - small)
    return max(0.0, short - small * slope), slope


def _link(latency: float, slope: float) -> Link:
    return Link(1 / slope if slope else inf, latency)


def _alike(figures: Iterable[float]) -> dict[float, float]:
    """For each figure, the median of its kind: the figures up to ``ALIKE`` times the smallest."""
    kinds: list[list[float]] = []
    for figure in sorted(figures):
        if not kinds or figure > ALIKE * kinds[-1][0]:
            kinds.append([])
        kinds[-1].append(figure)
    return {figure: median(kind) for kind in kinds for figure in kind}
