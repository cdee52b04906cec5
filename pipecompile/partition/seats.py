"""Devices of each stage, and the seat that the solver sees for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from math import inf
from statistics import fmean

from pipecompile.ir.cluster import Cluster, Link
from pipecompile.partition.memory_model import Training
from pipecompile.partition.solver.problem import Seat


@dataclass(frozen=True)
class Seating:
    """Stages with ``replicas`` each on the devices of a cluster, in order, or on the ranks that are given.

    To the solver, a stage with r replicas is a seat r times as fast as its slowest device, with the memory of its
    smallest. A seat sends over the link to the next seat and receives over the link from the previous one, whatever the
    actual target or source. For replicas this is the mean of their links.
    """

    cluster: Cluster
    replicas: tuple[int, ...]  # stage -> number of devices that run it
    rank_of: tuple[int, ...] = ()  # stage -> rank, where ranks run several stages; empty: in order, repeating

    @staticmethod
    def of(num_stages: int, cluster: Cluster, replicas: Sequence[int] = (), rank_of: Sequence[int] = ()) -> Seating:
        """``num_stages`` stages, by default without replicas."""
        return Seating(cluster, tuple(replicas[:num_stages]) or (1,) * num_stages, tuple(rank_of))

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """stage -> ranks that run it"""
        if self.rank_of:
            return tuple((rank,) for rank in self.rank_of)
        begin = [sum(self.replicas[:stage]) for stage in range(len(self.replicas))]
        return tuple(
            tuple(place % len(self.cluster) for place in range(first, first + count))
            for first, count in zip(begin, self.replicas, strict=True)
        )

    @cached_property
    def links(self) -> tuple[tuple[Link, ...], ...]:
        """The links from the ranks of each stage to those of the next, without those within a rank."""
        rows = (product(here, there) for here, there in pairwise(self.ranks))
        return tuple(tuple(self.cluster.between(*pair) for pair in row if pair[0] != pair[1]) for row in rows)

    def fastest_link(self, nbytes: float) -> Link:
        """The fastest link for a value of ``nbytes``. A link that takes no time is chosen only if all take none."""
        links = [link for row in self.links for link in row] or [self.cluster.link]
        return min(links, key=lambda link: link.seconds(nbytes) or inf)

    def factors(self, nbytes: float) -> list[float]:
        """The time of each link from stage to stage for a value of ``nbytes``, relative to the fastest link."""
        unit = self.fastest_link(nbytes).seconds(nbytes) or 1.0
        rows = ([link.seconds(nbytes) / unit for link in row] or [1.0] for row in self.links)
        return [max(1.0, fmean(row)) for row in rows]

    def memory(self, training: Training) -> tuple[float, ...]:
        """The bytes of each rank that stages may use."""
        reserved = training.reserved or (0,) * len(self.cluster)
        devices = zip(self.cluster.devices, reserved, strict=True)
        return tuple(inf if device.memory is None else max(0, device.memory - taken) for device, taken in devices)

    def seats(self, training: Training, least: int, nbytes: float, again: float) -> list[Seat]:
        """A seat per stage. The first ``least`` must not be empty. Stages on one rank share its memory.

        Args:
            training: what memory depends on.
            least: the number of stages that must not be empty.
            nbytes: the size of a value for which links are compared.
            again: the factor by which recomputing activations slows a stage down, if only some stages do.
        """
        factors = [1.0, *self.factors(nbytes), 1.0]
        room = self.memory(training)
        all_ranks = [rank for ranks in self.ranks for rank in ranks]
        seats = []
        for stage, ranks in enumerate(self.ranks):
            memory = min(room[rank] / all_ranks.count(rank) for rank in ranks)
            speed = len(ranks) * min(self.cluster.devices[rank].speed for rank in ranks)
            is_again = bool(training.again) and training.again[stage]
            if is_again and not training.all_again:
                speed /= again
            in_flight = 1 if is_again else training.in_flight[stage]
            seats.append(
                Seat(
                    speed=speed,
                    memory=memory,
                    in_flight=in_flight,
                    may_idle=stage >= least,
                    sends=factors[stage + 1],
                    receives=factors[stage],
                )
            )
        return seats
