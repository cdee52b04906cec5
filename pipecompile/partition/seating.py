"""Which devices run which stage, and what the solver sees of them: a seat for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from math import inf

from pipecompile.cluster import Cluster, Link
from pipecompile.partition.problem import Seat
from pipecompile.partition.training import Training


@dataclass(frozen=True)
class Seating:
    """Stages with so many replicas each on the devices of a cluster, one after the other, and round again.

    To the solver a stage with r replicas is a seat r times as fast as the slowest of their devices, with the memory of
    the smallest.
    """

    cluster: Cluster
    replicas: tuple[int, ...]  # stage -> devices that run it

    @staticmethod
    def of(num_stages: int, cluster: Cluster, replicas: Sequence[int] = ()) -> Seating:
        """So many stages, by default without replicas."""
        return Seating(cluster, tuple(replicas[:num_stages]) or (1,) * num_stages)

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """stage -> ranks that run it"""
        begin = [sum(self.replicas[:stage]) for stage in range(len(self.replicas))]
        return tuple(
            tuple(place % len(self.cluster) for place in range(first, first + count))
            for first, count in zip(begin, self.replicas, strict=True)
        )

    @cached_property
    def typical_link(self) -> Link:
        """The mean of the links from each stage to the next: a cut costs the same wherever it is."""
        pairs = [pair for here, there in pairwise(self.ranks) for pair in product(here, there)]
        links = [self.cluster.between(*pair) for pair in pairs if pair[0] != pair[1]]
        if not links:
            return self.cluster.link
        slowness = sum(1 / link.bandwidth for link in links)
        bandwidth = len(links) / slowness if slowness else inf
        return Link(bandwidth, sum(link.latency for link in links) / len(links))

    def seats(self, training: Training, least: int) -> list[Seat]:
        """A seat for each stage, of which ``least`` are needed; stages on one rank share its memory."""
        reserved = training.reserved or (0,) * len(self.cluster)
        all_ranks = [rank for ranks in self.ranks for rank in ranks]
        seats = []
        for stage, ranks in enumerate(self.ranks):
            memory = inf
            for rank in ranks:
                limit = self.cluster.devices[rank].memory
                if limit is not None:
                    memory = min(memory, max(0, limit - reserved[rank]) / all_ranks.count(rank))
            speed = len(ranks) * min(self.cluster.devices[rank].speed for rank in ranks)
            in_flight = 1 if training.again else training.in_flight[stage]
            seats.append(Seat(speed, memory, in_flight, stage >= least))
        return seats
