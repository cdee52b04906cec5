"""Measures the links between the processes of a pipeline, and the speeds of their hosts.

Two ranks pass a packet to and fro, as transfers travel. Pairs of ranks that have no rank in common are measured at a
time: those at a distance d whose lower rank is in an even block of d ranks, then the others.

    d = 1   0-1 2-3 4-5, then 1-2 3-4      d = 2   0-2 1-3, then 2-4 3-5

What disturbs a run makes it longer, so the shortest one counts. Processes of one host have one speed, and figures that
differ by no more than measurement noise are made equal (``alike``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from pipecompile.distributed.lines import Lines
from pipecompile.ir.cluster import Cluster
from pipecompile.profile.links import alike, with_measured_links

SIZES = (1 << 10, 1 << 20)  # bytes
TRIPS = (25, 5)  # of each size
RUNS = 5  # of the computation
ALL_PAIRS = 16  # ranks up to which all pairs are measured; of more, those at distances 1, 2, 4, ...
WORK = 256  # rows and columns of the matrices that are multiplied

Rounds = Iterator[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Measured:
    """What one rank has measured.

    Attributes:
        work: seconds of a fixed computation.
        trips: for each pair of which it is the lower rank, the seconds of a transfer of each of ``SIZES``.
    """

    host: str
    work: float
    trips: dict[tuple[int, int], tuple[float, ...]]


def measure(lines: Lines, rank: int, host: str) -> Measured:
    """Measures with all other ranks, which call this at the same time."""
    trips = {}
    for pairs in rounds(len(lines.ranks)):
        pair = next((pair for pair in pairs if rank in pair), None)
        if pair is None:
            lines.begin()  # all ranks begin each round alike
            continue
        run = partial(_there_and_back, lines, sum(pair) - rank, rank == pair[0])
        for nbytes in SIZES:
            run(nbytes)
        lines.begin()  # the sizes are known from now on
        seconds = tuple(min(run(nbytes) for _ in range(count)) / 2 for nbytes, count in zip(SIZES, TRIPS, strict=True))
        if rank == pair[0]:
            trips[pair] = seconds
    return Measured(host, min(_work() for _ in range(RUNS)), trips)


def rounds(size: int) -> Rounds:
    """The pairs of ranks that are measured at a time, the lower rank first."""
    distances = range(1, size) if size <= ALL_PAIRS else [1 << k for k in range((size - 1).bit_length())]
    for distance in distances:
        for turn in (0, 1):
            pairs = [(r, r + distance) for r in range(size - distance) if r // distance % 2 == turn]
            if pairs:
                yield pairs


def with_measured_processes(cluster: Cluster, each: Sequence[Measured]) -> Cluster:
    """The cluster with the measured links and hosts; speeds are relative to rank 0, which profiles.

    Args:
        each: by rank.
    """
    hosts = list(dict.fromkeys(measured.host for measured in each))
    work = [median(measured.work for measured in each if measured.host == host) for host in hosts]
    kinds = alike(work)
    devices = []
    for rank, (device, measured) in enumerate(zip(cluster.devices, each, strict=True)):
        host = hosts.index(measured.host)
        speed = kinds[work[0]] / kinds[work[host]]
        devices.append(replace(device, name=f"{device.name}:{rank}", host=host, speed=speed))
    trips = {pair: seconds for measured in each for pair, seconds in measured.trips.items()}
    usual = [median(seconds) for seconds in zip(*trips.values(), strict=True)]

    def copy(one: int, two: int, nbytes: int) -> float:
        return trips.get((one, two), usual)[SIZES.index(nbytes)]

    return with_measured_links(replace(cluster, devices=tuple(devices)), range(len(each)), copy, SIZES)


def _there_and_back(lines: Lines, peer: int, begins: bool, nbytes: int) -> float:
    """The seconds that a packet takes to the peer and back, or from it and back."""
    kind, values = ("measured", nbytes), (torch.zeros(nbytes, dtype=torch.uint8),)
    get, start = lines.get(peer, kind), time.perf_counter()
    if begins:
        lines.put(peer, values, kind)
    get()
    if not begins:
        lines.put(peer, values, kind)
    return time.perf_counter() - start


def _work() -> float:
    matrix = torch.ones(WORK, WORK)
    start = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - start
